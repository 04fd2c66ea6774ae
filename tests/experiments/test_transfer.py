"""`acodm transfer` over a real model: adapting a run, what is not finite, the model that is left."""

import json
import shutil
import signal

import numpy as np
import pytest

from acodm_env.corpus.tokens import TokenStore
from acodm_env.experiments import cli
from acodm_env.experiments.run.checkpoints import Checkpoints
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.experiments.target import transfer

SIZES = ["--target", "tiny", "--batch_size", "6", "--sequence_length", "32", "--evaluations", "3", "--quiet"]
UNIFORM = ["--mixer", "uniform"]


def acodm(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


def run(corpus, out, *arguments):
    return acodm("transfer", "--corpus", corpus, *SIZES, "--out", out, *arguments)


def lines(out, name="stats.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def read(out):
    return json.loads((out / "result.json").read_text())


@pytest.fixture
def until():
    """Have the next run end after so many steps, as SIGTERM would."""
    patch = pytest.MonkeyPatch()

    def limit(step):
        original = RunFolder.append

        def append(self, line):
            original(self, line)
            if line.log == "stats.jsonl" and line.step == step:
                patch.undo()
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(RunFolder, "append", append)

    yield limit
    patch.undo()


@pytest.fixture
def drawn(monkeypatch):
    """The sequences that are read for training from now on: by domain, in order."""
    seen = {}
    original = TokenStore.sequences

    def sequences(self, split, domain_index, indices, sequence_length):
        if split == "train":
            seen.setdefault(self.domains[domain_index], []).extend(np.asarray(indices).tolist())
        return original(self, split, domain_index, indices, sequence_length)

    monkeypatch.setattr(TokenStore, "sequences", sequences)
    return seen


def test_domains_go_and_come_and_those_that_stay_neither_repeat_nor_skip(tiny_corpus, tmp_path, drawn, until, capsys):
    assert run(tiny_corpus, tmp_path / "plain", *UNIFORM, "--steps", "24") == 0
    expected = {name: list(indices) for name, indices in drawn.items()}
    drawn.clear()
    out, steps = tmp_path / "run", ["--steps", "12"]
    until(4)
    assert run(tiny_corpus, out, *UNIFORM, *steps) == 0
    assert "ended by SIGTERM after step 4 of 12; saved in" in capsys.readouterr().err
    fewer = ["--mixer", "odm-released", "--domains", "verbs,letters"]
    assert run(tiny_corpus, out, *fewer, *steps) == 2
    assert "already holds another run" in capsys.readouterr().err
    until(8)
    assert run(tiny_corpus, out, *fewer, *steps, "--adapt") == 0
    assert run(tiny_corpus, out, *UNIFORM, *steps, "--adapt") == 0  # and the third domain is back
    assert [record["step"] for record in lines(out)] == [9, 10, 11, 12]
    assert [len(record["requested"]) for record in lines(out / "before-step-00000008")] == [2] * 4
    for name in ("verbs", "letters"):
        assert drawn[name] == expected[name][: len(drawn[name])]
        assert len(drawn[name]) > 20
    assert len(drawn["numbers"]) == 16
    assert read(out)["domain_loss_nats"].keys() == {"letters", "numbers", "verbs"}


def test_a_finished_run_is_made_longer(tiny_corpus, tmp_path, capsys):
    assert run(tiny_corpus, tmp_path, *UNIFORM, "--steps", "6") == 0
    assert run(tiny_corpus, tmp_path, *UNIFORM, "--steps", "9", "--adapt") == 0
    assert "step 6 of 9" in capsys.readouterr().err
    assert [record["step"] for record in lines(tmp_path)] == [*range(1, 10)]
    assert read(tmp_path)["config"]["steps"] == 9
    assert read(tmp_path / "before-step-00000006")["config"]["steps"] == 6
    assert (tmp_path / "model").exists()


def test_made_longer_and_diverged_it_names_no_model(tiny_corpus, tmp_path, capsys):
    assert run(tiny_corpus, tmp_path, *UNIFORM, "--steps", "3") == 0
    assert "eval.jsonl, model/)" in capsys.readouterr().out
    wild = ["--steps", "6", "--learning_rate", "1e30", "--adapt"]
    assert run(tiny_corpus, tmp_path, *UNIFORM, *wild) == 0
    assert read(tmp_path)["diverged"]
    assert "eval.jsonl)" in capsys.readouterr().out
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "before-step-00000003" / "model" / "model.safetensors").exists()


def test_no_resume(tiny_corpus, tmp_path, capsys):
    assert run(tiny_corpus, tmp_path / "run", *UNIFORM, "--steps", "3", "--no-resume") == 0
    assert run(tiny_corpus, tmp_path / "run", *UNIFORM, "--steps", "3", "--resume") == 0
    assert run(tiny_corpus, tmp_path / "run", *UNIFORM, "--steps", "3", "--no-resume") == 2
    assert "must be new with --no-resume; it holds a run" in capsys.readouterr().err


def test_not_finite_stops_with_advice_and_skip_goes_on_from_there(tiny_corpus, tmp_path, capsys):
    wild = [*UNIFORM, "--steps", "6", "--learning_rate", "1e30", "--checkpoint_every", "1"]
    assert run(tiny_corpus, tmp_path, *wild) == 0
    said = capsys.readouterr().err
    stopped = len(lines(tmp_path))
    assert stopped < 6
    assert f"step {stopped}: the loss of letters, numbers, verbs is not finite" in said
    assert f"the last good checkpoint is {tmp_path}/checkpoints/step-{stopped - 1:08d}" in said
    assert "the same command with --on-nonfinite skip" in said
    assert read(tmp_path)["diverged"]
    assert not (tmp_path / "model").exists()
    assert run(tiny_corpus, tmp_path, *wild, "--on-nonfinite", "skip") == 0
    said = capsys.readouterr().err
    assert f"step {stopped - 1} of 6" in said
    assert f"step {stopped}: the loss of letters, numbers, verbs is not finite; the step was skipped" in said
    assert [record["skipped"] for record in lines(tmp_path)] == [0] * (stopped - 1) + [1] * (7 - stopped)
    assert not read(tmp_path)["diverged"]


@pytest.mark.parametrize("mixer", ["eg-interaction", "odm-released", "exp3"])
def test_mixers_live_through_a_step_that_is_skipped(tiny_corpus, tmp_path, monkeypatch, mixer):
    from acodm_env.pretrain.trainer import LMTrainer

    original = LMTrainer._token_losses

    def poisoned(self, model, rows):
        losses = original(self, model, rows)
        return losses * float("nan") if self.steps_done == 2 and model.training else losses

    monkeypatch.setattr(LMTrainer, "_token_losses", poisoned)
    arguments = ["--mixer", mixer, "--steps", "6", "--decision_every", "2", "--on_nonfinite", "skip"]
    assert run(tiny_corpus, tmp_path, *arguments) == 0
    assert [record["skipped"] for record in lines(tmp_path)] == [0, 0, 1, 0, 0, 0]
    assert all(np.isfinite(record["requested"]).all() for record in lines(tmp_path))
    assert read(tmp_path)["mean_loss_nats"] is not None


def test_the_trained_model_is_there_for_others(tiny_corpus, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run(tiny_corpus, tmp_path, *UNIFORM, "--steps", "3") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.architectures == ["GPTNeoXForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    store = TokenStore.open(tiny_corpus)
    assert tokenizer.eos_token_id == store.end_of_document
    assert len(tokenizer) == store.vocab_size
    assert tokenizer.decode(tokenizer("alpha beta 101")["input_ids"]) == "alpha beta 101"
    saved = Checkpoints(tmp_path / "checkpoints").newest()
    assert saved.step == 3
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), saved.state["trainer"]["model"][name])
    from acodm_env.corpus.sampler import heldout

    rows, domains = heldout(store, "test", 32, 8, seed=0)
    with torch.no_grad():
        loss = model(input_ids=torch.from_numpy(rows), labels=torch.from_numpy(rows)).loss
    shares = np.bincount(domains) / len(domains)
    told = [read(tmp_path)["domain_loss_nats"][name] for name in store.domains]
    assert float(loss) == pytest.approx(shares @ np.array(told), abs=0.15)  # other held-out sequences of the same text


def test_lines_tell_which_decision_composed_the_batch(tiny_corpus, tmp_path):
    assert run(tiny_corpus, tmp_path, "--mixer", "odm-released", "--steps", "6", "--prefetch", "2") == 0
    records = lines(tmp_path)
    assert [record["decision"] for record in records] == [-1, -1, 0, 1, 2, 3]
    assert [record["mixture_age"] for record in records] == [2.0] * 6
    for part in ("data", "train", "probe", "decision"):
        assert all(record[f"seconds_{part}"] >= 0 for record in records)
    assert read(tmp_path)["accounting"]["tokens"] == 6 * 6 * 32


@pytest.mark.parametrize("during", ["open_store", "_gate"])
def test_sigterm_before_the_first_step_is_not_lost(during, tiny_corpus, tmp_path, monkeypatch, capsys):
    """While the corpus is opened, or the policy judged: both can take minutes."""
    original = getattr(transfer, during)

    def asked(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(transfer, during, asked)
    assert run(tiny_corpus, tmp_path / "run", *UNIFORM, "--steps", "3") == 0
    assert "ended by SIGTERM before it began; nothing was to be saved yet" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0"], "keep=0: must be at least 1"),
        (["--checkpoint-every", "0"], "checkpoint_every=0: must be at least 1"),
        (["--domains", "verbs,leters"], "did you mean 'letters'"),
        (["--accumulation", "4"], "batch_size=6: must be divisible by 4"),
        (["--prefetch", "-1"], "prefetch=-1"),
        (["--on-nonfinite", "ignore"], "on_nonfinite='ignore': must be one of skip, stop"),
        (["--parallel", "fsdp"], "parallel=fsdp: needs processes to divide the model among"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings(arguments, message, tiny_corpus, tmp_path, capsys):
    assert run(tiny_corpus, tmp_path / "run", *UNIFORM, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_a_lost_model_is_written_again_from_the_last_checkpoint(tiny_corpus, tmp_path, capsys, damage):
    assert run(tiny_corpus, tmp_path, *UNIFORM, "--steps", 3) == 0
    file = tmp_path / "model" / "model.safetensors"
    whole, result, logged = file.read_bytes(), read(tmp_path), lines(tmp_path)
    if damage == "gone":
        shutil.rmtree(tmp_path / "model")
    else:
        file.write_bytes(whole[:1000])
    assert run(tiny_corpus, tmp_path, *UNIFORM, "--steps", 3) == 0
    assert "written from the last checkpoint" in capsys.readouterr().err
    assert file.read_bytes() == whole
    assert (read(tmp_path), lines(tmp_path)) == (result, logged)
