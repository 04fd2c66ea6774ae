"""Measured runs as tables: a CSV of mixtures and a CSV of final losses, joined by their first column."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from acodm_env.errors import ConfigError, DataError
from acodm_env.step_stats import Array

TOLERANCE = 0.02
"""How far a mixture's sum may lie from 1. Rounded to three digits, 17 weights of RegMix sum to 0.996–1.003."""
_SEPARATORS = "_/-.: "


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Finished runs: mixtures and what they led to."""

    domains: tuple[str, ...]
    """Names of the K domains."""
    targets: tuple[str, ...]
    """Names of the M targets."""
    weights: Array
    """(N, K), rows summing to 1."""
    losses: Array
    """(N, M) final losses, nats."""
    removed: tuple[str, ...]
    """What was removed from the columns' names."""

    def reordered(self, domains: Sequence[str], targets: Sequence[str], where: str) -> "Measured":
        """The same runs with these domains and targets in this order.

        Raises:
            DataError: they have others.
        """
        for kind, mine, wanted in (("domains", self.domains, domains), ("targets", self.targets, targets)):
            if set(mine) != set(wanted):
                missing = ", ".join(sorted(set(wanted) - set(mine))) or "none"
                others = ", ".join(sorted(set(mine) - set(wanted))) or "none"
                raise DataError(
                    f"{where}: must have the {kind} of the fitted runs; missing: {missing}; not there: {others}"
                )
        weights = self.weights[:, [self.domains.index(name) for name in domains]]
        losses = self.losses[:, [self.targets.index(name) for name in targets]]
        return Measured(
            domains=tuple(domains), targets=tuple(targets), weights=weights, losses=losses, removed=self.removed
        )


def read_measured(mixtures: str | Path, losses: str | Path, strip: Sequence[str] | None = None) -> Measured:
    """Read and join two tables; the rows of the mixtures are scaled to sum to 1.

    Args:
        mixtures: CSV with a header; the first column identifies the run, the others are the domains' weights.
        losses: CSV of the same runs; the other columns are final losses in nats.
        strip: what to remove from the ends of columns' names; None removes what all of a table have in common, up to a
            separator ("train_the_pile_arxiv", "train_the_pile_github" become "arxiv", "github").

    Raises:
        ConfigError: a file is not there.
        DataError: it is no such table, or the two do not belong together; with file, line and column.
    """
    shares, results = _Table(mixtures), _Table(losses)
    shares.check_mixtures()
    results.check_losses()
    rows = shares.matching(results)
    weights = shares.values / shares.values.sum(1, keepdims=True)
    domains, first = stripped(shares.names, strip, shares.path)
    targets, second = stripped(results.names, strip, results.path)
    removed = tuple(dict.fromkeys((*first, *second)))
    return Measured(domains=domains, targets=targets, weights=weights, losses=results.values[rows], removed=removed)


def stripped(names: Sequence[str], strip: Sequence[str] | None, where: object) -> tuple[tuple[str, ...], list[str]]:
    """Shorter names, and the texts that were removed from their beginnings and ends."""
    if strip is None:
        before = _to_separator(_common_beginning(names))
        after = _to_separator(_common_beginning([name[len(before) :][::-1] for name in names]))[::-1]
        strip = [text for text in (before, after) if text] if len(names) > 1 else []
    short, removed = list(names), list[str]()
    for text in strip:
        cut = [name.removeprefix(text).removesuffix(text) for name in short]
        if text and cut != short:
            short, removed = cut, [*removed, text]
    if "" in short or len(set(short)) < len(short):
        raise DataError(f"{where}: columns must differ in more than {', '.join(strip)}; give --strip other texts")
    return tuple(short), removed


def _common_beginning(names: Sequence[str]) -> str:
    first, last = min(names), max(names)
    differing = (index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
    return first[: next(differing, len(first))]


def _to_separator(text: str) -> str:
    """The beginning of `text` that ends with its last separator: a name is never cut within a word."""
    return text[: 1 + max(text.rfind(separator) for separator in _SEPARATORS)]


class _Table:
    """A CSV of numbers with a header and an index column."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(f"{path}: must be an existing CSV file; check the path")
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.reader(file)
                lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: must be a CSV file in UTF-8 ({error})") from error
        self.names = self._header(lines)
        rows = [self._row(line, cells) for line, cells in lines[1:]]
        self.lines = {index: line for index, line, _ in rows}
        if len(self.lines) < len(rows):
            line, index = next((line, index) for index, line, _ in rows if self.lines[index] != line)
            raise DataError(f"{path}, line {line}: the run '{index}' has another row in line {self.lines[index]}")
        self.values = np.array([row for *_, row in rows]).reshape(len(rows), len(self.names))

    def _header(self, lines: Sequence[tuple[int, list[str]]]) -> list[str]:
        names = [cell.strip() for cell in lines[0][1]] if lines else []
        if len(names) < 2 or any(_is_number(name) or not name for name in names[1:]):
            raise DataError(
                f"{self.path}, line 1: must be a header, the name of the index column and then a name per column"
            )
        twice = [name for name in names[1:] if names[1:].count(name) > 1]
        if twice:
            raise DataError(f"{self.path}, line 1: the column '{twice[0]}' is there twice")
        if len(lines) < 2:
            raise DataError(f"{self.path}: has no row below its header")
        return names[1:]

    def _row(self, line: int, cells: Sequence[str]) -> tuple[str, int, list[float]]:
        if len(cells) != 1 + len(self.names):
            raise DataError(f"{self.path}, line {line}: has {len(cells)} cells; its header has {1 + len(self.names)}")
        for name, cell in zip(self.names, cells[1:], strict=True):
            if not (_is_number(cell) and math.isfinite(float(cell))):
                raise DataError(
                    f"{self.path}, line {line}, column '{name}': must be a finite number; it is '{cell.strip()}'; "
                    f"leave a run that diverged out of both files"
                )
        return cells[0].strip(), line, [float(cell) for cell in cells[1:]]

    def check_mixtures(self) -> None:
        for row, line in zip(self.values, self.lines.values(), strict=True):
            if row.min() < 0:
                name = self.names[int(row.argmin())]
                raise DataError(
                    f"{self.path}, line {line}, column '{name}': a weight must be at least 0; it is {row.min():g}"
                )
            if abs(row.sum() - 1) > TOLERANCE:
                raise DataError(
                    f"{self.path}, line {line}: weights must sum to 1 ± {TOLERANCE}; they sum to {row.sum():.4g}"
                )

    def check_losses(self) -> None:
        for row, line in zip(self.values, self.lines.values(), strict=True):
            if row.min() <= 0:
                name = self.names[int(row.argmin())]
                raise DataError(
                    f"{self.path}, line {line}, column '{name}': a loss must be positive; it is {row.min():g}"
                )

    def matching(self, other: "_Table") -> list[int]:
        """For every run of this table its row in the other one."""
        if not self.lines.keys() & other.lines.keys():
            raise DataError(
                f"{self.path} and {other.path}: have no run in common; their first columns must name the same runs"
            )
        for one, two in ((self, other), (other, self)):
            alone = [index for index in one.lines if index not in two.lines]
            if alone:
                raise DataError(
                    f"{two.path}: has {len(two.lines)} runs, {one.path} has {len(one.lines)}; the first without a "
                    f"partner is '{alone[0]}' in line {one.lines[alone[0]]} of {one.path.name}"
                )
        order = {index: row for row, index in enumerate(other.lines)}
        return [order[index] for index in self.lines]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
