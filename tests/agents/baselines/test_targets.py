"""What a nat of each domain's loss is worth, and a fixed share on the targets; numbers by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.agents.baselines.targets import DomainValues, domain_values, is_plain
from acodm_env.errors import ConfigError
from toy import ToyTrainer

NAMES = ("prose", "licences", "python", "maths")
INFO = replace(ToyTrainer((0.25,) * 4).info, domains=NAMES, targets=NAMES)


def aimed(targets, metric="loss", **changes):
    """The run with these targets {name: ω}."""
    return replace(INFO, targets=tuple(targets), objective=tuple(targets.values()), metric=metric, **changes)


def share(value, info):
    mixer = make_mixer("target-share", share=value)
    mixer.start(info)
    return mixer.weights()


# --- target-share ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, [0, 1 / 3, 1 / 3, 1 / 3]),
        (0.3, [0.3, 0.7 / 3, 0.7 / 3, 0.7 / 3]),
        (1.0, [1, 0, 0, 0]),
    ],
)
def test_one_target_gets_the_share_and_the_others_the_rest(value, expected):
    np.testing.assert_allclose(share(value, aimed({"prose": 1.0})), expected)


def test_targets_share_by_their_weights_wherever_they_stand():
    info = aimed({"maths": 0.6, "licences": 0.2, "python": 0.0, "a book": 0.2})  # a book is trained on nowhere
    np.testing.assert_allclose(share(0.5, info), [0.25, 0.5 * 0.25, 0.25, 0.5 * 0.75])


def test_where_every_domain_is_a_target_the_rest_is_spread_over_all():
    weights = {"prose": 0.4, "licences": 0.3, "python": 0.2, "maths": 0.1}
    np.testing.assert_allclose(share(1.0, aimed(weights)), [0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(share(0.5, aimed(weights)), [0.325, 0.275, 0.225, 0.175])
    for value in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(share(value, INFO), [0.25] * 4)


def test_where_no_target_is_trained_on_it_is_uniform_and_padding_gets_nothing():
    np.testing.assert_allclose(share(1.0, aimed({"a book": 1.0})), [0.25] * 4)
    np.testing.assert_allclose(share(0.7, aimed({"a book": 1.0}, padding=2)), [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(share(0.7, aimed({"prose": 1.0}, padding=2)), [0.7, 0.3, 0, 0])


def test_a_single_domain_gets_everything():
    info = replace(INFO, domains=("prose",), targets=("prose",), sizes_tokens=(9,))
    assert share(0.3, info).tolist() == [1.0]
    assert share(0.3, replace(info, targets=("a book",))).tolist() == [1.0]


@pytest.mark.parametrize("value", [-0.1, 1.01, math.nan, math.inf, True])
def test_a_share_out_of_range_is_refused(value):
    with pytest.raises(ConfigError, match=rf"share={value}: must be a number in \[0, 1\]"):
        make_mixer("target-share", share=value)


def test_it_never_changes_and_its_default_is_one_half():
    mixer = make_mixer("target-share")
    assert (mixer.share, mixer.dynamic, mixer.needs) == (0.5, False, frozenset())


# --- values ------------------------------------------------------------------------------------------------


def test_the_papers_objective_is_the_mean_loss_over_all_domains():
    assert is_plain(INFO)
    assert is_plain(replace(INFO, targets=NAMES[::-1], objective=(0.25,) * 4))
    assert not is_plain(replace(INFO, metric="perplexity"))
    assert not is_plain(aimed({"prose": 1.0}))
    assert not is_plain(replace(INFO, targets=(*NAMES, "a book")))
    assert domain_values(INFO, np.array([1.0, 2.0, 3.0, 4.0])).tolist() == [1.0] * 4


def test_mean_losses_weigh_by_omega():
    info = aimed({"maths": 0.5, "prose": 0.25, "a book": 0.25})
    np.testing.assert_allclose(domain_values(info, np.zeros(4)), [4 * 0.25, 0, 0, 4 * 0.5])


def test_perplexities_weigh_by_their_size():
    losses = np.log([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(domain_values(replace(INFO, metric="perplexity"), losses), [0.4, 0.8, 1.2, 1.6])
    info = aimed({"maths": 0.5, "prose": 0.25, "a book": 0.25}, metric="perplexity")
    # ω e^L among those that are trained on: .25·1 and .5·4, together .75 of the whole
    np.testing.assert_allclose(domain_values(info, losses), [4 * 0.75 * 0.25 / 2.25, 0, 0, 4 * 0.75 * 2 / 2.25])


def test_no_target_that_is_trained_on_leaves_nothing():
    for metric in ("loss", "perplexity"):
        assert domain_values(aimed({"a book": 1.0}, metric), np.ones(4)).tolist() == [0.0] * 4


def test_values_follow_the_last_finite_losses_and_are_restored():
    assert DomainValues(INFO).now() is None
    info = replace(INFO, metric="perplexity")
    values = DomainValues(info)
    np.testing.assert_allclose(values.now(), [1.0] * 4)  # all at ln V
    values.update(np.log([1.0, 2.0, 3.0, 4.0]))
    values.update(np.array([np.nan, np.inf, np.nan, np.nan]))
    np.testing.assert_allclose(values.now(), [0.4, 0.8, 1.2, 1.6])
    again = DomainValues(info)
    again.load_state_dict(values.state_dict())
    np.testing.assert_array_equal(again.now(), values.now())
    again.load_state_dict({})  # of a run saved by a version without values
    np.testing.assert_array_equal(again.now(), values.now())
