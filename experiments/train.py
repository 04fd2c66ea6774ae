"""`acodm train`: learn a mixing policy on a proxy language model."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.errors import ConfigError, unknown
from acodm_env.experiments.console import listing, progress, say
from acodm_env.experiments.runs import RunFolder, versions
from acodm_env.files import write_json

if TYPE_CHECKING:
    import gymnasium as gym

    from acodm_env.agents.learning import Learner


ALGORITHMS = ("td3", "ddpg", "sac", "ppo", "a2c")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Learn a mixing policy on a proxy language model; the same command again, or --resume, goes on."""

    algo: str = "td3"
    """Algorithm: td3, ddpg, sac, ppo or a2c."""
    corpus: str = "pocket"
    """Folder of a token store, or "pocket"."""
    proxy: str = "tiny"
    """Proxy model: preset, config.json or hub name."""
    episodes: int = 10
    """Episodes; each is one training run of the proxy from scratch."""
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
    """Hyper-parameters of the agent (`AgentRecipe`), as JSON: {"gamma": 0.95, "hidden": [64, 64]}."""
    evaluate_every: int = 5
    """Episodes between evaluations of the deterministic policy; the best one is kept."""
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
        if self.algo not in ALGORITHMS:  # before the corpus, which may have to be harvested
            unknown("algo", self.algo, ALGORITHMS)
        for name, least in (("episodes", 1), ("episode_steps", 1), ("steps_per_action", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")

    def env_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `gym.make("acodm/ProxyPretrain-v0")`."""
        return {
            "corpus": self.corpus,
            "proxy": self.proxy,
            "episode_steps": self.episode_steps,
            "steps_per_action": self.steps_per_action,
            "fields": self.fields.split(",") if self.fields else None,
            "reward": _reward(self.reward),
            "action": {"scale": self.action_scale, "floor": self.action_floor},
            "lag": self.lag,
            "device": self.device,
            "lm": {
                "batch_size": self.batch_size,
                "sequence_length": self.sequence_length,
                "learning_rate": self.learning_rate,
            },
        }


def _reward(text: str) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"reward={text}: must be a term's name or valid JSON ({error})") from error


def make_env(config: TrainConfig) -> Callable[[], "gym.Env[Any, Any]"]:
    """A function that makes the environment."""
    import gymnasium as gym

    import acodm_env  # noqa: F401 (registers the environment)

    return lambda: gym.make("acodm/ProxyPretrain-v0", disable_env_checker=True, **config.env_kwargs())


def make_learner(config: TrainConfig) -> "Learner":
    """The learner of a configuration, as it was before its first episode."""
    from acodm_env.agents.learning import Learner, Learning
    from acodm_env.agents.sb3 import AgentRecipe
    from acodm_env.config import from_dict

    learning = Learning(
        algo=config.algo, episodes=config.episodes, evaluate_every=config.evaluate_every, seed=config.seed
    )
    return Learner(make_env(config), learning, from_dict(AgentRecipe, config.agent, "agent"), Path(config.out))


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What must be equal for a run to be the same run."""
    return {key: value for key, value in asdict(config).items() if key not in ("out", "resume", "quiet")}


def run(config: TrainConfig) -> None:
    """Learn, print the log's last lines and where the results lie."""
    result = train(config)
    say(listing((name, value) for name, value in result.items() if name not in ("rows", "config", "versions")))
    say(episode_table(result["rows"]))
    say(f"run: {config.out} (checkpoints/best, logs/, result.json); next: acodm export --run {config.out} --out DIR")


def train(config: TrainConfig) -> dict[str, Any]:
    """Learn (or resume, or just report) and return the run's `result.json`."""
    if config.resume and not (Path(config.out) / "config.json").exists():
        raise ConfigError(f"resume=True: there is no run in {config.out} to go on with; leave --resume out")
    learner = make_learner(config)
    folder = RunFolder(config.out, settings_of(config))
    total = config.episodes * learner.decisions
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
        "rows": learner.rows,
        "config": folder.config,
        "versions": versions(),
    }
    write_json(folder.path / "result.json", result)
    return result


def _nats(objective: float | None) -> str:
    return "  diverged" if objective is None else f"{objective:10.4f}"


def episode_table(rows: list[dict[str, Any]], last: int = 10) -> str:
    """The last episodes: return, objective, saturation and clipping."""
    lines = ["episode    return  objective  saturated  clipped  evaluated"]
    for row in rows[-last:]:
        evaluated = _nats(row["eval_objective"]) if "eval_objective" in row else ""
        lines.append(
            f"{row['episode']:7d} {row['return']:9.3f} {_nats(row['objective'])} {row['saturation']:10.1%} "
            f"{row['clipped']:8.1%} {evaluated}"
        )
    return "\n".join(lines)
