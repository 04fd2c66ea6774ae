"""The harness's own tasks: metrics, filters and groups as the harness names them."""

from pathlib import Path
from typing import Any

import pytest
from evaluation_runs import lend, run

from acodm_env.errors import ConfigError
from acodm_env.evaluation.scores import Metric, TaskScores

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
    assert {item["group"] for item in scores.items} == {"choice", "write"}
    assert len({item["id"] for item in scores.items}) == 10


def test_an_answer_longer_than_the_context(loaded: Any, zoo: Path) -> None:
    text = (zoo / "choice.yaml").read_text().replace('"dog"', f'"{"dog " * 40}"')
    (zoo / "choice.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"context=16: must be at least \d+ tokens"):
        run(lend(loaded.model, loaded.tokenizer, context=16), "zoo_choice", None)
