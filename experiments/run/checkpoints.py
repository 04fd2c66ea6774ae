"""Checkpoints of a run: whole or absent, the newest few kept, each with a manifest of what it is.

``checkpoints/step-00000120/`` holds ``state.safetensors`` (no pickle) and ``manifest.json``: step, the file's size and
SHA-256, the run's settings, how many processes made it, versions. A folder appears only when it is whole and synced.
"""

import errno
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.run.folder import versions
from acodm_env.files import atomic_folder, clear_leftovers, read_json, read_state, sha256, write_json, write_state

STATE = "state.safetensors"
MANIFEST = "manifest.json"
_PREFIX = "step-"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One that was read."""

    step: int
    """Optimiser steps done."""
    path: Path
    """Its folder."""
    identity: dict[str, Any]
    """Settings of the run that wrote it."""
    world: int
    """How many processes that run had."""
    state: dict[str, Any]
    skipped: tuple[str, ...]
    """Newer ones that are not whole, each with the reason and where it was put."""


class Checkpoints:
    """The checkpoints of the run in one folder, which nobody else writes to."""

    def __init__(self, folder: str | Path, keep: int = 2):
        """Look into the folder; what a kill left half-written is removed.

        Args:
            folder: `checkpoints/` of the run; made by the first write.
            keep: how many of the newest stay.

        Raises:
            ConfigError: none is to be kept.
        """
        if keep < 1:
            raise ConfigError(f"keep={keep}: must be at least 1 checkpoint")
        self.folder, self.keep = Path(folder), keep
        clear_leftovers(self.folder, f"{_PREFIX}*")

    def steps(self) -> list[int]:
        """Steps of those that are there, whole or not, ascending."""
        names = [path.name.removeprefix(_PREFIX) for path in self.folder.glob(f"{_PREFIX}*")]
        return sorted(int(name) for name in names if name.isdigit())

    def last(self) -> Path | None:
        """The newest whole one."""
        whole = (step for step in reversed(self.steps()) if self._defect(step) is None)
        return next((self.path(step) for step in whole), None)

    def path(self, step: int) -> Path:
        """Folder of the one at `step`."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def write(self, step: int, state: Mapping[str, Any], identity: Mapping[str, Any], world: int = 1) -> Path:
        """Write one; older ones beyond `keep` go when it is whole, and not before.

        Args:
            step: optimiser steps done.
            state: everything needed to go on, as numpy arrays and JSON values.
            identity: settings of the run.
            world: number of its processes.

        Raises:
            DataError: it cannot be written; the last whole one stays, and is named.
        """
        path = self.path(step)
        try:
            with atomic_folder(path) as fresh:
                digest = write_state(fresh / STATE, state)
                files = {STATE: {"bytes": (fresh / STATE).stat().st_size, "sha256": digest}}
                now = datetime.now().astimezone().isoformat(timespec="seconds")
                about = {"step": step, "time": now, "world": world, "versions": versions(), "identity": dict(identity)}
                write_json(fresh / MANIFEST, {**about, "files": files})
        except DataError as error:
            raise DataError(f"{path}: {self.still_there(error)}") from error
        self._prune(step)
        return path

    def still_there(self, error: BaseException) -> str:
        """What went wrong in a write, and what is left."""
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)
        last = self.last()
        left = f"the last whole checkpoint, {last}, stays" if last else "there is no checkpoint yet"
        what = "disk full while writing" if full else f"could not be written ({error})"
        return f"{what}; {left}; free some space, then run the same command again to go on from it"

    def newest(self) -> Checkpoint | None:
        """Read the newest whole one, and put those after it aside; None if there is none at all.

        Raises:
            DataError: there are some, but none is whole.
        """
        defects: dict[int, str] = {}
        for step in reversed(self.steps()):
            defect = self._defect(step)
            if defect is None:
                manifest = read_json(self.path(step) / MANIFEST)
                return Checkpoint(
                    step=step,
                    path=self.path(step),
                    identity=manifest["identity"],
                    world=int(manifest["world"]),
                    state=read_state(self.path(step) / STATE),
                    skipped=tuple(
                        f"{self.path(newer)}: {defect}; put aside as {self._put_aside(newer)}"
                        for newer, defect in defects.items()
                    ),
                )
            defects[step] = defect
        if defects:
            found = "; ".join(f"{self.path(step)}: {defect}" for step, defect in defects.items())
            raise DataError(
                f"{self.folder}: must hold a whole checkpoint; {found}; copy one back, or remove this folder to begin "
                f"the run again"
            )
        return None

    def _put_aside(self, step: int) -> str:
        """Have a damaged one no longer among the checkpoints; returns its new name."""
        aside = self.folder / f"damaged-{self.path(step).name}"
        shutil.rmtree(aside, ignore_errors=True)
        return self.path(step).rename(aside).name

    def _defect(self, step: int) -> str | None:
        """Why a checkpoint is not whole; None if it is."""
        return self._lack(step) or self._damage(step)

    def _lack(self, step: int) -> str | None:
        """What is missing in a checkpoint; None if all files have their sizes."""
        try:
            manifest = read_json(self.path(step) / MANIFEST)
            expected = int(manifest["files"][STATE]["bytes"])
            if int(manifest["step"]) != step or not {"identity", "world"} <= manifest.keys():
                raise KeyError("step")
        except DataError as error:
            return str(error)
        except (KeyError, TypeError, ValueError, AttributeError):
            return f"{MANIFEST} is not a checkpoint's"
        file = self.path(step) / STATE
        found = file.stat().st_size if file.is_file() else 0
        return None if found == expected else f"{STATE} was cut short ({found} of {expected} bytes)"

    def _damage(self, step: int) -> str | None:
        """Whether its content is another than was written."""
        recorded = read_json(self.path(step) / MANIFEST)["files"][STATE]["sha256"]
        if sha256(self.path(step) / STATE) == recorded:
            return None
        return f"{STATE} was edited or damaged (checksum)"

    def _prune(self, last: int) -> None:
        """Remove what is older than the newest few up to `last`, which was just written."""
        whole = [step for step in self.steps() if step <= last and self._lack(step) is None]
        for step in self.steps():
            if step < whole[-self.keep :][0]:
                gone = self.path(step).rename(self.folder / f".{_PREFIX}{step:08d}.gone")  # at once, or not at all
                shutil.rmtree(gone, ignore_errors=True)
