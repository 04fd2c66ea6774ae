"""Fused token losses against those of the logits, and the models whose logits they may not replace."""

import numpy as np
import pytest
import torch
from gradient_reference import assert_near
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, PhiConfig

from acodm_env.pretrain.checkpoint import to_numpy
from acodm_env.pretrain.config import LMConfig
from acodm_env.pretrain.head import FusedHead, token_losses
from acodm_env.pretrain.models import build_model
from acodm_env.pretrain.trainer import LMTrainer, target_accelerator

SMALL = {"batch_size": 6, "sequence_length": 32, "horizon": 8, "decision_every": 2, "device": "cpu"}
WEIGHTS = np.array([0.5, 0.3, 0.2])
FACTORS = np.array([2.0, 0.0, 1.25])
UNDROPPED = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
SHAPE = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def make(store, measure=("losses",), seed=0, reference=None, accelerator=None, **options):
    trainer = LMTrainer(LMConfig(**SMALL | options), store, accelerator, reference=reference)
    trainer.measure = frozenset(measure)
    trainer.reset(np.random.default_rng(seed))
    return trainer


def by_logits(*args, **options):
    trainer = make(*args, **options)
    assert trainer._heads
    trainer._heads = {}
    return trainer


def build(config):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return AutoModelForCausalLM.from_config(config)


def plain_losses(hidden, weight, targets):
    return functional.cross_entropy(hidden @ weight.T, targets, reduction="none")


def draw(num_tokens, scale=1.0, width=8, vocabulary=50):
    rng = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(num_tokens, width, generator=rng)
    weight = torch.randn(vocabulary, width, generator=rng)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(vocabulary, (num_tokens,), generator=rng)


# --- the function --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 300])
def test_losses_and_gradients_equal_those_of_the_logits(num_tokens):
    """Under any gradient of the token losses, zeros among them."""
    hidden, weight, targets = draw(num_tokens)
    upstream = torch.linspace(-1, 2, num_tokens).round(decimals=1)
    expected = plain_losses(hidden, weight, targets)
    losses = token_losses(hidden, weight, targets)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    wanted = torch.autograd.grad(expected, (hidden, weight), upstream)
    for _ in range(2):  # what is kept for the backward pass is not used up
        got = torch.autograd.grad(losses, (hidden, weight), upstream, retain_graph=True)
        for mine, theirs in zip(got, wanted, strict=True):
            assert_near(mine, theirs, 1e-6)
    with torch.no_grad():
        torch.testing.assert_close(token_losses(hidden, weight, targets), expected, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    hidden, weight, targets = draw(130, width=3, vocabulary=5)
    wide = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    assert torch.autograd.gradcheck(lambda *inputs: token_losses(*inputs, targets).view(2, -1).sum(1), wide)


def test_by_hand():
    """Logits (0, log 3): probabilities 1/4 and 3/4."""
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [np.log(3)]], dtype=torch.float32, requires_grad=True)
    losses = token_losses(hidden, weight, torch.tensor([0, 1]))
    np.testing.assert_allclose(losses.detach(), [np.log(4), np.log(4 / 3)], rtol=1e-6)
    losses.sum().backward()
    np.testing.assert_allclose(weight.grad, [[-0.5], [0.5]], rtol=1e-6)  # (1/4 - 1) + 1/4 and 3/4 + (3/4 - 1)
    np.testing.assert_allclose(hidden.grad, np.log(3) * np.array([[0.75], [-0.25]]), rtol=1e-6)


def test_logits_of_any_size():
    """A probability of 0 in float32 has its loss all the same."""
    hidden, weight, targets = draw(40, scale=1e3)
    losses, expected = token_losses(hidden, weight, targets), plain_losses(hidden, weight, targets)
    assert losses.max() > 1000
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-3)
    broken = torch.cat([hidden[:1] * torch.nan, hidden[1:]])
    assert token_losses(broken, weight, targets).isnan().tolist() == [True] + [False] * 39


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    inputs = list(draw(20))
    inputs[frozen] = inputs[frozen].detach()
    (mine,) = torch.autograd.grad(token_losses(*inputs).sum(), inputs[1 - frozen])
    (theirs,) = torch.autograd.grad(plain_losses(*inputs).sum(), inputs[1 - frozen])
    assert_near(mine, theirs, 1e-6)


# --- the models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE),
        LlamaConfig(**SHAPE, tie_word_embeddings=True),
        GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=31, bos_token_id=None, eos_token_id=None, **UNDROPPED),
    ],
    ids=["llama", "llama-tied", "gpt-2"],
)
def test_a_model_of_plain_logits_has_a_head(config):
    model = build(config).train()
    head = FusedHead.of(model)
    assert head is not None
    assert model.training
    assert not model.get_output_embeddings()._forward_hooks
    tokens = torch.from_numpy(np.random.default_rng(0).integers(31, size=(3, 9)))
    logits = model(input_ids=tokens[:, :-1]).logits
    expected = functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    losses = head.token_losses(tokens)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(values.mean(), model.parameters()) for values in (losses, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def soft_capped():
    return build(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=30.0))


def scaled():
    return build(GraniteConfig(**SHAPE, logits_scaling=2.0))


def with_bias():
    return build(PhiConfig(**{**SHAPE, "num_key_value_heads": None}))


def in_half_precision():
    return build_model("tiny", 31, 9, seed=0).to(torch.bfloat16)


def of_another_class():
    class Own(nn.Linear):
        pass

    model = build_model("tiny", 31, 9, seed=0)
    model.get_output_embeddings().__class__ = Own
    return model


def changed_in_place():
    model = build_model("tiny", 31, 9, seed=0)
    model.register_forward_hook(lambda _, __, output: (output.logits.mul_(1.0), None)[1])
    return model


def changed_before_the_layer():
    model = build_model("tiny", 31, 9, seed=0)
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: inputs[0] * 2)
    return model


@pytest.mark.parametrize(
    "make_model",
    [soft_capped, scaled, with_bias, in_half_precision, of_another_class, changed_in_place, changed_before_the_layer],
)
def test_other_models_keep_their_logits(make_model):
    assert FusedHead.of(make_model()) is None


# --- the trainer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"accumulation": 3}, {"gradient_checkpointing": True}, {"sketch_size": 16}])
@pytest.mark.parametrize("factors", [None, FACTORS])
def test_a_step_reports_and_does_the_same(tiny_store, options, factors):
    measure = ("losses", "gram", "layers", "excess")
    reference = to_numpy(make(tiny_store, seed=1).bare_model.state_dict())
    fused, plain = (kind(tiny_store, measure, reference=reference, **options) for kind in (make, by_logits))
    assert fused._heads.keys() == {fused.bare_model, fused._reference}
    for _ in range(3):
        mine, theirs = fused.step(WEIGHTS, factors), plain.step(WEIGHTS, factors)
        assert (mine.loss, mine.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=1e-6)
        for name in ("losses", "excess_losses", "counts", "epochs"):
            np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), rtol=1e-6, atol=1e-6)
        assert_near(mine.gradients.sums, theirs.gradients.sums, 1e-5)
        for ours, others in zip(mine.gradients.gram(), theirs.gradients.gram(), strict=True):
            np.testing.assert_allclose(ours, others, rtol=1e-4, atol=1e-5 * np.nanmax(np.abs(others)))
    for split in ("validation", "test"):
        np.testing.assert_allclose(fused.evaluate(split), plain.evaluate(split), atol=1e-6)


def test_fewer_rows_of_an_evaluation_at_a_time_change_nothing(tiny_store):
    trainer = make(tiny_store)
    sizes, own = [], trainer._token_losses

    def counted(model, rows):
        sizes.append(len(rows))
        return own(model, rows)

    trainer._token_losses = counted
    losses = trainer.evaluate("validation")
    assert max(sizes) == 16
    trainer._held_out.config = LMConfig(**SMALL | {"batch_size": 64})
    np.testing.assert_allclose(trainer.evaluate("validation"), losses, atol=1e-6)
    assert max(sizes) == sum(sizes) // 2


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"compile": True, "compile_backend": "eager"}])
def test_other_precisions_and_compiled_models_keep_their_logits(tiny_store, options):
    assert make(tiny_store, **options)._heads == {}


def test_one_process_of_a_target_run_needs_no_logits(tiny_store):
    trainer = make(tiny_store, accelerator=target_accelerator("cpu"))
    assert trainer._heads.keys() == {trainer.bare_model}


def test_processes_that_share_a_batch_keep_their_logits(tiny_store, monkeypatch):
    trainer = make(tiny_store)
    monkeypatch.setattr(trainer.ranks, "world", 2)
    assert trainer._fused_heads() == {}
    monkeypatch.undo()
    assert trainer._fused_heads().keys() == {trainer.bare_model}
    monkeypatch.setattr("acodm_env.pretrain.trainer.is_divided", lambda *_: True)
    assert trainer._fused_heads() == {}
