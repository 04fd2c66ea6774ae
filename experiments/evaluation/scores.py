"""What an evaluation gives, whatever the task: metrics with intervals, and a record per item so that models compare.

An item is a JSON object with ``id`` (unique within the task: "abstract_algebra/12", "web/7"), ``group`` (subject,
domain, "" if the task has none) and its numbers. Two models compare item by item where the ids are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ABOVE = "above chance"
AT = "not distinguishable from chance"
BELOW = "below chance"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a task, over all its items or over a group of them."""

    task: str
    """Name of the task: perplexity, mmlu, humaneval, or the harness's."""
    name: str
    """Name of the metric: "acc", "pass@1", "loss", "perplexity", "bits_per_byte", …"""
    value: float | None
    """None where there is none: a mean over nothing."""
    group: str = ""
    """Subject or domain; "" is the whole task."""
    stderr: float | None = None
    """Standard error of `value`; None where it is not known."""
    low: float | None = None
    high: float | None = None
    """95 % interval; None where there is none."""
    num_items: int = 0
    """Questions, problems or documents behind it."""
    unit: str = "fraction"
    """"fraction", "nats/token", "bits/byte", "perplexity", …"""
    higher_is_better: bool = True
    chance: float | None = None
    """What guessing scores; None where guessing is not defined."""
    constant: float | None = None
    """The most that always giving the same answer scores on these items; None where that is not defined."""
    verdict: str | None = None
    """`ABOVE`, `AT` or `BELOW`; None where there is no chance level."""


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """A task's outcome for one model."""

    task: str
    metrics: Sequence[Metric]
    """The whole task's first, then its groups'."""
    items: Sequence[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    """What has to be equal, or known, to read the numbers: shots, stride, items cut to the context, data's checksum."""
