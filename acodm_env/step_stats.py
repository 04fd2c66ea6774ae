"""What one optimiser step, or a window of them, has to say: losses, counts, gradients by domain.

A window between two decisions of a policy is also a state, so that a run may be saved inside one: sums of gradients
live where the model does and are of its trainer's kind, which is known again at the next step only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class GradientSums(Protocol):
    """Per-domain gradients summed over a window: additive, while the Gram matrix is not."""

    def __add__(self, other: Self, /) -> Self:
        """Sum of two windows."""

    def gram(self) -> tuple[Array, Array]:
        """Gram matrix H (K, K) of the domains' mean gradients, and their noise power (K,); NaN = undefined."""


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What one optimiser step, or a window of several, showed. Arrays are float64, (K,) unless said."""

    step: int
    """Optimiser steps done, this one included."""
    tokens: int
    """Training tokens consumed since the start of the run."""
    requested: Array
    """Mixture asked for; over a window, the mean."""
    realised: Array
    """Mixture drawn: counts / sum(counts)."""
    counts: Array
    """Sequences drawn per domain."""
    loss_tokens: Array
    """Predicted tokens behind `losses`."""
    losses: Array
    """Token-weighted mean training loss in nats; NaN where a domain was not drawn."""
    epochs: Array
    """Passes over each domain since the start of the run, as a fraction."""
    drawn: Array
    """Sequences drawn per domain since the start of the run."""
    decision: int = -1
    """Which mixture was in effect: steps before the one that it was given for; −1: a uniform one, given by nobody."""
    mixture_age: float = 0.0
    """Optimiser steps between the decision of the mixture and its use."""
    pending: Array | None = None
    """(lag, K) mixtures decided but not yet in effect, oldest first."""
    gradients: GradientSums | None = None
    """Per-domain gradient sums, if someone needs the Gram matrix."""
    layer_norms: Array | None = None
    """(num_layers,) root mean square of the observed layers' weights; at decisions only."""
    layer_changes: Array | None = None
    """(num_layers,) RMS of their change since the previous decision, relative to the norm."""
    eval_losses: Array | None = None
    """(M,) mean validation losses in nats, if someone needs them."""
    eval_tokens: int = 0
    """Held-out tokens behind them; over a window, all of its measurements'."""
    excess_losses: Array | None = None
    """(K,) mean over tokens of max(loss − reference model's loss, 0), nats; NaN where a domain was not drawn."""
    loss_weights: Array | None = None
    """(K,) factors on the domains' token losses in this step, if any; over a window, the last step's."""
    loss: float = float("nan")
    """Mean loss over all tokens, nats."""
    grad_norm: float = float("nan")
    """L2 norm of the whole gradient before clipping."""
    lr: float = float("nan")
    diverged: bool = False
    """The loss or the gradient is not finite; the step was not applied, and the run ends."""
    skipped: int = 0
    """Steps that were not applied for the same reason, although the run goes on."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall clock by part: "data", "train" (forward, backward, update), "probe" (per-domain measurements) and
    "validation" (held-out losses that the mixer asked for)."""

    @property
    def guilty(self) -> NDArray[np.bool_]:
        """(K,) domains that were drawn and whose loss is not finite."""
        return (self.counts > 0) & ~np.isfinite(self.losses)

    @property
    def effective(self) -> Array:
        """Mixture (K,) that the objective weighs the domains by: requested × loss weights, summing to 1."""
        if self.loss_weights is None:
            return self.requested
        weighted = self.requested * self.loss_weights
        normalised: Array = weighted / weighted.sum()
        return normalised


def merge(first: StepStats, second: StepStats) -> StepStats:
    """Sum two consecutive windows: gradients before their Gram matrix, losses weighted by tokens."""
    counts = first.counts + second.counts
    tokens = first.loss_tokens + second.loss_tokens

    def mean(one: Array, other: Array) -> Array:
        total = np.nan_to_num(one) * first.loss_tokens + np.nan_to_num(other) * second.loss_tokens
        return np.divide(total, tokens, out=np.full_like(total, np.nan), where=tokens > 0)

    share = _steps(first) / (_steps(first) + _steps(second))
    weight = first.loss_tokens.sum() / max(tokens.sum(), 1.0)
    both = first.gradients is not None and second.gradients is not None
    return replace(
        second,
        requested=share * first.requested + (1 - share) * second.requested,
        counts=counts,
        realised=counts / np.maximum(counts.sum(-1, keepdims=True), 1.0),
        loss_tokens=tokens,
        eval_tokens=first.eval_tokens + second.eval_tokens,
        losses=mean(first.losses, second.losses),
        excess_losses=None
        if first.excess_losses is None or second.excess_losses is None
        else mean(first.excess_losses, second.excess_losses),
        loss=second.loss
        if weight == 0
        else first.loss
        if weight == 1
        else weight * first.loss + (1 - weight) * second.loss,
        gradients=first.gradients + second.gradients if both else None,  # type: ignore[operator]
        diverged=first.diverged or second.diverged,
        skipped=first.skipped + second.skipped,
        seconds={
            part: first.seconds.get(part, 0.0) + second.seconds.get(part, 0.0)
            for part in {**first.seconds, **second.seconds}
        },
    )


def _steps(stats: StepStats) -> float:
    return max(float(stats.counts.sum()), 1.0)


class SavedGradients:
    """The gradient sums of an interrupted window, until those of its next step are added to them."""

    def __init__(self, state: Mapping[str, Any]):
        """Keep what `state_dict` of the trainer's kind of sums gave."""
        self._state = dict(state)

    def __add__(self, other: Any) -> Any:
        """The window's sum, where and how `other` has its own."""
        return other.restored(self._state) + other

    def gram(self) -> tuple[Array, Array]:
        """Not before the next step: a window is never saved at its end."""
        raise ValueError("gradient sums of a saved window have no Gram matrix before its next step")

    def state_dict(self) -> dict[str, Any]:
        """What it was made from."""
        return self._state


def window_state(window: StepStats | None) -> dict[str, Any] | None:
    """A window as numpy arrays and JSON values; but for the seconds that it took, which are no part of what happened.

    Raises:
        ValueError: its gradients are of a kind that cannot be saved.
    """
    if window is None:
        return None
    state = {each.name: getattr(window, each.name) for each in fields(window)} | {"seconds": {}}
    if window.gradients is not None:
        if not hasattr(window.gradients, "state_dict"):
            raise ValueError(f"{type(window.gradients).__name__}: cannot be saved between two decisions, only at one")
        state["gradients"] = window.gradients.state_dict()
    return state


def load_window(state: Mapping[str, Any] | None) -> StepStats | None:
    """The window whose `window_state` was saved."""
    if state is None:
        return None
    values: dict[str, Any] = {
        name: np.asarray(value) if isinstance(value, list) else value for name, value in state.items()
    }
    if values["gradients"] is not None:
        values["gradients"] = SavedGradients(values["gradients"])
    return StepStats(**values)
