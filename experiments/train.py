"""`acodm train`: learn a mixing policy on a proxy language model, or on a surrogate of measured runs."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.errors import ConfigError
from acodm_env.experiments.console import listing, progress, say
from acodm_env.experiments.run_folder import RunFolder, versions
from acodm_env.files import write_json
from acodm_env.objective import check_metric, describe, parse_targets

if TYPE_CHECKING:
    import gymnasium as gym

    from acodm_env.agents.learning import Learner


PROXY_ONLY = (
    "corpus", "proxy", "episode_steps", "steps_per_action", "reward", "fields", "action_scale", "action_floor", "lag",
    "batch_size", "sequence_length", "learning_rate", "device", "eval_sequences", "objective", "targets",
    "domains", "cut",
)  # fmt: skip
"""Settings that describe the proxy's environment."""
PROBLEM = ("objective", "targets", "domains", "cut")
"""Settings of the problem; a run keeps those that are not the default, as runs before there were any."""
PROBLEMS_ENV = {"reward": {"terms": {"final": 1.0}, "final_over_uniform": True}, "episode_steps": 20}
"""Settings of episodes on random problems: 20 decisions, and at the end the gain over uniform in nats."""
PROXY_EPISODES, PROXY_EVALUATE_EVERY = 10, 5
SURROGATE_EVALUATE_EVERY = 50
FAMILY_EVALUATIONS = 16
"""Episodes of an evaluation where each has a surface of its own."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Learn a mixing policy on a proxy language model; the same command again, or --resume, goes on."""

    algo: str = "td3"
    """Algorithm: td3, ddpg, sac, ppo, a2c, acodm-td3, acodm-ddpg, equivariant-td3, equivariant-ppo; with the extra
    contrib also tqc, crossq and trpo; and apg (--surrogate problems), which differentiates through random surfaces."""
    surrogate: str | None = None
    """Learn on a surrogate instead of a proxy: a surface's name or file, such as regmix-1m, "problems" for random
    mixing problems, or the environment's settings as JSON: {"surface": "regmix-1m", "noise": 0}."""
    envs: int | None = None
    """Surrogate episodes at a time, as arrays; default: n_envs of the algorithm's hyper-parameters."""
    corpus: str = "pocket"
    """Folder of a token store, or "pocket"."""
    proxy: str = "tiny"
    """Proxy model: preset, config.json or hub name."""
    objective: str = "loss"
    """What is averaged over the targets: loss, or perplexity (its logarithm); rewards, and the choice of the best
    policy, go by it."""
    targets: str | None = None
    """Held-out targets with their weights, such as "prose=2,licences=1": domains, or texts that nothing is trained on;
    default: all domains that are trained on, alike."""
    domains: str | None = None
    """The domains of the corpus to train on, separated by commas; default: all."""
    cut: str | None = None
    """Sequences to which the training text of domains is cut, such as "prose=160"."""
    episodes: int | None = None
    """Episodes; each is one training run of the proxy from scratch. Default: 10, on a surrogate as many as
    n_timesteps of the algorithm's hyper-parameters holds."""
    episode_steps: int = 200
    """Optimiser steps per episode."""
    steps_per_action: int = 4
    """Optimiser steps per decision."""
    reward: str = "interaction"
    """Reward terms: a name, or JSON such as {"progress": 1.0} (interaction, alignment, progress, final)."""
    fields: str | None = None
    """Observation fields, separated by commas; default: all but pending."""
    action_scale: float = 2.0
    """c: how far an action can tilt the mixture (e^2c between two domains)."""
    action_floor: float = 0.1
    """ε: share of the mixture spread evenly."""
    lag: int = 0
    """Optimiser steps by which a mixture takes effect late."""
    batch_size: int = 16
    """Sequences per optimiser step."""
    sequence_length: int = 128
    """Tokens per sequence."""
    learning_rate: float = 3e-3
    """Peak learning rate of the proxy."""
    eval_sequences: int = 64
    """Held-out sequences per target."""
    agent: dict[str, Any] = field(default_factory=dict)
    """Changes of the agent's hyper-parameters (`AgentRecipe`), as JSON: {"gamma": 0.95, "hidden": [64, 64]}."""
    conf_file: str | None = None
    """YAML file of hyper-parameters in RL-Zoo's format, such as one by `acodm tune`; default: the shipped ones."""
    teacher: str | None = None
    """Mixer whose decisions fill the replay buffer and pre-train actor and critic (off-policy algorithms)."""
    teacher_decisions: int = 200
    """Decisions of the teacher."""
    init: str | None = None
    """Begin with this policy (generalist, or a folder): equivariant-ppo or equivariant-td3, whose untrained actor is
    the policy, in an environment with its fields and action map; the critic is warmed up before the actor moves."""
    warm_up: int = 200
    """Decisions under the initial policy from which the critic alone learns."""
    evaluate_every: int | None = None
    """Episodes between evaluations of the deterministic policy; the best one is kept. Default: 5, on a surrogate 50."""
    device: str = "auto"
    """Device of the proxy: auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of everything."""
    out: str = "runs/train"
    """Folder of the run."""
    resume: bool = False
    """Insist that there is a run to go on with."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        from acodm_env.agents.algorithms import require_fit

        require_fit(self.algo)  # before the corpus, which may have to be harvested
        self._check_surrogate()
        if self.algo == "apg":
            from acodm_env.experiments.train_apg import check_apg

            check_apg(self)
            return
        defaults = {
            "episodes": PROXY_EPISODES if self.surrogate is None else self._surrogate_episodes(),
            "evaluate_every": PROXY_EVALUATE_EVERY if self.surrogate is None else SURROGATE_EVALUATE_EVERY,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_metric(self.objective)
        parse_targets(self.targets)
        least = {"episodes": 1, "evaluate_every": 0, "episode_steps": 1, "steps_per_action": 1, "seed": 0}
        for name, lowest in (least | {"teacher_decisions": 1, "warm_up": 0}).items():
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {lowest}")
        if self.envs is not None and self.envs < 1:
            raise ConfigError(f"envs={self.envs}: must be at least 1")

    def _check_surrogate(self) -> None:
        if self.surrogate is None:
            if self.envs not in (None, 1):
                raise ConfigError(
                    f"envs={self.envs}: must be left out on a proxy, whose episodes are training runs; "
                    f"several at a time are for --surrogate"
                )
            return
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name in PROXY_ONLY and value != setting.default:
                raise ConfigError(
                    f"{setting.name}={value}: must be left out with --surrogate, it is the proxy's; give the "
                    f'surrogate\'s settings as JSON: --surrogate \'{{"surface": "regmix-1m", …}}\''
                )

    def _surrogate_episodes(self) -> int:
        from acodm_env.agents.hyperparameters import read_settings

        settings, kwargs = read_settings(self.algo, self._section, self.conf_file), self.env_kwargs()
        decisions = -(-int(kwargs.get("episode_steps", 40)) // int(kwargs.get("steps_per_action", 1)))
        return max(1, int(settings["n_timesteps"]) // decisions)

    @property
    def env_id(self) -> str:
        """Id of the environment that is learned on."""
        return "acodm/ProxyPretrain-v0" if self.surrogate is None else "acodm/Surrogate-v0"

    @property
    def num_envs(self) -> int:
        """Episodes at a time."""
        from acodm_env.agents.hyperparameters import read_settings

        if self.surrogate is None or self.envs is not None:
            return self.envs or 1
        return int(read_settings(self.algo, self._section, self.conf_file).get("n_envs", 1))

    @property
    def _section(self) -> str:
        """Of the hyper-parameters."""
        from acodm_env.agents.hyperparameters import PROBLEMS

        return PROBLEMS if self.env_kwargs().get("problems") is not None else self.env_id

    def env_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `gym.make(env_id)`."""
        return self._given_kwargs() | self._initial_kwargs()

    def _initial_kwargs(self) -> dict[str, Any]:
        """Fields and action map of the policy that learning begins with."""
        if self.init is None:
            return {}
        from acodm_env.agents.initial import environment_for
        from acodm_env.policy import open_policy

        policy = open_policy(self.init)
        settings, given = environment_for(policy), self._given_kwargs()
        if self.surrogate is not None and "problems" in given:
            settings["steps_per_action"] = policy.decision_every  # as often as it was learned to
        varies = self.surrogate is not None and {"problems", "family"} & given.keys()
        return settings | {"fields": [*settings["fields"], *(["mask"] if varies else [])]}

    def _given_kwargs(self) -> dict[str, Any]:
        if self.surrogate is not None:
            return surrogate_kwargs(self.surrogate, self.algo, self.conf_file)
        return {
            "corpus": self.corpus,
            "proxy": self.proxy,
            **{name: getattr(self, name) for name in PROBLEM},
            "episode_steps": self.episode_steps,
            "steps_per_action": self.steps_per_action,
            "fields": self.fields.split(",") if self.fields else None,
            "reward": read_reward(self.reward),
            "action": {"scale": self.action_scale, "floor": self.action_floor},
            "lag": self.lag,
            "device": self.device,
            "lm": {
                "batch_size": self.batch_size,
                "sequence_length": self.sequence_length,
                "learning_rate": self.learning_rate,
                "eval_sequences": self.eval_sequences,
            },
        }


def surrogate_kwargs(text: str, algo: str, conf_file: str | None) -> dict[str, Any]:
    """Keyword arguments of `acodm/Surrogate-v0`: those of the hyper-parameters, and over them those given.

    Args:
        text: a surface's name or file, or JSON.
        algo: whose hyper-parameters.
        conf_file: where, if not in the shipped file.

    Raises:
        ConfigError: no valid JSON object.
    """
    from acodm_env.agents.hyperparameters import PROBLEMS, SURROGATE, read_settings

    given = _json("surrogate", text, "a surface's name or file") if text.lstrip().startswith("{") else {"surface": text}
    given = {"problems": {}} if text == "problems" else given
    varied = given.get("problems") is not None
    section = PROBLEMS if varied else SURROGATE
    shipped = {} if algo == "apg" else dict(read_settings(algo, section, conf_file).get("env_kwargs", {}))
    if varied:
        shipped.pop("reward", None)  # of a section for one surface
        shipped = PROBLEMS_ENV | shipped
    return {**shipped, **given}


def read_reward(text: str) -> Any:
    """A term's name, or the settings that a JSON object holds.

    Raises:
        ConfigError: no valid JSON.
    """
    return _json("reward", text, "a term's name") if text.lstrip().startswith("{") else text


def _json(name: str, text: str, otherwise: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}={text}: must be {otherwise} or valid JSON ({error})") from error


def make_env(env_id: str, kwargs: Mapping[str, Any]) -> Callable[[], "gym.Env[Any, Any]"]:
    """A function that makes one environment."""
    import gymnasium as gym

    import acodm_env  # noqa: F401 (registers the environments)

    # One environment runs no uniform episode beside surfaces that differ from episode to episode.
    given = kwargs.get("reward")
    beside = isinstance(given, Mapping) and given.get("progress_over_uniform", False)
    varied = kwargs.get("family") is not None or (kwargs.get("problems") is not None and beside)
    reward = {"reward": "progress"} if varied else {}
    return lambda: gym.make(env_id, disable_env_checker=True, **(kwargs | reward))


def make_many(kwargs: Mapping[str, Any], num_envs: int) -> Callable[[], Any] | None:
    """A function that makes so many surrogates as arrays, or None for a single one."""
    from acodm_env.agents.vector import ArrayVecEnv
    from acodm_env.surrogate.vector import SurrogateVectorEnv

    return None if num_envs == 1 else lambda: ArrayVecEnv(SurrogateVectorEnv(num_envs, **kwargs))


def make_learner(config: TrainConfig) -> "Learner":
    """The learner of a configuration, as it was before its first episode."""
    from acodm_env.agents.hyperparameters import AgentRecipe
    from acodm_env.agents.learning import Learner, Learning
    from acodm_env.config import from_dict

    assert config.episodes is not None
    assert config.evaluate_every is not None
    learning = Learning(
        algo=config.algo,
        episodes=config.episodes,
        evaluate_every=config.evaluate_every,
        evaluation_episodes=FAMILY_EVALUATIONS if {"family", "problems"} & config.env_kwargs().keys() else 1,
        checkpoint_every=1 if config.surrogate is None else config.evaluate_every or config.episodes,
        teacher=config.teacher,
        teacher_decisions=config.teacher_decisions,
        init=config.init,
        warm_up=config.warm_up,
        seed=config.seed,
    )
    return Learner(
        make_env(config.env_id, config.env_kwargs()),
        learning,
        from_dict(AgentRecipe, config.agent, "agent"),
        Path(config.out),
        conf_file=config.conf_file,
        make_many=make_many(config.env_kwargs(), config.num_envs),
    )


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What must be equal for a run to be the same run."""
    later = (*PROBLEM, "init", "warm_up")
    usual = {one.name for one in fields(config) if one.name in later and getattr(config, one.name) == one.default}
    return {key: value for key, value in asdict(config).items() if key not in ("out", "resume", "quiet", *usual)}


def run(config: TrainConfig) -> None:
    """Learn, print the log's last lines and where the results lie."""
    if config.algo == "apg":
        from acodm_env.experiments.train_apg import run_apg

        run_apg(config, settings_of(config))
        return
    result = train(config)
    say(
        listing(
            (name, value) for name, value in result.items() if name not in ("rows", "config", "versions", "warm_up")
        )
    )
    if result["warm_up"]:
        say("warm-up: " + ", ".join(f"{name} {_figure(value)}" for name, value in result["warm_up"].items()))
    say(episode_table(result["rows"]))
    say(f"run: {config.out} (checkpoints/best, logs/, result.json); next: acodm export --run {config.out} --out DIR")


def train(config: TrainConfig) -> dict[str, Any]:
    """Learn (or resume, or just report) and return the run's `result.json`."""
    if config.resume and not (Path(config.out) / "config.json").exists():
        raise ConfigError(f"resume=True: there is no run in {config.out} to go on with; leave --resume out")
    learner = make_learner(config)
    folder = RunFolder(config.out, settings_of(config))
    total = learner.learning.episodes * learner.decisions
    with progress(total, f"{config.algo} learns", quiet=config.quiet, unit="decision") as bar:

        def on_decision(row: dict[str, Any]) -> None:
            bar.update(learner.agent.num_timesteps - bar.n)
            bar.set_postfix_str(f"reward {row['reward']:+.2f} saturation {row['saturation']:.0%}", refresh=False)

        learner.learn(on_decision)
    info = learner.env.trainer.info
    result = {
        "algo": config.algo,
        "episodes": len(learner.rows),
        "transitions": learner.agent.num_timesteps,
        "optimiser_steps": learner.steps,
        "tokens": learner.steps * info.batch_size * info.sequence_length,
        "seconds": learner.seconds,
        "best_objective_nats": learner.best_objective,
        **({} if config.surrogate else {"objective": describe(config.objective, parse_targets(config.targets))}),
        "warm_up": learner.warm_up,
        "rows": learner.rows,
        "config": folder.config,
        "versions": versions(),
    }
    write_json(folder.path / "result.json", result)
    return result


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _nats(objective: float | None) -> str:
    return "  diverged" if objective is None else f"{objective:10.4f}"


def episode_table(rows: list[dict[str, Any]], last: int = 10) -> str:
    """The last episodes: return, objective, saturation and clipping."""
    lines = ["episode    return  objective  saturated  clipped  evaluated"]
    for row in rows[-last:]:
        evaluated = _nats(row["eval_objective"]) if "eval_objective" in row else ""
        lines.append(
            f"{row['episode']:7d} {row['return']:9.3f} {_nats(row['objective'])} {row['saturation']:10.1%} "
            f"{'-' if row['clipped'] is None else format(row['clipped'], '.1%'):>8} {evaluated}"
        )
    return "\n".join(lines)
