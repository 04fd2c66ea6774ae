from dataclasses import replace

import numpy as np
import pytest

from acodm_env.errors import ConfigError
from acodm_env.files import read_state, write_state
from acodm_env.step_stats import StepStats, merge
from acodm_env.trainer import Mixer, RunInfo, Trainer, drive
from acodm_env.wrapper import Lagged

INFO = RunInfo(
    domains=("a", "b"),
    targets=("x", "y", "z"),
    sizes_tokens=(100, 200),
    batch_size=4,
    sequence_length=8,
    horizon=10,
    decision_every=2,
    initial_loss_nats=3.0,
)


class Sums:
    """Gradient sums that remember what was added."""

    def __init__(self, *parts):
        self.parts = parts

    def __add__(self, other):
        return Sums(*self.parts, *other.parts)

    def gram(self):
        raise AssertionError("not formed here")


def window(counts, loss_tokens, losses, **changes):
    counts = np.array(counts, dtype=float)
    values = {
        "step": 1,
        "tokens": 32,
        "requested": np.array([0.5, 0.5]),
        "realised": counts / counts.sum(),
        "counts": counts,
        "loss_tokens": np.array(loss_tokens, dtype=float),
        "losses": np.array(losses, dtype=float),
        "epochs": np.array([0.1, 0.2]),
        "drawn": counts,
        "loss": float(np.nansum(np.array(losses) * loss_tokens) / np.sum(loss_tokens)),
    }
    return StepStats(**values | changes)


class Recorder:
    """The smallest trainer: it remembers what it was asked, and its loss is the step number."""

    info = INFO
    provides = frozenset({"losses", "validation"})

    def __init__(self, diverge_at=0):
        self.measure = frozenset()
        self.diverge_at = diverge_at
        self.asked = []
        self.evaluated = []
        self.steps_done = 0

    def reset(self, rng):
        self.asked, self.evaluated, self.steps_done = [], [], 0

    def step(self, weights, loss_weights=None):
        self.steps_done += 1
        self.asked.append((np.array(weights).tolist(), loss_weights))
        return window(
            [2, 2],
            [14, 14],
            [self.steps_done] * 2,
            step=self.steps_done,
            requested=np.array(weights),
            diverged=self.steps_done == self.diverge_at,
        )

    def evaluate(self, split):
        self.evaluated.append((self.steps_done, split))
        return np.full(3, float(self.steps_done))

    def state_dict(self):
        return {"step": self.steps_done}

    def load_state_dict(self, state):
        self.steps_done = state["step"]


class Counter(Mixer):
    """Weights (1 − n/10, n/10) after n updates."""

    name = "counter"

    def start(self, info):
        super().start(info)
        self.seen = []

    def weights(self):
        share = len(self.seen) / 10
        return np.array([1 - share, share])

    def update(self, stats):
        self.seen.append(stats)


def run(trainer, mixer, num_steps):
    trainer.reset(np.random.default_rng(0))
    mixer.start(trainer.info)
    return list(drive(trainer, mixer, num_steps))


# --- merge -------------------------------------------------------------------------------------------------


def test_merge_by_hand():
    first = window([3, 1], [30, 10], [2.0, 4.0], requested=np.array([0.75, 0.25]), step=4)
    second = window([1, 3], [10, 50], [6.0, 1.0], requested=np.array([0.25, 0.75]), step=5, tokens=64)
    both = merge(first, second)
    assert both.losses == pytest.approx([(2 * 30 + 6 * 10) / 40, (4 * 10 + 1 * 50) / 60])  # 3, 1.5
    assert both.loss_tokens.tolist() == [40, 60]
    assert both.counts.tolist() == [4, 4]
    assert both.realised.tolist() == [0.5, 0.5]
    assert both.requested.tolist() == [0.5, 0.5]
    assert both.loss == pytest.approx((60 + 40 + 60 + 50) / 100)
    assert (both.step, both.tokens) == (5, 64)
    assert both.drawn is second.drawn


def test_merge_of_a_domain_drawn_once_or_never():
    first = window([4, 0], [40, 0], [2.0, np.nan])
    second = window([2, 2], [20, 20], [5.0, 7.0])
    for both in (merge(first, second), merge(second, first)):
        assert both.losses == pytest.approx([3.0, 7.0])
    never = merge(first, first)
    assert never.losses[0] == 2.0
    assert np.isnan(never.losses[1])
    assert never.realised.tolist() == [1.0, 0.0]


def test_merge_is_associative():
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(3):
        counts = rng.integers(0, 4, 2) + np.array([1, 0])
        requested = rng.dirichlet([1, 1])
        losses = np.where(counts > 0, rng.uniform(1, 5, 2), np.nan)
        parts.append(window(counts, counts * 7, losses, requested=requested, gradients=Sums(len(parts))))
    left = merge(merge(parts[0], parts[1]), parts[2])
    right = merge(parts[0], merge(parts[1], parts[2]))
    for name in ("losses", "loss_tokens", "counts", "realised", "requested", "loss"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=1e-12, err_msg=name)
    assert left.gradients.parts == right.gradients.parts == (0, 1, 2)


def test_merge_without_gradients_on_one_side_and_after_divergence():
    plain, measured = window([2, 2], [8, 8], [1.0, 1.0]), window([2, 2], [8, 8], [1.0, 1.0], gradients=Sums(1))
    assert merge(plain, measured).gradients is None
    assert merge(replace(plain, diverged=True), plain).diverged
    assert not merge(plain, plain).diverged


def test_merge_of_excess_losses_is_weighted_by_tokens():
    first = window([3, 1], [30, 10], [2.0, 4.0], excess_losses=np.array([0.2, np.nan]))
    second = window([1, 3], [10, 50], [6.0, 1.0], excess_losses=np.array([0.6, 0.5]))
    both = merge(first, second)
    assert both.excess_losses == pytest.approx([(0.2 * 30 + 0.6 * 10) / 40, 0.5 * 50 / 60])
    assert merge(first, replace(second, excess_losses=None)).excess_losses is None
    assert merge(replace(first, excess_losses=None), second).excess_losses is None
    undrawn = window([4, 0], [40, 0], [2.0, np.nan], excess_losses=np.array([0.1, np.nan]))
    assert np.isnan(merge(undrawn, undrawn).excess_losses[1])


def test_seconds_and_skipped_steps_of_a_window_are_summed():
    first = window([2, 2], [8, 8], [1.0, 1.0], seconds={"data": 0.25, "train": 1.0}, decision=3)
    second = window([2, 2], [8, 8], [1.0, 1.0], seconds={"train": 2.0, "probe": 0.5}, decision=4, skipped=1)
    both = merge(first, second)
    assert both.seconds == {"data": 0.25, "train": 3.0, "probe": 0.5}
    assert (both.skipped, both.decision) == (1, 4)


def test_a_step_without_a_finite_loss_does_not_spoil_its_window():
    good = window([2, 2], [8, 8], [1.0, 3.0])
    nothing = replace(good, loss_tokens=np.zeros(2), losses=np.full(2, np.nan), loss=float("nan"), skipped=1)
    for both in (merge(good, nothing), merge(nothing, good)):
        assert both.loss == 2.0
        assert both.losses.tolist() == [1.0, 3.0]
    assert good.guilty.tolist() == [False, False]
    assert nothing.guilty.tolist() == [True, True]
    assert window([4, 0], [8, 0], [np.inf, np.nan]).guilty.tolist() == [True, False]


def test_loss_weights_of_a_window_are_the_last_steps():
    first = window([2, 2], [8, 8], [1.0, 1.0], loss_weights=np.array([1.0, 1.0]))
    second = window([2, 2], [8, 8], [1.0, 1.0], loss_weights=np.array([1.5, 0.5]))
    assert merge(first, second).loss_weights.tolist() == [1.5, 0.5]


def test_the_effective_mixture_is_requested_times_loss_weights():
    plain = window([2, 2], [8, 8], [1.0, 1.0], requested=np.array([0.8, 0.2]))
    assert plain.effective.tolist() == [0.8, 0.2]
    weighted = replace(plain, loss_weights=np.array([0.5, 3.0]))
    assert weighted.effective == pytest.approx([0.4, 0.6])


# --- drive -------------------------------------------------------------------------------------------------


def test_recorder_is_a_trainer():
    assert isinstance(Recorder(), Trainer)
    assert isinstance(Lagged(Recorder(), lag=1), Trainer)


def test_each_step_uses_the_weights_after_the_last_update():
    trainer, mixer = Recorder(), Counter()
    history = run(trainer, mixer, 4)
    assert [weights for weights, _ in trainer.asked] == [pytest.approx([1 - n / 10, n / 10]) for n in range(4)]
    assert [stats.step for stats in history] == [1, 2, 3, 4]
    assert mixer.seen == history
    assert all(loss_weights is None for _, loss_weights in trainer.asked)


def test_loss_weights_reach_the_trainer():
    class Reweighting(Counter):
        def loss_weights(self):
            return np.array([2.0, 0.5])

    trainer = Recorder()
    run(trainer, Reweighting(), 1)
    assert trainer.asked[0][1].tolist() == [2.0, 0.5]


def test_validation_is_measured_at_decisions_for_those_who_need_it():
    class Validating(Counter):
        needs = frozenset({"validation"})

    trainer = Recorder()
    history = run(trainer, Validating(), 5)
    assert trainer.evaluated == [(2, "validation"), (4, "validation")]
    assert [stats.eval_losses is None for stats in history] == [True, False, True, False, True]
    assert history[3].eval_losses.tolist() == [4.0, 4.0, 4.0]
    run(trainer, Counter(), 5)
    assert trainer.evaluated == []


def test_a_mixer_says_after_which_steps_it_wants_validation():
    class Late(Counter):
        needs = frozenset({"validation"})

        def due(self, step):
            return step in (1, 4)

    trainer = Recorder()
    history = run(trainer, Late(), 5)
    assert trainer.evaluated == [(1, "validation"), (4, "validation")]
    assert [stats.step for stats in history if stats.eval_losses is not None] == [1, 4]

    class Curious(Counter):  # due is only asked of those who need it
        def due(self, step):
            raise AssertionError

    run(Recorder(), Curious(), 2)


def test_a_diverged_model_is_not_evaluated():
    class Validating(Counter):
        needs = frozenset({"validation"})

    trainer = Recorder(diverge_at=2)
    history = run(trainer, Validating(), 5)
    assert trainer.evaluated == []
    assert history[-1].eval_losses is None


def test_only_what_is_needed_is_measured():
    class Greedy(Counter):
        needs = frozenset({"losses"})

    trainer = Recorder()
    run(trainer, Greedy(), 1)
    assert trainer.measure == {"losses"}
    run(trainer, Counter(), 1)
    assert trainer.measure == frozenset()


def test_missing_needs_are_refused_before_the_first_step_naming_both():
    class Demanding(Counter):
        name = "demanding"
        needs = frozenset({"gram", "losses", "layers"})

    trainer = Recorder()
    with pytest.raises(ConfigError, match="mixer=demanding: needs gram, layers; Recorder provides only losses, valid"):
        run(trainer, Demanding(), 3)
    assert trainer.asked == []


def test_divergence_ends_the_run_after_the_mixer_has_seen_it():
    trainer, mixer = Recorder(diverge_at=3), Counter()
    history = run(trainer, mixer, 10)
    assert [stats.diverged for stats in history] == [False, False, True]
    assert mixer.seen == history


def test_a_missing_reference_model_is_refused_by_name():
    class Excess(Counter):
        name = "excess"
        needs = frozenset({"losses", "excess", "loss_weights"})

    with pytest.raises(ConfigError, match="mixer=excess: needs excess, loss_weights; Recorder provides only"):
        run(Recorder(), Excess(), 1)


# --- Lagged ------------------------------------------------------------------------------------------------


def test_weights_take_effect_lag_steps_late():
    trainer = Recorder()
    lagged, mixer = Lagged(trainer, lag=2), Counter()
    history = run(lagged, mixer, 5)
    used = [weights for weights, _ in trainer.asked]
    assert used == [[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [0.9, 0.1], [0.8, 0.2]]
    assert [stats.requested.tolist() for stats in history] == used
    assert [stats.mixture_age for stats in history] == [2.0] * 5
    assert history[0].pending.tolist() == [[0.5, 0.5], [1.0, 0.0]]  # oldest first
    assert history[4].pending == pytest.approx(np.array([[0.7, 0.3], [0.6, 0.4]]))
    assert lagged.info.lag == 2
    assert trainer.info.lag == 0


def test_no_lag_is_the_inner_trainer():
    trainer = Recorder()
    history = run(Lagged(trainer, lag=0), Counter(), 3)
    assert [weights for weights, _ in trainer.asked] == [pytest.approx([1 - n / 10, n / 10]) for n in range(3)]
    assert all(stats.pending is None and stats.mixture_age == 0.0 for stats in history)


def test_lagged_measures_and_evaluates_through_the_inner_trainer():
    trainer = Recorder()
    lagged = Lagged(trainer, lag=1)
    lagged.measure = frozenset({"losses"})
    assert trainer.measure == lagged.measure == {"losses"}
    assert lagged.provides == trainer.provides
    lagged.reset(np.random.default_rng(0))
    lagged.step(np.array([0.5, 0.5]))
    assert lagged.steps_done == 1
    assert lagged.evaluate("test").tolist() == [1.0, 1.0, 1.0]


def test_the_queue_keeps_its_own_copy():
    trainer = Recorder()
    lagged = Lagged(trainer, lag=1)
    lagged.reset(np.random.default_rng(0))
    weights = np.array([0.9, 0.1])
    lagged.step(weights)
    weights[:] = 0.5
    lagged.step(weights)
    assert trainer.asked[1][0] == [0.9, 0.1]


def test_a_new_run_starts_with_a_full_loader():
    trainer = Recorder()
    lagged = Lagged(trainer, lag=2)
    run(lagged, Counter(), 4)
    run(lagged, Counter(), 2)
    assert [weights for weights, _ in trainer.asked] == [[0.5, 0.5]] * 2


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_saved_and_loaded_equals_uninterrupted(lag, tmp_path):
    mixtures = np.random.default_rng(0).dirichlet([1, 1], size=9)
    through = Lagged(Recorder(), lag=lag)
    first, second = Lagged(Recorder(), lag=lag), Lagged(Recorder(), lag=lag)
    for trainer in (through, first, second):
        trainer.reset(np.random.default_rng(0))
    expected = [through.step(weights) for weights in mixtures]
    for weights in mixtures[:4]:
        first.step(weights)
    write_state(tmp_path / "state", first.state_dict())
    second.load_state_dict(read_state(tmp_path / "state"))
    for weights, wanted in zip(mixtures[4:], expected[4:], strict=True):
        stats = second.step(weights)
        assert stats.step == wanted.step
        np.testing.assert_array_equal(stats.requested, wanted.requested)
        if lag:
            np.testing.assert_array_equal(stats.pending, wanted.pending)


def test_negative_lag_is_refused():
    with pytest.raises(ConfigError, match="lag=-1: must be 0 or more"):
        Lagged(Recorder(), lag=-1)
