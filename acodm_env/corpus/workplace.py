"""Where a token store is written until it is whole, and the journal by which a killed preparation goes on.

For `out` that is the folder `.NAME.partial` beside it::

    store/          becomes `out` by a rename
    journal.json    what was committed: settings, source files, position, lengths of the files in store/

The journal is replaced atomically, after what it describes was synced. Whatever lies in store/ beyond it is dropped
when the preparation goes on, and read again.
"""

import errno
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from acodm_env.corpus.origins import first_change
from acodm_env.errors import DataError
from acodm_env.files import disk_errors, read_json, write_json

JOURNAL_VERSION = 1
COMMIT_SECONDS = 5.0
"""At most so much work is lost by a kill."""


class Workplace:
    """The locked partial folder of a preparation; a context manager."""

    def __init__(self, out: Path):
        """Take the place for `out`.

        Raises:
            DataError: another process is at it, or the folder cannot be written.
        """
        self.out = out.absolute()
        self.folder = self.out.with_name(f".{self.out.name}.partial")
        self.store = self.folder / "store"
        self.journal: dict[str, Any] = {}
        """What was committed last; empty in a new place."""
        with disk_errors(out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._handle = _locked(self.folder, self.out)
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        documents = self.documents
        if not documents:
            self.discard()
        if self._handle is not None:
            os.close(self._handle)
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

    def resume(self, preparation: Mapping[str, Any], files: list[Path]) -> str | None:
        """Read the journal of an earlier run, if it was one of the same preparation; else begin afresh.

        Returns:
            Why what was there could not be used, if something was.
        """
        journal: dict[str, Any] = {}
        problem = None
        if (self.folder / "journal.json").is_file():
            journal, problem = self._read(preparation, files)
        if problem or not journal:
            shutil.rmtree(self.store, ignore_errors=True)
            (self.folder / "journal.json").unlink(missing_ok=True)
            journal = {}
        self.journal = journal
        self.store.mkdir(exist_ok=True)
        return problem

    def _read(self, preparation: Mapping[str, Any], files: list[Path]) -> tuple[dict[str, Any], str | None]:
        try:
            journal = read_json(self.folder / "journal.json")
        except DataError as error:
            return {}, str(error)
        if journal.get("version") != JOURNAL_VERSION or journal.get("preparation") != dict(preparation):
            return {}, "it had other settings"
        return journal, first_change(journal["files"], files)

    def due(self) -> bool:
        """Whether it is time to commit."""
        return time.monotonic() - self._last >= COMMIT_SECONDS

    def commit(self, **entries: Any) -> None:
        """Add entries to the journal, durably."""
        self.journal = {"version": JOURNAL_VERSION, **self.journal, **entries}
        write_json(self.folder / "journal.json", self.journal)
        self._last = time.monotonic()

    def publish(self) -> None:
        """Make the store appear as `out`."""
        for folder in (self.store, self.folder):
            folder.chmod(0o755)
        with suppress(FileNotFoundError):
            self.out.rmdir()  # it may be an empty folder
        self.store.rename(self.out)
        self.discard()

    def discard(self) -> None:
        """Remove the partial folder."""
        self.journal = {}
        shutil.rmtree(self.folder, ignore_errors=True)


def remove_leftover(out: Path) -> None:
    """Remove the partial folder of a run that was killed after `out` had appeared."""
    folder = out.absolute().with_name(f".{out.absolute().name}.partial")
    if folder.is_dir() and (handle := _lock(folder)) is not None:
        if not (folder / "store").exists():
            shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _locked(folder: Path, out: Path) -> int | None:
    """Create and lock the folder; a run that ends may remove it in between."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            import fcntl  # noqa: F401 (no such locks on some systems)
        except ImportError:
            return None
        handle = _lock(folder)
        if handle is None:
            raise DataError(
                f"out={out}: must not be written by another process at the same time; one that runs now holds "
                f"{folder}; wait for it, or choose another --out"
            )
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == folder.stat().st_ino:
                return handle
        os.close(handle)


def _lock(folder: Path) -> int | None:
    """Lock a folder until the descriptor returned is closed or the process ends; None if that cannot be done."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by a live run
        os.close(handle)
        return None
    return handle
