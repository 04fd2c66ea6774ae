"""A problem's surface with fitted parameters, and the runs that it is fitted to or that it predicts.

Amounts are fractions of the run times K domains, so that a run on fewer of them has the same parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from acodm_env.errors import DataError
from acodm_env.files import read_json
from acodm_env.step_stats import Array
from acodm_env.surrogate.problems import INITIAL_NATS, Problems, losses

FORMAT = "acodm-problem-1"
OVERFIT_PASSES = 30.0
"""At which `Calibrated.overfit` is given."""
SINCE = 0.25
"""Share of the run before which evaluations are not fitted, but for the one before the first step."""
IGNORED = 0.001
"""Share of the run under which a domain that it could train on is not fitted."""
ONE = ("repetition", "overfit", "overfit_power", "favour", "memory", "fall")
"""Parameters that a corpus has one of."""
EACH = ("exponents", "gains", "floors", "start", "recency")
"""Parameters (K,) of domains."""
_TWENTIETHS = 20  # `Problems.memory` is the renewal in so much of a run
_BEGIN = 1e-6  # share of the run done before the first step: problems.losses divides by it


@dataclass(frozen=True, kw_only=True)
class Record:
    """A finished run as a fit sees it; K rows are all domains and targets of all runs."""

    name: str
    """Of its folder."""
    mixer: str
    """Who drove it."""
    problem: str
    """What it was trained on: domains and cuts, in words."""
    trainable: Array
    """(K,) 1 for a domain that it could train on."""
    sizes: Array
    """(K,) training text there is, as a fraction of what the run draws; 0 where there is none."""
    mixtures: Array
    """(W, K) mean mixtures of equal parts of the run, rows summing to 1."""
    drawn: Array
    """(E, K) data drawn until each evaluation, as a fraction of the whole run's."""
    times: Array
    """(E,) share of the run done at each evaluation, ascending; 0 is before the first step."""
    losses: Array
    """(E, K) held-out losses, nats; NaN where none was measured."""

    @property
    def fitted(self) -> NDArray[np.bool_]:
        """(K,) targets that a fit reads: all but domains that the run could train on and did next to never."""
        fitted: NDArray[np.bool_] = (self.trainable == 0) | (self.drawn[-1] >= IGNORED)
        return fitted

    @property
    def moves(self) -> bool:
        """Whether the mixture changed in the run, by more than 0.05 in total variation on average."""
        return bool(0.5 * np.abs(self.mixtures - self.mixtures.mean(0)).sum(1).mean() > 0.05)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """The surface of one corpus, model and length; names as in `Problems`, amounts in K-th parts of the run."""

    domains: tuple[str, ...]
    """K rows."""
    initial_loss_nats: float
    """ln V."""
    measured: Array
    """(K,) whether some run measured its loss; the parameters of other rows say nothing."""
    exponents: Array
    """(K,) β."""
    gains: Array
    """(K,) A, nats."""
    floors: Array
    """(K,) c, nats."""
    start: Array
    """(K,) δ."""
    transfer: Array
    """(K, K) T, 1 on the diagonal."""
    recency: Array
    """(K,) κ."""
    repetition: float
    overfit: float
    """Nats at `OVERFIT_PASSES` passes and a share of .7."""
    overfit_power: float
    favour: float
    memory: float
    fall: float

    @property
    def slopes(self) -> Array:
        """(K,) nats that an e-fold of its own data gives a domain at uniform amounts."""
        slopes: Array = self.gains * self.exponents / self.transfer.sum(1)
        return slopes

    def problems(self, trainable: Array, sizes: Array) -> Problems:
        """The surfaces of B runs on it, such as for a `ProblemTrainer`; the objective is the mean loss over all rows.

        Args:
            trainable: (B, K) 1 where a run can train on the domain.
            sizes: (B, K) training text as a fraction of the run.
        """
        return rows_of(self._values(), trainable, sizes, self.initial_loss_nats - INITIAL_NATS, np)

    def _values(self) -> dict[str, Array]:
        return {name: np.atleast_1d(getattr(self, name)) for name in (*EACH, *ONE, "transfer")}

    def record(self) -> dict[str, Any]:
        """The parameters as JSON has them."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `acodm fit-surrogate --problems` wrote.

        Raises:
            DataError: the file is no such one.
        """
        record = read_json(path)
        try:
            if record["format"] != FORMAT:
                raise ValueError(f"format={record['format']!r}")
            given: dict[str, Any] = dict(record["parameters"])
            given |= {name: np.array(given[name]) for name in ("measured", "transfer", *EACH)}
            return cls(**given | {"domains": tuple(given["domains"])})
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: must be a problem that `acodm fit-surrogate --problems` wrote ({error!r}); fit it again"
            ) from error

    def predict(self, records: Sequence[Record]) -> list[Array]:
        """Held-out losses (E, K) of every run at its evaluations, nats."""
        import torch

        values = {name: torch.tensor(value) for name, value in self._values().items()}
        with torch.no_grad():
            played = Courses(records, self.initial_loss_nats).play(values).numpy()
        return [row[: len(record.times)] for row, record in zip(played, records, strict=True)]


class Courses:
    """Runs as tensors, R of them padded to E evaluations."""

    def __init__(self, records: Sequence[Record], initial: float):
        import torch

        self.torch, self.offset = torch, initial - INITIAL_NATS  # `problems.losses` ends above ln V of its vocabulary
        evaluations = max(len(record.times) for record in records)

        def padded(name: str, blank: float) -> Any:
            rows = [np.asarray(getattr(record, name), dtype=np.float64) for record in records]
            return torch.tensor(np.stack([_padded(row, evaluations, blank) for row in rows]))

        self.times, self.drawn, self.measured = padded("times", 1.0), padded("drawn", 0.0), padded("losses", np.nan)
        self.mixtures = torch.tensor(np.stack([record.mixtures for record in records]))  # (R, W, K)
        self.trainable = torch.tensor(np.stack([record.trainable for record in records]), dtype=torch.float64)
        self.sizes = torch.tensor(np.stack([record.sizes for record in records]), dtype=torch.float64)
        edges = torch.linspace(0, 1, self.mixtures.shape[1] + 1, dtype=torch.float64)
        self.since = (self.times[..., None] - edges).clip(0)  # (R, E, W + 1), of the run
        self.choices = self.trainable.sum(-1, keepdim=True)  # (R, 1)
        self.even = (self.trainable / self.choices)[:, None]  # (R, 1, K)

    def recent(self, memory: Any) -> Any:
        """(R, E, K) running mean of the mixture."""
        left = (_TWENTIETHS * self.torch.log1p(-memory) * self.since).exp()  # (R, E, W + 1)
        return left[..., :1] * self.even + (left[..., 1:] - left[..., :-1]) @ self.mixtures

    def play(self, values: Any) -> Any:
        """(R, E, K) held-out losses."""
        runs, evaluations = self.times.shape
        recent = self.recent(values["memory"])

        def rows(array: Any) -> Any:  # (R, …) → (R E, …)
            return array[:, None].expand(runs, evaluations, *array.shape[1:]).flatten(0, 1)

        problems = rows_of(values, rows(self.trainable), rows(self.sizes), self.offset, self.torch)
        drawn = (self.drawn.maximum(_BEGIN * self.even) * self.choices[:, None]).flatten(0, 1)
        times = self.times.clip(_BEGIN, 1).reshape(-1, 1)
        held_out, _ = losses(problems, drawn, recent.flatten(0, 1), times, self.torch)
        return held_out.reshape(runs, evaluations, -1) + self.offset


def _padded(row: Array, length: int, blank: float) -> Array:
    missing = [(0, length - len(row)), *[(0, 0)] * (row.ndim - 1)]
    padded: Array = np.pad(row, missing, constant_values=blank)
    return padded


def rows_of(values: Any, trainable: Any, sizes: Any, offset: float, xp: Any) -> Problems:
    """`Problems` of B runs of a fitted surface; the objective is the mean loss over all rows.

    Args:
        values: the parameters by name.
        trainable: (B, K).
        sizes: (B, K) fractions of the run.
        offset: nats by which losses are shifted, so that ln V is that of `problems`.
        xp: numpy or torch.
    """
    choices = trainable.sum(-1)[:, None]
    unit = choices / trainable.shape[-1]  # a run on fewer domains counts in larger shares
    every, one = xp.ones_like(trainable), xp.ones_like(choices)
    return Problems(
        weights=every / trainable.shape[-1],
        perplexity=0 * one,
        trainable=trainable,
        present=every,
        affinity=0 * every,
        leverage=0 * every,
        measured=every,
        sizes=sizes * choices,
        transfer=values["transfer"][None],
        exponents=values["exponents"] * every,
        gains=values["gains"] * every,
        floors=(values["floors"] - offset) * every,
        start=values["start"] * unit,
        even=values["transfer"].sum(-1) * unit,
        repetition=values["repetition"] * one,
        overfit=values["overfit"] * one,
        overfit_passes=OVERFIT_PASSES * one,
        overfit_power=values["overfit_power"] * one,
        recency=values["recency"] * every,
        favour=values["favour"] * one,
        memory=values["memory"] * one,
        fall=values["fall"] * one,
        noise=0 * every,
    )
