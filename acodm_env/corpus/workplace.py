"""Where a token store is written, and which files it was written from."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from acodm_env.corpus.tokens import SPLITS
from acodm_env.errors import DataError
from acodm_env.files import atomic_folder, sha256

_OURS = {*SPLITS, "tokenizer.json", "corpus.json"}


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that becomes `out` if the block ends without an error.

    It is locked meanwhile, so that the next run can tell the folder of a killed run, which it removes, from that of
    a live one.
    """
    with ExitStack() as stack, atomic_folder(out) as folder:
        if (handle := _lock(folder)) is not None:
            stack.callback(os.close, handle)
        _sweep(out, folder)
        yield folder


def _sweep(out: Path, own: Path) -> None:
    """Remove what killed runs left beside `out`; a folder with anything else in it is not ours."""
    left_over = re.compile(rf"\.{re.escape(out.name)}\.[a-z0-9_]{{8}}(\.old)?")
    for folder in out.absolute().parent.iterdir():
        if not left_over.fullmatch(folder.name) or folder.name == own.name or not folder.is_dir():
            continue
        with suppress(OSError):
            names = {path.name for path in folder.iterdir() if not path.name.startswith(".corpus.json.")}
            if names <= _OURS and (handle := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)


def _lock(folder: Path) -> int | None:
    """Lock a folder until the descriptor returned is closed or the process ends; None if that cannot be done."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by a live run, or a file system without locks
        os.close(handle)
        return None
    return handle


def file_states(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Path, size, time of change and SHA-256 of every file, for `first_change`.

    Raises:
        DataError: a file cannot be read.
    """
    states = []
    for file in files:
        try:
            stat = file.stat()
            states.append(
                {"path": str(file), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256(file)}
            )
        except OSError as error:
            raise DataError(f"{file}: must be readable; {error.strerror}; check its permissions") from error
    return states


def first_change(before: Iterable[Mapping[str, Any]], files: Iterable[Path]) -> str | None:
    """The first file that is new, gone or changed since `file_states`, in words; a touched file is compared whole."""
    known = {str(state["path"]): state for state in before}
    now = {str(file): file for file in files}
    for path in sorted(known.keys() | now.keys()):
        if path not in now:
            return f"{path} is gone"
        if path not in known:
            return f"{path} was added"
        state, stat = known[path], now[path].stat()
        touched = stat.st_mtime_ns != state["mtime_ns"]
        if stat.st_size != state["bytes"] or (touched and sha256(path) != state["sha256"]):
            return f"{path} has changed"
    return None
