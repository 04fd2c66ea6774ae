import math
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.errors import ConfigError
from acodm_env.files import read_state, write_state
from acodm_env.pretrain.checkpoint import to_numpy
from acodm_env.pretrain.config import LMConfig
from acodm_env.pretrain.trainer import LMTrainer
from acodm_env.step_stats import StepStats
from acodm_env.trainer import RunResult, drive
from toy import ToyTrainer

NAN = float("nan")


def info(num_domains=3, horizon=20):
    return ToyTrainer((1 / num_domains,) * num_domains, horizon=horizon).info


def started(num_domains=3, **options):
    mixer = make_mixer("doremi-proxy", **options)
    mixer.start(info(num_domains))
    return mixer


def seen(mixer, excess, **changes):
    """Let `mixer` see one step; returns the domain weights after it."""
    ones = np.ones(len(mixer.weights()))
    values = {
        "step": 1,
        "tokens": 1,
        "requested": mixer.weights(),
        "realised": mixer.weights(),
        "counts": ones,
        "loss_tokens": ones,
        "losses": ones,
        "epochs": ones,
        "drawn": ones,
        "excess_losses": None if excess is None else np.array(excess),
    }
    mixer.update(StepStats(**values | changes))
    return mixer.domain_weights()


# --- the rule ----------------------------------------------------------------------------------------------


def test_two_updates_by_hand():
    mixer = started(2, learning_rate=2.0, floor=0.1)
    first = seen(mixer, [math.log(3) / 2, 0.0])  # a' = (3, 1)/2 → (0.75, 0.25)
    assert first == pytest.approx([0.9 * 0.75 + 0.05, 0.9 * 0.25 + 0.05])  # 0.725, 0.275
    second = seen(mixer, [0.0, math.log(2) / 2])  # a' = (0.725, 0.55)
    assert second == pytest.approx([0.9 * 0.725 / 1.275 + 0.05, 0.9 * 0.55 / 1.275 + 0.05])


def test_batches_are_drawn_by_q_and_losses_weighted_by_a_over_q():
    mixer = started(2, learning_rate=1.0, floor=0.1, sampling=[0.8, 0.2])
    assert mixer.weights() == pytest.approx([0.8, 0.2])
    assert mixer.loss_weights() == pytest.approx([0.5 / 0.8, 0.5 / 0.2])
    seen(mixer, [math.log(3), 0.0])
    assert mixer.weights() == pytest.approx([0.8, 0.2])
    assert mixer.loss_weights() == pytest.approx([0.725 / 0.8, 0.275 / 0.2])
    assert started(2, sampling="proportional").weights() == pytest.approx([0.5, 0.5])


def test_a_domain_without_a_finite_excess_keeps_its_last_one():
    kept, repeated, silent = started(), started(), started()
    for mixer in (kept, repeated):
        seen(mixer, [0.1, 0.2, 0.3])
    assert seen(kept, [0.4, NAN, np.inf]) == pytest.approx(seen(repeated, [0.4, 0.2, 0.3]))
    assert seen(silent, [NAN] * 3) == pytest.approx(np.full(3, 1 / 3))  # 0 before the first


@pytest.mark.parametrize(("excess", "changes"), [([9.0, 0, 0], {"diverged": True}), (None, {})])
def test_a_diverged_or_unmeasured_step_changes_nothing(excess, changes):
    mixer = started()
    before = seen(mixer, [0.1, 0.2, 0.3])
    np.testing.assert_array_equal(seen(mixer, excess, **changes), before)


@pytest.mark.parametrize("excess", [[3.0, 2.0, 1.0], [0.0, 0.0, 0.0], [1e200, 0.0, 1e-300]])
def test_20000_updates_with_a_constant_excess_stay_finite(excess):
    mixer = started(learning_rate=10.0)
    for _ in range(20_000):
        weights = seen(mixer, excess)
    assert np.isfinite(mixer.loss_weights()).all()
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= 1e-3 / 3 * (1 - 1e-12)  # the floor c/K
    if excess[0] == 3.0:
        assert seen(mixer, [0.0, 0.0, 1.0])[2] > weights[2]  # and it can still come back


def test_returned_arrays_are_fresh_and_instances_apart():
    one, other = started(), started()
    one.weights()[:] = 0
    one.loss_weights()[:] = 0
    seen(one, [1.0, 0.0, 0.0])
    assert other.weights() == pytest.approx(np.full(3, 1 / 3))
    assert other.loss_weights() == pytest.approx(np.ones(3))
    one.start(info())  # a new run forgets
    assert one.loss_weights() == pytest.approx(np.ones(3))


def test_saved_and_loaded_goes_on_exactly(tmp_path):
    whole, again = started(), started()
    rng = np.random.default_rng(0)
    for excess in rng.uniform(0, 1, (5, 3)):
        seen(whole, excess)
    write_state(tmp_path / "state", whole.state_dict())
    again.load_state_dict(read_state(tmp_path / "state"))
    for excess in ([NAN, 0.3, 0.1], [0.2, NAN, NAN]):
        np.testing.assert_array_equal(seen(whole, excess), seen(again, excess))


# --- the user's own targets ----------------------------------------------------------------------------------


def aimed(targets, metric="loss"):
    mixer = make_mixer("doremi-proxy", learning_rate=1.0, floor=0.1)
    mixer.start(replace(info(2), targets=tuple(targets), objective=tuple(targets.values()), metric=metric))
    return mixer


def test_excess_counts_by_the_weights_of_the_targets():
    """K·ω = (1.5, 0.5): exponents 1.5 ln 3 and 0.5 ln 4, a' = (3^1.5, 2)/2."""
    mixer = aimed({"domain1": 0.25, "domain0": 0.75})
    tilted = np.array([3**1.5, 2.0])
    assert seen(mixer, [math.log(3), math.log(4)]) == pytest.approx(0.9 * tilted / tilted.sum() + 0.05)


def test_a_domain_that_is_no_target_lacks_nothing():
    assert seen(aimed({"domain1": 1.0}), [9.0, math.log(2) / 2]) == pytest.approx([0.9 / 3 + 0.05, 0.9 * 2 / 3 + 0.05])
    assert seen(aimed({"a book": 1.0}), [9.0, 1.0]) == pytest.approx([0.5, 0.5])


def test_perplexities_weigh_the_excess_by_the_last_training_losses():
    """Losses ln 1 and ln 3: K·e^L/Σ = (0.5, 1.5); a loss that is missing keeps its last."""
    mixer = aimed({"domain0": 0.5, "domain1": 0.5}, "perplexity")
    tilted = np.array([2.0, 3**1.5])
    first = seen(mixer, [math.log(4), math.log(3)], losses=np.log([1.0, 3.0]))
    assert first == pytest.approx(0.9 * tilted / tilted.sum() + 0.05)
    again = aimed({"domain0": 0.5, "domain1": 0.5}, "perplexity")
    again.load_state_dict(mixer.state_dict())
    tilted = first * [2.0, 3**1.5]
    assert seen(again, [math.log(4), NAN], losses=np.full(2, NAN)) == pytest.approx(0.9 * tilted / tilted.sum() + 0.05)


# --- the trap: weights computed and never used ---------------------------------------------------------------


def lm(store, reference=None, seed=0):
    config = LMConfig(batch_size=6, sequence_length=32, horizon=8, decision_every=2, device="cpu", warmup_frac=0.0)
    trainer = LMTrainer(config, store, reference=reference)
    trainer.reset(np.random.default_rng(seed))
    return trainer


@pytest.fixture(scope="module")
def reference(tiny_store):
    """A model that has learned a little, above all about "letters"."""
    trainer = lm(tiny_store, seed=1)
    for _ in range(4):
        trainer.step(np.array([0.8, 0.1, 0.1]))
    return to_numpy(trainer.bare_model.state_dict())


def test_the_weights_change_the_training(tiny_store, reference):
    trainer, plain = lm(tiny_store, reference), lm(tiny_store)
    mixer = make_mixer("doremi-proxy", learning_rate=20.0)
    mixer.start(trainer.info)
    history, domain_weights, without = [], [mixer.domain_weights()], []
    for stats in drive(trainer, mixer, 3):
        history.append(stats)
        domain_weights.append(mixer.domain_weights())
        without.append(plain.step(mixer.weights()))
    assert history[0].grad_norm == pytest.approx(without[0].grad_norm, rel=1e-5)  # a is uniform: all factors are 1
    assert history[1].grad_norm != pytest.approx(without[1].grad_norm, rel=1e-3)  # same model, same batch, other loss
    assert history[2].loss != without[2].loss
    for stats, weights in zip(history, domain_weights, strict=False):
        np.testing.assert_allclose(stats.loss_weights, 3 * weights)
        np.testing.assert_allclose(stats.effective, weights)  # what a run's mean mixture is the mean of
    assert (history[0].excess_losses > 0).any()


# --- the whole method ----------------------------------------------------------------------------------------


def result(mixture, final=(1.0, 1.0, 1.0)):
    return RunResult(mixture=np.array(mixture), initial_losses=np.ones(3), final_losses=np.array(final))


def test_preparation_asks_for_a_reference_and_a_proxy():
    mixer = make_mixer("doremi", learning_rate=0.5, floor=0.01, proxy_frac=0.25, reference=[0.2, 0.3, 0.5])
    reference, proxy = mixer.preparation(info(horizon=200))
    assert (reference.name, reference.mixer, reference.options) == ("reference", "static", {"weights": [0.2, 0.3, 0.5]})
    assert (reference.steps, reference.keep_model, reference.reference) == (50, True, None)
    assert (proxy.name, proxy.mixer, proxy.steps, proxy.reference) == ("proxy", "doremi-proxy", 50, "reference")
    made = make_mixer(proxy.mixer, **proxy.options)
    assert (made.learning_rate, made.floor) == (0.5, 0.01)
    plain, _ = make_mixer("doremi").preparation(info(horizon=200))
    assert (plain.mixer, plain.options, plain.steps) == ("uniform", {}, 200)


def test_the_mixture_is_the_proxys_mean():
    mixer = make_mixer("doremi")
    mixer.prepare({"reference": result([1 / 3] * 3), "proxy": result([0.5, 0.3, 0.2])})
    mixer.start(info())
    assert mixer.weights() == pytest.approx([0.5, 0.3, 0.2])
    mixer.weights()[:] = 0
    assert mixer.weights() == pytest.approx([0.5, 0.3, 0.2])
    assert not mixer.dynamic
    assert mixer.loss_weights() is None


def test_without_its_runs_it_says_how_to_get_them():
    with pytest.raises(ConfigError, match=r"mixer=doremi: needs its preparatory runs first.*acodm benchmark"):
        make_mixer("doremi").start(info())


@pytest.mark.parametrize("guilty", ["reference", "proxy"])
def test_a_diverged_preparation_is_refused(guilty):
    results = {name: result([1 / 3] * 3) for name in ("reference", "proxy")}
    results[guilty] = replace(results[guilty], final_losses=np.array([1.0, NAN, 1.0]))
    with pytest.raises(ConfigError, match=f"'{guilty}' diverged"):
        make_mixer("doremi").prepare(results)


def test_a_proxy_over_other_domains_is_refused():
    mixer = make_mixer("doremi")
    mixer.prepare({"proxy": result([0.5, 0.3, 0.2])})
    with pytest.raises(ConfigError, match="mixture of the proxy"):
        mixer.start(info(4))


@pytest.mark.parametrize("name", ["doremi", "doremi-proxy"])
@pytest.mark.parametrize(("options", "message"), [({"learning_rate": 0}, "learning_rate=0"), ({"floor": 0}, "floor=0")])
def test_bad_options_are_refused_before_any_run(name, options, message):
    with pytest.raises(ConfigError, match=f"{message}: must be"):
        make_mixer(name, **options)


def test_bad_fractions_and_sampling_are_refused():
    with pytest.raises(ConfigError, match="proxy_frac=-1: must be a positive number"):
        make_mixer("doremi", proxy_frac=-1)
    with pytest.raises(ConfigError, match=r"sampling\.domain1=0: must be positive"):
        started(2, sampling={"domain0": 1.0, "domain1": 0.0})
