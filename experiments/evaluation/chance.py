"""Whether a score says anything: intervals of a share of right answers, beside what guessing would score.

A small model's accuracy is often a guesser's. Two guessers count: one that draws an answer at random (`chance`), and
one that always gives the same answer (`constant`). The second scores more where answers are not uniform: of MMLU's
14,042 questions 27 % have the same letter for an answer, which a test against 25 % calls significant; and it scores
less: another letter is the answer to 23 % of them, "significantly below chance". Both say nothing about a model.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from acodm_env.experiments.evaluation.scores import ABOVE, AT, BELOW, Metric

_TWO_SIDED = 1.959963984540054  # 95 % of a normal distribution lie within as many standard errors


def accuracy(
    values: Sequence[float],
    *,
    task: str,
    name: str,
    group: str = "",
    chance: float | None = None,
    constant: float | None = None,
    least: float | None = None,
) -> Metric:
    """Share of right answers with its Wilson 95 % interval, and its verdict where a chance level is known.

    The standard error is the harness's own, sqrt(p(1 - p) / (n - 1)); the interval is Wilson's because it holds near 0
    and 1 and for few items, where p ± 2 errors does not (Brown, Cai and DasGupta 2001).

    Args:
        values: 1 for each right answer and 0 for each wrong one, (num_items,).
        task: the task's name.
        name: the metric's name.
        group: subject; "" is the whole task.
        chance: what guessing at random scores.
        constant: the most that always giving the same answer scores on these items.
        least: the least that it scores.

    Raises:
        ValueError: a value is neither 0 nor 1.
    """
    if any(value not in (0, 1) for value in values):
        raise ValueError(f"values of {task} {name}: must be 0 or 1; use mean() for others")
    num_items, right = len(values), int(sum(values))
    stderr = low = high = share = judged = None
    if num_items:
        share = right / num_items
        low, high = _wilson(right, num_items)
        judged = verdict(low, high, chance=chance, constant=constant, least=least)
    if num_items > 1 and share is not None:
        stderr = math.sqrt(share * (1 - share) / (num_items - 1))
    return Metric(
        task=task,
        name=name,
        group=group,
        value=share,
        stderr=stderr,
        low=low,
        high=high,
        num_items=num_items,
        chance=chance,
        constant=constant,
        verdict=judged,
    )


def mean(
    values: Sequence[float], *, task: str, name: str, group: str = "", unit: str = "", higher_is_better: bool = True
) -> Metric:
    """Mean of numbers that are no plain right-or-wrong, with its standard error and normal 95 % interval.

    Args:
        values: one number per item, (num_items,).
        task: the task's name.
        name: the metric's name.
        group: subject; "" is the whole task.
        unit: of the numbers.
        higher_is_better: the metric's direction.
    """
    num_items = len(values)
    value = math.fsum(values) / num_items if num_items else None
    stderr = low = high = None
    if value is not None and num_items > 1:
        squares = math.fsum((one - value) ** 2 for one in values)
        stderr = math.sqrt(squares / (num_items - 1) / num_items)
        low, high = value - _TWO_SIDED * stderr, value + _TWO_SIDED * stderr
    return Metric(
        task=task,
        name=name,
        group=group,
        value=value,
        stderr=stderr,
        low=low,
        high=high,
        num_items=num_items,
        unit=unit,
        higher_is_better=higher_is_better,
    )


def verdict(
    low: float, high: float, *, chance: float | None, constant: float | None = None, least: float | None = None
) -> str | None:
    """`ABOVE`, `AT` or `BELOW` chance, by an interval; None without a chance level.

    Above means above all guessers: an interval that lies above `chance` but reaches down to `constant` is `AT`. So is
    one that lies below `chance` but reaches up to `least`.
    """
    if chance is None:
        return None
    if high < (chance if least is None else min(chance, least)):
        return BELOW
    if low > (chance if constant is None else max(chance, constant)):
        return ABOVE
    return AT


def commonest(answers: Sequence[Hashable]) -> float | None:
    """Share of the commonest answer, which always giving it would score; None without answers."""
    return max(Counter(answers).values()) / len(answers) if answers else None


def rarest(answers: Sequence[Hashable], num_choices: int) -> float | None:
    """Share of the rarest of `num_choices` answers, 0 if one never is right; None without answers."""
    if not answers:
        return None
    counts = Counter(answers)
    return min(counts.values()) / len(answers) if len(counts) >= num_choices else 0.0


def _wilson(right: int, num_items: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    interval = binomtest(right, num_items).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
