"""HumanEval: the harness's prompts and tests, and programs that are run in the sandbox alone."""

from pathlib import Path
from typing import Any

import pytest
from evaluation_data import DATA, problem, published, write
from evaluation_runs import lend, tiny_tokenizer

from acodm_env.experiments.evaluation.harness import humaneval
from acodm_env.experiments.evaluation.harness import run as harness
from acodm_env.experiments.evaluation.harness import task_names as harness_tasks
from acodm_env.experiments.evaluation.harness.local_data import read_humaneval
from acodm_env.experiments.evaluation.scores import ABOVE, AT
from acodm_env.pretrain.models import build_model

lm_eval = pytest.importorskip("lm_eval")
sandbox = pytest.importorskip("acodm_env.experiments.evaluation.sandbox.execute")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
OWN = Path(lm_eval.__file__).parent / "tasks" / "humaneval" / "humaneval.yaml"


@pytest.fixture(scope="module")
def narrow(tiny_corpus: Path) -> Any:
    tokenizer = tiny_tokenizer(tiny_corpus)
    return lend(build_model("tiny", len(tokenizer), 64, seed=0), tokenizer, context=64)


@published
def test_prompts_and_tests_equal_the_harness_own(tmp_path: Path) -> None:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    own = load_yaml(OWN, resolve_func=False)  # its functions run code when they are imported
    (config,) = harness_tasks.inline_humaneval(read_humaneval(DATA), tmp_path)
    source = {key: config[key] for key in ("dataset_path", "dataset_kwargs", "metric_list")}
    theirs = ConfigurableTask(config={key: own[key] for key in own if key != "filter_list"} | source)
    mine = harness_tasks._load([config])["tasks"]["humaneval"]
    for task in (theirs, mine):
        task.build_all_requests(limit=20)
    assert len(mine.instances) == 20
    assert [one.args for one in mine.instances] == [one.args for one in theirs.instances]
    for document in list(mine.test_docs())[:20]:
        assert mine.doc_to_target(document) == theirs.doc_to_target(document)
    assert own["generation_kwargs"]["max_gen_toks"] == humaneval.HARNESS_MAX_GEN_TOKS
    assert own["metric_list"][0]["k"] == [1]


def test_a_program_is_what_code_eval_executes() -> None:
    row = problem()
    tests = row["test"] + "\ncheck(f)"
    assert humaneval.program(row["prompt"], row["canonical_solution"], tests) == (
        "def f():\n    return 1\n\ndef check(candidate):\n    assert candidate() == 1\n\ncheck(f)"
    )


@published
def test_two_problems_end_to_end(narrow: Any, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, int, int]] = []
    notes: list[str] = []
    (scores,) = harness.run_tasks(
        narrow, ["humaneval"], num_fewshot=5, limit=2, batch_size=None, data=DATA, allow_code_execution=True,
        on_note=notes.append, on_progress=lambda *now: seen.append(now),
    )  # fmt: skip
    (metric,) = scores.metrics
    assert (metric.name, metric.value, metric.chance, metric.verdict, metric.num_items) == ("pass@1", 0.0, 0.0, AT, 2)
    assert [item["id"] for item in scores.items] == ["HumanEval/0", "HumanEval/1"]
    assert all(item["pass@1"] == 0.0 and item["reason"] and "completion" in item for item in scores.items)
    facts = scores.facts
    assert (facts["max_gen_toks"], facts["harness_max_gen_toks"]) == (32, 1024)
    assert facts["num_fewshot"] == 0  # the task fixes it
    assert facts["num_truncated"] == 2
    assert (facts["context"], facts["prompt_tokens"]) == (64, 32)
    words = "2 of 2 prompts are longer than the 32 tokens that the context of 64 leaves beside a completion"
    assert any(words in note for note in notes)
    assert facts["dataset"] == harness.data_checksums("humaneval", DATA)
    assert facts["sandbox"] == sandbox.protections()
    assert facts["complete"] is True
    assert seen[-1] == ("humaneval programs", 2, 2)
    assert capfd.readouterr() == ("", "")


def test_passes_are_counted() -> None:
    row = problem()
    answers = ["    return 1\n", "    return 2\n", "    while True: pass\n", "    import sys; sys.exit(0)\n"]
    samples = [
        {"doc": row | {"task_id": f"HumanEval/{number}"}, "resps": [[answer]], "target": row["test"] + "\ncheck(f)"}
        for number, answer in enumerate(answers)
    ]
    (metric,), items, facts = humaneval.scored(samples, lambda done, total: None)
    assert [item["pass@1"] for item in items] == [1.0, 0.0, 0.0, 0.0]
    assert metric.value == 0.25
    assert metric.verdict == ABOVE
    assert "AssertionError" in items[1]["reason"]
    assert facts["sandbox_seconds"] > 0


def test_local_file_of_other_size_is_told(narrow: Any, tmp_path: Path) -> None:
    write(tmp_path / "HumanEval.jsonl", [problem()])
    notes: list[str] = []
    (scores,) = harness.run_tasks(
        narrow, ["humaneval"], num_fewshot=None, limit=None, batch_size=1, data=tmp_path, allow_code_execution=True,
        on_note=notes.append,
    )  # fmt: skip
    assert scores.facts["data"] == {"problems": 1}
    assert any("hold 1 problems, which is not the published number" in note for note in notes)


@published
@pytest.mark.slow
def test_all_canonical_solutions_pass() -> None:
    samples = [
        {"doc": row, "resps": [[row["canonical_solution"]]], "target": f"{row['test']}\ncheck({row['entry_point']})"}
        for row in read_humaneval(DATA).problems
    ]
    (metric,), items, _ = humaneval.scored(samples, lambda done, total: None)
    assert {item["id"]: item["reason"] for item in items if not item["pass@1"]} == {}
    assert (metric.value, metric.num_items) == (1.0, 164)
