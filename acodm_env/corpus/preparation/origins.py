"""Which files a token store was written from, and whether they are still the same."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from acodm_env.corpus.shards import edges_sha256
from acodm_env.errors import DataError
from acodm_env.files import sha256

FILES = "files.json"
"""Where in a store they stand, apart from corpus.json: there may be many thousand."""
_EDGE_BYTES = 1 << 12


def file_states(files: Iterable[Path], whole: bool) -> list[dict[str, Any]]:
    """Path, size, time of change and a checksum of every file, for `first_change`.

    Args:
        files: the files.
        whole: SHA-256 of all of a file; else of its edges, since reading a large corpus for it would take hours.

    Raises:
        DataError: a file cannot be read.
    """
    states = []
    for file in files:
        try:
            stat = file.stat()
            state = {"path": str(file), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            states.append(state | ({"sha256": sha256(file)} if whole else {"edges_sha256": _edges(file)}))
        except OSError as error:
            raise DataError(f"{file}: must be readable; {error.strerror}; check its permissions") from error
    return states


def first_change(before: Iterable[Mapping[str, Any]], files: Iterable[Path]) -> str | None:
    """The first file that is new, gone or changed since `file_states`, in words; a touched file's checksum decides."""
    known = {str(state["path"]): state for state in before}
    now = {str(file): file for file in files}
    for path in sorted(known.keys() | now.keys()):
        if path not in now:
            return f"{path} is gone"
        if path not in known:
            return f"{path} was added"
        state, stat = known[path], now[path].stat()
        touched = stat.st_mtime_ns != state["mtime_ns"]
        if stat.st_size != state["bytes"] or (touched and not _as_before(Path(path), state)):
            return f"{path} has changed"
    return None


def _as_before(file: Path, state: Mapping[str, Any]) -> bool:
    return bool(sha256(file) == state["sha256"] if "sha256" in state else _edges(file) == state["edges_sha256"])


def _edges(file: Path) -> str:
    return edges_sha256(file, _EDGE_BYTES)
