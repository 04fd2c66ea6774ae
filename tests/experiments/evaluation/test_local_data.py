"""Local MMLU and HumanEval: all is read and counted, and a bad line is named."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_data import DATA, problem, published, question, write

from acodm_env.errors import DataError
from acodm_env.experiments.evaluation.harness.local_data import PUBLISHED, file_checksums, read_humaneval, read_mmlu


@published
def test_all_of_mmlu_is_read_and_counted() -> None:
    mmlu = read_mmlu(DATA)
    assert mmlu.counts == PUBLISHED["mmlu"] == {"subjects": 57, "dev": 285, "test": 14_042}
    assert {len(rows) for rows in mmlu.dev.values()} == {5}
    assert sorted(mmlu.files) == ["mmlu_dev.jsonl.gz", "mmlu_test.jsonl.gz"]
    assert mmlu.files == file_checksums(DATA, "mmlu")


@published
def test_all_of_humaneval_is_read_and_counted() -> None:
    found = read_humaneval(DATA)
    assert found.counts == PUBLISHED["humaneval"] == {"problems": 164}
    assert [row["task_id"] for row in found.problems] == [f"HumanEval/{number}" for number in range(164)]
    digest = hashlib.sha256((DATA / "HumanEval.jsonl.gz").read_bytes()).hexdigest()
    assert found.files == {"HumanEval.jsonl.gz": digest}


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_plain_and_compressed_files(tmp_path: Path, ending: str) -> None:
    write(tmp_path / f"mmlu_dev{ending}", [question("law", 1), question("anatomy", 2)])
    write(tmp_path / f"mmlu_test{ending}", [question("anatomy", 3, extra="left out"), question("law", 4)])
    mmlu = read_mmlu(tmp_path)
    assert mmlu.test == {"anatomy": [question("anatomy", 3)], "law": [question("law", 4)]}
    assert mmlu.dev == {"law": [question("law", 1)], "anatomy": [question("anatomy", 2)]}
    assert mmlu.counts == {"subjects": 2, "dev": 2, "test": 2}
    write(tmp_path / f"HumanEval{ending}", [problem(0), problem(1)])
    assert read_humaneval(tmp_path).problems == [problem(0), problem(1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", ', "must be a JSON object"),
        ("", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        (question(question=7), "question=7: must be a text"),
        ({"subject": "anatomy"}, "question=None: must be a text"),
        (question(choices=["a", "b", "c"]), "must be four texts"),
        (question(choices=["a", "b", "c", 4]), "must be four texts"),
        (question(answer=4), "answer=4: must be 0, 1, 2 or 3"),
        (question(answer="1"), "answer='1': must be 0, 1, 2 or 3"),
        (question(answer=True), "answer=True: must be 0, 1, 2 or 3"),
        (question(subject="../etc"), "must be small letters"),
        (question(question="a \ud83d b"), r"question='a \ud83d b': must be whole characters; '\ud83d' is half of one"),
        (question(choices=["a", "b", "c", "\udc00"]), r"choices='\udc00': must be whole characters"),
        ("[" * 100_000, "too deeply nested"),
        ('{"question": ' + "[" * 900 + "]" * 900 + "}", "must be a text"),
        (question(subject="law"), "subject 'law' must have questions in mmlu_dev.jsonl"),
    ],
)
def test_a_bad_line_of_mmlu_is_named(tmp_path: Path, line: Any, message: str) -> None:
    write(tmp_path / "mmlu_dev.jsonl", [question()])
    write(tmp_path / "mmlu_test.jsonl", [question(), line, question()])
    with pytest.raises(DataError) as caught:
        read_mmlu(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'mmlu_test.jsonl'}:2: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (problem(1, entry_point="no name"), "must be a function's name"),
        (problem(1, test=None), "test=None: must be a text"),
        (problem(1, prompt=""), "prompt: must hold the beginning of a function; it is empty"),
        (problem(1, prompt=" \n"), "it is empty"),
        (problem(1, prompt="\ud800"), "must be whole characters"),
        (problem(0), "task_id 'HumanEval/0' must be new"),
    ],
)
def test_a_bad_line_of_humaneval_is_named(tmp_path: Path, line: Any, message: str) -> None:
    write(tmp_path / "HumanEval.jsonl.gz", [problem(0), line])
    with pytest.raises(DataError, match=r"HumanEval\.jsonl\.gz:2: ") as caught:
        read_humaneval(tmp_path)
    assert message in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "HumanEval.jsonl").write_bytes(json.dumps(problem()).encode() + b"\n\xff\xfe{}\n")
    with pytest.raises(DataError, match=r"HumanEval\.jsonl:2: must be a JSON object"):
        read_humaneval(tmp_path)


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "HumanEval.jsonl.gz"
    write(
        path, [problem(number, prompt=hashlib.sha256(str(number).encode()).hexdigest() * 40) for number in range(100)]
    )
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"HumanEval\.jsonl\.gz:\d+: must be a whole gzip file"):
        read_humaneval(tmp_path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"HumanEval\.jsonl\.gz:1: must be a whole gzip file"):
        read_humaneval(tmp_path)


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold mmlu_dev\.jsonl\.gz .*the folder lacks it"):
        read_mmlu(tmp_path)
    with pytest.raises(DataError, match="there is no such folder"):
        read_humaneval(tmp_path / "nowhere")
    (tmp_path / "HumanEval.jsonl").touch()
    with pytest.raises(DataError, match="it is empty"):
        read_humaneval(tmp_path)
