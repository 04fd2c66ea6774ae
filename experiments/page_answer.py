"""The report's first part for one schedule: the answer in words, the table of results, and the forests of intervals."""

from collections.abc import Sequence

from acodm_env.experiments.comparison import Comparison
from acodm_env.experiments.differences import Difference
from acodm_env.experiments.forest_figure import Row, forest_figure
from acodm_env.experiments.page import Cell, Figures, Html, element, join, listing, markup, table
from acodm_env.experiments.report_data import baseline_of, dynamic_pairs
from acodm_env.experiments.statistics import Interval
from acodm_env.experiments.summary import Row as Result
from acodm_env.experiments.summary import Summary

METRICS = {"mean_loss_nats": ("mean loss", "nats", ".4f"), "mean_perplexity": ("mean perplexity", "", ".2f")}
SYMBOLS = {"better": "◀ better", "worse": "▶ worse", "no difference shown": "○ no difference shown"}
MOST_NAMED = 4


def number(value: float | None, form: str) -> str:
    """A number with a true minus sign, a dash if there is none."""
    return "–" if value is None else format(value, form).replace("-", "−")


def bounds(found: Interval, form: str) -> str:
    """ "[low, high]", "" if there is no interval."""
    if found.low is None or found.high is None:
        return ""
    return f"[{number(found.low, form)}, {number(found.high, form)}]"


def problems_box(comparison: Comparison) -> Html:
    """What is missing, failed or diverged, every run by name; nothing if all is well."""
    lines: list[str] = [*comparison.problems]
    diverged = [f"{run.schedule}/{run.mixer}/seed{run.seed}" for run in comparison.runs if run.status == "diverged"]
    if diverged:
        lines.append(
            f"{len(diverged)} of {len(comparison.runs)} runs diverged: {'; '.join(diverged)}. "
            "Their mixers have no mean: one over the seeds that are left would flatter them."
        )
    lacking = [run for run in comparison.runs if not run.ended]
    named = listing(f"{run.schedule}/{run.mixer}/seed{run.seed}: {run.status}. {run.message}" for run in lacking)
    full = element("details", element("summary", f"all {len(lacking)}"), named) if len(lacking) > 10 else Html("")
    if not lines:
        return Html("")
    return element("section", element("h2", "What is missing"), listing(lines), full, class_="problems", id="problems")


def answer(summary: Summary, baseline: str) -> Html:
    """The result in two sentences, one per metric, and how sure it is."""
    others = [row for row in summary.rows if row.mixer != baseline]
    if not any(row.num_finished for row in summary.rows):
        return _box("No run has finished yet: there is nothing to compare.")
    if not others or baseline not in summary.mixers:
        return _box("There is nothing to compare: it takes a baseline and at least one other mixer.")
    lines: list[str] = [_metric_answer(summary, baseline, metric) for metric in METRICS]
    if all("not decided" in {one.verdict} for one in _against(summary, baseline, "mean_loss_nats")):
        return _box(
            f"With one seed there are no intervals, so nothing is ranked against {baseline}: give at least two seeds."
            if len(summary.seeds) < 2
            else f"Nothing can be decided against {baseline} yet: too few seeds have finished."
        )
    kept = [one for one in summary.differences if one.baseline == baseline and (one.p_holm or 1.0) <= 0.05]
    shown = [one for one in summary.differences if one.baseline == baseline and one.verdict in ("better", "worse")]
    if shown:
        lines.append(
            "Better and worse: the 95 % interval of the paired difference leaves out 0. "
            f"{len(kept)} of these {len(shown)} verdicts stand after Holm's adjustment for all comparisons made."
        )
    return _box(*lines)


def _box(*lines: str) -> Html:
    return element("div", *(element("p", line) for line in lines), class_="answer")


def _against(summary: Summary, baseline: str, metric: str) -> list[Difference]:
    found = (summary.difference(name, baseline, metric) for name in summary.mixers if name != baseline)
    return [one for one in found if one is not None]


def _metric_answer(summary: Summary, baseline: str, metric: str) -> Html:
    """ "Better than uniform in mean loss (the 95 % interval excludes 0): … Worse: … No difference shown: …" """
    what, unit, form = METRICS[metric]
    found = sorted(_against(summary, baseline, metric), key=lambda one: one.interval.mean or 0.0)
    groups = {word: [one for one in found if one.verdict == word] for word in (*SYMBOLS, "not decided")}
    better = groups["better"]
    first = (
        f"In {what}, {_named(better, unit, form)} {'is' if len(better) == 1 else 'are'} better than {baseline}."
        if better
        else f"In {what}, no mixer is shown to be better than {baseline}."
    )
    rest = [
        f"{word}: {_plain([one.mixer for one in groups[group]])}."
        for group, word in (
            ("worse", "Worse"),
            ("no difference shown", "No difference shown"),
            ("not decided", "Not decided"),
        )
        if groups[group]
    ]
    return join([element("strong", first), *rest], " ")


def _named(found: Sequence[Difference], unit: str, form: str) -> str:
    texts = [f"{one.mixer} ({number(one.interval.mean, '+' + form)}{' ' + unit if unit else ''})" for one in found]
    return _plain(texts)


def _plain(names: Sequence[str]) -> str:
    if len(names) > 1:
        return ", ".join(names[:-1]) + " and " + names[-1]
    return names[0] if names else ""


def results_table(summary: Summary, baseline: str) -> Html:
    """One row per mixer, best mean loss first; those that diverged last."""
    against = f"against {baseline}"
    header = ("mixer", "seeds", "mean loss, nats", against, "mean perplexity", against)
    columns = (*header, Cell("verdict on the loss", "words"))
    ordered = sorted(summary.rows, key=_order)
    rows = [_result_cells(summary, row, baseline) for row in ordered]
    return table(
        columns, rows, "Held-out results at the end of training, best mean loss first; in brackets 95 % intervals"
    )


def _order(row: Result) -> tuple[bool, float]:
    mean = row.metrics["mean_loss_nats"].mean
    return mean is None, mean or 0.0


def _result_cells(summary: Summary, row: Result, baseline: str) -> list[str | Cell]:
    cells: list[str | Cell] = [row.mixer, f"{row.num_finished} of {row.num_planned}"]
    for metric, (_, _, form) in METRICS.items():
        cells.append(_estimate(row.metrics[metric], form, row))
        one = summary.difference(row.mixer, baseline, metric)
        cells.append("baseline" if row.mixer == baseline else _estimate(one.interval, "+" + form, row) if one else "–")
    one = summary.difference(row.mixer, baseline)
    if one is None:
        return [*cells, Cell("", "words")]
    word = SYMBOLS.get(one.verdict, f"{one.verdict}: {one.note or one.interval.method}")
    kind = one.verdict if one.verdict in ("better", "worse") else ""
    return [*cells, Cell(element("span", word, class_=kind or None), "words")]


def _estimate(found: Interval, form: str, row: Result) -> Html:
    if found.mean is None:
        return markup("diverged" if row.num_diverged else "–")
    return join([number(found.mean, form), element("span", bounds(found, form), class_="range")], "")


def difference_forests(summary: Summary, baseline: str, figures: Figures) -> Html:
    """Paired differences to the baseline, one forest per metric."""
    return element(
        "div",
        *(
            _forest(
                _against(summary, baseline, metric),
                figures,
                title=f"{what[0].upper()}{what[1:]}, difference to {baseline}",
                axis_title=f"difference to {baseline}" + (f", {unit}" if unit else ""),
                form="+" + form,
            )
            for metric, (what, unit, form) in METRICS.items()
        ),
        class_="forests",
    )


def dynamics_forests(summary: Summary, figures: Figures) -> Html:
    """Every changing mixture minus its own time average held fixed."""
    pairs = dynamic_pairs(summary.mixers)
    if not pairs:
        return element("p", "No mixer's time average was run beside it (--mean_of), so this cannot be said.")
    blocks = []
    for metric, (what, unit, form) in METRICS.items():
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
    """Steps and end-to-end cost to the reference's best perplexity, as ratios to the reference's own."""
    blocks = []
    unit = "FLOPs" if summary.cost_unit == "flops" else "tokens"
    titles = {
        "steps_to_reference_ratio": "Steps to the reference's best perplexity",
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
    verdict = "better" if found.high is not None and found.high < 1 else ""
    verdict = "worse" if found.low is not None and found.low > 1 else verdict
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


def answer_sections(comparison: Comparison, summary: Summary, figures: Figures) -> Html:
    """Answer, table, and the forests, in this order."""
    baseline = baseline_of(comparison)
    lead = "Paired by seed: both runs of a pair start from the same model and see the same data. Left of the line is "
    lead += f"better than {baseline}. ◀ and ▶: the interval leaves out 0; ○: it does not."
    parts = [answer(summary, baseline), results_table(summary, baseline)]
    if any(row.num_finished for row in summary.rows):
        parts += [element("h3", f"Differences to {baseline}"), element("p", lead, class_="soft lead")]
        parts.append(difference_forests(summary, baseline, figures))
    return join(parts)


def crossing_sections(summary: Summary, figures: Figures) -> Html:
    """Steps and cost to the reference, and what the changing of a mixture is worth."""
    lead = f"When does a run first reach the best held-out perplexity that {summary.reference} reaches with the same "
    lead += "seed? Medians over seeds; left of 1 is sooner. “n of N” counts the seeds that get there at all; → and "
    lead += "“never”: half of them or more do not. Cost counts preparation and learning in full, and training up to "
    lead += "that step."
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
    return element("p", element("strong", "Is the learning? "), f"policy minus policy-untrained: {'; '.join(lines)}.")
