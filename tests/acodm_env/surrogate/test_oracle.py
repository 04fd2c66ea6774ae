"""The optima: against a closed form, against brute force, and consistent with what the environment plays."""

from dataclasses import replace

import numpy as np
import pytest

from acodm_env.laws import PowerLaw
from acodm_env.surrogate.draws import Family
from acodm_env.surrogate.oracle import best_schedule, best_static, final_objective
from acodm_env.surrogate.surface import Surface
from acodm_env.surrogate.trainer import SurrogateTrainer


def separate(forgetting=(0.0, 0.0), exponents=(0.0, 0.0)):
    """Two domains that help only their own target: L_i = 1 + (1e-4 + w_i)^(−e^b_i)."""
    return Surface(
        domains=("a", "b"),
        targets=("a", "b"),
        law=PowerLaw(np.array([[0.0, -30.0], [-30.0, 0.0]]), np.zeros(2), np.array(exponents), np.ones(2)),
        sizes_tokens=(1e12, 1e12),
        run_tokens=1e6,
        initial_loss_nats=9.0,
        forgetting=forgetting,
    )


def runs_on(surface, horizon=10, **options):
    return SurrogateTrainer(surface, horizon=horizon, noise=0.0, **options)


def test_symmetric_domains_share_evenly():
    optimum = best_static(runs_on(separate()), iterations=150)
    assert optimum.weights == pytest.approx([0.5, 0.5], abs=1e-3)
    assert float(optimum.objective) == pytest.approx(1 + 1 / 0.5001, rel=1e-6)


def test_the_closed_form_of_weighted_targets():
    """min Σ ω_i/(ε + w_i) has w_i + ε ∝ √ω_i."""
    surface = replace(separate(), objective=(0.8, 0.2))
    root = np.sqrt([0.8, 0.2])
    expected = root / root.sum() * (1 + 2e-4) - 1e-4
    assert best_static(runs_on(surface), iterations=200).weights == pytest.approx(expected, abs=2e-3)


def test_without_forgetting_the_order_does_not_matter():
    runs = runs_on(separate())
    assert float(best_schedule(runs, 150).objective) == pytest.approx(float(best_static(runs, 150).objective), abs=1e-5)


def test_what_is_forgotten_comes_late():
    runs = runs_on(separate(forgetting=(0.0, 3.0)))
    schedule = best_schedule(runs, 300)
    assert float(schedule.objective) < float(best_static(runs, 300).objective) - 0.05
    assert schedule.weights[:3, 0].min() > 0.95
    assert schedule.weights[-3:, 1].min() > 0.95


def test_no_mixture_of_a_grid_is_better():
    surface = Surface.load("regmix-1m")
    runs = runs_on(surface, horizon=8)
    best = float(best_static(runs, 200).objective)
    tried = np.random.default_rng(0).dirichlet(np.full(17, 0.7), 400)
    assert best < min(float(final_objective(runs, mixture)) for mixture in tried)
    assert float(best_schedule(runs, 200).objective) < best


def test_a_shared_mixture_is_best_on_average_and_never_better_than_each_ones_own():
    family = Family(around=Surface.load("regmix-1m"))
    surfaces = [family.draw(np.random.default_rng(seed)) for seed in range(4)]
    runs = runs_on(surfaces, batch=(4,))
    own, shared = best_static(runs, 150), best_static(runs, 150, shared=True)
    assert shared.weights.shape == (17,)
    assert (own.objective <= shared.objective + 1e-4).all()
    uniform = final_objective(runs, np.full(17, 1 / 17))
    assert shared.objective.mean() < uniform.mean()


def test_padding_gets_nothing():
    family = Family(around=Surface.load("regmix-1m"), num_domains=(3, 6))
    runs = runs_on(family, batch=(5,))
    runs.reset(np.random.default_rng(0))
    optimum = best_static(runs, 50)
    assert (optimum.weights[runs.mask == 0] == 0).all()
    assert optimum.weights.sum(-1) == pytest.approx(1.0)


def test_the_runs_themselves_are_left_alone():
    runs = runs_on(separate())
    runs.reset(np.random.default_rng(0))
    runs.step(np.array([0.3, 0.7]))
    before = runs.evaluate("test")
    best_static(runs, 5)
    assert runs.steps_done == 1
    np.testing.assert_array_equal(runs.evaluate("test"), before)
