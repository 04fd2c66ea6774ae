"""How a policy sees the problem: every formula by hand, and the same in torch."""

import math

import numpy as np
import pytest
import torch

from acodm_env.observation import Observer
from acodm_env.step_stats import StepStats
from acodm_env.trainer import RunInfo
from acodm_env.view import CLIP_SLOPE, GENERAL_FIELDS, PER_ROW, PER_RUN, View, slope

INFO = RunInfo(
    domains=("a", "b"),
    targets=("a", "c"),
    sizes_tokens=(400, 6400),
    batch_size=10,
    sequence_length=4,
    horizon=40,
    decision_every=4,
    initial_loss_nats=6.0,
    objective=(0.25, 0.75),
    metric="perplexity",
)


def window(step=4, **more):
    drawn = np.array([30.0, 10.0])
    known = {
        "step": step,
        "tokens": 160,
        "requested": np.array([0.75, 0.25]),
        "realised": np.array([0.75, 0.25]),
        "counts": drawn,
        "loss_tokens": drawn * 3,
        "losses": np.array([5.0, 4.0]),
        "epochs": drawn / np.array([100, 1600]),
        "drawn": drawn,
        "eval_losses": np.array([np.nan, 5.5]),
    }
    return StepStats(**known | more)


@pytest.fixture
def observer():
    return Observer(INFO, GENERAL_FIELDS)


def columns(observer, vector):
    parts = np.split(vector, np.cumsum([size for _, size in observer.layout])[:-1])
    return dict(zip([name for name, _ in observer.layout], parts, strict=True))


def test_rows_are_the_domains_and_targets_that_are_none(observer):
    seen = columns(observer, observer.start(INFO))
    assert {name: len(part) for name, part in seen.items()} == {
        name: 3 if name in PER_ROW else 1 for name in GENERAL_FIELDS
    }
    np.testing.assert_allclose(seen["objective_weight"], np.log1p([0.75, 0, 2.25]), rtol=1e-6)
    np.testing.assert_allclose(seen["trainable"], [1, 1, 0])
    np.testing.assert_allclose(seen["domain_loss"], [1, 1, 1])
    np.testing.assert_allclose(seen["mixture"], np.log([1.05, 1.05, 0.05]), rtol=1e-6)
    np.testing.assert_allclose(seen["size"], [math.log(0.5) / 2, math.log(8) / 2, -2], rtol=1e-6)
    assert seen["perplexity"] == 1
    assert seen["num_rows"] == pytest.approx(math.log(3) - 2)


def test_after_a_window(observer):
    observer.start(INFO)
    observer.decided(np.array([0.75, 0.25]))
    seen = columns(observer, observer.observe(window()))
    losses = np.array([5.0, 4.0, 5.5])  # training losses of the domains; a's held-out one was not measured
    heavy = np.array([0.25 * math.exp(5.0), 0, 0.75 * math.exp(5.5)])
    steep = np.clip((6 - losses) / math.log(0.15 / 0.05), -CLIP_SLOPE, CLIP_SLOPE)
    np.testing.assert_allclose(seen["marginal_value"], np.log1p(3 * heavy / heavy.sum()), rtol=1e-5)
    np.testing.assert_allclose(seen["domain_loss"], losses / 6, rtol=1e-6)
    np.testing.assert_allclose(seen["domain_progress"], 3 * (6 - losses).clip(-1, 1), rtol=1e-6)
    np.testing.assert_allclose(seen["elasticity"], steep, rtol=1e-5)
    np.testing.assert_allclose(seen["drawn"], np.log(np.array([0.15, 0.05, 0]) + 0.05), rtol=1e-5)
    np.testing.assert_allclose(seen["passes"], np.log1p([0.3, 10 / 1600, 0]), rtol=1e-5)
    np.testing.assert_allclose(seen["mixture"], np.log([1.55, 0.55, 0.05]), rtol=1e-5)
    again = columns(observer, observer.observe(window(step=8)))
    np.testing.assert_allclose(again["elasticity"], 0.5 * steep, rtol=1e-5)  # smoothed with one of 0


def test_a_domain_not_drawn_keeps_its_loss(observer):
    observer.start(INFO)
    seen = columns(observer, observer.observe(window(losses=np.array([np.nan, 4.0]))))
    assert seen["domain_loss"][0] == 1


def test_torch_gives_the_same_numbers():
    rng = np.random.default_rng(0)
    arrays = {name: rng.uniform(0.1, 1, (2, 4)) for name in View.__dataclass_fields__ if name != "initial"}
    arrays["progress"], arrays["perplexity"] = rng.uniform(0, 1, (2, 1)), np.array([[0.0], [1.0]])
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    one, other = View(initial=7.0, **arrays), View(initial=7.0, **tensors)
    for name, (_, _, _, formula) in (PER_ROW | PER_RUN).items():
        np.testing.assert_allclose(formula(one, np), formula(other, torch).numpy(), rtol=1e-12, err_msg=name)
    steep = [slope(xp_a["losses"], xp_a["previous"], xp_a["slopes"], 0.5, 0.4, xp)
             for xp_a, xp in ((arrays, np), (tensors, torch))]  # fmt: skip
    np.testing.assert_allclose(steep[0], steep[1].numpy())


def test_state_goes_on_exactly(observer):
    observer.start(INFO)
    observer.observe(window())
    other = Observer(INFO, GENERAL_FIELDS)
    other.start(INFO)
    other.load_state_dict(observer.state_dict())
    np.testing.assert_array_equal(observer.observe(window(step=8)), other.observe(window(step=8)))
