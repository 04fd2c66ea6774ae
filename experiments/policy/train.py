"""`acodm train`: learn a mixing policy on a proxy language model, or on a surrogate of measured runs."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.errors import ConfigError
from acodm_env.experiments.console import listing, progress, say
from acodm_env.experiments.policy.config import PROBLEM, TrainConfig
from acodm_env.experiments.run.folder import RunFolder, versions
from acodm_env.files import write_json
from acodm_env.objective import describe, parse_targets

if TYPE_CHECKING:
    import gymnasium as gym

    from acodm_env.agents.learning import Learner


FAMILY_EVALUATIONS = 16
"""Episodes of an evaluation where each has a surface of its own."""


def make_env(env_id: str, kwargs: Mapping[str, Any]) -> Callable[[], "gym.Env[Any, Any]"]:
    """A function that makes one environment."""
    import gymnasium as gym

    import acodm_env  # noqa: F401 (registers the environments)

    # One environment runs no uniform episode beside surfaces that differ from episode to episode.
    given = kwargs.get("reward")
    beside = isinstance(given, Mapping) and given.get("progress_over_uniform", False)
    varied = kwargs.get("family") is not None or (kwargs.get("problems") is not None and beside)
    reward = {"reward": "progress"} if varied else {}
    return lambda: gym.make(env_id, disable_env_checker=True, **{**kwargs, **reward})


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
        from acodm_env.experiments.policy.train_apg import run_apg

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


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm train, or python -m acodm_env train")
