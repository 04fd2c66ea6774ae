"""The run of a trainer under a mixer, logged into a folder, resumed exactly where it was left.

A step is logged, then evaluated if it is time, then saved if it is time. What was logged after the checkpoint that a
run goes on from is done again.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.console import note
from acodm_env.experiments.run.checkpoints import Checkpoint, Checkpoints
from acodm_env.experiments.run.folder import RunFolder, differences, recorded_config
from acodm_env.experiments.run.override import OverriddenMixer, WeightOverride
from acodm_env.experiments.run.preemption import Preempted, never
from acodm_env.run_log import EvaluationLine, LogLine, StepLine, plain
from acodm_env.step_stats import StepStats
from acodm_env.trainer import Mixer, Trainer, drive
from acodm_env.wrapper import innermost

FIXED = ("target", "batch_size", "sequence_length", "seed")
"""Settings that no run can change on its way: model, shape of a step, order of the data."""
DECIDING = ("policy", "mixer", "weights", "name", "decision_every", "domains", "targets", "objective", "metric")
"""Settings with which a mixer begins anew."""
DATA = ("domains", "corpus_fingerprint")
"""Settings with which another thing is learned and evaluated."""
LOADING = (*DATA, "prefetch")
"""Settings with which the data go on in another way."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """When a run is saved, and from what it goes on."""

    every: int | None = None
    """Optimiser steps between checkpoints; default: about a tenth of the run, at decisions."""
    keep: int = 2
    """Checkpoints that stay."""
    final: bool = False
    """Whether the last step is saved too."""
    adapt: bool = False
    """Go on although settings, mixer or domains are others than the checkpoint's."""
    stop: Callable[[], bool] = never
    """Asked before and after every step: whether to save and end now."""


def run_mixer(
    folder: RunFolder,
    trainer: Trainer,
    mixer: Mixer,
    *,
    seed: int,
    evaluations: int,
    on_step: Callable[[StepStats], None] = lambda stats: None,
    saving: Saving | None = None,
    override: WeightOverride | None = None,
) -> None:
    """Train to the horizon under `mixer`, logging into `folder` and resuming where an interruption left off.

    Evaluates on the test split at least `evaluations` times, evenly spaced, at the start and at the end; never if 0.
    `override` is the operator's, if one may change the mixture.

    Raises:
        DataError: the checkpoints are another run's or not whole; no space is left, and which checkpoint stays.
        Preempted: `saving.stop` said so; the run is saved.
    """
    saving = saving or Saving()
    horizon, interval = trainer.info.horizon, trainer.info.decision_every
    evaluate_every = max(1, horizon // evaluations) if evaluations else 0
    save_every = saving.every or interval * max(1, horizon // (10 * interval))
    checkpoints = Checkpoints(folder.path / "checkpoints", saving.keep)
    steered = OverriddenMixer(mixer, override)
    trainer.reset(np.random.default_rng(seed))
    steered.start(trainer.info)
    resume(folder, trainer, steered, checkpoints, adapt=saving.adapt)
    steered.step = trainer.steps_done

    def save() -> Path:
        folder.sync()
        state = {"trainer": trainer.state_dict(), "mixer": steered.state_dict()}
        return checkpoints.write(trainer.steps_done, state, folder.config, world_of(trainer))

    def evaluate_if_due(step: int, *, last: bool = False) -> None:
        if evaluations and (last or step % evaluate_every == 0 or step == horizon):
            log_evaluation(folder, checkpoints, trainer, step)

    def end_if_asked(step: int, *, saved: bool) -> None:
        if saving.stop():
            raise Preempted(f"after step {step} of {horizon}", checkpoints.last() if saved else save())

    if trainer.steps_done < horizon:
        end_if_asked(trainer.steps_done, saved=True)
    done = [line.step for line in folder.evaluations]
    if trainer.steps_done not in done:
        evaluate_if_due(trainer.steps_done, last=not done)
    if trainer.steps_done < horizon:
        end_if_asked(trainer.steps_done, saved=True)
    for stats, seconds in _timed(drive(trainer, steered, horizon - trainer.steps_done)):
        deciding = steered.take_seconds()
        append(folder, checkpoints, StepLine.of_step(stats, seconds, deciding, steered.diagnostics()))
        on_step(stats)
        if stats.skipped or stats.diverged:
            note(nonfinite(stats, trainer.info.domains, checkpoints))
        ends = stats.step == horizon or stats.diverged
        if not ends:
            end_if_asked(stats.step, saved=False)  # an evaluation that is due is made by who goes on
        evaluate_if_due(stats.step, last=ends)
        due = stats.step % save_every == 0 if not ends else saving.final and not stats.diverged
        if due:
            save()
        if not ends:
            end_if_asked(stats.step, saved=due)


def append(folder: RunFolder, checkpoints: Checkpoints, line: LogLine) -> None:
    """Append a line to its log.

    Raises:
        DataError: there is no space left, and which checkpoint stays.
    """
    try:
        folder.append(line)
    except DataError as error:
        raise DataError(f"{folder.path / line.log}: {checkpoints.still_there(error)}") from error


def resume(folder: RunFolder, trainer: Trainer, mixer: Mixer, checkpoints: Checkpoints, *, adapt: bool = False) -> None:
    """Put trainer and mixer where the newest whole checkpoint is, and the logs; says which, and what was skipped.

    Args:
        folder: of the run, with the settings that it shall go on with.
        trainer: just reset.
        mixer: just started.
        checkpoints: of the run.
        adapt: let settings differ from the checkpoint's.

    Raises:
        ConfigError, DataError: they differ, and may not.
    """
    found, changed = find(folder, checkpoints, trainer.info.horizon, adapt=adapt)
    if found is None:
        folder.adopt(0)
        folder.rewind(-1 if changed else 0)
        return
    if changed.keys() & {*LOADING}:
        trainer.load_state_dict(found.state["trainer"], adapt=True)  # type: ignore[call-arg]
    else:
        trainer.load_state_dict(found.state["trainer"])
    if not changed.keys() & {*DECIDING}:
        mixer.load_state_dict(found.state["mixer"])
    folder.rewind(found.step)
    say_resumed(found, trainer)
    if changed:
        _adapted(folder, trainer, mixer, checkpoints, changed)


def find(
    folder: RunFolder, checkpoints: Checkpoints, horizon: int, *, adapt: bool = False
) -> tuple[Checkpoint | None, dict[str, list[Any]]]:
    """The newest whole checkpoint, None if there is none yet, and the settings that have changed since.

    Raises:
        ConfigError, DataError: they may not change, or not in this way.
    """
    found = checkpoints.newest()
    for reason in found.skipped if found else ():
        note(f"skipped {reason}")
    changed = differences(found.identity if found else recorded_config(folder.path), folder.config)
    _check_changes(found.path if found else folder.path, changed, adapt)
    done = found.step if found else 0
    if done > horizon:
        raise ConfigError(f"steps={horizon}: must be at least {done}, which the run has done")
    if done == horizon and changed.keys() & {*DATA}:
        raise ConfigError(
            f"steps={horizon}: must be more than {done}, which the run has done, to go on with other data"
        )
    return found, changed


def _check_changes(where: Path, changed: dict[str, list[Any]], adapt: bool) -> None:
    """Refuse what may not change, and everything else that was not said to."""
    for name, (there, now) in changed.items():
        what = f"{where}: must be of a run with {name}={now!r}; it is of one with {there!r}"
        if name in FIXED:
            raise DataError(what)
        if not adapt:
            raise DataError(
                f"{what}; remove it, or, for a run of acodm transfer, go on from it with these settings by --adapt"
            )


def say_resumed(found: Checkpoint, trainer: Trainer) -> None:
    """Say where a run goes on from."""
    note(f"resumed from {found.path}: step {found.step} of {trainer.info.horizon}")
    world = world_of(trainer)
    if world != found.world:
        note(
            f"{world} processes instead of {found.world}: cursors are global, nothing was redistributed; each process "
            f"takes every {world}th row of a batch"
        )


def _adapted(
    folder: RunFolder, trainer: Trainer, mixer: Mixer, checkpoints: Checkpoints, changed: dict[str, list[Any]]
) -> None:
    """Record that the run goes on with other settings, in its checkpoint as well."""
    folder.adopt(trainer.steps_done)
    state = {"trainer": trainer.state_dict(), "mixer": mixer.state_dict()}
    checkpoints.write(trainer.steps_done, state, folder.config, world_of(trainer))
    what = ", ".join(f"{name}={now!r} (was {there!r})" for name, (there, now) in changed.items())
    afresh = "; the mixer begins anew" if changed.keys() & {*DECIDING} else ""
    note(f"adapted: {what}{afresh}")


def nonfinite(stats: StepStats, domains: tuple[str, ...], checkpoints: Checkpoints) -> str:
    """What to say of a step whose loss or gradient is not finite."""
    guilty = [name for name, bad in zip(domains, stats.guilty, strict=True) if bad]
    what = f"the loss of {', '.join(guilty)} is" if guilty else "the gradient is, though no loss,"
    what = f"step {stats.step}: {what} not finite"
    if not stats.diverged:
        return f"{what}; the step was skipped, the run goes on"
    last = checkpoints.last()
    good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    return f"{what}; the step was not applied, and the run ends; {good}"


def world_of(trainer: Any) -> int:
    """How many processes train."""
    return int(getattr(getattr(innermost(trainer), "ranks", None), "world", 1))


def _timed(steps: Iterator[StepStats]) -> Iterator[tuple[StepStats, float]]:
    """Each step with its wall-clock seconds: mixer and training, without the logging between steps."""
    while True:
        started = time.perf_counter()
        stats = next(steps, None)
        if stats is None:
            return
        yield stats, time.perf_counter() - started


def log_evaluation(folder: RunFolder, checkpoints: Checkpoints, trainer: Trainer, step: int) -> None:
    """Evaluate on the test split, and append what it gave."""
    started = time.perf_counter()
    losses = trainer.evaluate("test")
    seconds = time.perf_counter() - started
    targets = list(trainer.info.targets)
    append(folder, checkpoints, EvaluationLine(step=step, losses=plain(losses), targets=targets, seconds=seconds))
