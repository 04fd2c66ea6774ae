import json
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.errors import ConfigError, DataError
from acodm_env.files import read_state, write_state
from acodm_env.trainer import drive
from acodm_env.wrapper import Lagged
from log_lines import step_line
from toy import ToyTrainer

DOMAINS = ["domain0", "domain1"]
HALVES = [{"at": 0, "weights": {"domain0": 3, "domain1": 1}}, {"at": 0.5, "weights": {"domain0": 0, "domain1": 1}}]


def recorded(folder, requested, loss_weights=None, domains=DOMAINS, cut=""):
    """A run's folder, with as much of it as counts here."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": {"domains": domains}, "versions": {}}))
    factors = loss_weights or [None] * len(requested)
    lines = [
        json.dumps(step_line(step, requested=row, loss_weights=factor).record())
        for step, (row, factor) in enumerate(zip(requested, factors, strict=True), start=1)
    ]
    (folder / "stats.jsonl").write_text("".join(line + "\n" for line in lines) + cut)
    return str(folder)


def played(name, horizon, lag=0, **options):
    """Mixtures (horizon, K) under which a trainer was asked to step."""
    trainer = Lagged(ToyTrainer((0.5, 0.5), horizon=horizon), lag)
    mixer = make_mixer(name, **options)
    trainer.reset(np.random.default_rng(0))
    mixer.start(trainer.info)
    return np.array([stats.requested for stats in drive(trainer, mixer, horizon)])


# --- schedule ----------------------------------------------------------------------------------------------


def test_schedule_holds_a_mixture_until_the_next_point():
    np.testing.assert_allclose(played("schedule", 4, points=HALVES), [[0.75, 0.25]] * 2 + [[0, 1]] * 2)


def test_a_point_begins_exactly_at_its_fraction():
    points = [{"at": 0, "weights": [1, 0]}, {"at": 0.3, "weights": [0, 1]}]
    np.testing.assert_array_equal(played("schedule", 10, points=points)[:, 1], [0] * 3 + [1] * 7)


def test_schedule_interpolates_and_holds_the_last_mixture():
    mixtures = played("schedule", 8, points=HALVES, interpolate=True)
    np.testing.assert_allclose(mixtures[:, 0], [0.75, 0.5625, 0.375, 0.1875, 0, 0, 0, 0])
    np.testing.assert_allclose(mixtures.sum(1), 1)


def test_schedule_keeps_its_times_under_a_lag():
    mixtures = played("schedule", 8, lag=2, points=HALVES)
    np.testing.assert_allclose(mixtures[:2], 0.5)  # not the mixer's: what the loader was filled with
    np.testing.assert_allclose(mixtures[2:, 0], [0.75, 0.75, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (None, "points=None"),
        ([], r"points=\[\]"),
        ("0:uniform", "points=0:uniform"),
        ([{"at": 0.1, "weights": [1, 1]}], r"points\[0\]\.at=0\.1: must be 0"),
        ([{"at": 0}], r"points\[0\].*\"at\" and \"weights\""),
        ([{"at": 0, "weights": [1, 1], "until": 1}], r"points\[0\]"),
        ([{"at": 0, "weights": [1, 1]}, [0.5, [1, 1]]], r"points\[1\]"),
        ([{"at": "soon", "weights": [1, 1]}], r"points\[0\]\.at=soon"),
        ([{"at": 0, "weights": [1, 1]}, {"at": 1.5, "weights": [1, 1]}], r"points\[1\]\.at=1\.5"),
        ([{"at": 0, "weights": [1, 1]}, {"at": 0, "weights": [1, 1]}], "must increase"),
        ([{"at": 0, "weights": None}], "weights=None"),
    ],
)
def test_bad_points_are_refused(points, message):
    with pytest.raises(ConfigError, match=message):
        make_mixer("schedule", points=points)


def test_a_points_weights_are_refused_by_name_of_point_and_domain():
    mixer = make_mixer("schedule", points=[HALVES[0], {"at": 0.5, "weights": {"domain0": 1, "domain2": 1}}])
    with pytest.raises(ConfigError, match=r"points\[1\]\.weights.*domain2"):
        mixer.start(ToyTrainer((0.5, 0.5)).info)


# --- replay ------------------------------------------------------------------------------------------------


def test_replay_plays_what_was_effective_step_by_step(tmp_path):
    run = recorded(tmp_path / "run", [[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]], [None, [2.0, 0.5], [1.0, 7.0]])
    np.testing.assert_allclose(played("replay", 3, run=run), [[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])  # .4 : .4


@pytest.mark.parametrize(
    ("horizon", "steps"), [(4, [0, 1, 2, 3]), (8, [0, 0, 1, 1, 2, 2, 3, 3]), (2, [0, 2]), (3, [0, 1, 2])]
)
def test_replay_is_stretched_by_fraction_of_the_horizon(tmp_path, horizon, steps):
    run = recorded(tmp_path / "run", [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
    np.testing.assert_allclose(played("replay", horizon, run=run)[:, 0], 0.1 + 0.1 * np.array(steps))


def test_replay_of_a_run_under_a_lag_reproduces_it(tmp_path):
    run = recorded(tmp_path / "run", [[0.5, 0.5], [0.5, 0.5], [0.3, 0.7], [0.4, 0.6]])
    np.testing.assert_allclose(played("replay", 4, lag=2, run=run)[:, 0], [0.5, 0.5, 0.3, 0.4])


def test_a_last_line_cut_short_is_dropped(tmp_path):
    run = recorded(tmp_path / "run", [[0.1, 0.9], [0.2, 0.8]], cut='{"step": 3, "requested": [0.')
    np.testing.assert_allclose(played("replay", 2, run=run)[:, 0], [0.1, 0.2])
    np.testing.assert_allclose(played("mean-of", 2, run=run)[:, 0], [0.15, 0.15])


def test_mean_of_is_the_time_average_of_the_effective_mixtures_held_still(tmp_path):
    run = recorded(tmp_path / "run", [[0.2, 0.8], [0.5, 0.5]], [[2.0, 0.5], [3.0, 1.0]])  # (.5, .5), (.75, .25)
    np.testing.assert_allclose(played("mean-of", 5, run=run), [[0.625, 0.375]] * 5)
    assert make_mixer("mean-of", run=run).dynamic is False
    assert make_mixer("replay", run=run).dynamic is True


@pytest.mark.parametrize("name", ["replay", "mean-of"])
def test_domains_in_another_order_are_matched_by_name(tmp_path, name):
    run = recorded(tmp_path / "run", [[0.1, 0.9]], domains=["domain1", "domain0"])
    np.testing.assert_allclose(played(name, 1, run=run), [[0.9, 0.1]])


@pytest.mark.parametrize("name", ["replay", "mean-of"])
def test_no_run_and_no_fitting_run_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="run=None: needs the folder of a run"):
        make_mixer(name)
    other = recorded(tmp_path / "other", [[0.5, 0.5]], domains=["domain0", "law"])
    cases = {
        str(tmp_path / "nothing"): "nothing: must be the folder of a run",
        other: "only there: law; only here: domain1",
        recorded(tmp_path / "empty", []): "has no steps",
        recorded(tmp_path / "cut", [], cut='{"step": 1, "requ'): "has no steps",
        recorded(tmp_path / "nan", [[None, 1.0]]): "line 1: .*finite",
        recorded(tmp_path / "short", [[0.5, 0.5], [1.0]]): "line 2: .*2 finite numbers",
        recorded(tmp_path / "zero", [[1.0, 0.0]], [[0.0, 1.0]]): "line 1: .*not all 0",
        recorded(tmp_path / "odd", [], cut="[1]\n[1]\n"): "line 1: must be a whole line",
        recorded(tmp_path / "edited", [], cut='{"req\n{"requested": [0.5, 0.5]}\n'): "line 1: must be a whole line",
    }
    for run, message in cases.items():
        with pytest.raises((ConfigError, DataError), match=message):
            make_mixer(name, run=run).start(ToyTrainer((0.5, 0.5)).info)


def test_a_folder_that_is_no_runs_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="names no domains"):
        make_mixer("replay", run=str(tmp_path)).start(ToyTrainer((0.5, 0.5)).info)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json"):
        make_mixer("replay", run=str(tmp_path)).start(ToyTrainer((0.5, 0.5)).info)


# --- both --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["schedule", "replay"])
def test_saved_and_loaded_goes_on_at_its_step_and_start_goes_back(name, tmp_path):
    run = recorded(tmp_path / "run", [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
    options = {"run": run} if name == "replay" else {"points": HALVES, "interpolate": True}
    whole = played(name, 4, **options)
    trainer = ToyTrainer((0.5, 0.5), horizon=4)
    trainer.reset(np.random.default_rng(0))
    mixer, other = make_mixer(name, **options), make_mixer(name, **options)
    mixer.start(trainer.info)
    other.start(trainer.info)
    list(drive(trainer, mixer, 3))
    write_state(tmp_path / "state.safetensors", mixer.state_dict())
    np.testing.assert_array_equal(other.weights(), whole[0])  # untouched by the first
    other.load_state_dict(read_state(tmp_path / "state.safetensors"))
    np.testing.assert_array_equal(other.weights(), whole[3])
    mixer.weights()[:] = 7.0
    np.testing.assert_array_equal(mixer.weights(), whole[3])
    mixer.start(trainer.info)
    np.testing.assert_array_equal(mixer.weights(), whole[0])


def test_a_plan_longer_driven_than_planned_holds_its_last_mixture():
    trainer = ToyTrainer((0.5, 0.5), horizon=2)
    trainer.reset(np.random.default_rng(0))
    mixer = make_mixer("schedule", points=HALVES)
    mixer.start(replace(trainer.info, horizon=2))
    assert [stats.requested[0] for stats in drive(trainer, mixer, 4)] == [0.75, 0, 0, 0]
