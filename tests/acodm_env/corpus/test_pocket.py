"""The harvest is deterministic, bounded, core only, and built once."""

import subprocess
import sys
from importlib import metadata
from itertools import pairwise

import pytest

from acodm_env.corpus.preparation import installation, pocket
from acodm_env.corpus.tokens import TokenStore

SMALL = """
from acodm_env.corpus.open import pocket_store
from acodm_env.corpus.preparation import pocket
pocket.DOMAIN_CHARS = 60_000; pocket.SMALLEST_CHARS = 10_000; pocket.SMALLEST_DOCUMENTS = 20
pocket.DOMAINS = ("arithmetic", "python")
print(pocket_store(300, progress=False))
"""


def test_even_choice():
    assert pocket.evenly([10] * 4, 100) == [0, 1, 2, 3]
    chosen = pocket.evenly([10] * 100, 250)
    assert len(chosen) in (25, 26)
    assert max(b - a for a, b in pairwise(chosen)) <= 5


def test_pieces_join_to_the_text():
    text = "word " * 3000 + "\n" + "line\n" * 9000
    pieces = list(pocket._pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= pocket.PIECE_CHARS


def test_arithmetic_is_true():
    first = next(pocket._arithmetic()).splitlines()
    for line in first:
        left, right = line.split(" = ")
        a, operator, b = left.split()
        expected = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}.get(operator)
        assert right == (str(expected) if expected is not None else f"{int(a) // int(b)} remainder {int(a) % int(b)}")


def test_the_core_list_is_the_metadata():
    assert sorted(installation.CORE) == sorted(installation._requirements(metadata.distribution("acodm")))


def test_only_core_dependencies():
    names = {item.name.lower() for item in installation.core_distributions()}
    assert {"torch", "numpy", "transformers"} <= names
    assert not {"acodm", "pytest", "mypy", "ruff", "hypothesis"} & names


def test_a_domain_too_small_is_dropped_and_said(monkeypatch):
    monkeypatch.setattr(pocket, "DOMAINS", ("licences", "arithmetic"))
    monkeypatch.setattr(pocket, "_read", lambda paths: iter(["short"]))
    dropped = []
    domains = {domain for domain, _ in pocket.pocket_documents(lambda *what: dropped.append(what))}
    assert domains == {"arithmetic"}
    assert dropped == [("licences", "only 5 characters in 1 documents in this Python installation")]


@pytest.mark.timeout(60)
def test_two_builds_at_once_give_one_store(tmp_path):
    environment = {"ACODM_CACHE": str(tmp_path), "PATH": ""}
    runs = [
        subprocess.Popen([sys.executable, "-c", SMALL], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {run.communicate()[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert len(paths) == 1
    assert TokenStore.open(paths.pop()).domains == ("arithmetic", "python")
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
