"""`acodm benchmark`: which mixture trains a model better, by how much, how sure we are, and what finding it cost."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.agents.baselines import mixer_factory, mixer_names
from acodm_env.errors import ConfigError
from acodm_env.experiments.benchmark.config import BenchmarkConfig
from acodm_env.experiments.benchmark.plan import Plan
from acodm_env.experiments.benchmark.planning import make_plan
from acodm_env.experiments.console import say, text_table

if TYPE_CHECKING:
    pass


def run(config: BenchmarkConfig) -> int:
    """Plan, run, summarise; 1 if a cell failed."""
    if config.list:
        say(list_mixers())
        return 0
    if config.suite is not None:
        from acodm_env.experiments.benchmark.suite import command as suite

        return suite.run(config)
    for name in ("tasks", "rows"):
        if getattr(config, name) is not None:
            raise ConfigError(f"{name}={getattr(config, name)}: is of a suite; give --suite mixing too")
    from acodm_env.experiments.benchmark import scheduler as running

    out = Path(config.out)
    if config.cell is not None:
        return running.run_one(out, config.cell)
    plan = Plan.load(out) if config.resume else make_plan(config, out)
    if config.plan:
        say(text_table(("cell", "kind", "name", "needs"), [_row(cell) for cell in plan.cells]))
        return 0
    return running.run_all(out, plan, config.engine, config.jobs, config.quiet)


def _row(cell: Any) -> tuple[str, ...]:
    return str(cell.index), cell.kind, cell.name, ",".join(map(str, cell.needs)) or "-"


def list_mixers() -> str:
    """Every mixer: name, paper, what it needs of a run, its options with their defaults."""
    rows = []
    for name in sorted(mixer_names()):
        factory = mixer_factory(name)
        defaults = [
            parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default}"
            for parameter in inspect.signature(factory).parameters.values()
        ]
        needs = ", ".join(sorted(getattr(factory, "needs", ()))) or "-"
        rows.append((name, getattr(factory, "paper", "") or "-", needs, ", ".join(defaults) or "-"))
    return text_table(("mixer", "paper", "needs", "defaults"), rows)


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm benchmark, or python -m acodm_env benchmark")
