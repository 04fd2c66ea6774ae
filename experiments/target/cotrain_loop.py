"""The loop of a co-trained run: where it begins, what is logged, when it is saved.

As in `run.loop`, a step is logged, then evaluated if it is time; it is saved at decisions, or wherever SIGTERM came.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from acodm_env.experiments.console import note, progress
from acodm_env.experiments.run.checkpoints import Checkpoints
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.experiments.run.loop import append, find, log_evaluation, nonfinite, say_resumed, world_of
from acodm_env.experiments.run.override import WeightOverride
from acodm_env.experiments.run.preemption import Preempted, never
from acodm_env.run_log import StepLine
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Trainer
from acodm_env.wrapper import TrainerWrapper

if TYPE_CHECKING:
    from acodm_env.agents.cotraining import Cotrainer


class StopRequested(Exception):
    """The run was asked to end before the step that was to come."""


class Recorded(TrainerWrapper):
    """A target whose every step is passed on, with the seconds that went by between it and the step before.

    It starts from the run's own seed and not from an episode's, so that model and data order are those that every
    mixer gets with that seed.
    """

    def __init__(self, inner: Trainer, seed: int, override: WeightOverride, stop: Callable[[], bool] = never):
        """Around a target, which may be led.

        Args:
            inner: the target.
            seed: of the run.
            override: the operator's, which may change every mixture.
            stop: asked before every step: whether to end now.
        """
        super().__init__(inner)
        self.on_step: Callable[[StepStats, float, float], None] = lambda stats, seconds, deciding: None
        """Told of every step: its statistics, its own seconds, and the seconds of deciding and learning before it."""
        self.override = override
        self._seed, self._stop = seed, stop
        self._clock = time.perf_counter()

    def reset(self, rng: np.random.Generator) -> None:
        """Start the run."""
        self.inner.reset(np.random.default_rng(self._seed))

    def step(self, weights: Array, loss_weights: Array | None = None) -> StepStats:
        """One optimiser step.

        Raises:
            StopRequested: to end instead. Nothing was done, and all that was done before is where it belongs.
        """
        if self._stop():
            raise StopRequested
        started = time.perf_counter()
        stats = self.inner.step(self.override.on(weights, self.steps_done), loss_weights)
        self.on_step(stats, time.perf_counter() - started, started - self._clock)
        self.restart_clock()
        return stats

    def restart_clock(self) -> None:
        """What went by since the last step was no part of deciding."""
        self._clock = time.perf_counter()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What the block takes is no part of deciding."""
        started = time.perf_counter()
        yield
        self._clock += time.perf_counter() - started


def run_cotrainer(
    folder: RunFolder,
    learner: "Cotrainer",
    target: Recorded,
    checkpoints: Checkpoints,
    *,
    evaluations: int,
    save_every: int | None,
    quiet: bool,
) -> None:
    """Take the decisions that are left, from the newest whole checkpoint if there is one.

    Args:
        folder: of the run.
        learner: agent and environment, not yet started.
        target: what the environment trains.
        checkpoints: of the run.
        evaluations: on the test split, evenly spaced, at the start and at the end.
        save_every: optimiser steps between checkpoints, which are taken at the decision that follows; None is a tenth.
        quiet: no progress bar.

    Raises:
        DataError: no checkpoint is whole, or it is another run's; no space is left, and which checkpoint stays.
        Preempted: it was asked to end; the run is saved.
    """
    horizon = target.info.horizon
    save_every = save_every or max(1, horizon // 10)
    _begin(folder, learner, target, checkpoints)

    def save() -> Path:
        folder.sync()
        return checkpoints.write(target.steps_done, learner.state_dict(), folder.config, world_of(target))

    with progress(horizon, str(folder.config["name"]), quiet=quiet) as bar:
        target.on_step = _logger(folder, learner, target, checkpoints, max(1, horizon // evaluations), bar)
        target.restart_clock()
        while not learner.ended:
            before = target.steps_done // save_every
            try:
                shown = learner.decide()
            except StopRequested:
                raise Preempted(f"after step {target.steps_done} of {horizon}", save()) from None
            bar.set_postfix_str(f"reward {shown['reward']:+.2f}", refresh=False)
            ended: bool = learner.ended
            if (ended and not learner.diverged) or (not ended and target.steps_done // save_every > before):
                with target.aside():
                    save()


def _begin(folder: RunFolder, learner: "Cotrainer", target: Recorded, checkpoints: Checkpoints) -> None:
    """Start the run, or put everything where the newest whole checkpoint has it."""
    found, _ = find(folder, checkpoints, target.info.horizon)
    if found is None:
        learner.start()
    else:
        learner.load_state_dict(found.state)
        say_resumed(found, target)
    folder.rewind(target.steps_done)
    if not folder.evaluations:
        log_evaluation(folder, checkpoints, target, 0)


def _logger(
    folder: RunFolder,
    learner: "Cotrainer",
    target: Recorded,
    checkpoints: Checkpoints,
    evaluate_every: int,
    bar: Any,
) -> Callable[[StepStats, float, float], None]:
    """What is done after every optimiser step: a line with what the decision before showed, an evaluation, progress."""

    def on_step(stats: StepStats, seconds: float, deciding: float) -> None:
        shown = {**learner.shown, **target.override.diagnostics()}
        append(folder, checkpoints, StepLine.of_step(stats, seconds + deciding, deciding, shown))
        if stats.skipped or stats.diverged:
            note(nonfinite(stats, target.info.domains, checkpoints))
        if stats.step == target.info.horizon or stats.diverged or stats.step % evaluate_every == 0:
            log_evaluation(folder, checkpoints, target, stats.step)
        bar.update(stats.step - bar.n)

    return on_step
