"""Finished runs for `acodm fit-surrogate --problems`: of one corpus, model and length, with any mixtures and cuts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError, DataError, unknown
from acodm_env.experiments.console import note
from acodm_env.experiments.run.folder import recorded_config
from acodm_env.experiments.surrogate.logged_runs import effective, is_finished, read_logs, runs_below
from acodm_env.run_log import array
from acodm_env.step_stats import Array
from acodm_env.surrogate.calibrated import Record

SHARED = (
    *("model", "target", "steps", "batch_size", "sequence_length", "learning_rate", "schedule", "corpus"),
    *("eval_sequences",),
)
"""Settings that all runs of a fit must share, where they have them; domains, targets and cuts may differ."""
WINDOWS = 100
"""Most parts of a run within which its mixture counts as constant."""
EVALUATIONS = 16
"""Most evaluations of a run that a fit reads, spread over it, first and last included."""


class ProblemLogs:
    """The finished runs below some folders."""

    def __init__(self, folders: Sequence[str], initial_loss: float | None = None):
        """Read them.

        Args:
            folders: of runs, of benchmarks, or of anything that has runs below it.
            initial_loss: ln V in nats; None takes the evaluations before the first step.

        Raises:
            ConfigError: a folder is not there or has no finished run, or runs differ in what they must share.
            DataError: a log is not whole.
        """
        found = list(dict.fromkeys(run for folder in folders for run in _runs(Path(folder))))
        self.paths = [path for path in found if is_finished(path)]
        if not self.paths:
            raise ConfigError(
                f"problems={', '.join(folders)}: must hold at least one finished, undiverged run with evaluations"
            )
        if len(self.paths) < len(found):
            note(f"left out {len(found) - len(self.paths)} runs that are unfinished or diverged")
        logs = [_Log(path) for path in self.paths]
        _check_shared(logs)
        logs = _different(logs)
        self.paths = [log.path for log in logs]
        names = [name for log in logs for name in (*log.domains, *log.targets)]
        self.domains: tuple[str, ...] = tuple(dict.fromkeys(names))
        """K rows: all domains of all runs, then the targets that are none of them."""
        self.records = [log.record(self.domains) for log in logs]
        """One per run."""
        starts = [log.losses[0].mean() for log in logs if log.times[0] == 0]
        if initial_loss is None and not starts:
            raise ConfigError("initial_loss=None: must be given; no run was evaluated before its first step")
        self.initial = float(np.mean(starts)) if initial_loss is None else initial_loss
        """ln V, nats."""

    def below(self, folders: Sequence[str]) -> set[str]:
        """Names of the records that lie below some folders.

        Raises:
            ConfigError: none lies below one of them.
        """
        chosen: set[str] = set()
        for folder in folders:
            root = Path(folder).resolve()
            mine = {str(path) for path in self.paths if path.resolve().is_relative_to(root)}
            if not mine:
                raise ConfigError(
                    f"held_out={folder}: must be the folder of some of the {len(self.paths)} runs of --problems; check "
                    f"the path"
                )
            chosen |= mine
        return chosen


class _Log:
    """One run's files, in its own order of domains."""

    def __init__(self, path: Path):
        self.path, self.config = path, recorded_config(path)
        steps, evaluations = read_logs(path)
        try:
            self.domains, self.targets = tuple(self.config["domains"]), tuple(evaluations[-1].targets)
            self.cut: Mapping[str, int] = self.config.get("cut") or {}
            drawn = array([line.realised for line in steps])
            self.mixtures = effective(drawn, [line.loss_weights for line in steps])  # (T, K)
            self.sizes = _sizes(drawn, array(steps[-1].epochs))
            kept = evaluations
            if len(evaluations) > EVALUATIONS:
                kept = [evaluations[i] for i in np.linspace(0, len(evaluations) - 1, EVALUATIONS).round().astype(int)]
            self.steps = np.array([line.step for line in kept])
            self.losses = array([line.losses for line in kept])  # (E, M)
            shapes = self.mixtures.shape[1], self.losses.shape[1]
            if shapes != (len(self.domains), len(self.targets)):
                raise ValueError(f"{shapes} values for {len(self.domains)} domains and {len(self.targets)} targets")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"run={path}: its logs lack what a fit needs ({error!r}); leave it out") from error
        if self.steps[-1] != len(steps):
            raise DataError(
                f"run={path}: must be evaluated after its last step, {len(steps)}; it was after {self.steps[-1]}"
            )
        for name in self.cut:
            if name not in self.domains:
                unknown(f"run={path}: cut of domain", name, self.domains)

    @property
    def times(self) -> Array:
        """(E,) share of the run done at each evaluation."""
        return self.steps / len(self.mixtures)

    def record(self, rows: Sequence[str]) -> Record:
        """The run with one column per row of the fit."""
        place = [rows.index(name) for name in self.domains]
        done = np.concatenate([np.zeros((1, len(place))), self.mixtures.cumsum(0)]) / len(self.mixtures)
        parts = np.array_split(self.mixtures, min(WINDOWS, len(self.mixtures)))

        def spread(values: Any, blank: float, columns: Sequence[int]) -> Array:  # (…, k) → (…, K)
            values = np.asarray(values, dtype=np.float64)
            full = np.full((*values.shape[:-1], len(rows)), blank)
            full[..., columns] = values
            return full

        return Record(
            name=str(self.path),
            mixer=str(self.config.get("mixer") or self.config.get("name") or "policy"),
            problem=self._problem(rows),
            trainable=spread(np.ones(len(place)), 0.0, place),
            sizes=spread(self.sizes, 0.0, place),
            mixtures=spread(np.stack([part.mean(0) for part in parts]), 0.0, place),
            drawn=spread(done[self.steps], 0.0, place),
            times=self.times,
            losses=spread(self.losses, np.nan, [rows.index(name) for name in self.targets]),
        )

    def _problem(self, rows: Sequence[str]) -> str:
        """What it was trained on, in words."""
        without = [f"without {name}" for name in rows if name not in self.domains]
        cuts = [f"{name} cut to {number}" for name, number in sorted(self.cut.items())]
        return ", ".join([*without, *cuts]) or "whole"


def _different(logs: "Sequence[_Log]") -> "list[_Log]":
    """Without copies: tasks of a suite share runs, which would weigh double."""
    kept = {(log.domains, log.targets, log.losses.tobytes(), log.mixtures.tobytes()): log for log in reversed(logs)}
    if len(kept) < len(logs):
        note(f"left out {len(logs) - len(kept)} copies of other runs")
    return list(reversed(kept.values()))


def _runs(folder: Path) -> list[Path]:
    """Folders of runs; says so where one was never evaluated."""
    if (folder / "stats.jsonl").exists() and not (folder / "eval.jsonl").exists():
        raise ConfigError(
            f"run={folder}: must have eval.jsonl, its held-out losses; run it again with --evaluations 20"
        )
    return runs_below(folder)


def _check_shared(logs: "Sequence[_Log]") -> None:
    """Refuse runs of another corpus, model or length.

    A cut or another choice of domains gives a corpus another fingerprint, and then its name must do.
    """
    first = logs[0].config
    prints: dict[tuple[Any, ...], Any] = {}
    for log in logs:
        for name in SHARED:
            mine, wanted = log.config.get(name), first.get(name)
            if mine != wanted:
                raise ConfigError(
                    f"run={log.path}: must have {name}={wanted!r} as the first run has; it has {mine!r}; fit them apart"
                )
        mine = log.config.get("corpus_fingerprint")
        wanted = prints.setdefault((log.domains, *sorted(log.cut.items())), mine)
        if mine != wanted:
            raise ConfigError(
                f"run={log.path}: must be of the corpus {str(wanted)[:12]}… as earlier runs with its domains and cut "
                f"are; it is of {str(mine)[:12]}…: the corpus was prepared anew; fit them apart"
            )


def _sizes(drawn: Array, epochs: Array) -> Array:
    """(K,) training text of each domain as a fraction of the run: what was drawn over the passes that this was.

    A domain that was never drawn counts as one whole run: its size made no difference.
    """
    whole = drawn.sum(0) / len(drawn)
    sizes: Array = np.divide(whole, epochs, out=np.ones_like(whole), where=epochs > 0)
    return sizes
