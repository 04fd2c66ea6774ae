"""Laws on surfaces of their own form, on too few runs, and on RegMix's measured runs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from acodm_env.errors import ConfigError
from acodm_env.laws import LAWS, LinearLaw, LogLinearLaw, MixingLaw, PowerLaw, _minimise, fit_law

DATA = Path(__file__).parents[2] / "../shared/data/regmix"
CURVED = ("mixing", "power")


def mixtures(count, num_domains=4, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(num_domains, 0.7), count)


# --- predictions by hand ------------------------------------------------------------------------------------


def test_predictions_by_hand():
    weights = np.array([[0.25, 0.75]])
    linear = LinearLaw(np.array([[-2.0], [4.0]]), np.array([3.0]))
    assert linear.predict(weights) == pytest.approx(np.array([[3 - 0.5 + 3.0]]))
    logs = LogLinearLaw(np.array([[0.0], [0.0], [-1.0], [0.0]]), np.array([3.0]))
    assert logs.predict(np.array([[0.999, 0.001]])) == pytest.approx(np.array([[3.0]]))
    assert logs.predict(np.array([[0.0, 1.0]])) == pytest.approx(np.array([[3 + np.log(1000)]]))
    mixing = MixingLaw(np.array([[np.log(2.0) - 4.0, np.log(2.0)]]), np.array([1.5]))
    assert mixing.predict(weights) == pytest.approx(np.array([[1.5 + 2 * np.exp(-1.0)]]))
    power = PowerLaw(np.array([[np.log(0.9999), -100.0]]), np.array([np.log(3.0)]), np.array([np.log(0.5)]), np.ones(1))
    assert power.predict(np.array([[1.0, 0.0], [0.0, 1.0]])) == pytest.approx(np.array([[4.0], [1 + 3 * 100]]))


# --- a surface of a law's own form is recovered ------------------------------------------------------------


def truths():
    own = np.eye(4) * 3.0
    return {
        "linear": LinearLaw(-own[:, :3] + 0.2, np.array([3.0, 3.5, 4.0])),
        "log-linear": LogLinearLaw(np.vstack([-own, -0.1 * np.eye(4)])[:, :3], np.array([3.0, 3.5, 4.0])),
        "mixing": MixingLaw(0.3 - own[:3], np.array([1.0, 1.5, 2.0])),
        "power": PowerLaw(own[:3] - 3, np.zeros(3), np.full(3, -1.0), np.array([1.0, 1.5, 2.0])),
    }


@pytest.mark.parametrize("name", ["linear", "log-linear", "mixing", "power"])
def test_a_law_recovers_a_surface_of_its_form(name):
    truth = truths()[name]
    fitted = fit_law(name, mixtures(64), truth.predict(mixtures(64)))
    fresh = mixtures(200, seed=1)
    assert np.abs(fitted.predict(fresh) - truth.predict(fresh)).mean() < 0.01


@pytest.mark.parametrize("name", ["linear", "log-linear", "mixing", "power"])
def test_targets_are_fitted_each_on_its_own(name):
    weights = mixtures(40)
    losses = truths()["power"].predict(weights)
    both = fit_law(name, weights, losses).predict(weights)
    alone = fit_law(name, weights, losses[:, 1:2]).predict(weights)
    assert both[:, 1:2] == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("name", CURVED)
def test_one_spoilt_run_does_not_move_a_huber_fit(name):
    weights, truth = mixtures(64), truths()[name]
    losses = truth.predict(weights)
    losses[5] += 3.0
    assert np.abs(fit_law(name, weights, losses).predict(weights) - truth.predict(weights)).mean() < 0.02


# --- few runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LAWS))
def test_where_the_mixture_does_nothing_the_mean_is_predicted(name):
    if name == "lightgbm":
        pytest.importorskip("lightgbm")
    law = fit_law(name, mixtures(24, 8), np.full((24, 2), 3.0))
    corners = np.vstack([np.eye(8), np.full((1, 8), 1 / 8)])
    assert law.predict(corners) == pytest.approx(np.full((9, 2), 3.0), abs=0.02)


@pytest.mark.parametrize("name", ["linear", "log-linear", "mixing", "power"])
def test_fewer_runs_than_parameters_stay_sane(name):
    weights = mixtures(10, 11)
    noise = np.random.default_rng(2).normal(0, 0.02, (10, 11))
    losses = 2 + 0.3 * (weights + 0.05) ** -0.5 + noise
    predicted = fit_law(name, weights, losses).predict(mixtures(500, 11, seed=3))
    assert np.isfinite(predicted).all()
    assert predicted.mean() == pytest.approx(losses.mean(), abs=0.3)
    assert predicted.min() > 0
    assert predicted.max() < 3 * losses.max()


@pytest.mark.parametrize("name", CURVED)
def test_few_noisy_runs_are_enough_for_a_good_mixture(name):
    """32 runs with noise of 0.02 nats rank fresh mixtures of 8 domains as the truth does."""
    from scipy.stats import spearmanr

    def truth(weights):
        return 2 + np.linspace(0.2, 0.6, 8) * (weights + 0.05) ** -0.5

    weights = np.random.default_rng(0).dirichlet(np.full(8, 1.0), 32)
    losses = truth(weights) + np.random.default_rng(1).normal(0, 0.02, (32, 8))
    fresh = np.random.default_rng(2).dirichlet(np.full(8, 1.0), 300)
    predicted = fit_law(name, weights, losses).predict(fresh).mean(1)
    assert spearmanr(predicted, truth(fresh).mean(1))[0] > 0.9


def test_a_fit_is_deterministic():
    weights = mixtures(24, 8)
    losses = 2 + 0.3 * (weights + 0.05) ** -0.5
    for name in ("linear", "log-linear", "mixing", "power"):
        first, second = (fit_law(name, weights, losses).predict(weights) for _ in range(2))
        assert (first == second).all()


def test_the_minimiser_solves_many_problems_at_once_and_takes_the_better_start():
    """Per target a: (x² − a²)² + 0.1·x for x from ±1, whose lower well is the negative one; and a narrow valley."""
    targets = np.array([[0.5], [2.0]])

    def wells(x, goals):
        return ((x**2 - goals**2) ** 2 + 0.1 * x)[:, 0], 4 * x * (x**2 - goals**2) + 0.1

    found = _minimise(wells, [np.ones((2, 1)), -np.ones((2, 1))], targets)[:, 0]
    assert (found < 0).all()
    assert 4 * found * (found**2 - targets[:, 0] ** 2) == pytest.approx([-0.1, -0.1], abs=1e-3)

    def valley(x, goals):
        one, other = x.T
        bend = other - one**2
        gradients = np.column_stack([-2 * (1 - one) - 400 * one * bend, 200 * bend])
        return (1 - one) ** 2 + 100 * bend**2, gradients

    assert _minimise(valley, [np.array([[-1.2, 1.0]])], np.zeros((1, 1))) == pytest.approx(np.ones((1, 2)), abs=1e-3)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights", "losses", "message"),
    [
        ("powr", mixtures(4), np.ones((4, 2)), "law='powr'.*did you mean 'power'"),
        ("power", mixtures(4), np.ones((3, 2)), r"losses=\(3, 2\)"),
        ("power", mixtures(4), np.ones(4), r"losses=\(4,\)"),
        ("power", mixtures(1), np.ones((1, 2)), "N at least 2"),
        ("power", mixtures(4), np.full((4, 2), np.nan), "diverged"),
        ("mixing", mixtures(4), np.full((4, 2), -1.0), "positive"),
    ],
)
def test_what_cannot_be_fitted_is_refused(name, weights, losses, message):
    with pytest.raises(ConfigError, match=message):
        fit_law(name, weights, losses)


def test_without_lightgbm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ConfigError, match=r"pip install 'acodm\[lightgbm\]'"):
        fit_law("lightgbm", mixtures(30), np.ones((30, 2)))


def test_importing_the_laws_imports_no_scipy():
    code = "import sys, acodm_env.laws; print('scipy' in sys.modules or 'lightgbm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# --- RegMix's runs -----------------------------------------------------------------------------------------


def regmix(mixture, losses):
    """Weights (N, 17), rows summing to 1, and losses (N, 13) of the runs that have both."""
    if not DATA.is_dir():
        pytest.skip(f"no measured runs in {DATA}")
    tables = [np.genfromtxt(DATA / name, delimiter=",", skip_header=1) for name in (mixture, losses)]
    index, rows, others = np.intersect1d(tables[0][:, 0], tables[1][:, 0], return_indices=True)
    assert len(index)
    weights = tables[0][rows, 1:]
    return weights / weights.sum(1, keepdims=True), tables[1][others, 1:]


HELD_OUT = {scale: (f"test_mixture_{scale}.csv", f"test_pile_loss_{scale}.csv") for scale in ("1m", "60m", "1B")}


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("linear", (0.82, 0.82, 0.70)),
        ("log-linear", (0.965, 0.96, 0.91)),
        ("mixing", (0.97, 0.96, 0.93)),
        ("power", (0.975, 0.965, 0.935)),
    ],
)
def test_rank_correlation_on_held_out_runs_of_regmix(name, least):
    from scipy.stats import spearmanr

    law = fit_law(name, *regmix("train_mixture_1m.csv", "train_pile_loss_1m.csv"))
    for scale, bound in zip(HELD_OUT, least, strict=True):
        weights, losses = regmix(*HELD_OUT[scale])
        predicted = law.predict(weights)
        ranks = [spearmanr(one, other)[0] for one, other in zip(predicted.T, losses.T, strict=True)]
        assert np.mean(ranks) >= bound, f"{name} at {scale}: {np.mean(ranks):.4f}"


@pytest.mark.slow
def test_lightgbm_on_the_runs_of_regmix():
    pytest.importorskip("lightgbm")
    from scipy.stats import spearmanr

    law = fit_law("lightgbm", *regmix("train_mixture_1m.csv", "train_pile_loss_1m.csv"))
    weights, losses = regmix(*HELD_OUT["1m"])
    ranks = [spearmanr(one, other)[0] for one, other in zip(law.predict(weights).T, losses.T, strict=True)]
    assert np.mean(ranks) >= 0.98
