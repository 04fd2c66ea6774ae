"""The report's forests for one schedule: differences to the baseline, steps and cost, the worth of changing."""

from collections.abc import Sequence

from acodm_env.experiments.comparison.contrasts import Difference
from acodm_env.experiments.comparison.statistics import Interval
from acodm_env.experiments.comparison.summary import Row as Result
from acodm_env.experiments.comparison.summary import Summary
from acodm_env.experiments.report.curves import dynamic_pairs
from acodm_env.experiments.report.forest import Row, forest_figure
from acodm_env.experiments.report.page import Figures, Html, element, join

METRICS = {"mean_loss_nats": ("mean loss", "nats", ".4f"), "mean_perplexity": ("mean perplexity", "", ".2f")}
"""Metric: its name in words, unit, and format."""
FEWEST_FOR_MEDIAN = 5
"""Seeds below which a median's interval covers less than 90 % and decides nothing."""


def metrics_of(summary: Summary) -> dict[str, tuple[str, str, str]]:
    """The metrics of the page, the objective first and by its name, where one was chosen."""
    if not summary.objective:
        return METRICS
    return {summary.primary: (summary.objective, "nats", ".4f")} | {
        name: shown for name, shown in METRICS.items() if name != summary.primary
    }


def number(value: float | None, form: str) -> str:
    """A number with a true minus sign, a dash if there is none."""
    return "–" if value is None else format(value, form).replace("-", "−")


def bounds(found: Interval, form: str) -> str:
    """ "[low, high]", "" if there is no interval."""
    if found.low is None or found.high is None:
        return ""
    return f"[{number(found.low, form)}, {number(found.high, form)}]"


def against(summary: Summary, baseline: str, metric: str) -> list[Difference]:
    """Every other mixer against the baseline on one metric."""
    found = (summary.difference(name, baseline, metric) for name in summary.mixers if name != baseline)
    return [one for one in found if one is not None]


def difference_forests(summary: Summary, baseline: str, figures: Figures) -> Html:
    """Paired differences to the baseline, one forest per metric."""
    return element(
        "div",
        *(
            _forest(
                against(summary, baseline, metric),
                figures,
                title=f"{what[0].upper()}{what[1:]}, difference to {baseline}",
                axis_title=f"difference to {baseline}" + (f", {unit}" if unit else ""),
                form="+" + form,
            )
            for metric, (what, unit, form) in metrics_of(summary).items()
        ),
        class_="forests",
    )


def dynamics_forests(summary: Summary, figures: Figures) -> Html:
    """Every changing mixture minus its own time average held fixed."""
    pairs = dynamic_pairs(summary.mixers)
    if not pairs:
        return element("p", "No mixer's time average was run beside it (--mean_of), so this cannot be said.")
    blocks = []
    for metric, (what, unit, form) in metrics_of(summary).items():
        found = [one for name, mean in pairs if (one := summary.difference(name, mean, metric)) is not None]
        title = f"{what[0].upper()}{what[1:]}, mixture that changes minus its time average"
        axis_title = "difference to its time average" + (f", {unit}" if unit else "")
        blocks.append(_forest(found, figures, title=title, axis_title=axis_title, form="+" + form))
    return element("div", *blocks, class_="forests")


def _forest(found: Sequence[Difference], figures: Figures, *, title: str, axis_title: str, form: str) -> Html:
    ordered = sorted(found, key=lambda one: (one.interval.mean is None, one.interval.mean or 0.0))
    rows = [_difference_row(one, form) for one in ordered]
    return figures.frame(forest_figure(rows, x_title=axis_title, line=0.0), f"{title}: {_spoken(rows)}", title=title)


def _difference_row(one: Difference, form: str) -> Row:
    found = one.interval
    if found.mean is None:
        return Row(name=one.mixer, mean=None, note="diverged" if one.note else found.method)
    short = number(found.mean, form)
    note = f"{short}  {bounds(found, form)}".rstrip()
    return Row(
        name=one.mixer, mean=found.mean, low=found.low, high=found.high, verdict=one.verdict, note=note, short=short
    )


def _spoken(rows: Sequence[Row]) -> str:
    return "; ".join(f"{row.name} {row.note.replace('  ', ' ')}" for row in rows)


def crossing_forests(summary: Summary, figures: Figures) -> Html:
    """Steps and end-to-end cost to the reference's best objective, as ratios to the reference's own."""
    blocks = []
    unit = "FLOPs" if summary.cost_unit == "flops" else "tokens"
    titles = {
        "steps_to_reference_ratio": f"Steps to the reference's best {summary.objective or 'perplexity'}",
        "cost_to_reference_ratio": f"Cost to it, end to end, in {unit}",
    }
    for metric, title in titles.items():
        rows = [_ratio_row(row, metric) for row in summary.rows if row.mixer != summary.reference and row.num_compared]
        rows.sort(key=lambda row: (row.mean is None, row.mean or 0.0))
        if rows:
            figure = forest_figure(rows, x_title=f"as a multiple of {summary.reference}'s own", line=1.0)
            blocks.append(figures.frame(figure, f"{title}: {_spoken(rows)}", title=title))
    if not blocks:
        return element("p", f"The reference, {summary.reference}, has not finished: there is no level to reach yet.")
    return element("div", *blocks, class_="forests")


def _ratio_row(row: Result, metric: str) -> Row:
    """A median with its interval; a bound that lies at "never" is endless."""
    found = row.metrics[metric]
    count = f"{found.num_seeds} of {row.num_compared}"
    if found.method == "no seeds":
        return Row(name=row.mixer, mean=None, note="cost not recorded")
    if found.mean is None:
        return Row(name=row.mixer, mean=None, beyond=True, note=f"never ({count})")
    high = "never" if found.high is None else f"{found.high:.2f}"
    short = f"{found.mean:.2f}× ({count})"
    note = short + ("" if found.low is None else f"  [{found.low:.2f}, {high}]")
    verdict = ""
    if row.num_compared >= FEWEST_FOR_MEDIAN and found.low is not None:
        verdict = "worse" if found.low > 1 else "better" if found.high is not None and found.high < 1 else ""
    endless = found.low is not None and found.high is None
    return Row(
        name=row.mixer,
        mean=found.mean,
        low=found.low,
        high=found.high,
        endless=endless,
        verdict=verdict,
        note=note,
        short=short,
    )


def crossing_sections(summary: Summary, figures: Figures) -> Html:
    """Steps and cost to the reference, and what the changing of a mixture is worth."""
    level = summary.objective or "held-out perplexity"
    lead = f"When does a run first reach the best {level} that {summary.reference} reaches with the same "
    lead += "seed? Medians over seeds; left of 1 is sooner. “n of N” counts the seeds that get there at all; ⇥ and "
    lead += "“never”: half of them or more do not. Cost counts preparation and learning in full, and training up to "
    lead += "that step."
    lead += f" With fewer than {FEWEST_FOR_MEDIAN} seeds no verdict is drawn: the interval covers too little."
    dynamics = "The control of every method that changes the mixture: its own average over time, held fixed. "
    dynamics += "An interval around 0 says that the changing itself is not shown to be worth anything."
    return join(
        [
            element("h3", f"Steps and cost to reach {summary.reference}"),
            element("p", lead, class_="soft lead"),
            crossing_forests(summary, figures),
            element("h3", "Is the dynamics worth anything?"),
            element("p", dynamics, class_="soft lead"),
            dynamics_forests(summary, figures),
            _learning(summary),
        ]
    )


def _learning(summary: Summary) -> Html:
    """The policy against the same network untrained, in words; nothing without a policy."""
    lines = []
    for metric, (what, unit, form) in METRICS.items():
        one = summary.difference("policy", "policy-untrained", metric)
        if one is not None:
            interval = f"{number(one.interval.mean, '+' + form)} {unit} {bounds(one.interval, '+' + form)}".split()
            lines.append(f"{what} {' '.join(interval)}, {one.verdict}")
    if not lines:
        return Html("")
    return element("p", element("strong", "And the learning? "), f"policy minus policy-untrained: {'; '.join(lines)}.")
