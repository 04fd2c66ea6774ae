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

if TYPE_CHECKING:
    import gymnasium as gym

    from acodm_env.agents.learning import Learner


PROXY_ONLY = (
    "corpus", "proxy", "episode_steps", "steps_per_action", "reward", "fields", "action_scale", "action_floor", "lag",
    "batch_size", "sequence_length", "learning_rate", "device",
)  # fmt: skip
"""Settings that describe the proxy's environment."""
PROXY_EPISODES, PROXY_EVALUATE_EVERY = 10, 5
SURROGATE_EVALUATE_EVERY = 50
FAMILY_EVALUATIONS = 16
"""Episodes of an evaluation where each has a surface of its own."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Learn a mixing policy on a proxy language model; the same command again, or --resume, goes on."""

    algo: str = "td3"
    """Algorithm: td3, ddpg, sac, ppo, a2c, acodm-td3, acodm-ddpg, equivariant-td3; with the extra contrib also tqc,
    crossq and trpo."""
    surrogate: str | None = None
    """Learn on a surrogate instead of a proxy: a surface's name or file, such as regmix-1m, or the environment's
    settings as JSON: {"surface": "regmix-1m", "noise": 0}."""
    envs: int | None = None
    """Surrogate episodes at a time, as arrays; default: n_envs of the algorithm's hyper-parameters."""
    corpus: str = "pocket"
    """Folder of a token store, or "pocket"."""
    proxy: str = "tiny"
    """Proxy model: preset, config.json or hub name."""
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
    agent: dict[str, Any] = field(default_factory=dict)
    """Changes of the agent's hyper-parameters (`AgentRecipe`), as JSON: {"gamma": 0.95, "hidden": [64, 64]}."""
    conf_file: str | None = None
    """YAML file of hyper-parameters in RL-Zoo's format, such as one by `acodm tune`; default: the shipped ones."""
    teacher: str | None = None
    """Mixer whose decisions fill the replay buffer and pre-train actor and critic (off-policy algorithms)."""
    teacher_decisions: int = 200
    """Decisions of the teacher."""
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
        defaults = {
            "episodes": PROXY_EPISODES if self.surrogate is None else self._surrogate_episodes(),
            "evaluate_every": PROXY_EVALUATE_EVERY if self.surrogate is None else SURROGATE_EVALUATE_EVERY,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        least = {"episodes": 1, "evaluate_every": 0, "episode_steps": 1, "steps_per_action": 1, "seed": 0}
        for name, lowest in (least | {"teacher_decisions": 1}).items():
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
        from acodm_env.agents.hyperparameters import SURROGATE, read_settings

        settings, kwargs = read_settings(self.algo, SURROGATE, self.conf_file), self.env_kwargs()
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
        return int(read_settings(self.algo, self.env_id, self.conf_file).get("n_envs", 1))

    def env_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `gym.make(env_id)`."""
        if self.surrogate is not None:
            return surrogate_kwargs(self.surrogate, self.algo, self.conf_file)
        return {
            "corpus": self.corpus,
            "proxy": self.proxy,
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
    from acodm_env.agents.hyperparameters import SURROGATE, read_settings

    given = _json("surrogate", text, "a surface's name or file") if text.lstrip().startswith("{") else {"surface": text}
    return {**read_settings(algo, SURROGATE, conf_file).get("env_kwargs", {}), **given}


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
    reward = {"reward": "progress"} if kwargs.get("family") is not None else {}
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
        evaluation_episodes=FAMILY_EVALUATIONS if config.env_kwargs().get("family") is not None else 1,
        checkpoint_every=1 if config.surrogate is None else config.evaluate_every or config.episodes,
        teacher=config.teacher,
        teacher_decisions=config.teacher_decisions,
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
    return {key: value for key, value in asdict(config).items() if key not in ("out", "resume", "quiet")}


def run(config: TrainConfig) -> None:
    """Learn, print the log's last lines and where the results lie."""
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
