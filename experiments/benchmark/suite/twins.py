"""Runs that differ in the objective alone are made once: who neither reads nor measures it trains the same model.

A finished run of another task becomes a run of this one: the logs are the same files (linked where that can be), the
result is computed anew under this task's objective. Every task evaluates all domains, so nothing is missing.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from acodm_env.agents.baselines.recorded import MEAN_OF
from acodm_env.experiments.benchmark.jobs import LOGGED, finish, lm_trainer, state_of, stores
from acodm_env.experiments.benchmark.plan import Cell, Entry, Plan, is_dynamic
from acodm_env.experiments.benchmark.suite.rows import OBJECTIVE_FREE
from acodm_env.experiments.run.folder import RunFolder, recorded_config
from acodm_env.experiments.run.results import judged, objective_result
from acodm_env.files import read_json, write_json
from acodm_env.run_log import array, first_step
from acodm_env.step_stats import Array
from acodm_env.trainer import RunInfo

OF_OBJECTIVE = ("objective", "metric")
"""Settings that a run does not depend on, if its mixer does not."""
SAME_MIXTURE = 1e-9


def fixed_mixture(entry: Entry, info: RunInfo) -> Array | None:
    """The mixture (K,) of a row that has the same one in every run, known before the first; else None."""
    if entry.is_policy or is_dynamic(entry):
        return None
    mixer = entry.make()
    if mixer.preparation(info):
        return None
    mixer.start(info)
    return mixer.weights()


def same_rows(entries: Sequence[Entry], info: RunInfo) -> dict[str, str]:
    """Rows whose mixture an earlier row has already, with the name of that row."""
    seen: list[tuple[str, Array]] = []
    found = {}
    for entry in entries:
        mixture = fixed_mixture(entry, info)
        if mixture is None:
            continue
        twin = next((name for name, other in seen if np.abs(mixture - other).max() < SAME_MIXTURE), None)
        if twin is None:
            seen.append((entry.name, mixture))
        else:
            found[entry.name] = twin
    return found


def borrow(out: Path, plan: Plan, others: Sequence[Path]) -> int:
    """Fill the cells of the benchmark in `out` that other tasks have run already; returns how many.

    Args:
        out: the task's folder, planned.
        plan: its plan.
        others: folders of the other tasks.
    """
    settings = recorded_config(out)
    sources = [Source(folder) for folder in others if _comparable(folder, settings)]
    if not sources:
        return 0
    store, heldout = stores(settings)
    info, count = lm_trainer(settings, store, heldout).info, 0
    for cell in plan.cells:
        folder = out / cell.folder
        if state_of(folder) in ("finished", "unfinished"):
            continue
        found = next((each for source in sources if (each := source.twin(plan, cell, info)) is not None), None)
        if found is None:
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            shutil.rmtree(folder, ignore_errors=True)
            copy = _preparation if cell.kind == "preparation" else _target
            copy(found, folder, settings, plan, cell, info)
        count += 1
    return count


def _comparable(folder: Path, settings: Mapping[str, Any]) -> bool:
    if not (folder / "plan.json").exists():
        return False
    theirs = recorded_config(folder)
    keys = (settings.keys() | theirs.keys()) - {*OF_OBJECTIVE}
    return all(theirs.get(key) == settings.get(key) for key in keys)


class Source:
    """Another task over the same data."""

    def __init__(self, out: Path):
        """Read its plan."""
        self.out, self.plan = out, Plan.load(out)

    def twin(self, plan: Plan, cell: Cell, info: RunInfo) -> Path | None:
        """Folder of a finished cell that does what `cell` of `plan` would do, apart from the objective."""
        if cell.kind == "preparation":
            named = [each for each in self.plan.cells if each.name == cell.name]
            mixers = [request.mixer for request in plan.entry(cell.mixer.split(", ")[0]).make().preparation(info)]
            return self._finished(named) if {*mixers} <= {*OBJECTIVE_FREE} else None
        alike = [each for each in self.plan.cells if each.kind == "target"]
        alike = [each for each in alike if (each.schedule, each.seed) == (cell.schedule, cell.seed)]
        entry, averaged = plan.entry(cell.mixer), cell.mixer.startswith(MEAN_OF)
        if entry.mixer in OBJECTIVE_FREE:
            return self._finished([each for each in alike if self._does(each, entry, averaged)])
        mixture = None if averaged else fixed_mixture(entry, info)
        if mixture is None:
            return None
        return self._finished([each for each in alike if self._holds(each, mixture)])

    def _finished(self, cells: Sequence[Cell]) -> Path | None:
        folders = (self.out / cell.folder for cell in cells)
        return next((folder for folder in folders if state_of(folder) == "finished"), None)

    def _does(self, cell: Cell, entry: Entry, averaged: bool) -> bool:
        theirs = self.plan.entry(cell.mixer)
        same = (theirs.mixer, dict(theirs.options)) == (entry.mixer, dict(entry.options))
        return same and cell.mixer.startswith(MEAN_OF) == averaged

    def _holds(self, cell: Cell, mixture: Array) -> bool:
        """Whether a row has this mixture throughout."""
        theirs = self.plan.entry(cell.mixer)
        if theirs.is_policy or is_dynamic(theirs) or cell.needs:
            return False
        first = first_step(self.out / cell.folder)
        return first is not None and bool(np.abs(array(first.requested) - mixture).max() < SAME_MIXTURE)


def _target(found: Path, path: Path, settings: Mapping[str, Any], plan: Plan, cell: Cell, info: RunInfo) -> None:
    """The run in `found` as a run of this task."""
    entry, theirs = plan.entry(cell.mixer), read_json(found / "result.json")
    identity = {**settings, "mixer": cell.mixer, "schedule": cell.schedule, "seed": cell.seed}
    folder = RunFolder(path, identity | {"rule": entry.mixer, "options": dict(entry.options)})
    for name in LOGGED[1:]:
        _link(found / name, path / name)
    outcome = objective_result(folder)
    losses = theirs["validation_loss_nats"]
    held = None if outcome["diverged"] else np.array([losses[name] for name in info.targets], dtype=np.float64)
    outcome |= judged(info, outcome["domain_loss_nats"], held)
    kept = {name: theirs[name] for name in ("cost", "data_seed")} | {"run_by": str(found)}
    finish(folder, {"mixer": cell.mixer, "schedule": cell.schedule, "seed": cell.seed} | outcome | kept)


def _preparation(found: Path, path: Path, settings: Mapping[str, Any], plan: Plan, cell: Cell, info: RunInfo) -> None:
    """The preparation in `found` as one of this task."""
    shutil.copytree(found, path, ignore=shutil.ignore_patterns("result.json"))
    for file in [path / "config.json", *path.glob("*/config.json")]:
        record = read_json(file)
        config = {name: value for name, value in record["config"].items() if name not in OF_OBJECTIVE}
        own = {name: settings[name] for name in OF_OBJECTIVE if name in settings}
        write_json(file, {**record, "config": config | own})
    for file in found.glob("*/result.json"):
        shutil.copy2(file, path / file.parent.name / "result.json")
    theirs = read_json(found / "result.json")
    result = {name: theirs[name] for name in ("seed", "results", "cost")}
    folder = RunFolder(path, recorded_config(path))
    finish(folder, {"mixer": cell.mixer, **result, "run_by": str(found)})


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk does not link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
