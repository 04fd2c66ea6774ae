import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from acodm_env.errors import ConfigError, DataError
from acodm_env.files import read_state, write_state
from acodm_env.pretrain.config import LMConfig, resolve_device
from acodm_env.pretrain.trainer import LMTrainer, target_accelerator
from acodm_env.trainer import Trainer, merge

SMALL = {"batch_size": 6, "sequence_length": 32, "horizon": 8, "decision_every": 2, "device": "cpu"}
WEIGHTS = np.array([0.5, 0.3, 0.2])


def make(store, seed=0, measure=("losses",), **options):
    trainer = LMTrainer(LMConfig(**SMALL | options), store)
    trainer.measure = frozenset(measure)
    trainer.reset(np.random.default_rng(seed))
    return trainer


def test_it_is_a_trainer(tiny_store):
    assert isinstance(make(tiny_store), Trainer)


def test_losses_are_credited_to_the_right_domain_in_a_mixed_batch(tiny_store):
    """A whole batch's loss credited to its first sample's domain is a known defect elsewhere."""
    trainer = make(tiny_store)
    batch = trainer.sampler.draw(WEIGHTS)
    trainer = make(tiny_store)
    with torch.no_grad():
        tokens = torch.from_numpy(batch.tokens)
        logits = trainer.model(input_ids=tokens[:, :-1]).logits
        losses = functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1).numpy()
    expected = [losses[batch.domains == domain].mean() for domain in range(3)]
    stats = trainer.step(WEIGHTS)
    np.testing.assert_allclose(stats.losses, expected, rtol=1e-5)
    assert stats.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert stats.tokens == 6 * 32
    np.testing.assert_array_equal(stats.counts, [3, 2, 1])


def test_the_probe_changes_neither_losses_nor_updates(tiny_store):
    plain, probed = make(tiny_store), make(tiny_store, measure=("losses", "gram", "layers"))
    for _ in range(3):
        first, second = plain.step(WEIGHTS), probed.step(WEIGHTS)
        np.testing.assert_allclose(first.losses, second.losses, rtol=1e-4)
        assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-4)
    assert first.gradients is None
    gram, noise = merge(second, probed.step(WEIGHTS)).gradients.gram()
    assert gram.shape == (3, 3)
    assert np.isfinite(gram[~np.eye(3, dtype=bool)]).all()
    assert noise.shape == (3,)


def test_undrawn_domain_has_no_loss_and_zero_weight_draws_nothing(tiny_store):
    stats = make(tiny_store).step(np.array([0.0, 1.0, 0.0]))
    np.testing.assert_array_equal(stats.counts, [0, 6, 0])
    assert np.isnan(stats.losses[[0, 2]]).all()
    assert np.isfinite(stats.losses[1])


def test_loss_weights_change_the_gradient_not_the_reported_loss(tiny_store):
    plain, weighted = make(tiny_store), make(tiny_store)
    first, second = plain.step(WEIGHTS), weighted.step(WEIGHTS, loss_weights=np.array([2.0, 0.0, 0.0]))
    assert first.loss == second.loss
    assert first.grad_norm != pytest.approx(second.grad_norm, rel=1e-3)
    doubled = make(tiny_store).step(WEIGHTS, loss_weights=np.full(3, 2.0))
    assert doubled.grad_norm == pytest.approx(2 * first.grad_norm, rel=1e-4)


def test_same_seed_same_run_and_global_generators_untouched(tiny_store):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    runs = []
    for _ in range(2):
        trainer = make(tiny_store, seed=3)
        runs.append([trainer.step(WEIGHTS).loss for _ in range(3)])
    other = make(tiny_store, seed=4)
    assert runs[0] == runs[1]
    assert other.step(WEIGHTS).loss != runs[0][0]
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_resumed_run_is_bit_equal(tiny_store, tmp_path):
    whole = make(tiny_store, measure=("losses", "layers"))
    expected = [whole.step(WEIGHTS) for _ in range(6)]
    first = make(tiny_store, measure=("losses", "layers"))
    for _ in range(3):
        first.step(WEIGHTS)
    write_state(tmp_path / "state", first.state_dict())
    second = make(tiny_store, seed=99, measure=("losses", "layers"))
    second.load_state_dict(read_state(tmp_path / "state"))
    got = [second.step(WEIGHTS) for _ in range(3)]
    for a, b in zip(expected[3:], got, strict=True):
        assert (a.step, a.loss, a.grad_norm, a.lr, a.tokens) == (b.step, b.loss, b.grad_norm, b.lr, b.tokens)
        np.testing.assert_array_equal(a.losses, b.losses)
        np.testing.assert_array_equal(a.epochs, b.epochs)
    np.testing.assert_array_equal(expected[3].layer_changes, got[0].layer_changes)
    np.testing.assert_array_equal(whole.evaluate("test"), second.evaluate("test"))


def test_layer_norms_are_reported_at_decisions_only(tiny_store):
    trainer = make(tiny_store, measure=("layers",))
    assert len(trainer.info.initial_layer_norms) == 3
    first, second = trainer.step(WEIGHTS), trainer.step(WEIGHTS)
    assert first.layer_norms is None
    assert second.layer_norms.shape == (3,)
    assert (second.layer_changes > 0).all()


def test_evaluation_is_fixed_and_starts_near_the_logarithm_of_the_vocabulary(tiny_store):
    trainer = make(tiny_store)
    losses = trainer.evaluate("validation")
    np.testing.assert_array_equal(losses, trainer.evaluate("validation"))
    np.testing.assert_allclose(losses, math.log(tiny_store.vocab_size), atol=0.5)
    assert (trainer.evaluate("test") != losses).any()


def test_learning_lowers_the_loss(tiny_store):
    trainer = make(tiny_store, horizon=60)
    before = trainer.evaluate("test").mean()
    for _ in range(60):
        trainer.step(WEIGHTS)
    assert trainer.evaluate("test").mean() < before - 0.5


def test_divergence_is_reported_and_not_applied(tiny_store):
    trainer = make(tiny_store)
    parameter = next(trainer.model.parameters())
    with torch.no_grad():
        parameter[:] = float("nan")
    others = [p.detach().clone() for p in list(trainer.model.parameters())[1:]]
    stats = trainer.step(WEIGHTS)
    assert stats.diverged
    assert all(torch.equal(a, b) for a, b in zip(others, list(trainer.model.parameters())[1:], strict=True))


def test_accelerate_gives_the_same_run_as_plain_torch(tiny_store):
    plain = make(tiny_store)
    target = LMTrainer(LMConfig(**SMALL), tiny_store, target_accelerator("cpu"))
    target.reset(np.random.default_rng(0))
    for _ in range(3):
        assert plain.step(WEIGHTS).loss == target.step(WEIGHTS).loss


@pytest.mark.parametrize(("step", "expected"), [(0, 0.5), (1, 1.0), (2, 1.0), (6, 0.55), (10, 0.1), (99, 0.1)])
def test_schedule_by_hand(step, expected):
    config = LMConfig(horizon=10, warmup_frac=0.2, learning_rate=1.0)
    assert config.lr_at(step) == pytest.approx(expected)
    assert LMConfig(horizon=10, schedule="constant", learning_rate=1.0).lr_at(7) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "tinny"}, "did you mean 'tiny'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"device": "gpu"}, "device=gpu"),
        ({"precondition": True, "sketch_size": 4}, "sketch_size"),
    ],
)
def test_bad_settings_are_refused(tiny_store, options, message):
    with pytest.raises((ConfigError, DataError), match=message):
        make(tiny_store, **{"sequence_length": 16} | options)


def test_domain_shorter_than_a_sequence_is_refused(tiny_store):
    with pytest.raises(DataError, match="domain="):
        make(tiny_store, sequence_length=2048)


def test_cuda_is_refused_where_there_is_none():
    if torch.cuda.is_available():
        assert resolve_device("cuda").type == "cuda"
    else:
        with pytest.raises(ConfigError, match="no CUDA device"):
            resolve_device("cuda")


@pytest.mark.gpu
def test_a_step_on_cuda_in_bf16(tiny_store):
    trainer = make(tiny_store, measure=("losses", "gram"), device="cuda")
    assert trainer.bf16 == torch.cuda.is_bf16_supported()
    stats = trainer.step(WEIGHTS)
    assert np.isfinite(stats.loss)
    assert np.isfinite(stats.gradients.gram()[0]).any()
