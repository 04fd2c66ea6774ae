"""The harness's samples as metrics and items: intervals, chance levels, and one record per question."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acodm_env.errors import DataError
from acodm_env.experiments.evaluation.chance import accuracy, commonest, mean, rarest
from acodm_env.experiments.evaluation.scores import Metric

Sample = dict[str, Any]
Item = dict[str, Any]
_ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")


def summarised(task: str, results: dict[str, Any], model: Path) -> tuple[list[Metric], list[Item]]:
    """Metrics (the whole task's first, then its groups') and items of a task of the harness.

    A tag or group for which the harness has no value of its own gets one only where it is a mean over all items of like
    parts: same kind of question, same metrics, as many choices. Otherwise its parts are told alone.

    Args:
        task: the name that was asked for: a task, a group or a tag.
        results: what the harness's `evaluate` gave.
        model: the model's folder, for the message.

    Raises:
        DataError: the model's scores of answers are not finite.
    """
    items: list[Item] = []
    metrics: list[Metric] = []
    whole = _Part(task, "", results)
    parts = []
    heads = (f"{task}_", f"{task.partition('_')[0]}_")  # the second of mmlu_stem and its subjects
    shared = next((head for head in heads if all(leaf.startswith(head) for leaf in results["samples"])), "")
    for leaf, samples in results["samples"].items():
        group = "" if leaf == task else leaf.removeprefix(shared)
        part = _Part(leaf, group, results)
        records = part.read(samples, model)
        whole.take(part)
        items += records
        parts += [part] if group else []
    for part in [whole, *parts]:
        metrics += part.metrics(task)
    return metrics, items


class _Part:
    """One task of the harness, or several together: the values of each metric, and what guessing would score."""

    def __init__(self, name: str, group: str, results: dict[str, Any]):
        self.group = group
        self.official: dict[str, Any] = results["results"].get(name, {})
        self.directions: dict[str, bool] = dict(results.get("higher_is_better", {}).get(name, {}))
        self.kind = results.get("configs", {}).get(name, {}).get("output_type")
        self.values: dict[str, list[float]] = {}
        self.num_items = 0
        self.chances: list[float] = []  # per item, only of multiple choice
        self.answers: list[int | None] = []  # None: not a plain index
        self.choices: set[tuple[str, ...]] = set()
        self.parts: list[_Part] = []

    def take(self, other: "_Part") -> None:
        """Add another part's items."""
        self.parts.append(other)
        for key, values in other.values.items():
            self.values.setdefault(key, []).extend(values)
        self.directions = {**other.directions, **self.directions}
        self.num_items += other.num_items
        self.chances += other.chances
        self.answers += other.answers
        self.choices |= other.choices

    def read(self, samples: Sequence[Sample], model: Path) -> list[Item]:
        """A record per item; filters of the same item become metrics of their own."""
        label = self.group or str(self.official.get("name") or "item")
        filters = {sample["filter"] for sample in samples}
        items: dict[int, Item] = {}
        for sample in samples:
            item = items.setdefault(sample["doc_id"], {"id": f"{label}/{sample['doc_id']}", "group": self.group})
            if self.kind == "multiple_choice" and len(item) == 2:
                item |= self._choice(sample, model)
            for name in sample["metrics"]:
                key = name if len(filters) == 1 else f"{name},{sample['filter']}"
                self.directions.setdefault(key, self.directions.get(name, True))
                values = self.values.setdefault(key, [])
                if isinstance(sample[name], int | float) and math.isfinite(sample[name]):  # pairs only count together
                    item[key] = float(sample[name])
                    values.append(item[key])
        self.num_items = len(items)
        return list(items.values())

    def _choice(self, sample: Sample, model: Path) -> Item:
        """What was chosen and what is right, where that is an index; notes what guessing would score."""
        scores = [float(score) for score, _ in sample["filtered_resps"]]
        if not all(map(math.isfinite, scores)):
            raise DataError(
                f"{model}: the model's scores of answers must be finite; {sample['arguments'][0][0][-60:]!r} got "
                f"{scores}; it has diverged or its weights are damaged; evaluate another checkpoint"
            )
        answers = [argument[1] for argument in sample["arguments"]]
        unconditional = sum(argument[0] == "" for argument in sample["arguments"])  # asked for mutual information
        if 0 < unconditional < len(answers):
            answers, scores = answers[:-unconditional], scores[:-unconditional]
        target = sample["target"]
        self.chances.append((len(target) if isinstance(target, list) else 1) / len(answers))
        self.choices.add(tuple(answers))
        self.answers.append(target if isinstance(target, int) else None)
        if not isinstance(target, int):
            return {}
        return {"predicted": max(range(len(scores)), key=scores.__getitem__), "answer": target}

    def metrics(self, task: str) -> list[Metric]:
        """Each metric's value, with an interval where it is a mean over items."""
        return [metric for key in self.values if (metric := self._metric(task, key)) is not None]

    def _metric(self, task: str, key: str) -> Metric | None:
        values, official = self.values[key], self._official(key)
        higher = self.directions.get(key, True)
        if official is None and not self._pools(key):
            return None
        if official is not None and not self._is_mean(key):  # no mean over items: told as it is
            return Metric(
                task=task, name=key, group=self.group, value=official, num_items=self.num_items, unit="",
                higher_is_better=higher,
            )  # fmt: skip
        if any(value not in (0, 1) for value in values) or not higher:
            return mean(values, task=task, name=key, group=self.group, higher_is_better=higher)
        chance = constant = least = None
        if key in _ACCURACIES and len(self.chances) == len(values):
            chance = math.fsum(self.chances) / len(values)
            if len(self.choices) == 1 and None not in self.answers:
                constant, least = commonest(self.answers), rarest(self.answers, len(next(iter(self.choices))))
        return accuracy(values, task=task, name=key, group=self.group, chance=chance, constant=constant, least=least)

    def _is_mean(self, key: str) -> bool:
        """Whether the harness's own value of a metric is the mean over the items."""
        values, official = self.values.get(key), self._official(key)
        if not values or official is None:
            return False
        return math.isclose(official, math.fsum(values) / len(values), rel_tol=1e-9)

    def _pools(self, key: str) -> bool:
        """Whether all items together have a mean that says something: of parts that are means, and alike."""
        kinds = {(part.kind, frozenset(part.values), frozenset(map(len, part.choices))) for part in self.parts}
        return len(kinds) == 1 and all(part._is_mean(key) for part in self.parts)

    def _official(self, key: str) -> float | None:
        """The harness's own value of a metric; its keys are "METRIC,FILTER"."""
        for name, value in self.official.items():
            if (
                (name == key or name.partition(",")[0] == key)
                and isinstance(value, int | float)
                and math.isfinite(value)
            ):
                return float(value)
        return None
