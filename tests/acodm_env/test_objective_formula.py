"""The objective: one number for rewards, mixers and tables, and its slope."""

import math

import numpy as np
import pytest
import torch

from acodm_env.errors import ConfigError
from acodm_env.objective import check_metric, marginal, normalised, parse_targets, probe_counts, value
from acodm_env.trainer import RunInfo

LOSSES, WEIGHTS = np.array([2.0, 4.0, np.nan]), np.array([0.25, 0.75, 0.0])


def test_loss_is_the_weighted_mean_and_perplexity_the_log_of_the_weighted_mean():
    assert value(LOSSES, WEIGHTS, False) == pytest.approx(3.5)
    assert value(LOSSES, WEIGHTS, True) == pytest.approx(math.log(0.25 * math.exp(2) + 0.75 * math.exp(4)))


def test_runs_of_a_batch_have_metrics_of_their_own():
    both = value(np.stack([LOSSES] * 2), np.stack([WEIGHTS] * 2), np.array([[0.0], [1.0]]))
    np.testing.assert_allclose(both, [value(LOSSES, WEIGHTS, False), value(LOSSES, WEIGHTS, True)])


@pytest.mark.parametrize("perplexity", [False, True])
def test_marginal_value_is_the_slope_of_the_objective(perplexity):
    losses, weights = torch.tensor([2.0, 3.0, 2.5], requires_grad=True), torch.tensor([0.2, 0.5, 0.3])
    value(losses, weights, perplexity, torch).backward()
    ours = marginal(losses.detach(), weights, perplexity, torch)
    torch.testing.assert_close(ours, losses.grad)
    assert float(ours.sum()) == pytest.approx(1.0)


def test_targets_by_text():
    assert parse_targets("prose=2, licences") == {"prose": 2.0, "licences": 1.0}
    assert parse_targets(None) == {}
    assert normalised({"b": 1, "a": 3}, ("a", "b", "c")) == (("b", "a"), (0.25, 0.75))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("prose=-1", "targets.prose=-1: must be a finite weight of at least 0"),
        ("prose=much", "targets.prose=much"),
        ("prose=1,prose=2", "each target once"),
    ],
)
def test_bad_targets(targets, message):
    with pytest.raises(ConfigError, match=message):
        parse_targets(targets)


def test_unknown_and_weightless_targets():
    with pytest.raises(ConfigError, match="did you mean 'prose'"):
        normalised({"prosa": 1.0}, ("prose", "python"))
    with pytest.raises(ConfigError, match="all are 0"):
        normalised({"prose": 0.0}, ("prose", "python"))
    with pytest.raises(ConfigError, match="go to --targets"):
        check_metric("prose=1")
    with pytest.raises(ConfigError, match="did you mean 'perplexity'"):
        check_metric("perplexities")


def test_few_held_out_sequences_go_to_targets_that_count():
    assert probe_counts([1, 0, 0], [True, True, True], 28) == (28, 0, 0)
    assert probe_counts([0.5, 0.5, 0], [True, True, True], 28) == (14, 14, 0)
    assert probe_counts([0.25] * 4, [True] * 4, 28) == (0, 0, 0, 0)  # their training losses say as much
    assert probe_counts([0.25] * 4, [True, True, True, False], 28) == (0, 0, 0, 28)
    assert probe_counts([1.0], [True], 500) == (32,)


def test_a_run_judges_by_its_metric():
    names = ("a", "b")
    about = {"sizes_tokens": (9, 9), "batch_size": 1, "sequence_length": 2, "horizon": 3, "initial_loss_nats": 5.0}
    info = RunInfo(domains=("a",), targets=names, objective=(0.5, 0.5), metric="perplexity", **about)
    assert info.judge(np.array([1.0, 3.0])) == pytest.approx(math.log((math.e + math.e**3) / 2))
    assert info.rows == ("a", "b")
    np.testing.assert_allclose(info.marginal_values(np.array([1.0, 1.0])), [0.5, 0.5])
    assert info.probe_counts(20) == (10, 10)
