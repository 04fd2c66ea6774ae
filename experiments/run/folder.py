"""A run is a folder: what was asked for, what happened at every step, and enough to go on after an interruption.

``config.json`` (resolved configuration, versions, commit), ``stats.jsonl`` (a line per optimiser step),
``eval.jsonl`` (a line per evaluation on the test split), ``checkpoints/``, ``result.json``.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from acodm_env.errors import ConfigError, DataError
from acodm_env.files import atomic_file, clear_leftovers, disk_errors, read_json, write_json
from acodm_env.lock import HOLDER, LOCK
from acodm_env.run_log import EvaluationLine, LogLine, StepLine, numbered, read_log

PACKAGES = (
    "acodm",
    "gymnasium",
    "stable-baselines3",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "numpy",
)
LOGS: tuple[type[LogLine], ...] = (StepLine, EvaluationLine)
RESULTS = ("result.json", "model", "policy", "evaluation.json", "evaluation")


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide a result; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, if it is one."""
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


class Listener(Protocol):
    """Who is told of what becomes of a run's logs."""

    def rewound(self, step: int) -> None:
        """The run goes on from `step`; what was logged after it is forgotten."""

    def appended(self, line: LogLine) -> None:
        """A line was appended to its log."""


class RunFolder:
    """The folder of one run; opening it again with the same configuration resumes it."""

    def __init__(self, path: str | Path, config: Mapping[str, Any], *, adapt: bool = False, command: str = ""):
        """Create or re-open.

        Args:
            path: the folder.
            config: settings of the run.
            adapt: let them differ from those recorded there, until `adopt` records them.
            command: that makes the run, for the record.

        Raises:
            DataError: the folder holds another run, or something that is no run.
        """
        self.path = Path(path)
        self.config: dict[str, Any] = json.loads(json.dumps(config))
        self.listener: Listener | None = None
        self._command = {"command": command} if command else {}
        if not check_folder(path, self.config, adapt=adapt):
            write_json(self.path / "config.json", self._record())

    def _record(self) -> dict[str, Any]:
        return {"config": self.config, **self._command, "versions": versions(), "git_commit": git_commit()}

    @property
    def result(self) -> dict[str, Any] | None:
        """`result.json` of a finished run."""
        file = self.path / "result.json"
        return read_json(file) if file.exists() else None

    @property
    def steps(self) -> list[StepLine]:
        """Lines of `stats.jsonl`, read now.

        Raises:
            DataError: one is damaged; says which.
        """
        return read_log(self.path, StepLine)

    @property
    def evaluations(self) -> list[EvaluationLine]:
        """Lines of `eval.jsonl`, likewise."""
        return read_log(self.path, EvaluationLine)

    def append(self, line: LogLine) -> None:
        """Append a line to its log."""
        file = self.path / line.log
        with disk_errors(file), file.open("a") as stream:
            stream.write(json.dumps(line.record(), allow_nan=False) + "\n")
        if self.listener is not None:
            self.listener.appended(line)

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: the resumed run does it again."""
        for kind in LOGS:
            clear_leftovers(self.path, kind.log)
            kept = [text for text, line in numbered(self.path / kind.log, kind) if line.step <= step]
            with atomic_file(self.path / kind.log) as file:
                file.write("".join(f"{text}\n" for text in kept).encode())
        if self.listener is not None:
            self.listener.rewound(step)

    def sync(self) -> None:
        """Have the logs on the disk: a checkpoint must not know more than they do."""
        for name in (kind.log for kind in LOGS):
            if (self.path / name).exists():
                handle = os.open(self.path / name, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)

    def adopt(self, step: int) -> None:
        """Record the changed settings of a run that goes on from `step` with them.

        What they left goes to a new ``before-step-…/``: `config.json`, `result.json`, model and policy; the logs too if
        they are of other domains or targets.
        """
        record = read_json(self.path / "config.json")
        changed = differences(record["config"], self.config)
        if not changed:
            return
        archive = self._new_archive(step)
        write_json(archive / "config.json", record)
        for name in (*RESULTS, *([kind.log for kind in LOGS] if {"domains", "targets"} & changed.keys() else ())):
            if (self.path / name).exists():
                (self.path / name).rename(archive / name)
        adapted = [*record.get("adapted", []), {"step": step, "changed": changed}]
        write_json(self.path / "config.json", self._record() | {"adapted": adapted})

    def _new_archive(self, step: int) -> Path:
        """An empty folder for what was there before: ``before-step-00000120``, then ``before-step-00000120-2``, …"""
        name, count = f"before-step-{step:08d}", len([*self.path.glob(f"before-step-{step:08d}*")])
        archive = self.path / (f"{name}-{count + 1}" if count else name)
        with disk_errors(archive):
            archive.mkdir()
        return archive


def check_folder(path: str | Path, config: Mapping[str, Any], *, adapt: bool = False) -> bool:
    """Whether the folder holds a run, which is then one with these settings.

    Args:
        path: the folder.
        config: settings, as JSON has them.
        adapt: let them differ.

    Raises:
        DataError: it holds another run, or something that is no run.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        if path.exists() and (not path.is_dir() or any(not _is_ours(each.name) for each in path.iterdir())):
            raise DataError(f"out={path}: already holds other files; choose another folder")
        return False
    recorded = recorded_config(path)
    changed = {} if adapt else differences(recorded, config)
    for name, (there, now) in changed.items():
        raise DataError(
            f"out={path}: already holds another run ({name}={there!r} there, {now!r} now); choose another --out, the "
            f"same settings to resume it, or, for a target run, go on with these by --adapt"
        )
    return True


def _is_ours(name: str) -> bool:
    """What a run leaves in a folder that it has not claimed yet."""
    return name in (LOCK, HOLDER) or name.startswith((".config.json.", f"{HOLDER}.", f".{HOLDER}."))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Settings that differ, each with both values, by name."""
    keys = sorted(before.keys() | now.keys())
    return {key: [before.get(key), now.get(key)] for key in keys if before.get(key) != now.get(key)}


def open_run(path: str | Path) -> RunFolder:
    """An existing run, for reading.

    Raises:
        ConfigError: there is no run in `path`.
    """
    if not (Path(path) / "config.json").exists():
        raise ConfigError(f"run={path}: must be the folder of a run (it has no config.json)")
    return RunFolder(path, recorded_config(path))


def recorded_config(path: str | Path) -> dict[str, Any]:
    """The configuration that a run's `config.json` records.

    Raises:
        DataError: the file is no run's, but a model's, say.
    """
    record = read_json(Path(path) / "config.json")
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict) or "versions" not in record:
        raise DataError(f"{path}/config.json: is not the record of a run; choose another folder")
    config: dict[str, Any] = record["config"]
    return config
