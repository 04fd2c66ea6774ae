"""The dynamics fitted to synthetic runs predict runs that were held out; bad runs are refused."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.errors import ConfigError
from acodm_env.surrogate.calibration import (
    Course,
    Setting,
    _Fit,
    calibrate,
    intervals,
    judge,
    predict,
    rank_correlation,
    sequence_noise,
)
from acodm_env.surrogate.trainer import SurrogateTrainer

HORIZON, EVERY = 40, 4


def course_of(surface, weights, name="run", mixer="static", noise=0.0, seed=0):
    """What the surrogate's logs of a run under mixtures (T, K) would be."""
    trainer = SurrogateTrainer(surface, horizon=len(weights), noise=noise)
    trainer.reset(np.random.default_rng(seed))
    trainer.measure = frozenset({"losses"})
    initial, steps, losses, drawn, training = trainer.evaluate("test"), [], [], [], []
    for row in weights:
        stats = trainer.step(row)
        drawn.append(stats.counts)
        training.append(stats.losses)
        if stats.step % EVERY == 0:
            steps.append(stats.step)
            losses.append(trainer.evaluate("test"))
    return Course(
        name=name,
        mixer=mixer,
        weights=np.array(weights),
        steps=np.array(steps),
        losses=np.array(losses),
        initial=initial,
        drawn=np.array(drawn),
        training=np.array(training),
    )


def schedules(count, num_domains, seed):
    """Mixtures (T, K) that go from one corner of the simplex's inside to another, in steps of an evaluation."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        first, last = rng.dirichlet(np.full(num_domains, 1.5), 2)
        share = (np.arange(HORIZON) // EVERY / (HORIZON / EVERY - 1))[:, None]
        yield (1 - share) * first + share * last


def setting_of(surface):
    names = ("domains", "targets", "sizes_tokens", "run_tokens", "sequence_length", "initial_loss_nats", "objective")
    return Setting(**{name: getattr(surface, name) for name in names})


@pytest.fixture(scope="module")
def fitted(small):
    truth = small(pace=0.3)
    courses = [course_of(truth, rows, f"run{index}") for index, rows in enumerate(schedules(48, 3, 0))]
    rounds = []
    surface = calibrate(setting_of(truth), courses, lambda done, cost: rounds.append((done, cost)))
    return truth, courses, surface, rounds


def test_synthetic_runs_are_predicted_when_held_out(fitted):
    truth, courses, surface, rounds = fitted
    fresh = [course_of(truth, rows, f"fresh{index}") for index, rows in enumerate(schedules(10, 3, 1))]
    verdict = judge(surface, courses, fresh)
    assert verdict["error_nats"]["surface"] < 0.01
    assert verdict["error_at_end_nats"]["surface"] < 0.01
    assert verdict["error_nats"]["mean_of_runs"] > 0.05
    assert verdict["spearman_of_final_loss"] > 0.95
    assert [done for done, _ in rounds] == list(range(1, len(rounds) + 1))
    assert rounds[-1][1] < rounds[0][1]


def test_forgetting_that_shows_in_the_runs_is_found(fitted):
    assert fitted[2].forgetting[0] < fitted[2].forgetting[2]  # 0 and 2 in truth


def test_noise_of_a_sequence(small):
    truth = small(noise_nats=0.4, run_tokens=1e6)
    rows = np.full((2000, 3), 1 / 3)
    assert sequence_noise([course_of(truth, rows, noise=1.0)]) == pytest.approx(0.4, rel=0.03)
    assert sequence_noise([course_of(truth, rows, noise=0.0)]) < 0.01


def test_noise_needs_three_draws_in_a_row(small):
    rows = np.eye(3)[np.arange(40) % 3]
    assert sequence_noise([course_of(small(), rows, noise=1.0)]) == 0.0


def test_the_surface_plays_courses_as_the_trainer_does(small):
    for sizes, apart in (((1e9, 1e9, 1e9), 1e-9), ((300.0, 500.0, 1e9), 1e-4)):  # a first epoch ends within an interval
        truth = small(pace=0.3, sizes_tokens=sizes)
        courses = [course_of(truth, rows) for rows in schedules(3, 3, 2)]
        measured = np.stack([course.losses for course in courses])
        assert predict(truth, courses) == pytest.approx(measured, abs=apart)


def test_the_fit_plays_the_surface_that_it_leads_to(fitted):
    """Torch and numpy: the cost of the fitted values is that of the surface's own predictions."""
    _, courses, surface, rounds = fitted
    measured = np.stack([course.losses for course in courses])
    missed = np.abs(predict(surface, courses) - measured)
    huber = np.where(missed <= 0.02, missed**2 / 0.04, missed - 0.01).mean(1).sum()
    rates = np.array(surface.forgetting)
    prior = 0.03 * ((surface.law.usefulness**2).sum() + ((surface.law.exponents + 1) ** 2).sum() + rates.mean() ** 2)
    prior += 0.3 * ((rates - rates.mean()) ** 2).sum()
    assert huber + prior == pytest.approx(rounds[-1][1], rel=1e-9)


def test_gradient_by_differences(small):
    import torch

    truth = small(sizes_tokens=(300.0, 500.0, 1e9))
    courses = [course_of(truth, rows) for rows in schedules(4, 3, 3)]
    fit = _Fit(setting_of(truth), *intervals(courses), np.stack([course.losses for course in courses]))
    fit.cost().backward()
    for values in fit.raw.values():
        flat, slope = values.detach().reshape(-1), values.grad.reshape(-1)[0].item()
        with torch.no_grad():
            ends = []
            for change in (1e-6, -2e-6):
                flat[0] += change
                ends.append(fit.cost().item())
            flat[0] += 1e-6
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_intervals_by_hand(small):
    rows = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=float)
    course = replace(course_of(small(), rows), steps=np.array([2, 4]), losses=np.ones((2, 2)))
    shares, durations, times = intervals([course])
    assert shares.tolist() == [[[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]]
    assert durations.tolist() == [0.5, 0.5]
    assert times.tolist() == [0.5, 1.0]


def test_errors_by_hand(small):
    surface = small()
    course = course_of(surface, np.full((8, 3), 1 / 3), mixer="uniform")  # evaluated twice
    higher = replace(course, losses=course.losses + np.array([[0.1], [0.3]]))
    verdict = judge(surface, [course], [higher, higher])
    assert verdict["error_nats"] == pytest.approx({"surface": 0.2, "mean_of_runs": 0.2, "uniform": 0.2})
    assert verdict["error_at_end_nats"]["surface"] == pytest.approx(0.3)
    assert verdict["error_by_time_nats"] == [0.1, 0.3]
    assert verdict["spearman_of_final_loss"] is None  # two runs have no ranks to speak of
    assert "uniform" not in judge(surface, [replace(course, mixer="ado")], [higher])["error_nats"]


def test_rank_correlation_by_hand():
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([1.0, 9, 4])) == pytest.approx(0.5)
    assert rank_correlation(np.array([1.0, 1, 1]), np.array([1.0, 2, 3])) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda course: None, "runs=9: must be at least 10"),
        (lambda course: {"weights": course.weights[:-1]}, r"run=odd: must have 8 steps and 3 domains.*\(7, 3\)"),
        (lambda course: {"losses": course.losses[:, :1]}, "run=odd: must have the targets and evaluations"),
        (lambda course: {"steps": course.steps - 1}, "run=odd: must have the targets and evaluations"),
        (lambda course: {"losses": course.losses * np.nan}, "run=odd: must have finite losses"),
    ],
)
def test_runs_that_cannot_be_fitted_together_are_refused(small, change, message):
    surface = small()
    course = course_of(surface, np.full((8, 3), 1 / 3))
    changes = change(course)
    odd = [] if changes is None else [replace(course, name="odd", **changes)]
    with pytest.raises(ConfigError, match=message):
        calibrate(setting_of(surface), [course] * 9 + odd)


def test_runs_without_an_evaluation_at_the_end_are_refused(small):
    surface = small()
    course = replace(course_of(surface, np.full((8, 3), 1 / 3)), steps=np.array([4, 7]))
    with pytest.raises(ConfigError, match="must be evaluated at its end"):
        calibrate(setting_of(surface), [course] * 10)


def test_importing_the_calibration_imports_no_torch():
    code = "import sys, acodm_env.surrogate.calibration; print('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
