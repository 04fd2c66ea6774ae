"""Downstream tasks that cannot be run are refused first, with what to do."""

from pathlib import Path
from typing import Any

import pytest
from evaluation_data import question, write
from evaluation_runs import run

from acodm_env.errors import ConfigError, DataError
from acodm_env.evaluation import harness, harness_tasks

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.usefixtures("offline"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


# --- refusals ----------------------------------------------------------------------------------------------


def check(*names: str, data: Path | None = None, **changes: Any) -> None:
    harness.check_tasks(names, data, **({"allow_code_execution": False} | changes))


def test_an_unknown_task_is_refused_with_suggestions(harness_index: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tasks=mmlu_anatmy: must be .*did you mean 'mmlu_anatomy'"):
        check("mmlu_anatmy")
    with pytest.raises(ConfigError, match="did you mean 'perplexity'"):
        check("perplexiti")
    with pytest.raises(ConfigError, match="`lm-eval ls tasks` lists them") as caught:
        check("zzzzzzzz")
    assert len(str(caught.value)) < 250


@pytest.mark.slow
def test_suggestions_from_all_of_the_harness_names() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*'hellaswag'"):
        check("helaswag")


def test_data_that_are_nowhere(harness_index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError) as caught:
        check("mmlu")
    words = str(caught.value)
    assert words.startswith("dataset=cais/mmlu: ")
    for part in (
        "HF_HUB_OFFLINE",
        "--data DIR with mmlu_dev.jsonl.gz and mmlu_test.jsonl.gz",
        "load_dataset",
        "cais___mmlu",
    ):
        assert part in words
    with pytest.raises(DataError, match=r"dataset=allenai/ai2_arc: .*copy the folder allenai___ai2_arc"):
        check("arc_easy")
    with pytest.raises(DataError, match=r"--data DIR with HumanEval\.jsonl\.gz"):
        check("humaneval", allow_code_execution=True)
    (tmp_path / "cache" / "allenai___ai2_arc").mkdir(parents=True)
    check("arc_easy")  # what the cache holds shows when it is loaded
    with pytest.raises(DataError, match=r"tasks=arc_easy: its data must be whole; .*ai2_arc"):
        harness_tasks.load_tasks("arc_easy", None, tmp_path)


def test_code_is_not_run_unless_allowed_and_only_for_humaneval(harness_index: Path, small: Path) -> None:
    with pytest.raises(ConfigError, match=r"allow_code_execution=False: .*--allow-code-execution"):
        check("humaneval", data=small)
    for name in ("mbpp", "humaneval_64"):
        with pytest.raises(ConfigError, match=f"tasks={name}: must not execute .*only humaneval is supported"):
            check(name, allow_code_execution=True)


def test_the_harness_is_not_installed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tasks=mmlu: .*pip install 'acodm\[eval\]'"):
        check("mmlu", data=small)


def test_settings_out_of_range(loaded: Any, small: Path, zoo: Path) -> None:
    with pytest.raises(ConfigError, match="limit=0: must be at least 1"):
        run(loaded, "mmlu", small, limit=0)
    for shots in (3, -1):
        with pytest.raises(ConfigError, match=f"num_fewshot={shots}: must be 0 to 2 for mmlu"):
            check("mmlu", data=small, num_fewshot=shots)
    with pytest.raises(ConfigError, match="num_fewshot=9: must be at most 5 for zoo_choice"):
        run(loaded, "zoo_choice", None, num_fewshot=9)


def test_a_damaged_file_is_told_before_a_model_is_needed(small: Path) -> None:
    write(small / "mmlu_test.jsonl.gz", [question(), question(answer=9)])
    with pytest.raises(DataError, match=r"mmlu_test\.jsonl\.gz:2: answer=9"):
        check("mmlu", data=small)
    write(small / "mmlu_test.jsonl.gz", [question()])
    check("mmlu", "mmlu_anatomy", data=small)  # read again, since the file has changed
    with pytest.raises(DataError, match=r"tasks=mmlu_world_religions: must have questions"):
        harness_tasks.load_tasks("mmlu_world_religions", small, small)
