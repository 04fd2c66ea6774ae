from dataclasses import replace

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer, mixer_names
from acodm_env.errors import ConfigError
from acodm_env.files import read_state, write_state
from acodm_env.step_stats import merge
from acodm_env.surrogate.dynamics import slopes
from acodm_env.surrogate.surface import Surface
from acodm_env.surrogate.trainer import SlopeSums, SurrogateTrainer
from acodm_env.trainer import Mixer, Trainer, drive, require
from acodm_env.wrapper import Lagged

SHIPPED = Surface.load("regmix-1m")
ALL = frozenset({"losses", "gram", "validation", "loss_weights"})


def started(surface, seed=0, measure=ALL, **settings):
    runs = SurrogateTrainer(surface, **settings)
    runs.reset(np.random.default_rng(seed))
    runs.measure = measure
    return runs


def mixtures(number, num_domains=17, seed=1):
    return np.random.default_rng(seed).dirichlet(np.ones(num_domains), number)


def assert_same(one, other):
    """Two steps' statistics, bit for bit."""
    for name in ("requested", "realised", "counts", "loss_tokens", "losses", "epochs", "drawn"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert (one.step, one.tokens, one.loss) == (other.step, other.tokens, other.loss)


# --- the contract ------------------------------------------------------------------------------------------


def test_it_is_a_trainer_and_describes_the_run():
    runs = SurrogateTrainer(SHIPPED, horizon=50, decision_every=5)
    assert isinstance(runs, Trainer)
    assert isinstance(Lagged(runs, 2), Trainer)
    info = runs.info
    assert (info.domains, info.targets) == (SHIPPED.domains, SHIPPED.targets)
    assert (info.horizon, info.decision_every, info.padding) == (50, 5, 0)
    assert info.batch_size == round(SHIPPED.run_tokens / 50 / SHIPPED.sequence_length)
    np.testing.assert_allclose(info.objective_weights, 1 / 13)


def test_counts_epochs_and_tokens_by_hand(small):
    """4 steps of 1000 tokens: 25 sequences of 10 tokens each."""
    runs = started(small(sizes_tokens=(100.0, 1000.0, 1e9)), horizon=4)
    weights = np.array([0.5, 0.3, 0.2])
    runs.step(weights)
    stats = runs.step(weights)
    np.testing.assert_allclose(stats.counts, [12.5, 7.5, 5.0])
    np.testing.assert_allclose(stats.drawn, [25, 15, 10])
    np.testing.assert_allclose(stats.loss_tokens, [125, 75, 50])
    np.testing.assert_allclose(stats.epochs, [0.5 * 500 / 100, 0.3 * 500 / 1000, 0.2 * 500 / 1e9])
    assert (stats.step, stats.tokens, runs.steps_done) == (2, 500, 2)
    np.testing.assert_array_equal(stats.realised, weights)


def test_a_training_loss_is_that_before_the_step_through_the_stand_ins(small):
    runs = started(small(), noise=0.0)
    first = runs.step(np.array([0.2, 0.3, 0.5]))
    np.testing.assert_allclose(first.losses, 6.0)
    held_out = runs.evaluate("validation")
    second = runs.step(np.array([1.0, 0.0, 0.0]))
    assert second.losses[0] == held_out[0]
    assert np.isnan(second.losses[1:]).all()  # not drawn
    assert second.loss == held_out[0]
    held_out = runs.evaluate("validation")
    third = runs.step(np.array([0.0, 0.5, 0.5]))
    np.testing.assert_allclose(third.losses[1:], (held_out[0] + 2 * held_out[1]) / 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 0}, "episode_steps=0: must be at least 1"),
        ({"decision_every": 0}, "steps_per_action=0: must be at least 1"),
        ({"noise": -1.0}, "noise=-1.0: must be a finite factor"),
        ({"noise": float("nan")}, "noise=nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SurrogateTrainer(SHIPPED, **settings)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.full(16, 1 / 16), "must hold 17 numbers"),
        (np.full(17, np.nan), "must be finite"),
        (-np.ones(17), "non-negative"),
    ],
)
def test_what_is_no_mixture_is_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        started(SHIPPED).step(weights)


# --- noise and determinism ---------------------------------------------------------------------------------


def test_the_same_generator_gives_the_same_run_bit_for_bit():
    one, other, third = started(SHIPPED, 3), started(SHIPPED, 3), started(SHIPPED, 4)
    for weights in mixtures(5):
        stats, again, different = (runs.step(weights) for runs in (one, other, third))
        assert_same(stats, again)
        assert (stats.losses != different.losses).all()
    np.testing.assert_array_equal(one.evaluate("test"), third.evaluate("test"))  # held-out losses have no noise


@pytest.mark.parametrize("num_sequences", [1.0, 25.0, 400.0])
def test_noise_is_that_of_so_many_sequences(small, num_sequences):
    """Standard deviation noise_nats/√sequences = 0.5, 0.1, 0.025."""
    surface = small(run_tokens=2 * 10 * num_sequences, sizes_tokens=(1e12,) * 3)
    runs = SurrogateTrainer(surface, horizon=2, batch=(4000,))
    runs.reset(np.random.default_rng(0))
    runs.measure = frozenset({"losses"})
    losses = runs.step(np.tile([1.0, 0.0, 0.0], (4000, 1))).losses[:, 0]
    assert losses.mean() == pytest.approx(6.0, abs=4 * 0.5 / np.sqrt(4000 * num_sequences))
    assert losses.std() == pytest.approx(0.5 / np.sqrt(num_sequences), rel=0.05)


def test_noise_scales_with_its_factor_and_can_be_switched_off(small):
    weights = np.array([0.5, 0.25, 0.25])
    plain, double, off = (started(small(), noise=factor).step(weights).losses for factor in (1.0, 2.0, 0.0))
    np.testing.assert_allclose(off, 6.0)
    np.testing.assert_allclose(double - 6.0, 2 * (plain - 6.0))


def test_nothing_is_drawn_from_a_global_generator():
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    runs = started(SHIPPED)
    for weights in mixtures(3):
        runs.step(weights)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_only_what_is_asked_for_is_measured():
    stats = started(SHIPPED, measure=frozenset()).step(np.full(17, 1 / 17))
    assert np.isnan(stats.losses).all()
    assert stats.gradients is None
    assert stats.excess_losses is None


# --- loss weights and reference ----------------------------------------------------------------------------


def test_loss_weights_decide_what_is_learned_and_not_what_is_drawn():
    """requested × loss weights: (½, ¼, ¼) × (1, 4, 0) = (⅓, ⅔, 0)."""
    surface = replace(SHIPPED, forgetting=(0.0,) * 17)
    drawn = np.zeros(17)
    drawn[:3] = [0.5, 0.25, 0.25]
    factors, equal = np.zeros(17), np.zeros(17)
    factors[:2], equal[:2] = [1.0, 4.0], [1 / 3, 2 / 3]
    one, other = started(surface), started(surface)
    stats = one.step(drawn, factors)
    other.step(equal)
    np.testing.assert_allclose(one.evaluate("test"), other.evaluate("test"), rtol=1e-12)
    np.testing.assert_allclose(stats.effective, equal)
    np.testing.assert_allclose(stats.counts, drawn * one.info.batch_size)


def test_excess_losses_by_hand(small):
    runs = started(small(), noise=0.0, reference=np.array([5.5, 6.5, 4.0]), measure=frozenset({"excess"}))
    np.testing.assert_allclose(runs.step(np.array([0.5, 0.25, 0.25])).excess_losses, [0.5, 0.0, 2.0])
    assert np.isnan(runs.step(np.array([0.0, 0.5, 0.5])).excess_losses[0])


def test_excess_needs_a_reference():
    assert "excess" not in SurrogateTrainer(SHIPPED).provides
    assert "excess" in SurrogateTrainer(SHIPPED, reference=np.full(17, 3.0)).provides
    with pytest.raises(ConfigError, match="doremi-proxy: needs excess"):
        list(drive(started(SHIPPED), make_mixer("doremi-proxy"), 1))


# --- gradients ---------------------------------------------------------------------------------------------


def test_gram_by_hand_is_inner_products_of_the_slopes(small):
    """Slopes at the end of the step × t × √(weight of the target)."""
    surface = small(objective=(0.25, 0.75))
    runs = started(surface, horizon=4)
    weights = np.array([0.5, 0.25, 0.25])
    runs.step(weights)
    gram, noise = runs.step(weights).gradients.gram()
    steep = slopes(surface.parameters(), runs._memory, np.array([0.5]), np)  # (M, K)
    vectors = (0.5 * np.sqrt([0.25, 0.75])[:, None] * steep).T  # (K, M)
    for i in range(3):
        for j in range(3):
            assert gram[i, j] == pytest.approx(vectors[i] @ vectors[j])
    np.testing.assert_array_equal(noise, 0.0)


def test_gram_is_positive_semidefinite_and_stays_of_one_size():
    """A running scale must not be ruled by the first step: in a uniform run the trace stays within a factor of 5."""
    runs = started(SHIPPED, horizon=40)
    traces = []
    for _ in range(40):
        gram, _ = runs.step(np.full(17, 1 / 17)).gradients.gram()
        np.testing.assert_allclose(gram, gram.T)
        assert np.linalg.eigvalsh(gram).min() > -1e-9 * np.trace(gram)
        traces.append(np.trace(gram))
    assert max(traces) < 5 * min(traces)


def test_sums_of_slopes_add_up_by_counts():
    one = SlopeSums(np.array([[2.0, 0.0], [0.0, 3.0]]), np.array([2.0, 3.0]))
    other = SlopeSums(np.array([[6.0, 0.0], [0.0, 0.0]]), np.array([2.0, 0.0]))
    gram, _ = (one + other).gram()
    np.testing.assert_allclose(gram, [[4.0, 0.0], [0.0, 1.0]])  # means (2, 0) and (0, 1)


def test_windows_can_be_merged():
    runs = started(SHIPPED, noise=0.0)
    first, second = (runs.step(weights) for weights in mixtures(2))
    both = merge(first, second)
    np.testing.assert_allclose(both.requested, (first.requested + second.requested) / 2)
    weighted = first.losses * first.counts + second.losses * second.counts
    np.testing.assert_allclose(both.losses, weighted / (first.counts + second.counts))
    assert np.isfinite(both.gradients.gram()[0]).all()


# --- state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 3])
def test_going_on_from_a_saved_state_equals_the_uninterrupted_run(tmp_path, lag):
    """With noise, through files."""

    def fresh():
        runs = SurrogateTrainer(SHIPPED, horizon=12)
        trainer = Lagged(runs, lag) if lag else runs
        trainer.reset(np.random.default_rng(7))
        trainer.measure = ALL
        return trainer

    schedule, whole = mixtures(12), fresh()
    trace = [whole.step(weights) for weights in schedule]
    first = fresh()
    for weights in schedule[:5]:
        first.step(weights)
    write_state(tmp_path / "state", first.state_dict())
    second = fresh()
    second.load_state_dict(read_state(tmp_path / "state"))
    assert second.steps_done == 5
    for weights, expected in zip(schedule[5:], trace[5:], strict=True):
        assert_same(second.step(weights), expected)
    np.testing.assert_array_equal(second.evaluate("test"), whole.evaluate("test"))


def test_a_state_is_not_changed_by_going_on():
    runs = started(SHIPPED)
    runs.step(np.full(17, 1 / 17))
    state = runs.state_dict()
    memory = state["memory"].copy()
    runs.step(np.full(17, 1 / 17))
    np.testing.assert_array_equal(state["memory"], memory)


def test_again_is_the_same_run_without_noise():
    runs = started(SHIPPED, seed=5)
    weights = np.full(17, 1 / 17)
    runs.step(weights)
    expected = started(SHIPPED, noise=0.0)
    again = runs.again()
    assert (again.steps_done, runs.steps_done) == (0, 1)
    before, generator = runs._memory.copy(), runs._rng.bit_generator.state
    again.measure = expected.measure
    assert_same(again.step(weights), expected.step(weights))
    np.testing.assert_array_equal(runs._memory, before)
    assert runs._rng.bit_generator.state == generator


# --- every mixer -------------------------------------------------------------------------------------------

PREPARED = {"doremi", "skill-it", "doge", "regmix", "mixing-law", "power-law", "log-linear", "marginal-value"}
"""Need runs of their own before; the benchmark makes those."""
OF_A_FILE = {"replay", "mean-of", "policy", "generalist", "pilot"}
"""Need the folder of a recorded run or of a policy."""
WEIGHTS = {name: 1.0 + (name == "github") for name in SHIPPED.domains}
OPTIONS = {"static": {"weights": WEIGHTS}, "schedule": {"points": [{"at": 0, "weights": WEIGHTS}]}}


def test_mixers_are_sorted_into_those_that_need_runs_before_and_others():
    info = SurrogateTrainer(SHIPPED).info
    needing = {
        name
        for name in mixer_names()
        if name not in OF_A_FILE | {"sheared-llama"} and make_mixer(name, **OPTIONS.get(name, {})).preparation(info)
    }
    assert needing == PREPARED


@pytest.mark.parametrize("name", sorted(set(mixer_names()) - PREPARED - OF_A_FILE - {"sheared-llama"}))
def test_every_mixer_runs(name):
    reference = np.full(17, 3.0) if name == "doremi-proxy" else None
    runs = SurrogateTrainer(SHIPPED, horizon=20, reference=reference)
    runs.reset(np.random.default_rng(0))
    mixer = make_mixer(name, **OPTIONS.get(name, {}))
    mixer.start(runs.info)
    trace = list(drive(runs, mixer, 20))
    assert [stats.step for stats in trace] == list(range(1, 21))
    assert all(stats.effective.sum() == pytest.approx(1) for stats in trace)
    final = runs.evaluate("test")
    assert np.isfinite(final).all()
    assert (final < SHIPPED.initial_loss_nats).all()


@pytest.mark.parametrize("name", ["softmax-loss", "odm-released-rescaled", "eg-interaction", "pike", "ado", "aioli"])
def test_what_mixers_measure_here_moves_them(name):
    runs = SurrogateTrainer(SHIPPED, horizon=40)
    runs.reset(np.random.default_rng(0))
    mixer = make_mixer(name)
    mixer.start(runs.info)
    last = list(drive(runs, mixer, 40))[-1]
    assert np.abs(last.effective - 1 / 17).max() > 0.003


def test_sheared_llama_wants_targets_that_are_the_domains():
    with pytest.raises(ConfigError, match="not both: enron_emails"):
        make_mixer("sheared-llama").preparation(SurrogateTrainer(SHIPPED).info)


def test_layers_are_refused():
    class Layered(Mixer):
        name = "layered"
        needs = frozenset({"layers"})

        def weights(self):
            raise AssertionError("refused before")

    with pytest.raises(ConfigError, match=r"mixer=layered: needs layers; SurrogateTrainer provides only gram, loss"):
        list(drive(started(SHIPPED), Layered(), 1))


def test_a_lagged_run_begins_with_uniform_mixtures():
    runs = Lagged(SurrogateTrainer(SHIPPED, horizon=10, noise=0.0), 2)
    runs.reset(np.random.default_rng(0))
    require(runs, frozenset({"losses"}), "test")
    schedule = mixtures(4)
    trace = [runs.step(weights) for weights in schedule]
    np.testing.assert_allclose([stats.requested for stats in trace[:2]], 1 / 17)
    np.testing.assert_allclose([stats.requested for stats in trace[2:]], schedule[:2], rtol=1e-12)
    np.testing.assert_array_equal(trace[3].pending, schedule[2:])
