"""Mixtures by regression: the same runs for all, near the best mixture of a known surface, within caps."""

import json
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.agents.baselines.regression import minimise_mixture
from acodm_env.errors import ConfigError
from acodm_env.files import read_state, write_state
from acodm_env.laws import MixingLaw
from acodm_env.trainer import RunResult, drive
from toy import ToyTrainer

FAMILY = ("regmix", "mixing-law", "power-law", "log-linear")
SIMULATED = FAMILY[:3]
DOMAINS = ("code", "prose", "maths", "law")
INFO = replace(
    ToyTrainer((0.25,) * 4, horizon=100).info,
    domains=DOMAINS,
    targets=DOMAINS,
    sizes_tokens=(40_000, 30_000, 20_000, 10_000),
)  # 100 steps × 64 sequences × 5 tokens = 32,000 tokens
GAINS = np.array([0.1, 0.2, 0.4, 0.8])


def surface(weights):
    """Losses (N, 4) that fall with a domain's own weight: an interior optimum, w ≈ GAINS^(1/2) less 0.1."""
    return 2 + GAINS / (weights + 0.1)


def best_of(objective=(0.25,) * 4):
    """Its best mixture, by Lagrange: objective·GAINS/(w + 0.1)² is equal for all."""
    root = np.sqrt(np.array(objective) * GAINS)
    return root / root.sum() * 1.4 - 0.1


def ran(requests, diverged=(), noise=0.0):
    """What the requested runs would show."""
    rng, results = np.random.default_rng(5), {}
    for request in requests:
        weights = np.array(list(request.options["weights"].values()))
        losses = surface(weights) + rng.normal(0, noise, 4)
        final = np.full(4, np.nan) if request.name in diverged else losses
        results[request.name] = RunResult(mixture=weights, initial_losses=np.full(4, 5.0), final_losses=final)
    return results


def prepared(name, info=INFO, diverged=(), noise=0.0, **options):
    if name in SIMULATED:
        options.setdefault("simulations", 20_000)
    mixer = make_mixer(name, **options)
    mixer.prepare(ran(mixer.preparation(info), diverged, noise))
    return mixer


def started(name, info=INFO, **settings):
    mixer = prepared(name, info, **settings)
    mixer.start(info)
    return mixer


# --- the runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_the_whole_family_asks_for_the_same_runs(name):
    requests = make_mixer(name).preparation(INFO)
    assert requests == make_mixer("regmix").preparation(INFO)
    assert [request.name for request in requests] == [f"run-{i:02d}" for i in range(32)]
    for request in requests:
        assert (request.mixer, request.steps, request.reference, request.keep_model) == ("static", 20, None, False)
        assert tuple(request.options["weights"]) == DOMAINS
        values = list(request.options["weights"].values())
        assert sum(values) == pytest.approx(1.0, abs=3e-6)
        assert values == [round(value, 6) for value in values]
        json.dumps(request.options, allow_nan=False)


def test_runs_steps_and_seed_are_options():
    plain = make_mixer("regmix").preparation(INFO)
    other = make_mixer("regmix", runs=40, steps_frac=0.001, seed=3).preparation(INFO)
    assert len(other) == 40
    assert {request.steps for request in other} == {1}
    assert other[0].options != plain[0].options
    assert make_mixer("power-law", seed=3).preparation(INFO) == make_mixer("log-linear", seed=3).preparation(INFO)


def test_requests_do_not_depend_on_the_runs_own_seed():
    assert make_mixer("regmix").preparation(replace(INFO, seed=9)) == make_mixer("regmix").preparation(INFO)


@pytest.mark.parametrize(
    ("prior", "centre"),
    [
        ("uniform", [0.25] * 4),
        ("proportional", [0.4, 0.3, 0.2, 0.1]),
        ("square-root", [0.3254, 0.2818, 0.2301, 0.1627]),
    ],
)
def test_mixtures_are_drawn_around_the_prior(prior, centre):
    requests = make_mixer("regmix", runs=2000, prior=prior).preparation(INFO)
    mixtures = np.array([list(request.options["weights"].values()) for request in requests])
    assert mixtures.mean(0) == pytest.approx(centre, abs=0.02)


def test_strength_pulls_mixtures_to_the_prior_and_tiny_ones_to_corners():
    def largest(low, high):
        requests = make_mixer("regmix", runs=200, min_strength=low, max_strength=high).preparation(INFO)
        return np.mean([max(request.options["weights"].values()) for request in requests])

    assert largest(100, 100) < 0.35
    assert largest(1e-4, 1e-4) > 0.999  # and no NaN: every plain gamma draw would be 0


# --- what is found -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near", "lost"), [("regmix", 0.35, 0.5), ("mixing-law", 0.15, 0.1), ("power-law", 0.1, 0.1)]
)
def test_the_best_mixture_of_a_known_surface_is_found(name, near, lost):
    """Near it, and with little of uniform's distance in loss left; RegMix's ln(w + 0.001) is too steep for this one."""
    weights = started(name).weights()
    assert np.abs(weights - best_of()).sum() < near
    mean = surface(np.array([weights, np.full(4, 0.25), best_of()])).mean(1)
    assert mean[0] - mean[2] < lost * (mean[1] - mean[2])


@pytest.mark.parametrize("name", ["mixing-law", "power-law"])
def test_noise_of_two_hundredths_of_a_nat_is_borne(name):
    weights = started(name, noise=0.02).weights()
    assert np.abs(weights - best_of()).sum() < 0.3


def test_without_a_penalty_olmix_finds_it_too():
    assert np.abs(started("log-linear", kl=0.0).weights() - best_of()).sum() < 0.15


def test_a_strong_penalty_holds_olmix_at_its_prior():
    assert started("log-linear", kl=1e4).weights() == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-3)
    assert started("log-linear", kl=1e4, kl_prior="uniform").weights() == pytest.approx([0.25] * 4, abs=1e-3)


@pytest.mark.parametrize("name", FAMILY)
def test_the_weights_of_the_objective_are_respected(name):
    objective = (0.7, 0.1, 0.1, 0.1)
    options = {"kl": 0.0} if name == "log-linear" else {}
    weights = started(name, info=replace(INFO, objective=objective), **options).weights()
    assert np.abs(weights - best_of(objective)).sum() < 0.2
    assert weights[0] > started(name, **options).weights()[0] + 0.1


def test_the_targets_need_not_be_the_domains():
    info = replace(INFO, targets=("exam",), objective=())
    mixer = make_mixer("power-law", simulations=20_000)
    requests = mixer.preparation(info)
    exam = {name: replace(run, final_losses=run.final_losses[3:]) for name, run in ran(requests).items()}
    mixer.prepare(exam)
    mixer.start(info)
    assert mixer.weights()[3] > 0.7  # only the last domain helps


@pytest.mark.parametrize(("name", "within"), [("mixing-law", 0.02), ("power-law", 0.02), ("log-linear", 0.02)])
def test_mean_perplexity_is_minimised_where_it_is_asked_for(name, within):
    """A surface with a large loss that falls slowly: the mean loss leaves it alone, perplexity does not."""
    levels, gains = np.array([2.0, 2.0, 2.0, 4.0]), np.array([0.4, 0.4, 0.4, 0.1])

    def judged(weights):
        return np.log(np.exp(levels + gains / (weights + 0.1)).mean(-1))

    info = replace(INFO, metric="perplexity")
    options = {"kl": 0.0} if name == "log-linear" else {"simulations": 20_000}

    def found(info):
        mixer = make_mixer(name, **options)
        results = ran(mixer.preparation(info))
        mixer.prepare({k: replace(r, final_losses=levels + gains / (r.mixture + 0.1)) for k, r in results.items()})
        mixer.start(info)
        return mixer.weights()

    plain, aimed = found(INFO), found(info)
    assert aimed[3] > plain[3] + 0.1
    best = judged(np.random.default_rng(0).dirichlet(np.ones(4), 50_000)).min()
    assert judged(aimed) < best + within < judged(plain)


@pytest.mark.parametrize("name", FAMILY)
def test_fits_and_choices_are_deterministic(name):
    assert (started(name).weights() == started(name).weights()).all()


def test_linear_regression_goes_to_a_corner_of_what_was_sampled():
    """Why "linear" is not the default: it knows no diminishing returns."""
    weights = started("regmix", regressor="linear").weights()
    assert weights[3] > 0.8


def test_lightgbm_cannot_split_a_few_runs():
    pytest.importorskip("lightgbm")
    assert started("regmix", regressor="lightgbm").weights() == pytest.approx([0.25] * 4, abs=0.1)


# --- Olmix: the cap and the solver -------------------------------------------------------------------------


def test_the_epoch_cap_is_respected():
    """32,000 tokens of which at most 1 × 10,000 are law: w ≤ 0.3125, while 0.447 would be best."""
    weights = started("log-linear", kl=0.0, max_epochs=1.0).weights()
    assert best_of()[3] == pytest.approx(0.447, abs=1e-3)
    assert weights[3] == pytest.approx(0.3125)
    assert weights.sum() == pytest.approx(1.0)


def test_a_cap_that_cannot_be_met_is_refused_before_any_run():
    mixer = make_mixer("log-linear", max_epochs=0.25)
    with pytest.raises(ConfigError, match=r"max_epochs=0\.25: must be at least 0\.32; 100000 tokens.*32000"):
        mixer.preparation(INFO)
    assert started("log-linear", max_epochs=0.32).weights() == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_the_solver_meets_the_optimum_by_hand():
    """One target of e^(−w₁ + w₂)… with kl → only the penalty: w ∝ prior; capped: the rest is shared by the prior."""
    flat = MixingLaw(np.zeros((1, 3)), np.zeros(1))
    prior, one = np.array([0.5, 0.3, 0.2]), np.ones(1)
    assert minimise_mixture(flat, one, prior, 1.0, np.ones(3)) == pytest.approx(prior, abs=1e-5)
    caps = np.array([0.2, 1.0, 1.0])
    assert minimise_mixture(flat, one, prior, 1.0, caps) == pytest.approx([0.2, 0.48, 0.32], abs=1e-5)
    helpful = MixingLaw(np.array([[-1.0, 0.0, 0.0]]), np.zeros(1))
    assert minimise_mixture(helpful, one, prior, 0.0, caps)[0] == pytest.approx(0.2)


def test_no_mixture_at_random_beats_the_solver():
    rng = np.random.default_rng(0)
    for seed in range(20):
        law = MixingLaw(rng.normal(0, 5, (6, 8)), np.zeros(6))
        prior, caps = rng.dirichlet(np.ones(8)), np.minimum(rng.dirichlet(np.ones(8)) * 2, 1)
        if caps.sum() < 1:
            continue
        best = minimise_mixture(law, np.full(6, 1 / 6), prior, 0.1, caps)
        assert (best <= caps + 1e-9).all()
        others = rng.dirichlet(np.full(8, 0.5), 5000)
        others = np.vstack([others[(others <= caps).all(1)], best])
        values = law.predict(others).mean(1) + 0.1 * (others * np.log(np.maximum(others, 1e-300) / prior)).sum(1)
        assert values.argmin() == len(others) - 1, seed


def test_no_mixture_at_random_beats_the_solver_in_perplexity():
    rng = np.random.default_rng(0)
    others = rng.dirichlet(np.full(5, 0.7), 20_000)
    for _ in range(5):
        law = MixingLaw(rng.normal(0, 2, (4, 5)), rng.uniform(0, 3, 4))
        objective, prior = rng.dirichlet(np.ones(4)), np.full(5, 0.2)
        best = minimise_mixture(law, objective, prior, 0.1, np.ones(5), perplexity=True)
        mixtures = np.vstack([others, best])
        penalty = (mixtures * np.log(np.maximum(mixtures, 1e-300) / prior)).sum(1)
        values = np.log(np.exp(law.predict(mixtures)) @ objective) + 0.1 * penalty
        assert values[-1] <= values.min() + 1e-9


def test_an_empty_domain_gets_nothing():
    info = replace(INFO, sizes_tokens=(40_000, 30_000, 30_000, 0))
    assert started("log-linear", info=info).weights()[3] < 1e-9


# --- runs that failed, and use without runs ----------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_diverged_runs_are_dropped(name):
    lost = {f"run-{i:02d}" for i in range(0, 32, 4)}
    mixer = make_mixer(name, **({} if name == "log-linear" else {"simulations": 20_000}))
    kept = {run: result for run, result in ran(mixer.preparation(INFO)).items() if run not in lost}
    mixer.prepare(kept)
    mixer.start(INFO)
    assert (started(name, diverged=lost).weights() == mixer.weights()).all()
    assert (started(name).weights() != mixer.weights()).any()


def test_too_few_runs_are_refused():
    with pytest.raises(ConfigError, match="at least 6 finished runs, and only 5 of 32"):
        prepared("power-law", diverged={f"run-{i:02d}" for i in range(27)})
    assert started("power-law", diverged={f"run-{i:02d}" for i in range(26)}).weights().sum() == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="runs=5: must be at least 6, two more than the 4 domains"):
        make_mixer("regmix", runs=5).preparation(INFO)


@pytest.mark.parametrize("name", FAMILY)
def test_without_results_it_does_not_start(name):
    mixer = make_mixer(name)
    mixer.preparation(INFO)
    with pytest.raises(ConfigError, match=f"mixer={name}: needs its preparatory runs first.*acodm benchmark"):
        mixer.start(INFO)


def test_prepared_for_other_domains_it_does_not_start():
    with pytest.raises(ConfigError, match="prepared for other domains"):
        prepared("power-law").start(replace(INFO, domains=("a", "b", "c", "d")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": 2}, "runs=2: must be a whole number of at least 3"),
        ({"runs": 8.5}, "runs=8.5"),
        ({"steps_frac": 0}, "steps_frac=0: "),
        ({"steps_frac": 1.5}, r"steps_frac=1\.5"),
        ({"seed": -1}, "seed=-1"),
        ({"prior": "unifrom"}, "prior='unifrom'.*did you mean 'uniform'"),
        ({"min_strength": 0}, "min_strength=0, max_strength"),
        ({"min_strength": 6}, "min_strength=6"),
        ({"max_strength": float("nan")}, "max_strength=nan"),
        ({"simulations": 100}, "top=128: must be at most simulations=100"),
        ({"top": 0}, "top=0"),
        ({"regressor": "forest"}, "regressor='forest': must be one of"),
        ({"runz": 3}, "mixer=regmix, runz=3"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        make_mixer("regmix", **options)


@pytest.mark.parametrize("options", [{"kl": -1}, {"kl": float("nan")}, {"max_epochs": 0}, {"kl_prior": "even"}])
def test_bad_options_of_olmix_are_refused_by_name(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
        make_mixer("log-linear", **options)


# --- a mixer like the others -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_it_holds_its_mixture_and_its_state_is_exact(name, tmp_path):
    trainer, mixer = ToyTrainer((0.25,) * 4, horizon=20, diverge_at=12), prepared(name)
    trainer.info = INFO
    trainer.reset(np.random.default_rng(0))
    mixer.start(INFO)
    chosen = mixer.weights()
    history = list(drive(trainer, mixer, 20))
    assert len(history) == 12  # the diverged step included
    assert all((stats.requested == chosen).all() for stats in history)
    mixer.weights()[:] = 0.0
    write_state(tmp_path / "state.safetensors", mixer.state_dict())
    other = prepared(name, seed=7)
    other.start(INFO)
    assert (other.weights() != chosen).any()
    other.load_state_dict(read_state(tmp_path / "state.safetensors"))
    assert (other.weights() == chosen).all()


def test_two_instances_do_not_influence_each_other():
    first = started("power-law")
    before = first.weights()
    started("power-law", info=replace(INFO, objective=(1.0, 0.0, 0.0, 0.0)))
    first.start(INFO)
    assert (first.weights() == before).all()
