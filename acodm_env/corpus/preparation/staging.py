"""Where a token store is written until it is whole, and the journal by which a killed preparation goes on.

For `out` that is the folder `.NAME.partial` beside it::

    .lock           held while a process is at it; .holder.json says which
    store/          becomes `out` by a rename
    journal.json    what was committed: settings, position, lengths of the files in store/

The journal is replaced atomically, after what it describes was synced. Whatever lies in store/ beyond it is dropped
when the preparation goes on, and read again. What was committed is only ever removed by the user. Which files a store
was written from, and whether they are still the same, stands in it too (`FILES`).
"""

import errno
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from acodm_env.corpus.shards import edges_sha256
from acodm_env.errors import DataError
from acodm_env.files import disk_errors, read_json, sha256, write_json
from acodm_env.lock import claimed

FILES = "files.json"
"""Where in a store they stand, apart from corpus.json: there may be many thousand."""
_EDGE_BYTES = 1 << 12

JOURNAL_VERSION = 3
COMMIT_SECONDS = 5.0
"""Least time between two commits; a kill loses the work since the last one and the batches under way."""


class Workplace:
    """The claimed partial folder of a preparation; a context manager."""

    def __init__(self, out: Path):
        """Name the place for `out`, an absolute path."""
        self.out = out
        self.folder = _partial(out)
        self.store = self.folder / "store"
        self.journal: dict[str, Any] = {}
        """What was committed last; empty in a new place."""

    def __enter__(self) -> Self:
        """Take it.

        Raises:
            DataError: another process is at it, the folder cannot be written, or its journal cannot be read.
        """
        with ExitStack() as stack:
            stack.enter_context(claimed(self.out, at=self.folder))
            if (self.folder / "journal.json").is_file():
                self.journal = self._read()
            self._claim = stack.pop_all()
        self._last = time.monotonic()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        documents = self.documents
        with self._claim:
            if not documents:
                shutil.rmtree(self.folder, ignore_errors=True)
        cause = error.__cause__ if isinstance(error, DataError) else error
        if documents and isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{self.out}: disk full while writing; {documents:,} documents stay committed in {self.folder}; free "
                f"some space and run the same command again, it goes on from there"
            ) from cause

    @property
    def documents(self) -> int:
        """Documents that are committed."""
        outputs = (self.journal.get("written") or {}).get("outputs", [])
        return sum(int(output["documents"]) for output in outputs)

    def resume(self, preparation: Mapping[str, Any], files: list[Path]) -> None:
        """Go on with what is committed, if it is of the same preparation; with nothing committed, begin afresh.

        Raises:
            DataError: documents of another preparation are committed.
        """
        problem = self._difference(preparation, files) if self.journal else None
        if problem and self.documents:
            raise DataError(
                f"out={self.out}: must be prepared to its end as it was begun; {problem}; {self.documents:,} documents "
                f"are committed in {self.folder}; give the former settings and files to go on (a file in which a line "
                f"was corrected is another one), or delete {self.folder} to begin afresh"
            )
        if problem or not self.journal:
            self.journal = {}
            (self.folder / "journal.json").unlink(missing_ok=True)
            if self.store.exists():
                shutil.rmtree(self.store)
        self.store.mkdir(exist_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            journal: dict[str, Any] = read_json(self.folder / "journal.json")
        except DataError as error:
            raise DataError(f"{error}; delete {self.folder} to begin afresh") from error
        return journal

    def _difference(self, preparation: Mapping[str, Any], files: list[Path]) -> str | None:
        if self.journal.get("version") != JOURNAL_VERSION:
            return "another version of this package began it"
        before = self.journal["preparation"]
        if other := [name for name in preparation if before.get(name) != preparation[name]]:
            return "it was begun with " + ", ".join(f"{name}={before.get(name)}" for name in other)
        change = first_change(read_json(self.store / FILES), files)
        return f"{change} since it was begun" if change else None

    def due(self) -> bool:
        """Whether it is time to commit."""
        return time.monotonic() - self._last >= COMMIT_SECONDS

    def commit(self, **entries: Any) -> None:
        """Add entries to the journal, durably."""
        self.journal = {"version": JOURNAL_VERSION, **self.journal, **entries}
        write_json(self.folder / "journal.json", self.journal)
        self._last = time.monotonic()

    def publish(self) -> None:
        """Make the store appear as `out`; what is left here goes at the end of the block."""
        with suppress(FileNotFoundError):
            self.out.rmdir()  # it may be an empty folder
        self.store.rename(self.out)
        self.forget()

    def forget(self) -> None:
        """Have nothing committed: the folder is removed at the end of the block."""
        self.journal = {}


def remove_leftover(out: Path) -> None:
    """Remove the partial folder of a run that was killed after `out` had appeared."""
    folder = _partial(out)
    if folder.is_dir() and not (folder / "store").exists():
        with suppress(DataError), disk_errors(folder), claimed(out, at=folder):  # whoever has it removes it
            shutil.rmtree(folder, ignore_errors=True)


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


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
