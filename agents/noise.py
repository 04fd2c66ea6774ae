"""Exploration noise that lasts: an AR(1) process per episode, for environments that average actions over time."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.noise import VectorizedActionNoise


class PersistentNoise(VectorizedActionNoise):
    """Gaussian noise (N, K) of N environments; what one decision adds and the next one are correlated.

    Where the mixture in force is a running average of the decisions, independent noise cancels: the return hardly
    depends on it and a critic cannot learn an action's slope. Draws from numpy's global generator, as SB3's noise does.
    """

    def __init__(self, sigma: NDArray[np.float64], persistence: float, num_envs: int):
        """Standard deviations (K,), correlation in [0, 1], N."""
        self.sigma, self.persistence, self.num_envs = np.asarray(sigma), persistence, num_envs
        self.reset()

    def reset(self, indices: Iterable[int] | None = None) -> None:
        """Draw afresh at the next call, for some environments or all."""
        if indices is None:
            self._kept = np.zeros((self.num_envs, len(self.sigma)))
            self._fresh = np.ones(self.num_envs, dtype=bool)
        else:
            self._fresh[list(indices)] = True

    def __call__(self) -> NDArray[np.float64]:
        """(N, K)."""
        drawn = np.random.normal(size=self._kept.shape)  # noqa: NPY002 (SB3's own generator)
        moved = self.persistence * self._kept + np.sqrt(1 - self.persistence**2) * drawn
        self._kept = np.where(self._fresh[:, None], drawn, moved)
        self._fresh[:] = False
        noise: NDArray[np.float64] = self._kept * self.sigma
        return noise

    def __repr__(self) -> str:
        return f"PersistentNoise(persistence={self.persistence})"
