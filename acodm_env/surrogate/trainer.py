"""`SurrogateTrainer`: any number of pre-training runs on a response surface, stepped as array operations.

Without a batch it is a `Trainer` like the language model's, in float64, so every mixer and policy runs on it. With
`batch=(N,)` every array has N rows and `info` describes one of them; the runs are independent but end together.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from acodm_env.errors import ConfigError
from acodm_env.mixture import check_weights
from acodm_env.step_stats import Array, StepStats
from acodm_env.surrogate.dynamics import Parameters, learn, losses, slopes
from acodm_env.surrogate.surface import Surface
from acodm_env.trainer import RunInfo


class Source(Protocol):
    """Where surfaces come from: a `Surface` (always itself) or a `Family` (a new one every run)."""

    @property
    def max_domains(self) -> int:
        """K of the arrays; a surface with fewer domains is padded."""

    @property
    def max_targets(self) -> int:
        """M of the arrays, likewise."""

    def draw(self, rng: np.random.Generator) -> Surface:
        """The surface of the next run."""


@dataclass(frozen=True)
class SlopeSums:
    """Gradient-like statistics: sums (…, K, M) of the domains' slopes, one vector per sequence drawn."""

    sums: Array
    counts: Array
    """(…, K) sequences drawn."""

    def __add__(self, other: "SlopeSums") -> "SlopeSums":
        return SlopeSums(self.sums + other.sums, self.counts + other.counts)

    def gram(self) -> tuple[Array, Array]:
        """Gram matrix (…, K, K) of the mean slopes; noise power (…, K), zero."""
        means = self.sums / np.maximum(self.counts, 1e-12)[..., None]
        return means @ np.swapaxes(means, -1, -2), np.zeros_like(self.counts)


class SurrogateTrainer:
    """Runs on a surface or on a family of them; implements `Trainer`."""

    def __init__(
        self,
        source: Source | Sequence[Surface],
        *,
        horizon: int = 40,
        decision_every: int = 1,
        batch: tuple[int, ...] = (),
        noise: float = 1.0,
        reference: Array | None = None,
        dtype: DTypeLike = np.float64,
    ):
        """Prepare runs; the first `reset` draws them.

        Args:
            source: a `Surface`; a `Family` that draws a new one for every run; or a list, one per run of the batch.
            horizon: steps of a whole run; one step is 1/horizon of it.
            decision_every: steps between two decisions of an agent or policy.
            batch: shape of the batch of runs; () is a single run without a batch dimension.
            noise: factor on the surface's observation noise; 0 switches it off.
            reference: (K,) losses of a reference model in nats, for `StepStats.excess_losses`.
            dtype: of all arrays.

        Raises:
            ConfigError: a number is out of range.
        """
        for name, value, least in (("episode_steps", horizon, 1), ("steps_per_action", decision_every, 1)):
            if value < least:
                raise ConfigError(f"{name}={value}: must be at least {least}")
        if not (np.isfinite(noise) and noise >= 0):
            raise ConfigError(f"noise={noise}: must be a finite factor, 0 or more")
        self.source, self.batch, self.noise, self.reference = source, batch, noise, reference
        self.provides = frozenset({"losses", "gram", "validation", "loss_weights"})
        self.probe_sequences: int | None = None
        if reference is not None:
            self.provides |= {"excess"}
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.measure: frozenset[str] = frozenset()
        self.surfaces: list[Surface] = []
        self.steps_done = 0
        self._settings = {"horizon": horizon, "decision_every": decision_every}
        self._place(self._draw(np.random.default_rng(0)))

    @property
    def varies(self) -> bool:
        """Whether the surface, and with it the padding, changes between runs."""
        return not isinstance(self.source, Surface)

    def reset(self, rng: np.random.Generator) -> None:
        """Start new runs: surfaces drawn from the source, nothing learned."""
        self._rng = rng
        if self.varies:
            self._place(self._draw(rng))
        self._restart()

    def _restart(self) -> None:
        self.steps_done = 0
        shape = (*self.batch, self.info.num_domains)
        self._memory = np.zeros(shape, dtype=self.dtype)
        self._epochs = np.zeros(shape, dtype=self.dtype)
        self._drawn = np.zeros(shape, dtype=self.dtype)

    def again(self) -> "SurrogateTrainer":
        """New runs on the same surfaces, without noise."""
        other = copy(self)
        other._noise = np.zeros_like(self._noise)
        other.noise, other.measure = 0.0, frozenset()
        other._restart()
        return other

    def _draw(self, rng: np.random.Generator) -> list[Surface]:
        if isinstance(self.source, Surface):
            return [self.source]
        if isinstance(self.source, Sequence):
            return list(self.source)
        return [self.source.draw(rng) for _ in range(int(np.prod(self.batch, dtype=int)))]

    def _place(self, surfaces: list[Surface]) -> None:
        """Make these the surfaces of the runs: one for all of them, or one each."""
        self.surfaces = surfaces
        first, shared = surfaces[0], len(surfaces) == 1
        sources = self.source if isinstance(self.source, Sequence) else [self.source]
        num_domains = max(source.max_domains for source in sources)
        num_targets = max(source.max_targets for source in sources)
        stacked = [_padded(surface, num_targets, num_domains) for surface in surfaces]

        def arrange(rows: Sequence[Array]) -> Array:
            array = rows[0] if shared else np.stack(rows).reshape(*self.batch, *rows[0].shape)
            return array.astype(self.dtype)

        self.law = Parameters(
            **{name.name: arrange([getattr(law, name.name) for law, *_ in stacked]) for name in fields(Parameters)}
        )
        self._stand_ins = arrange([stand_ins for _, stand_ins, *_ in stacked])
        self.target_weights = arrange([weights for *_, weights, _ in stacked])
        """(…, M) weights of the targets in the objective."""
        self.perplexity: bool | Array = False
        """Whether the objective averages perplexities: a fitted surface's never does."""
        mask = arrange([mask for *_, mask in stacked])
        self.mask: Array = np.broadcast_to(mask, (*self.batch, num_domains))
        """(…, K) 1 for a domain, 0 for padding."""
        self._padded = bool((mask == 0).any())
        self.length = arrange([np.array([surface.length]) for surface in surfaces])  # (…, 1)
        self._noise = arrange([np.array([self.noise * surface.noise_nats]) for surface in surfaces])  # (…, 1)
        self.info = self._describe(first, num_domains, num_targets)
        self.problem = self._problem(mask)
        """What the runs differ in, for `Observer.start`; sizes are fractions of the run."""

    def _problem(self, mask: Array) -> dict[str, Array]:
        rows = self.info.rows
        weights = np.zeros((*self.target_weights.shape[:-1], len(rows)), dtype=self.dtype)
        weights[..., [rows.index(name) for name in self.info.targets]] = self.target_weights
        sizes = np.zeros_like(weights)
        sizes[..., : self.info.num_domains] = np.where(mask > 0, self.law.sizes / self.length, 0.0)
        return {"weights": weights, "sizes": sizes}

    def _describe(self, surface: Surface, num_domains: int, num_targets: int) -> RunInfo:
        padding = num_domains - len(surface.domains)
        names = tuple(f"padding{index}" for index in range(padding))
        more = tuple(f"padding{index}" for index in range(num_targets - len(surface.targets)))
        tokens = surface.run_tokens * surface.length / self._settings["horizon"]
        weights = surface.objective_weights
        return RunInfo(
            domains=surface.domains + names,
            targets=surface.targets + more,
            sizes_tokens=tuple(int(size) for size in surface.sizes_tokens) + (1,) * padding,
            batch_size=max(1, round(tokens / surface.sequence_length)),
            sequence_length=surface.sequence_length,
            initial_loss_nats=surface.initial_loss_nats,
            objective=tuple(float(weight) for weight in weights) + (0.0,) * len(more),
            padding=padding,
            gradients="slopes of the fitted law",
            horizon=self._settings["horizon"],
            decision_every=self._settings["decision_every"],
        )

    def step(self, weights: Array, loss_weights: Array | None = None) -> StepStats:
        """One step, 1/horizon of the run, under `weights` (…, K). Composition is exact: nothing is rounded."""
        weights = np.asarray(weights, dtype=self.dtype)
        if not self.batch:
            weights = check_weights(weights, self.info.num_domains)
        if self._padded:
            weights = weights * self.mask
            weights = weights / weights.sum(-1, keepdims=True)
        effective = weights
        if loss_weights is not None:
            effective = weights * np.asarray(loss_weights, dtype=self.dtype)
            effective = effective / effective.sum(-1, keepdims=True)
        before = self.training_losses() if self.measure & {"losses", "excess"} else None
        counts = weights * self.dtype.type(self.info.batch_size)
        self._memory, self._epochs = learn(self.law, self._memory, self._epochs, effective, self._time(1), np)
        self.steps_done += 1
        self._drawn = self._drawn + counts
        sums = self._slopes(counts) if "gram" in self.measure else None
        noisy = None if before is None else self._observed(before, counts)
        tokens = self.info.batch_size * self.info.sequence_length
        return StepStats(
            step=self.steps_done,
            tokens=self.steps_done * tokens,
            requested=weights,
            realised=weights,
            counts=counts,
            loss_tokens=counts * self.dtype.type(self.info.sequence_length),
            losses=np.full_like(weights, np.nan) if noisy is None else noisy,
            epochs=self._epochs,
            drawn=self._drawn,
            gradients=sums,
            excess_losses=self._excess(noisy),
            loss_weights=loss_weights,
            loss=float("nan") if noisy is None or self.batch else float(np.nansum(weights * noisy)),
        )

    def _time(self, steps: int) -> Array:
        """(…, 1) duration of so many steps, in units of the fitted runs."""
        return self.length * (steps / self.info.horizon)

    def training_losses(self) -> Array:
        """(…, K) training losses that a step would show now, without noise; nats."""
        held_out = losses(self.law, self._memory, self._time(self.steps_done), np)
        if self._stand_ins.ndim == 2:
            trained: Array = held_out @ self._stand_ins.T
        else:
            trained = (self._stand_ins @ held_out[..., None])[..., 0]
        return trained

    def _observed(self, expected: Array, counts: Array) -> Array:
        """(…, K) mean losses of the sequences drawn: noise falls with their number; NaN where none was drawn."""
        noisy = expected
        if self.noise > 0:
            draw = self._rng.standard_normal(expected.shape, dtype=self.dtype)
            noisy = expected + draw * (self._noise / np.sqrt(np.maximum(counts, 1.0)))
        observed: Array = np.where(counts > 0, noisy, np.nan)
        return observed

    def _slopes(self, counts: Array) -> SlopeSums:
        """Slopes at the end of the step, times t: nats per e-fold of data.

        An untrained model's slopes are some 10⁵ times as steep as a trained one's and all of them fall as 1/t, which no
        gradient norm of a language model does; a running scale over them would see nothing but the first step.
        """
        time = self._time(self.steps_done)
        steep = slopes(self.law, self._memory, time, np) * (time * np.sqrt(self.target_weights))[..., None]
        return SlopeSums(np.swapaxes(steep, -1, -2) * counts[..., None], counts)

    def _excess(self, observed: Array | None) -> Array | None:
        if "excess" not in self.measure or observed is None or self.reference is None:
            return None
        return np.maximum(observed - self.reference, 0.0)

    def evaluate(self, split: str, sequences: int | None = None) -> Array:
        """Held-out losses (…, M) in nats; they are the surface's, without noise, on every split.

        With `sequences`, NaN for a target of which none is left (`objective.probe_counts`).
        """
        held_out: Array = losses(self.law, self._memory, self._time(self.steps_done), np)
        if sequences is None:
            return held_out
        return np.where(np.array(self.info.probe_counts(sequences)) > 0, held_out, np.nan)

    def static_losses(self) -> Array:
        """Held-out losses (…, M) at the end of a run under the uniform mixture."""
        runs, uniform = self.again(), self.mask / self.mask.sum(-1, keepdims=True)
        for _ in range(self.info.horizon):
            runs.step(uniform)
        return runs.evaluate("validation")

    def state_dict(self) -> dict[str, Any]:
        """Memory, epochs and generator. The surfaces are those of the last `reset`, from the same generator."""
        return {
            "steps_done": self.steps_done,
            "memory": self._memory,
            "epochs": self._epochs,
            "drawn": self._drawn,
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value, after a `reset` with the same generator."""
        self.steps_done = int(state["steps_done"])
        self._memory, self._epochs, self._drawn = (
            np.array(state[name], dtype=self.dtype) for name in ("memory", "epochs", "drawn")
        )
        rng = np.random.Generator(np.random.PCG64())
        rng.bit_generator.state = state["rng"]
        self._rng = rng


def _padded(surface: Surface, num_targets: int, num_domains: int) -> tuple[Parameters, Array, Array, Array]:
    """Parameters, stand-ins (K, M), target weights (M,) and mask (K,), padded to the given numbers.

    A domain of padding helps nobody and is never drawn; a target of padding has no weight.
    """
    law = surface.parameters()
    domains, targets = num_domains - len(surface.domains), num_targets - len(surface.targets)

    def pad(array: Array, *missing: int, value: float = 0.0) -> Array:
        padded: Array = np.pad(array, [(0, number) for number in missing], constant_values=value)
        return padded

    parameters = replace(
        law,
        helps=pad(law.helps, targets, domains),
        scales=pad(law.scales, targets),
        powers=pad(law.powers, targets),
        floors=pad(law.floors, targets),
        start=pad(law.start, targets, value=1.0),
        forgetting=pad(law.forgetting, domains),
        sizes=pad(law.sizes, domains, value=1.0),
    )
    mask = pad(np.ones(len(surface.domains)), domains)
    return parameters, pad(surface.stand_ins, domains, targets), pad(surface.objective_weights, targets), mask
