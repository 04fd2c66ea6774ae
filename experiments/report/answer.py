"""The report's first part for one schedule: the answer in words, the table of results, and the forests of intervals."""

from collections.abc import Sequence

from acodm_env.experiments.comparison.contrasts import Difference
from acodm_env.experiments.comparison.load import Comparison
from acodm_env.experiments.comparison.statistics import Interval
from acodm_env.experiments.comparison.summary import Row as Result
from acodm_env.experiments.comparison.summary import Summary
from acodm_env.experiments.report.curves import baseline_of
from acodm_env.experiments.report.forests import against, bounds, difference_forests, metrics_of, number
from acodm_env.experiments.report.page import Cell, Figures, Html, element, join, listing, markup, table

SYMBOLS = {"better": "◀ better", "worse": "▶ worse", "no difference shown": "○ no difference shown"}
MOST_NAMED = 4


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
    lines: list[str] = [_metric_answer(summary, baseline, metric) for metric in metrics_of(summary)]
    if all("not decided" in {one.verdict} for one in against(summary, baseline, summary.primary)):
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


def _metric_answer(summary: Summary, baseline: str, metric: str) -> Html:
    """ "Better than uniform in mean loss (the 95 % interval excludes 0): … Worse: … No difference shown: …" """
    what, unit, form = metrics_of(summary)[metric]
    found = sorted(against(summary, baseline, metric), key=lambda one: one.interval.mean or 0.0)
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
    to = f"against {baseline}"
    shown = [f"{what}, {unit}" if unit else what for what, unit, _ in metrics_of(summary).values()]
    verdict = "verdict on the objective" if summary.objective else "verdict on the loss"
    names = [name for what in shown for name in (what, to)]
    columns: list[str | Cell] = ["mixer", "seeds", *names, Cell(verdict, "words")]
    ordered = sorted(summary.rows, key=lambda row: _order(row, summary.primary))
    best = summary.objective or "mean loss"
    rows = [_result_cells(summary, row, baseline) for row in ordered]
    return table(
        columns, rows, f"Held-out results at the end of training, best {best} first; in brackets 95 % intervals"
    )


def _order(row: Result, metric: str) -> tuple[bool, float]:
    mean = row.metrics[metric].mean
    return mean is None, mean or 0.0


def _result_cells(summary: Summary, row: Result, baseline: str) -> list[str | Cell]:
    cells: list[str | Cell] = [row.mixer, f"{row.num_finished} of {row.num_planned}"]
    for metric, (_, _, form) in metrics_of(summary).items():
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
