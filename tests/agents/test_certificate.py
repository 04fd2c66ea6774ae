"""The verdict's arithmetic by hand, and an artifact that is refused wherever it does not belong."""

import json
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.agents.certificate import Certificate, Gain, fresh_seeds, gain, halved
from acodm_env.errors import ConfigError, DataError, PolicyError
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.policy.dense import Policy

POLICY = Policy(
    domains=("a", "b"),
    fields=(("progress", 1),),
    mean=np.zeros(1),
    scale=np.ones(1),
    clip=10.0,
    layers=((np.ones((2, 1), np.float32), np.array([0.5, -0.5], np.float32), "tanh"),),
    action=ActionMap(),
    bounds=Bounds(),
    interaction=InteractionConfig(),
    decision_every=2,
    horizon=8,
)


@pytest.mark.parametrize(
    ("uniform", "other", "mean", "error", "limit", "beats"),
    [
        ([5.0, 5.1], [4.9, 4.9], 0.15, 0.05, 0.05, True),
        ([5.0, 5.1], [4.9, 5.15], 0.025, 0.075, 0.075, False),  # one seed is worse
        ([5.0, 5.0], [4.996, 4.998], 0.003, 0.001, 0.005, False),  # ahead by less than counts
        ([5.0, 5.0], [4.99, 4.99], 0.01, 0.0, 0.005, True),
        # Differences .1 .2 .3: error .1/√3, one-sided 95 % quantile of t at two degrees of freedom 2.919986.
        ([5.0, 5.0, 5.0], [4.9, 4.8, 4.7], 0.2, 0.0577350, 2.919986 * 0.0577350, True),
        ([5.0, 5.0, 5.0], [5.0, 4.8, 4.7], 0.5 / 3, 0.0881917, 2.919986 * 0.0881917, False),
    ],
)
def test_a_gain_counts_if_it_is_above_its_noise(uniform, other, mean, error, limit, beats):
    found = gain(uniform, other)
    assert found.mean_nats == pytest.approx(mean)
    assert found.error_nats == pytest.approx(error, abs=1e-7)
    assert found.limit_nats == pytest.approx(limit, rel=1e-5)
    assert found.beats is beats


def test_a_run_that_diverged_gains_nothing():
    found = gain([5.0, 5.0], [4.0, None])
    assert (found.beats, found.mean_nats, str(found)) == (False, None, "diverged")
    assert str(gain([5.0, 5.1], [4.9, 4.9])) == "+0.1500 ± 0.0500 nats over 2 seeds"


def test_fresh_seeds_are_apart_from_the_targets_and_each_others():
    seeds = [seed for own in range(50) for seed in fresh_seeds(own, 3)]
    assert len({*seeds, *range(50)}) == 200
    for count in (1, 101):
        with pytest.raises(ConfigError, match=f"seeds={count}: must be 2 to 100"):
            fresh_seeds(0, count)


def certificate(**changes):
    known = {
        "verdict": "keep",
        "policy": POLICY.fingerprint,
        "corpus_fingerprint": "c" * 64,
        "heldout_fingerprint": "h" * 64,
        "domains": ["a", "b"],
        "targets": ["a", "b"],
        "objective": [0.75, 0.25],
        "metric": "loss",
        "conditions": {"proxy": "tiny"},
        "seeds": [70_000, 70_001],
        "evidence": {"uniform": {"70000": {"validation": 5.0, "test": 5.0}}},
        "gains": {"policy": {"mean_nats": 0.15, "error_nats": 0.05, "limit_nats": 0.05, "num_seeds": 2}},
        "best_rule": "target-share-0.5",
        "cost": {"tokens": 1.0, "flops": 2.0, "seconds": 3.0},
        "record": {"versions": {}, "git_commit": None},
    }
    return Certificate(**known | changes)


RUN = {
    "corpus_fingerprint": "c" * 64,
    "heldout_fingerprint": "h" * 64,
    "targets": ["b", "a", "z"],
    "objective": [0.25, 0.75, 0.0],
    "metric": "loss",
    "seed": 0,
}


def test_it_is_read_as_it_was_written(tmp_path):
    written = certificate()
    written.save(tmp_path)
    read = Certificate.load(tmp_path)
    assert read == written
    read.check_for(POLICY, RUN, "there")
    assert read.summary() == (
        "certificate: keep (gain on uniform in validation: policy +0.1500 ± 0.0500 nats over 2 seeds)"
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"corpus_fingerprint": "d" * 64}, DataError, "for this corpus, corpus_fingerprint=dddddddddddd"),
        ({"heldout_fingerprint": "d" * 64}, DataError, "for this corpus, heldout_fingerprint=dddddddddddd"),
        (
            {"metric": "perplexity"},
            ConfigError,
            "for log mean perplexity of b, a ×3, as this run is; it is for mean loss",
        ),
        (
            {"objective": [0.5, 0.5, 0.0]},
            ConfigError,
            "for mean loss of b, a, as this run is; it is for mean loss of a ×3, b",
        ),
        ({"targets": ["b", "y", "z"]}, ConfigError, "for mean loss of b, y ×3"),
        ({"seed": 70_001}, ConfigError, r"seed=70001: must be none of the certificate's, \[70000, 70001\]"),
    ],
)
def test_another_corpus_objective_or_seed_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        certificate().check_for(POLICY, RUN | change, "there")


def test_another_policy_is_refused():
    with pytest.raises(PolicyError, match="must be for this policy"):
        certificate().check_for(halved(POLICY), RUN, "there")


def test_a_certificate_that_was_edited_is_missing_or_unfinished_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"there is none; make one: acodm gate --policy P --proxy tiny"):
        Certificate.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="it was interrupted: the same `acodm gate` command goes on"):
        Certificate.load(tmp_path)
    path = certificate(verdict="uniform").save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verdict": "keep"}))
    with pytest.raises(DataError, match="checksum does not match: it was edited"):
        Certificate.load(tmp_path)
    path.write_text("[1]")
    with pytest.raises(DataError, match="checksum does not match"):
        Certificate.load(tmp_path)


def test_the_verdict_is_applied():
    assert certificate().apply(POLICY) is POLICY
    half = certificate(verdict="halve").apply(POLICY)
    assert half.action == replace(POLICY.action, tilt=0.5)
    assert halved(half).action.tilt == 0.25
    assert certificate(verdict="uniform").apply(POLICY) is None


def test_gains_are_json(tmp_path):
    """A row that diverged has none, and that is no infinity."""
    never = Gain(mean_nats=None, error_nats=None, limit_nats=0.005, num_seeds=2)
    written = certificate(verdict="uniform", gains={"policy": vars(never)})
    written.save(tmp_path)
    assert "policy diverged" in Certificate.load(tmp_path).summary()
