"""Problem surfaces fitted to logged runs: which parameters of `problems.losses` would have led to what was measured.

The runs share corpus, model and length, and differ in mixtures, in how much text each domain has (cuts), and in the
domains that they train on. Everything is fitted at once, by gradient through `problems.losses` itself (torch, float64,
L-BFGS): β, A, c, δ and κ of every domain, T between them, and R*, over-fitting, favour, memory and fall of the corpus.

Cost: Huber losses (0.02 nats) of the held-out losses, summed over targets and runs; the last evaluation of a run weighs
as much as its others, of which the one before the first step ties δ to ln V. Two things are not read. Evaluations in
the first quarter: the learning rate's warm-up slows them down, which the surface lacks and κ would explain. And a
domain that a run could train on and never did: its loss may rise above ln V, which no other data explains. Priors:
`PRIORS`; they decide only what the runs leave open, such as R* where nothing was repeated.

What the runs cannot tell: over-fitting is linear in passes, so `overfit` is fitted at a fixed `overfit_passes`; κ, the
memory and the favour show only where mixtures move.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.laws import HUBER_NATS
from acodm_env.step_stats import Array
from acodm_env.surrogate.calibrated import ONE, SINCE, Calibrated, Courses, Record

FEWEST_RUNS = 10
ROUNDS = 40
"""Most rounds of 25 L-BFGS iterations."""
APPROACH = 200
"""Steps of Adam before them."""
PRIORS = {
    "exponents": (np.log(0.35), 0.7),
    "slopes": (np.log(0.3), 1.0),
    "recency": (np.log(0.1), 1.0),
    "repetition": (np.log(12.0), 0.7),
    "overfit": (np.log(0.5), 1.0),
    "overfit_power": (0.0, 0.5),
    "favour": (0.0, 0.3),
    "memory": (-0.85, 1.0),
    "fall": (np.log(0.2), 1.0),
}
"""Centre and standard deviation of logarithms (of memory's logit, of favour itself); one of them costs 0.03 nats."""
_PRIOR = 0.03
_TRANSFER = 0.3  # cost of a T of 1 between two domains, nats
_SOME = -3.0  # logit of the T that a fit starts from
_LEAST_FLOOR, _BELOW = 0.2, 10.0  # nats, as `ProblemFamily` has it, and the cost of a squared nat below


def calibrate(
    domains: Sequence[str],
    records: Sequence[Record],
    initial: float,
    on_round: Callable[[int, float], None] = lambda done, cost: None,
) -> Calibrated:
    """The surface whose predictions fit the runs.

    Args:
        domains: names of the K rows.
        records: at least `FEWEST_RUNS`.
        initial: ln V, nats.
        on_round: called after every round of the fit with their number and the cost.

    Raises:
        ConfigError: there are too few, or one has other shapes or losses that are not finite.
    """
    check(domains, records)
    values = _Fit(records, initial).minimise(on_round)
    scalars = {name: float(values.pop(name)[0]) for name in ONE}
    known = np.isfinite(np.concatenate([record.losses for record in records])).any(0)
    return Calibrated(domains=tuple(domains), initial_loss_nats=initial, measured=known, **values, **scalars)  # type: ignore[arg-type]


def check(domains: Sequence[str], records: Sequence[Record]) -> None:
    """Refuse runs that cannot be fitted together.

    Raises:
        ConfigError: there are too few, they all played the same, or one has other shapes or no finite loss.
    """
    if len(records) < FEWEST_RUNS:
        raise ConfigError(
            f"runs={len(records)}: must be at least {FEWEST_RUNS} to fit a problem's surface; give more runs of the "
            f"same corpus, model and length with other mixtures"
        )
    for record in records:
        if record.mixtures.shape != (len(records[0].mixtures), len(domains)):
            raise ConfigError(f"run={record.name}: must have {len(domains)} domains; fit it apart")
        if np.isinf(record.losses).any() or not np.isfinite(record.losses[-1]).any():
            raise ConfigError(f"run={record.name}: must have finite losses throughout; it diverged; leave it out")
    ends = np.stack([record.drawn[-1] for record in records])
    if ends.std(0).max() < 0.01:
        raise ConfigError(f"runs={len(records)}: must differ in their mixtures; all drew the same; add others")


def _middle(losses: Array, unknown: float) -> Array:
    """(K,) medians over runs, of what was measured; `unknown` where nothing was."""
    columns = [column[np.isfinite(column)] for column in losses.T]
    return np.array([np.median(column) if len(column) else unknown for column in columns])


def _weights(record: Record, evaluations: int) -> Array:
    """(E, K) of a run's evaluations in the cost: the last one half, the earlier ones that are read the other half."""
    known = np.isfinite(record.losses)
    read = ((record.times == 0) | (record.times >= SINCE)) & (record.times < 1)
    spread = 0.5 * read / max(read.sum(), 1)
    spread[-1] = 0.5
    weights = np.zeros((evaluations, known.shape[1]))
    weights[: len(known)] = spread[:, None] * (known & record.fitted)
    return weights


class _Fit:
    """The parameters as tensors, and the cost that they have."""

    def __init__(self, records: Sequence[Record], initial: float):
        import torch

        self.torch, self.courses = torch, Courses(records, initial)
        measured = self.courses.measured
        self.wanted = measured.nan_to_num()
        self.weights = torch.tensor(np.stack([_weights(record, measured.shape[1]) for record in records]))  # (R, E, K)
        num_rows = measured.shape[-1]
        ends = _middle(np.stack([record.losses[-1] for record in records]), 0.6 * initial)  # (K,)
        starts = {name: np.full(1 if name in ONE else num_rows, centre) for name, (centre, _) in PRIORS.items()}
        starts |= {"ends": ends, "initial": np.full(num_rows, initial)}  # under uniform amounts, and before any
        starts["transfer"] = np.full((num_rows, num_rows), _SOME)
        self.raw = {name: torch.tensor(start, requires_grad=True) for name, start in starts.items()}
        self.other = 1 - torch.eye(num_rows, dtype=torch.float64)

    def values(self) -> dict[str, Any]:
        """The parameters within their bounds."""
        raw = {name: value.clip(-12, 6) for name, value in self.raw.items()}
        values = {
            name: raw[name].exp() for name in ("exponents", "recency", "repetition", "overfit", "overfit_power", "fall")
        }
        values |= {"memory": raw["memory"].sigmoid(), "favour": raw["favour"]}
        values["transfer"] = raw["transfer"].sigmoid() * self.other + (1 - self.other)
        even = values["transfer"].sum(1)
        values["gains"] = raw["slopes"].exp() * even / values["exponents"]
        values["floors"] = self.raw["ends"] - values["gains"]
        above = (self.raw["initial"] - values["floors"] - values["fall"]) / values["gains"]
        values["start"] = even * above.clip(1.05) ** (-1 / values["exponents"])
        return values

    def cost(self) -> Any:
        """Huber losses and priors."""
        values = self.values()
        missed = (self.courses.play(values) - self.wanted).abs()
        huber = self.torch.where(missed <= HUBER_NATS, missed**2 / (2 * HUBER_NATS), missed - HUBER_NATS / 2)
        pull = sum((((self.raw[name] - centre) / sd) ** 2).sum() for name, (centre, sd) in PRIORS.items())
        below = ((_LEAST_FLOOR - values["floors"]).clip(0) ** 2).sum()
        helps = (values["transfer"] * self.other).sum()
        return (huber * self.weights).sum() + _PRIOR * pull + _TRANSFER * helps + _BELOW * below

    def _approach(self) -> None:
        """Some way by small steps, which an L-BFGS from far away would leave for where nothing has a gradient."""
        optimiser = self.torch.optim.Adam(list(self.raw.values()), lr=0.03)
        for _ in range(APPROACH):
            optimiser.zero_grad()
            self.cost().backward()
            optimiser.step()

    def minimise(self, on_round: Callable[[int, float], None]) -> dict[str, Array]:
        """The fitted values."""
        self._approach()
        optimiser = self.torch.optim.LBFGS(
            list(self.raw.values()),
            max_iter=25,
            max_eval=40,
            history_size=30,
            tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Any:
            optimiser.zero_grad()
            cost = self.cost()
            cost.backward()
            return cost

        before, cost = np.inf, closure().item()
        if not np.isfinite(cost):
            raise ConfigError(f"runs: must be fitted with a finite cost, {cost} was reached; leave out the oddest run")
        for done in range(1, ROUNDS + 1):
            cost = optimiser.step(closure).item()  # type: ignore[no-untyped-call]  # before this round
            on_round(done, cost)
            if not before - cost > 1e-3 * cost:
                break
            before = cost
        return {name: value.detach().numpy().copy() for name, value in self.values().items()}
