import math
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional

from acodm_env.errors import ConfigError, DataError
from acodm_env.files import read_state, write_state
from acodm_env.pretrain.config import LMConfig, resolve_device
from acodm_env.pretrain.models import blocks
from acodm_env.pretrain.trainer import LMTrainer, target_accelerator
from acodm_env.step_stats import merge
from acodm_env.trainer import Trainer
from acodm_env.wrapper import Lagged

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


def test_a_step_that_is_not_finite_can_be_skipped(tiny_store):
    """Its batch is drawn, its update is not applied, and what it measured is as if the domain had not been drawn."""
    trainer = make(tiny_store, measure=("losses", "gram"), on_nonfinite="skip")
    own = trainer._token_losses

    def poisoned(model, rows):
        losses = own(model, rows)
        return torch.cat([losses[:1] * float("nan"), losses[1:]])  # a row of the first domain

    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer._token_losses = poisoned
    bad = trainer.step(WEIGHTS)
    assert (bad.step, bad.diverged, bad.skipped, bad.gradients) == (1, False, 1, None)
    assert bad.guilty.tolist() == [True, False, False]
    assert bad.loss_tokens.tolist() == [0, 2 * 31, 31]
    assert bad.loss == pytest.approx((2 * bad.losses[1] + bad.losses[2]) / 3)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    del trainer._token_losses
    good = trainer.step(WEIGHTS)
    assert (good.step, good.skipped, good.drawn.sum()) == (2, 0, 12)
    assert not any(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True) if a.ndim > 1)
    window = merge(bad, good)
    assert (window.skipped, window.diverged) == (1, False)
    assert window.losses[0] == pytest.approx(good.losses[0], rel=1e-14)  # times its tokens and divided by them
    assert window.losses[1] == pytest.approx((bad.losses[1] + good.losses[1]) / 2)


def test_the_domains_of_a_loss_that_is_not_finite_are_named(tiny_store):
    trainer = make(tiny_store)
    own = trainer._token_losses
    trainer._token_losses = lambda model, rows: torch.cat([own(model, rows[:-1]), own(model, rows[-1:]) + torch.inf])
    stats = trainer.step(WEIGHTS)
    assert stats.diverged
    assert stats.guilty.tolist() == [False, False, True]


@pytest.mark.parametrize("options", [{}, {"sketch_size": 16}])
def test_micro_batches_add_up_to_the_batch(tiny_store, options):
    measure = ("losses", "gram")
    whole, divided = (make(tiny_store, measure=measure, accumulation=n, **options) for n in (1, 3))
    for factors in (None, np.array([2.0, 0.5, 1.25]), None):
        first, second = whole.step(WEIGHTS, factors), divided.step(WEIGHTS, factors)
        np.testing.assert_array_equal(first.counts, second.counts)
        np.testing.assert_allclose(second.losses, first.losses, rtol=1e-5)
        assert (second.loss, second.grad_norm) == pytest.approx((first.loss, first.grad_norm), rel=1e-5)
        for mine, theirs in zip(second.gradients.gram(), first.gradients.gram(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5 * np.nanmax(np.abs(theirs)))
    np.testing.assert_allclose(divided.evaluate("test"), whole.evaluate("test"), rtol=1e-5)


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_store):
    plain, frugal = (make(tiny_store, measure=("gram",), gradient_checkpointing=on) for on in (False, True))
    passes = {}
    for trainer in (plain, frugal):
        block = blocks(trainer.bare_model)[0]
        next(block.children()).register_forward_hook(
            lambda *_, key=trainer: passes.update({key: passes.get(key, 0) + 1})
        )
    for _ in range(2):
        first, second = plain.step(WEIGHTS), frugal.step(WEIGHTS)
        assert passes[frugal] == 2 * passes[plain]
        assert (first.loss, first.grad_norm) == pytest.approx((second.loss, second.grad_norm), rel=1e-6)
        np.testing.assert_allclose(first.gradients.gram()[0], second.gradients.gram()[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch asks itself, and hides its answer badly
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_trains_alike_without_being_compiled_again(tiny_store, backend):
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no C++ compiler")
    plain = make(tiny_store, measure=("gram",), sketch_size=16)
    compiled = make(tiny_store, measure=("gram",), sketch_size=16, compile=True, compile_backend=backend)
    torch._dynamo.utils.counters.clear()
    graphs = []
    for step in range(4):
        weights = np.random.default_rng(step).dirichlet(np.ones(3))  # another composition every time
        first, second = plain.step(weights), compiled.step(weights)
        np.testing.assert_allclose(first.losses, second.losses, rtol=1e-5)
        np.testing.assert_allclose(first.gradients.gram()[0], second.gradients.gram()[0], rtol=1e-3, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0
    assert compiled.state_dict()["model"].keys() == plain.state_dict()["model"].keys()


def test_a_compiled_model_is_sketched(tiny_store):
    """Whole slices would be compiled anew for every composition."""
    assert make(tiny_store)._sketch_size(3) is None
    compiled = make(tiny_store, compile=True, compile_backend="eager")
    assert compiled._sketch_size(3) == 64
    assert make(tiny_store, compile=True, compile_backend="eager", sketch_size=7)._sketch_size(3) == 7


def test_prefetching_is_the_lag_that_is_played(tiny_store):
    mixtures = np.random.default_rng(0).dirichlet(np.ones(3), size=5)
    played, prefetching = Lagged(make(tiny_store), lag=2), make(tiny_store, prefetch=2)
    played.reset(np.random.default_rng(0))
    assert prefetching.info.lag == 2
    for step, weights in enumerate(mixtures):
        first, second = played.step(weights), prefetching.step(weights)
        for name in ("counts", "requested", "losses", "pending", "epochs", "drawn"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
        assert first.mixture_age == second.mixture_age == 2.0
        assert second.decision == max(step - 2, -1)
    prefetching.close()


def test_resuming_a_prefetching_run_is_bit_equal(tiny_store):
    whole, first, second = (make(tiny_store, prefetch=2) for _ in range(3))
    mixtures = np.random.default_rng(0).dirichlet(np.ones(3), size=6)
    expected = [whole.step(weights) for weights in mixtures]
    for weights in mixtures[:3]:
        first.step(weights)
    second.load_state_dict(first.state_dict())
    for weights, wanted in zip(mixtures[3:], expected[3:], strict=True):
        stats = second.step(weights)
        assert (stats.loss, stats.decision, stats.mixture_age) == (wanted.loss, wanted.decision, wanted.mixture_age)
        np.testing.assert_array_equal(stats.losses, wanted.losses)
    for trainer in (whole, first, second):
        trainer.close()


def test_lag_and_prefetching_together_are_refused(tiny_store):
    with pytest.raises(ConfigError, match=r"lag=1: the trainer has one of 2 by prefetching"):
        Lagged(make(tiny_store, prefetch=2), lag=1)


def test_every_part_of_a_step_has_its_seconds(tiny_store):
    plain, probed = make(tiny_store).step(WEIGHTS), make(tiny_store, measure=("gram",)).step(WEIGHTS)
    assert plain.seconds.keys() == probed.seconds.keys() == {"data", "train", "probe"}
    assert all(seconds > 0 for seconds in probed.seconds.values())
    assert plain.seconds["probe"] < plain.seconds["train"]
    both = merge(plain, probed)
    assert both.seconds["train"] == pytest.approx(plain.seconds["train"] + probed.seconds["train"])


def test_a_state_of_another_model_is_refused_by_name(tiny_store):
    state = make(tiny_store, model="small").state_dict()
    with pytest.raises(DataError, match=r"checkpoint: '.*' has shape .* another model's"):
        make(tiny_store).load_state_dict(state)


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
        ({"precondition": True, "compile": True}, "precondition=True: needs whole gradients"),
        ({"accumulation": 0}, "accumulation=0: must be at least 1"),
        ({"accumulation": 4}, r"batch_size=6: must be divisible by 4, 1 processes × accumulation=4; .* take 4"),
        ({"prefetch": -1}, "prefetch=-1: must be 0 or more"),
        ({"parallel": "fdsp"}, "did you mean 'fsdp'"),
        ({"parallel": "fsdp"}, "parallel=fsdp: needs processes .* torchrun"),
        ({"on_nonfinite": "halt"}, "on_nonfinite='halt'"),
        ({"compile": True, "compile_backend": "induktor"}, "did you mean 'inductor'"),
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


def test_compiling_without_a_compiler_is_refused(tiny_store, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"compile=True: needs a C\+\+ compiler"):
        make(tiny_store, compile=True)


@pytest.mark.gpu
def test_a_step_on_cuda_in_bf16(tiny_store):
    trainer = make(tiny_store, measure=("losses", "gram"), device="cuda")
    assert trainer.bf16 == torch.cuda.is_bf16_supported()
    stats = trainer.step(WEIGHTS)
    assert np.isfinite(stats.loss)
    assert np.isfinite(stats.gradients.gram()[0]).any()
