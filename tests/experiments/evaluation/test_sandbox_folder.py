"""Folders that programs leave in every state are removed, and nothing else is."""

import os
from pathlib import Path

import pytest
from sandboxed import SHORT, nothing_left  # noqa: F401

from acodm_env.experiments.evaluation.sandbox import execute as sandbox
from acodm_env.experiments.evaluation.sandbox.execute import execute
from acodm_env.experiments.evaluation.sandbox.folder import remove

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")


@pytest.mark.parametrize(
    ("depth", "name", "layers"), [(1500, "a", ()), (40, "a" * 200, ()), (500, "a", sandbox.LAYERS)]
)
def test_deep_folders(depth, name, layers):
    program = f"import os\nfor _ in range({depth}): os.mkdir('{name}'); os.chdir('{name}')"
    assert execute(program, SHORT, layers=layers)[0].reason == "passed"


def as_ordinary_user(place: Path) -> bool:
    """Remove `place`/x in a process without root's rights; whether nothing was raised."""
    child = os.fork()
    if child == 0:
        try:
            os.chdir(place)
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            remove(Path("x"))
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def test_locked_folders(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    folder = tmp_path / "x"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / "b" / "c" / "file").touch()
    (folder / "b" / "link").symlink_to(tmp_path / "kept")
    (folder / "b" / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    if os.getuid() == 0:
        for path in (tmp_path, folder, folder / "b", folder / "b" / "c"):
            os.chown(path, 65534, 65534)
    for path in (folder / "b" / "c", folder / "b", folder):
        path.chmod(0)
    assert as_ordinary_user(tmp_path)
    assert not folder.exists()
    assert (tmp_path / "kept" / "file").read_text() == "kept"


def test_what_cannot_be_removed_is_no_error(tmp_path, monkeypatch):
    remove(tmp_path / "missing")
    folder = tmp_path / "x"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "file").touch()

    def refuse(*args, **options):
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        patch.setattr(Path, "unlink", refuse)
        remove(folder)
    assert sum(path.is_file() for path in folder.rglob("*")) == 1
    remove(folder)
    assert not folder.exists()


def test_a_program_that_locks_its_folder():
    assert execute("import os; os.chmod('.', 0)", SHORT, layers=())[0].reason == "passed"
