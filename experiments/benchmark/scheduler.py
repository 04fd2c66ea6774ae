"""Carrying out a benchmark's plan: which cell next, what failed, how long it still takes, and the summary."""

from pathlib import Path

from acodm_env.errors import ConfigError
from acodm_env.experiments.benchmark.executors import Engine, make_engine
from acodm_env.experiments.benchmark.jobs import fail, guarded, log_of, state_of
from acodm_env.experiments.benchmark.plan import Cell, Plan
from acodm_env.experiments.console import note, progress, say

_POLL_SECONDS = 0.5


def run_one(out: Path, index: int) -> int:
    """Run a single cell, and those that it needs; 1 if it failed.

    Raises:
        ConfigError: the benchmark has no such cell.
    """
    plan = Plan.load(out)
    if not 0 <= index < len(plan.cells):
        raise ConfigError(f"cell={index}: must be 0 to {len(plan.cells) - 1}, the cells of {out}")
    message = guarded(out, index)
    if message is not None:
        note(f"cell {index} ({plan.cells[index].name}) failed: {message}; log: {log_of(out, index)}")
        return 1
    say(f"cell {index} ({plan.cells[index].name}) is finished: {out / plan.cells[index].folder}")
    return 0


def run_all(out: Path, plan: Plan, engine: str, jobs: int, quiet: bool) -> int:
    """Run what is not finished, then summarise; 1 if a cell failed."""
    failures = run_unfinished(out, plan, engine, jobs, quiet)
    summarise(out, quiet)
    return 1 if say_failures(out, plan, failures) else 0


def run_unfinished(
    out: Path, plan: Plan, engine: str, jobs: int, quiet: bool, label: str = "benchmark"
) -> dict[int, str]:
    """Run what is not finished; returns the cells that failed, with their messages."""
    todo = unfinished(out, plan)
    return _execute(out, plan, todo, make_engine(engine, out, jobs), quiet, label) if todo else {}


def say_failures(out: Path, plan: Plan, failures: dict[int, str]) -> bool:
    """Say which cells failed; whether any did."""
    for index, message in failures.items():
        note(f"failed: cell {index} ({plan.cells[index].name}): {message}; log: {log_of(out, index)}")
    if failures:
        note(f"{len(failures)} of {len(plan.cells)} cells failed; the same command again runs them anew")
    return bool(failures)


def unfinished(out: Path, plan: Plan) -> list[Cell]:
    """Cells still to run, in order; corrupted ones are said."""
    todo = []
    for cell in plan.cells:
        state = state_of(out / cell.folder)
        if state == "corrupted":
            note(f"cell {cell.index} ({cell.name}): its files were edited or cut short since it finished; runs again")
        if state != "finished":
            todo.append(cell)
    return todo


def _execute(
    out: Path, plan: Plan, todo: list[Cell], engine: Engine, quiet: bool, label: str = "benchmark"
) -> dict[int, str]:
    """Run the cells `todo`; returns those that failed, with their messages."""
    waiting = {cell.index: cell for cell in todo}
    open_cells, running, failures = set(waiting), set[int](), dict[int, str]()
    done_steps = sum(cell.steps for cell in plan.cells) - sum(cell.steps for cell in todo)
    with progress(sum(cell.steps for cell in plan.cells), label, quiet=quiet, done=done_steps) as bar:
        bar.smoothing = 0  # cells differ in speed: the time left comes from the mean so far
        try:
            while waiting or running:
                for index in _ready(waiting, open_cells, engine.idle()):
                    engine.submit(index)
                    running.add(index)
                    del waiting[index]
                for index, message in engine.wait(_POLL_SECONDS):
                    running.discard(index)
                    done_steps += plan.cells[index].steps
                    if message is None:
                        open_cells.discard(index)
                    else:
                        failures[index] = message
                        _fail_dependents(out, plan, waiting, failures)
                bar.set_postfix_str(
                    f"{len(plan.cells) - len(open_cells)}/{len(plan.cells)} cells, {len(running)} running, "
                    f"{len(failures)} failed",
                    refresh=False,
                )
                bar.update(max(done_steps + engine.steps() - bar.n, 0))
        finally:
            engine.close()
    return failures


def _ready(waiting: dict[int, Cell], open_cells: set[int], slots: int) -> list[int]:
    """Cells whose needs are finished, in order, as many as there are slots."""
    ready = (index for index, cell in waiting.items() if not open_cells & set(cell.needs))
    return [index for _, index in zip(range(slots), ready, strict=False)]


def _fail_dependents(out: Path, plan: Plan, waiting: dict[int, Cell], failures: dict[int, str]) -> None:
    """Cells that need a failed one cannot run."""
    for index, cell in list(waiting.items()):
        for needed in set(cell.needs) & set(failures):
            failures[index] = fail(out, index, f"needs cell {needed} ({plan.cells[needed].name}), which failed")
            del waiting[index]
            break


def summarise(out: Path, quiet: bool) -> None:
    """Write the summary and the page, and print the tables."""
    from acodm_env.experiments.comparison.summary import table_text, write_summaries
    from acodm_env.experiments.report.pictures import draw_forest

    pictures = []
    for summary in write_summaries(out):
        say(table_text(summary))
        say()
        pictures.append(str(draw_forest(summary, out / f"forest-{summary.schedule}.png")))
    say(f"numbers: {out / 'summary.csv'}, {out / 'summary.json'}")
    say(f"picture: {', '.join(pictures)}")
    try:
        from acodm_env.experiments.report.command import write_report

        say(f"page:    {write_report([out], out / 'report.html')}")
    except ConfigError as error:  # plotly is an extra; the numbers are there
        note(f"no page: {error}")
