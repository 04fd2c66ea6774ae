"""Randomised surfaces: a family of laws around a fitted one, or of any number of domains, a new one every run.

A policy that learns on one surface learns that surface. One that is to drive a corpus it has never seen must learn on
many, and be judged on others. Nothing here is measured: the spreads are wide on purpose, and every one is a setting.
"""

from dataclasses import dataclass, replace

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.laws import PowerLaw
from acodm_env.step_stats import Array
from acodm_env.surrogate.surface import Surface

_USELESS = -30.0  # ln of how much a token helps: not at all


@dataclass(frozen=True, kw_only=True)
class Family:
    """How surfaces are drawn.

    Without `num_domains` they keep the domains and targets of `around` and perturb its law. With it, each has its own
    number of domains, every domain is a target, and of `around` only the scale of losses and noise is kept.
    """

    around: Surface
    """The fitted surface."""
    num_domains: tuple[int, int] | None = None
    """Fewest and most domains (≥ 2) of surfaces made from scratch; None perturbs `around`."""
    transfer: float = 1.5
    """Standard deviation of ln usefulness a_ij: added to the fitted one, or between domains made from scratch."""
    learnability: float = 0.4
    """Standard deviation of ln of the exponent e^b_i."""
    entropy: float = 0.1
    """Standard deviation of ln of a target's final loss under the uniform mixture (perturbed surfaces)."""
    forgetting: float = 1.5
    """The level of φ, common to a surface's domains, is uniform between 0 and this, per run."""
    forgetting_spread: float = 0.3
    """Standard deviation of φ_j around the level; no φ_j is negative. Logged runs do not show more."""
    sizes: float = 1.0
    """Standard deviation of ln of a domain's size."""
    noise_domains: float = 0.1
    """Probability that a domain teaches nothing."""
    saturating: float = 0.1
    """Probability that a domain's own loss saturates quickly."""
    lengths: tuple[float, float] = (0.5, 2.0)
    """Shortest and longest run in units of the fitted ones; log-uniform."""

    def __post_init__(self) -> None:
        if self.num_domains is not None:
            object.__setattr__(self, "num_domains", tuple(self.num_domains))
            fewest, most = self.num_domains
            if not 2 <= fewest <= most:
                raise ConfigError(f"num_domains={self.num_domains}: must be (fewest, most) with 2 ≤ fewest ≤ most")
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if not 0 < self.lengths[0] <= self.lengths[1] < np.inf:
            raise ConfigError(f"lengths={self.lengths}: must be (shortest, longest), both positive")
        for name in ("transfer", "learnability", "entropy", "forgetting", "forgetting_spread", "sizes"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 0, and finite")
        for name in ("noise_domains", "saturating"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be a probability below 1")

    @property
    def max_domains(self) -> int:
        """K of the arrays."""
        return len(self.around.domains) if self.num_domains is None else self.num_domains[1]

    @property
    def max_targets(self) -> int:
        """M of the arrays."""
        return len(self.around.targets) if self.num_domains is None else self.num_domains[1]

    def draw(self, rng: np.random.Generator) -> Surface:
        """One surface of the family."""
        surface = self._perturbed(rng) if self.num_domains is None else self._made(rng)
        num_domains = len(surface.domains)
        sizes = np.array(surface.sizes_tokens) * np.exp(self.sizes * rng.standard_normal(num_domains))
        shortest, longest = np.log(self.lengths)
        level, apart = rng.uniform(0, self.forgetting), self.forgetting_spread * rng.standard_normal(num_domains)
        return replace(
            surface,
            sizes_tokens=tuple(np.maximum(sizes, 1.0).tolist()),
            forgetting=tuple(np.maximum(level + apart, 0.0).tolist()),
            length=float(np.exp(rng.uniform(shortest, longest))),
        )

    def _perturbed(self, rng: np.random.Generator) -> Surface:
        law = self.around.law
        num_targets, num_domains = law.usefulness.shape
        usefulness = law.usefulness + self.transfer * rng.standard_normal((num_targets, num_domains))
        useless = rng.random(num_domains) < self.noise_domains
        usefulness[:, useless] = _USELESS
        exponents = law.exponents + self.learnability * rng.standard_normal(num_targets)
        quick = rng.random(num_targets) < self.saturating
        exponents = np.where(quick, np.maximum(exponents, np.log(0.5)), exponents)
        ends = law.predict(np.full((1, num_domains), 1 / num_domains))[0]  # (M,) final losses of uniform
        ends = np.minimum(ends * np.exp(self.entropy * rng.standard_normal(num_targets)), self._highest)
        floors = np.clip(np.where(quick, 0.8 * ends, law.floors), 0.0, 0.95 * ends)
        return replace(self.around, law=_through(usefulness, exponents, floors, ends))

    def _made(self, rng: np.random.Generator) -> Surface:
        assert self.num_domains is not None
        num_domains = int(rng.integers(self.num_domains[0], self.num_domains[1] + 1))
        usefulness = _relations(rng, num_domains, self.transfer)
        initial = self.around.initial_loss_nats
        exponents = 2 * self.learnability * rng.standard_normal(num_domains)  # text: e^b of 0.1 to 7, median 1
        ends = initial * rng.uniform(0.15, 0.75, num_domains)
        floors = ends * rng.uniform(0.2, 0.95, num_domains)
        quick = rng.random(num_domains) < self.saturating
        exponents = np.where(quick, np.log(4.0), exponents)
        floors = np.where(quick, 0.9 * ends, floors)
        noise = (rng.random(num_domains) < self.noise_domains) & (np.arange(num_domains) >= 2)  # two are left to choose
        usefulness[:, noise] = _USELESS
        usefulness[noise, :] = _USELESS
        ends, floors = np.where(noise, 0.9 * initial, ends), np.where(noise, 0.89 * initial, floors)
        weights = np.where(noise, 0.0, 1.0) / max((~noise).sum(), 1)
        return replace(
            self.around,
            domains=tuple(f"domain{index}" for index in range(num_domains)),
            targets=tuple(f"domain{index}" for index in range(num_domains)),
            law=_through(usefulness, exponents, floors, ends),
            sizes_tokens=(self.around.run_tokens / num_domains * 2,) * num_domains,
            forgetting=(0.0,) * num_domains,
            objective=tuple(weights.tolist()),
        )

    @property
    def _highest(self) -> float:
        return 0.95 * self.around.initial_loss_nats


def _relations(rng: np.random.Generator, num_domains: int, spread: float) -> Array:
    """ln usefulness (K, K) of domains made from scratch: each helps itself most, and others as near as they lie."""
    places = rng.standard_normal((num_domains, 3))  # kinds of text, in a space of three dimensions
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    own = rng.uniform(0.5, 3.0, num_domains)
    usefulness: Array = -0.2 * spread * apart + 0.3 * spread * rng.standard_normal((num_domains, num_domains))
    usefulness[np.arange(num_domains), np.arange(num_domains)] = own
    return usefulness


def _through(usefulness: Array, exponents: Array, floors: Array, ends: Array) -> PowerLaw:
    """The law with these parameters whose losses under the uniform mixture are `ends` (M,)."""
    share = 1e-4 + np.exp(usefulness).mean(-1)
    scales = np.log(np.maximum(ends - floors, 1e-6)) + np.exp(exponents) * np.log(share)
    return PowerLaw(usefulness, scales, exponents, floors)
