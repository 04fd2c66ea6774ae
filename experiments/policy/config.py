"""What `acodm train` is told."""

import json
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from acodm_env.config import from_dict, split_names
from acodm_env.errors import ConfigError
from acodm_env.objective import check_metric, parse_targets

_UNUSED = ("episodes", "envs", "conf_file", "teacher", "evaluate_every", "init")
"""Settings of agents that learn from transitions."""
_READ = {"problems", "action", "fields", "surface", "reward", "episode_steps"}
"""Settings of the surrogate that are read, or come with `--surrogate problems`."""

if TYPE_CHECKING:
    from acodm_env.agents.apg import ApgConfig
    from acodm_env.surrogate.problems import ProblemFamily

PROXY_ONLY = (
    "corpus", "proxy", "episode_steps", "steps_per_action", "reward", "fields", "action_scale", "action_floor", "lag",
    "batch_size", "sequence_length", "learning_rate", "device", "eval_sequences", "objective", "targets",
    "domains", "cut",
)  # fmt: skip
"""Settings that describe the proxy's environment."""
PROBLEM = ("objective", "targets", "domains", "cut")
"""Settings of the problem; a run keeps those that are not the default, as runs before there were any."""
PROBLEMS_ENV: dict[str, Any] = {"reward": {"terms": {"final": 1.0}, "final_over_uniform": True}, "episode_steps": 20}
"""Settings of episodes on random problems: 20 decisions, and at the end the gain over uniform in nats."""
PROXY_EPISODES = 10
PROXY_EVALUATE_EVERY = 5
SURROGATE_EVALUATE_EVERY = 50


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
            pass

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
        from acodm_env.policy.load import open_policy

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
            "fields": split_names(self.fields) if self.fields else None,
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


def check_apg(config: "TrainConfig") -> None:
    """Refuse settings that mean nothing here.

    Raises:
        ConfigError: it is not to learn on random problems, or a setting of other algorithms is given.
    """
    if config.surrogate is None or "problems" not in config.env_kwargs():
        raise ConfigError(
            f"surrogate={config.surrogate}: must be problems for apg, which differentiates through them; "
            f'--surrogate problems, or JSON: {{"problems": {{…}}}}; on a proxy learn with equivariant-ppo or another'
        )
    for name in _UNUSED:
        if getattr(config, name, None) is not None:
            raise ConfigError(
                f"{name}={getattr(config, name)}: must be left out with apg; its settings are those of `ApgConfig`: "
                f"--agent '{{\"iterations\": 4000}}'"
            )
    if config.resume:
        raise ConfigError("resume=True: must be left out with apg: an interrupted run starts again, to the same result")
    if config.seed < 0:
        raise ConfigError(f"seed={config.seed}: must be at least 0")
    if ignored := sorted(config.env_kwargs().keys() - _READ):
        raise ConfigError(f"surrogate.{ignored[0]}: means nothing to apg; it reads problems, action and fields")
    settings_of_apg(config)


def settings_of_apg(config: "TrainConfig") -> "tuple[ProblemFamily, ApgConfig]":
    """What is drawn, and how is learned.

    Raises:
        ConfigError: an unknown setting, with a suggestion.
    """
    from acodm_env.agents.apg import ApgConfig
    from acodm_env.surrogate.env import SurrogateConfig
    from acodm_env.surrogate.problems import ProblemFamily

    kwargs = config.env_kwargs()
    surrogate = from_dict(SurrogateConfig, kwargs, "surrogate")
    action = surrogate.action_map()
    shared = {"scale": action.scale, "floor": action.floor, "rate": action.rate, "seed": config.seed}
    fields = {} if surrogate.fields is None else {"fields": list(surrogate.fields)}
    family = from_dict(ProblemFamily, surrogate.problems or {}, "problems")
    return family, from_dict(ApgConfig, {**shared, **fields, **config.agent}, "agent")
