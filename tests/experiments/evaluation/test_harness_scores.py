"""The harness's own tasks: metrics, filters and groups as the harness names them."""

from pathlib import Path
from typing import Any

import pytest
from evaluation_runs import lend, run

from acodm_env.errors import ConfigError
from acodm_env.experiments.evaluation.harness.samples import summarised
from acodm_env.experiments.evaluation.scores import Metric, TaskScores

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.usefixtures("offline"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def by_name(scores: TaskScores) -> dict[tuple[str, str], Metric]:
    return {(metric.group, metric.name): metric for metric in scores.metrics}


def test_other_tasks_keep_the_harness_names(loaded: Any, zoo: Path) -> None:
    scores, _ = run(loaded, "zoo_choice", None)
    found = by_name(scores)
    assert set(found) == {("", "acc"), ("", "acc_norm"), ("", "f1")}
    assert found["", "acc"].chance == 0.5
    assert found["", "acc"].constant == 3 / 5
    assert found["", "f1"].value is not None
    assert (found["", "f1"].stderr, found["", "f1"].chance, found["", "f1"].num_items) == (None, None, 5)
    assert set(scores.items[1]) == {"id", "group", "predicted", "answer", "acc", "acc_norm"}
    assert [item["id"] for item in scores.items] == [f"zoo_choice/{number}" for number in range(5)]
    assert [item["answer"] for item in scores.items] == [0, 1, 0, 1, 0]


def test_filters_and_long_completions(loaded: Any, zoo: Path) -> None:
    scores, _ = run(loaded, "zoo_write", None, limit=2)
    found = by_name(scores)
    assert set(found) == {("", "exact_match,strict"), ("", "exact_match,digits")}
    assert found["", "exact_match,strict"].chance is None
    assert scores.facts["max_gen_toks"] == 64  # half of the context, not the 1,000 that were asked for
    assert len(scores.items) == 2


def test_groups_come_after_the_whole(loaded: Any, zoo: Path) -> None:
    scores, _ = run(loaded, "zoo", None)
    found = by_name(scores)
    assert found["", "acc"].value == found["choice", "acc"].value
    assert ("write", "exact_match,strict") in found
    assert ("", "exact_match,strict") not in found  # the harness has none for the group
    assert {item["group"] for item in scores.items} == {"choice", "write"}
    assert len({item["id"] for item in scores.items}) == 10


def test_an_answer_longer_than_the_context(loaded: Any, zoo: Path) -> None:
    text = (zoo / "choice.yaml").read_text().replace('"dog"', f'"{"dog " * 40}"')
    (zoo / "choice.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"context=16: must be at least \d+ tokens"):
        run(lend(loaded.model, loaded.tokenizer, context=16), "zoo_choice", None)


def part(name: str, values: list[float], official: float | None = None, **changes: Any) -> dict[str, Any]:
    """One task's share of what the harness gives: accuracies of a question with two choices."""
    shape = {"kind": "multiple_choice", "choices": ["a", "b"], "metric": "acc"} | changes
    samples = [
        {
            "doc_id": place, "filter": "none", "metrics": [shape["metric"]], shape["metric"]: value, "target": 0,
            "arguments": [("q", choice) for choice in shape["choices"]],
            "filtered_resps": [(0.0, False)] * len(shape["choices"]),
        }
        for place, value in enumerate(values)
    ]  # fmt: skip
    own = sum(values) / len(values) if official is None else official
    return {"name": name, "samples": samples, "official": {f"{shape['metric']},none": own}, "kind": shape["kind"]}


def whole(task: str, *parts: dict[str, Any], official: dict[str, Any] | None = None) -> list[Metric]:
    results = {
        "samples": {one["name"]: one["samples"] for one in parts},
        "results": {one["name"]: one["official"] for one in parts} | ({task: official} if official else {}),
        "configs": {one["name"]: {"output_type": one["kind"]} for one in parts},
    }
    return [metric for metric in summarised(task, results, Path("model"))[0] if not metric.group]


def test_a_tag_gets_a_value_only_where_it_is_a_mean_of_like_parts() -> None:
    (metric,) = whole("zoo", part("zoo_a", [1.0, 0.0, 0.0]), part("zoo_b", [1.0]))
    assert (metric.name, metric.value, metric.num_items, metric.chance) == ("acc", 0.5, 4, 0.5)
    for other in (
        part("zoo_b", [1.0], kind="loglikelihood"),  # another kind of question
        part("zoo_b", [1.0], choices=["a", "b", "c"]),  # more choices
        part("zoo_b", [1.0], metric="mcc"),  # another metric
        part("zoo_b", [-7.0], official=1096.6),  # no mean: the harness takes the exponential
    ):
        assert whole("zoo", part("zoo_a", [1.0, 0.0]), other) == []
    (metric,) = whole("zoo", part("zoo_a", [1.0, 0.0]), part("zoo_b", [1.0]), official={"acc,none": 0.75})
    assert (metric.value, metric.stderr) == (0.75, None)  # the harness weighs by part


def test_perplexities_are_not_pooled_from_log_likelihoods() -> None:
    parts = [
        part(name, [-2.0, -4.0], official=20.1, kind="loglikelihood", metric="perplexity")
        for name in ("lambada_openai", "lambada_standard")
    ]
    assert whole("lambada", *parts) == []


def test_a_part_without_a_value_of_the_harness_has_none() -> None:
    odd = part("zoo_a", [1.0, 0.0]) | {"official": {"acc,none": float("nan")}}
    assert whole("zoo", odd) == []
    results = {"samples": {"zoo_a": odd["samples"]}, "results": {"zoo_a": odd["official"]}}
    assert summarised("zoo", results, Path("model"))[0] == []


@pytest.mark.parametrize(
    ("task", "leaves", "groups"),
    [
        ("mmlu_stem", ("mmlu_anatomy", "mmlu_astronomy"), ["anatomy", "astronomy"]),
        ("zoo_big", ("zoo_big_a", "zoo_a"), ["big_a", "a"]),
        ("glue", ("cola", "mnli"), ["cola", "mnli"]),
    ],
)
def test_names_of_groups(task: str, leaves: tuple[str, str], groups: list[str]) -> None:
    parts = [part(leaf, [1.0]) for leaf in leaves]
    results = {
        "samples": {one["name"]: one["samples"] for one in parts},
        "results": {one["name"]: one["official"] for one in parts},
    }
    metrics, items = summarised(task, results, Path("model"))
    assert [metric.group for metric in metrics if metric.group] == groups
    assert [item["id"] for item in items] == [f"{group}/0" for group in groups]


def test_a_context_without_room_for_a_completion(loaded: Any, zoo: Path) -> None:
    with pytest.raises(ConfigError, match=r"context=1: must be at least 2 tokens for a task that writes"):
        run(lend(loaded.model, loaded.tokenizer, context=1), "zoo_write", None)
    run(lend(loaded.model, loaded.tokenizer, context=2), "zoo_write", None, limit=1)
