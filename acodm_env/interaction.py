"""How the domains' gradients interact: the statistic behind AC-ODM's reward and two observation fields.

The paper's W_i = ⟨∇ℓ_i, Σ_{j≠i} ∇ℓ_j⟩ (arXiv 2505.23878, reward) is the off-diagonal row sum of the Gram matrix H
of the domains' mean gradients. Two deviations, both of which make it comparable over time and models:

* it is divided by s, a running mean of the *past* tr(H)/K from the unbiased diagonal: a norm of the current
  window would make the reward depend on the mixture through sampling noise;
* the importance weight 1/α_i is off by default: in Σ_i α_i·(W_i/α_i) it cancels the action from the reward.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.trainer import Array, StepStats


@dataclass(frozen=True, kw_only=True)
class InteractionConfig:
    """Smoothing of the interaction statistic."""

    smoothing: float = 0.7
    """ξ in r ← ξ·r + (1−ξ)·W/s, in [0, 1). The paper gives no value; measured noise asks for one above 0.5."""
    scale_smoothing: float = 0.9
    """The same for the scale s."""
    importance_weighted: bool = False
    """Divide W_i by α_i, as in the paper. Cancels the action from the scalar reward."""

    def __post_init__(self) -> None:
        for name in ("smoothing", "scale_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be in [0, 1)")


class InteractionTracker:
    """Running, scale-free view of the Gram matrix, one update per decision window."""

    def __init__(self, num_domains: int, config: InteractionConfig | None = None):
        self.config = config or InteractionConfig()
        self.interaction: Array = np.zeros(num_domains)
        """(K,) smoothed W_i / s, within ±2K."""
        self.self_term: Array = np.zeros(num_domains)
        """(K,) smoothed H_ii / s, within ±2K."""
        self._diagonal: Array = np.full(num_domains, np.nan)  # last unbiased ‖g_i‖² seen per domain
        self._scale = 0.0
        self._updates = 0

    @property
    def log_norm(self) -> Array:
        """(K,) ½·ln(‖g_i‖² / s): a domain's gradient norm against the running mean; 0 before it is known."""
        if self._updates == 0:
            return np.zeros_like(self._diagonal)
        ratio = np.nan_to_num(self._diagonal, nan=self._scale) / self._scale
        log_norm: Array = 0.5 * np.log(np.maximum(ratio, 1e-3))
        return log_norm

    def update(self, window: StepStats) -> None:
        """Take in one decision window; domains absent from it keep their last values."""
        if window.gradients is None or window.diverged:
            return
        gram, noise = window.gradients.gram()
        off_diagonal = np.where(np.eye(len(gram), dtype=bool), 0.0, gram)
        present = window.counts > 0
        pull = np.where(present, np.nansum(off_diagonal, axis=1), np.nan)  # (K,) W_i
        if not np.isfinite(pull[present]).all():
            return
        if self._scale > 0:
            self._smooth(self.interaction, pull / self._importance(window.requested) / self._scale)
            self._smooth(self.self_term, np.diag(gram) / self._scale)
        self._rescale(np.diag(gram), noise)

    def _importance(self, weights: Array) -> Array | float:
        return np.maximum(weights, 1e-6) if self.config.importance_weighted else 1.0

    def _smooth(self, running: Array, value: Array) -> None:
        keep = self.config.smoothing
        limit = 2.0 * len(running)
        known = np.isfinite(value)
        running[known] = np.clip(keep * running[known] + (1 - keep) * value[known], -limit, limit)

    def _rescale(self, diagonal: Array, noise: Array) -> None:
        self._diagonal = np.where(np.isfinite(diagonal), diagonal, self._diagonal)
        known = self._diagonal[np.isfinite(self._diagonal)]
        if not len(known):
            return
        # The unbiased trace can be negative by noise; the (noisy) norm bounds it away from zero.
        noisy = (diagonal + noise)[np.isfinite(noise) & np.isfinite(diagonal)]
        trace = max(float(known.mean()), 1e-2 * float(noisy.mean()) if len(noisy) else 0.0)
        if trace <= 0:
            return
        keep = self.config.scale_smoothing if self._updates else 0.0
        self._scale = keep * self._scale + (1 - keep) * trace
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        """All running values."""
        return {
            "interaction": self.interaction.copy(),
            "self_term": self.self_term.copy(),
            "diagonal": self._diagonal.copy(),
            "scale": self._scale,
            "updates": self._updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self.interaction = np.array(state["interaction"], dtype=np.float64)
        self.self_term = np.array(state["self_term"], dtype=np.float64)
        self._diagonal = np.array(state["diagonal"], dtype=np.float64)
        self._scale = float(state["scale"])
        self._updates = int(state["updates"])
