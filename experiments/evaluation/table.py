"""Results of evaluations as aligned text, with what a score is worth in words: one at chance is marked as such."""

from collections.abc import Mapping, Sequence

from acodm_env.experiments.console import text_table
from acodm_env.experiments.evaluation.compare import MOST_GROUPS, PairedDifference
from acodm_env.experiments.evaluation.scores import AT, BELOW, Metric
from acodm_env.experiments.evaluation.store import Stored

MARKS = {AT: "≈ chance", BELOW: "below chance"}
"""Verdict: its mark in a table; a score above chance has none."""
MOST_NAMED = 8
"""Domains up to which a remark names each."""
SHORT = {"loss": "loss, nats/token", "perplexity": "perplexity", "bits_per_byte": "bits/byte"}


def scores_text(found: Mapping[str, Sequence[Stored]]) -> str:
    """Tables of every model's results, then what has to be known to read them.

    Args:
        found: results by model, in the order to print.
    """
    texts, lines = [], dict[str, None]()
    for name, results in found.items():
        texts += [name] if len(found) > 1 else []
        texts += [_perplexity_table(stored) for stored in results if is_perplexity(stored)]
        rows = [row for stored in results if not is_perplexity(stored) for row in _rows(stored)]
        if rows:
            texts.append(text_table(("task", "metric", "value", "95 % interval", "items", "chance", ""), rows))
        lines |= dict.fromkeys(line for stored in results for line in remarks(stored, name if len(found) > 1 else ""))
    return "\n\n".join([*texts, *(["\n".join(lines)] if lines else [])]) + "\n"


def is_perplexity(stored: Stored) -> bool:
    """Whether the result is of text, by domain."""
    return stored.scores.task == "perplexity"


def shown(metrics: Sequence[Metric]) -> list[Metric]:
    """The whole task's metrics, and its groups' where they are few enough to read."""
    few = len({metric.group for metric in metrics if metric.group}) <= MOST_GROUPS
    return [metric for metric in metrics if few or not metric.group]


def _rows(stored: Stored) -> list[list[str]]:
    return [
        [
            f"  {metric.group}" if metric.group else stored.name,
            metric.name,
            with_error(metric),
            bounds(metric.low, metric.high),
            f"{metric.num_items:,}",
            "–" if metric.chance is None else f"{metric.chance:.4g}",
            MARKS.get(metric.verdict or "", ""),
        ]
        for metric in shown(stored.scores.metrics)
    ]


def _perplexity_table(stored: Stored) -> str:
    """A row per domain, the unweighted mean first."""
    metrics = {(metric.group, metric.name): metric for metric in stored.scores.metrics}
    rows = []
    for group in dict.fromkeys(metric.group for metric in stored.scores.metrics):
        found = {name: metrics.get((group, name)) for name in SHORT}
        cells = [" ".join([value(one), bounds(one.low, one.high)]).rstrip() if one else "–" for one in found.values()]
        items = next((one.num_items for one in found.values() if one), 0)
        rows.append([group or "unweighted mean", *cells, f"{items:,}"])
    return text_table((stored.name, *SHORT.values(), "documents"), rows)


def value(metric: Metric) -> str:
    """A metric's number as it is printed everywhere."""
    return number(metric.value, metric.unit)


def number(amount: float | None, unit: str, sign: str = "") -> str:
    """Four decimals of fractions and nats, four digits or more of a perplexity; a dash for nothing."""
    if amount is None:
        return "–"
    return format(amount, f"{sign}.{2 if abs(amount) >= 10 else 3}f" if unit == "perplexity" else f"{sign}.4f")


def with_error(metric: Metric) -> str:
    """ "0.2531 ± 0.0037": value and standard error."""
    return value(metric) if metric.stderr is None else f"{value(metric)} ± {number(metric.stderr, metric.unit)}"


def bounds(low: float | None, high: float | None, sign: str = "") -> str:
    """ "[low, high]"; "" without an interval."""
    if low is None or high is None:
        return ""
    form = f"{sign}.{2 if max(abs(low), abs(high)) >= 10 else 4}f"
    return f"[{format(low, form)}, {format(high, form)}]"


def counted(number: int, noun: str) -> str:
    """ "1 item", "2,000 items"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def noun(stored: Stored) -> str:
    """What a result's items are."""
    return "document" if is_perplexity(stored) else "item"


def is_trial(stored: Stored) -> bool:
    """Whether only the first items were scored (``--limit``)."""
    return stored.identity.get("limit") is not None


def remarks(stored: Stored, model: str = "") -> list[str]:
    """What has to be known to read a result: scores that are no better than guessing, cut prompts, corpus, trials.

    Args:
        stored: the result.
        model: whose it is, named where a sentence is on its score; "" if there is no other.
    """
    name, facts = stored.name, stored.scores.facts
    whole = [metric for metric in stored.scores.metrics if not metric.group]
    lines = [line for metric in whole if (line := _chance(f"{model}, {name}" if model else name, metric))]
    if is_perplexity(stored):
        lines += _text_remarks(stored)
    if facts.get("num_truncated"):
        lines.append(_cut(stored))
    if facts.get("complete") is False:
        counts = ", ".join(f"{count:,} {what}" for what, count in facts.get("data", {}).items())
        lines.append(f"{name}: the local files hold {counts}, which is not the published number.")
    if is_trial(stored):
        limit = int(stored.identity["limit"])
        first = noun(stored) if limit == 1 else counted(limit, noun(stored))
        part = "domain" if is_perplexity(stored) else "part"
        lines.append(f"{name}: a trial on the first {first} of each {part}, not the whole.")
    return lines


def _text_remarks(stored: Stored) -> list[str]:
    """How a perplexity was measured, and of what."""
    name, facts, identity = stored.name, stored.scores.facts, stored.identity
    windows = f"windows of {counted(identity.get('context') or 0, 'token')} that move on by {identity.get('stride')}"
    lines = [
        f"{name}: every token of the test split scored once, by {windows}; intervals over documents. Over tokenizers, "
        f"only bits/byte compare."
    ]
    domains = [group for group in dict.fromkeys(metric.group for metric in stored.scores.metrics) if group]
    names = f" ({', '.join(domains)})" if len(domains) <= MOST_NAMED else ""
    corpus = str(identity.get("corpus_fingerprint", "unknown"))[:12]
    again = ", and its texts were encoded again with the model's tokenizer" if facts.get("reencoded") else ""
    lines.append(f"{name}: the corpus is {corpus}, {counted(len(domains), 'domain')}{names}{again}.")
    return lines


def _cut(stored: Stored) -> str:
    """That prompts were too long for the model."""
    facts, identity = stored.scores.facts, stored.identity
    cut, asked = facts["num_truncated"], facts.get("num_items", len(stored.scores.items))
    room = facts.get("prompt_tokens")
    than = (
        f"the {counted(room, 'token')} that the context leaves beside a completion"
        if room is not None and room != identity.get("context")
        else f"the context of {counted(identity.get('context') or 0, 'token')}"
    )
    which = f"{cut:,} of {counted(asked, 'prompt')} {'is' if cut == 1 else 'are'}"
    lost = "lost its beginning" if cut == 1 else "lost their beginnings"
    return f"{stored.name}: {which} longer than {than} and {lost}, so the score is not the task's as published."


def _chance(name: str, metric: Metric) -> str:
    """A sentence on a score at or below chance; "" for others."""
    if metric.verdict not in MARKS or metric.chance is None:
        return ""
    if not metric.chance:
        return f"{name}: {metric.name} is {value(metric)}: nothing is shown to be solved, so beating it shows little."
    where = f"{name}: {metric.name} {value(metric)} {bounds(metric.low, metric.high)}".rstrip()
    if metric.verdict == BELOW:
        return f"{where} is below chance ({metric.chance:.4g}): guessing does better, so beating it shows nothing."
    same = metric.low is not None and metric.low > metric.chance and metric.constant is not None
    if same:
        return (
            f"{where} is above {metric.chance:.4g}, but always giving the same answer scores {metric.constant:.4g}: "
            f"not distinguishable from no knowledge, so beating it shows nothing."
        )
    if metric.high is not None and metric.high < metric.chance:
        return (
            f"{where} is below {metric.chance:.4g}, but within what always giving one answer scores: not "
            f"distinguishable from no knowledge, so beating it shows nothing."
        )
    return f"{where} is {AT} ({metric.chance:.4g}): beating it shows nothing."


def comparison_text(found: Sequence[PairedDifference]) -> str:
    """Differences to the reference as a table, the verdict last."""
    if not found:
        return "nothing to compare: no metric that both models have is a mean over their items\n"
    reference = found[0].reference
    rows = [
        [
            one.run,
            f"{one.result}{': ' + one.group if one.group else ''}",
            one.metric,
            number(one.value, one.unit),
            number(one.reference_value, one.unit),
            number(one.difference, one.unit, "+"),
            bounds(one.low, one.high, "+"),
            f"{one.num_items:,}",
            one.verdict + (f" ({one.note})" if one.note else ""),
        ]
        for one in found
    ]
    header = ("model", "task", "metric", "value", reference, "difference", "95 % interval", "items", "verdict")
    lead = f"differences to {reference}, on equal items; items are drawn again, not trainings: one training of each"
    only_bits = sorted(
        {one.run for one in found if one.metric == "bits_per_byte"} - {o.run for o in found if o.metric == "loss"}
    )
    lines = [f"{name}: another tokenizer than {reference}'s: only bits/byte compare." for name in only_bits]
    return "\n\n".join([lead, text_table(header, rows), *lines]) + "\n"
