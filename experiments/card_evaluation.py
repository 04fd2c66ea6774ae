"""The evaluation on a model's card: the table of an `evaluation.json`, with what is no better than guessing marked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acodm_env.evaluation.scores import AT, BELOW
from acodm_env.experiments.policy_card import markdown_table
from acodm_env.files import read_json

MARKS = {AT: "≈ chance", BELOW: "below chance"}
MOST_GROUPS = 20
"""A task with more groups than these is told as a whole."""
_CONDITIONS = ("split", "context", "stride", "num_fewshot", "limit", "harness_version")


def evaluation_section(file: Path, weights_sha256: str) -> str:
    """The table of an `evaluation.json`, with scores that are not distinguishable from chance marked as such.

    Args:
        file: may be absent.
        weights_sha256: results of other weights are left out, and this is said.
    """
    record = read_json(file) if file.exists() else {}
    record = record if isinstance(record, dict) else {}
    model = record.get("model")
    of = model.get("sha256") if isinstance(model, dict) else None
    found = record.get("results")
    metrics = [row for row in found if _is_metric(row)] if isinstance(found, list) else []
    if metrics and of not in (None, weights_sha256):
        return "There is an evaluation, but of other weights than these; it is left out."
    if not metrics:
        return "Not evaluated beyond the held-out losses above."
    rows = [_metric_row(metric) for metric in _shown(metrics)]
    header = ("task", "group", "metric", "value", "95 % interval", "items", "chance", "")
    parts = [markdown_table(header, rows), *_conditions(record.get("tasks"))]
    if any(metric.get("verdict") in MARKS for metric in metrics):
        parts.append(
            f"A score marked *{MARKS[AT]}* is not distinguishable from guessing, and one marked *{MARKS[BELOW]}* is "
            f"worse: neither shows that the model can do the task, and neither is a baseline to be proud of beating."
        )
    return "\n\n".join(parts)


def _is_metric(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("task"), str) and isinstance(row.get("name"), str)


def _shown(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Whole tasks, and the groups of those that have few."""
    groups: dict[str, set[str]] = {}
    for metric in metrics:
        groups.setdefault(metric["task"], set()).add(metric.get("group") or "")
    return [m for m in metrics if not m.get("group") or len(groups[m["task"]] - {""}) <= MOST_GROUPS]


def _metric_row(metric: Mapping[str, Any]) -> tuple[str, ...]:
    value, error, low, high = (_number(metric.get(key)) for key in ("value", "stderr", "low", "high"))
    unit = metric.get("unit")
    return (
        metric["task"],
        metric.get("group") or ("unweighted mean" if metric["task"].startswith("perplexity") else "all"),
        metric["name"] if unit in (None, "fraction", metric["name"]) else f"{metric['name']}, {unit}",
        value if "–" in (value, error) else f"{value} ± {error}",
        "–" if "–" in (low, high) else f"{low} … {high}",
        f"{metric.get('num_items', 0):,}",
        _number(metric.get("chance")),
        MARKS.get(str(metric.get("verdict")), ""),
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"


def _conditions(tasks: Any) -> list[str]:
    """How each task was put: split, context, shots, limit, as far as it is recorded."""
    lines = []
    for name, entry in tasks.items() if isinstance(tasks, dict) else ():
        facts = entry.get("facts") if isinstance(entry, dict) else None
        facts = facts if isinstance(facts, dict) else {}
        told = [f"{key} {facts[key]}" for key in _CONDITIONS if facts.get(key) is not None]
        lines += [f"- {name}: {', '.join(told)}"] if told else []
    return ["\n".join(lines)] if lines else []
