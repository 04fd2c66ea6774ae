"""Tiny models, tiny tasks and a tiny index of the harness for the tests of downstream evaluation."""

from pathlib import Path
from typing import Any

import pytest
from evaluation_data import question, write
from evaluation_runs import lend, tiny_tokenizer

from acodm_env.experiments.evaluation.harness import task_names as harness_tasks
from acodm_env.pretrain.models import build_model

CHOICE = """
task: zoo_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["cat", "dog"]
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: f1, aggregation: f1, higher_is_better: true}}
"""
WRITE = """
task: zoo_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 1000}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - {{name: strict, filter: [{{function: take_first}}]}}
  - {{name: digits, filter: [{{function: regex, regex_pattern: "([0-9])"}}, {{function: take_first}}]}}
"""
GROUP = """
group: zoo
task: [zoo_choice, zoo_write]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
"""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub: nothing is looked for there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="session")
def loaded(tiny_corpus: Path) -> Any:
    """A random model with a context of 128 tokens."""
    tokenizer = tiny_tokenizer(tiny_corpus)
    return lend(build_model("tiny", len(tokenizer), 128, seed=0), tokenizer, context=128)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two subjects of 2 examples and 6 questions, whose answers go 0, 1, 2, 3, 0, 1."""
    folder = tmp_path / "data"
    folder.mkdir()
    subjects = ("anatomy", "world_religions")
    write(folder / "mmlu_dev.jsonl", [question(name, number) for name in subjects for number in range(2)])
    write(folder / "mmlu_test.jsonl.gz", [question(name, number) for number in range(6) for name in subjects])
    return folder


@pytest.fixture
def harness_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The harness knows some of its own tasks and those of this folder: its whole index takes seconds to build."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    tasks = Path(lm_eval.__file__).parent / "tasks"
    folders = [tasks / "mmlu" / "default", tasks / "humaneval", tasks / "mbpp", tasks / "arc", tmp_path / "more"]
    index: list[Any] = []

    def manager() -> Any:
        if not index:
            index.append(TaskManager(include_path=list(map(str, folders)), include_defaults=False))
        return index[0]

    (tmp_path / "more").mkdir()
    monkeypatch.setattr(harness_tasks, "manager", manager)
    return tmp_path / "more"


@pytest.fixture
def zoo(harness_index: Path) -> Path:
    rows = [{"question": f"q{number}", "answer": number % 2} for number in range(5)]
    write(harness_index / "rows.jsonl", rows)
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (harness_index / f"{name}.yaml").write_text(text.format(path=harness_index / "rows.jsonl"))
    (harness_index / "group.yaml").write_text(GROUP)
    return harness_index
