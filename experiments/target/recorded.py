"""`Recorded`: a target seen through an environment, which takes several steps a decision, still logged step by step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from acodm_env.experiments.run.override import Hand
from acodm_env.experiments.run.preemption import never
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Trainer
from acodm_env.wrapper import TrainerWrapper


class Asked(Exception):
    """The run was asked to end before the step that was to come."""


class Recorded(TrainerWrapper):
    """A target whose every step is passed on, with the seconds that went by between it and the step before.

    It starts from the run's own seed and not from an episode's, so that model and data order are those that every
    mixer gets with that seed.
    """

    def __init__(self, inner: Trainer, seed: int, hand: Hand, stop: Callable[[], bool] = never):
        """Around a target, which may be led.

        Args:
            inner: the target.
            seed: of the run.
            hand: the operator's, which may change every mixture.
            stop: asked before every step: whether to end now.
        """
        super().__init__(inner)
        self.on_step: Callable[[StepStats, float, float], None] = lambda stats, seconds, deciding: None
        """Told of every step: its statistics, its own seconds, and the seconds of deciding and learning before it."""
        self.hand = hand
        self._seed, self._stop = seed, stop
        self._clock = time.perf_counter()

    def reset(self, rng: np.random.Generator) -> None:
        """Start the run."""
        self.inner.reset(np.random.default_rng(self._seed))

    def step(self, weights: Array, loss_weights: Array | None = None) -> StepStats:
        """One optimiser step.

        Raises:
            Asked: to end instead. Nothing was done, and all that was done before is where it belongs.
        """
        if self._stop():
            raise Asked
        started = time.perf_counter()
        stats = self.inner.step(self.hand.on(weights, self.steps_done), loss_weights)
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
