"""What a suite shows: `regret.csv`, tables, sentences, `suite.png` and `suite.html`."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from acodm_env.config import from_dict
from acodm_env.experiments.benchmark.plan import Plan
from acodm_env.experiments.benchmark.suite.certificates import told
from acodm_env.experiments.benchmark.suite.page import Table, write_page
from acodm_env.experiments.benchmark.suite.regret import BEST, LEAST_GAIN, UNIFORM, Outcome, outcome_of
from acodm_env.experiments.benchmark.suite.standing import (
    Standing,
    best_rule,
    opponents,
    paired,
    policies_of,
    rows_of,
    standing,
)
from acodm_env.experiments.benchmark.suite.tasks import Task
from acodm_env.experiments.comparison.load import load
from acodm_env.experiments.comparison.statistics import Interval, mean_interval
from acodm_env.experiments.console import note, say, text_table
from acodm_env.files import atomic_file, read_json

COLUMNS = (
    *("task", "mixer", "seed", "objective_nats", "validation_objective_nats", "regret", "nats_behind_uniform"),
    *("steps_to", "flops_to", "measurement_share", "preparation_share"),
)


def aggregate(out: Path, tasks: Sequence[Path]) -> list[Outcome]:
    """Read what is finished of the tasks in these folders, write `regret.csv`, picture and page, print the tables."""
    outcomes = [read_outcome(folder) for folder in tasks]
    outcomes = [outcome for outcome in outcomes if outcome.rows]
    if not outcomes:
        note(f"{out}: no run is finished yet, so there is nothing to show")
        return outcomes
    write_regret(outcomes, out / "regret.csv")
    tables, lines = tables_of(outcomes), sentences(outcomes)
    for title, header, rows in tables:
        say(f"{title}\n{text_table(header, rows)}\n")
    for line in lines:
        say(line)
    picture = _picture(outcomes, out / "suite.png")
    say(f"numbers: {out / 'regret.csv'}")
    say(f"picture: {picture or 'none: no task has a gain'}")
    say(f"page:    {write_page(out / 'suite.html', tables, lines, picture)}")
    return outcomes


def read_outcome(folder: Path) -> Outcome:
    """A task's outcome from its folder."""
    record = read_json(folder / "task.json")
    task = from_dict(Task, record["task"], "task")
    return outcome_of(task, load([folder]), Plan.load(folder), record["same"])


def _picture(outcomes: Sequence[Outcome], path: Path) -> Path | None:
    """The picture of the tasks with a gain, if there is one."""
    from acodm_env.experiments.benchmark.suite.figure import draw

    gained, names = [one for one in outcomes if one.has_gain], rows_of(outcomes)
    rows = [row for row in names if row not in (BEST, UNIFORM) and any(one.regret(row) for one in gained)]
    return draw(gained, rows, policies_of(names), path) if gained and rows else None


def write_regret(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write a line per task, row and seed, atomically; blank where there is no value, "inf" where it is never."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in outcomes:
        for row in one.rows:
            found = [one.objective[row], one.validation[row], one.regret(row), one.behind(row)]
            found += [one.steps_to[row], one.flops_to[row], one.measurement[row], one.preparation[row]]
            for seed in one.objective[row]:
                values = [table.get(seed) for table in found]
                shown = ["" if each is None else f"{each:.6g}" for each in values]
                writer.writerow((one.task.name, row, seed, *shown))
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


# --- tables ------------------------------------------------------------------------------------------------


def tables_of(outcomes: Sequence[Outcome]) -> list[Table]:
    """Every table: the tasks, the rows over all, regret by task, and nats where there is no gain."""
    gained, flat = ([one for one in outcomes if one.has_gain is wanted] for wanted in (True, False))
    tables = [_tasks(outcomes)]
    if gained:
        tables.append(_standings(outcomes, len(gained)))
        tables.append(_per_task(gained, "Regret by task, mean over seeds", _regret))
    if flat:
        title = f"Nats behind uniform, where no static mixture gains {LEAST_GAIN:g} nats"
        tables.append(_per_task(flat, title, _behind))
    return tables


def _tasks(outcomes: Sequence[Outcome]) -> Table:
    """The tasks: what uniform has, and which static mixture is best."""
    rows = []
    for one in outcomes:
        uniform = [*one.objective.get(UNIFORM, {}).values()]
        gain = mean_interval([0.0 - nats for nats in one.behind(one.best).values()]) if one.best else None
        values = (f"{np.mean(uniform):.3f}" if uniform else "-", one.best or "-", interval(gain, "+.3f"))
        rows.append((one.task.name, *values, str(one.num_static_runs), str(len(uniform))))
    header = ("task", "uniform, nats", "best static", "its gain, nats", "static runs", "seeds")
    return "Tasks: test objective at the end", header, rows


def _regret(outcome: Outcome, row: str) -> str:
    values = [*outcome.regret(row).values()]
    return f"{np.mean(values):.2f}" if values else "-"


def _behind(outcome: Outcome, row: str) -> str:
    return interval(mean_interval([*outcome.behind(row).values()]), "+.3f")


def _per_task(outcomes: Sequence[Outcome], title: str, shown: Callable[[Outcome, str], str]) -> Table:
    names = [row for row in rows_of(outcomes) if row != UNIFORM]
    rows = [(row, *(shown(one, row) if row in one.rows else "-" for one in outcomes)) for row in names]
    return title, ("row", *(one.task.name for one in outcomes)), rows


def _standings(outcomes: Sequence[Outcome], count: int) -> Table:
    found = sorted((standing(outcomes, row) for row in rows_of(outcomes)), key=_place)
    header = ("row", "mean regret", "worst task", "tasks", "steps to odm-released's best", "FLOPs to it")
    rows = [_standing(each, count) for each in found]
    title = "Rows over the tasks with a gain: 95 % Student t intervals over seeds; medians over the targeted tasks"
    return title, (*header, "measuring", "beforehand"), rows


def _standing(each: Standing, count: int) -> tuple[str, ...]:
    return (
        each.row,
        interval(each.regret, ".3f"),
        "-" if each.worst is None else f"{each.worst:.2f} {each.worst_task}",
        f"{len(each.tasks)}/{count}",
        *("-" if x is None else "never" if np.isinf(x) else f"{x:.2f}" for x in (each.steps_to, each.flops_to)),
        f"{each.measurement:.1%}",
        f"{each.preparation:.0%}",
    )


def _place(each: Standing) -> tuple[int, float]:
    return -len(each.tasks), np.inf if each.regret.mean is None else each.regret.mean


# --- sentences ---------------------------------------------------------------------------------------------


def sentences(outcomes: Sequence[Outcome]) -> list[str]:
    """Policies against the best fixed rule, uniform, bandits, their controls; certificates; then what diverged."""
    names, rule = rows_of(outcomes), best_rule(outcomes)
    lines = []
    if rule is not None:
        lines.append(f"best single fixed rule: {rule.row}, mean regret {interval(rule.regret, '.3f')}")
        for row in policies_of(names):
            lines += [_against(outcomes, row, other) for other in opponents(names, row, rule.row)]
    for row in policies_of(names):
        lines += told(outcomes, row)
    for one in outcomes:
        lines += [f"{one.task.name}: {number} seeds of {row} diverged" for row, number in one.diverged.items()]
        lines += [f"{one.task.name}: {', '.join(one.partial)} lack seeds and cannot be best"] if one.partial else []
    return lines


def _against(outcomes: Sequence[Outcome], row: str, other: str) -> str:
    found, count = paired(outcomes, row, other)
    verdict = "no interval" if found.low is None else _verdict(found)
    return f"{row} against {other}: regret {interval(found, '+.3f')} over {count} tasks, {verdict}"


def _verdict(found: Interval) -> str:
    if not found.excludes_zero:
        return "no difference shown"
    return "better" if (found.mean or 0.0) < 0 else "worse"


def interval(found: Interval | None, form: str) -> str:
    """A mean with its interval."""
    if found is None or found.mean is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.mean:{form}}"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"
