"""`acodm benchmark --suite mixing`: many mixing problems, each a benchmark of its own, and the regret of every row.

The same command again runs what is missing and aggregates anew; with other tasks, rows, seeds or a policy of another
name it adds them.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from acodm_env.errors import ConfigError
from acodm_env.experiments.benchmark.config import DEFAULTS, BenchmarkConfig
from acodm_env.experiments.benchmark.jobs import lm_trainer, state_of, stores
from acodm_env.experiments.benchmark.plan import Entry, Plan
from acodm_env.experiments.benchmark.planning import plan_rows
from acodm_env.experiments.benchmark.scheduler import run_unfinished, say_failures
from acodm_env.experiments.benchmark.settings import shared_settings
from acodm_env.experiments.benchmark.suite.rows import HALF, LEARNED, Rows, learned, pair, rows_of
from acodm_env.experiments.benchmark.suite.tasks import Task, tasks_of
from acodm_env.experiments.benchmark.suite.twins import borrow, same_rows
from acodm_env.experiments.console import note, say, text_table
from acodm_env.experiments.run.command import command_line
from acodm_env.files import read_json, write_json
from acodm_env.trainer import RunInfo

OWN = (
    *("mixers", "options", "domains", "exclude", "cut", "objective", "targets", "cell", "resume", "keep_models"),
    *("reference", "mean_of"),
)
"""Settings that a suite's tasks bring themselves, or that a suite has no use for."""
RECORD = "task.json"


def run(config: BenchmarkConfig) -> int:
    """Run the suite's tasks, then aggregate; 1 if a cell failed."""
    from acodm_env.experiments.benchmark.suite.report import aggregate

    _refuse_others(config)
    tasks = tasks_of(str(config.suite), config.corpus, config.tasks, config.sequence_length, config.quiet)
    policy = _policy(config)
    if config.plan:
        plans = [(task.name, plan_task(config, task, policy, keep=False)[0]) for task in tasks]
        say(text_table(("task", "cells", "steps"), [_planned(name, plan) for name, plan in plans]))
        return 0
    failed = [run_task(config, task, policy) for task in tasks]
    aggregate(Path(config.out), [file.parent for file in sorted(Path(config.out).glob(f"*/{RECORD}"))])
    return 1 if any(failed) else 0


def _refuse_others(config: BenchmarkConfig) -> None:
    for name in OWN:
        if getattr(config, name) != getattr(BenchmarkConfig(), name):
            raise ConfigError(
                f"{name}={getattr(config, name)}: cannot be chosen for --suite {config.suite}, whose tasks bring their "
                f"own; choose among them by --tasks and --rows"
            )
    if len(config.schedule_list()) != 1:
        raise ConfigError(f"schedules={config.schedules}: must be one learning-rate schedule for a suite")


def _planned(name: str, plan: Plan) -> tuple[str, str, str]:
    return name, str(len(plan.cells)), f"{sum(cell.steps for cell in plan.cells):,}"


def _policy(config: BenchmarkConfig) -> list[Entry]:
    """Rows of the policy: the user's, or the one that comes with the package."""
    if config.policy is not None:
        return learned(config.policy)
    try:
        return learned(LEARNED)
    except ConfigError as error:
        note(f"no rows of a policy: {error}")
        return []


def run_task(config: BenchmarkConfig, task: Task, policy: Sequence[Entry]) -> bool:
    """Run what is missing of a task; whether a cell failed."""
    plan, rows = plan_task(config, task, policy)
    failed = _fill(config, task, plan)
    added = None if failed else _pair(Path(config.out) / task.name, plan, rows)
    return failed if added is None else _fill(config, task, plan_task(config, task, policy, added)[0])


def _pair(out: Path, plan: Plan, rows: Rows) -> Entry | None:
    """The row of the best two halves, by the validation objective of the first seed; None with fewer than three."""
    halves = [entry.name for entry in rows.entries if entry.name.startswith(HALF)]
    if len(halves) < 3:
        return None
    cells = [cell for cell in plan.cells if cell.mixer in halves and cell.seed == plan.seeds[0]]
    found = {cell.mixer: read_json(out / cell.folder / "result.json")["validation_objective_nats"] for cell in cells}
    known = {name: nats for name, nats in found.items() if nats is not None}
    return pair([name.removeprefix(HALF) for name in halves], known) if len(known) > 1 else None


def plan_task(
    config: BenchmarkConfig, task: Task, policy: Sequence[Entry], added: Entry | None = None, *, keep: bool = True
) -> tuple[Plan, Rows]:
    """The task's benchmark, planned, and its rows; `added` is one more, `keep` writes the plan into its folder."""
    own, out = task_config(config, task), Path(config.out) / task.name
    settings = shared_settings(replace(own, quiet=True))
    info = _info(settings)
    rows = rows_of(task, info, list(policy), config.rows)
    entries = [*rows.entries, *([added] if added else [])]
    same = same_rows(entries, info)
    if (out / RECORD).exists():
        same = read_json(out / RECORD)["same"] | same
    _check_policy(out, policy)
    command = command_line("benchmark", config, DEFAULTS)
    different = [entry for entry in entries if entry.name not in same]
    plan = plan_rows(own, different, out, rows.averaged, command, keep)
    if keep:
        write_json(out / RECORD, {"task": asdict(task), "same": same})
    return plan, rows


def _info(settings: dict[str, object]) -> RunInfo:
    store, heldout = stores(settings)
    return lm_trainer(settings, store, heldout).info


def _fill(config: BenchmarkConfig, task: Task, plan: Plan) -> bool:
    """Borrow what other tasks have run, run the rest; whether a cell failed."""
    out = Path(config.out) / task.name
    others = [folder for folder in sorted(Path(config.out).iterdir()) if folder.is_dir() and folder != out]
    borrowed = borrow(out, plan, others)
    left = sum(state_of(out / cell.folder) != "finished" for cell in plan.cells)
    if left or borrowed:
        note(f"{task.name}: {left} of {len(plan.cells)} cells to run; {borrowed} of them were run for other tasks")
    failures = run_unfinished(out, plan, config.engine, config.jobs, config.quiet, task.name)
    return say_failures(out, plan, failures)


def task_config(config: BenchmarkConfig, task: Task) -> BenchmarkConfig:
    """The benchmark that a task is; all its domains are evaluated, whether they count or not."""
    from acodm_env.corpus import open_corpus

    known = open_corpus(task.corpus, quiet=True).trainable
    names = dict.fromkeys((*known, *task.targets))
    weights = {name: task.targets.get(name, 0.0) if task.targets else 1.0 for name in names}
    return replace(
        config,
        suite=None,
        tasks=None,
        rows=None,
        policy=None,
        corpus=task.corpus,
        targets=",".join(f"{name}={weight:g}" for name, weight in weights.items()),
        objective=task.objective,
        cut=",".join(f"{name}={left}" for name, left in task.cut.items()) or None,
        exclude=",".join(task.exclude) or None,
        steps=int(config.steps or 0) * task.horizon,
        out=str(Path(config.out) / task.name),
    )


def _check_policy(out: Path, policy: Sequence[Entry]) -> None:
    """Refuse another policy under a name that the task knows already."""
    known = {entry.name: entry for entry in Plan.load(out).entries} if (out / "plan.json").exists() else {}
    for entry in policy:
        before = known.get(entry.name)
        if before is not None and before.options.get("fingerprint") != entry.options["fingerprint"]:
            raise ConfigError(
                f"policy={entry.options['policy']}: must be the one that {out} already has as {entry.name} "
                f"(fingerprint {str(before.options.get('fingerprint'))[:12]}…, now {entry.options['fingerprint'][:12]}…"
                f"); give this one a name of its own, --policy NAME=DIR, or choose another --out"
            )
