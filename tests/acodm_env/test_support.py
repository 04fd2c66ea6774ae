"""Where a policy may be trusted, what drives elsewhere, and what it was learned for: all by hand."""

from dataclasses import replace

import numpy as np
import pytest

from acodm_env.errors import PolicyError
from acodm_env.support import check_sees, learned_for, nearest_rule, outside, target_share, uniform_shares, unusual
from acodm_env.trainer import RunInfo

NAMES = tuple("abcdefgh")


def run(sizes=(1000,) * 8, targets=None, **changes):
    """A run of 400 steps of 16 sequences over eight domains; sizes in sequences."""
    weights = targets or dict.fromkeys(NAMES, 1 / 8)
    known = {
        "domains": NAMES[: len(sizes)],
        "targets": tuple(weights),
        "objective": tuple(weights.values()),
        "sizes_tokens": tuple(128 * size for size in sizes),
        "batch_size": 16,
        "sequence_length": 128,
        "horizon": 400,
        "decision_every": 20,
        "initial_loss_nats": 9.0,
    }
    return RunInfo(**known | changes)


def test_target_share_by_hand():
    two = run(targets={"a": 0.75, "b": 0.25})
    np.testing.assert_allclose(target_share(two, 0.4), [0.3, 0.1, *[0.1] * 6])
    np.testing.assert_allclose(target_share(two, 1.0), [0.75, 0.25, *[0.0] * 6])
    foreign = run(targets={"elsewhere": 1.0})
    np.testing.assert_allclose(target_share(foreign, 0.7), [1 / 8] * 8)
    every = run(targets={**dict.fromkeys(NAMES, 0.1), "a": 0.3})
    np.testing.assert_allclose(target_share(every, 0.5), [0.15 + 1 / 16, *[0.05 + 1 / 16] * 7])
    padded = run(targets={"a": 1.0}, padding=2)
    np.testing.assert_allclose(target_share(padded, 0.5), [0.5, *[0.1] * 5, 0, 0])


@pytest.mark.parametrize(
    ("size", "rule"),
    [
        (3427, "target-share 1"),  # 1.9 passes at share 1
        (640, "target-share 0.7"),  # 10 passes, × 1² is too many; at .7 they are 7 × .49
        (160, "target-share 0.5"),  # at .5 they are 20 × .25, at .7 28
        (40, "uniform"),  # at .3 they are 48
    ],
)
def test_the_rule_that_was_best_on_text_at_every_size(size, rule):
    name, mixture = nearest_rule(run(sizes=(size, *[3000] * 7), targets={"a": 1.0}))
    assert name == rule
    assert mixture.sum() == pytest.approx(1.0)
    assert mixture[0] == pytest.approx(1 / 8 if rule == "uniform" else float(rule.split()[1]))


def test_uniform_where_nothing_speaks_for_anything_else():
    for problem in (run(), run(metric="perplexity"), run(targets={"elsewhere": 1.0}), run(padding=3)):
        name, mixture = nearest_rule(problem)
        assert name == "uniform"
        real = 8 - problem.padding
        np.testing.assert_allclose(mixture, [1 / real] * real + [0] * problem.padding)


def test_something_is_left_for_a_target_that_is_not_trained_on():
    name, mixture = nearest_rule(run(sizes=(9000,) * 8, targets={"a": 0.5, "elsewhere": 0.5}))
    assert name == "target-share 0.7"
    np.testing.assert_allclose(mixture, [0.7, *[0.3 / 7] * 7])


def test_outside_names_what_is_and_unknown_quantities_decide_nothing():
    support = {"num_rows": [3, 6], "decisions": [10, 40], "steps_per_decision": [2, None], "weather": [0, 1]}
    assert outside(support, run()) == ["8 domains and targets, it is meant for 3 to 6"]
    assert outside({"num_rows": [3, 8]}, run()) == []
    assert outside({"num_rows": [3, 8]}, run(targets={"elsewhere": 1.0})) == [
        "9 domains and targets, it is meant for 3 to 8"
    ]
    assert outside({"num_rows": [7, None]}, run(padding=2)) == ["6 domains and targets, it is meant for 7 or more"]
    short = run(horizon=25, decision_every=1)
    assert outside(support | {"num_rows": [3, 24], "decisions": [10, 20]}, short) == [
        "25 decisions, it is meant for 10 to 20",
        "1 optimiser steps per decision, it is meant for 2 or more",
    ]
    assert outside({}, short) == []


def test_a_small_domain_is_said_and_no_more():
    tiny = run(sizes=(8, *[1000] * 7))
    np.testing.assert_allclose(uniform_shares(tiny)[:2], [0.01, 1.25])
    assert unusual({"sizes": [0.05, 10]}, tiny) == [
        "a holds 0.01 of what uniform draws from it, it learned with 0.05 or more"
    ]
    assert unusual({}, tiny) == unusual({"sizes": [0.01, 10]}, tiny) == []


@pytest.mark.parametrize(
    ("fields", "problem", "message"),
    [
        (
            ("elasticity",),
            run(targets={"a": 1.0}),
            "objective_weight or marginal_value for a run with targets of unequal",
        ),
        (
            ("objective_weight",),
            run(metric="perplexity"),
            "perplexity or marginal_value for a run with a mean of perpl",
        ),
        (("marginal_value",), run(targets={"x": 1.0}), "trainable or size for a run with targets that are not trained"),
    ],
)
def test_fields_that_were_switched_off_are_missed_by_name(fields, problem, message):
    with pytest.raises(PolicyError, match=message):
        check_sees(fields, problem)
    check_sees(fields, run())
    check_sees((*fields, "marginal_value", "size"), problem)


def test_learned_for_says_what():
    fields = ["loss", "progress"]
    prose, plain = {"a": 1.0}, {"config": {"objective": "loss"}}
    assert learned_for(plain, fields, run()) == ""
    assert learned_for({"config": {"algo": "td3"}}, fields, run()) == ""  # exported before there were objectives
    assert learned_for({}, fields, run(targets=prose)) == ""
    assert learned_for(plain, fields, run(targets=prose)) == "mean loss over all domains"
    assert learned_for(plain, fields, run(metric="perplexity")) == "mean loss over all domains"
    aimed = {"config": {"objective": "perplexity", "targets": "a=2,b=1,c=0"}}
    assert learned_for(aimed, fields, run()) == "log mean perplexity of a ×2, b"
    same = run(targets={"a": 2 / 3, "b": 1 / 3, "d": 0.0}, metric="perplexity")
    assert learned_for(aimed, fields, same) == ""
    assert learned_for(aimed, fields, replace(same, metric="loss")) == "log mean perplexity of a ×2, b"
    cotrained = {"config": {"targets": ["a", "b"], "objective": [0.5, 0.5], "metric": "loss"}}
    assert learned_for(cotrained, fields, run(targets={"a": 0.5, "b": 0.5})) == ""
    assert learned_for(cotrained, fields, run()) == "mean loss of a, b"
    assert learned_for(aimed, [*fields, "objective_weight"], run()) == ""  # sees the objective: it is for any
    assert learned_for({"config": {"surrogate": "regmix-1m"}}, fields, run(targets=prose)) == ""
