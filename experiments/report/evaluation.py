"""The report's section on what `acodm evaluate` measured of the runs: scores, chance, differences to the baseline."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.comparison.load import Comparison
from acodm_env.experiments.comparison.statistics import mean_interval, paired_interval
from acodm_env.experiments.comparison.summary import Summary
from acodm_env.experiments.evaluation.compare import (
    BOTH_AT_CHANCE,
    MOST_GROUPS,
    NO_DIFFERENCE,
    check_equal,
    compare,
    tokenizers_differ,
)
from acodm_env.experiments.evaluation.scores import AT, BELOW, Metric
from acodm_env.experiments.evaluation.store import FILE, MODEL, Results, Stored, result_name
from acodm_env.experiments.evaluation.table import (
    MARKS,
    SHORT,
    bounds,
    counted,
    is_perplexity,
    is_trial,
    noun,
    number,
    remarks,
)
from acodm_env.experiments.report.answer import SYMBOLS
from acodm_env.experiments.report.curves import baseline_of
from acodm_env.experiments.report.page import Cell, Html, element, join, listing, markup, table

Seeds = Mapping[int, Stored]
"""One mixer's results under one condition, by seed."""


@dataclass(frozen=True)
class _Difference:
    """A mixer minus the baseline on one metric of the whole task."""

    value: float | None
    low: float | None
    high: float | None
    verdict: str


NONE = _Difference(None, None, None, "does not compare")


def evaluation_section(comparison: Comparison, summary: Summary) -> Html:
    """What was evaluated of the runs under one schedule; nothing where no run was."""
    found, problems = _read(comparison, summary.schedule)
    conditions = list(dict.fromkeys(condition for results in found.values() for condition in results))
    if not conditions and not problems:
        return Html("")
    lead = "By acodm evaluate, of the models at the end of training. With one seed the intervals are over documents or "
    lead += "questions: they say nothing of another training of the same. With several they are over seeds, paired."
    parts: list[Html] = [element("h3", "Evaluation"), element("p", lead, class_="soft lead")]
    parts += [listing(problems, class_="soft")] if problems else []
    lines: list[str] = []
    for condition in conditions:
        of = {mixer: results[condition] for mixer, results in found.items() if condition in results}
        parts += [_scores(of, baseline_of(comparison)), _groups(of)]
        lines += [line for mixer, seeds in of.items() for line in remarks(_first(seeds), mixer)]
    return join([*parts, listing(dict.fromkeys(lines), class_="soft") if lines else Html("")])


def _read(comparison: Comparison, schedule: str) -> tuple[dict[str, dict[str, dict[int, Stored]]], list[str]]:
    """Results by mixer, condition and seed, no two conditions with the same name; and broken files, in words."""
    found: dict[str, dict[str, dict[int, Stored]]] = {}
    problems = []
    for mixer in comparison.mixers:
        for run in comparison.select(mixer, schedule):
            try:
                results = Results(run.folder)
                for stored in map(results.load, results.names()):
                    found.setdefault(mixer, {}).setdefault(_condition(stored.identity), {})[run.seed] = stored
            except (DataError, OSError, ValueError, TypeError, KeyError) as error:
                problems.append(f"{mixer}, seed {run.seed}: {FILE} cannot be read ({error})")
    labels = _labels([stored for of in found.values() for seeds in of.values() for stored in seeds.values()])
    for of in found.values():
        for condition, seeds in of.items():
            of[condition] = {seed: replace(stored, name=labels[condition]) for seed, stored in seeds.items()}
    return found, problems


def _condition(identity: Mapping[str, Any]) -> str:
    """What was asked, whichever model was: the same in every run that was asked the same."""
    return json.dumps({key: value for key, value in identity.items() if key not in MODEL}, sort_keys=True)


def _labels(results: Sequence[Stored]) -> dict[str, str]:
    """A name per condition: the results' own; where others ask the same of the task, what is different about it."""
    first = {_condition(stored.identity): stored for stored in reversed(results)}
    labels = {}
    for condition, stored in first.items():
        stem = result_name(stored.identity)
        others = [other.identity for other in first.values() if result_name(other.identity) == stem]
        keys = [key for key in stored.identity if key not in MODEL and len({_text(o.get(key)) for o in others}) > 1]
        differing = ", ".join(f"{key.replace('_', ' ')} {_text(stored.identity[key])[:12]}" for key in keys)
        labels[condition] = f"{stem} ({differing})" if differing else stored.name
    return labels


def _text(value: Any) -> str:
    return ", ".join(f"{key} {str(one)[:12]}" for key, one in value.items()) if isinstance(value, dict) else str(value)


def _first(seeds: Seeds) -> Stored:
    return next(iter(seeds.values()))


def _whole(stored: Stored) -> dict[str, Metric]:
    return {metric.name: metric for metric in stored.scores.metrics if not metric.group}


def _scores(of: Mapping[str, Seeds], baseline: str) -> Html:
    """A row per mixer: every metric of the whole task, and its difference to the baseline."""
    metrics = _metrics(of)
    against = baseline in of and len(of) > 1
    seeds = {len(each) for each in of.values()}
    header: list[str | Cell] = ["mixer", *(["seeds"] if len(seeds) > 1 else [])]
    for metric in metrics:
        header += [SHORT.get(metric.name, metric.name), *([f"against {baseline}"] if against else [])]
    rows = [_row(mixer, of, baseline if against else "", metrics) for mixer in of]
    if len(seeds) > 1:
        rows = [[row[0], str(len(each)), *row[1:]] for row, each in zip(rows, of.values(), strict=True)]
    items = sorted(
        {metric.num_items for seeds in of.values() for one in seeds.values() for metric in _whole(one).values()}
    )
    chance = next((metric.chance for metric in metrics if metric.chance is not None), None)
    one = _first(next(iter(of.values())))
    sizes = [*(f"{count:,}" for count in items[:-1]), *(counted(count, noun(one)) for count in items[-1:])]
    facts = [" or ".join(sizes) or "no metric of the whole", *([f"chance {chance:.4g}"] if chance is not None else [])]
    facts += (
        [counted(next(iter(seeds)), "seed")] if len(seeds) == 1 else []
    )  # no column of equal numbers on a narrow screen
    return table(header, rows, f"{_title(one)}: {', '.join(facts)}; in brackets 95 % intervals")


def _title(stored: Stored) -> str:
    """A table's name; a trial's says that it is none of the whole."""
    return f"trial: {stored.name}" if is_trial(stored) else stored.name


def _metrics(of: Mapping[str, Seeds]) -> list[Metric]:
    """The whole task's metrics, of the first run that has them; what compares over tokenizers comes first."""
    known: dict[str, Metric] = {}
    for seeds in of.values():
        for stored in seeds.values():
            known = _whole(stored) | known
    return sorted(known.values(), key=lambda metric: metric.name != "bits_per_byte")


def _row(mixer: str, of: Mapping[str, Seeds], baseline: str, metrics: Sequence[Metric]) -> list[str | Cell]:
    cells: list[str | Cell] = [mixer]
    differences = _differences((mixer, of[mixer]), (baseline, of[baseline]), metrics) if baseline else []
    for index, metric in enumerate(metrics):
        cells.append(_value(of[mixer], metric))
        if baseline and mixer == baseline:
            cells.append("baseline")
        elif baseline:
            cells.append(_against(differences[index], metric.unit))
    return cells


def _value(seeds: Seeds, metric: Metric) -> str | Cell:
    """The mean over seeds, or the one value, with its interval; marked where it is no better than guessing."""
    own = [one for stored in seeds.values() if (one := _whole(stored).get(metric.name)) is not None]
    known = [one.value for one in own if one.value is not None]
    if not own or len(known) < len(own):
        return "–"
    if len(own) == 1:
        text = _estimate(own[0].value, own[0].low, own[0].high, metric.unit)
    else:
        over = mean_interval(known)
        text = _estimate(over.mean, over.low, over.high, metric.unit)
    marked = [one.verdict for one in own if one.verdict in MARKS]
    if not marked:
        return text
    word = MARKS[BELOW] if set(marked) == {BELOW} else MARKS[AT]
    many = f" in {len(marked)} of {len(own)} seeds" if len(marked) < len(own) else ""
    return Cell(join([text, element("span", f"{word}{many}")], " "), "warn")


def _estimate(value: float | None, low: float | None, high: float | None, unit: str, sign: str = "") -> Html:
    if value is None:
        return markup("–")
    inside = element("span", bounds(low, high, sign).replace("-", "−"), class_="range")
    return join([number(value, unit, sign).replace("-", "−"), inside], "")


def _differences(one: tuple[str, Seeds], other: tuple[str, Seeds], metrics: Sequence[Metric]) -> list[_Difference]:
    """On every metric: over seeds where there are several, else over the items of the one."""
    (mixer, mine), (baseline, theirs) = one, other
    shared = sorted(mine.keys() & theirs.keys())
    if not shared:
        return [_Difference(None, None, None, "no seed in common")] * len(metrics)
    pairs = [((mixer, mine[seed]), (baseline, theirs[seed])) for seed in shared]
    try:
        for pair in pairs:
            check_equal(*pair)
        if len(shared) == 1:
            found = {each.metric: each for each in compare(*pairs[0]) if not each.group}
            known = [found.get(metric.name) for metric in metrics]
            return [_Difference(each.difference, each.low, each.high, each.verdict) if each else NONE for each in known]
    except ConfigError as error:
        return [_Difference(None, None, None, f"not of equal items ({_settings(error)})")] * len(metrics)
    return [_over_seeds([(mine[seed], theirs[seed]) for seed in shared], metric) for metric in metrics]


def _settings(error: ConfigError) -> str:
    """What differs, out of the whole sentence."""
    return str(error).partition(": must have ")[2].partition(";")[0]


def _over_seeds(pairs: Sequence[tuple[Stored, Stored]], metric: Metric) -> _Difference:
    if metric.name in ("loss", "perplexity") and any(tokenizers_differ(*pair) for pair in pairs):
        return _Difference(None, None, None, "other tokenizers: only bits/byte compare")
    metrics = [(_whole(one).get(metric.name), _whole(other).get(metric.name)) for one, other in pairs]
    values = [(one.value, other.value) for one, other in metrics if one is not None and other is not None]
    known = [(one, other) for one, other in values if one is not None and other is not None]
    if len(known) < len(pairs):
        return NONE
    found = paired_interval([one for one, _ in known], [other for _, other in known])
    if all(one is not None and one.verdict in MARKS for pair in metrics for one in pair):
        return _Difference(found.mean, found.low, found.high, BOTH_AT_CHANCE)
    if not found.excludes_zero:
        return _Difference(found.mean, found.low, found.high, NO_DIFFERENCE)
    better = ((found.low or 0.0) > 0) == metric.higher_is_better
    return _Difference(found.mean, found.low, found.high, "better" if better else "worse")


def _against(one: _Difference, unit: str) -> str | Cell:
    """A difference, its interval, and what it shows."""
    kind = one.verdict if one.verdict in ("better", "worse") else None
    wraps = "white-space: normal"  # where the table would not fit otherwise
    verdict = element("div", SYMBOLS.get(one.verdict, one.verdict), class_=kind, style=wraps)
    if one.value is None:
        return Cell(verdict, "words")
    return join([_estimate(one.value, one.low, one.high, unit, "+"), verdict], "")


def _groups(of: Mapping[str, Seeds]) -> Html:
    """A row per mixer, a column per domain or subject: the perplexity, or the task's first metric; means over seeds."""
    first = _first(next(iter(of.values())))
    groups = list(dict.fromkeys(metric.group for metric in first.scores.metrics if metric.group))
    if not 1 < len(groups) <= MOST_GROUPS:
        return Html("")
    metric = "perplexity" if is_perplexity(first) else next(iter(_whole(first)), "")
    rows = []
    for mixer, seeds in of.items():
        cells = [mixer]
        for group in groups:
            own = [
                one
                for stored in seeds.values()
                for one in stored.scores.metrics
                if (one.group, one.name) == (group, metric) and one.value is not None
            ]
            values = [one.value for one in own if one.value is not None]
            cells.append(number(sum(values) / len(values), own[0].unit) if len(values) == len(seeds) else "–")
        rows.append(cells)
    by = "domain" if is_perplexity(first) else "subject"
    return table(("mixer", *groups), rows, f"{_title(first)}: {metric} by {by}")
