"""Two models on the same items: differences with intervals, and whether they show anything.

The items are drawn again with replacement, both models' numbers of an item together (`bootstrap`); how
much a model would differ if it were trained again is no part of it. Domains are strata of the unweighted mean.
Where items are right or wrong, an exact sign test over those that differ has to agree: of four items, all of one sign,
the bootstrap's interval leaves out 0, but p is 0.125.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.errors import ConfigError
from acodm_env.experiments.evaluation.items import Pair, PairedItems, sign_test
from acodm_env.experiments.evaluation.scores import AT, BELOW, Metric
from acodm_env.experiments.evaluation.store import Stored
from acodm_env.files import write_json
from acodm_env.step_stats import Array

if TYPE_CHECKING:
    from acodm_env.experiments.evaluation.bootstrap import Estimate

EQUAL = ("split", "limit", "num_fewshot", "data", "corpus_fingerprint", "stride", "harness_version", "precision")
"""Settings without which two results are not of the same items, or not asked in the same way."""
BOTH_AT_CHANCE = "both at chance: not a comparison"
NO_DIFFERENCE = "no difference shown"
MOST_GROUPS = 24
"""Groups up to which each is shown: The Pile's 22 domains are, MMLU's 57 subjects are not."""
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """A model minus the reference, on one metric."""

    result: str
    """Name of the result: the task and what was asked of it."""
    metric: str
    group: str
    """Domain or subject; "" is the whole task."""
    run: str
    reference: str
    value: float
    reference_value: float
    difference: float
    low: float | None
    high: float | None
    """95 % interval of the difference; None where there are too few items."""
    num_items: int
    unit: str
    verdict: str
    """"better", "worse", `NO_DIFFERENCE`, `BOTH_AT_CHANCE`, or "not decided" without an interval."""
    note: str = ""


def compare_all(
    found: Mapping[str, Sequence[Stored]], reference: str | None = None, seed: int = 0
) -> list[PairedDifference]:
    """Every model against one of them, result by result.

    Args:
        found: results by model, each model's of the same tasks in the same order.
        reference: name of the one; default the first.
        seed: of the bootstrap.

    Raises:
        ConfigError: two results are not of equal items; the difference in their settings is named.
    """
    first = reference or next(iter(found))
    return [
        difference
        for name, results in found.items()
        if name != first
        for one, other in zip(results, found[first], strict=True)
        for difference in compare((name, one), (first, other), seed)
    ]


def compare(one: tuple[str, Stored], other: tuple[str, Stored], seed: int = 0) -> list[PairedDifference]:
    """A result of a model minus the same of the reference, on every metric that is a mean over items.

    Args:
        one: name and result of the model.
        other: of the reference.
        seed: of the bootstrap.

    Raises:
        ConfigError: they are not of equal items.
    """
    check_equal(one, other)
    items = PairedItems(_pairs(one, other), seed)
    known = {(metric.name, metric.group): metric for metric in other[1].scores.metrics}
    found = []
    for metric in one[1].scores.metrics:
        twin = known.get((metric.name, metric.group))
        if twin is None or (metric.group and len(items.groups) > MOST_GROUPS) or _incomparable(metric, one, other):
            continue
        difference = _difference(metric, twin, items, (one[0], other[0]))
        if difference is not None:
            found.append(difference)
    return found


def check_equal(one: tuple[str, Stored], other: tuple[str, Stored]) -> None:
    """Refuse two results of different items.

    Raises:
        ConfigError: naming what differs.
    """
    found = [
        (label, {**stored.identity, **{key: stored.scores.facts.get(key) for key in ("num_truncated", "max_gen_toks")}})
        for label, stored in (one, other)
    ]
    check_settings(found[0], found[1])
    for label, stored in (one, other):
        if not stored.whole:
            raise ConfigError(
                f"compare={label}: must have the items of {stored.name}; their file is missing or was edited; evaluate "
                f"again with --fresh"
            )


def check_settings(one: tuple[str, Mapping[str, Any]], other: tuple[str, Mapping[str, Any]]) -> None:
    """Refuse two identities that make unequal items, which is known before anything is measured.

    Args:
        one: name of a model, and the identity of its result; of one that is there also num_truncated, max_gen_toks.
        other: of the reference.

    Raises:
        ConfigError: naming what differs.
    """
    (name, mine), (reference, theirs) = one, other
    task = mine["task"]
    if task != theirs["task"]:
        raise ConfigError(f"compare={name}: must be of {theirs['task']} as {reference} is; it is of {task}")
    cut = mine.get("num_truncated") or theirs.get("num_truncated")
    for key in (*EQUAL, *(["context"] if task == "perplexity" or cut else []), "max_gen_toks"):
        if mine.get(key) != theirs.get(key):
            raise ConfigError(
                f"compare={name}: must have {task} with {key}={_short(theirs.get(key))} as {reference} has; it has "
                f"{_short(mine.get(key))}, so the items are not equal; evaluate both with the same{_remedy(key)}"
            )


def _short(value: Any) -> str:
    text = ", ".join(f"{key} {str(one)[:12]}…" for key, one in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) <= 40 or isinstance(value, dict) else f"{text[:12]}…"


def _remedy(key: str) -> str:
    flags = {"corpus_fingerprint": "corpus", "split": "corpus", "harness_version": "", "max_gen_toks": "context"}
    flag = flags.get(key, key)
    return f" --{flag.replace('_', '-')}" if flag else " lm-eval"


def _pairs(one: tuple[str, Stored], other: tuple[str, Stored]) -> list[Pair]:
    """Items of both, one beside the other."""
    theirs = {item["id"]: item for item in other[1].scores.items}
    ids = [item["id"] for item in one[1].scores.items]
    odd = next(iter({*ids} ^ theirs.keys()), None)
    if odd is not None or len(ids) != len(theirs):
        raise ConfigError(
            f"compare={one[0]}: must have the same items as {other[0]}; {odd} is in one of them only; evaluate both "
            f"again with --fresh"
        )
    return [(item, theirs[item["id"]]) for item in one[1].scores.items]


def tokenizers_differ(one: Stored, other: Stored) -> bool:
    """Whether losses per token do not compare, and only bits per byte do."""
    mine, theirs = (
        stored.scores.facts.get("tokenizer_fingerprint") or stored.identity.get("tokenizer_sha256")
        for stored in (one, other)
    )
    return bool(mine != theirs)


def _incomparable(metric: Metric, one: tuple[str, Stored], other: tuple[str, Stored]) -> bool:
    return metric.name in ("loss", "perplexity") and tokenizers_differ(one[1], other[1])


def _difference(metric: Metric, twin: Metric, items: PairedItems, names: tuple[str, str]) -> PairedDifference | None:
    """None where the values are not there, or are no mean over items."""
    found = items.estimate(metric.name, metric.group)
    if metric.value is None or twin.value is None or found is None or found[0].value is None:
        return None
    estimate, table = found
    if not math.isclose(estimate.value or 0.0, metric.value - twin.value, rel_tol=1e-4, abs_tol=1e-6):
        return None  # the metric is no mean over its items
    verdict, note = _verdict(metric, twin, estimate, table)
    return PairedDifference(
        result=metric.task,
        metric=metric.name,
        group=metric.group,
        run=names[0],
        reference=names[1],
        value=metric.value,
        reference_value=twin.value,
        difference=metric.value - twin.value,
        low=estimate.low,
        high=estimate.high,
        num_items=len(table),
        unit=metric.unit,
        verdict=verdict,
        note=note,
    )


def _verdict(metric: Metric, twin: Metric, found: "Estimate", table: Array) -> tuple[str, str]:
    """The verdict and what is to be said with it."""
    at_chance = [one.verdict in (AT, BELOW) for one in (metric, twin)]
    if all(at_chance):
        return BOTH_AT_CHANCE, ""
    note = "the reference is at chance" if at_chance[1] else "this model is at chance" if at_chance[0] else ""
    if found.low is None or found.high is None:
        return "not decided", "too few items for an interval"
    if found.low <= 0 <= found.high:
        return NO_DIFFERENCE, note
    p_value = sign_test(table)
    if p_value is not None and p_value > 1 - CONFIDENCE:
        return NO_DIFFERENCE, f"too few items differ (exact sign test, p = {p_value:.2g})"
    return ("better" if (found.low > 0) == metric.higher_is_better else "worse"), note


def write_comparison(folder: Path, found: Sequence[PairedDifference], seed: int) -> Path:
    """Write `comparison.json`; returns the file.

    Raises:
        DataError: it cannot be written.
    """
    file = folder / "comparison.json"
    from acodm_env.experiments.evaluation.bootstrap import MANY, NUM_RESAMPLES

    method = f"paired bootstrap over items, {NUM_RESAMPLES} resamples, seed {seed}; below {MANY} linearised, Student t"
    write_json(file, {"method": method, "level": CONFIDENCE, "differences": [asdict(one) for one in found]})
    return file
