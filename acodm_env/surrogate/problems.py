"""Random mixing problems: what users want, what they have, and how text answers, as arrays of any number of runs.

A surface here is drawn and not fitted: it has an objective (all domains, one, a few, or weights; losses or
perplexities; targets that are not trained on), domains from a twentieth of a uniform share to ten times it, domains
that teach nothing, and the effects that logged runs of language models show (docs/surrogate.md has the figures):

    L_m = c_m + A_m (x_m/x̄_m)^(−β_m) + overfit − κ_m ln(recent share / mean share) + fall·(1−t)^1.5
    x_m = Σ_j T_mj · fresh(n_j) + δ_m

n_j is the data drawn of domain j in uniform shares (see `acodm_env.view`), fresh() saturates beyond one pass with R*,
T is transfer, x̄ is x at uniform amounts, δ the start that gives ln V. Over-fitting rises with passes times a power of
the share; the recent share is a running mean over decisions: a domain that is starved loses at once, one that is
favoured gains little or nothing, as on text; the fall is the learning rate's at the end. `fresh`
and `losses` take numpy or torch, so that environments and the learner that differentiates through them run the same
lines.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from acodm_env.corpus.affinity import OWN, standardised
from acodm_env.errors import ConfigError
from acodm_env.objective import LEAST, MOST
from acodm_env.step_stats import Array

INITIAL_NATS = 7.62
"""ln V of the vocabulary that the amounts are those of: 2,048 tokens."""
_EVEN = 0.01  # keeps the logarithm of the recent share finite


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Surfaces of B runs; arrays (B, K) unless said. Numpy or torch."""

    weights: Any
    """ω of every domain in the objective, summing to 1."""
    perplexity: Any
    """1 where perplexities are averaged (B, 1)."""
    trainable: Any
    """1 for a domain that can be trained on; 0 for a mere target, and for padding."""
    present: Any
    """1 for a domain, 0 for padding."""
    affinity: Any
    """Σ_m ω_m a_mj: what counts of token pairs would say of how near it lies to the targets (`corpus.affinity`)."""
    leverage: Any
    """What counts of token pairs would say of −∂L/∂ln(share) of each domain's own text, nats; 0 for a mere target."""
    measured: Any
    """1 where held-out losses are shown; else training losses."""
    sizes: Any
    """Data of each domain in uniform shares."""
    transfer: Any
    """T (B, K, K): what a token of domain j counts for target m."""
    exponents: Any
    """β."""
    gains: Any
    """A, nats: what uniform amounts leave above the floor."""
    floors: Any
    """c, nats."""
    start: Any
    """δ, uniform shares."""
    even: Any
    """x̄, uniform shares."""
    repetition: Any
    """R* in passes (B, 1)."""
    overfit: Any
    """Nats at `overfit_passes` passes and a share of .7."""
    overfit_passes: Any
    """(B, 1)."""
    overfit_power: Any
    """Power of the share of the run's data in it (B, 1)."""
    recency: Any
    """κ, nats per e-fold of the recent share under the mean share."""
    favour: Any
    """Share of κ that a recent share above the mean share gives (B, 1)."""
    memory: Any
    """Share of the recent share that a whole run's twentieth renews (B, 1)."""
    fall: Any
    """Nats that the end of the learning rate's schedule gives (B, 1)."""
    noise: Any
    """Standard deviation of what is shown, nats: of a run, and half of it of every decision."""

    @property
    def batch(self) -> int:
        """B."""
        return int(self.weights.shape[0])

    def tensors(self) -> Self:
        """The same as float32 tensors."""
        import torch

        return type(self)(
            **{f.name: torch.as_tensor(np.asarray(getattr(self, f.name), dtype=np.float32)) for f in fields(self)}
        )

    def rows(self, index: Any) -> Self:
        """Some of the runs."""
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def fresh(drawn: Any, problems: Problems, xp: Any) -> Any:
    """What `drawn` (B, K) is worth in data never seen: all of the first pass, then ever less."""
    sizes = xp.clip(problems.sizes, 1e-6, None)
    beyond = xp.clip(drawn / sizes - 1, 0, None)
    return xp.minimum(drawn, sizes) - sizes * problems.repetition * xp.expm1(-beyond / problems.repetition)


def losses(problems: Problems, drawn: Any, recent: Any, progress: Any, xp: Any) -> tuple[Any, Any]:
    """Held-out and training losses (B, K) in nats.

    Args:
        problems: the surfaces.
        drawn: (B, K) data so far, in uniform shares.
        recent: (B, K) running mean of the mixture.
        progress: share of the run done: a number, or (B, 1) above 0.
        xp: numpy or torch.
    """
    choices = problems.trainable.sum(-1)[:, None]
    worth = (problems.transfer @ fresh(drawn, problems, xp)[..., None])[..., 0] + problems.start
    law = problems.floors + problems.gains * (worth / problems.even) ** (-problems.exponents)
    passes = drawn / xp.clip(problems.sizes, 1e-6, None)
    share = (drawn + 1e-6) / choices / 0.7
    over = problems.overfit * (passes / problems.overfit_passes) * share**problems.overfit_power
    over = xp.clip(over, None, 2.5) * problems.trainable
    average = recent if isinstance(progress, int | float) and progress <= 0 else drawn / (choices * progress)
    lately = xp.log((recent + _EVEN) / (average + _EVEN))
    lately = xp.clip(lately, None, 0) + problems.favour * xp.clip(lately, 0, None)
    seen = law - problems.recency * lately * problems.trainable + problems.fall * (1 - progress) ** 1.5
    highest = INITIAL_NATS + 1
    return xp.clip(seen + over, None, highest), xp.clip(seen - over, None, highest)


RANGES = (
    *("exponents", "slopes", "sizes", "repetition", "overfit", "overfit_passes", "overfit_power"),
    *("recency", "favour", "memory", "fall", "blur", "counted", "noise"),
)
"""Settings of `ProblemFamily` that are (smallest, largest)."""
PARTS = ("transfer", "background", "ample", "junk", "counted_spread", "perplexity", "untrained", "excluded")
"""Settings between 0 and 1."""


@dataclass(frozen=True, kw_only=True)
class ProblemFamily:
    """How problems are drawn. Ranges are uniform unless said; what is measured of them is in docs/surrogate.md."""

    num_domains: tuple[int, int] = (3, 24)
    """Fewest and most domains, ≥ 2."""
    decisions: tuple[int, int] = (10, 40)
    """Fewest and most decisions of a run."""
    transfer: float = 0.35
    """Largest T between two like domains."""
    background: float = 0.12
    """Largest T between any two: uniform up to a part of it that each target has of its own."""
    exponents: tuple[float, float] = (0.15, 0.7)
    """β."""
    slopes: tuple[float, float] = (0.08, 0.8)
    """A·β at uniform amounts: nats per e-fold of data."""
    sizes: tuple[float, float] = (0.02, 10.0)
    """Uniform shares, log-uniform, for those that are not ample."""
    ample: float = 0.5
    """Probability that a domain has 2 to 10 uniform shares."""
    junk: float = 0.15
    """Probability that a domain teaches next to nothing."""
    repetition: tuple[float, float] = (6.0, 25.0)
    """R* in passes."""
    overfit: tuple[float, float] = (0.0, 1.2)
    """Nats at `overfit_passes` passes and a share of .7, of each domain: near-copies over-fit little."""
    overfit_passes: tuple[float, float] = (18.0, 45.0)
    overfit_power: tuple[float, float] = (1.0, 2.0)
    """Power of the share of the run's data in it."""
    recency: tuple[float, float] = (0.02, 0.25)
    """κ, nats per e-fold of the recent share."""
    favour: tuple[float, float] = (-0.3, 0.1)
    """Share of κ that more than the mean share gives; blocks cost on text, early or late."""
    memory: tuple[float, float] = (0.15, 0.45)
    """Renewal of the recent share in a twentieth of the run."""
    fall: tuple[float, float] = (0.0, 0.5)
    """Nats by the learning rate's fall."""
    blur: tuple[float, float] = (0.3, 1.5)
    """Noise of the affinities, in standard deviations of ln T over domains."""
    counted: tuple[float, float] = (0.4, 0.7)
    """What counts of pairs say of a domain's leverage, as a share of what it is: of all domains of a run alike."""
    counted_spread: float = 0.2
    """Standard deviation of its logarithm over the domains of a run."""
    noise: tuple[float, float] = (0.1, 0.8)
    """Standard deviation of one sequence's loss, nats."""
    probe_sequences: int = 28
    """Held-out sequences of one measurement (`objective.probe_counts`)."""
    objectives: tuple[float, float, float, float] = (0.3, 0.25, 0.2, 0.25)
    """Probabilities of the objectives: all alike, one domain, a few, Dirichlet weights."""
    perplexity: float = 0.5
    """Probability that perplexities are averaged."""
    untrained: float = 0.3
    """Probability that the one target, or the heaviest of a few, is not trained on."""
    excluded: float = 0.05
    """Probability that some other domain cannot be trained on."""

    def __post_init__(self) -> None:
        for name in ("num_domains", "decisions"):
            object.__setattr__(self, name, tuple(int(x) for x in getattr(self, name)))
        low, high = self.num_domains
        if not 2 <= low <= high:
            raise ConfigError(f"num_domains={self.num_domains}: must be (fewest, most) with 2 ≤ fewest ≤ most")
        if not 2 <= self.decisions[0] <= self.decisions[1]:
            raise ConfigError(f"decisions={self.decisions}: must be (fewest, most) with 2 ≤ fewest ≤ most")
        for name in RANGES:
            pair = tuple(float(x) for x in getattr(self, name))
            object.__setattr__(self, name, pair)
            least = -math.inf if name == "favour" else 0.0
            if len(pair) != 2 or not (least <= pair[0] <= pair[1] < math.inf):
                raise ConfigError(f"{name}={pair}: must be (smallest, largest), finite, 0 or more")
        for name in PARTS:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be between 0 and 1")
        object.__setattr__(self, "objectives", tuple(float(x) for x in self.objectives))
        if len(self.objectives) != 4 or min(self.objectives) < 0 or sum(self.objectives) <= 0:
            raise ConfigError(f"objectives={self.objectives}: must be four probabilities: all, one, a few, Dirichlet")

    def draw(self, rng: np.random.Generator, batch: int, num_domains: int | None = None) -> Problems:
        """Surfaces of `batch` runs.

        Args:
            rng: draws them.
            batch: B.
            num_domains: K of all of them; None: each its own, padded to the largest allowed.
        """
        width = self.num_domains[1] if num_domains is None else num_domains
        counts = np.full(batch, width)
        if num_domains is None:
            counts = rng.integers(self.num_domains[0], self.num_domains[1] + 1, batch)
        present = (np.arange(width) < counts[:, None]).astype(np.float64)
        weights, perplexity, trainable = self._objectives(rng, present)
        law = self._law(rng, present, trainable)

        def between(name: str, *shape: int) -> Array:
            low, high = getattr(self, name)
            drawn: Array = rng.uniform(low, high, (batch, *shape))
            return drawn

        recency = between("recency", width) * rng.uniform(0.3, 1.0, (batch, 1))
        wanted = weights > 0
        few = wanted.sum(-1, keepdims=True) * LEAST > self.probe_sequences  # as `objective.probe_counts` has it
        measured = wanted & ~(few & (trainable > 0))
        each = self.probe_sequences // np.maximum(measured.sum(-1, keepdims=True), 1)
        each = np.clip(each, max(1, min(LEAST, self.probe_sequences)), MOST)
        sequences = np.where(measured, each, TRAINING_SEQUENCES)
        return Problems(
            weights=weights,
            perplexity=perplexity,
            trainable=trainable,
            present=present,
            measured=measured.astype(np.float64),
            repetition=between("repetition", 1),
            overfit=between("overfit", width),
            overfit_passes=between("overfit_passes", 1),
            overfit_power=between("overfit_power", 1),
            recency=recency,
            favour=between("favour", 1),
            memory=between("memory", 1),
            fall=between("fall", 1),
            noise=between("noise", 1) / np.sqrt(sequences),
            affinity=self._affinity(rng, law["transfer"], weights, trainable, present),
            leverage=self._leverage(rng, law, trainable),
            **law,
        )

    def _affinity(
        self, rng: np.random.Generator, transfer: Array, weights: Array, trainable: Array, present: Array
    ) -> Array:
        """(B, K) as text would show it: ln T, blurred, against the other domains."""
        batch, width = weights.shape
        usable = trainable[:, None, :] > 0
        closeness = np.log(np.maximum(transfer, 1e-4))
        own = np.broadcast_to(np.eye(width, dtype=bool), closeness.shape)
        hidden = own | ~usable  # neither itself nor what cannot be trained on
        exact = standardised(closeness, hidden, 1e-3)
        blur = rng.uniform(*self.blur, (batch, 1, 1))
        blurred = standardised(exact + blur * rng.standard_normal(exact.shape), hidden, 1e-3)
        blurred = np.where(own & usable, OWN, blurred) * usable
        shown: Array = np.einsum("bm,bmj->bj", weights, blurred) * present
        return shown

    def _leverage(self, rng: np.random.Generator, law: dict[str, Array], trainable: Array) -> Array:
        """(B, K) as text would show it: the slope at uniform amounts, smaller by a factor of the run, blurred."""
        batch, width = trainable.shape
        slopes = law["gains"] * law["exponents"] / law["even"]
        blur = np.exp(self.counted_spread * rng.standard_normal((batch, width)))
        shown: Array = slopes * rng.uniform(*self.counted, (batch, 1)) * blur * trainable
        return shown

    def _law(self, rng: np.random.Generator, present: Array, trainable: Array) -> dict[str, Array]:
        batch, width = present.shape

        def uniform(low: float, high: float, *shape: int) -> Array:
            drawn: Array = rng.uniform(low, high, (batch, *shape))
            return drawn

        sizes = np.exp(uniform(math.log(self.sizes[0]), math.log(self.sizes[1]), width))
        sizes = np.where(uniform(0, 1, width) < self.ample, uniform(2.0, 10.0, width), sizes)
        places = rng.standard_normal((batch, width, 3))  # kinds of text
        apart = ((places[:, :, None] - places[:, None]) ** 2).sum(-1)
        common = self.background * uniform(0, 1, width, 1) * uniform(0, 1, width, width)  # some learn from all text
        transfer = uniform(0, self.transfer, 1, 1) * np.exp(-apart / 2) + common
        transfer[:, np.arange(width), np.arange(width)] = 1.0
        exponents = uniform(*self.exponents, width)
        slopes = np.where(uniform(0, 1, width) < self.junk, uniform(0.0, 0.08, width), uniform(*self.slopes, width))
        ends = uniform(1.3, 5.6, 1) * 0.6 + uniform(1.3, 5.6, width) * 0.4 + uniform(-0.6, 0.6, width)
        even = transfer @ present[..., None]
        even = even[..., 0]
        gains = np.minimum(slopes / exponents * even, np.maximum(ends - 0.2, 0.05))
        floors = ends - gains
        steep = np.maximum((INITIAL_NATS - floors) / np.maximum(gains, 1e-3), 1.0) ** (-1 / exponents)
        return {
            "sizes": np.where(trainable > 0, sizes, 0.0),
            "transfer": transfer * trainable[:, None, :],
            "exponents": exponents,
            "gains": gains,
            "floors": floors,
            "start": np.clip(even * steep, 1e-6, 0.5),
            "even": even,
        }

    def _objectives(self, rng: np.random.Generator, present: Array) -> tuple[Array, Array, Array]:
        """Weights, metric and what can be trained on."""
        batch, width = present.shape
        counts = present.sum(-1).astype(int)
        kinds: Any = rng.choice(4, size=batch, p=np.array(self.objectives) / sum(self.objectives))
        order = np.argsort(np.where(present > 0, rng.random((batch, width)), 2.0), axis=-1)
        rank = np.argsort(order, axis=-1)  # (B, K), a random order of the domains present
        few = 2 + (rng.random(batch) * np.maximum(counts - 2, 0)).astype(int)  # 2 … K−1
        few = np.minimum(few, np.maximum(counts - 1, 1))
        number = np.select([kinds == 0, kinds == 1, kinds == 2], [counts, np.ones(batch, int), few], counts)
        weights = (rank < number[:, None]).astype(np.float64) * present
        dirichlet = rng.gamma(0.5, size=(batch, width)) * present + 1e-9 * present
        uneven = (kinds == 3) | ((kinds == 2) & (rng.random(batch) < 0.5))
        weights = np.where(uneven[:, None], weights * dirichlet, weights)
        weights = weights / weights.sum(-1, keepdims=True)
        trainable = present.copy()
        narrow = (kinds == 1) | (kinds == 2)
        out = narrow & (rng.random(batch) < self.untrained) & (counts > 2)
        trainable[out, np.argmax(weights, -1)[out]] = 0.0
        also = ~out & (rng.random(batch) < self.excluded) & (counts > 2)
        trainable[also, (order[np.arange(batch), counts - 1])[also]] = 0.0
        perplexity = (rng.random((batch, 1)) < self.perplexity).astype(np.float64)
        return weights, perplexity, trainable


TRAINING_SEQUENCES = 16
"""Sequences behind a training loss that is shown: what a domain contributes to a window, more or less."""
