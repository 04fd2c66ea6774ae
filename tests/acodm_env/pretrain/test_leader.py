"""One process decides; here it is alone, and the rounding is the only difference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acodm_env.errors import ConfigError
from acodm_env.pretrain.config import LMConfig
from acodm_env.pretrain.leader import UNITS, Led, leading, to_units
from acodm_env.pretrain.trainer import LMTrainer
from acodm_env.trainer import Trainer

SMALL = {"batch_size": 6, "sequence_length": 32, "horizon": 8, "decision_every": 2, "device": "cpu"}


def test_rounding_by_hand():
    assert to_units([0.5, 0.3, 0.2], 3).tolist() == [500_000, 300_000, 200_000]
    assert to_units([1, 1, 1], 3).tolist() == [333_334, 333_333, 333_333]  # ties by index
    assert to_units([0.0, 2.0, 0.0], 3).tolist() == [0, UNITS, 0]
    assert to_units([0.2500004, 0.2500006, 0.499999], 3).tolist() == [250_000, 250_001, 499_999]


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_rounded_mixtures_are_whole_near_and_stay(num_domains, seed):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(num_domains, 0.3)) * (rng.random(num_domains) < 0.8)
    weights[rng.integers(num_domains)] += 0.1
    weights /= weights.sum()
    units = to_units(weights, num_domains)
    assert units.sum() == UNITS
    assert (units >= 0).all()
    assert np.abs(units / UNITS - weights).max() < 1e-6
    assert (units[weights == 0] == 0).all()
    assert to_units(units / UNITS, num_domains).tolist() == units.tolist()


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.5, float("nan"), 0.5], [-1.0, 1.0, 1.0]])
def test_what_is_no_mixture_is_refused_before_anyone_is_told(tiny_store, weights):
    with leading(LMTrainer(LMConfig(**SMALL), tiny_store)) as led:
        led.reset(np.random.default_rng(0))
        with pytest.raises(ConfigError, match="weights="):
            led.step(np.array(weights))
        assert led.listening


def test_alone_it_is_the_trainer_under_rounded_mixtures(tiny_store):
    weights = np.array([1.0, 2.0, 4.0]) / 7
    plain, inner = (LMTrainer(LMConfig(**SMALL), tiny_store) for _ in range(2))
    led = Led(inner)
    assert isinstance(led, Trainer)
    assert led.provides == plain.provides
    for trainer in (plain, led):
        trainer.measure = frozenset({"losses", "layers"})
        trainer.reset(np.random.default_rng(0))
    assert inner.measure == {"losses", "layers"}
    assert led.info == plain.info
    for _ in range(2):
        first, second = plain.step(to_units(weights, 3) / UNITS), led.step(weights)
        assert first.loss == second.loss
        assert second.requested.tolist() == [0.142857, 0.285714, 0.571429]
    assert led.steps_done == 2
    np.testing.assert_array_equal(led.evaluate("test"), plain.evaluate("test"))
    state = led.state_dict()
    third = led.step(weights).loss
    led.reset(np.random.default_rng(7))
    led.load_state_dict(state)
    assert led.step(weights).loss == third


def test_an_error_in_the_block_comes_out_as_it_is(tiny_store):
    trainer = LMTrainer(LMConfig(**SMALL), tiny_store)
    with pytest.raises(RuntimeError, match="a deliberate failure"), leading(trainer):
        raise RuntimeError("a deliberate failure")
