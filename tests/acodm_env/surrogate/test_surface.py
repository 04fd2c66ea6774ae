import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acodm_env.errors import ConfigError, DataError
from acodm_env.surrogate.dynamics import worth
from acodm_env.surrogate.surface import Surface, add_noise_domain
from acodm_env.surrogate.trainer import SurrogateTrainer

SHIPPED = Surface.load("regmix-1m")


def final_losses(surface, weights, horizon=10):
    """Held-out losses (horizon + 1, M) along a static run."""
    runs = SurrogateTrainer(surface, horizon=horizon, noise=0.0)
    runs.reset(np.random.default_rng(0))
    trace = [runs.evaluate("test")]
    for _ in range(horizon):
        runs.step(weights)
        trace.append(runs.evaluate("test"))
    return np.array(trace)


# --- the shipped surface -----------------------------------------------------------------------------------


def test_the_shipped_surface_has_17_domains_and_13_targets():
    assert (len(SHIPPED.domains), len(SHIPPED.targets)) == (17, 13)
    assert set(SHIPPED.targets) < set(SHIPPED.domains)
    assert set(SHIPPED.domains) - set(SHIPPED.targets) == {"nih_exporter", "philpapers", "enron_emails", "europarl"}
    assert SHIPPED.repetition == 15.4
    assert 9 < SHIPPED.initial_loss_nats < 12
    np.testing.assert_allclose(final_losses(SHIPPED, np.full(17, 1 / 17))[0], SHIPPED.initial_loss_nats)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 40]), st.floats(0.05, 5))
def test_a_static_mixture_ends_at_the_losses_of_the_law(seed, horizon, spread):
    """Forgetting on, noise and repetition off, mixtures from corners to even."""
    weights = np.random.default_rng(seed).dirichlet(np.full(17, spread))
    reached = final_losses(SHIPPED.without_repetition(), weights, horizon)[-1]
    np.testing.assert_allclose(reached, SHIPPED.law.predict(weights[None])[0], atol=1e-6)


@pytest.mark.parametrize("weights", [np.eye(17)[0], np.eye(17)[16], np.full(17, 1 / 17)])
def test_corners_and_uniform_end_at_the_losses_of_the_law(weights):
    reached = final_losses(SHIPPED.without_repetition(), weights, 7)[-1]
    np.testing.assert_allclose(reached, SHIPPED.law.predict(weights[None])[0], atol=1e-6)


def test_pace_and_noise_leave_the_end_of_a_static_run_alone():
    weights = np.random.default_rng(0).dirichlet(np.ones(17))
    surface = replace(SHIPPED.without_repetition(), pace=1.5)
    runs = SurrogateTrainer(surface, horizon=12, noise=1.0)
    runs.reset(np.random.default_rng(0))
    runs.measure = frozenset({"losses"})
    for _ in range(12):
        runs.step(weights)
    np.testing.assert_allclose(runs.evaluate("test"), SHIPPED.law.predict(weights[None])[0], atol=1e-6)


# --- monotone, repetition ----------------------------------------------------------------------------------

mixtures = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(lambda w: np.array(w) / sum(w))


@settings(deadline=None, max_examples=40)
@given(mixtures, st.floats(0, 1), st.sampled_from([(1, 0), (2, 0), (2, 1)]), st.integers(0, 1))
def test_a_share_moved_to_a_more_useful_domain_never_raises_the_loss(small, weights, part, pair, target):
    helps = small().parameters().helps[target]
    worse, better = sorted(pair, key=lambda domain: helps[domain])
    moved = weights.copy()
    moved[[worse, better]] += part * weights[worse] * np.array([-1, 1])
    before, after = (final_losses(small(), mixture)[-1, target] for mixture in (weights, moved))
    assert after <= before + 1e-12


@settings(deadline=None, max_examples=40)
@given(mixtures, st.integers(1, 30))
def test_losses_fall_along_a_static_run_and_start_at_those_of_an_untrained_model(small, weights, horizon):
    """The smallest help of any domain is more than u₀, so the mixture does not matter; no forgetting."""
    trace = final_losses(small(forgetting=(0.0,) * 3), weights, horizon)
    np.testing.assert_allclose(trace[0], 6.0)
    assert (np.diff(trace, axis=0) < 0).all()


@settings(deadline=None, max_examples=40)
@given(mixtures, st.integers(0, 2), st.floats(0.01, 1.5))
def test_a_small_domain_ends_higher_if_it_is_repeated_and_equal_if_it_is_not(small, weights, domain, size):
    sizes = [1e9] * 3
    sizes[domain] = 1000.0 * size
    few, many = (final_losses(small(sizes_tokens=s), weights)[-1] for s in (tuple(sizes), (1e9,) * 3))
    if weights[domain] <= size:
        np.testing.assert_allclose(few, many, rtol=1e-12)
    else:
        assert (few > many).all()


@settings(deadline=None, max_examples=30)
@given(mixtures, st.floats(0.01, 1), st.floats(1, 10))
def test_more_tokens_of_a_domain_never_raise_a_loss(small, weights, size, factor):
    few, more = (final_losses(small(sizes_tokens=(1000.0 * s, 1e9, 1e9)), weights)[-1] for s in (size, size * factor))
    assert (more <= few + 1e-12).all()


def test_endless_repetition_is_as_good_as_fresh_data(small):
    weights = np.array([0.2, 0.3, 0.5])
    repeated = small(sizes_tokens=(10.0, 10.0, 10.0), repetition=np.inf)
    assert worth(np.array([70.0]), repeated.parameters().repetition, np) == pytest.approx(70, rel=1e-6)
    np.testing.assert_allclose(final_losses(repeated, weights)[-1], final_losses(small(), weights)[-1], rtol=1e-5)


def test_a_run_of_another_length_goes_on_beyond_the_fitted_one(small):
    """Twice as long without forgetting: twice the useful data, nothing left of the start."""
    weights = np.array([0.5, 0.5, 0.0])
    long = small(length=2.0, forgetting=(0.0,) * 3)
    np.testing.assert_allclose(final_losses(long, weights)[-1], [1 + 2 / 5.0001**0.5, 2 + 1 / 2.5001])


# --- what mixers are shown ---------------------------------------------------------------------------------


def test_stand_ins_by_hand(small):
    """a is a target; b helps (1, 2), c helps (0.5, 1): both are seen through a by a third."""
    np.testing.assert_allclose(small().stand_ins, [[1, 0], [1 / 3, 2 / 3], [1 / 3, 2 / 3]])


def test_stand_ins_of_the_shipped_surface():
    rows = SHIPPED.stand_ins
    np.testing.assert_allclose(rows.sum(1), 1.0)
    assert (rows >= 0).all()
    for index, name in enumerate(SHIPPED.domains):
        if name in SHIPPED.targets:
            assert rows[index, SHIPPED.targets.index(name)] == 1.0


def test_objective_weights(small):
    np.testing.assert_allclose(small().objective_weights, [0.5, 0.5])
    np.testing.assert_allclose(small(objective=(0.9, 0.1)).objective_weights, [0.9, 0.1])


def test_a_noise_domain_is_not_learned_helps_nobody_and_does_not_count():
    noisy = add_noise_domain(SHIPPED)
    assert noisy.domains[-1] == noisy.targets[-1] == "noise"
    assert noisy.objective_weights[-1] == 0.0
    np.testing.assert_allclose(noisy.objective_weights[:-1], 1 / 13)
    own = final_losses(noisy, np.eye(18)[-1])[:, -1]
    assert own[0] == pytest.approx(noisy.initial_loss_nats)
    np.testing.assert_allclose(own, noisy.initial_loss_nats, rtol=0.005)
    weights = np.random.default_rng(0).dirichlet(np.ones(17))
    with_noise = final_losses(noisy, np.append(0.6 * weights, 0.4))[-1]
    without = final_losses(SHIPPED, weights * 0.6 + 0.4 * np.eye(17)[0])[-1]  # the 40 % on arxiv instead
    assert with_noise[0] > without[0]
    np.testing.assert_allclose(
        final_losses(noisy, np.append(weights, 0.0))[-1, :-1], final_losses(SHIPPED, weights)[-1]
    )


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repetition", [15.4, np.inf])
def test_a_surface_is_what_its_file_says(tmp_path, small, repetition):
    surface = small(
        repetition=repetition,
        objective=(0.25, 0.75),
        spearman={"1m": 0.98},
        provenance={"runs": 512},
        pace=0.5,
        length=2.0,
    )
    again = Surface.load(surface.save(tmp_path / "surface.json"))
    for name in ("domains", "targets", "sizes_tokens", "run_tokens", "sequence_length", "initial_loss_nats"):
        assert getattr(again, name) == getattr(surface, name), name
    for name in ("forgetting", "repetition", "pace", "noise_nats", "length", "objective", "spearman", "provenance"):
        assert getattr(again, name) == getattr(surface, name), name
    weights = np.array([[0.2, 0.3, 0.5]])
    np.testing.assert_array_equal(again.law.predict(weights), surface.law.predict(weights))
    assert "Infinity" not in (tmp_path / "surface.json").read_text()


def edited(surface, path, edit):
    content = json.loads(surface.save(path).read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.update(format_version=2),
        lambda content: content.pop("format_version"),
        lambda content: content.pop("law"),
        lambda content: content.pop("domains"),
        lambda content: content.update(colour="blue"),
        lambda content: content["law"].pop("floors"),
        lambda content: content.update(law=[1, 2]),
        lambda content: content["law"].update(scales=["a", "b"]),
        lambda content: content["law"].update(scales=[1.0, None]),
        lambda content: content.update(forgetting=[0.0]),
        lambda content: content.update(run_tokens=-1),
    ],
)
def test_a_file_that_is_no_surface_is_refused(tmp_path, small, edit):
    path = edited(small(), tmp_path / "surface.json", edit)
    with pytest.raises(DataError, match=r"surface\.json: is no surface.*acodm fit-surrogate"):
        Surface.load(path)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_damaged_json_is_refused(tmp_path, text):
    (tmp_path / "surface.json").write_text(text)
    with pytest.raises(DataError, match=r"surface\.json"):
        Surface.load(tmp_path / "surface.json")


def test_an_unknown_surface_is_refused():
    with pytest.raises(ConfigError, match=r"surface=regmix: must be one of regmix-1m or a JSON file.*fit-surrogate"):
        Surface.load("regmix")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forgetting": (0.0, 0.0)}, r"forgetting: must have shape \(3,\)"),
        ({"targets": ("a", "x", "y")}, r"law.usefulness: must have shape \(3, 3\)"),
        ({"objective": (1.0,)}, r"objective: must have shape \(2,\)"),
        ({"run_tokens": 0.0}, "run_tokens=0.0: must be positive"),
        ({"repetition": -1.0}, "repetition=-1.0: must be positive"),
        ({"initial_loss_nats": float("nan")}, "initial_loss_nats=nan: must be positive"),
        ({"length": 0.0}, "length=0.0: must be positive"),
        ({"sizes_tokens": (0.0, 1.0, 1.0)}, "sizes_tokens must be positive"),
        ({"forgetting": (-1.0, 0.0, 0.0)}, "forgetting"),
        ({"sizes_tokens": (1.0, 1.0, float("inf"))}, "sizes_tokens: must hold finite numbers"),
        ({"objective": (0.5, 0.4)}, r"objective=\(0.5, 0.4\): must be at least 0 and sum to 1"),
        ({"objective": (1.5, -0.5)}, "must be at least 0 and sum to 1"),
        ({"pace": -0.1}, "pace"),
        ({"noise_nats": -0.1}, "noise_nats"),
    ],
)
def test_numbers_out_of_range_are_refused(small, changes, message):
    with pytest.raises(ConfigError, match=message):
        small(**changes)


def test_neither_torch_nor_sb3_is_imported():
    """The environment starts in a fraction of a second."""
    code = (
        "import sys, gymnasium, acodm_env; gymnasium.make('acodm/Surrogate-v0').reset(seed=0);"
        "print([name for name in ('torch', 'transformers', 'stable_baselines3') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
