"""`acodm demo`: one mixing problem, from text to answer, on two CPU cores in minutes.

Harvest and tokenise a corpus; say which text counts and how little there is of it; train the same small model under
uniform sampling, both ODMs, fixed shares of the target and the generalist, which has seen neither corpus nor model and
needs no proxy run; print who won, by how much, and what measuring cost.
"""

import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.corpus import open_corpus
from acodm_env.errors import ConfigError, unknown
from acodm_env.experiments.console import say, text_table
from acodm_env.experiments.run.folder import RunFolder, open_run, recorded_config
from acodm_env.files import read_json, write_json
from acodm_env.objective import check_metric, parse_targets

if TYPE_CHECKING:
    from acodm_env.experiments.benchmark.config import BenchmarkConfig
    from acodm_env.experiments.benchmark.suite.regret import Outcome
    from acodm_env.experiments.benchmark.suite.tasks import Task

REFERENCE, UNIFORM, POLICY = "odm-released", "uniform", "generalist"
ROWS = (UNIFORM, REFERENCE, "odm-released-rescaled", "share-0.3", "share-0.5", "share-1", POLICY)
RECIPES: dict[str, dict[str, Any]] = {
    "demo": {"steps": 400, "batch_size": 16, "sequence_length": 128, "evaluations": 20, "eval_sequences": 64},
    "smoke": {"steps": 80, "batch_size": 6, "sequence_length": 32, "evaluations": 4, "eval_sequences": 4},
}
"""demo: what the tables show. smoke: seconds; checks that everything runs, shows nothing."""
SCARCE = {"pocket": ("prose=1", "prose=160")}
"""Target and cut of a corpus, where nothing is said."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Choose a mixture for one target of which there is little text, in seven ways, and compare. Some six minutes."""

    corpus: str = "pocket"
    """Folder of a token store, or "pocket": real text harvested from the Python installation."""
    targets: str | None = None
    """What counts: domains with weights, "prose=2,licences=1". Default: of pocket prose, else the smallest domain."""
    cut: str | None = None
    """Training sequences that are left of domains, "prose=160". Default: of pocket's prose 160, else all."""
    objective: str = "loss"
    """What is averaged over the targets: loss, or perplexity (its logarithm)."""
    recipe: str = "demo"
    """demo (minutes), or smoke (seconds; checks that everything runs)."""
    jobs: int | None = None
    """Runs at a time; default: one a core."""
    out: str = "runs/demo"
    """Folder of the results; the same command again reprints or resumes."""
    fresh: bool = False
    """Start over: delete what is in --out."""
    seed: int = 0
    """Seed of everything."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            unknown("recipe", self.recipe, RECIPES)
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must be at least 0")
        if self.jobs is not None and self.jobs < 1:
            raise ConfigError(f"jobs={self.jobs}: must be at least 1")
        check_metric(self.objective)


def run(config: DemoConfig) -> int:
    """Run or resume the demo, print the table and where the results lie; 1 if a run failed."""
    out, started = Path(config.out), time.perf_counter()
    task = problem(config)  # refuses what does not fit before the folder is claimed
    folder = _open(config, out)
    if folder.result is None:
        outcome = _train(config, task, out)
        if outcome is None:
            return 1
        write_json(out / "result.json", _result(config, out, outcome, time.perf_counter() - started))
    result = folder.result
    assert result is not None
    say(summary(result))
    say(f"results: {out}/result.json  picture: {out}/report.png  logs: {out}/runs")
    return 0


def _open(config: DemoConfig, out: Path) -> RunFolder:
    names = ("corpus", "targets", "cut", "objective", "recipe", "seed")
    settings = {name: getattr(config, name) for name in names}
    if config.fresh and (out / "config.json").exists() and recorded_config(out).keys() == settings.keys():
        shutil.rmtree(out)
    return RunFolder(out, settings)


def problem(config: DemoConfig) -> "Task":
    """What the demo is about.

    Raises:
        ConfigError: an unknown target; a corpus with one domain.
    """
    from acodm_env.experiments.benchmark.suite.tasks import Task

    store = open_corpus(config.corpus, config.quiet).trained()
    if len(store.domains) < 2:
        raise ConfigError(f"corpus={config.corpus}: must hold at least two domains to mix; it holds {store.domains[0]}")
    smallest = min(zip(store.sizes_tokens("train"), store.domains, strict=True))[1]
    targets, cut = SCARCE.get(config.corpus, (smallest, None))
    chosen = parse_targets(config.targets or targets)
    left = parse_targets(config.cut if config.targets or config.cut else cut)
    for name in (*chosen, *left):
        if name not in store.domains:
            unknown("targets.<name>", name, store.domains)
    numbers = {name: int(number) for name, number in left.items()}
    return Task(name="runs", corpus=config.corpus, targets=chosen, objective=config.objective, cut=numbers)


def bench(config: DemoConfig) -> "BenchmarkConfig":
    """The runs' settings."""
    from acodm_env.experiments.benchmark.config import BenchmarkConfig

    return BenchmarkConfig(
        suite="mixing",
        rows=",".join(ROWS),
        seeds="1",
        seed=config.seed,
        jobs=config.jobs or os.cpu_count() or 1,
        out=config.out,
        quiet=config.quiet,
        **RECIPES[config.recipe],
    )


def _train(config: DemoConfig, task: "Task", out: Path) -> "Outcome | None":
    """Every row's run; None if one failed."""
    from acodm_env.experiments.benchmark.suite.command import run_task
    from acodm_env.experiments.benchmark.suite.report import read_outcome
    from acodm_env.experiments.benchmark.suite.rows import learned
    from acodm_env.experiments.run.results import draw

    if not config.quiet:
        say(f"{describe(task)}: {len(ROWS)} runs of {RECIPES[config.recipe]['steps']} steps, some minutes in all")
    if run_task(bench(config), task, learned(POLICY)):
        return None
    outcome = read_outcome(out / task.name)
    runs = {row: open_run(_folder(out, row, config.seed)) for row in ROWS}
    draw(runs, out / "report.png", f"{describe(task)}, {config.corpus}, seed {config.seed}")
    return outcome


def _folder(out: Path, row: str, seed: int) -> Path:
    """Folder of a row's run; of rows with the same mixture, one was made."""
    same: dict[str, str] = read_json(out / "runs" / "task.json")["same"]
    return out / "runs" / "cells" / "cosine" / same.get(row, row) / f"seed{seed}"


def describe(task: "Task") -> str:
    """The problem in words."""
    names = ", ".join(task.targets)
    left = "; ".join(f"{number} sequences of {name} to train on" for name, number in task.cut.items())
    return f"lowest {task.objective} on {names}" + (f" with {left}" if left else "")


def _result(config: DemoConfig, out: Path, outcome: "Outcome", seconds: float) -> dict[str, Any]:
    from acodm_env.experiments.run.results import time_averaged

    seed, mixers = config.seed, {}
    for row in ROWS:
        measured = outcome.measurement[row].get(seed)
        mixers[row] = {
            "objective_nats": outcome.objective[row].get(seed),
            "validation_objective_nats": outcome.validation[row].get(seed),
            "steps_to_reference_ratio": _finite(outcome.steps_to[row].get(seed)),
            "measurement_share": measured,
            "mixture": time_averaged(open_run(_folder(out, row, seed)))["time_averaged"],
        }
    settings = recorded_config(_folder(out, UNIFORM, seed))
    about = {"problem": describe(outcome.task), "targets": dict(outcome.task.targets), "config": settings}
    return {"reference": REFERENCE, "mixers": mixers, "seconds": seconds, **about}


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def summary(result: Mapping[str, Any]) -> str:
    """The table, best first, and what it says."""
    mixers = result["mixers"]
    order = sorted(mixers, key=lambda row: _nats(mixers[row]))
    table = text_table(
        ("mixer", "test, nats", "to uniform", "steps to ODM's best", "measuring", "mean share of the targets"),
        [_line(row, mixers[row], mixers[UNIFORM], result["targets"]) for row in order],
    )
    best = min((row for row in mixers if row != POLICY), key=lambda row: _nats(mixers[row]))
    ahead = _nats(mixers[best]) - _nats(mixers[POLICY])
    word = "ahead of" if ahead > 0 else "behind"
    verdict = f"{POLICY} is {abs(ahead):.3f} nats {word} the best of the others ({best}); one seed, no interval"
    control = f"Its untrained actor is uniform: the row {UNIFORM} is the control. No proxy run."
    return f"\n{result['problem']}\n\n{table}\n\n{verdict}.\n{control}\n"


def _nats(entry: Mapping[str, Any]) -> float:
    value = entry["objective_nats"]
    return math.inf if value is None else float(value)


def _line(
    row: str, entry: Mapping[str, Any], uniform: Mapping[str, Any], targets: Mapping[str, float]
) -> tuple[str, ...]:
    ratio, measured = entry["steps_to_reference_ratio"], entry["measurement_share"]
    share = sum(entry["mixture"].get(name, 0.0) for name in targets)
    return (
        row,
        f"{_nats(entry):.4f}",
        f"{_nats(entry) - _nats(uniform):+.3f}",
        "never" if ratio is None else f"{ratio:.2f}×",
        f"{measured or 0:.1%}",
        f"{share:.2f}",
    )


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm demo, or python -m acodm_env demo")
