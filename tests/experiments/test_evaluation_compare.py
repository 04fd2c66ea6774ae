"""Paired differences: hand-computed values, intervals that hold what they should, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
from fake_evaluation import choice_scores, text_scores

from acodm_env.errors import ConfigError
from acodm_env.experiments.evaluation.compare import (
    BOTH_AT_CHANCE,
    NO_DIFFERENCE,
    compare,
    compare_all,
    write_comparison,
)
from acodm_env.experiments.evaluation.items import sign_test
from acodm_env.experiments.evaluation.store import Stored
from acodm_env.files import read_json


def stored(scores, **identity):
    settings = {"task": scores.task, "limit": None, "tokenizer_sha256": "t", "context": 32, **identity}
    return Stored(name=scores.task, identity=settings, scores=scores, whole=True)


def texts(shift=0.0, count=25, seed=0, **identity):
    losses = np.random.default_rng(seed).normal(3.0, 0.5, (2, count)) + shift
    return stored(text_scores({"web": losses[0].tolist(), "code": losses[1].tolist()}), **identity)


def by_key(found):
    return {(one.metric, one.group): one for one in found}


def test_differences_are_those_of_the_values_and_a_constant_shift_has_no_spread():
    found = by_key(compare(("a", texts(0.1)), ("b", texts())))
    assert set(found) == {
        (name, group) for name in ("loss", "perplexity", "bits_per_byte") for group in ("", "web", "code")
    }
    for group in ("", "web", "code"):
        one = found["loss", group]
        assert one.difference == pytest.approx(0.1)
        assert (one.low, one.high) == (pytest.approx(0.1), pytest.approx(0.1))  # the documents' spread cancels
        assert one.verdict == "worse"
        assert found["bits_per_byte", group].difference == pytest.approx(0.1 * 10 / 40 / math.log(2))
    assert found["loss", ""].num_items == 50
    assert (found["loss", "web"].run, found["loss", "web"].reference) == ("a", "b")
    assert by_key(compare(("b", texts()), ("a", texts(0.1))))["loss", ""].verdict == "better"


def test_interval_of_a_difference_is_near_the_normal_one():
    rng = np.random.default_rng(1)
    one, noise = rng.normal(3, 0.5, 400), rng.normal(0.02, 0.1, 400)
    first, second = (stored(text_scores({"web": values.tolist()})) for values in (one + noise, one))
    found = by_key(compare(("a", first), ("b", second)))["loss", "web"]
    half = 1.96 * noise.std(ddof=1) / 20
    assert found.low == pytest.approx(noise.mean() - half, abs=half / 10)
    assert found.high == pytest.approx(noise.mean() + half, abs=half / 10)


def test_the_same_seed_gives_the_same_interval():
    first, second = texts(seed=1), texts(seed=2)
    runs = [compare(("a", first), ("b", second), seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_few_documents_have_student_t_and_one_decides_nothing():
    found = by_key(compare(("a", texts(seed=1, count=3)), ("b", texts(seed=2, count=3))))["loss", "web"]
    items = [texts(seed=seed, count=3).scores.items[:3] for seed in (1, 2)]
    delta = [(mine["nats"] - theirs["nats"]) / 10 for mine, theirs in zip(*items, strict=True)]
    half = 4.302653 * np.std(delta, ddof=1) / math.sqrt(3)  # t with two degrees of freedom
    assert found.high - found.difference == pytest.approx(half, rel=1e-5)
    only = by_key(compare(("a", texts(0.1, count=1)), ("b", texts(count=1))))["loss", "web"]
    assert (only.low, only.verdict) == (None, "not decided")


def test_other_tokenizers_compare_in_bits_per_byte_only():
    found = compare(("a", texts(0.1, tokenizer_sha256="u")), ("b", texts()))
    assert {one.metric for one in found} == {"bits_per_byte"}


def test_right_and_wrong_answers():
    worse, better = [1.0] * 40 + [0.0] * 60, [1.0] * 60 + [0.0] * 40
    (found,) = compare(("a", stored(choice_scores(better))), ("b", stored(choice_scores(worse))))
    assert (found.metric, found.difference, found.verdict) == ("acc", pytest.approx(0.2), "better")
    assert 0.1 < found.low < 0.2 < found.high < 0.3


def test_four_items_of_one_sign_are_no_difference():
    base = [1.0] * 60 + [0.0] * 104
    four = [1.0] * 64 + [0.0] * 100
    (found,) = compare(("a", stored(choice_scores(four))), ("b", stored(choice_scores(base))))
    assert found.low > 0  # the bootstrap alone would say better
    assert found.verdict == NO_DIFFERENCE
    assert "p = 0.12" in found.note
    assert sign_test(np.array([[1, 1, 0, 1]] * 4 + [[1, 1, 1, 1]], float)) == pytest.approx(0.125)


def test_two_at_chance_are_no_comparison_and_one_is_said():
    low, other, high = ([float(i % 20 < count) for i in range(400)] for count in (5, 5, 12))
    (both,) = compare(("a", stored(choice_scores(low))), ("b", stored(choice_scores(other))))
    assert both.verdict == BOTH_AT_CHANCE
    (one,) = compare(("a", stored(choice_scores(high))), ("b", stored(choice_scores(low))))
    assert (one.verdict, one.note) == ("better", "the reference is at chance")
    none = choice_scores([0.0] * 164, "humaneval", "pass@1")
    (unsolved,) = compare(("a", stored(none)), ("b", stored(none)))
    assert unsolved.verdict == BOTH_AT_CHANCE


def test_a_metric_that_is_no_mean_over_items_is_not_compared():
    scores = choice_scores([1.0, 0.0, 1.0])
    odd = replace(scores, metrics=[replace(scores.metrics[0], value=0.1)])
    assert compare(("a", stored(odd)), ("b", stored(scores))) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 5}, "with limit=None as b has; it has 5"),
        ({"num_fewshot": 5}, "num_fewshot=None as b has; it has 5"),
        ({"corpus_fingerprint": "f" * 64}, "corpus_fingerprint=None as b has; it has ffffffffffff…"),
        ({"data": {"mmlu_test.jsonl.gz": "9" * 64}}, "data=None as b has; it has mmlu_test.jsonl.gz 999999999999…"),
        ({"stride": 8}, "stride=None as b has; it has 8"),
        ({"context": 8}, "context=32 as b has; it has 8"),
        ({"harness_version": "0.4.9"}, "harness_version=None as b has; it has 0.4.9"),
    ],
)
def test_unequal_settings_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match="evaluate both with the same") as error:
        compare(("a", texts(**changes)), ("b", texts()))
    assert message in str(error.value)


def test_contexts_may_differ_where_no_prompt_was_cut():
    whole = choice_scores([1.0, 0.0])
    assert compare(("a", stored(whole, context=8)), ("b", stored(whole)))
    cut = choice_scores([1.0, 0.0], num_truncated=1)
    with pytest.raises(ConfigError, match="context=32"):
        compare(("a", stored(cut, context=8)), ("b", stored(whole)))


def test_unequal_items_and_lost_items_are_refused():
    with pytest.raises(ConfigError, match="/25 is in one of them only"):
        compare(("a", texts(count=26)), ("b", texts()))
    with pytest.raises(ConfigError, match="their file is missing or was edited"):
        compare(("a", replace(texts(), whole=False)), ("b", texts()))
    with pytest.raises(ConfigError, match="must be of perplexity as b is; it is of mmlu"):
        compare(("a", stored(choice_scores([1.0]))), ("b", texts()))


def test_all_against_one_and_the_file(tmp_path):
    found = {"a": [texts()], "b": [texts(0.1)], "c": [texts(0.2)]}
    assert {(one.run, one.reference) for one in compare_all(found)} == {("b", "a"), ("c", "a")}
    differences = compare_all(found, "b", seed=3)
    assert {(one.run, one.reference) for one in differences} == {("a", "b"), ("c", "b")}
    record = read_json(write_comparison(tmp_path, differences, 3))
    assert len(record["differences"]) == len(differences) == 18
    assert record["differences"][0]["verdict"] == "better"
    assert "seed 3" in record["method"]
