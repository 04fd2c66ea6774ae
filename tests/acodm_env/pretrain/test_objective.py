"""What is trained on and what counts: held-out targets, loss weights, and losses against a reference model."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from acodm_env.agents.baselines.doremi import DoremiProxy
from acodm_env.corpus.sampler import heldout
from acodm_env.errors import ConfigError
from acodm_env.pretrain.checkpoint import to_numpy
from acodm_env.pretrain.config import LMConfig
from acodm_env.pretrain.trainer import LMTrainer
from acodm_env.step_stats import merge
from acodm_env.trainer import require

SMALL = {"batch_size": 6, "sequence_length": 32, "horizon": 8, "decision_every": 2, "device": "cpu"}
WEIGHTS = np.array([0.5, 0.3, 0.2])
FACTORS = np.array([2.0, 0.5, 1.25])


def make(store, measure=("losses",), seed=0, config=SMALL, **options):
    trainer = LMTrainer(LMConfig(**config), store, **options)
    trainer.measure = frozenset(measure)
    trainer.reset(np.random.default_rng(seed))
    return trainer


def token_losses(model, tokens):
    """(B, T-1) in nats."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


# --- excess losses -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tiny_store):
    """Another model, better at some tokens and worse at others."""
    return make(tiny_store, seed=1).bare_model


def test_excess_losses_are_clipped_per_token(tiny_store, reference):
    trainer = make(tiny_store, ("losses", "excess"), reference=to_numpy(reference.state_dict()))
    batch = make(tiny_store).sampler.draw(WEIGHTS)
    tokens = torch.from_numpy(batch.tokens)
    with torch.no_grad():
        difference = token_losses(trainer.model, tokens) - token_losses(reference, tokens)  # (B, T-1)
    stats = trainer.step(WEIGHTS)
    rows = [difference[torch.from_numpy(batch.domains == domain)] for domain in range(3)]
    assert all((row < 0).any() and (row > 0).any() for row in rows)  # or clipping would not be tested
    np.testing.assert_allclose(stats.excess_losses, [row.clamp(min=0).mean() for row in rows], rtol=1e-4)
    clipped_late = np.array([max(float(row.mean()), 0.0) for row in rows])
    assert (stats.excess_losses > clipped_late * 1.01).all()


def test_excess_of_an_undrawn_domain_is_nan_and_of_a_model_over_itself_0(tiny_store):
    itself = make(tiny_store)
    state = to_numpy(itself.bare_model.state_dict())
    stats = make(tiny_store, ("losses", "excess"), reference=state).step(np.array([0.5, 0.5, 0.0]))
    np.testing.assert_allclose(stats.excess_losses[:2], 0, atol=1e-5)
    assert np.isnan(stats.excess_losses[2])


def test_the_reference_neither_learns_nor_disturbs(tiny_store, reference):
    state = to_numpy(reference.state_dict())
    given = copy.deepcopy(state)
    plain, scored = make(tiny_store), make(tiny_store, ("losses", "excess"), reference=state)
    for _ in range(3):
        first, second = plain.step(WEIGHTS), scored.step(WEIGHTS)
        assert (first.loss, first.grad_norm) == (second.loss, second.grad_norm)
    assert first.excess_losses is None
    for name, value in to_numpy(scored._reference.state_dict()).items():
        np.testing.assert_array_equal(value, given[name])
    assert not any(p.requires_grad for p in scored._reference.parameters())
    unasked = make(tiny_store, reference=state).step(WEIGHTS)
    assert unasked.excess_losses is None  # nobody needs it


def test_windows_of_excess_losses_merge(tiny_store, reference):
    trainer = make(tiny_store, ("losses", "excess"), reference=to_numpy(reference.state_dict()))
    first, second = trainer.step(np.array([0.5, 0.5, 0.0])), trainer.step(np.array([0.0, 0.5, 0.5]))
    both = merge(first, second).excess_losses
    expected = [first.excess_losses[0], (first.excess_losses[1] + second.excess_losses[1]) / 2, second.excess_losses[2]]
    np.testing.assert_allclose(both, expected)


def test_without_a_reference_whoever_needs_one_is_refused(tiny_store, reference):
    with pytest.raises(ConfigError, match="mixer=doremi-proxy: needs excess; LMTrainer provides only"):
        require(make(tiny_store), DoremiProxy.needs, "mixer=doremi-proxy")
    scored = make(tiny_store, reference=to_numpy(reference.state_dict()))
    require(scored, DoremiProxy.needs, "mixer=doremi-proxy")
    assert scored.measure == {"losses", "excess", "loss_weights"}


# --- loss weights --------------------------------------------------------------------------------------------


def test_loss_weights_scale_each_domains_token_losses(tiny_store):
    """The gradient equals that of the losses scaled by hand."""
    config = {**SMALL, "clip_norm": 1e9}
    trainer, by_hand = make(tiny_store, config=config), make(tiny_store, config=config)
    batch = by_hand.sampler.draw(WEIGHTS)
    losses = token_losses(by_hand.model, torch.from_numpy(batch.tokens))
    factors = torch.from_numpy(FACTORS[batch.domains]).float()
    (factors[:, None] * losses).mean().backward()
    stats = trainer.step(WEIGHTS, loss_weights=FACTORS)
    for mine, theirs in zip(trainer.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    assert stats.loss_weights.tolist() == FACTORS.tolist()
    assert stats.loss == pytest.approx(losses.mean().item(), rel=1e-5)  # what is reported is not weighted
    np.testing.assert_allclose(stats.effective, WEIGHTS * FACTORS / (WEIGHTS * FACTORS).sum())


def test_the_gram_matrix_is_that_of_the_plain_losses(tiny_store):
    plain, weighted = (make(tiny_store, ("losses", "gram")).step(WEIGHTS, factors) for factors in (None, FACTORS))
    for mine, theirs in zip(weighted.gradients.gram(), plain.gradients.gram(), strict=True):
        scale = np.nanmax(np.abs(theirs))
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5 * scale)
    assert weighted.grad_norm != pytest.approx(plain.grad_norm, rel=1e-3)


def test_a_domain_of_factor_0_leaves_no_gradient(tiny_store):
    trainer = make(tiny_store, ("losses", "gram"))
    first = trainer.step(WEIGHTS, loss_weights=np.array([1.0, 0.0, 2.0]))
    gram, noise = first.gradients.gram()
    assert np.isnan(gram[1]).all()
    assert np.isnan(gram[:, 1]).all()
    assert np.isnan(noise[1])
    assert np.isfinite(gram[[0, 0, 2], [0, 2, 0]]).all()
    assert np.isfinite(first.losses[1])
    second = trainer.step(WEIGHTS, loss_weights=np.ones(3))  # in a window, its other steps count alone
    alone, both = second.gradients.gram()[0], merge(first, second).gradients.gram()[0]
    assert both[1, 1] == pytest.approx(alone[1, 1], nan_ok=True)
    assert np.isfinite(both[0, 1])


# --- held-out targets ----------------------------------------------------------------------------------------


def test_targets_need_not_be_trained_on(tiny_store):
    training = tiny_store.subset(("verbs", "letters"))
    trainer = make(training, objective={"numbers": 3, "verbs": 1}, heldout_store=tiny_store)
    info = trainer.info
    assert (info.domains, info.targets) == (("verbs", "letters"), ("numbers", "verbs"))
    assert info.objective == (0.75, 0.25)
    assert info.objective_weights.tolist() == [0.75, 0.25]
    assert info.corpus_fingerprint == training.fingerprint
    validation = dict(zip(tiny_store.domains, tiny_store.num_sequences("validation", 32), strict=True))
    assert info.eval_tokens == 32 * sum(min(validation[name], 8) for name in info.targets)
    assert trainer.step(np.array([0.5, 0.5])).losses.shape == (2,)


def test_targets_are_evaluated_on_their_own_sequences(tiny_store):
    trainer = make(
        tiny_store.subset(("verbs", "letters")), objective={"numbers": 1, "verbs": 1}, heldout_store=tiny_store
    )
    for split in ("validation", "test"):
        tokens, targets = heldout(tiny_store.subset(("numbers", "verbs")), split, 32, 8, seed=0)
        with torch.no_grad():
            rows = token_losses(trainer.model, torch.from_numpy(tokens)).mean(1).numpy()
        expected = [rows[targets == target].mean() for target in range(2)]
        np.testing.assert_allclose(trainer.evaluate(split), expected, rtol=1e-5)


def test_without_an_objective_the_domains_count_equally(tiny_store):
    info = make(tiny_store).info
    assert info.targets == info.domains == tiny_store.domains
    assert info.objective == ()
    np.testing.assert_allclose(info.objective_weights, 1 / 3)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"number": 1.0}, r"targets\.<name>='number': .*did you mean 'numbers'"),
        ({"numbers": 0.0, "verbs": 0.0}, "must hold a positive weight; all are 0"),
        ({"numbers": 1.0, "verbs": -0.5}, r"targets\.verbs=-0\.5: must be a finite weight of at least 0"),
        ({"numbers": float("nan")}, r"targets\.numbers=nan"),
    ],
)
def test_a_bad_objective_is_refused(tiny_store, objective, message):
    with pytest.raises(ConfigError, match=message):
        LMTrainer(LMConfig(**SMALL), tiny_store, objective=objective)


def test_a_target_outside_of_the_training_store_needs_a_heldout_store(tiny_store):
    with pytest.raises(ConfigError, match="numbers"):
        LMTrainer(LMConfig(**SMALL), tiny_store.subset(("verbs", "letters")), objective={"numbers": 1.0})


# --- cost ----------------------------------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    """A model as a distributed engine hands it back: only `forward` is there."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


class Wrapping:
    """The least of an Accelerator that wraps its model."""

    device = torch.device("cpu")
    process_index, num_processes = 0, 1

    def free_memory(self):
        pass

    def prepare(self, model, optimizer):
        return Wrapped(model), optimizer

    def backward(self, loss):
        loss.backward()


def test_flops_are_known_after_reset_also_of_a_wrapped_model(tiny_store):
    expected = make(tiny_store).info.flops_per_token
    assert expected == 6 * (100_096 + tiny_store.vocab_size * 64) + 12 * 2 * 64 * 32
    wrapped = make(tiny_store, accelerator=Wrapping())
    assert wrapped.info.flops_per_token == expected
    assert wrapped.step(WEIGHTS).loss == make(tiny_store).step(WEIGHTS).loss
