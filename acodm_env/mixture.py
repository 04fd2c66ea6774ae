"""From an agent's action to a mixture and back, bounds on mixtures, and whole sequences from fractions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acodm_env.errors import ConfigError
from acodm_env.step_stats import Array

_TIE = 1e-9  # sequences; smaller differences are rounding, not remainders


def check_weights(weights: object, num_domains: int, name: str = "weights") -> Array:
    """Return `weights` as a (K,) mixture summing to 1.

    Raises:
        ConfigError: wrong length, NaN or infinite, negative, or all zero.
    """
    try:
        array = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}={weights}: must be {num_domains} numbers") from error
    if array.shape != (num_domains,):
        raise ConfigError(f"{name}={weights}: must hold {num_domains} numbers, one per domain; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ConfigError(f"{name}={array.tolist()}: must be finite; NaN comes from a diverged mixer or loss")
    if (array < 0).any() or array.sum() <= 0:
        raise ConfigError(f"{name}={array.tolist()}: must be non-negative with a positive sum")
    total: Array = array / array.sum()
    return total


def softmax(logits: Array) -> Array:
    """exp(logits) (K,), normalised; the largest is subtracted first, which changes nothing but overflow."""
    soft = np.exp(logits - logits.max())
    mixture: Array = soft / soft.sum()
    return mixture


def _total(values: Array) -> Array:
    """Sum over the last axis (…, 1); einsum is several times as fast as a reduction over many short rows."""
    total: Array = values.sum(keepdims=True) if values.ndim == 1 else np.einsum("...k->...", values)[..., None]
    return total


def _present(mask: NDArray[Any], logits: Array) -> Array:
    """1 for a domain, 0 for padding; (K,) or (…, K), as `logits` are."""
    mask = np.asarray(mask)
    if mask.shape not in (logits.shape, logits.shape[-1:]):
        raise ConfigError(f"mask: must have the action's shape {logits.shape} or {logits.shape[-1:]}; got {mask.shape}")
    present: Array = (mask > 0).astype(logits.dtype)
    if not _total(present).all():
        raise ConfigError("mask: must leave at least one domain; every one of them is masked as padding")
    return present


@dataclass(frozen=True, kw_only=True)
class ActionMap:
    """α = (1−ε)·softmax(log prior + c·a) + ε/K for an action a in [−1, 1]^K (method: action, "ours").

    The scale c bounds how far an agent can tilt the prior (e^{2c} between two domains), the floor ε/K keeps
    every domain alive.
    """

    scale: float = 2.0
    """c, > 0."""
    floor: float = 0.1
    """ε in [0, 1): share of the mixture spread evenly."""
    prior: tuple[float, ...] | None = None
    """Mixture (K,) of the zero action; None is uniform."""
    rate: float = 1.0
    """How far the mixture in force goes towards the one decided: h = max(rate, 1/(n+2)) at decision n ≥ 1, counted from
    0, whose mixture is taken as it is. 1 follows at once; 0 is a running average over the whole run."""
    tilt: float = 1.0
    """t in (0, 1]: α becomes u^(1−t)·α^t over its sum, for an even mixture u; ½ halves the logarithm of its weights."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"scale={self.scale}: must be a positive number")
        if not 0 <= self.floor < 1:
            raise ConfigError(f"floor={self.floor}: must be in [0, 1)")
        if self.prior is not None and min(self.prior) <= 0:
            raise ConfigError(f"prior={self.prior}: must be positive everywhere; use the floor for rare domains")
        if not 0 <= self.rate <= 1:
            raise ConfigError(f"rate={self.rate}: must be between 0 (a running average) and 1 (at once)")
        if not 0 < self.tilt <= 1:
            raise ConfigError(f"tilt={self.tilt}: must be above 0 (even) and at most 1 (the mixture as it is)")

    def blend(self, before: Array, decided: Array, decision: int) -> Array:
        """The mixture (…, K) in force after decision number `decision`, from the one before and the one decided."""
        if decision == 0 or self.rate == 1:
            return decided
        step = max(self.rate, 1 / (decision + 2))
        mixture: Array = (1 - step) * before + step * decided
        return mixture

    def weights(self, action: Array, mask: NDArray[Any] | None = None) -> Array:
        """Mixture (…, K) of an action (…, K), which is clipped to [−1, 1]; float32 stays float32.

        Args:
            action: one action (K,), or any number of them in leading dimensions.
            mask: (K,) or (…, K), 1 for a domain and 0 for padding. Padding has the logit −∞: its weight is exactly
                0, and the floor is spread over the domains alone.

        Raises:
            ConfigError: a prior or mask of another shape, or a mask without any domain.
        """
        action = np.asarray(action)
        mixture: Array = np.clip(action, -1.0, 1.0, dtype=None if action.dtype == np.float32 else np.float64)
        floor: Any = self.floor / mixture.shape[-1]
        # In place: memory for every intermediate result costs more than the arithmetic.
        mixture *= self.scale
        if self.prior is not None:
            mixture += self._log_prior(mixture.shape[-1]).astype(mixture.dtype)
        if mask is not None:
            floor = _present(mask, mixture)
            np.copyto(mixture, -np.inf, where=floor == 0)
            floor *= self.floor / _total(floor)
        # Against overflow the largest logit is subtracted, or the scale c where that is as good and faster.
        mixture -= self.scale if mixture.ndim > 1 and self.scale <= 20 else mixture.max(axis=-1, keepdims=True)
        np.exp(mixture, out=mixture)
        total = _total(mixture)
        mixture *= 1 - self.floor
        mixture /= total
        mixture += floor
        if self.tilt != 1:
            mixture **= self.tilt
            mixture /= _total(mixture)
        return mixture

    def action(self, weights: Array) -> tuple[Array, float]:
        """Action (K,) that gives a mixture, and the largest error of a weight where it had to be clipped."""
        num_domains = len(weights)
        wanted = weights
        if self.tilt != 1:
            weights = weights ** (1 / self.tilt) / (weights ** (1 / self.tilt)).sum()
        soft = np.maximum((weights - self.floor / num_domains) / (1 - self.floor), 1e-12)
        logits = (np.log(soft / soft.sum()) - self._log_prior(num_domains)) / self.scale
        # A softmax does not see a common shift. Where the range is too wide for [−1, 1], the large weights are kept.
        shift = max((logits.max() + logits.min()) / 2, logits.max() - 1.0)
        action: Array = np.clip(logits - shift, -1.0, 1.0)
        return action, float(np.abs(self.weights(action) - wanted).max())

    def _log_prior(self, num_domains: int) -> Array:
        if self.prior is None:
            return np.zeros(num_domains)
        log_prior: Array = np.log(check_weights(self.prior, num_domains, "prior"))
        return log_prior


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits on a mixture, applied by Euclidean projection onto {w : min ≤ w ≤ max, Σw = 1}."""

    minimum: tuple[float, ...] | None = None
    """Smallest weight per domain (K,)."""
    maximum: tuple[float, ...] | None = None
    """Largest weight per domain (K,)."""
    max_epochs: float | None = None
    """Passes over a domain after which its maximum is 0."""

    def project(self, weights: Array, epochs: Array | None = None) -> Array:
        """The allowed mixture (K,) nearest to `weights`, given the `epochs` (K,) done so far.

        Raises:
            ConfigError: no mixture satisfies the limits.
        """
        num_domains = len(weights)
        low = np.zeros(num_domains) if self.minimum is None else np.asarray(self.minimum, dtype=np.float64)
        high = np.ones(num_domains) if self.maximum is None else np.asarray(self.maximum, dtype=np.float64)
        if low.shape != weights.shape or high.shape != weights.shape:
            raise ConfigError(f"minimum, maximum: must hold {num_domains} numbers, one per domain")
        if self.max_epochs is not None and epochs is not None:
            spent = epochs >= self.max_epochs
            low, high = np.where(spent, 0.0, low), np.where(spent, 0.0, high)
        if (low > high).any() or low.sum() > 1 + 1e-12 or high.sum() < 1 - 1e-12:
            raise ConfigError(
                f"minimum={low.tolist()}, maximum={high.tolist()}: no mixture fits between them; "
                f"lower the minima, raise the maxima or allow more than max_epochs={self.max_epochs}"
            )
        if (weights >= low).all() and (weights <= high).all():
            return weights
        left, right = (low - weights).min() - 1.0, (high - weights).max() + 1.0
        for _ in range(100):  # the sum of clip(w + shift) grows with the shift: bisect it to 1
            shift = (left + right) / 2
            too_much = np.clip(weights + shift, low, high).sum() > 1
            left, right = (left, shift) if too_much else (shift, right)
        projected: Array = np.clip(weights + right, low, high)
        normalised: Array = projected / projected.sum()
        return normalised


class Controller:
    """Turns an agent's actions into the mixture in force: its action map, and the memory that a slow one needs."""

    def __init__(self, action_map: ActionMap):
        self.action_map = action_map
        self.start()

    def start(self) -> None:
        """Forget everything, for a new run."""
        self.decisions = 0
        self.mixture: Array | None = None

    def take(self, action: Array, mask: NDArray[Any] | None = None, num_domains: int | None = None) -> Array:
        """The mixture (…, K) in force after an action (…, R).

        Args:
            action: one entry per row: domains first, then targets that are none.
            mask: (…, R) 1 for a domain that can be trained on; see `ActionMap.weights`.
            num_domains: K; default: all rows.
        """
        decided = self.action_map.weights(action, mask)[..., :num_domains]
        before = decided if self.mixture is None else self.mixture
        self.mixture = self.action_map.blend(before, decided, self.decisions)
        self.decisions += 1
        return self.mixture

    def state_dict(self) -> dict[str, Any]:
        """What a slow map remembers."""
        return {"decisions": self.decisions, "mixture": None if self.mixture is None else self.mixture.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self.decisions = int(state["decisions"])
        self.mixture = None if state["mixture"] is None else np.array(state["mixture"], dtype=np.float64)


class Composer:
    """Whole sequences per domain from fractional weights, so that nothing is lost to rounding.

    Largest remainder with carry: what a domain is owed or has had too much of goes into the next batch. Among
    the domains with a remainder, the seats left over go to those that would otherwise be a whole sequence
    behind *soonest* — (1 − remainder) / rate, ties by index — and not to the largest remainder: with the
    deadline rule the cumulative error of every domain stays below one sequence for constant weights (unit jobs
    with release times and deadlines; earliest deadline first is optimal and a schedule exists, Tijdeman 1980),
    which plain largest remainder does not guarantee for more than three domains.
    """

    def __init__(self, num_domains: int):
        self.carry: Array = np.zeros(num_domains)

    def compose(self, weights: Array, batch_size: int, masked: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Counts (K,), non-negative and summing to `batch_size`.

        Args:
            weights: mixture (K,), summing to 1.
            batch_size: sequences in the batch.
            masked: bool (K,); a masked domain gets nothing and its carry is forgotten.
        """
        weights = check_weights(weights, len(self.carry))
        if masked is not None:
            self.carry[masked] = 0.0
            weights = check_weights(np.where(masked, 0.0, weights), len(weights))
        wanted = self.carry + weights * batch_size
        nearest = np.round(wanted)
        wanted = np.where(np.abs(wanted - nearest) < _TIE, nearest, wanted)
        counts = np.maximum(np.floor(wanted), 0.0)
        seats = round(batch_size - counts.sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            deadline = np.where(wanted > counts, (1.0 - (wanted - counts)) / weights, np.inf)
        deadline[weights == 0] = np.inf
        order = np.argsort(np.round(deadline, 9), kind="stable")
        counts[order[: max(min(seats, int(np.isfinite(deadline).sum())), 0)]] += 1
        self._settle(wanted, counts, batch_size, weights > 0)
        self.carry = wanted - counts
        self.carry -= np.where(weights > 0, self.carry.sum() / max((weights > 0).sum(), 1), 0.0)
        return counts.astype(np.int64)

    @staticmethod
    def _settle(wanted: Array, counts: Array, batch_size: int, drawn: NDArray[np.bool_]) -> None:
        """After a change of weights the deadlines may not fit: move seats one by one, worst error first."""
        while (excess := counts.sum() - batch_size) != 0:
            error = wanted - counts
            if excess > 0:
                counts[np.argmin(np.where(counts > 0, error, np.inf))] -= 1
            else:
                counts[np.argmax(np.where(drawn, error, -np.inf))] += 1

    def state_dict(self) -> dict[str, Any]:
        """The carry."""
        return {"carry": self.carry.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self.carry = np.array(state["carry"], dtype=np.float64)
