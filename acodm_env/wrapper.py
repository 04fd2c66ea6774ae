"""`TrainerWrapper`: a `Trainer` around another one, as Gymnasium wraps environments; and `Lagged`, which is one."""

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import RunInfo, Trainer


class TrainerWrapper:
    """Does what the trainer inside does; subclasses override what they change."""

    def __init__(self, inner: Trainer):
        """Take the trainer to wrap."""
        self.inner = inner

    @property
    def info(self) -> RunInfo:
        """The inner trainer's."""
        return self.inner.info

    @property
    def provides(self) -> frozenset[str]:
        """What the inner trainer can measure."""
        return self.inner.provides

    @property
    def measure(self) -> frozenset[str]:
        """What the inner trainer measures."""
        return self.inner.measure

    @measure.setter
    def measure(self, value: frozenset[str]) -> None:
        self.inner.measure = value

    @property
    def steps_done(self) -> int:
        """Optimiser steps done since `reset`."""
        return self.inner.steps_done

    def reset(self, rng: np.random.Generator) -> None:
        """Start a new run."""
        self.inner.reset(rng)

    def step(self, weights: Array, loss_weights: Array | None = None) -> StepStats:
        """One optimiser step under `weights` (K,)."""
        return self.inner.step(weights, loss_weights)

    def evaluate(self, split: str, sequences: int | None = None) -> Array:
        """Mean held-out losses in nats (M,); on so many sequences in all, where the inner trainer knows that."""
        return self.inner.evaluate(split) if sequences is None else self.inner.evaluate(split, sequences)

    def state_dict(self) -> dict[str, Any]:
        """The inner trainer's."""
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self.inner.load_state_dict(state)


def innermost(trainer: Any) -> Any:
    """The trainer inside all wrappers."""
    while isinstance(trainer, TrainerWrapper):
        trainer = trainer.inner
    return trainer


class Lagged(TrainerWrapper):
    """A trainer behind a prefetching loader: a mixture takes effect `lag` optimiser steps after it was given."""

    def __init__(self, inner: Trainer, lag: int):
        """Take the trainer and its lag in optimiser steps.

        Raises:
            ConfigError: a negative lag, or a trainer that has one by itself.
        """
        super().__init__(inner)
        if lag < 0:
            raise ConfigError(f"lag={lag}: must be 0 or more optimiser steps")
        if inner.info.lag:
            raise ConfigError(f"lag={lag}: the trainer has one of {inner.info.lag} by prefetching; give one of them")
        self.lag = lag
        self._queue: deque[Array] = deque()
        self._known = inner.info
        self._info = replace(inner.info, lag=lag)

    @property
    def info(self) -> RunInfo:
        """The inner trainer's, with the lag."""
        if self.inner.info is not self._known:  # a reset may add to it
            self._known = self.inner.info
            self._info = replace(self._known, lag=self.lag)
        return self._info

    def reset(self, rng: np.random.Generator) -> None:
        """Start a new run; the loader is full of uniformly mixed batches."""
        self.inner.reset(rng)
        num_domains = self.inner.info.num_domains
        shape = (*getattr(self.inner, "batch", ()), num_domains)
        self._queue = deque(np.full(shape, 1 / num_domains) for _ in range(self.lag))

    def step(self, weights: Array, loss_weights: Array | None = None) -> StepStats:
        """Queue `weights`, train under the oldest mixture of the queue."""
        self._queue.append(np.array(weights))  # a copy: the caller may change its array
        stats = self.inner.step(self._queue.popleft(), loss_weights)
        pending = np.stack(self._queue, axis=-2) if self.lag else None  # (…, lag, K)
        decision = max(-1, stats.decision - self.lag)
        return replace(stats, decision=decision, mixture_age=float(self.lag), pending=pending)

    def state_dict(self) -> dict[str, Any]:
        """The inner state and the queue."""
        return {"inner": self.inner.state_dict(), "queue": [*self._queue]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self.inner.load_state_dict(state["inner"])
        self._queue = deque(np.asarray(weights, dtype=np.float64) for weights in state["queue"])
