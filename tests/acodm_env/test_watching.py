"""Runs that are measured on their way for somebody else than their mixer."""

import json
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.errors import ConfigError
from acodm_env.trainer import Mixer, RunRequest, drive
from acodm_env.watching import Watched, held_out_curve, watched_steps
from toy import ToyTrainer


def request(steps=20, **settings):
    return RunRequest(name="proxy", mixer="uniform", steps=steps, **settings)


class Curious(Mixer):
    """Wants held-out losses at every fifth step, and remembers what it saw."""

    name = "curious"
    needs = frozenset({"validation"})
    probe_sequences = 8

    def start(self, info):
        super().start(info)
        self.seen = []

    def due(self, step):
        return step % 5 == 0

    def weights(self):
        return np.full(self.info.num_domains, 1 / self.info.num_domains)

    def update(self, stats):
        if stats.eval_losses is not None:
            self.seen.append(stats.step)


class Blind(Curious):
    needs = frozenset()


def test_steps_are_shares_of_the_run_without_its_last():
    assert watched_steps(request(evaluate_at=(0.5, 0.4, 0.8))) == (8, 10, 16)
    assert watched_steps(request(steps=2, evaluate_at=(0.01, 0.4, 0.5, 0.99))) == (1,)
    assert watched_steps(request()) == ()


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, float("nan")])
def test_a_share_outside_of_the_run_is_refused(share):
    with pytest.raises(ConfigError, match=rf"evaluate_at={share}: must be in \(0, 1\), a share of the run proxy"):
        watched_steps(request(evaluate_at=(share,)))


@pytest.mark.parametrize(("kind", "seen"), [(Curious, [5, 10, 15, 20]), (Blind, [])])
def test_the_mixer_sees_no_more_than_it_would_alone(kind, seen):
    trainer, inner = ToyTrainer((0.5, 0.5), horizon=20), kind()
    mixer = Watched(inner, (4, 10))
    trainer.reset(np.random.default_rng(0))
    mixer.start(trainer.info)
    history = list(drive(trainer, mixer, 20))
    assert [stats.step for stats in history if stats.eval_losses is not None] == sorted({4, 10, *seen})
    assert inner.seen == seen
    assert mixer.name == inner.name


def test_the_curve_ends_with_the_last_losses():
    asked = request(evaluate_at=(0.4, 0.8))
    measured = {8: [3.0, 4.0], 16: np.array([2.0, 3.5]), 5: None}
    curve = held_out_curve(asked, measured, np.array([1.5, 3.0]))
    assert curve["steps"].tolist() == [8, 16, 20]
    assert curve["losses"].tolist() == [[3.0, 4.0], [2.0, 3.5], [1.5, 3.0]]
    assert held_out_curve(request(), {}, np.ones(2)) == {}
    assert held_out_curve(asked, {8: [3.0, 4.0]}, np.array([np.nan, 1.0])) == {}  # diverged, and ended early
    assert held_out_curve(asked, measured | {8: [None, 4.0]}, np.array([1.5, 3.0])) == {}


def test_requests_without_measurements_keep_the_names_that_they_had():
    plain = request(options={"a": 1})
    assert "evaluate_at" not in plain.record()
    assert sorted(plain.record()) == ["keep_model", "mixer", "name", "options", "reference", "steps"]
    assert json.loads(json.dumps(replace(plain, evaluate_at=(0.5,)).record()))["evaluate_at"] == [0.5]
