"""What the sandbox's tests share: programs are run under chosen layers, and every test leaves nothing behind."""

import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from acodm_env.experiments.evaluation.sandbox import execute as sandbox
from acodm_env.experiments.evaluation.sandbox.execute import Limits, Outcome, execute, protections

SHORT = Limits(seconds=1.0)
SMALL = Limits(seconds=10.0, memory_bytes=1 << 28)
TOKEN = uuid.uuid4().hex
LINUX = sys.platform == "linux"


def survivors() -> list[str]:
    """The command lines of those processes, of supervisors or of programs, that this process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"# {TOKEN}" in text and "sandbox.supervisor" in text:
            found.append(text)
    return found


def none_left(seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while survivors() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not survivors()


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """Every test leaves no process, no temporary folder, and nothing outside behind."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(sandbox, "_START", f"# {TOKEN}\n{sandbox._START}")
    yield
    assert survivors() == []
    assert list(folder.iterdir()) == []


def with_layers(program: str, *layers: str, limits: Limits = SHORT) -> Outcome:
    """Run without the guard under these layers alone; skip where the system lacks one."""
    if missing := [name for name in layers if not protections()[name]]:
        pytest.skip(f"this system does not grant {', '.join(missing)}")
    outcome, in_force = execute(program, limits, layers=layers, guard=False)
    assert set(layers) <= in_force
    return outcome
