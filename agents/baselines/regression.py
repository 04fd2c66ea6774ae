"""Static mixtures chosen by regression: many short runs at random mixtures, a fitted law, its best mixture.

All of them ask for the *same* preparatory runs when their `runs`, `steps_frac`, `seed` and sampling options agree, so
that a benchmark makes and charges them once. The mixtures are drawn from Dirichlet distributions around `prior`,
α_i = strength·K·prior_i, with one strength per run, evenly spaced in the logarithm from `min_strength` to
`max_strength`.

A law is only trusted where it was fitted: regressions extrapolate wrongly into the corners of the simplex. RegMix's
remedy, used by three of the four here, is to look only at mixtures drawn from the distribution of the runs, and to
average the best 128 of 100,000; the fourth (Olmix) is held near a prior by a KL penalty.

Deviation: RegMix's code has strengths 0.1 to 5 *without* the factor K (on its 17 domains: α of 0.006 to 0.3) around the
square root of the token counts. Most such mixtures are nearly corners, which 512 runs can afford and 32 cannot; the
defaults here are α of 0.5 to 5 around uniform.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError, unknown
from acodm_env.laws import MixingLaw, fit_law
from acodm_env.mixture import check_weights
from acodm_env.objective import marginal, value
from acodm_env.step_stats import Array
from acodm_env.trainer import Mixer, RunInfo, RunRequest, RunResult

from .options import whole

_PRIORS = ("uniform", "proportional", "square-root")


@dataclass(kw_only=True, eq=False)
class _Regression(Mixer):
    """Asks for runs at random mixtures, fits their final losses, and holds the mixture that the fit likes best."""

    runs: int = 32
    """Preparatory runs, at least K + 2."""
    steps_frac: float = 0.2
    """Optimiser steps of each, as a share of the horizon in (0, 1]; at least one step."""
    seed: int = 0
    """Of the random mixtures."""
    prior: str = "uniform"
    """Centre of the mixtures: "uniform", "proportional" to tokens, or to their "square-root"."""
    min_strength: float = 0.5
    """Smallest α_i at the uniform prior; below 1 favours corners."""
    max_strength: float = 5.0
    """Largest α_i; the larger, the nearer to the prior."""

    dynamic = False

    def __post_init__(self) -> None:
        whole("runs", self.runs, 3)
        whole("seed", self.seed, 0)
        _one_of("prior", self.prior, _PRIORS)
        if not 0 < self.steps_frac <= 1:
            raise ConfigError(f"steps_frac={self.steps_frac}: must be in (0, 1], a share of the horizon")
        if not 0 < self.min_strength <= self.max_strength < math.inf:
            raise ConfigError(
                f"min_strength={self.min_strength}, max_strength={self.max_strength}: must be positive, in this order"
            )
        self._chosen: Array | None = None

    def preparation(self, info: RunInfo) -> Sequence[RunRequest]:
        """The short runs, named run-00, run-01, …

        Raises:
            ConfigError: too few for the number of domains.
        """
        self.info = info
        needed = info.num_domains + 2
        if self.runs < needed:
            raise ConfigError(
                f"runs={self.runs}: must be at least {needed}, two more than the {info.num_domains} domains; "
                f"a fit of fewer means nothing; give runs={3 * info.num_domains}"
            )
        mixtures = self._sample(np.random.default_rng(self.seed), self.runs, info).round(6)
        steps = max(1, round(self.steps_frac * info.horizon))
        return [
            RunRequest(
                name=f"run-{index:02d}",
                mixer="static",
                options={"weights": dict(zip(info.domains, mixture, strict=True))},
                steps=steps,
            )
            for index, mixture in enumerate(mixtures.tolist())
        ]

    def prepare(self, results: Mapping[str, RunResult]) -> None:
        """Fit the final losses of the runs that did not diverge, and choose the mixture.

        Raises:
            ConfigError: too few runs are left to fit.
        """
        finished = [result for result in results.values() if np.isfinite(result.final_losses).all()]
        needed = self.info.num_domains + 2
        if len(finished) < needed:
            raise ConfigError(
                f"mixer={self.name}: must have at least {needed} finished runs, and only {len(finished)} of "
                f"{len(results)} did not diverge; the proxy's learning rate is too high; lower it or give more runs"
            )
        mixtures = np.array([result.mixture for result in finished])  # (N, K)
        losses = np.array([result.final_losses for result in finished])  # (N, M)
        self._chosen = check_weights(self._choose(mixtures, losses), self.info.num_domains)

    def start(self, info: RunInfo) -> None:
        """Hold the chosen mixture.

        Raises:
            ConfigError: the preparatory runs were not made, or were made for other domains or targets.
        """
        if self._chosen is None:
            raise ConfigError(f"mixer={self.name}: needs its preparatory runs first; run it through `acodm benchmark`")
        if (info.domains, info.targets) != (self.info.domains, self.info.targets):
            raise ConfigError(f"mixer={self.name}: was prepared for other domains or targets; prepare it for this run")
        super().start(info)
        self._weights = self._chosen.copy()

    def weights(self) -> Array:
        """The chosen mixture (K,)."""
        return self._weights.copy()

    def state_dict(self) -> dict[str, Any]:
        """The mixture."""
        return {"weights": self._weights.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self._weights = np.array(state["weights"], dtype=np.float64)

    def _sample(self, rng: np.random.Generator, count: int, info: RunInfo) -> Array:
        """(count, K) mixtures. In logarithms: a plain Dirichlet sampler divides 0 by 0 at tiny α."""
        strengths = np.geomspace(self.min_strength, self.max_strength, count)  # (count,)
        centre = _prior(self.prior, info)
        alpha = strengths[:, None] * info.num_domains * np.maximum(centre, 1e-6)  # (count, K)
        # Γ(α) is Γ(α+1)·U^(1/α) in distribution
        logs = np.log(rng.standard_gamma(alpha + 1)) + np.log1p(-rng.random(alpha.shape)) / alpha
        shares = np.exp(logs - logs.max(1, keepdims=True))
        mixtures: Array = shares / shares.sum(1, keepdims=True)
        return mixtures

    @abstractmethod
    def _choose(self, mixtures: Array, losses: Array) -> object:
        """The best mixture (K,) for `self.info`, from the runs' mixtures (N, K) and final losses (N, M)."""


@dataclass(kw_only=True, eq=False)
class _Simulated(_Regression):
    """Chooses by simulation: the mean of the mixtures that the law likes best, of those that might have been run."""

    simulations: int = 100_000
    """Mixtures to draw."""
    top: int = 128
    """How many of the best are averaged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("simulations", self.simulations, 1)
        if whole("top", self.top, 1) > self.simulations:
            raise ConfigError(f"top={self.top}: must be at most simulations={self.simulations}")

    def _choose(self, mixtures: Array, losses: Array) -> object:
        law = fit_law(self._law(), mixtures, losses)
        candidates = self._sample(np.random.default_rng([self.seed, 1]), self.simulations, self.info)
        predicted = self._judged(law.predict(candidates))  # (simulations,)
        return candidates[np.argsort(predicted, kind="stable")[: self.top]].mean(0)

    def _judged(self, losses: Array) -> Array:
        """The objective (N,) of losses (N, M)."""
        if self.info.metric == "loss":
            return losses @ self.info.objective_weights
        judged: Array = value(losses, self.info.objective_weights, True)
        return judged

    @abstractmethod
    def _law(self) -> str:
        """Name of the law, of `acodm_env.laws.LAWS`."""


@dataclass(kw_only=True, eq=False)
class RegMix(_Simulated):
    """RegMix (arXiv 2407.01492): one regressor per target, 100,000 simulated mixtures, the mean of the best 128.

    Deviations: the default regressor is the paper's other one, linear, here with ln(w + 0.001) beside w, because
    LightGBM cannot split a few dozen runs; `regressor="lightgbm"` is the paper's choice for 512. The objective is the
    run's own, weighted mean loss or log mean perplexity (the paper: the loss of one target). Its mixtures: see the
    module.
    """

    regressor: str = "log-linear"
    """ "log-linear", "linear" or "lightgbm"."""

    name = "regmix"
    paper = "arXiv 2407.01492"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("regressor", self.regressor, ("log-linear", "linear", "lightgbm"))

    def _law(self) -> str:
        return self.regressor


class MixingLawMixer(_Simulated):
    """Data mixing laws (arXiv 2403.16952): L_i = c_i + k_i·exp(Σ_j t_ij w_j), fitted with Huber loss 0.02.

    Deviations: the mixture is chosen by RegMix's simulation, not as the law's minimiser over the whole simplex, where
    it extrapolates; the law is fitted at one model size and number of steps, without the paper's scaling laws in those.
    """

    name = "mixing-law"
    paper = "arXiv 2403.16952"

    def _law(self) -> str:
        return "mixing"


class PowerLawMixer(_Simulated):
    """L_i = c_i + e^k_i·(1e-4 + Σ_j e^a_ij w_j)^(−e^b_i): ours; beats the other curved laws on RegMix's runs.

    The mixture is chosen by RegMix's simulation (arXiv 2407.01492).
    """

    name = "power-law"

    def _law(self) -> str:
        return "power"


@dataclass(kw_only=True, eq=False)
class LogLinear(_Regression):
    """Olmix (arXiv 2602.12237): minimise the mean fitted loss + 0.1·KL(w‖prior) subject to w_i·T ≤ 4·n_i.

    "Log-linear" there means that ln(L_i − c_i) is linear in w: L_i = c_i + exp(Σ_j t_ij w_j), the mixing law. (RegMix's
    regressor "log-linear" here is another one, linear in w and ln w.) The problem is convex, for log mean perplexity
    too, so its minimum is *the* minimum. T is the token budget of the whole run, n_i the tokens of domain i, the prior
    their shares.

    Deviations: the objective is the run's own, weighted mean loss or log mean perplexity; SLSQP instead of a cone
    solver; 32 runs whatever K (Olmix: a multiple of K).
    """

    kl: float = 0.1
    """Weight of the KL penalty."""
    max_epochs: float = 4.0
    """Most passes over any domain in the whole run."""
    kl_prior: str = "proportional"
    """What the penalty holds the mixture near; names as for `prior`."""

    name = "log-linear"
    paper = "arXiv 2602.12237"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("kl_prior", self.kl_prior, _PRIORS)
        if not 0 <= self.kl < math.inf:
            raise ConfigError(f"kl={self.kl}: must be a finite number of at least 0")
        if not 0 < self.max_epochs < math.inf:
            raise ConfigError(f"max_epochs={self.max_epochs}: must be a positive number")

    def preparation(self, info: RunInfo) -> Sequence[RunRequest]:
        """The short runs; a cap that cannot be met is refused before any of them is made."""
        self._caps(info)
        return super().preparation(info)

    def _choose(self, mixtures: Array, losses: Array) -> object:
        law = fit_law("mixing", mixtures, losses)
        assert isinstance(law, MixingLaw)
        prior = np.maximum(_prior(self.kl_prior, self.info), 1e-9)
        perplexity = self.info.metric == "perplexity"
        return minimise_mixture(law, self.info.objective_weights, prior, self.kl, self._caps(self.info), perplexity)

    def _caps(self, info: RunInfo) -> Array:
        """Largest weights (K,) within the epoch cap."""
        budget = info.batch_size * info.sequence_length * info.horizon
        sizes = np.array(info.sizes_tokens, dtype=np.float64)
        if self.max_epochs * sizes.sum() < budget:
            raise ConfigError(
                f"max_epochs={self.max_epochs}: must be at least {math.ceil(1000 * budget / sizes.sum()) / 1000}; "
                f"{int(sizes.sum())} tokens cannot fill a run of {budget} tokens; raise it or shorten the run"
            )
        caps: Array = np.minimum(self.max_epochs * sizes / budget, 1.0)
        return caps


def minimise_mixture(
    law: MixingLaw, objective: Array, prior: Array, kl: float, caps: Array, perplexity: bool = False
) -> Array:
    """The mixture (K,) that minimises objective·L(w) + kl·KL(w‖prior) subject to w ≤ caps.

    Args:
        law: K domains, M targets.
        objective: (M,) weights of the targets.
        prior: (K,) positive.
        kl: weight of the penalty.
        caps: (K,) at most 1, with sum of at least 1.
        perplexity: minimise ln Σ objective·e^L(w) + … instead.
    """
    from scipy.optimize import minimize

    def cost(mixture: Array) -> tuple[float, Array]:
        curve = np.exp(np.minimum(law.exponents @ mixture, 30.0))  # (M,)
        level, curve = _objective(law.floors, curve, objective, perplexity)
        ratio = np.log(mixture / prior)
        return level + float(kl * (mixture @ ratio)), curve @ law.exponents + kl * (ratio + 1)

    caps = np.maximum(caps, 1e-12)  # ln 0 is no number
    result = minimize(
        cost,
        caps / caps.sum(),
        jac=True,
        method="SLSQP",
        bounds=[(min(1e-9, cap), cap) for cap in caps.tolist()],
        constraints={"type": "eq", "fun": lambda mixture: mixture.sum() - 1, "jac": np.ones_like},
        options={"maxiter": 500, "ftol": 1e-10},
    )
    mixture: Array = np.clip(result.x, 0.0, caps)
    mixture /= mixture.sum()
    return mixture


def _objective(floors: Array, curve: Array, objective: Array, perplexity: bool) -> tuple[float, Array]:
    """The objective of losses floors + curve (M,), but for a constant, and its slope in ln curve (M,)."""
    if not perplexity:
        weighted = objective * curve
        return float(weighted.sum()), weighted
    losses = floors + curve
    return float(value(losses, objective, True)), marginal(losses, objective, True) * curve


def _prior(name: str, info: RunInfo) -> Array:
    """(K,) "uniform", or shares of the tokens or of their square roots."""
    power = {"uniform": 0.0, "square-root": 0.5, "proportional": 1.0}[name]
    shares = np.array(info.sizes_tokens, dtype=np.float64) ** power
    prior: Array = shares / shares.sum()
    return prior


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        unknown(name, value, choices)
