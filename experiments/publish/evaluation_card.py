"""The evaluation on a model's card: the table of an `evaluation.json`, with what is no better than guessing marked.

What makes a number another one than its row seems to say is said in the row itself: a trial on a few items, other data
than the run's, settings other than those of a second result of the same task.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acodm_env.experiments.evaluation.scores import AT, BELOW
from acodm_env.experiments.publish.policy_card import markdown_table
from acodm_env.files import read_json

MARKS = {AT: "≈ chance", BELOW: "below chance"}
OTHER_DATA = "other data than the run's"
MOST_GROUPS = 20
"""A task with more groups than these is told as a whole."""
_CONDITIONS = {
    "split": "split",
    "context": "context",
    "stride": "stride",
    "num_fewshot": "num_fewshot",
    "limit": "limit",
    "precision": "precision",
    "harness_version": "harness_version",
    "data": "questions from local files",
    "reencoded": "texts encoded again by the model's tokenizer",
    "corpus_fingerprint": "corpus",
}
"""What is told of every result, by its name in the record."""
_SETTINGS = (*_CONDITIONS, "tokenizer_sha256")
"""What two results of a task may differ in."""
_ABSENT = {"data": "questions from the hub", "reencoded": "texts as the corpus encoded them"}
_HASHES = ("data", "corpus_fingerprint", "tokenizer_sha256")


def evaluation_section(file: Path, weights_sha256: str, corpus_fingerprint: str | None = None) -> str:
    """The table of an `evaluation.json`, with scores that are not distinguishable from chance marked as such.

    Args:
        file: may be absent.
        weights_sha256: results of other weights are left out, and this is said.
        corpus_fingerprint: of the run's corpus; a perplexity on another one is marked. None marks none.
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
    settings = _settings(record.get("tasks"))
    remarks = {name: _remarks(name, settings, corpus_fingerprint) for name in settings}
    rows = [_metric_row(metric, remarks.get(metric["task"], [])) for metric in _shown(metrics)]
    header = ("task", "group", "metric", "value", "95 % interval", "items", "chance", "")
    parts = [markdown_table(header, rows), *_conditions(settings)]
    if any(OTHER_DATA in told for told in remarks.values()):
        parts.append(
            f"A perplexity marked *{OTHER_DATA}* was not measured on the corpus and domains that the model was trained "
            f"on (fingerprint `{str(corpus_fingerprint)[:12]}`), but on those whose fingerprint is told: it compares "
            f"only with others on the same."
        )
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


def _metric_row(metric: Mapping[str, Any], remarks: Sequence[str]) -> tuple[str, ...]:
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
        "; ".join(filter(None, [MARKS.get(str(metric.get("verdict"))), *remarks])),
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"


# --- how each result was made -----------------------------------------------------------------------------


def _settings(tasks: Any) -> dict[str, dict[str, Any]]:
    """By result: its task, and what is recorded of how it was made."""
    found = {}
    for name, entry in tasks.items() if isinstance(tasks, dict) else ():
        parts = [entry.get(key) for key in ("identity", "facts")] if isinstance(entry, dict) else []
        merged = {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}
        told = {key: merged[key] for key in _SETTINGS if merged.get(key) is not None and merged[key] is not False}
        found[name] = {"task": merged.get("task", name), **told}
    return found


def _remarks(name: str, settings: Mapping[str, Mapping[str, Any]], corpus_fingerprint: str | None) -> list[str]:
    """What a row must say of the result `name`: a trial, other data, and what its namesakes were made without."""
    own = settings[name]
    remarks = []
    if "limit" in own:
        what = "documents of every domain" if own["task"] == "perplexity" else "items of each of its parts"
        remarks.append(f"a trial: at most {own['limit']} {what}")
    if corpus_fingerprint and own.get("corpus_fingerprint", corpus_fingerprint) != corpus_fingerprint:
        remarks.append(OTHER_DATA)
    others = [other for key, other in settings.items() if key != name and other["task"] == own["task"]]
    differing = [key for key in _SETTINGS if any(other.get(key) != own.get(key) for other in others)]
    return remarks + [_told(key, own.get(key)) for key in differing if key != "limit"]


def _conditions(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How each task was put: split, context, shots, precision, as far as it is recorded."""
    lines = []
    for name, own in settings.items():
        told = [_told(key, own[key]) for key in _CONDITIONS if key in own]
        lines += [f"- {name}: {', '.join(told)}"] if told else []
    return ["\n".join(lines)] if lines else []


def _told(key: str, value: Any) -> str:
    """A setting in words; None or absent is that it was not so."""
    label = _CONDITIONS.get(key, "tokenizer")
    if value is None:
        return _ABSENT.get(key, f"{label} as the task has it")
    if value is True:
        return label
    if key == "data":
        value = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return f"{label} `{str(value)[:12]}`" if key in _HASHES else f"{label} {value}"
