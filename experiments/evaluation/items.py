"""The items of a task as two models did them: differences of any metric, drawn again together."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from acodm_env.step_stats import Array

if TYPE_CHECKING:
    from acodm_env.experiments.evaluation.bootstrap import Estimate, Resampled, Statistic

LIKELIHOOD = ("nats", "tokens", "bytes")
"""What an item of text has, in the order of the perplexity's statistics."""

Pair = tuple[Mapping[str, Any], Mapping[str, Any]]
"""An item as one model did it, and as the other did."""


class PairedItems:
    """Both models' items side by side; drawn again once for all metrics of a text."""

    def __init__(self, pairs: Sequence[Pair], seed: int):
        """Look at the items.

        Args:
            pairs: each as one model did it and as the other did, in the same order for every metric.
            seed: of the bootstrap.
        """
        self.pairs, self.seed = pairs, seed
        self.groups = list(dict.fromkeys(str(mine["group"]) for mine, _ in pairs))
        self.is_text = bool(pairs) and "nats" in pairs[0][0]
        self._text: tuple[Resampled, list[Array]] | None = None

    def estimate(self, name: str, group: str) -> "tuple[Estimate, Array] | None":
        """A metric's difference with its interval, and the numbers (D, 2C) behind it; None if an item lacks them."""
        return self._of_text(name, group) if self.is_text else self._of_marks(name, group)

    def _of_text(self, name: str, group: str) -> "tuple[Estimate, Array] | None":
        """Each domain is a stratum of the unweighted mean."""
        from acodm_env.experiments.evaluation.bootstrap import Resampled
        from acodm_env.experiments.evaluation.perplexity import METRICS

        if name not in METRICS or any(mine["bytes"] != theirs["bytes"] for mine, theirs in self.pairs):
            return None
        if self._text is None:
            tables = [
                _table([pair for pair in self.pairs if pair[0]["group"] == one], LIKELIHOOD) for one in self.groups
            ]
            known = [table for table in tables if table is not None]
            if len(known) < len(tables):
                return None
            self._text = Resampled(known, seed=self.seed), known
        resampled, known = self._text
        only = self.groups.index(group) if group else None
        statistic = _difference_of(METRICS[name][0], len(LIKELIHOOD))
        return resampled.estimate(statistic, only), np.concatenate(known) if only is None else known[only]

    def _of_marks(self, name: str, group: str) -> "tuple[Estimate, Array] | None":
        """A mean over items, all of the same weight."""
        from acodm_env.experiments.evaluation.bootstrap import Resampled

        chosen = [pair for pair in self.pairs if not group or pair[0]["group"] == group]
        table = _table([({**mine, "one": 1}, {**theirs, "one": 1}) for mine, theirs in chosen], (name, "one"))
        if table is None or not len(table):
            return None
        return Resampled([table], seed=self.seed).estimate(_difference_of(_mean, 2)), table


def _difference_of(statistic: "Statistic", columns: int) -> "Statistic":
    """The statistic of the first columns minus that of the others."""

    def difference(sums: Any) -> Any:
        return statistic(sums[..., :columns]) - statistic(sums[..., columns:])

    return difference


def _mean(sums: Any) -> Any:
    """Mean over items (n,), from sums (1, n, 2) of the numbers and their count."""
    return (sums[..., 0] / sums[..., 1]).mean(0)


def _table(pairs: Sequence[Pair], names: Sequence[str]) -> Array | None:
    """(D, 2C): the numbers of one model, then of the other; None if an item lacks one."""
    rows = [[item.get(name) for item in pair for name in names] for pair in pairs]
    whole = all(isinstance(number, int | float) for row in rows for number in row)
    return np.array(rows, dtype=np.float64) if whole else None


def sign_test(table: Array) -> float | None:
    """Exact two-sided p over the items that one has right and the other wrong (McNemar 1947).

    Args:
        table: (D, 2C), numbers of one model, then of the other; the first of each are looked at.

    Returns:
        None where the numbers are not 0 and 1.
    """
    marks = table[:, [0, table.shape[1] // 2]]  # (D, 2)
    if not np.isin(marks, (0.0, 1.0)).all():
        return None
    from scipy.stats import binomtest

    more, fewer = int((marks[:, 0] > marks[:, 1]).sum()), int((marks[:, 0] < marks[:, 1]).sum())
    return float(binomtest(more, more + fewer).pvalue) if more + fewer else 1.0
