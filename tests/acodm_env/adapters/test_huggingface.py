"""A real `Trainer` under a mixer: no lag, exact resume, the Trainer's own losses and scaling."""

import json

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from acodm_env.adapters.huggingface import MixtureCallback, MixtureTrainer
from acodm_env.agents.baselines import make_mixer
from acodm_env.corpus.sampler import MixtureSampler
from acodm_env.errors import ConfigError, DataError
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.observation import Observer
from acodm_env.policy.dense import Policy
from acodm_env.policy.mixer import PolicyMixer
from acodm_env.trainer import Mixer

LENGTH, STEPS = 32, 8


class Scripted(Mixer):
    """A different mixture at every step, which depends on what it has seen; keeps a record."""

    name = "scripted"
    needs = frozenset({"losses"})

    def start(self, info):
        super().start(info)
        self.seen, self.given, self.losses = [], [], np.ones(info.num_domains)

    def weights(self):
        tilted = self.losses + np.roll([3.0, 0.0, 1.0], len(self.seen))
        self.given.append(tilted / tilted.sum())
        return self.given[-1]

    def update(self, stats):
        self.seen.append(stats)
        drawn = np.isfinite(stats.losses)
        self.losses[drawn] = stats.losses[drawn]

    def state_dict(self):
        return {"losses": self.losses.copy(), "num": len(self.seen)}

    def load_state_dict(self, state):
        self.losses = np.array(state["losses"])
        self.seen, self.given = [None] * state["num"], [None] * state["num"]


def make_model(store, seed=0, dropout=0.1):
    """Dropout draws from the global generator, whose state the Trainer saves."""
    config = GPT2Config(
        vocab_size=store.vocab_size,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=LENGTH,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config)


def make_trainer(store, folder, *, mixer=None, model=None, mixing=None, cls=MixtureTrainer, **changes):
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "save_steps": 3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 5,
    }
    args = TrainingArguments(str(folder), **(settings | changes))
    mixing = {"store": store, "mixer": mixer or Scripted(), "sequence_length": LENGTH} | (mixing or {})
    return cls(model=model or make_model(store), args=args, **mixing)


def final_weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tiny_store, tmp_path_factory):
    trainer = make_trainer(tiny_store, tmp_path_factory.mktemp("hf"))
    trainer.train()
    return trainer


def test_every_mixture_composes_the_very_next_batch(uninterrupted, tiny_store):
    mixer = uninterrupted.mixed_data.mixer
    assert [stats.step for stats in mixer.seen] == list(range(1, STEPS + 1))
    sampler = MixtureSampler(tiny_store, "train", 8, LENGTH, seed=5)
    for step, (stats, given) in enumerate(zip(mixer.seen, mixer.given, strict=True)):
        assert (stats.requested == given).all()
        assert (stats.decision, stats.mixture_age) == (step, 0.0)
        assert (stats.counts == sampler.draw(given).counts).all()


def test_losses_by_domain_are_the_trainers_loss(uninterrupted):
    logged = [entry["loss"] for entry in uninterrupted.state.log_history if "loss" in entry]
    seen = uninterrupted.mixed_data.mixer.seen
    np.testing.assert_allclose([stats.loss for stats in seen], logged, rtol=1e-5)
    for stats in seen:
        np.testing.assert_allclose(np.nansum(stats.losses * stats.loss_tokens) / stats.loss_tokens.sum(), stats.loss)


def test_training_is_what_the_plain_trainer_makes_of_the_same_batches(uninterrupted, tiny_store, tmp_path):
    """Replayed through a Trainer without any of this, the same model comes out, bit for bit."""
    sampler = MixtureSampler(tiny_store, "train", 8, LENGTH, seed=5)
    batches = [torch.from_numpy(sampler.draw(given).tokens) for given in uninterrupted.mixed_data.mixer.given]

    class Plain(Trainer):
        def get_train_dataloader(self):
            ignored = torch.full((8, 1), -100)  # nothing predicts a row's first token
            return [{"input_ids": one, "labels": torch.cat([ignored, one[:, 1:]], 1)} for one in batches]

    args = uninterrupted.args
    again = TrainingArguments(
        str(tmp_path), max_steps=STEPS, learning_rate=1e-2, use_cpu=True, seed=5, disable_tqdm=True
    )
    assert args.per_device_train_batch_size == again.per_device_train_batch_size
    plain = Plain(model=make_model(tiny_store), args=again)
    plain.train()
    assert_equal(final_weights(plain), final_weights(uninterrupted))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_from_the_trainers_checkpoint_is_exact(tiny_store, tmp_path, prefetch):
    mixing = {"prefetch": prefetch}
    whole = make_trainer(tiny_store, tmp_path / "a", mixing=mixing)
    whole.train()
    first = whole.mixed_data.mixer.seen
    for run, step, origin in (("b", 3, "a"), ("c", 6, "b")):  # the second from a checkpoint of a resumed run
        resumed = make_trainer(tiny_store, tmp_path / run, mixing=mixing, model=make_model(tiny_store, seed=9))
        resumed.train(resume_from_checkpoint=str(tmp_path / origin / f"checkpoint-{step}"))
        assert_equal(final_weights(resumed), final_weights(whole))
        second = resumed.mixed_data.mixer.seen
        assert second[:step] == [None] * step
        for one, other in zip(first[step:], second[step:], strict=True):
            assert (one.requested == other.requested).all()
            assert (one.drawn == other.drawn).all()
            assert (one.losses == other.losses)[one.counts > 0].all()
            assert one.decision == other.decision
    files = [tmp_path / run / f"checkpoint-{STEPS}" / "trainer_state.json" for run in "abc"]
    saved = [json.loads(file.read_text())["stateful_callbacks"]["MixtureCallback"] for file in files]
    assert saved[0] == saved[1] == saved[2]


def test_the_trainer_replaces_its_callbacks_and_the_loader_follows(tiny_store, tmp_path):
    """The trap: whoever keeps the callback from before reads a state that is never filled, and gets no error."""
    make_trainer(tiny_store, tmp_path).train()
    resumed = make_trainer(tiny_store, tmp_path)
    kept = next(one for one in resumed.callback_handler.callbacks if isinstance(one, MixtureCallback))
    began = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, train_dataloader, **kwargs):
            began.append((state.global_step, train_dataloader.data.loader.state_dict()["given"]))

    resumed.add_callback(Watch())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    now = [one for one in resumed.callback_handler.callbacks if isinstance(one, MixtureCallback)]
    assert len(now) == 1
    assert now[0] is not kept
    assert began == [(step, step + 1) for step in range(3, STEPS)]


def test_training_again_starts_anew(tiny_store, tmp_path):
    trainer = make_trainer(tiny_store, tmp_path, save_strategy="no", max_steps=3)
    trainer.train()
    first = trainer.mixed_data.mixer.seen
    trainer.train()
    second = trainer.mixed_data.mixer.seen
    assert first[0].counts.tolist() == second[0].counts.tolist()
    assert second[-1].step == 3


def gradients_of_first_step(store, folder, **changes):
    caught = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            caught.setdefault("gradients", {name: p.grad.clone() for name, p in model.named_parameters()})

    model = make_model(store, dropout=0.0)
    trainer = make_trainer(store, folder, model=model, save_strategy="no", max_steps=2, max_grad_norm=0.0, **changes)
    trainer.add_callback(Catch())
    trainer.train()
    return caught["gradients"], trainer.mixed_data.mixer.seen


def test_accumulation_gives_one_big_batchs_gradient(tiny_store, tmp_path):
    big, big_seen = gradients_of_first_step(tiny_store, tmp_path)
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    small, small_seen = gradients_of_first_step(tiny_store, tmp_path, **changes)
    for name in big:
        torch.testing.assert_close(small[name], big[name], rtol=1e-4, atol=1e-7)
    for one, other in zip(big_seen, small_seen, strict=True):
        assert (one.counts == other.counts).all()
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-5)


def test_evaluation_in_mid_run_disturbs_nothing(tiny_store, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tiny_store.sequences("validation", 0, np.arange(4), LENGTH)]

    class Evaluated(MixtureTrainer):
        def __init__(self, **kwargs):
            super().__init__(eval_dataset=rows, **kwargs)

    runs = []
    for cls, changes in ((MixtureTrainer, {}), (Evaluated, {"eval_strategy": "steps", "eval_steps": 2})):
        model = make_model(tiny_store, dropout=0.0)  # the Trainer's evaluation draws from the global generator
        trainer = make_trainer(tiny_store, tmp_path, cls=cls, model=model, save_strategy="no", **changes)
        trainer.train()
        runs.append(trainer)
    assert any("eval_loss" in entry for entry in runs[1].state.log_history)
    assert_equal(final_weights(runs[1]), final_weights(runs[0]))


def test_a_named_mixer_of_this_package(tiny_store, tmp_path):
    trainer = make_trainer(tiny_store, tmp_path, mixer=make_mixer("odm-released"))
    trainer.train()
    resumed = make_trainer(tiny_store, tmp_path, mixer=make_mixer("odm-released"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal(final_weights(resumed), final_weights(trainer))
    assert not np.allclose(trainer.mixed_data.mixer.weights(), 1 / 3, atol=1e-4)


def make_policy(info):
    """A policy of random weights that reads losses, shares and progress."""
    layout = Observer(info, ("loss", "sample_share", "progress")).layout
    width = sum(size for _, size in layout)
    weight = np.random.default_rng(0).normal(size=(info.num_domains, width)).astype(np.float32)
    return Policy(
        domains=info.domains,
        fields=layout,
        mean=np.zeros(width),
        scale=np.ones(width),
        clip=10.0,
        layers=((weight, np.zeros(info.num_domains, np.float32), "tanh"),),
        action=ActionMap(),
        bounds=Bounds(),
        interaction=InteractionConfig(),
        decision_every=info.decision_every,
        horizon=info.horizon,
    )


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_policys_run_that_was_saved_between_two_decisions_is_resumed_exactly(tiny_store, tmp_path, prefetch):
    mixing = {"decision_every": 4, "prefetch": prefetch}  # saved at step 3 and step 6
    info = make_trainer(tiny_store, tmp_path, mixing=mixing).mixed_data.info
    policy = make_policy(info)
    whole = make_trainer(tiny_store, tmp_path / "a", mixer=PolicyMixer(policy), mixing=mixing)
    whole.train()
    saved = whole.mixed_data.state_dict()
    for step in (3, 6):
        state = json.loads((tmp_path / "a" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        window = state["stateful_callbacks"]["MixtureCallback"]["attributes"]["saved"]["mixer"]["window"]
        assert window["step"] == step
        resumed = make_trainer(tiny_store, tmp_path / "b", mixer=PolicyMixer(policy), mixing=mixing)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert_equal(final_weights(resumed), final_weights(whole))
        again = resumed.mixed_data.state_dict()
        assert (again["mixer"]["weights"] == saved["mixer"]["weights"]).all()
        assert again["loader"]["sampler"]["cursors"] == saved["loader"]["sampler"]["cursors"]
    assert not np.allclose(saved["mixer"]["weights"], 1 / 3, atol=1e-3)


def test_bad_settings_are_refused(tiny_store, tmp_path):
    with pytest.raises(ConfigError, match=r"mixer=eg-interaction: needs gram; MixedData provides only losses"):
        make_trainer(tiny_store, tmp_path, mixer=make_mixer("eg-interaction"))
    with pytest.raises(ConfigError, match="max_steps=-1: must be positive"):
        make_trainer(tiny_store, tmp_path, max_steps=-1)
    with pytest.raises(ConfigError, match="train_dataset: must be left out"):
        make_trainer(tiny_store, tmp_path, mixing={"train_dataset": [1]})


def test_checkpoints_of_others_are_refused(tiny_store, tmp_path):
    make_trainer(tiny_store, tmp_path / "mine").train()
    resumed = make_trainer(tiny_store, tmp_path, mixer=make_mixer("uniform"))
    with pytest.raises(DataError, match="mixer=uniform: must be scripted"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "mine" / "checkpoint-3"))
    resumed = make_trainer(tiny_store.subset(["verbs", "numbers"]), tmp_path)
    with pytest.raises(DataError, match="removed: letters"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "mine" / "checkpoint-3"))
    state = tmp_path / "mine" / "checkpoint-3" / "trainer_state.json"
    plain = json.loads(state.read_text())
    del plain["stateful_callbacks"]["MixtureCallback"]
    state.write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match="resume_from_checkpoint: must be of a run with a mixture"):
        make_trainer(tiny_store, tmp_path).train(resume_from_checkpoint=str(tmp_path / "mine" / "checkpoint-3"))


def test_without_logits_there_are_no_losses_by_domain(tiny_store, tmp_path):
    class Fused(GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            return {"loss": outputs.loss}

    model = Fused(make_model(tiny_store).config)
    with pytest.raises(ConfigError, match="model: must return logits"):
        make_trainer(tiny_store, tmp_path, model=model).train()


def test_the_callback_is_exportable():
    assert isinstance(MixtureCallback(), ExportableState)
    assert MixtureCallback().state() == {"args": {}, "attributes": {"saved": None}}
