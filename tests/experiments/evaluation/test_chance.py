"""Intervals, errors and verdicts, against numbers worked out by hand and against simulated guessers."""

import math

import numpy as np
import pytest

from acodm_env.experiments.evaluation.chance import accuracy, commonest, mean, rarest, verdict
from acodm_env.experiments.evaluation.scores import ABOVE, AT, BELOW


def marks(right: int, wrong: int) -> list[float]:
    return [1.0] * right + [0.0] * wrong


def test_wilson_interval_by_hand() -> None:
    found = accuracy(marks(7, 3), task="t", name="acc")
    z, n, p = 1.959963984540054, 10, 0.7
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found.value == 0.7
    assert found.low == pytest.approx(centre - half, abs=1e-12)
    assert found.high == pytest.approx(centre + half, abs=1e-12)
    assert found.stderr == pytest.approx(math.sqrt(0.7 * 0.3 / 9), abs=1e-15)
    assert (found.num_items, found.verdict) == (10, None)


def test_standard_error_is_the_harness_own() -> None:
    lm_eval = pytest.importorskip("lm_eval.api.metrics")
    values = marks(11, 26)
    assert accuracy(values, task="t", name="acc").stderr == pytest.approx(lm_eval.mean_stderr(values), rel=1e-12)
    uneven = [0.5, 2.0, -1.0, 7.25]
    assert mean(uneven, task="t", name="m").stderr == pytest.approx(lm_eval.mean_stderr(uneven), rel=1e-12)


@pytest.mark.parametrize(
    ("right", "wrong", "constant", "expected"),
    [
        (25, 75, None, AT),
        (60, 40, None, ABOVE),
        (5, 95, None, BELOW),
        (60, 40, 0.55, AT),  # above a random guesser, but one letter scores as much
        (60, 40, 0.30, ABOVE),
        (5, 95, 0.55, BELOW),
    ],
)
def test_verdicts(right: int, wrong: int, constant: float | None, expected: str) -> None:
    found = accuracy(marks(right, wrong), task="t", name="acc", chance=0.25, constant=constant)
    assert found.verdict == expected
    assert (found.chance, found.constant) == (0.25, constant)


def test_verdict_at_the_edges() -> None:
    assert verdict(0.25, 0.3, chance=0.25) == AT
    assert verdict(0.2, 0.25, chance=0.25) == AT
    assert verdict(0.2, 0.249, chance=0.25) == BELOW
    assert verdict(0.26, 0.3, chance=0.25, constant=0.26) == AT
    assert verdict(0.2, 0.24, chance=0.25, least=0.24) == AT
    assert verdict(0.2, 0.23, chance=0.25, least=0.24) == BELOW
    assert verdict(0.26, 0.3, chance=None) is None


@pytest.mark.parametrize("letter", range(4))
def test_always_the_same_letter_on_mmlu_is_at_chance(letter: int) -> None:
    counts = [3222, 3462, 3582, 3776]  # answers of the published test set
    answers = [place for place, count in enumerate(counts) for _ in range(count)]
    found = accuracy(
        [float(answer == letter) for answer in answers],
        task="mmlu",
        name="acc",
        chance=0.25,
        constant=commonest(answers),
        least=rarest(answers, 4),
    )
    assert found.low is not None
    assert found.high is not None
    assert found.verdict == AT
    if letter in (0, 3):  # although a test against a quarter calls it significant
        assert not found.low <= 0.25 <= found.high
    worse = accuracy([0.0] * 11_000 + [1.0] * 3042, task="mmlu", name="acc", chance=0.25, least=rarest(answers, 4))
    assert worse.verdict == BELOW


def test_humaneval_without_a_pass_is_at_chance_and_with_one_above() -> None:
    assert accuracy(marks(0, 164), task="humaneval", name="pass@1", chance=0.0).verdict == AT
    found = accuracy(marks(1, 163), task="humaneval", name="pass@1", chance=0.0)
    assert found.verdict == ABOVE
    assert accuracy(marks(0, 164), task="humaneval", name="pass@1", chance=0.0).low == 0.0


def test_few_items() -> None:
    none = accuracy([], task="t", name="acc", chance=0.25)
    assert (none.value, none.stderr, none.low, none.high, none.verdict, none.num_items) == (None,) * 5 + (0,)
    one = accuracy([1.0], task="t", name="acc", chance=0.25)
    assert (one.value, one.stderr) == (1.0, None)
    assert one.verdict == AT
    assert mean([], task="t", name="m").value is None
    assert mean([2.0], task="t", name="m").stderr is None


def test_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 0 or 1"):
        accuracy([0.5], task="t", name="acc")


def test_commonest_and_rarest() -> None:
    assert commonest([0, 1, 1, 3]) == 0.5
    assert commonest([]) is None
    assert rarest([0, 1, 1, 3], 3) == 0.25
    assert rarest([0, 1, 1, 3], 4) == 0.0
    assert rarest([], 4) is None


def test_the_interval_covers_and_guessers_are_rarely_called_above() -> None:
    rng = np.random.default_rng(0)
    draws = rng.random((400, 300)) < 0.25
    found = [accuracy(list(map(float, row)), task="t", name="acc", chance=0.25) for row in draws]
    covered = np.mean([one.low <= 0.25 <= one.high for one in found])  # type: ignore[operator]
    assert 0.92 <= covered <= 0.98
    assert np.mean([one.verdict == ABOVE for one in found]) < 0.05
