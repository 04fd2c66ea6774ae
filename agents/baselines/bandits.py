"""Bandits over domains that see training losses only: ODM in its two forms, and EXP3.

ODM (Efficient Online Data Mixing, arXiv 2312.02406) explores with ε_t = min(1/K, √(ln K / (K t))), ε_0 = 1/K. Since
K·ε_t is 0.48 at t = 300 for K = 22, plain ODM is nearly uniform at a short horizon by construction: every run reports
its last K·ε (`exploration`).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.trainer import Array, Mixer, RunInfo, StepStats


def exploration_rate(step: int, num_domains: int) -> float:
    """ε_t = min(1/K, √(ln K / (K t))); 1/K at t = 0 (arXiv 2312.02406, algorithm 1)."""
    if step == 0:
        return 1 / num_domains
    return min(1 / num_domains, math.sqrt(math.log(num_domains) / (num_domains * step)))


class _Bandit(Mixer):
    """Running reward estimates R (K,) of the arms, and the mixture made from them."""

    needs = frozenset({"losses"})

    def start(self, info: RunInfo) -> None:
        """Begin with R = 0 and the uniform mixture."""
        super().start(info)
        self.rewards: Array = np.zeros(info.num_domains)
        self.updates = 0
        self._weights = np.full(info.num_domains, 1 / info.num_domains)

    def weights(self) -> Array:
        """The mixture (K,) for the next step."""
        return self._weights

    def update(self, stats: StepStats) -> None:
        """Credit every observed domain; one that was not drawn, or has no finite loss, keeps its estimate."""
        observed = (stats.counts > 0) & np.isfinite(stats.losses)
        self.updates += 1
        self._credit(observed, stats.losses)
        self._weights = self._mixture()

    def _credit(self, observed: np.ndarray, losses: Array) -> None:
        raise NotImplementedError

    def _mixture(self) -> Array:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Estimates, update count and mixture."""
        return {"rewards": self.rewards.copy(), "updates": self.updates, "weights": self._weights.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self.rewards = np.array(state["rewards"], dtype=np.float64)
        self.updates = int(state["updates"])
        self._weights = np.array(state["weights"], dtype=np.float64)


class _Odm(_Bandit):
    """What both forms of ODM share: the exploration rate, and a warm-up on the uniform mixture."""

    def __init__(self, smoothing: float, warmup_frac: float):
        if not 0 <= smoothing < 1:
            raise ConfigError(f"smoothing={smoothing}: must be in [0, 1)")
        if not 0 <= warmup_frac < 1:
            raise ConfigError(f"warmup_frac={warmup_frac}: must be in [0, 1)")
        self.smoothing, self.warmup_frac = smoothing, warmup_frac

    def exploration(self) -> float:
        """K·ε of the current mixture: the share of it that is spread evenly."""
        num_domains = self.info.num_domains
        return num_domains * exploration_rate(self.updates, num_domains)

    def _smooth(self, observed: np.ndarray, reward: Array) -> None:
        a = self.smoothing
        self.rewards[observed] = a * self.rewards[observed] + (1 - a) * reward[observed]

    def _mixture(self) -> Array:
        num_domains = len(self.rewards)
        if self.updates <= self.warmup_frac * self.info.horizon:
            return np.full(num_domains, 1 / num_domains)
        epsilon = exploration_rate(self.updates, num_domains)
        mixture: Array = (1 - num_domains * epsilon) * self._greedy() + epsilon
        normalised: Array = mixture / mixture.sum()
        return normalised

    def _greedy(self) -> Array:
        raise NotImplementedError


class OdmPaper(_Odm):
    """ODM as its paper states it (arXiv 2312.02406, algorithm 1).

    R_i ← a R_i + (1−a) L_i/w_i for observed i;  w_i = (1−Kε_t)·exp(ε_{t−1}R_i)/Σ_j exp(ε_{t−1}R_j) + ε_t.  A step
    observes many domains at once: each that was drawn is updated. The largest exponent is subtracted before exp,
    which changes nothing but overflow.
    """

    name = "odm-paper"

    def __init__(self, smoothing: float = 0.9, warmup_frac: float = 0.0):
        super().__init__(smoothing, warmup_frac)

    def _credit(self, observed: np.ndarray, losses: Array) -> None:
        self._smooth(observed, np.where(observed, losses, 0.0) / np.maximum(self._weights, 1e-12))

    def _greedy(self) -> Array:
        exponent = exploration_rate(self.updates - 1, len(self.rewards)) * self.rewards
        soft = np.exp(exponent - exponent.max())
        greedy: Array = soft / soft.sum()
        return greedy


class OdmReleased(_Odm):
    """ODM as its released code computes it, the rule behind the published 1B runs.

    R_i ← a R_i + (1−a) exp(L_i), without importance weight;  w_i = (1−Kε_t)·R_i/Σ_j R_j + ε_t  (ε_{t−1} cancels in the
    released form). R starts at 0, so a domain never seen gets exactly ε_t. In the steady state w follows perplexity.
    The released runs hold static weights for the first 2 % of the steps: `warmup_frac=0.02`.
    """

    name = "odm-released"

    def __init__(self, smoothing: float = 0.5, warmup_frac: float = 0.02):
        super().__init__(smoothing, warmup_frac)

    def _credit(self, observed: np.ndarray, losses: Array) -> None:
        self._smooth(observed, np.exp(np.minimum(np.where(observed, losses, 0.0), 80.0)))

    def _greedy(self) -> Array:
        total = self.rewards.sum()
        if total <= 0:
            return np.full(len(self.rewards), 1 / len(self.rewards))
        greedy: Array = self.rewards / total
        return greedy


class Exp3(_Bandit):
    """EXP3 (Auer et al. 2002): v_i ← v_i·exp(g·r_i/(w_i K)),  w_i = (1−g)·v_i/Σv + g/K, with r_i = L_i/10 in [0, 1].

    Kept as log v with the largest subtracted: the product form overflows. The importance weight 1/w_i uses the weight
    that the step was drawn with. Every drawn domain is updated, since a batch observes many arms.
    """

    name = "exp3"

    def __init__(self, exploration: float = 0.1, loss_scale: float = 10.0):
        if not 0 < exploration <= 1:
            raise ConfigError(f"exploration={exploration}: must be in (0, 1]")
        self.gamma, self.loss_scale = exploration, loss_scale

    def exploration(self) -> float:
        """The share of the mixture that is spread evenly."""
        return self.gamma

    def _credit(self, observed: np.ndarray, losses: Array) -> None:
        reward = np.clip(np.where(observed, losses, 0.0) / self.loss_scale, 0.0, 1.0)
        self.rewards += self.gamma * reward / (np.maximum(self._weights, 1e-12) * len(reward))
        self.rewards -= self.rewards.max()

    def _mixture(self) -> Array:
        soft = np.exp(self.rewards - self.rewards.max())
        mixture: Array = (1 - self.gamma) * soft / soft.sum() + self.gamma / len(soft)
        return mixture
