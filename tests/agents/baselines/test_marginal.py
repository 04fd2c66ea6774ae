"""The rule of one proxy run: its request, slopes and mixtures by hand, revisions during the run."""

import math
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.errors import ConfigError
from acodm_env.files import read_state, write_state
from acodm_env.trainer import RunResult, drive
from toy import ToyTrainer

NAMES = ("prose", "licences", "python")
INFO = replace(ToyTrainer((1 / 3,) * 3, horizon=100).info, domains=NAMES, targets=NAMES)
SLOPES = np.array([0.4, 0.2, 0.1])
ENDS = np.array([3.0, 2.0, 4.0])


def ran(slopes=SLOPES, ends=ENDS, steps=(40, 50, 80, 100)):
    """A proxy run whose losses fall by their slopes in ln t, to their ends."""
    steps = np.array(steps)
    losses = ends + np.array(slopes) * np.log(steps[-1] / steps)[:, None]  # (n, M)
    return RunResult(
        mixture=np.full(3, 1 / 3), initial_losses=ends + 4, final_losses=losses[-1], steps=steps, losses=losses
    )


def started(info=INFO, result=None, **options):
    mixer = make_mixer("marginal-value", **options)
    mixer.prepare({"proxy": result or ran()})
    mixer.start(info)
    return mixer


def by_hand(promise, floor=0.05, power=0.7):
    chosen = np.array(promise, dtype=float) ** power
    return floor / 3 + (1 - floor) * chosen / chosen.sum()


# --- one proxy run -----------------------------------------------------------------------------------------


def test_it_asks_for_one_uniform_run_and_four_measurements():
    (request,) = make_mixer("marginal-value").preparation(INFO)
    assert (request.name, request.mixer, request.steps, request.options) == ("proxy", "uniform", 100, {})
    assert request.evaluate_at == (0.4, 0.5, 0.8)  # and the last step
    (shorter,) = make_mixer("marginal-value", proxy_frac=0.25).preparation(INFO)
    assert shorter.steps == 25


def test_live_asks_for_its_revisions_too_where_they_can_matter():
    def at(info):
        (request,) = make_mixer("marginal-value", live=True).preparation(info)
        return request.evaluate_at

    ppl = replace(INFO, metric="perplexity")
    assert at(ppl) == (0.2, 0.4, 0.5, 0.6, 0.8)
    assert at(INFO) == (0.4, 0.5, 0.8)  # ω does not depend on losses
    assert at(replace(ppl, targets=("prose", "a book"))) == (0.4, 0.5, 0.8)  # one target that is trained on


@pytest.mark.parametrize("horizon", [1, 2])
def test_a_proxy_of_one_step_is_refused(horizon):
    with pytest.raises(ConfigError, match=r"proxy_frac=0\.5: must give the proxy run at least 2 steps of"):
        make_mixer("marginal-value", proxy_frac=0.5).preparation(replace(INFO, horizon=horizon))


def test_two_steps_are_enough():
    (request,) = make_mixer("marginal-value").preparation(replace(INFO, horizon=2))
    mixer = started(result=ran(steps=(1, 2)))
    assert request.steps == 2
    np.testing.assert_allclose(mixer.weights(), by_hand(SLOPES))


# --- the rule ----------------------------------------------------------------------------------------------


def test_mean_loss_by_hand():
    np.testing.assert_allclose(started().weights(), by_hand(SLOPES))
    np.testing.assert_allclose(started(power=1.0, floor=0.3).weights(), by_hand(SLOPES, floor=0.3, power=1.0))


def test_the_slope_is_the_mean_of_two_windows():
    steps, losses = np.array([40, 50, 80, 100]), np.array([3.4, 3.0, 2.4, 2.0])[:, None] + np.zeros(3)
    losses[:, 1] = [4.0, 4.0, 3.8, 3.8]
    losses[:, 2] = [2.0, 1.9, 1.8, 1.7]
    result = replace(ran(), steps=steps, losses=losses, final_losses=losses[-1])
    first = np.array([1.0, 0.2, 0.2]) / math.log(2)  # .4 to .8
    second = np.array([1.0, 0.2, 0.2]) / math.log(2)  # .5 to 1
    np.testing.assert_allclose(started(result=result).weights(), by_hand((first + second) / 2))


def test_a_loss_that_rises_gets_the_floor_alone():
    np.testing.assert_allclose(started(result=ran([0.4, -0.2, 0.1])).weights(), by_hand([0.4, 0, 0.1]))


def test_perplexities_count_by_their_size_at_the_end():
    mixer = started(replace(INFO, metric="perplexity"))
    np.testing.assert_allclose(mixer.weights(), by_hand(SLOPES * np.exp(ENDS)))


def test_targets_count_by_their_weights_and_other_domains_get_the_floor():
    info = replace(INFO, targets=("python", "a book", "prose"), objective=(0.6, 0.2, 0.2))
    mixer = started(info)  # slopes .4, .2, .1 are of python, a book, prose
    np.testing.assert_allclose(mixer.weights(), by_hand([0.2 * 0.1, 0, 0.6 * 0.4]))
    assert mixer.weights()[1] == pytest.approx(0.05 / 3)


@pytest.mark.parametrize(
    ("info", "slopes"),
    [(replace(INFO, targets=("a", "b", "c")), SLOPES), (INFO, [0.0, -0.1, 0.0])],
    ids=["no target is trained on", "nothing falls"],
)
def test_where_nothing_is_left_it_is_uniform(info, slopes):
    np.testing.assert_allclose(started(info, ran(slopes)).weights(), 1 / 3)


def test_padding_gets_nothing():
    info = replace(INFO, padding=1, targets=NAMES[:2], objective=(1.0, 0.0))
    result = replace(ran(), losses=ran().losses[:, :2], final_losses=ENDS[:2])
    np.testing.assert_allclose(started(info, result).weights(), [0.975, 0.025, 0])


def test_one_domain_gets_everything():
    info = replace(INFO, domains=("prose",), targets=("prose",), sizes_tokens=(9,))
    result = replace(ran(), losses=ran().losses[:, :1], final_losses=ENDS[:1])
    assert started(info, result).weights().tolist() == [1.0]


# --- live --------------------------------------------------------------------------------------------------


class Falling(ToyTrainer):
    """Held-out losses: the proxy's, and constant differences from it."""

    def __init__(self, off, **settings):
        super().__init__((1 / 3,) * 3, horizon=100, **settings)
        self.info = replace(INFO, metric="perplexity")
        self.off, self.asked = np.array(off), []

    def evaluate(self, split):
        self.asked.append(self.steps_done)
        return ENDS + SLOPES * math.log(100 / self.steps_done) + self.off


PPL_RUN = ran(steps=(20, 40, 50, 60, 80, 100))


def lived(off, **options):
    trainer, mixer = Falling(off), make_mixer("marginal-value", live=True, **options)
    mixer.prepare({"proxy": PPL_RUN})
    trainer.reset(np.random.default_rng(0))
    mixer.start(trainer.info)
    return trainer, mixer, [stats.requested for stats in drive(trainer, mixer, 100)]


def test_live_predicts_its_own_end():
    """0.5 nats below the proxy throughout: so is the predicted end."""
    off = np.array([-0.5, 0.0, 0.2])
    trainer, mixer, mixtures = lived(off)
    assert trainer.asked == [20, 40, 60, 80]
    np.testing.assert_allclose(mixtures[:20], [by_hand(SLOPES * np.exp(ENDS))] * 20)
    np.testing.assert_allclose(mixtures[20:], [by_hand(SLOPES * np.exp(ENDS + off))] * 80)
    assert mixer.dynamic
    assert "validation" in mixer.needs


def test_live_measures_nothing_where_that_changes_nothing():
    trainer = Falling([0.0] * 3)
    trainer.info = INFO
    mixer = make_mixer("marginal-value", live=True)
    mixer.prepare({"proxy": ran()})
    trainer.reset(np.random.default_rng(0))
    mixer.start(trainer.info)
    mixtures = [stats.requested for stats in drive(trainer, mixer, 100)]
    assert trainer.asked == []
    np.testing.assert_allclose(mixtures, [by_hand(SLOPES)] * 100)


def test_a_missing_loss_keeps_its_prediction():
    _, mixer, _ = lived([0.0, np.nan, 0.3])
    np.testing.assert_allclose(mixer.weights(), by_hand(SLOPES * np.exp(ENDS + np.array([0, 0, 0.3]))))


def test_it_goes_on_exactly_from_its_state(tmp_path):
    _, whole, _ = lived([-0.5, 0.1, 0.2])
    write_state(tmp_path / "state.safetensors", whole.state_dict())
    again = started(replace(INFO, metric="perplexity"), PPL_RUN, live=True)
    assert not np.allclose(again.weights(), whole.weights())
    again.load_state_dict(read_state(tmp_path / "state.safetensors"))
    np.testing.assert_array_equal(again.weights(), whole.weights())
    again.weights()[:] = 0
    assert again.weights().sum() == pytest.approx(1)


# --- bad input ---------------------------------------------------------------------------------------------


def test_without_its_run_it_does_not_start():
    with pytest.raises(ConfigError, match=r"mixer=marginal-value: needs its preparatory runs first.*acodm benchmark"):
        make_mixer("marginal-value").start(INFO)


@pytest.mark.parametrize(
    "result",
    [replace(ran(), steps=None, losses=None), ran(steps=(50, 80, 100))],
    ids=["no evaluations", "they begin later"],
)
def test_a_run_without_the_evaluations_is_refused(result):
    with pytest.raises(ConfigError, match="needs held-out losses of its proxy run at the shares"):
        make_mixer("marginal-value").prepare({"proxy": result})


def test_a_diverged_proxy_and_one_with_other_targets_are_refused():
    broken = replace(ran(), final_losses=np.array([3.0, np.nan, 4.0]))
    with pytest.raises(ConfigError, match="mixer=marginal-value: its preparatory run 'proxy' diverged"):
        make_mixer("marginal-value").prepare({"proxy": broken})
    with pytest.raises(ConfigError, match="was prepared for other targets"):
        started(replace(INFO, targets=("prose",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 0}, "power=0: must be a positive number"),
        ({"floor": -0.1}, r"floor=-0\.1: must be in \[0, 1\]"),
        ({"floor": math.nan}, "floor=nan"),
        ({"proxy_frac": 0}, "proxy_frac=0"),
        ({"revisions": 0}, "revisions=0: must be a whole number of at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_mixer("marginal-value", **options)
