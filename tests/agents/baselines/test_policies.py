"""Policies as mixers by name, and the time average of one run under one."""

from dataclasses import replace

import numpy as np
import pytest
from general_policy import general

from acodm_env.agents.baselines import make_mixer
from acodm_env.errors import ConfigError, PolicyError
from acodm_env.policy.dense import Policy
from acodm_env.policy.load import POLICIES, open_policy
from acodm_env.policy.mixer import PolicyMixer
from acodm_env.trainer import RunResult, drive
from toy import ToyTrainer


@pytest.fixture
def policies(tmp_path, monkeypatch):
    """Where policies "come with the package" here."""
    general(probe_sequences=None).save(tmp_path / "shipped" / "generalist")
    monkeypatch.setattr("acodm_env.policy.load.POLICIES", tmp_path / "shipped")
    return tmp_path / "shipped"


@pytest.fixture
def folder(tmp_path):
    """An exported policy of one's own."""
    general(probe_sequences=None, seed=1).save(tmp_path / "mine")
    return tmp_path / "mine"


def driven(mixer, num_steps=12):
    """Requested mixtures of a run whose targets count unequally."""
    trainer = ToyTrainer((0.5, 0.3, 0.2), horizon=num_steps, decision_every=3)
    trainer.info = replace(trainer.info, objective=(0.6, 0.3, 0.1))
    trainer.reset(np.random.default_rng(0))
    mixer.start(trainer.info)
    return [stats.requested.copy() for stats in drive(trainer, mixer, num_steps)]


# --- policy and generalist ---------------------------------------------------------------------------------


def test_a_policy_is_opened_by_name_or_folder(policies, folder):
    assert open_policy("generalist").fingerprint == general(probe_sequences=None).fingerprint
    assert open_policy(folder).fingerprint == general(probe_sequences=None, seed=1).fingerprint


def test_the_generalist_is_the_shipped_policy(policies, folder):
    mixer, named = make_mixer("generalist"), make_mixer("policy", policy="generalist")
    assert isinstance(mixer, PolicyMixer)
    assert (mixer.name, named.name) == ("generalist", "policy")
    expected = driven(PolicyMixer(general(probe_sequences=None)))
    np.testing.assert_array_equal(driven(mixer), expected)
    np.testing.assert_array_equal(driven(named), expected)
    assert not np.allclose(driven(make_mixer("policy", policy=str(folder))), expected)


def test_it_plays_targets_that_are_trained_on_nowhere(policies):
    class Foreign(ToyTrainer):
        def evaluate(self, split):
            return np.array([4.0, 5.0])

    trainer = Foreign((0.5, 0.3, 0.2), horizon=6, decision_every=2)
    trainer.info = replace(trainer.info, targets=("domain1", "a book"), objective=(0.5, 0.5))
    trainer.reset(np.random.default_rng(0))
    mixer = make_mixer("generalist")
    mixer.start(trainer.info)
    for stats in drive(trainer, mixer, 6):
        assert stats.requested.shape == (3,)
        assert stats.requested.sum() == pytest.approx(1)


@pytest.mark.parametrize("options", [{}, {"policy": None}, {"policy": ""}])
def test_a_policy_must_be_given(options):
    with pytest.raises(ConfigError, match="must be generalist, or the folder of an exported policy; give one of them"):
        make_mixer("policy", **options)


def test_a_policy_that_is_not_there_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"policy=generalst: .*did you mean 'generalist'"):
        make_mixer("policy", policy="generalst")
    with pytest.raises(ConfigError, match=r"policy=.*nowhere: .*holds no policy\.json; `acodm export` writes one"):
        open_policy(tmp_path / "nowhere")
    monkeypatch.setattr("acodm_env.policy.load.POLICIES", tmp_path)
    with pytest.raises(ConfigError, match="policy=generalist: must come with the package"):
        make_mixer("generalist")


def test_a_policy_that_was_replaced_is_refused(folder):
    fingerprint = open_policy(folder).fingerprint
    make_mixer("policy", policy=str(folder), fingerprint=fingerprint)
    with pytest.raises(ConfigError, match=r"must have the fingerprint abc, and has .*it was replaced"):
        make_mixer("policy", policy=str(folder), fingerprint="abc")


def test_an_edited_policy_is_refused(folder):
    text = (folder / "policy.json").read_text().replace('"horizon": 20', '"horizon": 21')
    (folder / "policy.json").write_text(text)
    with pytest.raises(PolicyError, match="checksum does not match"):
        make_mixer("policy", policy=str(folder))


@pytest.mark.skipif(not (POLICIES / "generalist" / "policy.json").is_file(), reason="a checkout without its policies")
def test_what_is_shipped_can_be_opened():
    assert isinstance(open_policy("generalist"), Policy)


# --- pilot -------------------------------------------------------------------------------------------------


def result(mixture, final=(3.0, 3.0, 3.0)):
    return RunResult(mixture=np.array(mixture), initial_losses=np.full(3, 5.0), final_losses=np.array(final))


def test_pilot_asks_for_one_run_under_the_policy(policies, folder, monkeypatch):
    info = ToyTrainer((0.5, 0.3, 0.2), horizon=40).info
    (request,) = make_mixer("pilot").preparation(info)
    expected = {"policy": "generalist", "fingerprint": general(probe_sequences=None).fingerprint}
    assert (request.name, request.mixer, request.steps, request.options) == ("proxy", "policy", 40, expected)
    assert request.evaluate_at == ()
    monkeypatch.chdir(folder.parent)
    (other,) = make_mixer("pilot", policy="mine", proxy_frac=0.5).preparation(info)
    assert (other.options["policy"], other.steps) == (str(folder), 20)
    made = make_mixer(other.mixer, **other.options)
    assert made.policy.fingerprint == general(probe_sequences=None, seed=1).fingerprint


def test_pilot_replays_the_time_average(policies):
    played = np.mean(driven(make_mixer("generalist")), axis=0)
    mixer = make_mixer("pilot")
    mixer.prepare({"proxy": result(played)})
    np.testing.assert_allclose(driven(mixer), [played] * 12)
    assert not mixer.dynamic


def test_pilot_without_its_run_or_with_a_diverged_one_is_refused(policies):
    with pytest.raises(ConfigError, match="mixer=pilot: needs its preparatory runs first"):
        make_mixer("pilot").start(ToyTrainer((0.5, 0.3, 0.2)).info)
    with pytest.raises(ConfigError, match="mixer=pilot: its preparatory run 'proxy' diverged"):
        make_mixer("pilot").prepare({"proxy": result([0.5, 0.3, 0.2], [3.0, np.nan, 3.0])})


def test_pilot_refuses_what_cannot_be_run(policies, tmp_path):
    info = ToyTrainer((0.5, 0.3, 0.2)).info
    with pytest.raises(ConfigError, match=r"holds no policy\.json"):
        make_mixer("pilot", policy=str(tmp_path / "nowhere")).preparation(info)
    with pytest.raises(ConfigError, match="proxy_frac=0: must be a positive number"):
        make_mixer("pilot", proxy_frac=0)
    with pytest.raises(ConfigError, match="policy=: must be generalist"):
        make_mixer("pilot", policy="").preparation(info)
