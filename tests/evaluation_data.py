"""Files of questions for the tests of downstream evaluation, and where the published ones lie."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval"
published = pytest.mark.skipif(not DATA.is_dir(), reason="MMLU and HumanEval files are not beside the project")


def question(subject: str = "anatomy", number: int = 0, **changes: Any) -> dict[str, Any]:
    row = {"question": f"q{number}", "subject": subject, "choices": ["w", "x", "y", "z"], "answer": number % 4}
    return row | changes


def problem(number: int = 0, **changes: Any) -> dict[str, Any]:
    row = {
        "task_id": f"HumanEval/{number}",
        "prompt": "def f():\n",
        "entry_point": "f",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    return row | changes


def write(path: Path, rows: list[Any]) -> None:
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(lines)
