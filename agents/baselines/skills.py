"""Mixtures from how the domains help each other: Skill-It, measured beforehand, and Aioli, measured during the run.

Both keep a matrix of how much training on domain j lowers held-out loss i, and tilt a uniform mixture by it. The M
targets need not be the K domains: a target's part counts by what a nat of it is worth, M·∂objective/∂L_i at the last
held-out losses: M·ω_i for mean losses, which is 1 for each where all count alike, as in the papers.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.mixture import softmax
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Mixer, RunInfo, RunRequest, RunResult

from .options import positive, whole

_USUAL_PROBE_STEPS = 4


class SkillIt(Mixer):
    """Skill-It (algorithm 1): w ∝ exp(η·A·Σ L) over the held-out losses L of the last W evaluations.

    A_ij = max(0, relative drop of held-out loss j in a short run on domain i alone), from K preparatory runs: the
    paper's cheaper estimate of its skill graph, as Aioli's authors use it (arXiv 2411.05735). A run that diverged gives
    a row of zeros: a domain that cannot be trained on helps nobody. Before the first evaluation every loss counts as 1
    nat, as in the released code.

    A held-out loss that is not finite keeps its last value; a diverged step changes nothing. η is per nat and per
    evaluation, and the rule has no floor: with strong losses one domain can take nearly everything.
    """

    name = "skill-it"
    paper = "arXiv 2307.14430"
    needs = frozenset({"validation"})

    def __init__(
        self,
        learning_rate: float = 0.2,
        window: int = 3,
        probe_frac: float = 0.1,
        graph: Sequence[Sequence[float]] | None = None,
    ):
        """Take the options.

        Args:
            learning_rate: η.
            window: W, evaluations summed over.
            probe_frac: length of each of the K preparatory runs, as a fraction of the horizon, in (0, 1].
            graph: A, K rows of M non-negative numbers, for who has it; None: from preparatory runs.
        """
        self.learning_rate = positive("learning_rate", learning_rate)
        self.window = whole("window", window)
        if not 0 < probe_frac <= 1:
            raise ConfigError(f"probe_frac={probe_frac}: must be in (0, 1]")
        self.probe_frac = probe_frac
        self._given = graph
        self._graph: Array | None = None if graph is None else np.array(graph, dtype=np.float64)

    def preparation(self, info: RunInfo) -> Sequence[RunRequest]:
        """A short run on each domain alone, unless the graph is given."""
        if self._given is not None:
            return ()
        steps = max(1, round(self.probe_frac * info.horizon))
        return tuple(
            RunRequest(
                name=f"only-{index}",  # not the domain's name, which need not be fit for a file's
                mixer="static",
                options={"weights": {other: float(other == domain) for other in info.domains}},
                steps=steps,
            )
            for index, domain in enumerate(info.domains)
        )

    def prepare(self, results: Mapping[str, RunResult]) -> None:
        """Take A (K, M) from the relative drops."""
        if self._given is not None:
            return
        rows = []
        for index in range(len(results)):
            result = results[f"only-{index}"]
            initial = np.array(result.initial_losses, dtype=np.float64)  # (M,)
            drop = (initial - result.final_losses) / np.maximum(initial, 1e-12)
            rows.append(np.where(np.isfinite(drop), np.maximum(drop, 0.0), 0.0))
        self._graph = np.array(rows)

    def start(self, info: RunInfo) -> None:
        """Begin with every loss at 1 nat.

        Raises:
            ConfigError: no graph yet, or one of another shape, or with negative entries.
        """
        super().start(info)
        if self._graph is None:
            raise ConfigError(
                f"mixer={self.name}: needs its preparatory runs first; run it through `acodm benchmark`, or give graph"
            )
        shape = (info.num_domains, len(info.targets))
        if self._graph.shape != shape:
            raise ConfigError(f"graph: must have {shape[0]} rows of {shape[1]} numbers, got {self._graph.shape}")
        if not (np.isfinite(self._graph).all() and (self._graph >= 0).all()):
            raise ConfigError("graph: must hold finite numbers of at least 0")
        self._recent: deque[Array] = deque(maxlen=self.window)

    def weights(self) -> Array:
        """The mixture (K,) for the next step."""
        assert self._graph is not None  # `start` saw to it
        losses = np.sum(self._recent, axis=0) if self._recent else self._last()  # (M,)
        importance = len(losses) * self.info.marginal_values(self._last())  # (M,)
        return softmax(self.learning_rate * self._graph @ (importance * losses))

    def _last(self) -> Array:
        """The last evaluation (M,), 1 nat each before the first."""
        return self._recent[-1] if self._recent else np.ones(len(self.info.targets))

    def update(self, stats: StepStats) -> None:
        """Remember an evaluation."""
        if stats.eval_losses is None or stats.diverged:
            return
        self._recent.append(np.where(np.isfinite(stats.eval_losses), stats.eval_losses, self._last()))

    def state_dict(self) -> dict[str, Any]:
        """The evaluations of the window."""
        return {"recent": [losses.copy() for losses in self._recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        recent = (np.array(losses, dtype=np.float64) for losses in state["recent"])
        self._recent = deque(recent, maxlen=self.window)


class Aioli(Mixer):
    """Aioli (algorithms 1 and 2): the matrix is measured again every round, by a few real training steps per domain.

    A round first trains `probe_steps` under each of the K mixtures q^(j) with ρ on domain j and (1−ρ)/(K−1) on every
    other, and measures the held-out losses after each. G_ij, the drop of loss i over probe j, is explained by
    G_i = Q·A_i with Q's rows the probes, so A_i = Q⁻¹·G_i. A is shifted to be non-negative where it is not, normalised
    to sum 1, and averaged over the rounds, Ā ← e·Ā + (1−e)·A; the rest of the round trains under
    w ∝ exp(η·Σ_i Ā_ij). The order of the probes is drawn anew each round: the later a probe, the less is left to learn.
    Probes are steps of the run like any other, and inside its token budget.

    The run begins under the uniform mixture, to an evaluation from which the first probe is measured. The number and
    the length of the rounds follow from the horizon: at most `rounds` of them, probes of at least 4 steps (the released
    runs' 4 to 10) as long as all of them stay within `probe_frac` of the steps; a run too short for that makes one
    round with shorter probes, which may then take more.

    Deviations: one sweep over the domains a round, where the released runs make 2 to 4; w_init is uniform. A round in
    which an evaluation is missing or not finite teaches nothing. Under a lag the plan is given that much earlier, so
    that the probes fall on the steps that are measured.
    """

    name = "aioli"
    paper = "arXiv 2411.05735"
    needs = frozenset({"validation"})

    def __init__(
        self,
        learning_rate: float = 1.0,
        rho: float = 0.7,
        ema: float = 0.1,
        rounds: int = 20,
        probe_steps: int | None = None,
        probe_frac: float = 0.25,
        warmup_frac: float = 0.02,
        seed: int = 0,
    ):
        """Take the options.

        Args:
            learning_rate: η; released runs: 0.1 to 1.
            rho: ρ in (1/K, 1], the share of a probe's own domain; released runs: 0.625 to 0.75.
            ema: e in [0, 1), the weight of the earlier rounds.
            rounds: at most so many.
            probe_steps: optimiser steps of one probe; None: from the horizon.
            probe_frac: share of the steps that all probes together should not exceed, in (0, 1).
            warmup_frac: share of the steps before the first round, in [0, 1); at least one step.
            seed: of the order of the probes, beside the run's own.
        """
        self.learning_rate = positive("learning_rate", learning_rate)
        if not 0 < rho <= 1:
            raise ConfigError(f"rho={rho}: must be in (1/K, 1]")
        if not 0 <= ema < 1:
            raise ConfigError(f"ema={ema}: must be in [0, 1)")
        if not 0 < probe_frac < 1:
            raise ConfigError(f"probe_frac={probe_frac}: must be in (0, 1)")
        if not 0 <= warmup_frac < 1:
            raise ConfigError(f"warmup_frac={warmup_frac}: must be in [0, 1)")
        self.rho, self.ema, self.probe_frac, self.warmup_frac = rho, ema, probe_frac, warmup_frac
        self.rounds = whole("rounds", rounds)
        self.probe_steps = None if probe_steps is None else whole("probe_steps", probe_steps)
        self.seed = seed

    def start(self, info: RunInfo) -> None:
        """Plan the rounds.

        Raises:
            ConfigError: the horizon is too short for one round, or ρ does not set a probe apart.
        """
        super().start(info)
        num_domains, num_targets = info.num_domains, len(info.targets)
        self._probes = self._mixtures(num_domains)  # Q (K, K)
        self._starts, self._length = self._plan(info)
        self._due = {begin + n * self._length for begin in self._starts for n in range(num_domains + 1)}
        self._orders = [
            np.random.default_rng((self.seed, info.seed, index)).permutation(num_domains)
            for index in range(len(self._starts))
        ]
        self._step = 0
        self._losses = np.full(num_targets, np.nan)  # (M,) of the last evaluation
        self._drops = np.full((num_targets, num_domains), np.nan)  # G (M, K)
        self._matrix: Array | None = None  # Ā (M, K)
        self._known = np.full(num_targets, info.initial_loss_nats)  # (M,) last finite losses

    def _mixtures(self, num_domains: int) -> Array:
        """Probes q^(j) as rows (K, K)."""
        if num_domains == 1:
            return np.ones((1, 1))
        if self.rho <= 1 / num_domains:
            raise ConfigError(f"rho={self.rho}: must be in (1/{num_domains}, 1]; a probe must favour its domain")
        probes = np.full((num_domains, num_domains), (1 - self.rho) / (num_domains - 1))
        np.fill_diagonal(probes, self.rho)
        return probes

    def _warmup(self, horizon: int, lag: int) -> int:
        """Steps before the first round; the first `lag` steps are not this mixer's."""
        return max(1, round(self.warmup_frac * horizon), lag)

    def _plan(self, info: RunInfo) -> tuple[list[int], int]:
        """Steps after which each round begins, and steps of a probe."""
        num_domains = info.num_domains
        if num_domains == 1:
            return [], 1
        warmup = self._warmup(info.horizon, info.lag)
        left = info.horizon - warmup
        budget = self.probe_frac * left
        rounds = int(budget / (num_domains * (self.probe_steps or _USUAL_PROBE_STEPS)))
        rounds = min(max(rounds, 1), self.rounds)
        length = self.probe_steps or max(1, int(budget / (rounds * num_domains)))
        needed = num_domains * length + 1  # and one step to make use of them
        if left < needed:
            least = next(h for h in count(needed) if h - self._warmup(h, info.lag) >= needed)
            raise ConfigError(
                f"horizon={info.horizon}: must be at least {least} optimiser steps for mixer={self.name}, which probes "
                f"each of {num_domains} domains for {length}; train longer, or choose another mixer"
            )
        return [warmup + index * left // rounds for index in range(rounds)], length

    def _probe_of(self, step: int) -> tuple[int, bool] | None:
        """Domain probed in optimiser step `step` (from 1), and whether it is its round's last; None outside probes."""
        current = int(np.searchsorted(self._starts, step)) - 1  # the last round that began before this step
        if current < 0:
            return None
        number = (step - 1 - self._starts[current]) // self._length
        if number >= len(self._probes):
            return None
        return int(self._orders[current][number]), number == len(self._probes) - 1

    def due(self, step: int) -> bool:
        """At the beginning of a round and after each probe."""
        return step in self._due

    def weights(self) -> Array:
        """A probe, or the mixture (K,) of the matrix so far."""
        probe = self._probe_of(self._step + self.info.lag + 1)
        if probe is not None:
            return np.array(self._probes[probe[0]])
        if self._matrix is None:
            return np.full(self.info.num_domains, 1 / self.info.num_domains)
        importance = len(self._known) * self.info.marginal_values(self._known)  # (M,)
        tilt: Array = importance @ self._matrix  # (K,)
        return softmax(self.learning_rate * tilt)

    def update(self, stats: StepStats) -> None:
        """Take in what a probe did; after a round's last, the matrix."""
        self._step = stats.step
        if not self.due(stats.step):
            return
        missing = stats.eval_losses is None or stats.diverged
        losses = np.full_like(self._losses, np.nan) if missing else np.array(stats.eval_losses, dtype=np.float64)
        self._known = np.where(np.isfinite(losses), losses, self._known)
        probe = self._probe_of(stats.step)
        if probe is not None:
            domain, last = probe
            self._drops[:, domain] = self._losses - losses
            if last and np.isfinite(self._drops).all():
                self._learn()
        self._losses = losses

    def _learn(self) -> None:
        """Solve for A, normalise it, and average it with the earlier rounds'."""
        matrix: Array = np.linalg.solve(self._probes, self._drops.T).T  # (M, K)
        matrix = matrix - min(matrix.min(), 0.0)
        total = matrix.sum()
        matrix = matrix / total if total > 0 else np.full_like(matrix, 1 / matrix.size)
        self._matrix = matrix if self._matrix is None else self.ema * self._matrix + (1 - self.ema) * matrix

    def state_dict(self) -> dict[str, Any]:
        """The step, which tells round and probe, the last losses, the round's drops so far, and the matrix."""
        matrix = None if self._matrix is None else self._matrix.copy()
        arrays = {"losses": self._losses.copy(), "drops": self._drops.copy(), "known": self._known.copy()}
        return {"step": self._step, "matrix": matrix, **arrays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self._step = int(state["step"])
        self._losses = np.array(state["losses"], dtype=np.float64)
        self._drops = np.array(state["drops"], dtype=np.float64)
        self._known = np.array(state.get("known", self._known), dtype=np.float64)
        self._matrix = None if state["matrix"] is None else np.array(state["matrix"], dtype=np.float64)
