"""Clearing up after a program: its folder, whatever it has made of it. Standard library only."""

import os
import uuid
from contextlib import suppress
from itertools import count
from pathlib import Path


def remove(folder: Path) -> None:
    """Remove a folder with all below it, as far as the system allows; never raises an `OSError`.

    Folders within are moved up to the top before they are emptied: however deep a program has nested them, no path
    becomes too long and nothing recurses. Links are not followed. Locked folders are unlocked.
    """
    prefix, numbers, waiting = uuid.uuid4().hex, count(), [folder]
    while waiting:
        emptied = waiting.pop()
        for entry in _entries(emptied):
            with suppress(OSError):
                path = Path(entry.path)
                if not entry.is_dir(follow_symlinks=False):
                    path.unlink()
                    continue
                path.chmod(0o700)  # moving it changes its "..", for which it must be writable
                waiting.append(path.rename(folder / f"{prefix}-{next(numbers)}"))
        if emptied != folder:
            with suppress(OSError):
                emptied.rmdir()
    with suppress(OSError):
        folder.rmdir()


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    with suppress(OSError):
        folder.chmod(0o700)
        with os.scandir(folder) as entries:
            return list(entries)
    return []
