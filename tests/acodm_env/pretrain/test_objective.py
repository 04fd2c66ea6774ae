"""What the baselines need of the trainer: excess losses, re-weighted losses, targets of their own, costs."""

import pickle

import numpy as np
import pytest
import torch

from acodm_env.errors import ConfigError
from acodm_env.pretrain.checkpoint import to_numpy
from acodm_env.pretrain.config import LMConfig
from acodm_env.pretrain.models import build_model, flops_per_token, flops_per_token_of
from acodm_env.pretrain.trainer import LMTrainer
from acodm_env.trainer import merge, require

CONFIG = LMConfig(batch_size=6, sequence_length=32, horizon=8, decision_every=2, device="cpu", eval_sequences=2)
UNIFORM = np.full(3, 1 / 3)


def started(store, config=CONFIG, **options):
    trainer = LMTrainer(config, store, **options)
    trainer.reset(np.random.default_rng(0))
    return trainer


def test_excess_losses_are_clipped_per_token(tiny_store):
    other = build_model("tiny", tiny_store.vocab_size, 32, seed=77)
    trainer = started(tiny_store, reference=to_numpy(other.state_dict()))
    require(trainer, frozenset({"excess"}), "test")
    batch = started(tiny_store).sampler.draw(UNIFORM)
    tokens = torch.from_numpy(batch.tokens)

    def losses(model):
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return flat.view(6, -1).numpy()

    difference = losses(trainer.bare_model) - losses(other)
    stats = trainer.step(UNIFORM)
    by_hand = [np.maximum(difference[batch.domains == i], 0).mean() for i in range(3)]
    clipped_late = [max(difference[batch.domains == i].mean(), 0) for i in range(3)]
    np.testing.assert_allclose(stats.excess_losses, by_hand, rtol=1e-4)
    assert np.abs(stats.excess_losses - clipped_late).max() > 0.01
    both = merge(stats, trainer.step(np.array([0.5, 0.5, 0.0])))
    assert np.isfinite(both.excess_losses).all()
    assert np.isnan(trainer.step(np.array([0.5, 0.5, 0.0])).excess_losses[2])


def test_without_a_reference_model_there_is_no_excess(tiny_store):
    with pytest.raises(ConfigError, match="mixer=x: needs excess; LMTrainer provides only"):
        require(started(tiny_store), frozenset({"excess"}), "mixer=x")


def test_loss_weights_change_the_training_as_scaled_losses_do(tiny_store):
    """DoReMi's known defect: weights computed and never used."""
    plain, weighted, doubled = started(tiny_store), started(tiny_store), started(tiny_store)
    a, b, c = (
        plain.step(UNIFORM),
        weighted.step(UNIFORM, np.array([2.0, 0.5, 0.5])),
        doubled.step(UNIFORM, np.full(3, 2.0)),
    )
    assert a.loss == b.loss == c.loss  # the reported loss is the plain one
    assert c.grad_norm == pytest.approx(2 * a.grad_norm, rel=1e-5)
    assert b.grad_norm != pytest.approx(a.grad_norm, rel=0.01)
    np.testing.assert_allclose(b.effective, [2 / 3, 1 / 6, 1 / 6])
    first = next(iter(plain.bare_model.parameters()))
    assert not torch.equal(first, next(iter(weighted.bare_model.parameters())))


def test_gradients_are_of_the_plain_losses_whatever_the_loss_weights(tiny_store):
    trainers = [started(tiny_store), started(tiny_store)]
    for trainer in trainers:
        trainer.measure = frozenset({"gram"})
    plain = trainers[0].step(UNIFORM).gradients.gram()[0]
    weighted = trainers[1].step(UNIFORM, np.array([2.0, 0.5, 0.0])).gradients.gram()[0]
    np.testing.assert_allclose(weighted[:2, :2], plain[:2, :2], rtol=1e-4)
    assert np.isnan(weighted[2]).all()  # its gradient was multiplied by nothing


def test_targets_need_not_be_domains(tiny_store):
    train = tiny_store.subset(["verbs", "letters"])
    trainer = started(train, objective={"numbers": 3.0, "verbs": 1.0}, heldout_store=tiny_store)
    assert trainer.info.domains == ("verbs", "letters")
    assert trainer.info.targets == ("numbers", "verbs")
    np.testing.assert_array_equal(trainer.info.objective_weights, [0.75, 0.25])
    assert trainer.info.eval_tokens == 2 * 2 * 32
    every = started(tiny_store).evaluate("test")
    names = list(tiny_store.domains)
    np.testing.assert_allclose(trainer.evaluate("test")[0], every[names.index("numbers")], rtol=0.02)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"number": 1.0}, "did you mean 'numbers'"),
        ({"numbers": 0.0}, "must have a positive weight"),
        ({"numbers": -1.0}, "weight of at least 0"),
        ({"numbers": float("nan")}, "finite weight"),
    ],
)
def test_a_bad_objective_is_refused(tiny_store, objective, message):
    with pytest.raises(ConfigError, match=message):
        LMTrainer(CONFIG, tiny_store, objective=objective)


def test_a_subset_of_a_store(tiny_store):
    part = tiny_store.subset(["verbs", "letters"])
    assert part.domains == ("verbs", "letters")
    assert part.fingerprint not in (tiny_store.fingerprint, tiny_store.subset(["letters", "verbs"]).fingerprint)
    assert tiny_store.subset(tiny_store.domains).fingerprint == tiny_store.fingerprint
    np.testing.assert_array_equal(part.tokens("letters", "train"), tiny_store.tokens("letters", "train"))
    again = pickle.loads(pickle.dumps(part))
    assert (again.domains, again.fingerprint) == (part.domains, part.fingerprint)
    for names, message in ((["verb"], "did you mean 'verbs'"), ([], "at least one"), (["verbs", "verbs"], "each once")):
        with pytest.raises(ConfigError, match=message):
            tiny_store.subset(names)


def test_flops_by_hand():
    """tiny: 2 layers × 64, 256 inner; 6·(all but the input embedding) + 12·layers·width·length."""
    vocab, length = 300, 32
    attention = 64 * 3 * 64 + 3 * 64 + 64 * 64 + 64
    mlp = 64 * 256 + 256 + 256 * 64 + 64
    norms = 2 * 2 * 64
    parameters = 2 * (attention + mlp + norms) + 2 * 64 + vocab * 64
    expected = 6 * parameters + 12 * 2 * 64 * length
    assert flops_per_token(build_model("tiny", vocab, length, 0), length) == expected
    assert flops_per_token_of("tiny", vocab, length) == expected


def test_tied_embeddings_multiply_once(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32).to_json_file(tmp_path / "config.json")
    model = build_model(str(tmp_path / "config.json"), 50, 16, 0)
    parameters = sum(p.numel() for p in model.parameters())
    assert flops_per_token(model, 16) == 6 * parameters + 12 * 2 * 16 * 16
