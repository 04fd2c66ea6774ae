"""Finished runs as courses for `acodm fit-surrogate --from-run`: what was played and learned, and what they share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.agents.baselines.recorded import MEAN_OF
from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.console import note
from acodm_env.experiments.run.folder import recorded_config
from acodm_env.run_log import EvaluationLine, Numbers, StepLine, array, read_log
from acodm_env.step_stats import Array
from acodm_env.surrogate.calibration import Course, Setting

SHARED = (
    *("domains", "targets", "objective", "corpus_fingerprint", "model", "target", "steps"),
    *("batch_size", "sequence_length", "learning_rate", "schedule"),
)
"""Settings that all runs of a fit must share, where they have them."""


class Logs:
    """The finished runs below some folders."""

    def __init__(self, folders: Sequence[str], like: "Logs | None" = None):
        """Read them.

        Args:
            folders: of runs, or of a benchmark or anything else that has runs below it.
            like: runs whose settings these must have too.

        Raises:
            ConfigError: a folder is not there or has no finished run, or runs differ in what they must share.
            DataError: a log is not whole.
        """
        found = [run for folder in folders for run in runs_below(Path(folder))]
        self.paths = [path for path in dict.fromkeys(found) if is_finished(path)]
        if not self.paths:
            raise ConfigError(
                f"run={', '.join(folders)}: must hold at least one finished, undiverged run with evaluations"
            )
        if len(self.paths) < len(found):
            note(f"left out {len(found) - len(self.paths)} runs that are unfinished, diverged or given twice")
        self.config: dict[str, Any] = recorded_config(self.paths[0]) if like is None else like.config
        self.targets: tuple[str, ...] = () if like is None else like.targets
        self.epochs: list[Array] = []
        self.courses = [self._course(path) for path in self.paths]

    def _course(self, path: Path) -> Course:
        config = recorded_config(path)
        for name in SHARED:
            if config.get(name) != self.config.get(name):
                raise ConfigError(
                    f"run={path}: must have {name}={self.config.get(name)!r} as the first run has; it has "
                    f"{config.get(name)!r}; fit them apart"
                )
        steps, evaluations = read_logs(path)
        try:
            self.targets = self.targets or tuple(evaluations[0].targets)
            if any(tuple(line.targets) != self.targets for line in evaluations):
                raise ConfigError(f"run={path}: must have the targets {', '.join(self.targets)}; fit it apart")
            realised = array([line.realised for line in steps])
            self.epochs.append(array(steps[-1].epochs))
            later = [line for line in evaluations if line.step > 0]
            first = [line for line in evaluations if line.step == 0]
            return Course(
                name=str(path),
                mixer=str(config.get("mixer") or config.get("name") or "policy"),
                weights=effective(realised, [line.loss_weights for line in steps]),
                steps=np.array([line.step for line in later]),
                losses=array([line.losses for line in later]),
                initial=array(first[0].losses) if first else None,
                drawn=realised * config["batch_size"],
                training=array([line.losses for line in steps]),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"run={path}: its logs lack what a fit needs ({error!r}); leave it out") from error

    def setting(self, initial_loss: float | None, sizes: Mapping[str, float] | None) -> Setting:
        """What the runs share.

        Args:
            initial_loss: of an untrained model in nats; None takes the evaluations before the first step.
            sizes: tokens per domain that are known otherwise; the others follow from how often a run saw them.

        Raises:
            ConfigError: no run was evaluated before its first step, and no initial loss is given.
        """
        config = self.config
        starts = [course.initial for course in self.courses if course.initial is not None]
        if initial_loss is None and not starts:
            raise ConfigError("initial_loss=None: must be given; no run was evaluated before its first step")
        sequence_length = config["sequence_length"]
        run_tokens = float(config["batch_size"] * sequence_length * len(self.courses[0].weights))
        measured = self._sizes(sequence_length, 1e6 * run_tokens)
        domains = tuple(config["domains"])
        return Setting(
            domains=domains,
            targets=self.targets,
            sizes_tokens=tuple((sizes or {}).get(name, size) for name, size in zip(domains, measured, strict=True)),
            run_tokens=run_tokens,
            sequence_length=sequence_length,
            initial_loss_nats=float(np.mean(starts)) if initial_loss is None else initial_loss,
            objective=tuple(config.get("objective") or ()),
        )

    def _sizes(self, sequence_length: int, unknown: float) -> list[float]:
        """Tokens per domain: tokens drawn over epochs, from the run that drew most; `unknown` where none drew any."""
        tokens = np.stack([course.drawn.sum(0) * sequence_length for course in self.courses])  # (R, K)
        epochs = np.stack(self.epochs)
        most, every = epochs.argmax(0), np.arange(epochs.shape[1])
        seen = epochs[most, every] > 0
        sizes = np.where(seen, tokens[most, every] / np.where(seen, epochs[most, every], 1.0), unknown)
        return [float(size) for size in sizes.round()]


def split(courses: Sequence[Course]) -> tuple[list[Course], list[Course], str]:
    """Runs to fit, runs to judge by, and in words which those are.

    Every fifth mixer is held out with all its runs and with those that replay its mean; where fewer than five mixers
    besides uniform drove the runs, every fifth run is. Uniform's are always fitted: the surface is compared with them.
    """
    names = {course.name: course.mixer.removeprefix(MEAN_OF) for course in courses}
    mixers = sorted(set(names.values()) - {"uniform"})
    if len(mixers) >= 5:
        chosen = mixers[4::5]
        held_out = [course for course in courses if names[course.name] in chosen]
        words = f"every fifth mixer: {', '.join(chosen)}"
    else:
        others = [course for course in courses if names[course.name] != "uniform" or len(mixers) == 0]
        held_out, words = others[4::5], "every fifth run"
    out = {course.name for course in held_out}
    return [course for course in courses if course.name not in out], held_out, words


def runs_below(folder: Path) -> list[Path]:
    """Folders below `folder`, itself included, that hold evaluations.

    Raises:
        ConfigError: it is no folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"run={folder}: must be the folder of a run or of a benchmark; check the path")
    return sorted(file.parent for file in folder.rglob("eval.jsonl") if file.stat().st_size)


def is_finished(path: Path) -> bool:
    """Whether it has a result and did not diverge."""
    if not all((path / name).exists() for name in ("config.json", "result.json", "stats.jsonl")):
        return False
    steps, _ = read_logs(path)
    return not steps[-1].diverged


def read_logs(path: Path) -> tuple[list[StepLine], list[EvaluationLine]]:
    """Steps and evaluations of a run.

    Raises:
        DataError: a line is damaged, or there is none.
    """
    steps, evaluations = read_log(path, StepLine), read_log(path, EvaluationLine)
    if not (steps and evaluations):
        raise DataError(
            f"{path}: must hold a whole line in {StepLine.log} and in {EvaluationLine.log}; one is empty or was cut "
            f"short; leave the run out"
        )
    return steps, evaluations


def effective(realised: Array, factors: Sequence[Numbers | None]) -> Array:
    """Mixtures (T, K) that the losses were weighted by: shares drawn × loss weights, rows summing to 1."""
    weighted = [
        row if factor is None else row * np.array(factor) for row, factor in zip(realised, factors, strict=True)
    ]
    mixtures = np.array(weighted)
    scaled: Array = mixtures / mixtures.sum(1, keepdims=True)
    return scaled
