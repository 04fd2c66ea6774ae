"""Mixers on surfaces, with the runs that they ask for."""

from dataclasses import replace

import numpy as np
import pytest
from general_policy import general

from acodm_env.agents.baselines import make_mixer
from acodm_env.errors import ConfigError
from acodm_env.experiments.surrogate.playing import Conditions, play, require_fit
from acodm_env.policy.mixer import PolicyMixer
from acodm_env.surrogate.surface import Surface

SURFACE = Surface.load("regmix-1m").without_repetition()
SHORT = Conditions(steps=20, steps_per_action=5)


def test_a_static_mixture_ends_where_the_law_says():
    weights = np.random.default_rng(0).dirichlet(np.ones(17))
    mixer = make_mixer("static", weights=dict(zip(SURFACE.domains, weights.tolist(), strict=True)))
    played = play(mixer, SURFACE, SHORT, seed=0)
    assert played.objective == pytest.approx(SURFACE.law.predict(weights[None])[0].mean(), abs=1e-9)
    assert played.mixture == pytest.approx(weights)


def test_the_same_seed_plays_the_same_and_another_one_other_noise():
    ends = [play(make_mixer("softmax-loss"), SURFACE, SHORT, seed=seed).objective for seed in (0, 0, 1)]
    assert ends[0] == ends[1] != ends[2]


@pytest.mark.parametrize("name", ["doremi", "skill-it", "doge", "marginal-value"])
def test_a_method_gets_the_runs_that_it_asks_for(name):
    mixer = make_mixer(name)
    played = play(mixer, SURFACE, SHORT, seed=0)
    assert np.isfinite(played.objective)
    assert played.mixture.sum() == pytest.approx(1)


def test_pilot_replays_what_its_policy_played_at_its_own_pace(tmp_path):
    policy = general(probe_sequences=None, decision_every=1, horizon=4)
    policy.save(tmp_path / "policy")
    own = play(PolicyMixer(policy), SURFACE, replace(SHORT, noise=0.0), seed=0)
    pilot = play(make_mixer("pilot", policy=str(tmp_path / "policy")), SURFACE, replace(SHORT, noise=0.0), seed=0)
    assert pilot.mixture == pytest.approx(own.mixture)
    other = play(PolicyMixer(policy), SURFACE, replace(SHORT, steps_per_action=1, noise=0.0), seed=0)
    np.testing.assert_array_equal(other.mixture, own.mixture)


def test_a_regression_is_fitted_on_runs_of_the_surface():
    uniform = play(make_mixer("uniform"), SURFACE, SHORT, seed=0).objective
    assert play(make_mixer("log-linear", runs=48), SURFACE, SHORT, seed=0).objective < uniform - 0.01


def test_a_mixer_that_does_not_fit_is_refused_and_says_why():
    require_fit(make_mixer("odm-paper"), SURFACE)
    with pytest.raises(ConfigError, match="held-out targets"):
        require_fit(make_mixer("sheared-llama"), SURFACE)
    with pytest.raises(ConfigError, match="needs excess"):
        require_fit(make_mixer("doremi-proxy"), SURFACE)
