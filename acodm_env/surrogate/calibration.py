"""The dynamics fitted to logged runs: which law, forgetting and pace would have led to the losses that were measured.

Everything is fitted at once, by gradient through `dynamics` (torch, float64, L-BFGS): the law's four parameters per
target, one φ per domain and the pace q. Steps between two evaluations count as one under their mean mixture, so a fit
costs as many steps as there were evaluations. Cost of a run: the mean over evaluations of the Huber losses (0.02 nats,
as in `laws`), summed over targets. Prior: that of `laws.PowerLaw` on a and b, 0.03 on the mean φ, and 0.3 on the spread
of φ around it, since an order effect per domain shows only where the runs contain one.

What a fit cannot tell: runs with a decaying learning rate flatten towards their end, and a φ common to all domains,
which makes no order better than another one, does that too. Read the level of φ as both together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.laws import HUBER_NATS, PowerLaw
from acodm_env.step_stats import Array
from acodm_env.surrogate import dynamics
from acodm_env.surrogate.surface import REPETITION, Surface

if TYPE_CHECKING:
    from torch import Tensor

_PRIOR, _SPREAD = 0.03, 0.3  # half the penalty on a unit of a, b or φ's mean; on a unit of φ's distance from it
_USEFUL, _BENT = (-30.0, 15.0), (-5.0, 2.0)  # a and b beyond say nothing more, as in `laws`
ROUNDS = 100
"""Most rounds of twenty L-BFGS iterations."""
FEWEST_RUNS = 10


@dataclass(frozen=True, kw_only=True)
class Course:
    """One finished run, as its logs have it."""

    name: str
    """Of its folder."""
    mixer: str
    """Who drove it."""
    weights: Array
    """(T, K) effective mixtures of its T steps, rows summing to 1."""
    steps: Array
    """(E,) optimiser steps at the evaluations after the start; the last one is T."""
    losses: Array
    """(E, M) held-out losses there, nats."""
    initial: Array | None = None
    """(M,) held-out losses before the first step."""
    drawn: Array
    """(T, K) sequences drawn."""
    training: Array
    """(T, K) mean training losses of those, nats; NaN where none was drawn."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs of a fit share."""

    domains: tuple[str, ...]
    targets: tuple[str, ...]
    sizes_tokens: tuple[float, ...]
    run_tokens: float
    sequence_length: int
    initial_loss_nats: float
    objective: tuple[float, ...] = ()


def calibrate(
    setting: Setting, courses: Sequence[Course], on_round: Callable[[int, float], None] = lambda done, cost: None
) -> Surface:
    """The surface whose predictions fit the courses.

    Args:
        setting: what they share.
        courses: at least `FEWEST_RUNS`, evaluated at the same steps.
        on_round: called after every round of the fit with their number and the cost.

    Raises:
        ConfigError: there are too few, or they do not fit together.
    """
    check(setting, courses)
    shares, durations, times = intervals(courses)
    measured = np.stack([course.losses for course in courses])  # (R, E, M)
    fit = _Fit(setting, shares, durations, times, measured)
    values = fit.minimise(on_round)
    return Surface(
        **vars(setting),
        law=PowerLaw(values["useful"], values["scales"], values["exponents"], values["floors"]),
        forgetting=tuple(values["forgetting"].tolist()),
        pace=float(values["pace"][0]),
        noise_nats=sequence_noise(courses),
    )


def check(setting: Setting, courses: Sequence[Course]) -> None:
    """Refuse courses that cannot be fitted together.

    Raises:
        ConfigError: there are too few, or one has other shapes, evaluations or a loss that is not finite.
    """
    if len(courses) < FEWEST_RUNS:
        raise ConfigError(f"runs={len(courses)}: must be at least {FEWEST_RUNS} to fit the dynamics; give more runs")
    first, num_domains, num_targets = courses[0], len(setting.domains), len(setting.targets)
    for course in courses:
        if course.weights.shape != (len(first.weights), num_domains):
            wanted = f"{len(first.weights)} steps and {num_domains} domains"
            raise ConfigError(f"run={course.name}: must have {wanted}, as {first.name}; it has {course.weights.shape}")
        if course.losses.shape[1] != num_targets or course.steps.tolist() != first.steps.tolist():
            raise ConfigError(f"run={course.name}: must have the targets and evaluations of {first.name}; fit it apart")
        if not np.isfinite(course.losses).all():
            raise ConfigError(f"run={course.name}: must have finite losses throughout; it diverged; leave it out")
    if not len(first.steps) or first.steps[-1] != len(first.weights) or first.steps[0] < 1:
        raise ConfigError(f"run={first.name}: must be evaluated at its end; finish it first")


def intervals(courses: Sequence[Course]) -> tuple[Array, Array, Array]:
    """Mean mixtures (R, E, K) between evaluations, durations (E,) and times (E,) in units of the run."""
    edges = np.append(0, courses[0].steps).astype(int)
    spans = list(pairwise(edges))
    shares = np.stack([[course.weights[begin:end].mean(0) for begin, end in spans] for course in courses])
    return shares, np.diff(edges) / edges[-1], edges[1:] / edges[-1]


def predict(surface: Surface, courses: Sequence[Course]) -> Array:
    """(R, E, M) losses that the surface gives the courses' mixtures at their evaluations."""
    shares, durations, times = intervals(courses)
    return np.asarray(_play(surface.parameters(), shares, durations, times[:, None], np))


def _play(law: dynamics.Parameters, shares: Any, durations: Any, times: Any, xp: Any) -> Any:
    """(R, E, M) losses under mixtures (R, E, K); the same lines for numpy and torch."""
    memory = epochs = xp.zeros_like(shares[:, 0])
    memories = []
    for index, duration in enumerate(durations):
        memory, epochs = dynamics.learn(law, memory, epochs, shares[:, index], duration, xp)
        memories.append(memory)
    return dynamics.losses(law, xp.stack(memories, 1), times, xp)


class _Fit:
    """The parameters as tensors, and the cost that they have."""

    def __init__(self, setting: Setting, shares: Array, durations: Array, times: Array, measured: Array):
        import torch

        self.torch, self.initial = torch, setting.initial_loss_nats
        self.shares, self.durations = torch.tensor(shares), torch.tensor(durations)
        self.times, self.measured = torch.tensor(times)[:, None], torch.tensor(measured)
        self.sizes = torch.tensor(np.array(setting.sizes_tokens) / setting.run_tokens)
        ends = measured[:, -1]  # (R, M)
        num_targets, num_domains = measured.shape[-1], shares.shape[-1]
        starts = {
            "useful": np.zeros((num_targets, num_domains)),
            "scales": np.log(ends.std(0) + 0.5),
            "exponents": np.full(num_targets, -1.0),
            "floors": np.log(0.8 * ends.min(0)),  # their logarithms
            "forgetting": np.full(num_domains, -1.0),  # before softplus, as the pace
            "pace": np.full(1, -1.0),
        }
        self.raw = {name: torch.tensor(start, requires_grad=True) for name, start in starts.items()}

    def values(self) -> "dict[str, Tensor]":
        """The parameters within their bounds."""
        softplus, raw = self.torch.nn.functional.softplus, self.raw
        return {
            "useful": raw["useful"].clip(*_USEFUL),
            "scales": raw["scales"],
            "exponents": raw["exponents"].clip(*_BENT),
            "floors": raw["floors"].exp(),
            "forgetting": softplus(raw["forgetting"]),
            "pace": softplus(raw["pace"]),
        }

    def cost(self) -> Any:
        """Huber losses and priors."""
        torch, values = self.torch, self.values()
        powers, floors = values["exponents"].exp(), values["floors"]
        gap = (self.initial - floors).clip(1e-3)
        start = ((values["scales"] - gap.log()) / powers).clip(None, 60).exp()  # e⁶⁰ of useful share is endless
        law = dynamics.Parameters(
            helps=values["useful"].exp(),
            scales=values["scales"],
            powers=powers,
            floors=floors,
            start=(start - dynamics.FLOOR).clip(0),
            forgetting=values["forgetting"],
            sizes=self.sizes,
            repetition=torch.tensor([REPETITION], dtype=torch.float64),
            pace=values["pace"],
        )
        missed = (_play(law, self.shares, self.durations, self.times, torch) - self.measured).abs()
        huber = torch.where(missed <= HUBER_NATS, missed**2 / (2 * HUBER_NATS), missed - HUBER_NATS / 2)
        level = values["forgetting"].mean()
        pull = (self.raw["useful"] ** 2).sum() + ((self.raw["exponents"] + 1) ** 2).sum() + level**2
        spread = ((values["forgetting"] - level) ** 2).sum()
        return huber.mean(1).sum() + _PRIOR * pull + _SPREAD * spread

    def minimise(self, on_round: Callable[[int, float], None]) -> dict[str, Array]:
        """The fitted values."""
        optimiser = self.torch.optim.LBFGS(
            list(self.raw.values()),
            max_iter=20,
            max_eval=40,
            history_size=20,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Any:
            optimiser.zero_grad()
            cost = self.cost()
            cost.backward()
            return cost

        before = np.inf
        for done in range(1, ROUNDS + 1):
            optimiser.step(closure)  # type: ignore[no-untyped-call]
            cost = self.cost().item()
            on_round(done, cost)
            if not before - cost > 1e-3:
                break
            before = cost
        return {name: value.detach().numpy().copy() for name, value in self.values().items()}


def sequence_noise(courses: Sequence[Course]) -> float:
    """Standard deviation in nats of one training sequence's mean loss; 0 where no domain was drawn thrice in a row.

    From second differences of successive steps, over √(1/n + 4/n' + 1/n") for n, n' and n" sequences: a steady fall of
    the loss does not show there.
    """
    squares = []
    for course in courses:
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = 1 / course.drawn  # infinite where none was drawn
            spread = inverse[:-2] + 4 * inverse[1:-1] + inverse[2:]
            change = np.diff(course.training, n=2, axis=0) ** 2 / spread
        squares.append(change[np.isfinite(change) & np.isfinite(spread)])
    every = np.concatenate(squares)
    return float(np.sqrt(every.mean())) if len(every) else 0.0


def judge(surface: Surface, fitted: Sequence[Course], held_out: Sequence[Course]) -> dict[str, Any]:
    """How well the surface predicts runs that it was not fitted on, beside two predictors that know no mixture.

    Errors are mean absolute ones over runs and targets in nats, of all evaluations and of the last one: of the surface,
    of the mean course of the fitted runs, and of those among them under the uniform mixture, if any. Rank correlation:
    of the held-out runs' final losses under the objective.
    """
    measured = np.stack([course.losses for course in held_out])  # (R, E, M)
    known = np.stack([course.losses for course in fitted])
    uniform = [course.losses for course in fitted if course.mixer == "uniform"]
    guesses = {"surface": predict(surface, held_out), "mean_of_runs": known.mean(0)}
    if uniform:
        guesses["uniform"] = np.mean(uniform, axis=0)
    missed = {name: np.abs(guess - measured) for name, guess in guesses.items()}
    weights = surface.objective_weights
    return {
        "fitted_runs": len(fitted),
        "held_out_runs": len(held_out),
        "error_nats": {name: float(errors.mean()) for name, errors in missed.items()},
        "error_at_end_nats": {name: float(errors[:, -1].mean()) for name, errors in missed.items()},
        "error_by_time_nats": [round(float(error), 4) for error in missed["surface"].mean((0, 2))],
        "spearman_of_final_loss": rank_correlation(guesses["surface"][:, -1] @ weights, measured[:, -1] @ weights),
    }


def rank_correlation(one: Array, other: Array) -> float | None:
    """Spearman's ρ of two vectors (N,); None where one is constant or there are fewer than three values."""
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(one), rankdata(other)])
    if ranks.shape[1] < 3 or not (ranks.std(1) > 0).all():
        return None
    return float(np.corrcoef(ranks)[0, 1])
