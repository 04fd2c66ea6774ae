"""The offline gate: a good, a random and a broken policy, and every number of it by hand."""

import numpy as np
import pytest
from general_policy import general

from acodm_env.agents.gate import (
    FAILED,
    NOT_CHECKED,
    PASSED,
    Thresholds,
    check_continuity,
    check_mixtures,
    check_support,
    check_value,
    judge,
)
from acodm_env.agents.gate_rollouts import Answers, Played, answer, imagined_run, play, sweep
from acodm_env.errors import ConfigError
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.observation import Observer
from acodm_env.policy.dense import Policy
from acodm_env.policy.equivariant import PER_DOMAIN, EquivariantPolicy, scalings_of
from acodm_env.surrogate.surface import Surface
from acodm_env.surrogate.trainer import SurrogateTrainer

SURFACE = Surface.load("regmix-1m")
INFO = SurrogateTrainer(SURFACE).info
NUM_DOMAINS = len(SURFACE.domains)
FIELDS = ("target_loss", "delta_target_loss", "sample_share", "progress")
STATISTICS = {
    "target_loss": (5.0, 2.0),
    "delta_target_loss": (-0.1, 1.0),
    "sample_share": (1 / 17, 0.05),
    "progress": (0.5, 0.3),
}
USELESS = ("nih_exporter", "philpapers", "enron_emails", "europarl")  # no targets, and they help the targets little


def dense(weight=None, bias=None, **settings):
    """A policy of one layer, tanh(weight · z + bias), on the shipped surface."""
    layout = Observer(INFO, FIELDS).layout
    sizes = [size for _, size in layout]
    mean, scale = (np.repeat([STATISTICS[name][i] for name in FIELDS], sizes) for i in (0, 1))
    weight = np.zeros((NUM_DOMAINS, sum(sizes))) if weight is None else weight
    bias = np.zeros(NUM_DOMAINS) if bias is None else bias
    known = {
        "domains": SURFACE.domains,
        "fields": layout,
        "mean": mean,
        "scale": scale,
        "clip": 10.0,
        "layers": ((weight.astype(np.float32), bias.astype(np.float32), "tanh"),),
        "action": ActionMap(scale=3.0, floor=0.05),
        "bounds": Bounds(),
        "interaction": InteractionConfig(),
        "decision_every": 2,
        "horizon": 40,
        "gradients": INFO.gradients,
    }
    return Policy(**known | settings)


def good(noisy=0.1):
    """Little of what is useless, and a gentle reaction to everything."""
    bias = np.array([-0.9 if name in USELESS else 0.5 for name in SURFACE.domains])
    width = sum(size for _, size in Observer(INFO, FIELDS).layout)
    return dense(np.random.default_rng(0).normal(0, noisy / np.sqrt(width), (NUM_DOMAINS, width)), bias)


def verdicts(policy, **options):
    return {check.name: check for check in judge(policy, SURFACE, seeds=2, **options)}


def named(checks, verdict):
    return {name for name, check in checks.items() if check.verdict == verdict}


def test_good_policy_passes():
    checks = verdicts(good())
    assert named(checks, FAILED) == set()
    assert named(checks, NOT_CHECKED) == {"fits"}
    value = checks["surrogate value"]
    assert value.value < -0.02
    assert value.value == pytest.approx(value.measured["policy"] - value.measured["uniform"])
    assert {"own mean", "odm-released-rescaled", "odm-paper-rescaled"} <= value.measured.keys()
    assert "weight moves by up to" in checks["reacts"].explanation


def test_verdicts_are_the_same_every_time():
    assert judge(good(), SURFACE, seeds=2) == judge(good(), SURFACE, seeds=2)


def test_uniform_policy_is_constant_which_is_said_and_fails_nothing():
    checks = verdicts(dense())
    assert named(checks, FAILED) == set()
    assert checks["surrogate value"].value == pytest.approx(0.0, abs=1e-12)
    assert checks["entropy"].value == pytest.approx(1.0)
    assert checks["continuous"].value == 0.0
    assert "constant" in checks["reacts"].explanation


def test_random_policies_behave_but_lose_to_uniform():
    """Untrained actors of the usual shape: nothing is wrong with their form, but most of them cost loss."""
    width = sum(size for _, size in Observer(INFO, FIELDS).layout)
    sizes = ((64, width, "relu"), (64, 64, "relu"), (NUM_DOMAINS, 64, "tanh"))
    blank = tuple((np.zeros((o, i), np.float32), np.zeros(o, np.float32), name) for o, i, name in sizes)
    policy = dense(layers=blank)
    checks = [verdicts(policy.untrained(np.random.default_rng(seed))) for seed in range(8)]
    assert all(named(one, FAILED) <= {"surrogate value"} for one in checks)
    assert sum(one["surrogate value"].verdict == FAILED for one in checks) >= 4


def test_a_policy_for_any_problem_is_played_on_the_surrogate():
    policy = general(horizon=4, decision_every=1, support={"num_rows": [3, 40], "steps_per_decision": [4, None]})
    aim = imagined_run(policy, ("x", "y", "z"), 9.0, objective={"y": 0.5, "elsewhere": 0.5})
    checks = {check.name: check for check in judge(policy, SURFACE, seeds=1, run=aim)}
    assert (aim.horizon, aim.decision_every) == (16, 4)
    assert (aim.rows, aim.objective) == (("x", "y", "z", "elsewhere"), (0.5, 0.5))
    assert named(checks, NOT_CHECKED) == set()
    assert checks["fits"].verdict == PASSED
    assert np.isfinite(checks["surrogate value"].value)


def test_outside_of_its_training_support_it_is_not_judged_and_the_rule_is_named():
    policy = general(horizon=4, decision_every=1, support={"num_rows": [3, 5]})
    aim = imagined_run(policy, tuple("abcdef"), 9.0, objective={"a": 1.0})
    checks = {check.name: check for check in judge(policy, SURFACE, seeds=1, run=aim)}
    assert "6 domains and targets, it is meant for 3 to 5; a fixed rule drives instead" in checks["fits"].explanation
    assert checks["fits"].verdict == PASSED
    assert checks["surrogate value"].verdict == NOT_CHECKED
    assert "outside of its training support" in checks["surrogate value"].explanation


def test_an_objective_that_it_was_not_learned_for_fails():
    policy = dense(provenance={"config": {"objective": "loss", "targets": "github=2,wikipedia_en=1"}})
    checks = verdicts(policy, run=INFO)
    assert named(checks, FAILED) == {"fits"}
    assert "learned for the mean loss of github ×2, wikipedia_en, this run's objective is" in checks["fits"].explanation


def test_broken_weights_fail_and_everything_else_is_left_open():
    checks = verdicts(dense(bias=np.full(NUM_DOMAINS, np.nan)))
    assert named(checks, FAILED) == {"finite"}
    assert checks["finite"].value == 1.0
    open_ = {"surrogate value", "support", "entropy", "boundary", "continuous", "reacts"}
    assert named(checks, NOT_CHECKED) == {"fits", *open_}
    assert {checks[name].explanation for name in open_} == {"its output is not finite"}


def test_saturated_policy_fails():
    checks = verdicts(dense(bias=np.where(np.arange(NUM_DOMAINS) == 5, 20.0, -20.0)))
    assert named(checks, FAILED) == {"surrogate value", "entropy", "boundary"}
    assert checks["boundary"].value == 1.0
    # α = 0.95·e^3/(e^3 + 16·e^-3) + 0.05/17 for the one, and what is left for the sixteen others
    largest = 0.95 * np.exp(3) / (np.exp(3) + 16 * np.exp(-3)) + 0.05 / 17
    rest = (1 - largest) / 16
    entropy = -(largest * np.log(largest) + 16 * rest * np.log(rest)) / np.log(17)
    assert checks["entropy"].value == pytest.approx(entropy)
    assert checks["entropy"].measured["largest"] == pytest.approx(largest)


def test_discontinuous_policy_fails():
    width = sum(size for _, size in Observer(INFO, FIELDS).layout)
    checks = verdicts(dense(1e6 * np.random.default_rng(0).normal(size=(NUM_DOMAINS, width))))
    assert {"continuous", "boundary"} <= named(checks, FAILED)
    assert "finite" in named(checks, PASSED)
    assert checks["continuous"].value > 0.05


def test_policy_with_layer_fields_fits_no_surrogate_and_fails_nothing():
    layout = (("loss", 2), ("layer_norm", 3), ("progress", 1))
    policy = dense(
        domains=("prose", "code"),
        fields=layout,
        mean=np.zeros(6),
        scale=np.ones(6),
        layers=((np.eye(2, 6, dtype=np.float32), np.zeros(2, dtype=np.float32), "tanh"),),
    )
    checks = verdicts(policy)
    assert named(checks, FAILED) == set()
    assert named(checks, NOT_CHECKED) == {"fits", "surrogate value", "support"}
    assert "it reads layer_norm, which no surrogate has" in checks["surrogate value"].explanation


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"domains": tuple(reversed(SURFACE.domains))}, "bound to its 17 domains, this surface has 17 others"),
        ({"fields": (("interaction", 17),), "gradients": "sketch"}, "learned with gradients measured as [sketch]"),
        ({"bounds": Bounds(max_epochs=1e-9)}, "no mixture fits"),
    ],
)
def test_surrogate_that_does_not_fit_is_said_with_its_reason(change, reason):
    if "fields" in change:
        layers = ((np.zeros((17, 17), np.float32), np.zeros(17, np.float32), "tanh"),)
        change |= {"layers": layers, "mean": np.zeros(17), "scale": np.ones(17)}
    check = verdicts(dense(**change))["surrogate value"]
    assert check.verdict == NOT_CHECKED
    assert reason in check.explanation


def equivariant(size=0.3, seed=0, fields=(("loss", PER_DOMAIN), ("sample_share", PER_DOMAIN), ("progress", 1))):
    """φ: 3 features of a domain and 1 of the run → 4; ρ: 3·4 + 1 → 1."""
    rng = np.random.default_rng(seed)
    shapes = ((4, 4, "relu"), (1, 13, "identity"))
    layers = tuple(
        (size * rng.normal(size=(o, i)).astype(np.float32), np.zeros(o, np.float32), a) for o, i, a in shapes
    )
    return EquivariantPolicy(
        fields=fields,
        scalings=scalings_of(fields),
        encoder=1,
        layers=layers,
        action=ActionMap(scale=3.0, floor=0.05),
        bounds=Bounds(),
        interaction=InteractionConfig(),
        decision_every=1,
        horizon=20,
        lag=2,
    )


def test_equivariant_policy_is_judged_on_any_surface():
    checks = verdicts(equivariant())
    assert named(checks, NOT_CHECKED) == {"fits"}
    assert {"finite", "support", "entropy", "boundary", "continuous"} <= named(checks, PASSED)
    assert checks["support"].explanation.startswith("0% of 42 observations have an entry beyond the bounds")
    assert "continuous" in named(verdicts(equivariant(size=1e4)), FAILED)


def test_equivariant_policy_without_surrogate_has_no_observations_to_judge_mixtures_by():
    fields = (("loss", PER_DOMAIN), ("interaction", PER_DOMAIN), ("progress", 1))
    checks = verdicts(equivariant(fields=fields))
    assert named(checks, NOT_CHECKED) == {"fits", "surrogate value", "support", "entropy", "boundary"}
    assert named(checks, FAILED) == set()


# --- numbers by hand ----------------------------------------------------------------------------------------


def test_uniform_run_ends_at_the_fitted_law():
    played = play(dense(), SURFACE.without_repetition(), range(1))
    expected = SURFACE.law.predict(np.full((1, NUM_DOMAINS), 1 / NUM_DOMAINS))[0] @ SURFACE.objective_weights
    assert played.losses["uniform"][0] == pytest.approx(expected, abs=1e-6)
    assert played.losses["policy"][0] == pytest.approx(expected, abs=1e-6)
    assert len(played.observations) == 21  # before the first step and after every second of 40


def test_long_runs_are_shortened_with_their_interval():
    played = play(dense(horizon=4000, decision_every=40), SURFACE, range(1))
    assert len(played.observations) == 101  # 400 steps, a decision every 4


def result(policy, uniform=4.0, other=4.0):
    losses = {"policy": policy, "own mean": other, "uniform": uniform, "odm-paper-rescaled": 3.9}
    return Played(SURFACE, {name: np.array([value]) for name, value in losses.items()}, np.zeros((1, 48)), np.zeros(1))


@pytest.mark.parametrize(
    ("loss", "verdict", "behind"),
    [
        (3.8, PASSED, ""),
        (3.95, PASSED, "behind odm-paper-rescaled"),
        (4.004, PASSED, "behind own mean, odm-paper-rescaled"),
        (4.006, FAILED, "behind own mean, odm-paper-rescaled"),
        (np.nan, FAILED, ""),
    ],
)
def test_losing_to_uniform_fails_losing_to_others_is_said(loss, verdict, behind):
    check = check_value(result(loss), Thresholds())
    assert check.verdict == verdict
    assert check.explanation.partition("; ")[2].partition("; ")[2] == behind


def test_support_by_hand():
    """Root mean square distance of a field: 6 deviations everywhere is outside, one entry of 13 at 6 is not."""
    policy = dense()
    observations = np.tile(policy.mean, (4, 1))
    observations[0] += 6 * policy.scale
    observations[1, 0] += 6 * policy.scale[0]
    observations[2, -1] -= 6 * policy.scale[-1]  # progress is a single number
    played = Played(SURFACE, {"policy": np.zeros(1)}, observations, np.zeros(4))
    check = check_support(policy, played, Thresholds(outside=0.4))
    assert (check.value, check.verdict) == (0.5, FAILED)
    assert check.measured["progress"] == 0.5
    assert check.measured["target_loss"] == 0.25
    assert "most often progress" in check.explanation


def test_mixtures_by_hand():
    """(½, ½, 0, 0) has ln 2 of ln 4; 3 of 4 actions lie beyond 0.95."""
    actions, mixtures = np.array([[1.0, 0.96, -1.0, 0.9]]), np.array([[0.5, 0.5, 0.0, 0.0]])
    bounds = np.zeros(1, dtype=np.float32)
    met = Answers(np.zeros((1, 1), dtype=np.float32), bounds, bounds, actions, mixtures)
    entropy, boundary = check_mixtures(dense(), met, Thresholds(entropy=0.51, boundary=0.7))
    assert (entropy.value, entropy.verdict) == (pytest.approx(0.5), FAILED)
    assert (boundary.value, boundary.verdict) == (0.75, FAILED)
    assert [check.verdict for check in check_mixtures(dense(), met, Thresholds())] == [PASSED, PASSED]


def test_continuity_by_hand():
    """Of two domains, α = softmax(c·tanh(k·p)) is steepest at p = 0, where it rises by k·c/4 times the change of p.

    The range is 10·0.05 = 0.5, narrower than [0, 1]; halving [0, 1] first falls below a thousandth of it at 2^-11.
    """
    policy = dense(
        domains=("a", "b"),
        fields=(("progress", 1),),
        mean=np.zeros(1),
        scale=np.full(1, 0.05),
        layers=((np.array([[20 * 0.05], [0.0]], dtype=np.float32), np.zeros(2, dtype=np.float32), "tanh"),),
        action=ActionMap(scale=2.0, floor=0.0),
    )
    swept = answer(policy, np.array([[0.0], [1.0]], dtype=np.float32), imagined_run(policy, ("a", "b"), 5.0))
    check = check_continuity(policy, [swept], Thresholds(jump=0.004), np.random.default_rng(0))
    assert check.value == pytest.approx(0.25 * 2.0 * 20 * 2**-11, rel=1e-3)
    assert check.verdict == FAILED


def test_a_jump_is_found_wherever_it_hides():
    """α steps by tanh(1) at p = 0.7134, in a range of a millionth: no two of the observations are that near to it."""
    layers = (
        (np.array([[1e6]], dtype=np.float32), np.array([-0.7134e6], dtype=np.float32), "clip"),
        (np.array([[1.0], [0.0]], dtype=np.float32), np.zeros(2, dtype=np.float32), "identity"),
    )
    small = {"fields": (("progress", 1),), "mean": np.zeros(1), "scale": np.ones(1)}
    policy = dense(domains=("a", "b"), layers=layers, action=ActionMap(scale=1.0, floor=0.0), **small)
    swept = answer(policy, np.array([[0.0], [1.0]], dtype=np.float32), imagined_run(policy, ("a", "b"), 5.0))
    check = check_continuity(policy, [swept], Thresholds(), np.random.default_rng(0))
    assert check.value == pytest.approx(1 / (1 + np.exp(-1)) - 1 / (1 + np.exp(1)))
    assert check.verdict == FAILED


def test_sweep_covers_the_bounds_and_their_corners():
    policy = dense()
    swept = sweep(policy, imagined_run(policy, SURFACE.domains, 5.0), np.random.default_rng(0))
    np.testing.assert_array_equal(swept.observations.min(0), swept.low)
    np.testing.assert_array_equal(swept.observations.max(0), swept.high)
    corner = ((swept.observations == swept.low) | (swept.observations == swept.high)).all(-1)
    assert corner.sum() == 66
    assert swept.high[0] == 10.0  # twice the initial loss


def test_corpus_with_other_domains_fails():
    policy = dense()
    assert verdicts(policy, run=imagined_run(policy, SURFACE.domains, 9.0))["fits"].verdict == PASSED
    check = verdicts(policy, run=imagined_run(policy, ("a", "b"), 9.0))["fits"]
    assert check.verdict == FAILED
    assert "only in the corpus: ['a', 'b']" in check.explanation


@pytest.mark.parametrize("setting", ["outside", "entropy", "boundary", "jump", "worse_than_uniform"])
def test_thresholds_out_of_range_are_refused(setting):
    with pytest.raises(ConfigError, match=rf"{setting}=-0\.1: must be"):
        Thresholds(**{setting: -0.1})
