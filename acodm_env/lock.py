"""One folder, one process: a folder is claimed while something is written in it, and says by whom."""

import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from acodm_env.errors import DataError
from acodm_env.files import disk_errors, read_json, write_json

LOCK = ".lock"
HOLDER = ".holder.json"


@contextmanager
def claimed(folder: str | Path, at: str | Path | None = None) -> Iterator[None]:
    """Have `folder` for this process alone while the block lasts; the claim ends with the process, however it ends.

    Args:
        folder: what is claimed.
        at: the folder that the lock lies in; default `folder` itself. It is created.

    Raises:
        DataError: another process has it, which is named, or nothing can be written there.
    """
    place = Path(folder if at is None else at)
    with disk_errors(Path(folder)):
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise DataError(
                f"out={folder}: must not be in use; {_holder(place)}; wait for it, end it, or choose another --out"
            ) from error
    try:
        write_json(place / HOLDER, _myself())
        yield
    finally:
        (place / HOLDER).unlink(missing_ok=True)
        lock.release()


def _myself() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": shlex.join(sys.orig_argv),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _holder(place: Path) -> str:
    """Who has it, as far as it is known: the record is written just after the claim."""
    with suppress(DataError, KeyError, TypeError):
        holder = read_json(place / HOLDER)
        return "process {pid} on {host} writes there since {since} ({command})".format(**holder)
    return "another process writes there"
