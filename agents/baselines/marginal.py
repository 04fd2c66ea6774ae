"""One proxy run, if you have it: the mixture follows what a nat is worth times how fast each target still falls.

On text, weights between domains matter through two things that one run under the uniform mixture shows: the slope of
every held-out loss in the logarithm of time, and, where perplexities are averaged, its level at the end.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.step_stats import Array, StepStats
from acodm_env.support import own_weights
from acodm_env.trainer import Mixer, RunInfo, RunRequest, RunResult

from .options import positive, whole

WINDOWS = ((0.4, 0.8), (0.5, 1.0))
"""Shares of the proxy run between which slopes are taken."""
_EDGES = (0.4, 0.5, 0.8)


class MarginalValue(Mixer):
    """α_i ∝ (∂objective/∂L_i · b_i)^p on the targets that are trained on, and a floor ε spread evenly over all domains.

    b_i is the mean of two mean slopes −dL_i / d ln t of target i's held-out loss, between the shares .4 and .8 and
    between .5 and 1 of *one* proxy run under the uniform mixture; a loss that rose counts as flat. ∂objective/∂L_i is
    ω_i, or, where perplexities are averaged, ω_i·e^{L_i} over its sum, at the losses with which the proxy ended.
    p = 0.7 and ε = 5 %. A domain that is no target gets its floor alone; where no target is trained on, or none still
    falls, the mixture is uniform. The rule is ours; it is blind to sizes and to what domains do for each other.

    With `live` the values follow the run itself, where they can: after each of `revisions` evenly spaced measurements
    the end is predicted as the run's own losses minus what the proxy's still fell from there on. Nothing is measured
    where that could change nothing: mean losses, or a single target.
    """

    name = "marginal-value"

    def __init__(
        self,
        power: float = 0.7,
        floor: float = 0.05,
        proxy_frac: float = 1.0,
        live: bool = False,
        revisions: int = 4,
    ):
        """Take the options.

        Args:
            power: p.
            floor: ε in [0, 1].
            proxy_frac: optimiser steps of the proxy run over those of the target's.
            live: revise the values during the run.
            revisions: how often, at most.

        Raises:
            ConfigError: an option out of range.
        """
        if not 0 <= floor <= 1:
            raise ConfigError(f"floor={floor}: must be in [0, 1]")
        self.power, self.floor = positive("power", power), floor
        self.proxy_frac, self.live = positive("proxy_frac", proxy_frac), live
        self.revisions = whole("revisions", revisions)
        self.dynamic = live
        if live:
            self.needs = frozenset({"validation"})
        self._proxy: RunResult | None = None

    def preparation(self, info: RunInfo) -> Sequence[RunRequest]:
        """One run under the uniform mixture, measured where slopes and declines are wanted.

        Raises:
            ConfigError: it would have a single step.
        """
        steps = round(info.horizon * self.proxy_frac)
        if steps < 2:
            raise ConfigError(
                f"proxy_frac={self.proxy_frac}: must give the proxy run at least 2 steps of {info.horizon}; a slope "
                f"needs two losses; raise it or train longer"
            )
        at = tuple(sorted({*_EDGES, *self._shares(info)}))
        return (RunRequest(name="proxy", mixer="uniform", steps=steps, evaluate_at=at),)

    def _shares(self, info: RunInfo) -> list[float]:
        """Shares of the run after which the values are revised."""
        changing = info.metric == "perplexity" and (own_weights(info) > 0).sum() > 1
        count = self.revisions if self.live and changing else 0
        return [round(index / (count + 1), 6) for index in range(1, count + 1)]

    def prepare(self, results: Mapping[str, RunResult]) -> None:
        """Take the proxy's held-out losses.

        Raises:
            ConfigError: it diverged, or was not measured on its way.
        """
        proxy = results["proxy"]
        if not np.isfinite(proxy.final_losses).all():
            raise ConfigError(
                f"mixer={self.name}: its preparatory run 'proxy' diverged; lower the language model's learning rate"
            )
        if proxy.steps is None or proxy.losses is None or proxy.steps[0] > max(1, round(_EDGES[0] * proxy.steps[-1])):
            raise ConfigError(
                f"mixer={self.name}: needs held-out losses of its proxy run at the shares {_EDGES} and at the end, and "
                f"the result has none or begins later; run it through `acodm benchmark`"
            )
        self._proxy = proxy

    def start(self, info: RunInfo) -> None:
        """Begin with the values at the proxy's end.

        Raises:
            ConfigError: no proxy run yet, or one with other targets.
        """
        super().start(info)
        if self._proxy is None:
            raise ConfigError(f"mixer={self.name}: needs its preparatory runs first; run it through `acodm benchmark`")
        if len(self._proxy.final_losses) != len(info.targets):
            raise ConfigError(f"mixer={self.name}: was prepared for other targets; prepare it for this run")
        first, second = (self._slope(*window) for window in WINDOWS)
        self._slopes = np.maximum((first + second) / 2, 0.0)  # b (M,)
        self._due = {max(1, round(share * info.horizon)): share for share in self._shares(info)}
        self._end = np.array(self._proxy.final_losses, dtype=np.float64)  # (M,) predicted
        self._weights = self._mixture()

    def _at(self, share: float) -> tuple[float, Array]:
        """ln t and losses (M,) of the proxy after a share of its steps, interpolated in ln t where not measured."""
        assert self._proxy is not None
        assert self._proxy.steps is not None
        assert self._proxy.losses is not None
        known = np.log(self._proxy.steps)
        time = math.log(max(1, round(share * float(self._proxy.steps[-1]))))
        return time, np.array([np.interp(time, known, curve) for curve in self._proxy.losses.T])

    def _slope(self, begin: float, end: float) -> Array:
        """Mean of −dL/d ln t (M,) between two shares of the proxy run, nats."""
        (earlier, before), (later, after) = self._at(begin), self._at(end)
        slope: Array = (before - after) / (later - earlier)
        return slope

    def _mixture(self) -> Array:
        """The mixture (K,) for the losses predicted."""
        info = self.info
        promising = self.info.marginal_values(self._end) * self._slopes  # (M,)
        by_target = dict(zip(info.targets, promising.tolist(), strict=True))
        promise = np.array([by_target.get(name, 0.0) for name in info.domains])  # (K,)
        uniform = (np.arange(info.num_domains) < info.num_domains - info.padding).astype(np.float64)
        uniform /= uniform.sum()
        if promise.max() <= 0:
            return uniform
        chosen = (promise / promise.max()) ** self.power * (promise > 0)
        mixture: Array = self.floor * uniform + (1 - self.floor) * chosen / chosen.sum()
        return mixture

    def weights(self) -> Array:
        """The mixture (K,) for the next step."""
        return self._weights.copy()

    def due(self, step: int) -> bool:
        """Where the values are revised."""
        return step in self._due

    def update(self, stats: StepStats) -> None:
        """Predict the end anew after a measurement; a loss that is not finite keeps its last prediction."""
        if stats.step not in self._due or stats.eval_losses is None or stats.diverged:
            return
        decline = self._at(self._due[stats.step])[1] - self._at(1.0)[1]
        predicted = stats.eval_losses - decline
        self._end = np.where(np.isfinite(predicted), predicted, self._end)
        self._weights = self._mixture()

    def state_dict(self) -> dict[str, Any]:
        """The predicted losses and the mixture."""
        return {"end": self._end.copy(), "weights": self._weights.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self._end = np.array(state["end"], dtype=np.float64)
        self._weights = np.array(state["weights"], dtype=np.float64)
