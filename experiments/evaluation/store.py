"""Where an evaluation reads and writes: a model's folder, `evaluation.json` beside it, and a file of items per result.

::

    FOLDER/evaluation.json        "model": what was evaluated; "results": one flat list of metrics, each with the fields
                                  of `Metric`; "tasks": by name, what each was made with
    FOLDER/evaluation/NAME.jsonl  a line per item (question, problem, document), by which models compare

A result has a name: its task, and what was asked of it beyond what is usual ("mmlu", "mmlu-5-shot", "mmlu-limit100",
"perplexity-context32", "perplexity-corpus-71d0dadf"). `task` in the list of metrics is that name, so that a trial on a
few items never passes for the whole. Results of other settings stay beside each other; those of other weights or of
another tokenizer go when the model's new ones come.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.errors import DataError
from acodm_env.experiments.evaluation.scores import Metric, TaskScores
from acodm_env.experiments.run.folder import versions
from acodm_env.files import atomic_file, read_json, sha256, write_json

FILE = "evaluation.json"
ITEMS = "evaluation"
FORMAT = 1
MODEL = ("model_sha256", "tokenizer_sha256")
"""What an identity says of the model; the rest says what was asked of it."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A result as it lies on the disk."""

    name: str
    identity: Mapping[str, Any]
    """All that decides its numbers."""
    scores: TaskScores
    """Its items are empty where the file of items is missing or was edited: `whole` tells."""
    whole: bool
    """Whether the items are those that were written."""


class Results:
    """`evaluation.json` and the items of one model; a file that is not there yet holds nothing."""

    def __init__(self, folder: str | Path):
        """Read what is there.

        Raises:
            DataError: the file is not whole, or of another version.
        """
        self.folder = Path(folder)
        self.record: dict[str, Any] = {"format": FORMAT, "model": {}, "results": [], "tasks": {}}
        file = self.folder / FILE
        if not file.exists():
            return
        record = read_json(file)
        if not isinstance(record, dict) or record.get("format") != FORMAT or not _well_formed(record):
            raise DataError(
                f"{file}: must be of format {FORMAT}, with model, results and tasks; it was edited, or written by "
                f"another version; move it away and evaluate again"
            )
        self.record = record

    def names(self) -> list[str]:
        """Names of the results, oldest first."""
        return list(self.record["tasks"])

    def find(self, identity: Mapping[str, Any]) -> str | None:
        """Name of the result that was made with the same, with whole items; None if it is still to be made."""
        plain = json.loads(json.dumps(identity))
        for name, entry in self.record["tasks"].items():
            if entry["identity"] == plain and self._whole(entry):
                return str(name)
        return None

    def has_task(self, task: str) -> bool:
        """Whether there is a result of the task, with whatever settings."""
        return any(entry["identity"].get("task") == task for entry in self.record["tasks"].values())

    def load(self, name: str) -> Stored:
        """A result with its items."""
        entry = self.record["tasks"][name]
        whole = self._whole(entry)
        lines = (self.folder / entry["items"]).read_text(encoding="utf-8").splitlines() if whole else []
        known = {each.name for each in fields(Metric)}
        metrics = [
            Metric(**{key: value for key, value in row.items() if key in known})
            for row in self.record["results"]
            if row["task"] == name
        ]
        items = [json.loads(line) for line in lines]
        scores = TaskScores(task=entry["identity"]["task"], metrics=metrics, items=items, facts=entry["facts"])
        return Stored(name=name, identity=entry["identity"], scores=scores, whole=whole)

    def save(
        self,
        scores: TaskScores,
        identity: Mapping[str, Any],
        about: Mapping[str, Any],
        usual: Mapping[str, Any] | None = None,
    ) -> str:
        """Write a result, items first; what another model left is dropped, what this one has stays.

        Args:
            scores: of one task.
            identity: all that decides its numbers, "task" and "model_sha256" among it.
            about: what may be known of how it was made: device, seconds.
            usual: settings of the identity as they are unless asked for; others become part of the name.

        Returns:
            Its name.

        Raises:
            DataError: the disk is full, or the folder cannot be written.
        """
        plain = json.loads(json.dumps(identity))
        tasks = {
            name: entry
            for name, entry in self.record["tasks"].items()
            if all(entry["identity"].get(key) == plain.get(key) for key in MODEL)
        }
        name = _free_name(plain, tasks, usual or {})
        file = f"{ITEMS}/{name}.jsonl"
        with atomic_file(self.folder / file) as stream:
            for item in scores.items:
                stream.write((json.dumps(_finite(item), allow_nan=False) + "\n").encode())
        tasks[name] = {
            "identity": plain,
            "facts": _finite(scores.facts),
            "num_items": len(scores.items),
            "items": file,
            "items_sha256": sha256(self.folder / file),
            "evaluated": datetime.now().astimezone().isoformat(timespec="seconds"),
            "versions": versions(),
            **_finite(about),
        }
        rows = [row for row in self.record["results"] if row["task"] in tasks and row["task"] != name]
        rows += [{**_finite(asdict(metric)), "task": name} for metric in scores.metrics]
        model = {"sha256": plain["model_sha256"], "tokenizer_sha256": plain.get("tokenizer_sha256")}
        self.record = {"format": FORMAT, "model": model, "results": rows, "tasks": tasks}
        write_json(self.folder / FILE, self.record)
        return name

    def _whole(self, entry: Mapping[str, Any]) -> bool:
        file = self.folder / str(entry.get("items"))
        return file.is_file() and sha256(file) == entry.get("items_sha256")


def _well_formed(record: Mapping[str, Any]) -> bool:
    tasks, rows = record.get("tasks"), record.get("results")
    return (
        isinstance(tasks, dict)
        and isinstance(rows, list)
        and all(isinstance(row, dict) and {"task", "name", "value"} <= row.keys() for row in rows)
        and all(
            isinstance(entry, dict) and {"identity", "facts", "items"} <= entry.keys() and "task" in entry["identity"]
            for entry in tasks.values()
        )
    )


def _free_name(identity: Mapping[str, Any], tasks: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """The name that a result of the same identity has, or a new one."""
    same = [name for name, entry in tasks.items() if entry["identity"] == identity]
    stem = result_name(identity, usual)
    names = [*same, stem, *(f"{stem}-{count}" for count in range(2, len(tasks) + 3))]
    return next(name for name in names if name in same or name not in tasks)


def result_name(identity: Mapping[str, Any], usual: Mapping[str, Any] | None = None) -> str:
    """ "mmlu", "mmlu-5-shot", "perplexity-context32-limit100": the task, and what was asked beyond the defaults.

    Args:
        identity: all that decides the numbers.
        usual: what context, stride, precision and corpus_fingerprint are unless asked for; what it lacks is not named.
    """
    parts = [re.sub(r"[^A-Za-z0-9_.-]+", "_", str(identity["task"]))]
    if identity.get("num_fewshot"):
        parts.append(f"{identity['num_fewshot']}-shot")
    asked = {key: identity[key] for key, value in (usual or {}).items() if key in identity and identity[key] != value}
    if "corpus_fingerprint" in asked:
        parts.append(f"corpus-{str(asked['corpus_fingerprint'])[:8]}")
    parts += [f"{key}{asked[key]}" for key in ("context", "stride") if key in asked]
    parts += [str(asked["precision"])] if "precision" in asked else []
    if identity.get("limit") is not None:
        parts.append(f"limit{identity['limit']}")
    return "-".join(parts)


def _finite(value: Any) -> Any:
    """The same with null for what is not finite, which JSON does not have."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    if isinstance(value, Path):
        return value.name
    return value
