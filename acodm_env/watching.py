"""Preparatory runs whose held-out losses are measured on the way: `RunRequest.evaluate_at`, `RunResult.losses`."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Mixer, RunInfo, RunRequest


def watched_steps(request: RunRequest) -> tuple[int, ...]:
    """Optimiser steps, in order, after which a requested run is measured; the last is measured anyhow and left out.

    Raises:
        ConfigError: a share that is not between the run's start and its end.
    """
    for share in request.evaluate_at:
        if not 0 < share < 1:
            raise ConfigError(f"evaluate_at={share}: must be in (0, 1), a share of the run {request.name}")
    steps = {max(1, round(share * request.steps)) for share in request.evaluate_at}
    return tuple(sorted(steps - {request.steps}))


class Watched(Mixer):
    """A mixer in a run that others watch: it sees no more than it would alone.

    A measurement that the mixer wants itself is as large as the others', whatever its `probe_sequences`.
    """

    def __init__(self, inner: Mixer, steps: Iterable[int]):
        """Take the mixer, and the optimiser steps after which held-out losses are measured."""
        self.inner, self._steps = inner, frozenset(steps)
        self.name, self.paper, self.dynamic = inner.name, inner.paper, inner.dynamic
        self.needs = inner.needs | {"validation"}

    def start(self, info: RunInfo) -> None:
        """Begin a run."""
        super().start(info)
        self.inner.start(info)

    def due(self, step: int) -> bool:
        """After the watched steps, and where the mixer itself wants it."""
        return step in self._steps or self._wanted(step)

    def _wanted(self, step: int) -> bool:
        return "validation" in self.inner.needs and self.inner.due(step)

    def weights(self) -> Array:
        """The mixer's mixture (K,)."""
        return self.inner.weights()

    def loss_weights(self) -> Array | None:
        """The mixer's."""
        return self.inner.loss_weights()

    def update(self, stats: StepStats) -> None:
        """Show the mixer the step, without a measurement that it did not ask for."""
        self.inner.update(stats if self._wanted(stats.step) else without_validation(stats))

    def diagnostics(self) -> dict[str, float]:
        """The mixer's."""
        return self.inner.diagnostics()

    def state_dict(self) -> dict[str, Any]:
        """The mixer's."""
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self.inner.load_state_dict(state)


def without_validation(stats: StepStats) -> StepStats:
    """The step as it is without held-out losses."""
    return stats if stats.eval_losses is None else replace(stats, eval_losses=None, eval_tokens=0)


def held_out_curve(request: RunRequest, measured: Mapping[int, Any], final: Array) -> dict[str, Array]:
    """`RunResult.steps` (n,) and `RunResult.losses` (n, M); nothing where none were wanted, or one is not finite.

    Args:
        request: of the run.
        measured: losses (M,) by optimiser step.
        final: losses (M,) after the last step.
    """
    if not request.evaluate_at or not np.isfinite(final).all():
        return {}
    steps = watched_steps(request)
    losses = np.array([*(measured[step] for step in steps), final], dtype=np.float64)
    return {"steps": np.array([*steps, request.steps]), "losses": losses} if np.isfinite(losses).all() else {}
