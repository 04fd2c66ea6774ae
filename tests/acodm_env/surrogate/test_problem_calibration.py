"""A problem's surface fitted to runs of known parameters: they come back, and runs that were held out are predicted."""

from dataclasses import replace

import numpy as np
import pytest

from acodm_env.errors import ConfigError, DataError
from acodm_env.files import write_json
from acodm_env.surrogate.calibrated import FORMAT, Calibrated, Record
from acodm_env.surrogate.problem_calibration import calibrate
from acodm_env.surrogate.problem_trainer import ProblemTrainer
from acodm_env.surrogate.problem_verdict import against, errors, judge, residuals, signature, split
from acodm_env.surrogate.problems import ProblemFamily

HORIZON, EVERY, INITIAL = 20, 4, 8.0


def true_surface(**changes):
    """Three domains that help one another a little; the vocabulary's ln V is not that of `problems`."""
    transfer = np.array([[1.0, 0.2, 0.0], [0.0, 1.0, 0.0], [0.3, 0.0, 1.0]])
    exponents, slopes, ends = np.array([0.3, 0.5, 0.6]), np.array([0.3, 0.6, 0.15]), np.array([4.0, 3.0, 4.5])
    even = transfer.sum(1)
    gains = slopes / exponents * even
    settings = {
        "domains": ("a", "b", "c"),
        "initial_loss_nats": INITIAL,
        "measured": np.ones(3, dtype=bool),
        "exponents": exponents,
        "gains": gains,
        "floors": ends - gains,
        "start": even * ((INITIAL - 0.3 - ends + gains) / gains) ** (-1 / exponents),  # with the fall: ln V
        "transfer": transfer,
        "recency": np.array([0.1, 0.3, 0.2]),
        "repetition": 10.0,
        "overfit": 0.8,
        "overfit_power": 1.5,
        "favour": 0.2,
        "memory": 0.3,
        "fall": 0.3,
    }
    return Calibrated(**settings | changes)


def record_of(surface, mixtures, sizes, name="run", trainable=(1, 1, 1)):
    """A run under mixtures (T, K), stepped by the trainer and not by what is tested."""
    trainable, sizes = np.array(trainable, dtype=float), np.array(sizes, dtype=float)
    trainer = ProblemTrainer(surface.problems(trainable[None], sizes[None]), horizon=len(mixtures), noise=0)
    trainer.reset(np.random.default_rng(0))
    offset = surface.initial_loss_nats - 7.62
    times, losses, drawn = [0.0], [np.full(3, surface.initial_loss_nats)], [np.zeros(3)]
    for index, mixture in enumerate(mixtures, start=1):
        trainer.step(mixture)
        if index % EVERY == 0:
            times.append(index / len(mixtures))
            losses.append(trainer.evaluate("test") + offset)
            drawn.append(mixtures[:index].sum(0) / len(mixtures))
    return Record(
        name=name,
        mixer="some",
        problem=f"sizes {sizes.tolist()}",
        trainable=trainable,
        sizes=sizes,
        mixtures=np.array(mixtures),
        drawn=np.array(drawn),
        times=np.array(times),
        losses=np.array(losses),
    )


def records_of(surface, count, seed=0):
    """Half of the mixtures move; in every second run one domain is scarce, in every sixth one is left out."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        first, last = rng.dirichlet(np.ones(3), 2)
        last = first if index % 4 < 2 else last
        sizes, trainable = np.full(3, 0.7), np.ones(3)
        if index % 2:
            sizes[rng.integers(3)] = rng.choice([0.015, 0.05, 0.2])
        if index % 6 == 4:
            out = rng.integers(3)
            sizes[out] = trainable[out] = first[out] = last[out] = 0
        share = (np.arange(HORIZON) / HORIZON)[:, None]
        mixtures = (1 - share) * first / first.sum() + share * last / last.sum()
        yield record_of(surface, mixtures, sizes, f"run{index}", trainable)


@pytest.fixture(scope="module")
def fitted():
    truth = true_surface()
    records = list(records_of(truth, 42))
    rounds = []
    return truth, records, calibrate(truth.domains, records, INITIAL, lambda done, cost: rounds.append(cost)), rounds


def test_predictions_are_those_of_the_trainer():
    truth = true_surface()
    records = list(records_of(truth, 6))
    assert errors(truth.predict(records), records)["all"] < 1e-6


def test_parameters_come_back(fitted):
    truth, _, surface, rounds = fitted
    assert rounds == sorted(rounds, reverse=True)
    assert surface.slopes == pytest.approx(truth.slopes, abs=0.03)
    assert surface.exponents == pytest.approx(truth.exponents, abs=0.08)
    assert surface.transfer == pytest.approx(truth.transfer, abs=0.05)
    assert surface.recency == pytest.approx(truth.recency, abs=0.05)
    assert surface.repetition == pytest.approx(10, rel=0.15)
    assert surface.overfit == pytest.approx(0.8, rel=0.15)
    assert (surface.memory, surface.fall) == pytest.approx((0.3, 0.3), abs=0.08)


def test_held_out_runs_are_predicted(fitted):
    truth, records, surface, _ = fitted
    fresh = list(records_of(truth, 24, seed=1))
    verdict = judge(surface, records, fresh)
    assert verdict["rmse_nats"]["surface"]["end"] < 0.03 < 10 * 0.03 < verdict["rmse_nats"]["mean_of_runs"]["end"]
    assert verdict["in_sample_rmse_nats"]["all"] < 0.02


def test_runs_that_played_the_same_are_held_out_together():
    truth = true_surface()
    mixtures = np.random.default_rng(2).dirichlet(np.ones(3), 9)
    records = [
        record_of(truth, np.tile(row, (HORIZON, 1)), [1, 1, 1], f"{index}-{seed}")
        for index, row in enumerate(mixtures)
        for seed in range(2)
    ]
    parts = [split(records, part) for part in range(3)]
    for kept, out in parts:
        assert (len(kept), len(out)) == (12, 6)
        assert not {signature(one) for one in kept} & {signature(one) for one in out}
    assert sorted(record.name for _, out in parts for record in out) == [record.name for record in records]


def test_residuals_show_an_effect_that_the_surface_lacks(fitted):
    truth, _, surface, _ = fitted
    blind = replace(surface, overfit=0.0)
    groups = residuals(blind.predict(list(records_of(truth, 24, seed=1))), list(records_of(truth, 24, seed=1)))
    passes = {group["group"]: group["mean_nats"] for group in groups if group["by"] == "own passes"}
    assert passes["> 25"] < -0.2
    assert abs(passes["≤ 0.5"]) < 0.02


def test_ranges_of_the_family(fitted):
    found = against(replace(fitted[0], recency=np.array([0.01, 0.3, 0.6])), ProblemFamily(recency=(0.04, 0.35)))
    assert (found["recency"]["least"], found["recency"]["most"], found["recency"]["within"]) == (0.01, 0.6, 1)
    assert found["repetition"] == {
        "least": 10.0,
        "median": 10.0,
        "most": 10.0,
        "range": [6.0, 25.0],
        "within": 1,
        "of": 1,
    }
    assert found["transfer"]["of"] == 6
    assert found["junk"] == {"domains": []}


def test_a_target_that_nobody_measured_says_nothing():
    truth = true_surface()
    records = list(records_of(truth, 12))
    blind = [replace(record, losses=np.where([True, True, False], record.losses, np.nan)) for record in records]
    surface = calibrate(truth.domains, blind, INITIAL)
    assert surface.measured.tolist() == [True, True, False]
    assert errors(surface.predict(blind), blind)["all"] < 0.05
    assert against(surface, ProblemFamily())["exponents"]["of"] == 2


def test_what_cannot_be_fitted_is_refused():
    truth = true_surface()
    records = list(records_of(truth, 12))
    with pytest.raises(ConfigError, match="runs=1: must be at least 10"):
        calibrate(truth.domains, records[:1], INITIAL)
    with pytest.raises(ConfigError, match="must differ in their mixtures"):
        calibrate(truth.domains, records[:1] * 12, INITIAL)
    bad = replace(records[3], losses=np.full_like(records[3].losses, np.inf))
    with pytest.raises(ConfigError, match="run=run3: must have finite losses"):
        calibrate(truth.domains, [*records, bad], INITIAL)
    with pytest.raises(ConfigError, match="run=run0: must have 4 domains"):
        calibrate((*truth.domains, "d"), records, INITIAL)


def test_a_file_of_parameters_is_read_again(tmp_path):
    truth, file = true_surface(), tmp_path / "problem.json"
    write_json(file, {"format": FORMAT, "parameters": truth.record()})
    again = Calibrated.load(file)
    assert again.record() == truth.record()
    assert isinstance(again.transfer, np.ndarray)
    write_json(file, {"format": FORMAT, "parameters": {"domains": ["a"]}})
    with pytest.raises(DataError, match="must be a problem that"):
        Calibrated.load(file)
