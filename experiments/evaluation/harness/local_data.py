"""MMLU and HumanEval from local files, for machines without the hub: every line is checked and counted.

A folder holds `mmlu_dev.jsonl.gz` and `mmlu_test.jsonl.gz` (objects with question, subject, choices, answer) and
`HumanEval.jsonl.gz` (OpenAI's own file); without `.gz` works as well. MMLU is Hendrycks et al. 2021 (arXiv 2009.03300),
HumanEval Chen et al. 2021 (arXiv 2107.03374).
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acodm_env.errors import DataError

Row = dict[str, Any]
MMLU_FILES = ("mmlu_dev", "mmlu_test")
HUMANEVAL_FILE = "HumanEval"
PUBLISHED = {
    "mmlu": {"subjects": 57, "dev": 285, "test": 14_042},
    "humaneval": {"problems": 164},
}
"""What the published files hold."""
_SUBJECT = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True, kw_only=True)
class Mmlu:
    """MMLU's questions by subject, in the files' order."""

    dev: dict[str, list[Row]]
    """Questions with answers, to show beforehand."""
    test: dict[str, list[Row]]
    """Questions to answer."""
    files: dict[str, str]
    """sha256 of each file, by its name."""

    @property
    def counts(self) -> dict[str, int]:
        """Subjects and questions."""
        dev, test = (sum(map(len, part.values())) for part in (self.dev, self.test))
        return {"subjects": len(self.test), "dev": dev, "test": test}


@dataclass(frozen=True, kw_only=True)
class HumanEval:
    """HumanEval's problems, in the file's order."""

    problems: list[Row]
    files: dict[str, str]
    """sha256 of the file, by its name."""

    @property
    def counts(self) -> dict[str, int]:
        """Problems."""
        return {"problems": len(self.problems)}


def read_mmlu(folder: Path) -> Mmlu:
    """Read and check all of MMLU.

    Raises:
        DataError: a file is missing, damaged or empty, or a line is no question (the file and line are named).
    """
    dev_path, test_path = (find_file(folder, stem, "mmlu") for stem in MMLU_FILES)
    dev: dict[str, list[Row]] = {}
    test: dict[str, list[Row]] = {}
    for _, row in _rows(dev_path, _question):
        dev.setdefault(row["subject"], []).append(row)
    for number, row in _rows(test_path, _question):
        if row["subject"] not in dev:
            raise DataError(
                f"{test_path}:{number}: subject '{row['subject']}' must have questions in {dev_path.name} too; the "
                f"line was edited, or the files are not of one release; copy both again"
            )
        test.setdefault(row["subject"], []).append(row)
    return Mmlu(dev=dev, test=test, files={path.name: _sha256(path) for path in (dev_path, test_path)})


def read_humaneval(folder: Path) -> HumanEval:
    """Read and check all of HumanEval.

    Raises:
        DataError: the file is missing, damaged or empty, or a line is no problem (the file and line are named).
    """
    path = find_file(folder, HUMANEVAL_FILE, "humaneval")
    seen: set[str] = set()
    problems = []
    for number, row in _rows(path, _problem):
        if row["task_id"] in seen:
            raise DataError(f"{path}:{number}: task_id '{row['task_id']}' must be new; it came before; copy it again")
        seen.add(row["task_id"])
        problems.append(row)
    return HumanEval(problems=problems, files={path.name: _sha256(path)})


def find_file(folder: Path, stem: str, task: str) -> Path:
    """`STEM.jsonl.gz` or `STEM.jsonl` in `folder`.

    Raises:
        DataError: the folder or the file is not there.
    """
    for path in (folder / f"{stem}.jsonl.gz", folder / f"{stem}.jsonl"):
        if path.is_file():
            return path
    cause = "the folder lacks it" if folder.is_dir() else "there is no such folder"
    raise DataError(f"data={folder}: must hold {stem}.jsonl.gz (or {stem}.jsonl) for {task}; {cause}; put it there")


def file_checksums(folder: Path, task: str) -> dict[str, str]:
    """sha256 by name of the files behind `task` ("mmlu", "mmlu_SUBJECT" or "humaneval").

    Raises:
        DataError: a file is missing.
    """
    stems = (HUMANEVAL_FILE,) if task == "humaneval" else MMLU_FILES
    return {path.name: _sha256(path) for path in (find_file(folder, stem, task) for stem in stems)}


def _rows(path: Path, check: Callable[[Any], Row]) -> Iterator[tuple[int, Row]]:
    """Number and content of each line, from 1. Raises `DataError` with both names for one that fails `check`."""
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                yield number, _checked(path, number, line, check)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{path}:{number + 1}: must be a whole gzip file; {error}; it was cut short or damaged; copy it again"
            ) from error
    if not number:
        raise DataError(f"{path}: must hold a JSON object per line; it is empty; copy it again")


def _checked(path: Path, number: int, line: bytes, check: Callable[[Any], Row]) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # a JSON error, bytes that are no UTF-8, brackets without end
        cause = "too deeply nested" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
        raise DataError(f"{path}:{number}: must be a JSON object; {cause}; copy the file again") from error
    try:
        return check(value)
    except RecursionError as error:
        raise DataError(f"{path}:{number}: must hold texts; too deeply nested; copy the file again") from error
    except ValueError as error:
        raise DataError(f"{path}:{number}: {error}; the line was edited or damaged; copy the file again") from error


def _question(value: Any) -> Row:
    row = _with_texts(value, ("question", "subject"))
    choices, answer = value.get("choices"), value.get("answer")
    if not (isinstance(choices, list) and len(choices) == 4 and all(isinstance(one, str) for one in choices)):
        raise ValueError(f"choices={str(choices)[:80]}: must be four texts")
    for choice in choices:
        _check_unicode("choices", choice)
    if type(answer) is not int or not 0 <= answer <= 3:
        raise ValueError(f"answer={answer!r}: must be 0, 1, 2 or 3")
    if not _SUBJECT.fullmatch(row["subject"]):
        raise ValueError(f"subject={row['subject']!r}: must be small letters, digits and underscores")
    return row | {"choices": choices, "answer": answer}


def _problem(value: Any) -> Row:
    row = _with_texts(value, ("task_id", "prompt", "entry_point", "canonical_solution", "test"))
    if not row["prompt"].strip():
        raise ValueError("prompt: must hold the beginning of a function; it is empty")
    if not row["entry_point"].isidentifier():
        raise ValueError(f"entry_point={row['entry_point']!r}: must be a function's name")
    return row


def _with_texts(value: Any, keys: tuple[str, ...]) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:40]!r}: must be a JSON object")
    for key in keys:
        if not isinstance(value.get(key), str):
            raise ValueError(f"{key}={str(value.get(key))[:40]}: must be a text")
        _check_unicode(key, value[key])
    return {key: value[key] for key in keys}


def _check_unicode(key: str, text: str) -> None:
    """JSON can escape half of a character ("\\ud83d"), which no file or tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key}={text[:40]!a}: must be whole characters; {text[error.start]!a} is half of one"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
