"""Runs to compare, read from a benchmark's folder or from several runs of `acodm transfer`.

Reading never fails on what is missing, cut short or corrupted: such a run has a status and a message, and the
comparison says in `problems` what it lacks. Whether the runs differ is for summary.py to say.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError, DataError, unknown
from acodm_env.experiments.comparison.fairness import unfair
from acodm_env.experiments.comparison.run import Run, read_failure, read_record, read_run
from acodm_env.experiments.run.results import objective_name
from acodm_env.files import read_json
from acodm_env.run_log import EvaluationLine, read_log
from acodm_env.step_stats import Array

__all__ = ["Comparison", "Run", "load"]

SHARED = ("steps", "corpus_fingerprint", "eval_sequences", "objective", "metric")
"""Settings without which two test losses are not of the same thing."""
FAIR = ("target", "batch_size", "sequence_length", "learning_rate")
"""Settings by which runs may differ, but then the mixers are not all that differs."""
OWN = ("mixer", "name", "schedule", "seed", "rule", "options", "policy", "weights", "certificate")
"""Settings of a single run, beside those that all share."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs of several mixers on the same targets over the same number of steps."""

    title: str
    reference: str
    """The mixer that steps and cost are counted against; "" if there is none."""
    schedules: tuple[str, ...]
    seeds: tuple[int, ...]
    mixers: tuple[str, ...]
    """In the order of the plan."""
    domains: tuple[str, ...]
    """Names of the K training domains."""
    targets: tuple[str, ...]
    """Names of the M held-out sets."""
    objective: Array
    """(M,) weights of the targets, summing to 1."""
    horizon: int
    """Optimiser steps of every run."""
    tokens_per_step: int
    runs: tuple[Run, ...]
    """Every run that was planned, those that are missing too."""
    versions: dict[str, str]
    git_commit: str | None
    settings: dict[str, Any]
    """What all runs share, as `config.json` records it."""
    command: str
    problems: tuple[str, ...] = ()
    """What is missing or corrupted, in words."""

    @property
    def objective_name(self) -> str:
        """The objective that the user chose, in words; "" where none was chosen."""
        return objective_name(self.settings)

    @property
    def primary(self) -> str:
        """The field of a result that the objective is."""
        return "objective_nats" if self.settings.get("metric") == "perplexity" else "mean_loss_nats"

    def level(self, run: Run) -> Array:
        """(E,) what "as good as the reference" means: exp(objective), or mean perplexity where none was chosen."""
        if self.settings.get("metric") != "loss":
            return run.perplexity(self.objective)
        with np.errstate(over="ignore"):
            level: Array = np.exp(run.mean_loss(self.objective))
        return level

    def select(self, mixer: str, schedule: str) -> tuple[Run, ...]:
        """A mixer's runs under one schedule, by seed."""
        found = [run for run in self.runs if (run.mixer, run.schedule) == (mixer, schedule)]
        return tuple(sorted(found, key=lambda run: run.seed))

    def run(self, mixer: str, schedule: str, seed: int) -> Run | None:
        """One run; None if it was not planned."""
        return next((run for run in self.select(mixer, schedule) if run.seed == seed), None)


def load(paths: Sequence[str | Path], reference: str | None = None) -> Comparison:
    """Read a benchmark's folder, or several folders of `acodm transfer`.

    Args:
        paths: one benchmark, finished or not; or one or more runs on the same targets over the same steps.
        reference: the mixer to count steps and cost against; by default the plan's, or of plain runs odm-released if
            it is among them, else uniform, else the first.

    Raises:
        ConfigError: a path is no run, the runs cannot be compared, or `reference` is none of the mixers.
    """
    folders = [Path(path) for path in paths]
    if not folders:
        raise ConfigError("paths=[]: must be the folder of a benchmark, or of one or more runs")
    plain = [_is_plain_run(folder) for folder in folders]
    if len(folders) == 1 and not plain[0]:
        found = _benchmark(folders[0])
    elif all(plain):
        found = _transfers(folders)
    else:
        other = folders[plain.index(False)]
        raise ConfigError(f"paths={other}: must be a run, as the others are; give a benchmark alone, or only runs")
    if reference is None:
        return found
    if reference not in found.mixers:
        unknown("reference", reference, found.mixers)
    return replace(found, reference=reference)


def _is_plain_run(folder: Path) -> bool:
    """Whether it is a run's folder rather than a benchmark's, begun or even empty.

    Raises:
        ConfigError: it is neither.
    """
    if not folder.is_dir():
        raise ConfigError(f"paths={folder}: must be the folder of a run or a benchmark; there is no such folder")
    if (folder / "plan.json").exists() or (folder / "cells").is_dir() or not any(folder.iterdir()):
        return False
    if not (folder / "config.json").exists():
        raise ConfigError(f"paths={folder}: must be the folder of a run or a benchmark; it has no config.json")
    try:
        record = read_json(folder / "config.json")
    except DataError:
        return (folder / "stats.jsonl").exists()
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict) or "versions" not in record:
        raise ConfigError(f"paths={folder}: must be the folder of a run or a benchmark; its config.json is no run's")
    known = record["config"].keys()
    if {"schedule", "seed", "steps"} <= known and {"mixer", "name"} & known:
        return True
    if {"targets", "objective"} <= known:
        return False
    raise ConfigError(
        f"paths={folder}: must be a benchmark, or a run of acodm transfer; it is a run of another command"
    )


# --- a benchmark -------------------------------------------------------------------------------------------


def _benchmark(out: Path) -> Comparison:
    problems: list[str] = []
    record, plan = read_record(out, problems), _plan(out, problems)
    wanted = [cell for cell in plan["cells"] if cell["kind"] == "target"]
    if not record:  # every run repeats the shared settings
        known = [found for cell in wanted if (found := read_record(out / cell["folder"], []))]
        record = known[0] if known else {}
    settings = {name: value for name, value in record.get("config", {}).items() if name not in OWN}
    targets = tuple(settings.get("targets", ()))
    named = ("mixer", "schedule", "seed", "command")
    runs = [read_run(out / cell["folder"], **{name: cell[name] for name in named}, targets=targets) for cell in wanted]
    lost = _failed_preparations(out, plan["cells"])
    runs = [_blame(run, cell, lost) for run, cell in zip(runs, wanted, strict=True)]
    if lost:
        count = sum(cell["kind"] == "preparation" for cell in plan["cells"])
        problems.append(f"{len(lost)} of {count} preparations failed: {_listing(lost.values())}")
    problems += unfair(runs)
    return _comparison(runs, record, settings, plan, problems)


def _plan(out: Path, problems: list[str]) -> dict[str, Any]:
    """`plan.json`; without it, what the runs in the folder say of themselves."""
    needed = ("kind", "name", "mixer", "schedule", "seed", "folder")
    try:
        plan = read_json(out / "plan.json")
        cells = [
            {"index": cell["index"], "needs": cell.get("needs", []), "command": cell.get("command", "")}
            | {name: cell[name] for name in needed}
            for cell in plan["cells"]
        ]
        return {name: plan[name] for name in ("reference", "schedules", "seeds", "mixers")} | {
            "command": plan.get("command", ""),
            "cells": cells,
        }
    except (DataError, OSError) as error:
        problems.append(str(error))
    except (KeyError, TypeError, AttributeError) as error:
        problems.append(f"{out / 'plan.json'}: is not the plan of a benchmark ({type(error).__name__}: {error})")
    return _plan_of(
        [
            read_record(path.parent, []).get("config", {}) | {"folder": path.parent.relative_to(out).as_posix()}
            for path in sorted(out.glob("cells/**/config.json"))
        ]
    )


def _plan_of(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    cells = [
        {"index": index, "kind": "target", "name": config["folder"], "needs": [], "command": ""}
        | {name: config[name] for name in ("mixer", "schedule", "seed", "folder")}
        for index, config in enumerate(config for config in configs if {"mixer", "schedule", "seed"} <= config.keys())
    ]
    mixers, schedules, seeds = (
        list(dict.fromkeys(cell[name] for cell in cells)) for name in ("mixer", "schedule", "seed")
    )
    plan = {"mixers": mixers, "schedules": schedules, "seeds": sorted(seeds), "cells": cells, "command": ""}
    return plan | {"reference": _default_reference(mixers)}


def _default_reference(mixers: Sequence[str]) -> str:
    return next((name for name in ("odm-released", "uniform", *mixers) if name in mixers), "")


def _failed_preparations(out: Path, cells: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Names and errors of the preparatory cells that failed, by index."""
    folders = {cell["index"]: (cell["name"], out / cell["folder"]) for cell in cells if cell["kind"] == "preparation"}
    return {
        index: f"{name} ({read_failure(folder)})"
        for index, (name, folder) in folders.items()
        if (folder / "failed.json").exists() and not (folder / "result.json").exists()
    }


def _blame(run: Run, cell: Mapping[str, Any], lost: Mapping[int, str]) -> Run:
    """A run that is missing because a preparation failed says so."""
    causes = [lost[index] for index in cell["needs"] if index in lost]
    if run.status == "missing" and causes:
        return replace(run, message=f"its preparation failed: {causes[0]}")
    return run


def _listing(texts: Iterable[str], most: int = 10) -> str:
    texts = list(texts)
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return "; ".join(texts[:most] + more)


# --- runs of `acodm transfer` -------------------------------------------------------------------------------


def _transfers(folders: Sequence[Path]) -> Comparison:
    problems: list[str] = []
    records = {folder: record for folder in folders if (record := read_record(folder, problems))}
    configs = {folder: record["config"] for folder, record in records.items()}
    targets = {folder: known for folder in configs if (known := _targets(folder, configs[folder]))}
    _check_same("targets", targets)
    for name in SHARED:
        _check_same(name, {folder: config.get(name) for folder, config in configs.items()})
    for name in FAIR:
        values = list(dict.fromkeys(str(config.get(name)) for config in configs.values()))
        if len(values) > 1:
            problems.append(f"the runs differ in {name} ({', '.join(values)}): not only the mixers differ")
    names = _labels(configs)
    plan = _plan_of([config | {"mixer": names[folder], "folder": str(folder)} for folder, config in configs.items()])
    first = next(iter(configs), None)
    settings = {name: value for name, value in configs[first].items() if name not in OWN} if first else {}
    settings["targets"] = list(next(iter(targets.values()), ()))
    runs = [
        read_run(
            folder,
            mixer=names[folder],
            schedule=config["schedule"],
            seed=config["seed"],
            command=str(records[folder].get("command", "")),
            targets=settings["targets"],
        )
        for folder, config in configs.items()
    ]
    return _comparison(runs, records[first] if first else {}, settings, plan, problems)


def _targets(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a run's held-out sets; () if it was not evaluated yet."""
    logged = [line.targets for line in read_log(folder, EvaluationLine)[:1]]
    return tuple(config.get("targets") or (logged[0] if logged else ()))


def _check_same(name: str, values: Mapping[Path, Any]) -> None:
    folders = list(values)
    for other in folders[1:]:
        if values[other] != values[folders[0]]:
            raise ConfigError(
                f"paths={other}: must have {name}={values[folders[0]]!r} as {folders[0]} has; it has "
                f"{values[other]!r}; compare runs that share targets and steps"
            )


def _labels(configs: Mapping[Path, Mapping[str, Any]]) -> dict[Path, str]:
    """A name per run: its mixer's, with the first folder of its kind where two kinds of run have the same.

    Runs are of one kind if they differ in seed and schedule only, so two policies or two static mixtures are two rows.

    Raises:
        ConfigError: two runs have all the same.
    """
    kinds: dict[str, dict[str, str]] = {}
    cells: dict[tuple[str, str, str, int], Path] = {}
    found = {}
    for folder, config in configs.items():
        name = str(config.get("name") or config.get("mixer"))
        kind = json.dumps([config.get(key) for key in ("policy", "weights", "options", "certificate")])
        kinds.setdefault(name, {}).setdefault(kind, folder.name)
        found[folder] = (name, kind)
        twin = cells.setdefault((name, kind, config["schedule"], config["seed"]), folder)
        if twin != folder:
            raise ConfigError(
                f"paths={folder}: must not repeat {name} with seed {config['seed']}, which {twin} is too; leave one out"
            )
    return {
        folder: name if len(kinds[name]) == 1 else f"{name} ({kinds[name][kind]})"
        for folder, (name, kind) in found.items()
    }


def _comparison(
    runs: Sequence[Run],
    record: Mapping[str, Any],
    settings: dict[str, Any],
    plan: Mapping[str, Any],
    problems: Sequence[str],
) -> Comparison:
    targets = tuple(settings.get("targets", ()))
    lacking = [run for run in runs if not run.ended]
    listed = _listing(
        f"{run.schedule}/{run.mixer}/seed{run.seed} ({run.status}{': ' + run.message if run.message else ''})"
        for run in lacking
    )
    found = list(problems)
    if lacking:
        found.append(f"{len(lacking)} of {len(runs)} runs are not finished: {listed}")
    if not runs:
        found.append("no run is there yet")
    corpus = Path(str(settings.get("corpus", "?"))).name
    model = settings.get("model", settings.get("target", "?"))
    title = f"{len(plan['mixers'])} mixers, {model} on {corpus}, {settings.get('steps', 0):,} steps"
    chosen = objective_name(settings) if targets else ""
    return Comparison(
        title=f"{title}, {chosen}" if chosen else title,
        reference=plan["reference"],
        schedules=tuple(plan["schedules"]),
        seeds=tuple(plan["seeds"]),
        mixers=tuple(plan["mixers"]),
        domains=tuple(settings.get("domains", ())),
        targets=targets,
        objective=np.array(settings.get("objective") or [1 / len(targets)] * len(targets) if targets else [], float),
        horizon=int(settings.get("steps", 0)),
        tokens_per_step=int(settings.get("batch_size", 0)) * int(settings.get("sequence_length", 0)),
        runs=tuple(runs),
        versions=dict(record.get("versions") or {}),
        git_commit=record.get("git_commit"),
        settings=settings,
        command=plan["command"],
        problems=tuple(found),
    )
