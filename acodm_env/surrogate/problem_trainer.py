"""`ProblemTrainer`: any number of runs on random mixing problems, stepped as array operations; implements `Trainer`.

Every reset draws new problems (`acodm_env.surrogate.problems`). Under the same mixtures the losses are those of the
learner that differentiates through them (`acodm_env.agents.apg.play`), and so is what a policy sees.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from acodm_env.errors import ConfigError
from acodm_env.mixture import check_weights
from acodm_env.step_stats import Array, StepStats
from acodm_env.surrogate.problems import INITIAL_NATS, ProblemFamily, Problems, losses
from acodm_env.trainer import RunInfo

BATCH_SIZE, SEQUENCE_LENGTH = 16, 128
"""Sequences of a step and tokens of a sequence: what amounts are counted in; the surface knows fractions only."""
_TWENTIETHS = 20  # `Problems.memory` is the renewal in so much of a run


class ProblemTrainer:
    """Runs on problems that a family draws, or on given ones."""

    def __init__(
        self,
        source: ProblemFamily | Problems,
        *,
        horizon: int = 20,
        decision_every: int = 1,
        batch: tuple[int, ...] = (),
        noise: float = 1.0,
        copies: int = 1,
        dtype: DTypeLike = np.float64,
    ):
        """Prepare runs; the first `reset` draws them.

        Args:
            source: a family, or problems (numpy) of as many runs as the batch has.
            horizon: steps of a whole run; one step is 1/horizon of it.
            decision_every: steps between two decisions of an agent or policy.
            batch: () is a single run without a batch dimension, (N,) are N runs that go in step.
            noise: factor on the noise of what is shown; 0 switches it off.
            copies: runs of the batch that share a problem, one after the other; they divide N.
            dtype: of all arrays.

        Raises:
            ConfigError: a number is out of range.
        """
        for name, value in (("episode_steps", horizon), ("steps_per_action", decision_every), ("copies", copies)):
            if value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        if not (np.isfinite(noise) and noise >= 0):
            raise ConfigError(f"noise={noise}: must be a finite factor, 0 or more")
        self._runs = int(np.prod(batch, dtype=int))
        if self._runs % copies:
            raise ConfigError(f"copies={copies}: must divide the {self._runs} runs")
        self.source, self.batch, self.noise, self.copies = source, batch, noise, copies
        self.provides = frozenset({"losses", "validation"})
        self.measure: frozenset[str] = frozenset()
        self.probe_sequences = source.probe_sequences if isinstance(source, ProblemFamily) else 0
        """Held-out sequences of a policy's measurement; how noisy it is, the problem says."""
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._settings = {"horizon": horizon, "decision_every": decision_every}
        self.reset(np.random.default_rng(0))

    @property
    def varies(self) -> bool:
        """Whether the problem changes between runs."""
        return isinstance(self.source, ProblemFamily)

    @property
    def padded(self) -> bool:
        """Whether some run may have fewer domains than the arrays."""
        if isinstance(self.source, ProblemFamily):
            return self.source.num_domains[0] < self.source.num_domains[1]
        return bool((self.problems.present == 0).any())

    def reset(self, rng: np.random.Generator) -> None:
        """Start new runs: problems drawn from the family, nothing learned."""
        self._rng = rng
        problems = self.source
        if isinstance(problems, ProblemFamily):
            problems = problems.draw(rng, self._runs // self.copies)
        if self.copies > 1:
            problems = problems.rows(np.repeat(np.arange(problems.batch), self.copies))
        if problems.batch != self._runs:
            raise ConfigError(f"batch={self.batch}: must have the {problems.batch} runs of the problems")
        self._place(problems)
        self._restart()

    def _place(self, problems: Problems) -> None:
        arrays = {one.name: np.asarray(getattr(problems, one.name), dtype=self.dtype) for one in fields(problems)}
        self.problems = Problems(**arrays)
        """(B, …) surfaces of the runs; B is 1 without a batch dimension."""
        self._choices = self.problems.trainable.sum(-1, keepdims=True)  # (B, 1)
        self._even = self.problems.trainable / self._choices
        shape = self._even.shape
        self._offset = self.dtype.type(self.noise) * self.problems.noise * self._normal(shape)
        self.mask: Array = self._given(self.problems.present)
        """(…, K) 1 for a domain, 0 for padding."""
        self.target_weights: Array = self._given(self.problems.weights)
        """(…, K) weights of the targets in the objective; every domain is one."""
        self.perplexity: Array = self._given(self.problems.perplexity)
        """(…, 1) 1 where the objective averages perplexities."""
        self.problem: dict[str, Array] = {
            "weights": self.target_weights,
            "perplexity": self.perplexity,
            "sizes": self._given(self.problems.sizes / self._choices),
            "trainable": self._given(self.problems.trainable),
            "affinity": self._given(self.problems.affinity),
            "leverage": self._given(self.problems.leverage),
        }
        """What the runs differ in, for `Observer.start`; sizes are fractions of the run."""
        self.info = self._describe()

    def _describe(self) -> RunInfo:
        """Of the first run."""
        width = self.problems.weights.shape[1]
        names = tuple(f"domain{index}" for index in range(width))
        run_tokens = self._settings["horizon"] * BATCH_SIZE * SEQUENCE_LENGTH
        sizes = self.problems.sizes[0] / self._choices[0] * run_tokens
        return RunInfo(
            domains=names,
            targets=names,
            sizes_tokens=tuple(max(1, round(float(size))) for size in sizes),
            batch_size=BATCH_SIZE,
            sequence_length=SEQUENCE_LENGTH,
            initial_loss_nats=INITIAL_NATS,
            objective=tuple(self.problems.weights[0].astype(float).tolist()),
            metric="perplexity" if self.problems.perplexity[0, 0] > 0.5 else "loss",
            padding=width - int(self.problems.present[0].sum()),
            horizon=self._settings["horizon"],
            decision_every=self._settings["decision_every"],
        )

    def _restart(self) -> None:
        self.steps_done = 0
        self._recent, self._drawn = self._even, np.zeros_like(self._even)  # (B, K); a running mean, share of the run
        self._held_out = np.full_like(self._even, INITIAL_NATS)
        self._trained = self._held_out

    def again(self) -> "ProblemTrainer":
        """New runs on the same problems, without noise."""
        other = copy(self)
        other.noise, other.measure, other._offset = 0.0, frozenset(), np.zeros_like(self._offset)
        other._restart()
        return other

    def step(self, weights: Array, loss_weights: Array | None = None) -> StepStats:
        """One step, 1/horizon of the run, under `weights` (…, K); what cannot be trained on gets nothing."""
        if loss_weights is not None:
            raise ConfigError(f"loss_weights={loss_weights}: must be None; these surfaces know mixtures only")
        weights = np.asarray(weights, dtype=self.dtype)
        if not self.batch:
            weights = check_weights(weights, self.info.num_domains).astype(self.dtype)
        mixture = weights.reshape(self._even.shape) * self.problems.trainable  # (B, K)
        mixture = mixture / mixture.sum(-1, keepdims=True)
        renewal = 1 - (1 - self.problems.memory) ** (_TWENTIETHS / self.info.horizon)
        self._recent = self._recent + renewal * (mixture - self._recent)
        self._drawn = self._drawn + mixture / self.info.horizon
        self.steps_done += 1
        before = self._trained
        self._held_out, self._trained = self._losses()
        return self._stats(mixture, (before + self._trained) / 2)

    def _losses(self) -> tuple[Array, Array]:
        done = self.steps_done / self.info.horizon
        held_out, trained = losses(self.problems, self._drawn * self._choices, self._recent, done, np)
        return held_out, trained

    def _stats(self, mixture: Array, training: Array) -> StepStats:
        """What a step showed; of every step of a decision more noise, so that their mean has the problem's."""
        steps, info = self.steps_done, self.info
        spread = np.sqrt(min(info.decision_every, info.horizon))
        plain = self.problems.measured == 0  # of the others a measurement is shown: its noise is the gap's too
        observed = np.where(mixture > 0, training + self._error(spread) * plain, np.nan)
        passes = self._drawn * self._choices / np.maximum(self.problems.sizes, 1e-6)
        shown = self._given(mixture)
        return StepStats(
            step=steps,
            tokens=steps * info.batch_size * info.sequence_length,
            requested=shown,
            realised=shown,
            counts=shown * self.dtype.type(info.batch_size),
            loss_tokens=shown * self.dtype.type(info.batch_size * info.sequence_length),
            losses=self._given(observed),
            epochs=self._given(passes * self.problems.trainable),
            drawn=self._given(self._drawn * self.dtype.type(info.horizon * info.batch_size)),
            loss=float("nan") if self.batch else float(np.nansum(mixture * observed)),
        )

    def _error(self, spread: float = 1.0) -> Array | float:
        """(B, K) noise of what is shown: the run's own, and half of it anew, times `spread`."""
        if self.noise == 0:
            return 0.0
        scale = self.dtype.type(0.5 * self.noise * spread)
        error: Array = self._offset + scale * self.problems.noise * self._normal(self._offset.shape)
        return error

    def _normal(self, shape: tuple[int, ...]) -> Array:
        kind = np.float32 if self.dtype == np.float32 else np.float64
        return np.asarray(self._rng.standard_normal(shape, dtype=kind), dtype=self.dtype)

    def evaluate(self, split: str, sequences: int | None = None) -> Array:
        """Held-out losses (…, K) in nats, on every split.

        Args:
            split: its name.
            sequences: a policy's measurement: noisy, and NaN where the problem says that it measures nothing; how many
                sequences that are is the family's (`ProblemFamily.probe_sequences`). None: the surface's own.
        """
        if sequences is None:
            return self._given(self._held_out)
        return self._given(np.where(self.problems.measured > 0, self._held_out + self._error(), np.nan))

    def static_losses(self, mixture: Array | None = None) -> Array:
        """Held-out losses (…, K) at the end of a run under one mixture (…, K); default: uniform."""
        shares = self._even if mixture is None else np.asarray(mixture, dtype=self.dtype).reshape(self._even.shape)
        held_out, _ = losses(self.problems, shares * self._choices, shares, 1.0, np)
        return self._given(held_out)

    def _given(self, array: Array) -> Array:
        """(B, …) as the batch has it."""
        return array.reshape(*self.batch, array.shape[-1])

    _STATE = ("_recent", "_drawn", "_held_out", "_trained")

    def state_dict(self) -> dict[str, Any]:
        """What was drawn and generator. The problems are those of the last `reset`, from the same generator."""
        state = {name.lstrip("_"): getattr(self, name) for name in self._STATE}
        return state | {"steps_done": self.steps_done, "rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value, after a `reset` with the same generator."""
        self.steps_done = int(state["steps_done"])
        for name in self._STATE:
            setattr(self, name, np.array(state[name.lstrip("_")], dtype=self.dtype))
        rng = np.random.Generator(np.random.PCG64())
        rng.bit_generator.state = state["rng"]
        self._rng = rng
