import math
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.errors import ConfigError
from acodm_env.files import read_state, write_state
from acodm_env.step_stats import StepStats
from acodm_env.trainer import RunResult, drive
from acodm_env.wrapper import Lagged
from toy import ToyTrainer

INFO = replace(ToyTrainer((0.5, 0.5)).info, domains=("python", "prose"), targets=("python", "prose"))


class LinearTrainer(ToyTrainer):
    """Held-out loss i falls by rate·(effect @ mixture)_i in every step: what Aioli takes the world to be."""

    def __init__(self, effect, horizon, objective=(), diverge_at=0):
        self.effect = np.array(effect, dtype=float)  # (M, K)
        num_targets, num_domains = self.effect.shape
        super().__init__((1 / num_domains,) * num_domains, horizon=horizon, diverge_at=diverge_at)
        targets = tuple(f"target{i}" for i in range(num_targets))
        self.info = replace(self.info, targets=targets, objective=tuple(objective))

    def reset(self, rng):
        super().reset(rng)
        self.heldout = np.full(len(self.effect), 100.0)

    def step(self, weights, loss_weights=None):
        stats = super().step(weights, loss_weights)
        self.heldout = self.heldout - 0.01 * self.effect @ stats.requested
        return stats

    def evaluate(self, split):
        return self.heldout.copy()

    def state_dict(self):
        return super().state_dict() | {"heldout": self.heldout.copy()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.heldout = np.array(state["heldout"])


def evaluated(eval_losses, step=1, diverged=False):
    uniform = np.full(2, 0.5)
    return StepStats(
        step=step,
        tokens=step,
        requested=uniform,
        realised=uniform,
        counts=uniform,
        loss_tokens=uniform,
        losses=uniform,
        epochs=uniform,
        drawn=uniform,
        eval_losses=None if eval_losses is None else np.array(eval_losses, dtype=float),
        diverged=diverged,
    )


def softmax(logits):
    soft = np.exp(np.array(logits) - np.max(logits))
    return soft / soft.sum()


def result(initial, final):
    return RunResult(mixture=np.ones(2) / 2, initial_losses=np.array(initial), final_losses=np.array(final))


# --- skill-it ----------------------------------------------------------------------------------------------


def skilled(info=INFO, **options):
    mixer = make_mixer("skill-it", **({"graph": [[0.5, 0.1], [0.0, 0.2]]} | options))
    mixer.start(info)
    return mixer


def test_skill_it_asks_for_a_short_run_on_each_domain_alone():
    requests = make_mixer("skill-it", probe_frac=0.1).preparation(replace(INFO, horizon=304))
    assert [(r.name, r.mixer, r.steps) for r in requests] == [("only-0", "static", 30), ("only-1", "static", 30)]
    weights = [{"python": 1.0, "prose": 0.0}, {"python": 0.0, "prose": 1.0}]
    assert [r.options for r in requests] == [{"weights": w} for w in weights]
    for request, row in zip(requests, np.eye(2), strict=True):  # what the other mixer makes of them
        static = make_mixer(request.mixer, **request.options)
        static.start(INFO)
        assert static.weights().tolist() == row.tolist()
    assert [r.steps for r in make_mixer("skill-it", probe_frac=0.001).preparation(INFO)] == [1, 1]


def test_skill_it_takes_relative_drops_for_its_graph():
    info = replace(INFO, targets=("a", "b", "c"))
    mixer = make_mixer("skill-it", learning_rate=1.0)
    start = [4.0, 5.0, 10.0]
    mixer.prepare({"only-1": result(start, [math.nan] * 3), "only-0": result(start, [3.0, 6.0, 8.0])})
    mixer.start(info)
    # A = [[.25, 0 (it rose), .2], [0, 0, 0] (diverged)]; before an evaluation every loss counts as 1
    np.testing.assert_allclose(mixer.weights(), softmax([0.45, 0.0]))
    mixer.update(evaluated([2.0, 7.0, 1.0]))
    np.testing.assert_allclose(mixer.weights(), softmax([0.25 * 2 + 0.2 * 1, 0.0]))


def test_skill_it_sums_the_last_three_evaluations():
    mixer = skilled()
    np.testing.assert_allclose(mixer.weights(), softmax([0.2 * 0.6, 0.2 * 0.2]))
    for losses in ([9.0, 9.0], [4.0, 1.0], [3.0, 2.0]):
        mixer.update(evaluated(losses))
    np.testing.assert_allclose(mixer.weights(), softmax([0.2 * (0.5 * 16 + 0.1 * 12), 0.2 * 0.2 * 12]))
    mixer.update(evaluated([1.0, 1.0]))  # the first leaves the window
    np.testing.assert_allclose(mixer.weights(), softmax([0.2 * (0.5 * 8 + 0.1 * 4), 0.2 * 0.2 * 4]))


def test_skill_it_weighs_targets_by_the_objective():
    mixer = skilled(replace(INFO, targets=("a", "b"), objective=(0.75, 0.25)))
    mixer.update(evaluated([2.0, 4.0]))  # 2·(.75·2, .25·4) = (3, 2)
    np.testing.assert_allclose(mixer.weights(), softmax([0.2 * (0.5 * 3 + 0.1 * 2), 0.2 * 0.2 * 2]))


def test_skill_it_weighs_perplexities_by_their_size():
    """At e^L = 1 and 3: 2·(¼·ln 1, ¾·ln 3) = (0, 1.5 ln 3); before an evaluation ω alone counts."""
    mixer = skilled(replace(INFO, metric="perplexity"))
    np.testing.assert_allclose(mixer.weights(), softmax([0.2 * 0.6, 0.2 * 0.2]))
    mixer.update(evaluated(np.log([1.0, 3.0])))
    np.testing.assert_allclose(mixer.weights(), softmax(0.2 * 1.5 * math.log(3) * np.array([0.1, 0.2])))


def test_skill_it_keeps_a_loss_that_is_missing_and_ignores_a_diverged_step():
    mixer = skilled(window=1)
    mixer.update(evaluated([math.nan, 4.0]))  # never measured: 1
    np.testing.assert_allclose(mixer.weights(), softmax([0.2 * 0.9, 0.2 * 0.8]))
    mixer.update(evaluated([3.0, math.inf]))
    np.testing.assert_allclose(mixer.weights(), softmax([0.2 * 1.9, 0.2 * 0.8]))
    before = mixer.weights()
    mixer.update(evaluated([9.0, 9.0], diverged=True))
    mixer.update(evaluated(None))
    np.testing.assert_array_equal(mixer.weights(), before)


def test_skill_it_without_its_preparation_does_not_start():
    with pytest.raises(ConfigError, match=r"skill-it: needs its preparatory runs first"):
        make_mixer("skill-it").start(INFO)
    given = make_mixer("skill-it", graph=[[1, 0], [0, 1]])
    assert given.preparation(INFO) == ()
    given.prepare({})
    given.start(INFO)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"window": 0}, "window"),
        ({"window": 1.5}, "window"),
        ({"probe_frac": 0.0}, "probe_frac"),
        ({"graph": [[1.0, 0.0]]}, r"graph: must have 2 rows of 2 numbers, got \(1, 2\)"),
        ({"graph": [[1.0, -0.1], [0.0, 1.0]]}, "at least 0"),
        ({"graph": [[1.0, math.nan], [0.0, 1.0]]}, "finite"),
    ],
)
def test_bad_options_of_skill_it_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        skilled(**options)


def test_state_of_skill_it_is_exact_and_instances_are_independent(tmp_path):
    rows = np.random.default_rng(0).uniform(1, 6, size=(12, 2))
    for cut in (0, 1, 7):  # before the first evaluation, a window not yet full, a full one
        through, first, second = (skilled() for _ in range(3))
        for row in rows[:cut]:
            through.update(evaluated(row))
            first.update(evaluated(row))
        write_state(tmp_path / "state.safetensors", first.state_dict())
        first.update(evaluated([9.0, 0.0]))
        np.testing.assert_allclose(second.weights(), skilled().weights())
        second.load_state_dict(read_state(tmp_path / "state.safetensors"))
        for row in rows[cut:]:
            np.testing.assert_array_equal(second.weights(), through.weights())
            through.update(evaluated(row))
            second.update(evaluated(row))
        second.start(INFO)
        np.testing.assert_array_equal(second.weights(), skilled().weights())


def test_20000_evaluations_of_skill_it_stay_finite():
    mixer = skilled()
    for _ in range(20_000):
        mixer.update(evaluated([1000.0, 2000.0]))
    assert np.isfinite(mixer.weights()).all()
    assert mixer.weights().sum() == pytest.approx(1.0)


# --- aioli -------------------------------------------------------------------------------------------------


def driven(trainer, num_steps=None, **options):
    """The mixer and the steps of a whole run."""
    mixer = make_mixer("aioli", **options)
    trainer.reset(np.random.default_rng(0))
    mixer.start(trainer.info)
    return mixer, list(drive(trainer, mixer, num_steps or trainer.info.horizon))


EFFECT = [[3.0, 1.0, 0.0], [1.0, 2.0, 1.0]]  # (M = 2, K = 3), non-negative: A is it, normalised by 8


def test_a_round_by_hand():
    options = {"probe_steps": 2, "rounds": 1, "warmup_frac": 0.1, "rho": 0.7}
    mixer, history = driven(LinearTrainer(EFFECT, horizon=30), **options)
    measured = [stats.step for stats in history if stats.eval_losses is not None]
    assert measured == [3, 5, 7, 9]  # the base after 10 % of the steps, then each probe's end
    requested = np.array([stats.requested for stats in history])
    np.testing.assert_allclose(requested[:3], 1 / 3)
    favoured = requested[3:9].argmax(1)
    assert favoured[0::2].tolist() == favoured[1::2].tolist()
    assert sorted(favoured[0::2]) == [0, 1, 2]
    np.testing.assert_allclose(np.sort(requested[3:9], 1), [[0.15, 0.15, 0.7]] * 6)
    np.testing.assert_allclose(requested[9:], [softmax([4 / 8, 3 / 8, 1 / 8])] * 21)  # colsum of A, η = 1
    np.testing.assert_allclose(mixer.state_dict()["matrix"], np.array(EFFECT) / 8, atol=1e-12)


def test_targets_count_by_the_objective():
    trainer = LinearTrainer(EFFECT, horizon=30, objective=(0.25, 0.75))
    _, history = driven(trainer, learning_rate=0.5)
    tilt = 2 * (0.25 * np.array(EFFECT[0]) + 0.75 * np.array(EFFECT[1])) / 8
    np.testing.assert_allclose(history[-1].requested, softmax(0.5 * tilt))


def test_aioli_weighs_perplexities_by_their_size():
    trainer = LinearTrainer(EFFECT, horizon=30)
    trainer.info = replace(trainer.info, metric="perplexity")
    trainer.reset = lambda rng: (ToyTrainer.reset(trainer, rng), setattr(trainer, "heldout", np.array([5.0, 6.0])))
    _mixer, history = driven(trainer, learning_rate=0.5)
    heavy = 2 * softmax([stats.eval_losses for stats in history if stats.eval_losses is not None][-1])
    np.testing.assert_allclose(history[-1].requested, softmax(0.5 * heavy @ np.array(EFFECT) / 8))


def test_a_matrix_with_harm_in_it_is_shifted_and_normalised():
    _, history = driven(LinearTrainer([[2.0, -1.0], [0.0, 1.0]], horizon=30))
    np.testing.assert_allclose(history[-1].requested, softmax([(3 + 1) / 6, (0 + 2) / 6]))


def test_where_nothing_helps_the_mixture_stays_uniform():
    _, history = driven(LinearTrainer([[0.0, 0.0], [0.0, 0.0]], horizon=30))
    np.testing.assert_allclose(history[-1].requested, [0.5, 0.5])


def test_later_rounds_are_averaged():
    class Turning(LinearTrainer):
        def step(self, weights, loss_weights=None):
            if self.steps_done == 20:
                self.effect = self.effect[:, ::-1]
            return super().step(weights, loss_weights)

    trainer = Turning([[3.0, 1.0]], horizon=39)
    mixer, history = driven(trainer, rounds=2, probe_steps=2, ema=0.2, warmup_frac=0.0)  # rounds begin after 1 and 20
    measured = [stats.step for stats in history if stats.eval_losses is not None]
    assert measured == [1, 3, 5, 20, 22, 24]
    np.testing.assert_allclose(history[10].requested, softmax([0.75, 0.25]))
    second = 0.2 * np.array([0.75, 0.25]) + 0.8 * np.array([0.25, 0.75])
    np.testing.assert_allclose(history[-1].requested, softmax(second))
    np.testing.assert_allclose(mixer.state_dict()["matrix"], [second])


def test_the_order_of_the_probes_changes_from_round_to_round_and_with_the_seed():
    def orders(**options):
        _, history = driven(LinearTrainer(np.eye(5), horizon=400), probe_steps=1, rounds=8, **options)
        probes = [s.requested.argmax() for s in history if s.requested.max() > 0.6]
        assert len(probes) == 40
        return [tuple(probes[i : i + 5]) for i in range(0, 40, 5)]

    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders())
    assert len(set(orders())) > 4
    assert orders() == orders() != orders(seed=1)


@pytest.mark.parametrize(("horizon", "num_domains"), [(300, 8), (1000, 22), (41_667, 22), (150, 2), (300, 22)])
def test_probes_take_a_quarter_of_the_steps_at_most(horizon, num_domains):
    mixer = make_mixer("aioli")
    mixer.start(LinearTrainer(np.eye(num_domains), horizon=horizon).info)
    probing = []
    for step in range(horizon):
        probing.append(mixer.weights().max() > 0.6)
        mixer.update(evaluated(np.ones(num_domains), step=step + 1))
    assert 0.1 < np.mean(probing) <= 0.25
    assert not probing[-1]
    assert sum(probing) % num_domains == 0


def test_the_shortest_run_makes_one_round_and_a_shorter_one_is_refused():
    _, history = driven(LinearTrainer(np.eye(3) * 2 + 1, horizon=5))  # 1 before, 3 probes, 1 to use them
    assert [stats.requested.max() > 0.6 for stats in history] == [False, True, True, True, False]
    with pytest.raises(ConfigError, match=r"horizon=4: must be at least 5 optimiser steps .* each of 3 domains for 1;"):
        driven(LinearTrainer(np.eye(3), horizon=4))
    with pytest.raises(ConfigError, match=r"horizon=20: must be at least 32 .* each of 3 domains for 10;"):
        driven(LinearTrainer(np.eye(3), horizon=20), probe_steps=10)
    driven(LinearTrainer(np.eye(3), horizon=32), probe_steps=10)


def test_the_advice_on_the_horizon_counts_the_warm_up():
    with pytest.raises(ConfigError, match="must be at least 61 "):  # 30 = round(30.5) before, 31 for the round
        driven(LinearTrainer(np.eye(3), horizon=40), probe_steps=10, warmup_frac=0.5)
    driven(LinearTrainer(np.eye(3), horizon=61), probe_steps=10, warmup_frac=0.5)


def test_one_domain_is_never_probed():
    mixer, history = driven(LinearTrainer([[1.0], [2.0]], horizon=4))
    assert [stats.requested.tolist() for stats in history] == [[1.0]] * 4
    assert all(stats.eval_losses is None for stats in history)
    assert mixer.weights().tolist() == [1.0]


def test_under_a_lag_the_probes_fall_on_the_steps_that_are_measured():
    trainer = Lagged(LinearTrainer(EFFECT, horizon=60), lag=3)
    mixer, history = driven(trainer, probe_steps=2, rounds=1)
    np.testing.assert_allclose(mixer.state_dict()["matrix"], np.array(EFFECT) / 8, atol=1e-12)
    np.testing.assert_allclose(history[-1].requested, softmax([4 / 8, 3 / 8, 1 / 8]))


def test_a_round_with_a_missing_evaluation_teaches_nothing():
    class Broken(LinearTrainer):
        def evaluate(self, split):
            return np.array([np.nan, 1.0]) if self.steps_done == 5 else super().evaluate(split)

    options = {"rounds": 2, "probe_steps": 2, "warmup_frac": 0.0}
    _, history = driven(Broken([[3.0, 1.0], [0.0, 0.0]], horizon=39), **options)
    np.testing.assert_allclose(history[10].requested, [0.5, 0.5])
    np.testing.assert_allclose(history[-1].requested, softmax([0.75, 0.25]))


def test_a_diverged_step_ends_in_a_finite_mixture():
    mixer, history = driven(LinearTrainer(EFFECT, horizon=30, diverge_at=5), probe_steps=2, warmup_frac=0.1)
    assert len(history) == 5
    assert history[-1].eval_losses is None
    assert mixer.weights().sum() == pytest.approx(1.0)


def test_saved_in_the_middle_of_a_round_and_loaded_equals_uninterrupted(tmp_path):
    options = {"rounds": 3, "probe_steps": 2, "warmup_frac": 0.05}
    rng = np.random.default_rng(3)
    effect = rng.uniform(-1, 2, size=(2, 3))
    _, whole = driven(LinearTrainer(effect, horizon=100), **options)
    for cut in range(100):
        trainer = LinearTrainer(effect, horizon=100)
        mixer, _ = driven(trainer, max(cut, 1), **options) if cut else (make_mixer("aioli", **options), [])
        if not cut:
            trainer.reset(np.random.default_rng(0))
            mixer.start(trainer.info)
        write_state(tmp_path / "s.safetensors", {"mixer": mixer.state_dict(), "trainer": trainer.state_dict()})
        state = read_state(tmp_path / "s.safetensors")
        fresh, other = make_mixer("aioli", **options), LinearTrainer(effect, horizon=100)
        other.reset(np.random.default_rng(0))
        fresh.start(other.info)
        fresh.load_state_dict(state["mixer"])
        other.load_state_dict(state["trainer"])
        rest = [stats.requested for stats in drive(other, fresh, 100 - cut)]
        np.testing.assert_array_equal(rest, [stats.requested for stats in whole[cut:]])


def test_instances_are_independent_start_forgets_and_weights_are_the_callers_own():
    mixer, history = driven(LinearTrainer(EFFECT, horizon=30))
    other = make_mixer("aioli")
    other.start(mixer.info)
    np.testing.assert_allclose(other.weights(), 1 / 3)
    saved = mixer.state_dict()
    for array in (saved["matrix"], saved["drops"], saved["losses"], mixer.weights()):
        array[:] = 7.0
    np.testing.assert_allclose(mixer.weights(), history[-1].requested)
    mixer.start(mixer.info)
    np.testing.assert_allclose(mixer.weights(), 1 / 3)
    mixer.update(evaluated([1.0, 1.0], step=1))
    mixer.weights()[:] = 7.0  # a probe
    assert mixer.weights().sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"rho": 1.1}, "rho"),
        ({"rho": 0.3}, r"rho=0\.3: must be in \(1/3, 1\]"),
        ({"ema": 1.0}, "ema"),
        ({"rounds": 0}, "rounds"),
        ({"probe_steps": 0}, "probe_steps"),
        ({"probe_frac": 1.0}, "probe_frac"),
        ({"warmup_frac": 1.0}, "warmup_frac"),
    ],
)
def test_bad_options_of_aioli_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        driven(LinearTrainer(EFFECT, horizon=30), **options)


def test_20000_steps_stay_finite_and_extremes_are_allowed():
    mixer, history = driven(LinearTrainer(EFFECT, horizon=20_000), rho=1.0, rounds=500, learning_rate=50.0)
    assert all(np.isfinite(stats.requested).all() for stats in history)
    assert mixer.weights().sum() == pytest.approx(1.0)
