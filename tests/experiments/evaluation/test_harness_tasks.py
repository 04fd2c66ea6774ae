"""Downstream tasks that cannot be run are refused first, with what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_data import question, write
from evaluation_runs import run

from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.evaluation.harness import run as harness
from acodm_env.experiments.evaluation.harness import task_names as harness_tasks

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


def cached(root: Path, folder: str, configuration: str) -> None:
    path = root / folder / configuration / "0.0.0" / "abc"
    path.mkdir(parents=True)
    splits = {"test": {"name": "test", "num_bytes": 9, "num_examples": 1, "dataset_name": "any"}}
    (path / "dataset_info.json").write_text(json.dumps({"config_name": configuration, "splits": splits}))


def test_a_cache_that_lacks_the_configuration(harness_index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "datasets"
    (cache / "allenai___ai2_arc").mkdir(parents=True)
    with pytest.raises(DataError, match="dataset=allenai/ai2_arc"):
        check("arc_easy")  # an empty folder
    cached(cache, "allenai___ai2_arc", "ARC-Challenge")
    check("arc_challenge")
    with pytest.raises(DataError, match=r"load_dataset\('allenai/ai2_arc', 'ARC-Easy'\)"):
        check("arc_easy")
    with pytest.raises(DataError, match=r"tasks=arc_easy: its data must be whole; ValueError: Couldn't find cache"):
        harness_tasks.load_tasks("arc_easy", None, tmp_path)
    cached(cache, "allenai___ai2_arc", "ARC-Easy")
    check("arc_easy")  # whether its files are whole shows when they are loaded
    with pytest.raises(DataError, match=r"tasks=arc_easy: its data must be whole; "):
        harness_tasks.load_tasks("arc_easy", None, tmp_path)


def test_the_configurations_that_lack_are_named(harness_index: Path, tmp_path: Path) -> None:
    cached(tmp_path / "datasets", "cais___mmlu", "abstract_algebra")
    with pytest.raises(DataError) as caught:
        check("mmlu")
    assert "for each NAME of anatomy, astronomy, business_ethics and 53 more" in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "folder"), [("TIGER-Lab/MMLU-Pro", "TIGER-Lab___mmlu-pro"), ("google/IFEval", "google___if_eval")]
)
def test_folders_are_named_as_datasets_names_them(
    harness_index: Path, tmp_path: Path, dataset: str, folder: str
) -> None:
    text = f"task: capital\ndataset_path: {dataset}\ntest_split: test\noutput_type: generate_until\ndoc_to_text: q\n"
    (harness_index / "capital.yaml").write_text(text)
    with pytest.raises(DataError, match=f"copy the folder {folder} of its"):
        check("capital")
    cached(tmp_path / "datasets", folder, "default")
    check("capital")


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


# --- local MMLU --------------------------------------------------------------------------------------------


def test_the_harness_own_categories() -> None:
    categories = harness_tasks.mmlu_categories()
    assert {name: len(subjects) for name, subjects in categories.items()} == {
        "mmlu_stem": 19, "mmlu_humanities": 13, "mmlu_social_sciences": 12, "mmlu_other": 13,
    }  # fmt: skip
    assert len({subject for subjects in categories.values() for subject in subjects}) == 57


def test_a_category_from_local_files(loaded: Any, small: Path) -> None:
    check("mmlu_stem", "mmlu_humanities", data=small)
    scores, notes = run(loaded, "mmlu_stem", small)
    assert [(metric.group, metric.num_items) for metric in scores.metrics] == [("", 6), ("anatomy", 6)]
    assert scores.facts["dataset"] == harness.data_checksums("mmlu", small)
    assert any("2 subjects" in note for note in notes)
    whole, _ = run(loaded, "mmlu", small)
    assert scores.items == whole.items[:6]


@pytest.mark.parametrize("name", ["mmlu_stem", "mmlu_anatomy", "mmlu"])
def test_a_local_folder_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data=.*nope: must hold mmlu_dev.*there is no such folder"):
        check(name, data=tmp_path / "nope")
    (tmp_path / "mmlu_dev.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"must hold mmlu_test.*the folder lacks it"):
        check(name, data=tmp_path)


@pytest.mark.parametrize("name", ["mmlu_social_sciences", "mmlu_astronomy"])
def test_local_files_without_such_questions(name: str, small: Path) -> None:
    with pytest.raises(DataError, match=f"tasks={name}: must have questions in the files of data=.*2 subjects"):
        check(name, data=small)


def test_local_files_are_advised_only_where_they_serve(harness_index: Path) -> None:
    for name in ("mmlu", "mmlu_stem", "mmlu_anatomy"):
        with pytest.raises(DataError, match=f"the task {name} needs it: --data DIR"):
            check(name)
    with pytest.raises(DataError) as caught:
        check("mmlu_stem_tasks")
    assert "--data" not in str(caught.value)
