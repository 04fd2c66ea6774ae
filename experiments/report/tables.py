"""The report's tables: losses per domain, what finding the mixture cost, exploration; and its appendix."""

import json
from collections.abc import Sequence

from acodm_env.experiments.comparison.load import Comparison
from acodm_env.experiments.comparison.statistics import paired_interval
from acodm_env.experiments.comparison.summary import Summary
from acodm_env.experiments.report.curves import baseline_of
from acodm_env.experiments.report.forests import number
from acodm_env.experiments.report.page import Cell, Html, definitions, element, folded, join, listing, table

KINDS = ("training", "measurement", "preparation", "learning")
UNITS = {"flops": "FLOPs", "tokens": "tokens", "seconds": "seconds"}


def domain_section(comparison: Comparison, summary: Summary) -> Html:
    """Held-out loss per target, the best marked, and those not told apart from it."""
    marks = {name: _marks(comparison, summary, name) for name in comparison.targets}
    rows: list[list[str | Cell]] = []
    for row in summary.rows:
        cells: list[str | Cell] = [row.mixer]
        for name in comparison.targets:
            mean = row.domain_loss_nats[name].mean
            cells.append(_marked(number(mean, ".3f"), marks[name].get(row.mixer, "")))
        worst = row.metrics["worst_domain_loss_nats"].mean
        rows.append([*cells, "diverged" if row.num_diverged else number(worst, ".3f")])
    lead = (
        "Mean over seeds of the final loss, nats. ★ marks the lowest of a column, ≈ those whose paired 95 % interval "
    )
    lead += "to it includes 0. The worst domain is the largest loss of a seed, averaged over seeds."
    return join(
        [
            element("h3", "Held-out loss per domain"),
            element("p", lead, class_="soft lead"),
            table(("mixer", *comparison.targets, "worst domain"), rows, "Final held-out loss per domain, nats"),
        ]
    )


def _marked(text: str, mark: str) -> str | Cell:
    return Cell(f"{mark} {text}", "best" if mark == "★" else "tied") if mark else text


def _marks(comparison: Comparison, summary: Summary, target: str) -> dict[str, str]:
    """★ for the mixer of the lowest mean, ≈ for those that paired seeds do not tell from it."""
    means = {row.mixer: row.domain_loss_nats[target].mean for row in summary.rows}
    known = {name: mean for name, mean in means.items() if mean is not None}
    if not known:
        return {}
    best = min(known, key=lambda name: known[name])
    losses = {name: _by_seed(comparison, name, summary.schedule, target) for name in known}
    marks = {best: "★"}
    for name in known:
        seeds = sorted(losses[name].keys() & losses[best].keys())
        if name == best or len(seeds) < 2:
            continue
        found = paired_interval([losses[name][seed] for seed in seeds], [losses[best][seed] for seed in seeds])
        if found.low is not None and found.high is not None and found.low <= 0 <= found.high:
            marks[name] = "≈"
    return marks


def _by_seed(comparison: Comparison, mixer: str, schedule: str, target: str) -> dict[int, float]:
    runs = comparison.select(mixer, schedule)
    return {run.seed: run.result["domain_loss_nats"][target] for run in runs if run.status == "finished" and run.result}


def cost_section(comparison: Comparison, summary: Summary) -> Html:
    """What each mixer cost: training, measuring, preparing, learning, as a multiple of the baseline's total."""
    rows = [row for row in summary.rows if row.cost]
    title = element("h3", "Cost of learning the mixture")
    if not rows:
        return join([title, element("p", "The runs do not record their cost.")])
    lead = "Means over seeds. Measurement: what a mixer had measured beyond training; preparation: runs made before; "
    lead += "learning: training the policy. Seconds of a measurement are part of training's."
    baseline = baseline_of(comparison)
    tables = [_cost_table(summary, baseline, unit) for unit in UNITS]
    first, *others = (tables[1], tables[0], tables[2]) if summary.cost_unit == "tokens" else tables
    folds = [folded(f"The same in {word}", one) for word, one in zip(_other_words(summary), others, strict=True)]
    return join([title, element("p", lead, class_="soft lead"), first, *folds])


def _other_words(summary: Summary) -> list[str]:
    return [word for unit, word in UNITS.items() if unit != summary.cost_unit]


def _cost_table(summary: Summary, baseline: str, unit: str) -> Html:
    totals = {row.mixer: sum(row.cost[kind][unit] for kind in KINDS) for row in summary.rows if row.cost}
    base, timed = totals.get(baseline, 0.0), unit == "seconds"
    rows = [
        [
            row.mixer,
            *(compact(row.cost[kind][unit], unit) for kind in KINDS),
            compact(totals[row.mixer], unit),
            f"{totals[row.mixer] / base:.2f}×" if base else "–",
            *([number(row.seconds_per_step, ".3f")] if timed else []),
        ]
        for row in summary.rows
        if row.cost
    ]
    header = ("mixer", *KINDS, "total", f"× {baseline}", *(["median per step"] if timed else []))
    return table(header, rows, f"Cost in {UNITS[unit]}")


def compact(value: float, unit: str) -> str:
    """ "1.2 M", "3.4 × 10¹²" or "56 s"; a dash for nothing."""
    if not value:
        return "–"
    if unit == "seconds":
        return f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s"
    for power, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g} {letter}"
    return f"{value:.0f}"


def exploration_section(comparison: Comparison, summary: Summary) -> Html:
    """The share of exploration K·ε that bandits still had at the end: near 1 they are uniform by construction."""
    rows = []
    for mixer in comparison.mixers:
        runs = comparison.select(mixer, summary.schedule)
        found = [run.result.get("final_exploration") for run in runs if run.result]
        known = [float(value) for value in found if value is not None]
        if known:
            rows.append([mixer, f"{sum(known) / len(known):.3f}"])
    if not rows:
        return Html("")
    lead = (
        "The share of its mixture that a bandit still spreads evenly at the end, K·ε. Near 1 it is uniform sampling by "
    )
    lead += "construction, and beating it is beating uniform."
    return join(
        [
            element("h3", "Exploration left at the end"),
            element("p", lead, class_="soft lead"),
            table(("mixer", "final K·ε"), rows, "Mean over seeds"),
        ]
    )


def appendix(comparison: Comparison, plain: bool) -> Html:
    """How to read the page, configuration, versions, and the command of every run."""
    settings = [(name, _value(value)) for name, value in comparison.settings.items()]
    versions = [*comparison.versions.items(), ("git commit", comparison.git_commit or "not recorded")]
    own = [(f"{run.schedule}/{run.mixer}/seed{run.seed}", run) for run in comparison.runs]
    rows: list[list[str | Cell]] = [
        [name, run.status, Cell(element("code", run.command or "not recorded"), "words")] for name, run in own
    ]
    commands = table(("run", "status", Cell("command", "words")), rows)
    command = Html("") if plain else element("pre", element("code", comparison.command))
    return element(
        "section",
        element("h2", "How it was made"),
        folded("How to read this page", listing(HOW_TO_READ)),
        folded("Configuration that all runs share", definitions(settings)),
        folded("Versions", definitions(versions)),
        folded(f"Command of every run ({len(rows)})", command, commands),
        id="appendix",
    )


def _value(value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    if isinstance(value, list) and all(isinstance(item, float) for item in value):
        return ", ".join(f"{item:.4g}" for item in value)
    return value if isinstance(value, str) else json.dumps(value)


HOW_TO_READ: Sequence[str] = (
    "All losses and perplexities are held-out, on the test split; mixers and policies learn from the validation split.",
    "Mean loss weighs every domain's loss by the objective; mean perplexity does the same with exp(loss), and so "
    "follows the worst domains. A mixer can win one and lose the other.",
    "Intervals are 95 % over seeds: Student t below twenty seeds, a BCa bootstrap from there on. A difference is "
    "paired by seed. Whether two intervals overlap is no test; whether the paired one leaves out 0 is.",
    "“No difference shown” does not say that there is none: it says that these seeds do not show one.",
    "With many mixers some interval leaves out 0 by chance; Holm's adjustment allows for that.",
    "Crossings under a cosine schedule depend on the horizon, since the learning rate falls towards its end; under a "
    "constant rate they do not.",
    "The medians of steps and cost have an interval between two order statistics; with up to five seeds even the whole "
    "range covers less than 95 % (93.75 % with five).",
)
