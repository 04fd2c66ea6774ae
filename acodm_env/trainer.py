"""The two roles of the system and the loop between them.

Anything that trains for one step under a mixture is a `Trainer`; anything that proposes a mixture is a `Mixer`;
`drive` is the only loop::

    weights (K,) ─▶ Trainer.step ─▶ StepStats ─▶ Mixer.update ─▶ weights (K,) ─▶ …

The Gymnasium environment is a `Trainer` seen by an agent; a bandit or an exported policy drives one directly.
K is the number of training domains, M the number of held-out targets (usually the same ones).
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.objective import marginal, probe_counts, value
from acodm_env.step_stats import Array, StepStats
from acodm_env.view import Affinity


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a mixer may know about a run before its first step."""

    domains: tuple[str, ...]
    """Names of the K training domains, in the order of every (K,) array."""
    targets: tuple[str, ...]
    """Names of the M held-out sets of the objective; a target need not be a training domain."""
    sizes_tokens: tuple[int, ...]
    """Training tokens available per domain."""
    batch_size: int
    """Sequences per optimiser step."""
    sequence_length: int
    """Tokens per sequence."""
    horizon: int
    """Optimiser steps of the whole run."""
    decision_every: int = 1
    """Optimiser steps between two decisions of an agent or policy."""
    initial_loss_nats: float
    """Loss of a model that knows nothing, ln(vocabulary): a domain's loss before its first draw."""
    num_layers: int = 0
    """How many layer norms `StepStats.layer_norms` holds."""
    initial_layer_norms: tuple[float, ...] = ()
    """Those norms before the first step; known once the trainer was reset."""
    lag: int = 0
    """Optimiser steps by which a new mixture takes effect late."""
    gradients: str = ""
    """How gradients are measured: a policy that reads them fits only runs that measure them the same way."""
    corpus_fingerprint: str = ""
    """SHA-256 of the corpus, where there is one."""
    objective: tuple[float, ...] = ()
    """Weights (M,) of the held-out targets in the objective, summing to 1; empty: all equal."""
    metric: str = "loss"
    """What the objective averages: "loss", or "perplexity" (its logarithm), see `acodm_env.objective`."""
    affinity: Affinity | None = field(default=None, compare=False)
    """What counts of token pairs tell of domains and targets, where there is text."""
    flops_per_token: float = 0.0
    """Model FLOPs of training on one token, forward and backward; a third of it is the forward pass."""
    eval_tokens: int = 0
    """Tokens of one evaluation."""
    heldout_sequences: tuple[int, ...] = ()
    """Validation sequences (M,) of each target; empty: as many as anybody asks for."""
    padding: int = 0
    """How many of the last domains are padding, never drawn: a randomised surrogate's arrays keep their shape."""
    seed: int = 0

    @property
    def num_domains(self) -> int:
        """K."""
        return len(self.domains)

    @property
    def objective_weights(self) -> Array:
        """(M,) weights of the held-out targets, summing to 1."""
        return np.array(self.objective) if self.objective else np.full(len(self.targets), 1 / len(self.targets))

    @property
    def rows(self) -> tuple[str, ...]:
        """(R,) what a policy for any problem sees one row of each: the domains, then targets that are none of them."""
        return (*self.domains, *(name for name in self.targets if name not in self.domains))

    def judge(self, losses: Array) -> float:
        """The objective of held-out losses (M,), nats."""
        return float(value(np.asarray(losses), self.objective_weights, self.metric == "perplexity"))

    def probe_counts(self, sequences: int) -> tuple[int, ...]:
        """Sequences (M,) of each target in a measurement of so many in all, as far as there are so many."""
        trained = [name in self.domains for name in self.targets]
        counts = probe_counts(self.objective_weights.tolist(), trained, sequences)
        return tuple(map(min, counts, self.heldout_sequences)) if self.heldout_sequences else counts

    def marginal_values(self, losses: Array) -> Array:
        """∂objective/∂L (M,) at held-out losses (M,)."""
        values: Array = marginal(np.asarray(losses), self.objective_weights, self.metric == "perplexity")
        return values


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """A run that a method needs before the one that it is judged by: a reference model, a proxy, a probe."""

    name: str
    """Its name among the method's requests."""
    mixer: str
    """Name of the mixer that drives it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of that mixer: JSON values."""
    steps: int
    """Optimiser steps."""
    reference: str | None = None
    """Name of an earlier request whose final model scores the tokens (`StepStats.excess_losses`)."""
    keep_model: bool = False
    """Whether a later request refers to its final model."""
    evaluate_at: tuple[float, ...] = ()
    """Shares of the run, in (0, 1), after which held-out losses are wanted beside the last; each measurement is charged
    (`acodm_env.watching` makes them)."""

    def record(self) -> dict[str, Any]:
        """As JSON has it; what was not asked for is left out, so that equal requests keep their names."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("evaluate_at", ())}


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a preparatory run showed."""

    mixture: Array
    """(K,) time average of `StepStats.effective`."""
    initial_losses: Array
    """(M,) validation losses before the first step, nats."""
    final_losses: Array
    """(M,) validation losses after the last step, nats; NaN if the run diverged."""
    steps: Array | None = None
    """(n,) optimiser steps of `losses`: those of `RunRequest.evaluate_at`, then the last; None if none were wanted."""
    losses: Array | None = None
    """(n, M) validation losses after `steps`, nats."""


@runtime_checkable
class Trainer(Protocol):
    """Trains for one step under a mixture."""

    measure: frozenset[str]
    """What it does measure: set by whoever drives it to what somebody needs."""

    @property
    def info(self) -> RunInfo:
        """What is known of the run; a reset may add to it."""

    @property
    def provides(self) -> frozenset[str]:
        """What it can measure: of "losses", "gram", "layers", "validation", "loss_weights", "excess"."""

    @property
    def steps_done(self) -> int:
        """Optimiser steps done since `reset`."""

    def reset(self, rng: np.random.Generator) -> None:
        """Start a new run: fresh model, optimiser and data order, all drawn from `rng`."""

    def step(self, weights: Array, loss_weights: Array | None = None) -> StepStats:
        """Train one optimiser step on a batch composed by `weights` (K,)."""

    def evaluate(self, split: str, sequences: int | None = None) -> Array:
        """Mean held-out losses in nats (M,), on fixed sequences of "validation" or "test".

        With `sequences`, on so many in all (`objective.probe_counts`): NaN where none is left.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""


class Mixer(ABC):
    """Proposes a mixture. Subclasses override `weights`, and `update` where they learn from the run."""

    name: str = "mixer"
    paper: str = ""
    """Where the method comes from, such as "arXiv 2305.10429"."""
    needs: frozenset[str] = frozenset()
    """What it reads from a run: of `Trainer.provides`."""
    probe_sequences: int | None = None
    """Held-out sequences of one of its measurements (`objective.probe_counts`); None: as many as evaluations have."""
    dynamic: bool = True
    """Whether the mixture may change during a run; a benchmark replays the time average of those that do."""
    info: RunInfo

    def preparation(self, info: RunInfo) -> Sequence[RunRequest]:
        """Runs that must be made, and paid for, before one like `info` can start; none by default."""
        return ()

    def prepare(self, results: Mapping[str, RunResult]) -> None:  # noqa: B027
        """Take in the results of `preparation`'s requests, by name; called before `start`."""

    def due(self, step: int) -> bool:
        """Whether the held-out losses are wanted after optimiser step `step`, where `needs` has "validation"."""
        return step % self.info.decision_every == 0

    def start(self, info: RunInfo) -> None:
        """Begin a run; forget everything of an earlier one."""
        self.info = info

    @abstractmethod
    def weights(self) -> Array:
        """The mixture (K,) for the next step: non-negative, summing to 1."""

    def loss_weights(self) -> Array | None:
        """Per-domain weights (K,) of the loss, or None to leave it alone."""
        return None

    def update(self, stats: StepStats) -> None:  # noqa: B027 (a fixed mixture has nothing to learn)
        """Learn from the step just done."""

    def diagnostics(self) -> dict[str, float]:
        """Named numbers worth a place in the run's log, such as a bandit's share of exploration."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that `update` changed."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from `state_dict`'s value; call after `start`."""


def require(trainer: Trainer, needs: frozenset[str], who: str) -> None:
    """Refuse, before the first step, a `trainer` that cannot measure what `who` needs."""
    missing = sorted(needs - trainer.provides)
    if missing:
        raise ConfigError(
            f"{who}: needs {', '.join(missing)}; {type(trainer).__name__} provides only "
            f"{', '.join(sorted(trainer.provides)) or 'nothing'}; choose another mixer or trainer"
        )
    trainer.measure = frozenset(needs)


def drive(trainer: Trainer, mixer: Mixer, num_steps: int) -> Iterator[StepStats]:
    """Train for `num_steps` under `mixer`, yielding each step's statistics after the mixer has seen them.

    The caller resets the trainer and starts the mixer (or loads both), and logs, evaluates and saves between
    the steps. Ends early if the model diverges.

    Raises:
        ConfigError: the trainer does not provide what the mixer needs.
    """
    require(trainer, mixer.needs, f"mixer={mixer.name}")
    for _ in range(num_steps):
        stats = trainer.step(mixer.weights(), mixer.loss_weights())
        if "validation" in mixer.needs and not stats.diverged and mixer.due(stats.step):
            stats = with_validation(stats, trainer, mixer.probe_sequences)
        mixer.update(stats)
        yield stats
        if stats.diverged:
            return


def with_validation(stats: StepStats, trainer: Trainer, sequences: int | None = None) -> StepStats:
    """The step with the held-out losses after it, on so many sequences, and what they took."""
    started, info = time.perf_counter(), trainer.info
    if sequences is None:
        losses, tokens = trainer.evaluate("validation"), info.eval_tokens
    else:
        losses = trainer.evaluate("validation", sequences)
        tokens = sum(info.probe_counts(sequences)) * info.sequence_length
    seconds = {**stats.seconds, "validation": time.perf_counter() - started}
    return replace(stats, eval_losses=losses, eval_tokens=tokens, seconds=seconds)
