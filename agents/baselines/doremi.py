"""DoReMi (arXiv 2305.10429): a mixture from a small proxy that is trained against a reference model's losses.

Three runs: a *reference* model under a fixed mixture; a *proxy* whose loss is re-weighted towards the domains where it
lags most behind the reference (`DoremiProxy`); and the target under the mean of the proxy's domain weights (`Doremi`).
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.mixture import check_weights
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Mixer, RunInfo, RunRequest, RunResult

from .options import positive
from .static import Proportional, Static, Uniform
from .targets import DomainValues

Mixture = str | Mapping[str, float] | Sequence[float]
"""A fixed mixture as an option: "uniform", "proportional", or what the mixer "static" takes as weights."""

_BY_NAME: dict[str, type[Mixer]] = {"uniform": Uniform, "proportional": Proportional}


def fixed_mixture(mixture: Mixture, info: RunInfo) -> Array:
    """The weights (K,) of a fixed mixture in a run.

    Raises:
        ConfigError: it names other domains than the run has, or is no mixture.
    """
    mixer = _BY_NAME[mixture]() if isinstance(mixture, str) and mixture in _BY_NAME else Static(mixture)
    mixer.start(info)
    return mixer.weights()


class DoremiProxy(Mixer):
    """Drives DoReMi's proxy: a fixed sampling mixture q, and a loss re-weighted by domain weights a (algorithm 1).

    λ_i = mean over the domain's tokens of max(ℓ_θ − ℓ_ref, 0), clipped per token;
    a' = a·exp(ηλ);  a ← (1−c)·a'/Σa' + c/K;  loss Σ_i a_i·L_i, that is, token losses times a_i/q_i.

    A domain without a finite λ in a step (not drawn, NaN, a diverged step) keeps its last one, 0 before its first.

    Where the objective is not the mean loss over all domains (which the paper knows nothing of: there the proxy plays
    against the worst domain) λ_i counts K·∂objective/∂L_i times, at the last training losses: ω_i·K for mean losses.
    A domain that is no target lacks nothing then, and where no target is trained on a stays uniform.

    Deviations: the paper computes a from the batch that it then weighs; here a mixture is decided before the step,
    so a step's loss weights come from the batches before. log a is what is kept, and the largest exponent is
    subtracted before exp, which changes nothing but overflow.
    """

    name = "doremi-proxy"
    paper = "arXiv 2305.10429"
    needs = frozenset({"losses", "excess", "loss_weights"})

    def __init__(self, learning_rate: float = 1.0, floor: float = 1e-3, sampling: Mixture = "uniform"):
        """Take the options.

        Args:
            learning_rate: η, per nat.
            floor: c in (0, 1), the share of a that is spread evenly; the paper's 1e-3.
            sampling: the mixture q that batches are drawn by.

        Raises:
            ConfigError: an option out of range.
        """
        if not 0 < floor < 1:
            raise ConfigError(f"floor={floor}: must be in (0, 1); without it a domain's weight could not come back")
        self.learning_rate, self.floor, self.sampling = positive("learning_rate", learning_rate), floor, sampling

    def start(self, info: RunInfo) -> None:
        """Begin with a uniform.

        Raises:
            ConfigError: the sampling mixture leaves a domain out.
        """
        super().start(info)
        self._sampling = fixed_mixture(self.sampling, info)
        if self._sampling.min() <= 0:
            left_out = info.domains[int(self._sampling.argmin())]
            raise ConfigError(
                f"sampling.{left_out}=0: must be positive; DoReMi divides by it; drop the domain from the corpus"
            )
        self._log_weights = np.full(info.num_domains, -math.log(info.num_domains))  # log a
        self._excess = np.zeros(info.num_domains)  # λ
        self._values = DomainValues(info)

    def weights(self) -> Array:
        """The sampling mixture q (K,), at every step."""
        return self._sampling.copy()

    def domain_weights(self) -> Array:
        """DoReMi's domain weights a (K,), summing to 1."""
        weights = np.exp(self._log_weights)
        normalised: Array = weights / weights.sum()
        return normalised

    def loss_weights(self) -> Array:
        """a/q (K,)."""
        return self.domain_weights() / self._sampling

    def update(self, stats: StepStats) -> None:
        """One exponentiated-gradient step on the excess losses."""
        if stats.diverged or stats.excess_losses is None:
            return
        self._excess = np.where(np.isfinite(stats.excess_losses), stats.excess_losses, self._excess)
        self._values.update(stats.losses)
        values = self._values.now()
        excess = self._excess if values is None else values * self._excess
        exponent = self._log_weights + self.learning_rate * excess
        tilted = np.exp(exponent - exponent.max())
        self._log_weights = np.log((1 - self.floor) * tilted / tilted.sum() + self.floor / len(tilted))

    def state_dict(self) -> dict[str, Any]:
        """log a, the last λ and the last losses."""
        state: dict[str, Any] = {"log_weights": self._log_weights.copy(), "excess": self._excess.copy()}
        return state | {"values": self._values.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self._log_weights = np.array(state["log_weights"], dtype=np.float64)
        self._excess = np.array(state["excess"], dtype=np.float64)
        self._values.load_state_dict(state.get("values", {}))


class ProxyMean(Mixer):
    """A fixed mixture: the time average of the mixtures of a preparatory run named "proxy"."""

    dynamic = False

    def __init__(self, proxy_frac: float):
        self.proxy_frac = positive("proxy_frac", proxy_frac)
        self._mixture: Array | None = None

    @abstractmethod
    def preparation(self, info: RunInfo) -> Sequence[RunRequest]:
        """The runs that must come first."""

    def _steps(self, info: RunInfo) -> int:
        return max(1, round(info.horizon * self.proxy_frac))

    def prepare(self, results: Mapping[str, RunResult]) -> None:
        """Take the proxy's mean mixture.

        Raises:
            ConfigError: a preparatory run diverged, so that its mixture means nothing.
        """
        for name, result in results.items():
            if not np.isfinite(result.final_losses).all():
                raise ConfigError(
                    f"mixer={self.name}: its preparatory run '{name}' diverged; lower the language model's "
                    f"learning rate"
                )
        self._mixture = results["proxy"].mixture

    def start(self, info: RunInfo) -> None:
        """Begin a run under the mixture found.

        Raises:
            ConfigError: `prepare` was not called, or the proxy ran on other domains.
        """
        super().start(info)
        if self._mixture is None:
            raise ConfigError(f"mixer={self.name}: needs its preparatory runs first; run it through `acodm benchmark`")
        self._weights = check_weights(self._mixture, info.num_domains, "mixture of the proxy")

    def weights(self) -> Array:
        """The same mixture (K,) at every step."""
        return self._weights.copy()


class Doremi(ProxyMean):
    """DoReMi whole: reference run, proxy run, and the mean of the proxy's domain weights as the mixture.

    The preparatory runs take as many steps as the target's (`proxy_frac` = 1), as in the paper, where the saving lies
    in a proxy much smaller than the target. One round: the paper's iterated form is a second benchmark row whose
    `reference` is the first one's mixture.
    """

    name = "doremi"
    paper = "arXiv 2305.10429"

    def __init__(
        self,
        learning_rate: float = 1.0,
        floor: float = 1e-3,
        sampling: Mixture = "uniform",
        reference: Mixture = "uniform",
        proxy_frac: float = 1.0,
    ):
        """Take the options.

        Args:
            learning_rate: η of the proxy.
            floor: c of the proxy.
            sampling: mixture that the proxy's batches are drawn by.
            reference: mixture w_ref that the reference model is trained under.
            proxy_frac: steps of each preparatory run over those of the target's.

        Raises:
            ConfigError: an option out of range.
        """
        super().__init__(proxy_frac)
        DoremiProxy(learning_rate, floor, sampling)  # refuse now, not after the reference run
        self.reference = reference
        self._options = {"learning_rate": learning_rate, "floor": floor, "sampling": sampling}

    def preparation(self, info: RunInfo) -> Sequence[RunRequest]:
        """A reference model, and a proxy scored against it."""
        steps = self._steps(info)
        named = isinstance(self.reference, str) and self.reference in _BY_NAME
        return (
            RunRequest(
                name="reference",
                mixer=str(self.reference) if named else "static",
                options={} if named else {"weights": self.reference},
                steps=steps,
                keep_model=True,
            ),
            RunRequest(
                name="proxy", mixer="doremi-proxy", options=dict(self._options), reference="reference", steps=steps
            ),
        )
