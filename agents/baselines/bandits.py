"""Bandits over domains that see training losses only: ODM in its two forms, and EXP3.

ODM (Efficient Online Data Mixing, arXiv 2312.02406) explores with ε_t = min(1/K, √(ln K / (K t))), ε_0 = 1/K. Since
K·ε_t is 0.48 at t = 300 for K = 22, plain ODM is nearly uniform at a short horizon by construction: `exploration`
gives the K·ε in force, for a run to report, and the `-rescaled` forms run through the published schedule of ε in
whatever steps there are.

A batch observes many arms at once, so every domain that was drawn is credited, with the weight that it was drawn with
(under `lag` an older one than the latest). A domain that was not drawn, or whose loss is not finite, and every
domain of a diverged step, keeps its last estimate; t counts the step all the same.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acodm_env.errors import ConfigError
from acodm_env.mixture import softmax
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Mixer, RunInfo

PUBLISHED_HORIZON = 41_667
"""Optimiser steps of ODM's published runs."""
_SMALLEST = 1e-12  # with one domain the floor of ODM is 0


def exploration_rate(step: float, num_domains: int) -> float:
    """ε_t = min(1/K, √(ln K / (K t))); 1/K at t = 0 (arXiv 2312.02406, algorithm 1)."""
    if step == 0:
        return 1 / num_domains
    return min(1 / num_domains, math.sqrt(math.log(num_domains) / (num_domains * step)))


class _Bandit(Mixer):
    """Running reward estimates R (K,) of the arms, and the mixture made from them."""

    rewards: Array
    """(K,) R of ODM, log v of EXP3."""
    updates: int
    """t, the steps seen."""

    needs = frozenset({"losses"})

    def start(self, info: RunInfo) -> None:
        """Begin with R = 0 and the uniform mixture."""
        super().start(info)
        self.rewards = np.zeros(info.num_domains)
        self.updates = 0
        self._weights = np.full(info.num_domains, 1 / info.num_domains)

    def weights(self) -> Array:
        """The mixture (K,) for the next step."""
        return self._weights.copy()

    def update(self, stats: StepStats) -> None:
        """Credit every observed domain; one that was not drawn, or has no finite loss, keeps its estimate."""
        observed = (stats.counts > 0) & np.isfinite(stats.losses) & (not stats.diverged)  # (K,)
        self.updates += 1
        self._credit(observed, np.where(observed, stats.losses, 0.0), stats.requested)
        self._weights = self._mixture()

    @abstractmethod
    def exploration(self) -> float:
        """K·ε: the share of the mixture that the rule spreads evenly at the current step."""

    def diagnostics(self) -> dict[str, float]:
        """The share of exploration, for the run's log."""
        return {"exploration": self.exploration()}

    @abstractmethod
    def _credit(self, observed: NDArray[np.bool_], losses: Array, drawn_with: Array) -> None: ...

    def _drawn_with(self, weights: Array) -> Array:
        """Weights (K,) to divide by: no smaller than the rule's own floor, whoever else limited the mixture."""
        lowest = self.exploration() / len(weights)
        divisor: Array = np.maximum(weights, max(lowest, _SMALLEST))
        return divisor

    @abstractmethod
    def _mixture(self) -> Array: ...

    def state_dict(self) -> dict[str, Any]:
        """Estimates, update count and mixture."""
        return {"rewards": self.rewards.copy(), "updates": self.updates, "weights": self._weights.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self.rewards = np.array(state["rewards"], dtype=np.float64)
        self.updates = int(state["updates"])
        self._weights = np.array(state["weights"], dtype=np.float64)


class _Odm(_Bandit):
    """What both forms of ODM share: the exploration rate, and a warm-up on the uniform mixture.

    The published runs hold static weights for the first 2 % of the steps while R is already updated; so does
    `warmup_frac=0.02` of the horizon, on uniform weights (theirs: the Pile's own). t counts from the first step.
    """

    paper = "arXiv 2312.02406"
    reference_horizon: int | None = None
    """Steps of the run whose schedule of ε is stretched over this one; None: ε as a function of t itself."""

    def __init__(self, smoothing: float, warmup_frac: float):
        if not 0 <= smoothing < 1:
            raise ConfigError(f"smoothing={smoothing}: must be in [0, 1)")
        if not 0 <= warmup_frac < 1:
            raise ConfigError(f"warmup_frac={warmup_frac}: must be in [0, 1)")
        self.smoothing, self.warmup_frac = smoothing, warmup_frac

    def exploration(self) -> float:
        """K·ε_t at the current step t; during the warm-up the mixture is uniform whatever this says."""
        return self.info.num_domains * self._epsilon(self.updates)

    def _epsilon(self, update: int) -> float:
        """ε at t = `update`, rescaled where asked for."""
        scaled = update if self.reference_horizon is None else update * self.reference_horizon / self.info.horizon
        return exploration_rate(scaled, self.info.num_domains)

    def _smooth(self, observed: NDArray[np.bool_], reward: Array) -> None:
        a = self.smoothing
        self.rewards[observed] = a * self.rewards[observed] + (1 - a) * reward[observed]

    def _mixture(self) -> Array:
        num_domains = len(self.rewards)
        if self.updates <= self.warmup_frac * self.info.horizon:
            return np.full(num_domains, 1 / num_domains)
        epsilon = self._epsilon(self.updates)
        mixture: Array = (1 - num_domains * epsilon) * self._greedy() + epsilon
        normalised: Array = mixture / mixture.sum()
        return normalised

    @abstractmethod
    def _greedy(self) -> Array: ...


class OdmPaper(_Odm):
    """ODM as its paper states it (arXiv 2312.02406, algorithm 1).

    R_i ← a R_i + (1−a) L_i/w_i for observed i;  w_i = (1−Kε_t)·exp(ε_{t−1}R_i)/Σ_j exp(ε_{t−1}R_j) + ε_t.

    Deviations: the largest exponent is subtracted before exp, which changes nothing but overflow; w_i in the
    division is at least ε_t, which only matters where something else (bounds, a lag) chose the mixture.
    """

    name = "odm-paper"

    def __init__(self, smoothing: float = 0.9, warmup_frac: float = 0.02):
        super().__init__(smoothing, warmup_frac)

    def _credit(self, observed: NDArray[np.bool_], losses: Array, drawn_with: Array) -> None:
        self._smooth(observed, losses / self._drawn_with(drawn_with))

    def _greedy(self) -> Array:
        exponent = self._epsilon(self.updates - 1) * self.rewards
        return softmax(exponent)


class OdmReleased(_Odm):
    """ODM as its released code computes it, the rule behind the published 1B runs.

    R_i ← a R_i + (1−a) exp(L_i), without importance weight;  w_i = (1−Kε_t)·R_i/Σ_j R_j + ε_t  (ε_{t−1} cancels in the
    released form). R starts at 0, so a domain never seen gets exactly ε_t. In the steady state w follows perplexity.

    Deviation: losses above 80 nats count as 80, so that exp stays finite. Before anything was seen w is uniform.
    """

    name = "odm-released"

    def __init__(self, smoothing: float = 0.5, warmup_frac: float = 0.02):
        super().__init__(smoothing, warmup_frac)

    def _credit(self, observed: NDArray[np.bool_], losses: Array, drawn_with: Array) -> None:
        self._smooth(observed, np.exp(np.minimum(losses, 80.0)))

    def _greedy(self) -> Array:
        total = self.rewards.sum()
        if total <= 0:
            return np.full(len(self.rewards), 1 / len(self.rewards))
        greedy: Array = self.rewards / total
        return greedy


class OdmPaperRescaled(OdmPaper):
    """`OdmPaper` with ε at t·(reference horizon)/horizon, so that a short run explores as the published one did.

    At t·41,667/horizon K·ε ends at 0.040 for K = 22 whatever the horizon. Smoothing still counts plain steps, and the
    warm-up is a fraction of the horizon already. Not in the paper: ours, so that ODM is not judged by its floor.
    """

    name = "odm-paper-rescaled"

    def __init__(self, smoothing: float = 0.9, warmup_frac: float = 0.02, reference_horizon: int = PUBLISHED_HORIZON):
        super().__init__(smoothing, warmup_frac)
        self.reference_horizon = _positive_steps(reference_horizon)


class OdmReleasedRescaled(OdmReleased):
    """`OdmReleased` with ε at t·(reference horizon)/horizon, as in `OdmPaperRescaled`."""

    name = "odm-released-rescaled"

    def __init__(self, smoothing: float = 0.5, warmup_frac: float = 0.02, reference_horizon: int = PUBLISHED_HORIZON):
        super().__init__(smoothing, warmup_frac)
        self.reference_horizon = _positive_steps(reference_horizon)


def _positive_steps(reference_horizon: int) -> int:
    if reference_horizon < 1:
        raise ConfigError(f"reference_horizon={reference_horizon}: must be at least 1 optimiser step")
    return reference_horizon


class Exp3(OdmPaper):
    """EXP3 in the Gibbs form that ODM builds on: ODM's mixture over *cumulative* rewards.

    R_i ← R_i + (L_i/10)/w_i for observed i;  w_i = (1−Kε_t)·exp(ε_{t−1}R_i)/Σ_j exp(ε_{t−1}R_j) + ε_t. No warm-up.

    Deviations: as in `OdmPaper`; without the subtraction of the largest exponent this form overflows.
    """

    name = "exp3"

    def __init__(self, loss_scale: float = 10.0):
        super().__init__(smoothing=0.0, warmup_frac=0.0)
        self.loss_scale = _positive_scale(loss_scale)

    def _credit(self, observed: NDArray[np.bool_], losses: Array, drawn_with: Array) -> None:
        self.rewards[observed] += (losses / self.loss_scale / self._drawn_with(drawn_with))[observed]


def _positive_scale(loss_scale: float) -> float:
    if not (math.isfinite(loss_scale) and loss_scale > 0):
        raise ConfigError(f"loss_scale={loss_scale}: must be a positive number of nats")
    return loss_scale


class Exp3Classical(_Bandit):
    """EXP3, the classical normalised rule (Auer et al., The nonstochastic multiarmed bandit problem, 2002, figure 1).

    v_i ← v_i·exp(g·r_i/(w_i K));  w_i = (1−g)·v_i/Σv + g/K;  r_i = L_i/10 clipped to [0, 1], since the rule wants
    rewards in [0, 1] and a loss of 10 nats is ln(22 026), a whole vocabulary. g is fixed (`exploration`), unlike
    ODM's falling ε_t.

    Deviations: every drawn domain is credited, not one arm a round; log v is kept, with the largest subtracted,
    because the product form overflows; w_i in the division is at least g/K.
    """

    name = "exp3-classical"
    paper = "doi 10.1137/S0097539701398375"

    def __init__(self, exploration: float = 0.1, loss_scale: float = 10.0):
        if not 0 < exploration <= 1:
            raise ConfigError(f"exploration={exploration}: must be in (0, 1]")
        self.gamma, self.loss_scale = exploration, _positive_scale(loss_scale)

    def exploration(self) -> float:
        """g, the same at every step."""
        return self.gamma

    def _credit(self, observed: NDArray[np.bool_], losses: Array, drawn_with: Array) -> None:
        reward = np.clip(losses / self.loss_scale, 0.0, 1.0)  # 0 where nothing was observed
        self.rewards += self.gamma * reward / (self._drawn_with(drawn_with) * len(reward))
        self.rewards -= self.rewards.max()

    def _mixture(self) -> Array:
        soft = np.exp(self.rewards - self.rewards.max())
        mixture: Array = (1 - self.gamma) * soft / soft.sum() + self.gamma / len(soft)
        return mixture
