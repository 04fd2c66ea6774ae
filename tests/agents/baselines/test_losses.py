import math
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.errors import ConfigError
from acodm_env.files import read_state, write_state
from acodm_env.step_stats import StepStats
from acodm_env.trainer import RunInfo, RunResult, drive
from toy import ToyTrainer

NAMES = ("python", "prose", "maths")
INFO = replace(ToyTrainer((0.2, 0.3, 0.5)).info, domains=NAMES, targets=NAMES)
TARGETS = {"python": 1.0, "prose": 2.0, "maths": 3.0}


def stats_of(losses=None, eval_losses=None, counts=None, diverged=False, step=1):
    num_domains = len(losses if losses is not None else eval_losses if eval_losses is not None else NAMES)
    uniform = np.full(num_domains, 1 / num_domains)
    return StepStats(
        step=step,
        tokens=1,
        requested=uniform,
        realised=uniform,
        counts=np.ones(num_domains) if counts is None else np.array(counts, dtype=float),
        loss_tokens=np.ones(num_domains),
        losses=np.full(num_domains, np.nan) if losses is None else np.array(losses, dtype=float),
        epochs=uniform,
        drawn=uniform,
        eval_losses=None if eval_losses is None else np.array(eval_losses, dtype=float),
        diverged=diverged,
    )


def started(name, info: RunInfo = INFO, **options):
    mixer = make_mixer(name, **options)
    mixer.start(info)
    return mixer


def softmax(logits):
    soft = np.exp(np.array(logits) - np.max(logits))
    return soft / soft.sum()


# --- softmax-loss ------------------------------------------------------------------------------------------


def test_softmax_loss_by_hand():
    mixer = started("softmax-loss")
    np.testing.assert_allclose(mixer.weights(), 1 / 3)
    mixer.update(stats_of([math.log(1), math.log(2), math.log(5)]))
    np.testing.assert_allclose(mixer.weights(), [1 / 8, 2 / 8, 5 / 8])
    warm = started("softmax-loss", temperature=2.0)
    warm.update(stats_of([math.log(1), math.log(4), math.log(9)]))
    np.testing.assert_allclose(warm.weights(), [1 / 6, 2 / 6, 3 / 6])


def test_softmax_loss_smooths_from_the_initial_loss():
    mixer = started("softmax-loss", smoothing=0.75)  # the initial loss is 5 nats
    mixer.update(stats_of([1.0, 5.0, 5.0]))
    mixer.update(stats_of([1.0, 5.0, 3.0]))
    np.testing.assert_allclose(mixer.weights(), softmax([0.75 * 4.0 + 0.25, 5.0, 0.75 * 5 + 0.25 * 3]))


def test_a_domain_not_seen_keeps_its_last_loss():
    mixer = started("softmax-loss")
    mixer.update(stats_of([1.0, np.nan, 3.0], counts=[5, 0, 5]))
    np.testing.assert_allclose(mixer.weights(), softmax([1.0, 5.0, 3.0]))  # before its first draw: ln V
    mixer.update(stats_of([np.nan, 2.0, np.inf]))
    np.testing.assert_allclose(mixer.weights(), softmax([1.0, 2.0, 3.0]))
    mixer.update(stats_of([9.0, 9.0, 8.0], diverged=True))
    np.testing.assert_allclose(mixer.weights(), softmax([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": math.nan}, {"smoothing": 1.0}])
def test_bad_options_of_softmax_loss_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_mixer("softmax-loss", **options)


def test_softmax_loss_drives_and_needs_losses():
    trainer = ToyTrainer((0.2, 0.3, 0.5))
    trainer.reset(np.random.default_rng(0))
    mixer = started("softmax-loss", trainer.info)
    last = [stats.requested for stats in drive(trainer, mixer, 5)][-1]
    np.testing.assert_allclose(last, softmax([1.0, 2.0, 3.0]))
    trainer.provides = frozenset({"validation"})
    with pytest.raises(ConfigError, match="softmax-loss: needs losses"):
        next(drive(trainer, mixer, 1))


# --- sheared-llama -----------------------------------------------------------------------------------------


def test_sheared_llama_by_hand():
    mixer = started("sheared-llama", target_losses=TARGETS, floor=0.1)
    np.testing.assert_allclose(mixer.weights(), 1 / 3)
    mixer.update(stats_of(eval_losses=[1.0 + math.log(2), 2.0 + math.log(3), 3.0 - math.log(2)]))
    first = 0.9 * np.array([2, 3, 0.5]) / 5.5 + 0.1 / 3
    np.testing.assert_allclose(mixer.weights(), first)
    mixer.update(stats_of(eval_losses=[1.0, 2.0 + math.log(2), 3.0]))
    tilted = first * [1, 2, 1]
    np.testing.assert_allclose(mixer.weights(), 0.9 * tilted / tilted.sum() + 0.1 / 3)


@pytest.mark.parametrize(
    ("objective", "metric", "values"),
    [((0.5, 0.25, 0.25), "loss", [1.5, 0.75, 0.75]), ((), "perplexity", [6 / 11, 18 / 11, 9 / 11])],
)
def test_sheared_llama_counts_what_is_lacking_by_what_it_is_worth(objective, metric, values):
    """Losses ln 2, ln 6, ln 3 lie ln 2, ln 6 and ln 3 above targets of 0; perplexities are 2, 6 and 3 of 11."""
    info = replace(INFO, objective=objective, metric=metric)
    mixer = started("sheared-llama", info, target_losses=dict.fromkeys(NAMES, 0.0), floor=1e-9)
    mixer.update(stats_of(eval_losses=np.log([2.0, 6.0, 3.0])))
    tilted = np.array([2.0, 6.0, 3.0]) ** values
    np.testing.assert_allclose(mixer.weights(), tilted / tilted.sum(), rtol=1e-6)


def test_the_papers_form_clips_losses_below_their_target():
    mixer = started("sheared-llama", target_losses=TARGETS, clip=True, floor=1e-9, learning_rate=2.0)
    mixer.update(stats_of(eval_losses=[1.0 + math.log(2), 0.5, 1.0]))
    np.testing.assert_allclose(mixer.weights(), [4 / 6, 1 / 6, 1 / 6], atol=1e-8)


def test_defaults_are_the_published_ones():
    mixer = make_mixer("sheared-llama")
    assert (mixer.learning_rate, mixer.floor, mixer.clip) == (1.0, 1e-4, False)
    assert mixer.paper == "arXiv 2310.06694"


def test_a_reference_run_gives_the_targets_in_the_domains_order():
    info = replace(INFO, targets=("maths", "python", "prose"), horizon=70)
    mixer = make_mixer("sheared-llama")
    (request,) = mixer.preparation(info)
    assert (request.name, request.mixer, request.steps, request.options) == ("reference", "uniform", 70, {})
    final = np.array([3.0, 1.0, 2.0])
    mixer.prepare({"reference": RunResult(mixture=np.ones(3) / 3, initial_losses=final + 2, final_losses=final)})
    mixer.start(info)
    mixer.update(stats_of(eval_losses=[3.0, 1.0 + math.log(2), 2.0]))  # python alone lacks something
    np.testing.assert_allclose(mixer.weights(), [0.5, 0.25, 0.25], atol=1e-4)


def test_given_targets_ask_for_no_run():
    mixer = make_mixer("sheared-llama", target_losses=TARGETS)
    assert mixer.preparation(INFO) == ()
    mixer.prepare({})
    mixer.start(INFO)


def test_without_its_preparation_it_does_not_start():
    with pytest.raises(ConfigError, match=r"sheared-llama: needs its preparatory runs first.*or give target_losses"):
        started("sheared-llama")


def test_a_diverged_reference_is_refused():
    final = np.array([3.0, np.nan, 2.0])
    with pytest.raises(ConfigError, match="reference run must end with finite losses"):
        make_mixer("sheared-llama").prepare(
            {"reference": RunResult(mixture=np.ones(3) / 3, initial_losses=np.ones(3), final_losses=final)}
        )


@pytest.mark.parametrize("targets", [("python", "prose"), ("python", "prose", "law"), (*NAMES, "law")])
def test_other_targets_than_the_domains_are_refused(targets):
    info = replace(INFO, targets=targets)
    odd = "maths" if len(targets) == 2 else "law"
    with pytest.raises(ConfigError, match=f"not both: .*{odd}"):
        make_mixer("sheared-llama").preparation(info)
    with pytest.raises(ConfigError, match=f"not both: .*{odd}"):
        started("sheared-llama", info, target_losses=TARGETS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"floor": 0.0}, "floor"),
        ({"floor": 1.1}, "floor"),
        ({"target_losses": {"python": math.nan}}, r"target_losses\.python=nan"),
        ({"target_losses": {"python": "low"}}, r"target_losses\.python=low"),
        ({"target_losses": {"python": None}}, r"target_losses\.python=None"),
        ({"target_losses": {"pyton": 1.0}}, "pyton.*did you mean 'python'"),
        ({"target_losses": {"python": 1.0}}, "missing prose, maths"),
    ],
)
def test_bad_options_of_sheared_llama_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        started("sheared-llama", **options)


def test_missing_losses_and_diverged_steps():
    mixer = started("sheared-llama", target_losses=TARGETS)
    mixer.update(stats_of(eval_losses=[np.nan, 2.0, 3.0]))  # never measured: as if on target
    np.testing.assert_allclose(mixer.weights(), 1 / 3)
    mixer.update(stats_of(eval_losses=[2.0, 2.0, 3.0]))
    tilted = mixer.weights()
    mixer.update(stats_of(eval_losses=[9.0, 2.0, 3.0], diverged=True))
    mixer.update(stats_of())  # no evaluation
    np.testing.assert_array_equal(mixer.weights(), tilted)
    mixer.update(stats_of(eval_losses=[np.nan, 2.0, 3.0]))  # keeps its last: again 1 nat above
    again = tilted * [math.e, 1, 1]
    np.testing.assert_allclose(mixer.weights(), (1 - 1e-4) * again / again.sum() + 1e-4 / 3)


def test_sheared_llama_learns_at_decisions_only():
    trainer = ToyTrainer((0.2, 0.3, 0.5), decision_every=4)
    trainer.reset(np.random.default_rng(0))
    mixer = started("sheared-llama", trainer.info, target_losses={"domain0": 0.0, "domain1": 1.0, "domain2": 2.0})
    first = [stats.requested[0] for stats in drive(trainer, mixer, 12)]
    assert first[:4] == [1 / 3] * 4
    assert first[4] == first[7] > first[0]
    assert first[8] == first[11] > first[4]


# --- both --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("softmax-loss", {}), ("sheared-llama", {"target_losses": TARGETS})])
def test_state_is_exact_and_instances_are_independent(name, options, tmp_path):
    rows = np.random.default_rng(0).uniform(1, 6, size=(30, 3))
    through, first, second = (started(name, **options) for _ in range(3))
    expected = []
    for row in rows:
        through.update(stats_of(row, row))
        expected.append(through.weights())
    np.testing.assert_allclose(second.weights(), 1 / 3)
    for row in rows[:11]:
        first.update(stats_of(row, row))
    write_state(tmp_path / "state.safetensors", first.state_dict())
    saved = first.state_dict()
    first.update(stats_of(rows[0], rows[0]))
    np.testing.assert_array_equal(saved["losses"], rows[10])  # a copy
    second.load_state_dict(read_state(tmp_path / "state.safetensors"))
    for row, weights in zip(rows[11:], expected[11:], strict=True):
        second.update(stats_of(row, row))
        np.testing.assert_array_equal(second.weights(), weights)
    second.weights()[:] = 7.0
    assert second.weights().sum() == pytest.approx(1.0)
    second.start(INFO)
    np.testing.assert_allclose(second.weights(), 1 / 3)


@pytest.mark.parametrize("loss", [3.0, 1000.0])
@pytest.mark.parametrize(("name", "options"), [("softmax-loss", {}), ("sheared-llama", {"target_losses": TARGETS})])
def test_20000_updates_with_constant_losses_stay_finite(name, options, loss):
    mixer = started(name, **options)
    stats = stats_of([loss, loss, loss / 2], [loss, loss, loss / 2])
    for _ in range(20_000):
        mixer.update(stats)
    weights = mixer.weights()
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "options"), [("softmax-loss", {}), ("sheared-llama", {"target_losses": {"a": 1.0}})])
def test_one_domain_is_a_mixture_too(name, options):
    mixer = started(name, replace(INFO, domains=("a",), targets=("a",), sizes_tokens=(9,)), **options)
    mixer.update(stats_of([3.0], [3.0]))
    assert mixer.weights().tolist() == [1.0]
