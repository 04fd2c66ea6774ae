import math
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.errors import ConfigError
from acodm_env.files import read_state, write_state
from acodm_env.interaction import InteractionTracker
from acodm_env.pretrain.config import LMConfig
from acodm_env.pretrain.trainer import LMTrainer
from acodm_env.step_stats import StepStats
from acodm_env.trainer import RunResult, drive
from given_gradients import NAN, Given, decided, gram, info, seen, softmax, started

MIXERS = ("doge-proxy", "doge-online", "eg-interaction", "pike")
FAMILY = {"doge-online": {"floor": 0.0}, "doge-proxy": {}, "eg-interaction": {"floor": 0.0}, "pike": {"floor": 0.0}}


# --- DoGE ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["doge-online", "doge-proxy"])
def test_doge_by_hand(name):
    """Norms 2, pulls 2, 1 and −1: scores 1, 0.5 and 0 (clipped) learning rates; μ = lr = 0.01."""
    mixer = started(name, floor=0.1)
    first = seen(mixer, Given(gram(2.0, 0.0, -1.0)))
    assert first == pytest.approx(0.9 * softmax([1.0, 0.5, 0.0]) + 0.1 / 3, rel=1e-5)
    second = seen(mixer, Given(gram(2.0, 0.0, -1.0)), lr=0.02)
    assert second == pytest.approx(0.9 * softmax([3.0, 1.5, 0.0]) + 0.1 / 3, rel=1e-5)


def test_doge_clips_norms_as_measured_and_scores():
    """Measured norms √(84 + 16) = 10, 5, 5 are clipped to 5: factors ½, 1, 1; the mean norm is 5."""
    mixer = started("doge-online", floor=0.0)
    noisy = Given(gram(20.0, 4.0, 3.0, diagonal=(84.0, 25.0, 25.0)), noise=[16.0, 0.0, 0.0])
    assert seen(mixer, noisy) == pytest.approx(softmax([12 / 5, 13 / 5, 5 / 5]), rel=1e-5)
    capped = started("doge-online", floor=0.0, max_score=2.0)
    assert seen(capped, noisy) == pytest.approx(softmax([2.0, 2.0, 1.0]), rel=1e-5)


def test_doges_proxy_draws_uniformly_and_weighs_the_loss():
    mixer = started("doge-proxy")
    assert mixer.loss_weights() == pytest.approx([1.0, 1.0, 1.0])
    weights = seen(mixer, Given(gram(2.0, 0.0, -1.0)))
    assert weights[0] > 0.4
    assert mixer.weights() == pytest.approx(np.full(3, 1 / 3))
    assert mixer.loss_weights() == pytest.approx(3 * weights)
    assert seen(mixer, Given(gram(2.0, 0.0, -1.0))).min() >= 1e-3 / 3


def test_a_domain_without_a_gradient_keeps_its_last_score():
    absent = [[4.0, 1.0, NAN], [1.0, 4.0, NAN], [NAN, NAN, NAN]]  # pulls 1, 1: scores 0.5, 0.5
    mixer = started("doge-online", floor=0.0)
    seen(mixer, Given(gram(2.0, 0.0, -1.0)))  # 1, 0.5, 0
    assert seen(mixer, Given(absent), counts=[10, 10, 0]) == pytest.approx(softmax([1.5, 1.0, 0.0]), rel=1e-5)
    never = started("doge-online", floor=0.0)  # before the first: the mean of the others
    assert seen(never, Given(absent), counts=[10, 10, 0]) == pytest.approx(np.full(3, 1 / 3))


def test_a_domain_of_one_sequence_has_a_pull_but_no_norm():
    single = gram(2.0, 0.0, -1.0, diagonal=(4.0, 4.0, NAN))
    mixer = started("doge-online", floor=0.0)
    assert seen(mixer, Given(single)) == pytest.approx(softmax([1.0, 0.5, 0.0]), rel=1e-5)


def test_doge_without_a_learning_rate_stays():
    assert seen(started("doge-online"), Given(gram(2.0, 0.0, -1.0)), lr=NAN) == pytest.approx(np.full(3, 1 / 3))


def test_doge_asks_for_a_proxy_and_takes_its_mean():
    mixer = make_mixer("doge", mu=0.05, proxy_frac=0.5)
    (request,) = mixer.preparation(replace(info(), horizon=300))
    assert (request.name, request.mixer, request.steps, request.reference) == ("proxy", "doge-proxy", 150, None)
    assert make_mixer(request.mixer, **request.options).mu == 0.05
    with pytest.raises(ConfigError, match="mixer=doge: needs its preparatory runs first"):
        mixer.start(info())
    ones = np.ones(3)
    mixer.prepare({"proxy": RunResult(mixture=np.array([0.5, 0.3, 0.2]), initial_losses=ones, final_losses=ones)})
    mixer.start(info())
    assert mixer.weights() == pytest.approx([0.5, 0.3, 0.2])
    with pytest.raises(ConfigError, match="mixer=doge: its preparatory run 'proxy' diverged"):
        mixer.prepare({"proxy": RunResult(mixture=ones / 3, initial_losses=ones, final_losses=ones * NAN)})


def test_doges_weights_change_the_training(tiny_store):
    config = LMConfig(batch_size=6, sequence_length=32, horizon=8, decision_every=2, device="cpu")
    norms = []
    for logits in ([0.0, 0.0, 0.0], [0.0, -1.0, -2.0]):
        trainer, mixer = LMTrainer(config, tiny_store), make_mixer("doge-proxy")
        trainer.reset(np.random.default_rng(0))
        mixer.start(trainer.info)
        mixer.load_state_dict({"logits": logits, "scores": np.full(3, NAN)})
        expected = mixer.domain_weights()
        history = list(drive(trainer, mixer, 2))
        np.testing.assert_allclose(history[0].effective, expected)
        np.testing.assert_allclose(history[0].realised, 1 / 3)
        norms.append(history[0].grad_norm)
        assert np.isfinite(mixer.loss_weights()).all()
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)


# --- the user's own targets ----------------------------------------------------------------------------------


def aimed(name, targets, metric="loss", **options):
    mixer = make_mixer(name, **options)
    run = replace(info(), targets=tuple(targets), objective=tuple(targets.values()), metric=metric)
    mixer.start(run)
    return mixer


@pytest.mark.parametrize("name", ["doge-online", "doge-proxy"])
def test_doge_aligns_with_the_targets_gradient_the_domains_own_included(name):
    """Norms 2. One target: pulls 3·(4, 2, 0) over 2, clipped to 5; two with ω (¼, ¾): 3·(1 + ¾, ½ + ¾, 0 − ¾ + …)."""
    mixer = aimed(name, {"domain0": 1.0}, floor=0.1)
    weights = seen(mixer, Given(gram(2.0, 0.0, -1.0)))
    assert weights == pytest.approx(0.9 * softmax([5.0, 3.0, 0.0]) + 0.1 / 3, rel=1e-5)
    mixed = aimed(name, {"domain2": 0.75, "domain0": 0.25}, floor=0.1)
    pulls = 3 * np.array([0.25 * 4 + 0.75 * 0, 0.25 * 2 - 0.75 * 1, 0.25 * 0 + 0.75 * 4])
    expected = np.clip(pulls / 2, 0.0, 5.0)
    assert expected == pytest.approx([1.5, 0.0, 4.5])
    assert seen(mixed, Given(gram(2.0, 0.0, -1.0))) == pytest.approx(0.9 * softmax(expected) + 0.1 / 3, rel=1e-5)


def test_doges_clipped_norms_clip_the_own_gradient_too():
    """Measured norms 10, 5, 5 are clipped to 5; the target is domain 0: 3·(84/4, 20/2, 4/2) over 5."""
    mixer = aimed("doge-online", {"domain0": 1.0}, floor=0.0, max_score=20.0)
    noisy = Given(gram(20.0, 4.0, 3.0, diagonal=(84.0, 25.0, 25.0)), noise=[16.0, 0.0, 0.0])
    assert seen(mixer, noisy) == pytest.approx(softmax([63 / 5, 30 / 5, 6 / 5]), rel=1e-5)


def test_while_the_targets_gradient_is_unknown_scores_stay():
    single = gram(2.0, 0.0, -1.0, diagonal=(NAN, 4.0, 4.0))  # one sequence of the target: no unbiased ‖g‖²
    mixer = aimed("doge-online", {"domain0": 1.0}, floor=0.0)
    seen(mixer, Given(gram(1.0, 0.0, -1.0)))  # 5 (clipped), 1.5, 0
    assert seen(mixer, Given(single)) == pytest.approx(softmax([5 + 5.0, 1.5 + 3.0, 0.0]), rel=1e-5)
    fresh = aimed("doge-online", {"domain0": 1.0}, floor=0.0)
    absent = [[NAN, NAN, NAN], [NAN, 4.0, 1.0], [NAN, 1.0, 4.0]]
    assert seen(fresh, Given(absent), counts=[0, 10, 10]) == pytest.approx(np.full(3, 1 / 3))


@pytest.mark.parametrize("name", ["doge-online", "eg-interaction"])
def test_targets_that_are_trained_on_nowhere_move_nothing(name):
    mixer = aimed(name, {"a book": 1.0})
    for step in range(1, 4):
        weights = seen(mixer, Given(gram(2.0, 0.0, -1.0)), step)
    assert weights == pytest.approx(np.full(3, 1 / 3))


def test_perplexities_weigh_gradients_by_the_last_training_losses():
    """e^L = 1, 2, 3 with ω = 1/3: values ½, 1, 3/2; pulls (4·½ + 2 + 0, 2·½ + 4 − 3/2, 0 − 1 + 6) over 2."""
    mixer = aimed("doge-online", dict.fromkeys(("domain0", "domain1", "domain2"), 1 / 3), "perplexity", floor=0.0)
    weights = seen(mixer, Given(gram(2.0, 0.0, -1.0)), losses=np.log([1.0, 2.0, 3.0]))
    assert weights == pytest.approx(softmax([2.0, 1.75, 2.5]), rel=1e-5)
    again = aimed("doge-online", dict.fromkeys(("domain0", "domain1", "domain2"), 1 / 3), "perplexity", floor=0.0)
    again.load_state_dict(mixer.state_dict())
    after = [seen(one, Given(gram(2.0, 0.0, -1.0)), 2, losses=np.full(3, NAN)) for one in (mixer, again)]
    assert after[0] == pytest.approx(softmax([4.0, 3.5, 5.0]), rel=1e-5)
    np.testing.assert_array_equal(*after)


def test_eg_follows_the_alignment_with_the_target():
    """The first window sets s = 4; then r = 0.3·3·(4, 2, 0)/4, bounded by ±2K = 6."""
    mixer = aimed("eg-interaction", {"domain0": 1.0}, learning_rate=0.5)
    seen(mixer, Given(gram(2.0, 0.0, -1.0)))
    weights = seen(mixer, Given(gram(2.0, 0.0, -1.0)), 2)
    reward = 0.3 * 3 * np.array([4.0, 2.0, 0.0]) / 4
    assert weights == pytest.approx(0.9 * softmax(0.5 * reward) + 0.1 / 3)


# --- exponentiated gradient on the environment's reward ------------------------------------------------------


def test_eg_moves_by_the_environments_smoothed_reward():
    mixer, tracker = started("eg-interaction", learning_rate=0.5), InteractionTracker(3)
    total = np.zeros(3)
    for step, pulls in enumerate([(1.0, 0.5, -0.5), (2.0, 1.0, 0.0), (0.5, -1.0, 1.0)], start=1):
        gradients = Given(gram(*pulls))
        weights = seen(mixer, gradients, step)
        tracker.update(
            StepStats(
                step=step,
                tokens=1,
                requested=np.full(3, 1 / 3),
                realised=np.full(3, 1 / 3),
                counts=np.full(3, 10.0),
                loss_tokens=np.ones(3),
                losses=np.ones(3),
                epochs=np.ones(3),
                drawn=np.ones(3),
                gradients=gradients,
            )
        )
        total += tracker.interaction
    assert weights == pytest.approx(0.9 * softmax(0.5 * total) + 0.1 / 3)
    assert total[0] == pytest.approx(0.3 * 3 / 4 * (1 + 0.7) - 0.3 * 0.5 / 4)  # W_0 = 3, then −0.5; s = 4; ξ = 0.7


# --- PiKE ----------------------------------------------------------------------------------------------------


def test_pike_by_hand():
    """Batch 64. The first window sets s = (1 + 2 + 3)/3 = 2; the second has ‖∇L‖² = 2, 4, 6 and σ² = n·noise."""
    mixer = started("pike", zeta1=0.4, zeta2=0.8, floor=0.1)
    first = seen(mixer, Given(gram(0, 0, 0, diagonal=(1, 2, 3))))
    assert first == pytest.approx(np.full(3, 1 / 3))
    second = seen(mixer, Given(gram(0, 0, 0, diagonal=(2, 4, 6)), noise=[4.0, 8.0, 32.0]), counts=[16, 32, 8])
    change = 0.4 * np.array([2, 4, 6]) / 2 - 0.8 / (2 * 64) * np.array([64, 256, 256]) / 2
    assert change == pytest.approx([0.2, 0.0, 0.4])
    assert second == pytest.approx(0.9 * softmax(change) + 0.1 / 3)


def test_pike_moves_every_t0_decisions():
    mixer = started("pike", every=3)
    given = Given(gram(0, 0, 0, diagonal=(1, 2, 3)))
    moved = [not np.allclose(seen(mixer, given, step), 1 / 3) for step in range(1, 4)]
    assert moved == [False, False, True]


def test_pike_keeps_what_it_knows_and_counts_negative_estimates_as_nothing():
    absent = [[2.0, 0.0, NAN], [0.0, -5.0, NAN], [NAN, NAN, NAN]]
    kept, told = started("pike"), started("pike")
    for mixer in (kept, told):
        seen(mixer, Given(gram(0, 0, 0, diagonal=(1, 2, 3)), noise=[1.0, 1.0, 2.0]))
    one = seen(kept, Given(absent), counts=[10, 10, 0])
    other = seen(told, Given(gram(0, 0, 0, diagonal=(2, 0, 3)), noise=[0.0, -1.0, 2.0]))
    np.testing.assert_allclose(one, other)


def test_pike_moves_no_domain_by_more_than_e():
    mixer = started("pike", floor=0.0)
    seen(mixer, Given(gram(0, 0, 0, diagonal=(1, 1, 1))))
    weights = seen(mixer, Given(gram(0, 0, 0, diagonal=(1e12, 1, 1))))
    assert weights == pytest.approx(softmax([1.0, -1.0, -1.0]))


# --- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXERS)
def test_gram_is_formed_once_per_window_and_nothing_moves_inside_it(name):
    mixer = started(name, decision_every=3)
    steps = [Given(gram(2.0, 0.0, -1.0)) for _ in range(6)]
    mixtures = [seen(mixer, given, step) for step, given in enumerate(steps, start=1)]
    assert [given.formed for given in steps] == [0, 0, 1, 0, 0, 1]
    np.testing.assert_allclose(mixtures[:2], 1 / 3)
    np.testing.assert_array_equal(mixtures[4], mixtures[2])
    assert not np.allclose(mixtures[5], mixtures[4]) or name == "pike"  # equal diagonals move PiKE nowhere


@pytest.mark.parametrize("name", MIXERS)
def test_state_goes_on_exactly_and_strange_gradients_are_saved_at_decisions_only(name, tmp_path):
    def feed(mixer, first, last):
        rng = np.random.default_rng(first)
        for step in range(first, last + 1):
            seen(mixer, Given(gram(*rng.normal(size=3), diagonal=rng.uniform(1, 4, 3)), rng.uniform(0, 1, 3)), step)

    whole, again = started(name, decision_every=2), started(name, decision_every=2)
    feed(whole, 1, 3)
    with pytest.raises(ValueError, match="Given: cannot be saved between two decisions, only at one"):
        whole.state_dict()
    feed(whole, 4, 4)
    write_state(tmp_path / "state", whole.state_dict())
    again.load_state_dict(read_state(tmp_path / "state"))
    for mixer in (whole, again):
        feed(mixer, 5, 8)
    np.testing.assert_array_equal(decided(whole), decided(again))
    assert not np.allclose(decided(whole), 1 / 3)


@pytest.mark.parametrize("name", MIXERS)
def test_a_diverged_window_and_one_without_gradients_change_nothing(name):
    mixer = started(name, decision_every=2)
    for step in range(1, 7):
        before = seen(mixer, Given(gram(2.0, 0.0, -1.0, diagonal=(2, 3, 4))), step)
    broken = Given(np.full((3, 3), NAN))
    np.testing.assert_array_equal(seen(mixer, broken, 7, diverged=True, losses=np.full(3, NAN)), before)
    mixer.state_dict()  # the window is forgotten, not kept open
    if name != "eg-interaction":  # its reward is a running one: it stays
        seen(mixer, None, 9)
        np.testing.assert_array_equal(seen(mixer, None, 10), before)


@pytest.mark.parametrize("name", MIXERS)
def test_a_window_of_nan_gradients_leaves_finite_weights(name):
    mixer = started(name)
    for step in range(1, 4):
        weights = seen(mixer, Given(np.full((3, 3), NAN)), step, counts=[0, 1, 0])
    np.testing.assert_allclose(weights, 1 / 3)


@pytest.mark.parametrize(("scale", "updates"), [(1.0, 20_000), (1e-30, 200), (1e30, 200)])
@pytest.mark.parametrize("name", MIXERS)
def test_20000_updates_with_a_constant_reward_stay_finite(name, scale, updates):
    mixer = started(name, **FAMILY[name])
    given = Given(scale * np.array(gram(2.0, 0.5, -1.0, diagonal=(4, 6, 8))), noise=scale * np.array([1.0, 2.0, 3.0]))
    for step in range(1, updates + 1):
        weights = seen(mixer, given, step)
    for array in (weights, mixer.weights()):
        assert np.isfinite(array).all()
        assert (array >= 0).all()
        assert array.sum() == pytest.approx(1)
    for value in mixer.state_dict().values():
        if isinstance(value, np.ndarray):
            assert np.isfinite(value).all()


@pytest.mark.parametrize("name", ["doge-online", "eg-interaction"])
def test_a_domain_at_the_bottom_comes_back_in_a_bounded_time(name):
    mixer = started(name, floor=0.0)
    for step in range(1, 2001):
        seen(mixer, Given(gram(3.0, -1.0, -1.0)), step)
    for step in range(2001, 3001):
        weights = seen(mixer, Given(gram(-1.0, 1.0, 2.0)), step)
    assert weights[2] > 0.5


@pytest.mark.parametrize("name", MIXERS)
def test_instances_are_apart_a_new_run_forgets_and_arrays_are_fresh(name):
    one, other = started(name), started(name)
    for step in range(1, 4):
        seen(one, Given(gram(2.0, 0.0, -1.0, diagonal=(2, 3, 4))), step)
    one.weights()[:] = 0
    assert one.weights().sum() == pytest.approx(1)
    np.testing.assert_allclose(decided(other), 1 / 3)
    one.start(info())
    np.testing.assert_allclose(decided(one), 1 / 3)
    assert len(one.state_dict()["logits"]) == 3


@pytest.mark.parametrize("name", ["doge-online", "eg-interaction", "pike"])
def test_the_floor_is_the_environments(name):
    mixer = started(name, num_domains=8)
    matrix = np.full((8, 8), 0.5) + np.diag(np.linspace(1, 400, 8))
    matrix[0, 1:] = matrix[1:, 0] = 30.0
    for step in range(1, 500):
        weights = seen(mixer, Given(matrix), step)
    assert weights.min() == pytest.approx(0.1 / 8, rel=1e-3)
    assert math.isclose(weights.sum(), 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("doge-online", {"mu": 0}, "mu=0: must be a positive number"),
        ("doge-online", {"floor": 1}, r"floor=1: must be in \[0, 1\)"),
        ("doge-online", {"clip_norm": NAN}, "clip_norm=nan"),
        ("doge-proxy", {"floor": 0}, "floor=0: must be a positive number"),
        ("doge", {"max_score": -1}, "max_score=-1"),
        ("eg-interaction", {"learning_rate": 0}, "learning_rate=0"),
        ("eg-interaction", {"smoothing": 1}, r"smoothing=1: must be in \[0, 1\)"),
        ("pike", {"zeta1": 0}, "zeta1=0"),
        ("pike", {"zeta2": -1}, "zeta2=-1: must be a finite number"),
        ("pike", {"every": 0}, "every=0: must be at least 1 decision"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_mixer(name, **options)
