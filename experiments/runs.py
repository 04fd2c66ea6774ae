"""A run is a folder: what was asked for, what happened at every step, and enough to go on after an interruption.

``config.json`` (resolved configuration, versions, commit), ``stats.jsonl`` (a line per optimiser step),
``eval.jsonl`` (a line per evaluation on the test split), ``checkpoints/``, ``result.json``.
"""

import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError, DataError
from acodm_env.files import atomic_file, disk_errors, read_json, read_state, write_json, write_state
from acodm_env.trainer import Array, Mixer, StepStats, Trainer, drive

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


class RunFolder:
    """The folder of one run; opening it again with the same configuration resumes it."""

    def __init__(self, path: str | Path, config: Mapping[str, Any]):
        """Create or re-open.

        Raises:
            DataError: the folder holds another run, or something that is no run.
        """
        self.path = Path(path)
        self.config = json.loads(json.dumps(config))
        record = self.path / "config.json"
        if record.exists():
            self._check_same(recorded_config(self.path))
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise DataError(f"out={self.path}: already holds other files; choose another folder")
        else:
            write_json(record, {"config": self.config, "versions": versions(), "git_commit": git_commit()})

    def _check_same(self, recorded: Mapping[str, Any]) -> None:
        keys = sorted(recorded.keys() | self.config.keys())
        changed = [key for key in keys if recorded.get(key) != self.config.get(key)]
        if changed:
            first = changed[0]
            raise DataError(
                f"out={self.path}: already holds another run ({first}={recorded.get(first)!r} there, "
                f"{self.config.get(first)!r} now); choose another --out, or the same settings to resume it"
            )

    @property
    def result(self) -> dict[str, Any] | None:
        """`result.json` of a finished run."""
        file = self.path / "result.json"
        return read_json(file) if file.exists() else None

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Records of `stats.jsonl` or `eval.jsonl`; a last line cut short by an interruption is dropped."""
        file = self.path / name
        if not file.exists():
            return []
        records = []
        for line in file.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one JSON line."""
        file = self.path / name
        with disk_errors(file), file.open("a") as stream:
            stream.write(json.dumps(record, allow_nan=False) + "\n")

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: the resumed run does it again."""
        for name in ("stats.jsonl", "eval.jsonl"):
            kept = [record for record in self.lines(name) if record["step"] <= step]
            with atomic_file(self.path / name) as file:
                file.write("".join(json.dumps(record) + "\n" for record in kept).encode())


def run_mixer(
    folder: RunFolder,
    trainer: Trainer,
    mixer: Mixer,
    *,
    seed: int,
    evaluations: int,
    on_step: Callable[[StepStats], None] = lambda stats: None,
) -> None:
    """Train to the horizon under `mixer`, logging into `folder` and resuming where an interruption left off.

    Evaluates on the test split at least `evaluations` times, evenly spaced, at the start and at the end; never if 0.
    A checkpoint is taken at about every tenth of the run.
    """
    horizon, interval = trainer.info.horizon, trainer.info.decision_every
    evaluate_every = max(1, horizon // evaluations) if evaluations else 0
    save_every = interval * max(1, horizon // (10 * interval))
    trainer.reset(np.random.default_rng(seed))
    mixer.start(trainer.info)
    checkpoint = folder.path / "checkpoints" / "last.safetensors"
    if checkpoint.exists():
        state = read_state(checkpoint)
        trainer.load_state_dict(state["trainer"])
        mixer.load_state_dict(state["mixer"])
    folder.rewind(trainer.steps_done)
    if evaluations and not folder.lines("eval.jsonl"):
        _log_evaluation(folder, trainer, 0)
    for stats, seconds in _timed(drive(trainer, mixer, horizon - trainer.steps_done)):
        folder.append("stats.jsonl", _stats_record(stats, seconds) | mixer.diagnostics())
        ended = stats.step == horizon or stats.diverged
        if evaluations and (ended or stats.step % evaluate_every == 0):
            _log_evaluation(folder, trainer, stats.step)
        if stats.step % save_every == 0 and stats.step < horizon:
            write_state(checkpoint, {"trainer": trainer.state_dict(), "mixer": mixer.state_dict()})
        on_step(stats)


def _timed(steps: Iterator[StepStats]) -> Iterator[tuple[StepStats, float]]:
    """Each step with its wall-clock seconds: mixer and training, without the logging between steps."""
    while True:
        started = time.perf_counter()
        stats = next(steps, None)
        if stats is None:
            return
        yield stats, time.perf_counter() - started


def _log_evaluation(folder: RunFolder, trainer: Trainer, step: int) -> None:
    losses = trainer.evaluate("test")
    folder.append("eval.jsonl", {"step": step, "losses": _plain(losses), "targets": list(trainer.info.targets)})


def _stats_record(stats: StepStats, seconds: float) -> dict[str, Any]:
    return {
        "step": stats.step,
        "tokens": stats.tokens,
        "requested": _plain(stats.requested),
        "realised": _plain(stats.realised),
        "losses": _plain(stats.losses),
        "loss_weights": None if stats.loss_weights is None else _plain(stats.loss_weights),
        "eval_losses": None if stats.eval_losses is None else _plain(stats.eval_losses),
        "epochs": _plain(stats.epochs),
        "loss": _plain(np.array(stats.loss)),
        "grad_norm": _plain(np.array(stats.grad_norm)),
        "lr": _plain(np.array(stats.lr)),
        "mixture_age": stats.mixture_age,
        "diverged": stats.diverged,
        "seconds": seconds,
    }


def _plain(values: Array) -> Any:
    """Numbers as JSON has them: what is not finite is null."""
    return np.where(np.isfinite(values), values, None).tolist()  # type: ignore[call-overload]


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
