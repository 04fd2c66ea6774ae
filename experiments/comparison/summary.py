"""What a comparison shows: means with intervals, paired differences, and what reaching the reference's best costs.

A mixer with a diverged seed has no mean, and says so: a mean over the seeds that survived would flatter it.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from acodm_env.agents.baselines.recorded import MEAN_OF
from acodm_env.experiments.comparison import statistics
from acodm_env.experiments.comparison.contrasts import (
    Difference,
    cost_ratio,
    cost_unit,
    differences_of,
    steps_ratio,
    values_of,
)
from acodm_env.experiments.comparison.load import Comparison, Run, load
from acodm_env.experiments.comparison.run import COSTS, UNITS
from acodm_env.experiments.comparison.statistics import Interval
from acodm_env.experiments.console import text_table
from acodm_env.files import atomic_file, write_json

MEANS = ("mean_loss_nats", "mean_perplexity", "worst_domain_loss_nats")
RATIOS = ("steps_to_reference_ratio", "cost_to_reference_ratio")
METRICS = ("mean_loss_nats", "mean_perplexity", *RATIOS, "worst_domain_loss_nats")
"""Metrics of `summary.csv`, in its order; then the objective, where it is another."""
WORDS = {"mean_loss_nats": "mean loss", "objective_nats": "log mean perplexity", "mean_perplexity": "mean perplexity"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mixer under one schedule."""

    mixer: str
    num_planned: int
    num_finished: int
    num_diverged: int
    note: str
    """ "1 of 5 diverged, 2 of 5 are not finished", or ""."""
    metrics: dict[str, Interval]
    """By name, `METRICS`; the ratios are medians over `num_compared` seeds, `num_seeds` of which reached the level."""
    num_compared: int
    """Seeds whose reference run is finished, so that there is a best perplexity to reach."""
    interquartile_means: dict[str, Interval]
    """By name, of `MEANS`; empty below ten seeds."""
    domain_loss_nats: dict[str, Interval]
    """By target."""
    cost: dict[str, dict[str, float]]
    """Mean over the seeds of tokens, flops and seconds, by kind: training, measurement, preparation, learning."""
    extra_cost_frac: float | None
    """Cost beyond training, as a fraction of training; None if no cost was recorded."""
    seconds_per_step: float | None
    """Median over the seeds."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything that one schedule of a comparison shows."""

    title: str
    schedule: str
    reference: str
    seeds: tuple[int, ...]
    mixers: tuple[str, ...]
    objective: str
    """The objective that the user chose, in words; "" where none was chosen."""
    primary: str
    """The metric that rows are ranked by: "mean_loss_nats", or "objective_nats" where perplexities are averaged."""
    cost_unit: str
    """ "flops", or "tokens" where a run does not know its FLOPs."""
    rows: tuple[Row, ...]
    """In the order of the plan."""
    differences: tuple[Difference, ...]
    problems: tuple[str, ...]

    def row(self, mixer: str) -> Row:
        """A mixer's row."""
        return next(row for row in self.rows if row.mixer == mixer)

    @property
    def primary_name(self) -> str:
        """The metric that rows are ranked by, in words."""
        return self.objective or WORDS[self.primary]

    def difference(self, mixer: str, baseline: str, metric: str | None = None) -> Difference | None:
        """A comparison on a metric, by default the one that rows are ranked by; None if it was not made."""
        wanted = (mixer, baseline, metric or self.primary)
        return next((one for one in self.differences if (one.mixer, one.baseline, one.metric) == wanted), None)


def summarise(comparison: Comparison, schedule: str) -> Summary:
    """The summary of one schedule of a comparison."""
    unit = cost_unit([run for run in comparison.runs if run.schedule == schedule])
    return Summary(
        title=comparison.title,
        schedule=schedule,
        reference=comparison.reference,
        seeds=comparison.seeds,
        mixers=comparison.mixers,
        objective=comparison.objective_name,
        primary=comparison.primary,
        cost_unit=unit,
        rows=tuple(_row(comparison, schedule, mixer, unit) for mixer in comparison.mixers),
        differences=differences_of(comparison, schedule),
        problems=comparison.problems,
    )


# --- one mixer ---------------------------------------------------------------------------------------------


def _row(comparison: Comparison, schedule: str, mixer: str, unit: str) -> Row:
    runs = comparison.select(mixer, schedule)
    ended = [run for run in runs if run.ended]
    diverged = sum(run.status == "diverged" for run in ended)
    steps = [ratio for run in ended if (ratio := steps_ratio(comparison, run)) is not None]
    costs = [ratio for run in ended if (ratio := cost_ratio(comparison, run, unit)) is not None]
    ratios = {name: statistics.median_interval(values) for name, values in zip(RATIOS, (steps, costs), strict=True)}
    cost, means = _mean_cost(ended), dict.fromkeys((*MEANS, comparison.primary))
    seconds = [run.result["seconds_per_step"] for run in ended if run.result]
    return Row(
        mixer=mixer,
        num_planned=len(runs),
        num_finished=len(ended) - diverged,
        num_diverged=diverged,
        note=_counts(len(runs), diverged, len(runs) - len(ended)),
        metrics={name: _mean(runs, name) for name in means} | ratios,
        num_compared=len(steps),
        interquartile_means=_interquartile_means(runs, means),
        domain_loss_nats={name: _mean(runs, "domain_loss_nats", name) for name in comparison.targets},
        cost=cost,
        extra_cost_frac=_extra_frac(cost, unit),
        seconds_per_step=float(np.median(seconds)) if seconds else None,
    )


def _counts(planned: int, diverged: int, lacking: int) -> str:
    parts = [f"{diverged} of {planned} diverged"] if diverged else []
    parts += [f"{lacking} of {planned} not finished"] if lacking else []
    return ", ".join(parts)


def _mean(runs: Sequence[Run], *keys: str) -> Interval:
    values = values_of(runs, *keys)
    if values is None:
        return Interval(None, None, None, sum(run.status == "finished" for run in runs), "no mean: a seed diverged")
    return statistics.mean_interval(values)


def _interquartile_means(runs: Sequence[Run], means: Iterable[str]) -> dict[str, Interval]:
    found = {name: statistics.interquartile_mean(values_of(runs, name) or []) for name in means}
    return {name: interval for name, interval in found.items() if interval is not None}


def _mean_cost(ended: Sequence[Run]) -> dict[str, dict[str, float]]:
    costs = [run.result["cost"] for run in ended if run.result and run.result.get("cost")]
    kinds = COSTS if costs else ()
    return {kind: {unit: float(np.mean([cost[kind][unit] for cost in costs])) for unit in UNITS} for kind in kinds}


def _extra_frac(cost: Mapping[str, Mapping[str, float]], unit: str) -> float | None:
    if not cost or not cost["training"][unit]:
        return None
    return sum(cost[kind][unit] for kind in COSTS if kind != "training") / cost["training"][unit]


# --- files and text ----------------------------------------------------------------------------------------


def write_csv(summary: Summary, path: str | Path) -> None:
    """Write one line per mixer and metric: mixer, metric, mean, low, high, num_seeds. Atomic.

    `mean` is the mean over the seeds, or of the two ratios the median, and `num_seeds` the seeds behind it, or of the
    ratios those that reached the reference's best perplexity. Blank where there is none: no mean with a diverged
    seed, no interval for one seed, no median or bound where it is "never".
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("mixer", "metric", "mean", "low", "high", "num_seeds"))
    for row in summary.rows:
        for name in dict.fromkeys((*METRICS, summary.primary)):
            found = row.metrics[name]
            writer.writerow((row.mixer, name, found.mean, found.low, found.high, found.num_seeds))
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def write_summaries(out: str | Path) -> list[Summary]:
    """Summarise the benchmark in `out` into its `summary.json` and a CSV file per schedule.

    The first schedule's is `summary.csv`, each further one's `summary-SCHEDULE.csv`.

    Raises:
        ConfigError: `out` is no benchmark.
    """
    out = Path(out)
    comparison = load([out])
    summaries = [summarise(comparison, schedule) for schedule in comparison.schedules]
    for index, summary in enumerate(summaries):
        write_csv(summary, out / (f"summary-{summary.schedule}.csv" if index else "summary.csv"))
    named = ("title", "reference", "command", "problems", "versions", "git_commit", "settings")
    shared = {name: getattr(comparison, name) for name in named}
    write_json(out / "summary.json", {**shared, "schedules": [asdict(summary) for summary in summaries]})
    return summaries


def table_text(summary: Summary) -> str:
    """The summary for a terminal: every mean with its interval, and the paired difference to uniform with its verdict.

    Sorted by the objective, by default the mean loss, where there are intervals; rows without one come last, in the
    order of the plan.
    """
    baseline = "uniform" if "uniform" in summary.mixers else summary.reference
    header = (
        *("mixer", "seeds", f"{summary.primary_name}, nats", "mean perplexity"),
        f"{'loss' if summary.primary == 'mean_loss_nats' else 'objective'} against {baseline}, paired",
        *(f"steps to {summary.reference}'s best", "cost to it, end to end", "extra cost"),
    )
    rows = sorted(summary.rows, key=lambda row: _order(row, summary.primary))
    lines = [f"{summary.title}, {summary.schedule} schedule; 95 % intervals in brackets"]
    lines += [text_table(header, [_cells(summary, row, baseline) for row in rows])]
    most = max(rows, key=lambda row: row.num_compared, default=None)
    lines += [f"ratios: {most.metrics[RATIOS[0]].method}"] if most else []
    lines += [f"cost in {summary.cost_unit}; extra: preparation, learning and measurement, over training"]
    if all(row.metrics[summary.primary].low is None for row in rows):
        lines.append("no intervals, so nothing is ranked: give at least two seeds")
    lines += [_sentence(summary, one) for one in summary.differences if _is_control(one)]
    return "\n".join([*lines, *(f"problem: {problem}" for problem in summary.problems)])


def _order(row: Row, metric: str) -> tuple[bool, float]:
    found = row.metrics[metric]
    return (True, 0.0) if found.mean is None or found.low is None else (False, found.mean)


def _cells(summary: Summary, row: Row, baseline: str) -> tuple[str, ...]:
    difference = summary.difference(row.mixer, baseline)
    return (
        row.mixer,
        str(row.num_finished) + (f" ({row.note})" if row.note else ""),
        _with_interval(row.metrics[summary.primary], ".4f"),
        _with_interval(row.metrics["mean_perplexity"], ".2f"),
        "-" if difference is None else _judged(difference),
        *(_ratio(row.metrics[name], row.num_compared) for name in RATIOS),
        "-" if row.extra_cost_frac is None else f"{row.extra_cost_frac:+.0%}",
    )


def _with_interval(found: Interval, form: str) -> str:
    if found.mean is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.mean:{form}} (no interval)"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _ratio(found: Interval, compared: int) -> str:
    """A median with its interval and how many seeds reached the level; it may be "never", and so may its bound."""
    if found.method == statistics.NO_SEEDS:
        return "-"
    middle, low, high = ("never" if x is None else f"{x:.3f}" for x in (found.mean, found.low, found.high))
    bounds = "" if found.low is None else f" [{low}, {high}]"
    return f"{middle}{bounds} {found.num_seeds}/{compared}"


def _judged(one: Difference) -> str:
    if one.interval.low is None:
        return f"{one.verdict}: {one.note or one.interval.method}"
    adjusted = "" if one.p_holm is None else f", Holm p {one.p_holm:.2g}"
    form = "+.2f" if one.metric == "mean_perplexity" else "+.4f"
    note = f" ({one.note})" if one.note else ""
    return f"{_with_interval(one.interval, form)} {one.verdict}{adjusted}{note}"


def _is_control(one: Difference) -> bool:
    return one.baseline == MEAN_OF + one.mixer or one.baseline == "policy-untrained"


def _sentence(summary: Summary, one: Difference) -> str:
    what = summary.primary_name if one.metric == summary.primary else WORDS[one.metric]
    return f"{one.mixer} against {one.baseline}, {what}: {_judged(one)}"
