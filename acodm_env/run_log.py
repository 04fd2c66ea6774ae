"""The lines of a run's logs: `stats.jsonl`, one per optimiser step, `eval.jsonl`, one per evaluation on the test split.

Every line ends with a newline: what stands behind the last one was cut short by an interruption, and is no line. Any
other line that is damaged is refused, by file and number. Numbers that are not finite are null.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from acodm_env.errors import DataError
from acodm_env.step_stats import Array, StepStats

Numbers = Sequence[float | None]
_PART = "seconds_"


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """A line of one of the logs."""

    log: ClassVar[str]
    """File of such lines."""

    step: int
    """Optimiser steps done."""

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """The line that `record` gave."""
        return cls(**{each.name: record[each.name] for each in fields(cls) if each.name in record})


@dataclass(frozen=True, kw_only=True)
class EvaluationLine(LogLine):
    """Held-out losses on the test split, after a step."""

    log = "eval.jsonl"

    losses: Numbers
    """(M,) nats."""
    targets: Sequence[str]
    seconds: float | None = None
    """None in runs that were logged before it was."""


@dataclass(frozen=True, kw_only=True)
class StepLine(LogLine):
    """One optimiser step; fields as in `StepStats`, those with a default are not in every older log."""

    log = "stats.jsonl"

    tokens: int
    """Of the whole run so far."""
    requested: Numbers
    """(K,) mixture asked for."""
    realised: Numbers
    """(K,) mixture drawn."""
    losses: Numbers
    """(K,) training losses, nats."""
    loss_weights: Numbers | None = None
    eval_losses: Numbers | None = None
    """(M,) what the mixer had measured on the validation split, nats."""
    eval_tokens: int | None = None
    """Held-out tokens read for it."""
    epochs: Numbers
    """(K,) passes so far."""
    loss: float | None
    """Mean over the batch, nats."""
    grad_norm: float | None = None
    lr: float | None = None
    decision: int | None = None
    mixture_age: float | None = None
    diverged: bool
    skipped: int = 0
    seconds: float
    """Wall clock of mixer and training."""
    seconds_by_part: Mapping[str, float] = field(default_factory=dict)
    """What of it went where: data, train, probe, decision, validation; `seconds_PART` in the file."""
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    """What the mixer has to say of itself, by its own names."""

    def record(self) -> dict[str, Any]:
        """As JSON, flat."""
        own = {name: getattr(self, name) for name in _OWN}
        return own | {_PART + part: value for part, value in self.seconds_by_part.items()} | dict(self.diagnostics)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """The line that `record` gave."""
        own = {name: record[name] for name in _OWN if name in record}
        rest = {name: value for name, value in record.items() if name not in own}
        parts = {name.removeprefix(_PART): rest.pop(name) for name in [*rest] if name.startswith(_PART)}
        return cls(**own, seconds_by_part=parts, diagnostics=rest)

    @classmethod
    def of_step(cls, stats: StepStats, seconds: float, deciding: float, diagnostics: Mapping[str, Any]) -> Self:
        """The line of a step.

        Args:
            stats: what the trainer said.
            seconds: wall clock of mixer and training.
            deciding: what of it the mixer took.
            diagnostics: of the mixer.
        """
        return cls(
            step=stats.step,
            tokens=stats.tokens,
            requested=plain(stats.requested),
            realised=plain(stats.realised),
            losses=plain(stats.losses),
            loss_weights=None if stats.loss_weights is None else plain(stats.loss_weights),
            eval_losses=None if stats.eval_losses is None else plain(stats.eval_losses),
            eval_tokens=stats.eval_tokens,
            epochs=plain(stats.epochs),
            loss=plain(np.array(stats.loss)),
            grad_norm=plain(np.array(stats.grad_norm)),
            lr=plain(np.array(stats.lr)),
            decision=stats.decision,
            mixture_age=stats.mixture_age,
            diverged=stats.diverged,
            skipped=stats.skipped,
            seconds=seconds,
            seconds_by_part={**stats.seconds, "decision": deciding},
            diagnostics=diagnostics,
        )

    def measured_tokens(self, whole: int) -> int:
        """Held-out tokens that the mixer had read; a line that does not say it is charged `whole`, an evaluation's."""
        if self.eval_tokens is not None:
            return self.eval_tokens
        return 0 if self.eval_losses is None else whole


_OWN = tuple(each.name for each in fields(StepLine) if each.name not in ("seconds_by_part", "diagnostics"))
Line = TypeVar("Line", bound=LogLine)


def read_log(folder: Path, kind: type[Line]) -> list[Line]:
    """Lines of a log in a run's folder; [] if there is none.

    Args:
        folder: of the run.
        kind: `StepLine` or `EvaluationLine`.

    Raises:
        DataError: a line is damaged, or lacks a field; says which.
    """
    return [line for _, line in numbered(folder / kind.log, kind)]


def numbered(file: Path, kind: type[Line]) -> list[tuple[str, Line]]:
    """Lines as they stand in the file, and as what they are."""
    found = []
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            found.append((line, kind.of(json.loads(line))))
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file}, line {number}: must be a whole line of a run's log ({error}); it was edited or damaged; "
                f"put it back, or run the command again into another folder"
            ) from error
    return found


def first_step(folder: Path) -> StepLine | None:
    """The first line of `stats.jsonl`, without the others; None if there is none."""
    file = folder / StepLine.log
    if not file.exists():
        return None
    with file.open(encoding="utf-8") as stream:
        text = stream.readline()
    return StepLine.of(json.loads(text)) if text.endswith("\n") else None


def array(values: Numbers | Sequence[Numbers]) -> Array:
    """(K,) numbers, or (S, K) of S lines; NaN where null."""
    return np.array(values, dtype=np.float64)


def plain(values: Array) -> Any:
    """Numbers as JSON has them: what is not finite is null."""
    if values.ndim == 0:
        return float(values) if np.isfinite(values) else None
    return [x if np.isfinite(x) else None for x in values.tolist()]
