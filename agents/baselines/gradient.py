"""Mixtures from per-domain gradients: DoGE, PiKE, and AC-ODM's own reward without an actor and a critic.

All of them multiply the mixture by exp(something of the domains' Gram matrix H) at every decision: gradients are summed
over the window between two decisions before H is formed once, as an agent's observation does it. The papers do
it at every step, on the whole model; here it is the probed layers (`acodm_env.pretrain.gradients`).

What all of them do about gaps: a domain whose entry of H is unknown (NaN: not drawn in the window, a single sequence
and so no unbiased diagonal, loss weight 0) keeps its last value; before its first it counts as the mean of the others,
which neither raises nor lowers it among them. A window with a diverged step is forgotten.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.interaction import InteractionConfig, InteractionTracker, aligned
from acodm_env.step_stats import Array, StepStats, load_window, merge, window_state
from acodm_env.trainer import Mixer, RunInfo, RunRequest

from .doremi import ProxyMean
from .options import positive
from .targets import DomainValues

_RANGE = 30.0  # nats; e^-30 is no weight, but the way back from it is finite


class _Exponentiated(Mixer):
    """w = (1−ε)·softmax(z) + ε/K with z (K,) moved once per decision window; z stays within 30 nats of its largest.

    The floor ε is the environment's (`ActionMap`), so that these mixers and agents choose among the same mixtures; it
    keeps every domain drawn, and so measured. None of the papers has one.
    """

    needs = frozenset({"losses", "gram"})

    def __init__(self, floor: float):
        if not 0 <= floor < 1:
            raise ConfigError(f"floor={floor}: must be in [0, 1)")
        self.floor = floor

    def start(self, info: RunInfo) -> None:
        """Begin with the uniform mixture."""
        super().start(info)
        self._logits = np.zeros(info.num_domains)
        self._window: StepStats | None = None

    def weights(self) -> Array:
        """The mixture (K,) decided last."""
        soft = np.exp(self._logits)  # the largest logit is 0
        mixture: Array = (1 - self.floor) * soft / soft.sum() + self.floor / len(soft)
        return mixture

    def update(self, stats: StepStats) -> None:
        """Collect the window; decide when it is full."""
        self._window = stats if self._window is None else merge(self._window, stats)
        if self._window.diverged:
            self._window = None
        elif stats.step % self.info.decision_every == 0:
            self._tilt(self._exponents(self._window))
            self._window = None

    def _tilt(self, exponents: Array) -> None:
        logits = self._logits + exponents
        self._logits = np.maximum(logits - logits.max(), -_RANGE)

    @abstractmethod
    def _exponents(self, window: StepStats) -> Array:
        """By how much (K,) a window moves z; finite."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that windows changed, and the steps since the last decision.

        Raises:
            ValueError: called between two decisions, with gradients that cannot be saved.
        """
        state = {"logits": self._logits.copy()}
        return state if self._window is None else state | {"window": window_state(self._window)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self._logits = np.array(state["logits"], dtype=np.float64)
        self._window = load_window(state.get("window"))


def _filled(values: Array) -> Array:
    """Values (K,) with the mean of the known ones where one is unknown; 0 where none is known."""
    known = np.isfinite(values)
    filled: Array = np.where(known, values, values[known].mean() if known.any() else 0.0)
    return filled


def _keep_unknown(values: Array, last: Array) -> Array:
    """Values (K,) with the last one where one is unknown."""
    kept: Array = np.where(np.isfinite(values), values, last)
    return kept


class DogeOnline(_Exponentiated):
    """DoGE's rule driving the run itself (arXiv 2310.15393, algorithm 1).

    Gradients g_i clipped to norm 5;  s_i = lr_t·Σ_{j≠i}⟨g_i, g_j⟩ / (mean‖g‖ + 1e-6), clipped to [0, 5·lr_t];
    w ← softmax(log w + s/μ).

    Where the objective is not the mean loss over all domains the sum is the paper's for targets of their own, the
    alignment with the target's gradient: s_i = lr_t·Σ_j v_j⟨g_i, g_j⟩ / …, with v_j = K·∂objective/∂L_j at the last
    training losses, K·ω_j for mean losses. The domain's own gradient is in it (H_ii without noise), or a single target
    would never be raised. Deviation: a target that is trained on nowhere has no gradient here and is left out; without
    any other the mixture stays uniform. While a target's gradient is unknown all scores stay.

    Deviations, beside the module's: a clipped score moves w once per decision, not once per step. Norms are those of
    the gradients as measured, noise included, since that is what the paper clips.
    """

    name = "doge-online"
    paper = "arXiv 2310.15393"

    def __init__(self, mu: float = 0.01, clip_norm: float = 5.0, max_score: float = 5.0, floor: float = 0.1):
        """Take the options.

        Args:
            mu: μ, weight of staying near the last mixture.
            clip_norm: largest norm of a domain's gradient.
            max_score: largest score, in learning rates.
            floor: ε in [0, 1), share of the mixture spread evenly.

        Raises:
            ConfigError: an option out of range.
        """
        super().__init__(floor)
        self.mu = positive("mu", mu)
        self.clip_norm, self.max_score = positive("clip_norm", clip_norm), positive("max_score", max_score)

    def start(self, info: RunInfo) -> None:
        """Begin with the uniform mixture and no scores."""
        super().start(info)
        self._scores = np.full(info.num_domains, np.nan)  # s / lr
        self._values = DomainValues(info)

    def _exponents(self, window: StepStats) -> Array:
        self._values.update(window.losses)
        if window.gradients is None or not np.isfinite(window.lr):
            return np.zeros_like(self._logits)
        gram, noise = window.gradients.gram()
        norms = np.sqrt(np.maximum(np.diag(gram) + noise, 0.0))  # (K,) as measured; NaN without a diagonal
        self._scores = _keep_unknown(self._score(gram, norms), self._scores)
        exponents: Array = window.lr * _filled(self._scores) / self.mu
        return exponents

    def _score(self, gram: Array, norms: Array) -> Array:
        """s / lr (K,), NaN where unknown."""
        if not np.isfinite(norms).any():
            return np.full(len(norms), np.nan)
        factors = np.minimum(1.0, self.clip_norm / np.maximum(_filled(norms), 1e-12))
        pull = _pull(gram * np.outer(factors, factors), self._values.now())
        mean_norm = (factors * norms)[np.isfinite(norms)].mean()
        score: Array = np.clip(pull / (mean_norm + 1e-6), 0.0, self.max_score)
        return score

    def state_dict(self) -> dict[str, Any]:
        """Mixture, last scores and last losses."""
        return super().state_dict() | {"scores": self._scores.copy(), "values": self._values.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        super().load_state_dict(state)
        self._scores = np.array(state["scores"], dtype=np.float64)
        self._values.load_state_dict(state.get("values", {}))


def _pull(gram: Array, values: Array | None) -> Array:
    """(K,) sums of a domain's inner products with the others, or with all weighed by `values`; NaN where unknown."""
    if values is not None:
        return aligned(gram, values)
    off_diagonal = gram.copy()
    np.fill_diagonal(off_diagonal, np.nan)
    pull: Array = np.where(np.isfinite(off_diagonal).any(1), np.nansum(off_diagonal, axis=1), np.nan)
    return pull


class DogeProxy(DogeOnline):
    """Drives DoGE's proxy: batches are drawn uniformly, the loss is re-weighted by w·K under `DogeOnline`'s rule.

    The gradients that the rule reads are of the plain losses. Deviation: w keeps a floor of 1e-3 (DoReMi's), because a
    gradient is measured through its weighted loss and could not be told from nothing at weight 0.
    """

    name = "doge-proxy"
    needs = frozenset({"losses", "gram", "loss_weights"})

    def __init__(self, mu: float = 0.01, clip_norm: float = 5.0, max_score: float = 5.0, floor: float = 1e-3):
        """Take the options of `DogeOnline`; the floor must be positive.

        Raises:
            ConfigError: an option out of range.
        """
        super().__init__(mu, clip_norm, max_score, positive("floor", floor))

    def weights(self) -> Array:
        """The uniform mixture (K,) that batches are drawn by."""
        return np.full(self.info.num_domains, 1 / self.info.num_domains)

    def domain_weights(self) -> Array:
        """DoGE's w (K,), summing to 1."""
        return super().weights()

    def loss_weights(self) -> Array:
        """w·K (K,)."""
        return self.domain_weights() * self.info.num_domains


class Doge(ProxyMean):
    """DoGE whole: one proxy run, and the mean of its w as the mixture (arXiv 2310.15393)."""

    name = "doge"
    paper = "arXiv 2310.15393"

    def __init__(
        self,
        mu: float = 0.01,
        clip_norm: float = 5.0,
        max_score: float = 5.0,
        floor: float = 1e-3,
        proxy_frac: float = 1.0,
    ):
        """Take the options of `DogeProxy`, and the proxy's steps over those of the target.

        Raises:
            ConfigError: an option out of range.
        """
        super().__init__(proxy_frac)
        DogeProxy(mu, clip_norm, max_score, floor)  # refuse now
        self._options = {"mu": mu, "clip_norm": clip_norm, "max_score": max_score, "floor": floor}

    def preparation(self, info: RunInfo) -> Sequence[RunRequest]:
        """The proxy."""
        return (RunRequest(name="proxy", mixer="doge-proxy", options=dict(self._options), steps=self._steps(info)),)


class EgInteraction(_Exponentiated):
    """AC-ODM without actor and critic: exponentiated gradient on the environment's reward, z ← z + η·r.

    r is the environment's `interaction` term, smoothed and scaled by the same `InteractionTracker`; J(w) = Σ w_i r_i is
    linear in w, so this is mirror ascent on it. What an agent gains over this row is what the learning gains.

    Where the objective is not the mean loss over all domains r is a domain's alignment with the objective's gradient,
    Σ_j v_j⟨g_i, g_j⟩ over the same scale, as in `DogeOnline`: an environment's reward term knows no targets.
    """

    name = "eg-interaction"
    paper = "arXiv 2505.23878 (ablation)"

    def __init__(
        self,
        learning_rate: float = 0.1,
        floor: float = 0.1,
        smoothing: float = 0.7,
        scale_smoothing: float = 0.9,
        importance_weighted: bool = False,
    ):
        """Take the options.

        Args:
            learning_rate: η per decision; a domain whose r is one unit above the others' gains e^η on them.
            floor: ε of the mixture, the environment's.
            smoothing: of r, see `InteractionConfig`; so for the next two.
            scale_smoothing: of its scale.
            importance_weighted: divide by the mixture, as the paper does.

        Raises:
            ConfigError: an option out of range.
        """
        super().__init__(floor)
        self.learning_rate = positive("learning_rate", learning_rate)
        self.interaction = InteractionConfig(
            smoothing=smoothing, scale_smoothing=scale_smoothing, importance_weighted=importance_weighted
        )

    def start(self, info: RunInfo) -> None:
        """Begin with the uniform mixture and r = 0."""
        super().start(info)
        self._tracker = InteractionTracker(info.num_domains, self.interaction)
        self._values = DomainValues(info)

    def _exponents(self, window: StepStats) -> Array:
        self._values.update(window.losses)
        self._tracker.update(window, self._values.now())
        return self.learning_rate * self._tracker.interaction

    def state_dict(self) -> dict[str, Any]:
        """Mixture, tracker and last losses."""
        return super().state_dict() | {"tracker": self._tracker.state_dict(), "values": self._values.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        super().load_state_dict(state)
        self._tracker.load_state_dict(state["tracker"])
        self._values.load_state_dict(state.get("values", {}))


class Pike(_Exponentiated):
    """PiKE (arXiv 2502.06244): every T0 decisions w_k ← w_k·exp(ζ1·‖∇L_k‖² − ζ2/(2b)·σ_k²), normalised.

    ‖∇L_k‖² is the unbiased diagonal H_kk; σ_k², the variance of a single sequence's gradient, is the noise power of the
    window's mean times its n_k sequences; b is the batch size. An estimate below 0 (noise) counts as 0. The counts
    b_k = round(b·w_k) are the loader's, which carries the remainders.

    Deviations: both terms are divided by s, a running mean of the past windows' mean ‖∇L_k‖² (the first window sets it
    and moves nothing else), because squared gradients differ by orders of magnitude between models and within a run:
    ζ1 and ζ2 are therefore numbers of order 0.1 here, not the paper's. One update moves no domain by more than e^±1.
    """

    name = "pike"
    paper = "arXiv 2502.06244"

    def __init__(self, zeta1: float = 0.1, zeta2: float = 0.1, every: int = 1, floor: float = 0.1):
        """Take the options.

        Args:
            zeta1: ζ1, pull towards large gradients, per s.
            zeta2: ζ2, push away from noisy ones, per s.
            every: T0, decisions between two updates.
            floor: ε in [0, 1), share of the mixture spread evenly.

        Raises:
            ConfigError: an option out of range.
        """
        super().__init__(floor)
        self.zeta1, self.zeta2 = positive("zeta1", zeta1), zeta2
        if not 0 <= zeta2 < np.inf:
            raise ConfigError(f"zeta2={zeta2}: must be a finite number of at least 0")
        if every < 1:
            raise ConfigError(f"every={every}: must be at least 1 decision")
        self.every = every

    def start(self, info: RunInfo) -> None:
        """Begin with the uniform mixture and nothing known of the gradients."""
        super().start(info)
        self._squares = np.full(info.num_domains, np.nan)  # ‖∇L_k‖²
        self._variances = np.full(info.num_domains, np.nan)  # σ_k²
        self._scale = 0.0
        self._decisions = 0

    def _exponents(self, window: StepStats) -> Array:
        self._decisions += 1
        still = np.zeros_like(self._logits)
        if window.gradients is None:
            return still
        gram, noise = window.gradients.gram()
        self._squares = _keep_unknown(np.maximum(np.diag(gram), 0.0), self._squares)
        self._variances = _keep_unknown(np.maximum(noise * window.counts, 0.0), self._variances)
        past = self._scale
        self._rescale(float(_filled(self._squares).mean()))
        if past <= 0 or self._decisions % self.every:
            return still
        pull = self.zeta1 * _filled(self._squares)
        push = self.zeta2 / (2 * self.info.batch_size) * _filled(self._variances)
        change = (pull - push) / past
        exponents: Array = np.clip(change - change.mean(), -1.0, 1.0)  # the mean changes nothing but the clipping
        return exponents

    def _rescale(self, mean_square: float) -> None:
        if mean_square > 0:
            self._scale = mean_square if self._scale <= 0 else 0.9 * self._scale + 0.1 * mean_square

    def state_dict(self) -> dict[str, Any]:
        """Mixture, last gradient statistics, their scale, decisions."""
        return super().state_dict() | {
            "squares": self._squares.copy(),
            "variances": self._variances.copy(),
            "scale": self._scale,
            "decisions": self._decisions,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        super().load_state_dict(state)
        self._squares = np.array(state["squares"], dtype=np.float64)
        self._variances = np.array(state["variances"], dtype=np.float64)
        self._scale, self._decisions = float(state["scale"]), int(state["decisions"])
