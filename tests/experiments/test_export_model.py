"""`acodm export-model`: a folder that others can load, the same bit for bit, with a card that tells what was done."""

import json
import shutil

import pytest
import torch
import yaml
from plugin import tiny
from tokenizers import Tokenizer

from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments import cli
from acodm_env.experiments.benchmark.config import BenchmarkConfig
from acodm_env.experiments.benchmark.jobs import run_cell
from acodm_env.experiments.benchmark.planning import make_plan
from acodm_env.experiments.publish import export_model
from acodm_env.experiments.publish.export_model import MODEL_FILES, ExportModelConfig, read_trained
from acodm_env.experiments.publish.model_card import mixture_used

SIZES = ["--target", "tiny", "--batch_size", "6", "--sequence_length", "32", "--evaluations", "2", "--quiet"]


def acodm(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


def transfer(corpus, out, *arguments):
    assert acodm("transfer", "--corpus", corpus, *SIZES, "--out", out, *arguments) == 0


@pytest.fixture(scope="module")
def trained(tiny_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    transfer(tiny_corpus, out, "--mixer", "odm-released", "--steps", "6")
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def exported(trained):
    out = trained.parent / "exported"
    export_model.run(ExportModelConfig(run=str(trained), out=str(out), quiet=True))
    return out


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def logits(folder, ids):
    with torch.inference_mode():
        return load(folder)(input_ids=ids).logits


def test_the_logits_are_the_runs_bit_for_bit(trained, exported):
    ids = torch.randint(300, (3, 32), generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(trained / "model", ids), logits(exported, ids))
    assert (exported / "model.safetensors").read_bytes() == (trained / "model" / "model.safetensors").read_bytes()
    assert {file.name for file in exported.iterdir()} == {*MODEL_FILES}
    assert not [file for file in exported.parent.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("which", ["exported", "model"])
def test_the_tokenizer_encodes_as_the_corpus_was_encoded(which, trained, exported, tiny_corpus):
    from transformers import AutoTokenizer

    folder = exported if which == "exported" else trained / "model"
    assert (folder / "tokenizer.json").read_bytes() == (tiny_corpus / "tokenizer.json").read_bytes()
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(tiny_corpus / "tokenizer.json"))
    end = TokenStore.open(tiny_corpus).end_of_document
    for text in ("alpha beta 123 run<|endofdocument|>run", "é ü 漢 ~", "  two  spaces , ok ."):
        assert tokenizer(text)["input_ids"] == plain.encode(text).ids
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (end, end, 32)


@pytest.mark.parametrize("which", ["exported", "model"])
def test_it_stops_at_the_end_of_a_document(which, trained, exported, tiny_corpus):
    folder = exported if which == "exported" else trained / "model"
    end = TokenStore.open(tiny_corpus).end_of_document
    model = load(folder)
    assert (model.config.use_cache, model.dtype) == (True, torch.float32)
    for settings in (model.config, model.generation_config):
        assert [settings.bos_token_id, settings.eos_token_id, settings.pad_token_id] == [end] * 3
    assert "max_length" not in json.loads((folder / "generation_config.json").read_text())
    with torch.no_grad():  # a model that ends the document whatever came before
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().weight[end] = 1.0
        model.gpt_neox.final_layer_norm.weight.zero_()
        model.gpt_neox.final_layer_norm.bias.fill_(1.0)
    assert model.generate(torch.tensor([[7]]), max_new_tokens=5, do_sample=False).tolist() == [[7, end]]


def test_the_card(exported, trained, tiny_corpus):
    text = (exported / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-generation")
    result = json.loads((trained / "result.json").read_text())
    assert str(trained.parent) not in text
    assert str(tiny_corpus.parent) not in text
    assert "/" not in text.split("| corpus | ")[1].split("|")[0]
    assert TokenStore.open(tiny_corpus).fingerprint in text
    assert "| tokens | 1,152 |" in text
    assert "| optimiser steps | 6 of 6 |" in text
    assert "The mixing method `odm-released`." in text
    used = mixture_used(read_trained(trained))
    for name, loss in result["domain_loss_nats"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {loss:.4f} |" in row
        assert f"| {used[name].tokens:,.0f} | {100 * used[name].realised:.2f} % |" in row
    assert "Not evaluated beyond the held-out losses above." in text


def test_written_again_it_replaces_what_was_there(trained, tmp_path, capsys):
    config = ExportModelConfig(run=str(trained), out=str(tmp_path / "out"))
    export_model.run(config)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "README.md").write_text("old")
    export_model.run(config)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert "logits equal bit for bit on 128 token ids" in capsys.readouterr().out


def test_the_card_takes_the_runs_evaluation(run, tmp_path):
    metric = {"task": "mmlu", "name": "acc", "value": 0.5, "verdict": "above chance"}
    (run / "evaluation.json").write_text(json.dumps({"results": [metric]}))
    export_model.run(ExportModelConfig(run=str(run), out=str(tmp_path / "out"), quiet=True))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| mmlu | all | acc |" in text
    assert "guessing" not in text


# --- an architecture whose tokenizer transformers makes itself --------------------------------------------


def test_a_tokenizer_that_transformers_replaces_is_told(tiny_corpus, tmp_path, capsys):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen2Config(**sizes, num_key_value_heads=2).save_pretrained(tmp_path / "qwen")
    target = ["--target", tmp_path / "qwen" / "config.json", *SIZES[2:]]
    arguments = ["--corpus", tiny_corpus, *target, "--mixer", "uniform", "--steps", "1", "--out", tmp_path / "run"]
    assert acodm("transfer", *arguments) == 0
    capsys.readouterr()
    out = tmp_path / "out"
    export_model.run(ExportModelConfig(run=str(tmp_path / "run"), out=str(out), quiet=True))
    told, card = capsys.readouterr().err, (out / "README.md").read_text()
    assert "AutoTokenizer gives other token ids" in told
    assert "load its tokenizer by PreTrainedTokenizerFast.from_pretrained" in told
    assert 'tokenizer = PreTrainedTokenizerFast.from_pretrained("FOLDER")' in card
    assert "Not by `AutoTokenizer`" in card
    plain, text = Tokenizer.from_file(str(out / "tokenizer.json")), "  two  spaces , 12345."
    assert PreTrainedTokenizerFast.from_pretrained(out)(text)["input_ids"] == plain.encode(text).ids
    assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] != plain.encode(text).ids


def test_a_tokenizer_that_it_takes_is_loaded_as_usual(exported):
    card = (exported / "README.md").read_text()
    assert 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")' in card
    assert "PreTrainedTokenizerFast" not in card


# --- cells of a benchmark ---------------------------------------------------------------------------------


def cells(corpus, out, **changes):
    """Folders of a finished benchmark's target cells, by row."""
    plan = make_plan(BenchmarkConfig(**tiny(corpus, out, seeds="1", **changes)), out)
    for cell in plan.cells:
        run_cell(out, cell.index)
    return {cell.mixer: out / cell.folder for cell in plan.cells if cell.kind == "target"}


def test_a_benchmarks_cell_is_exported_with_its_card(tiny_corpus, tmp_path):
    options = {"odm-released": {"smoothing": 0.5}, "half": {"mixer": "static", "weights": [0.5, 0.25, 0.25]}}
    settings = {"mixers": "odm-released,half", "options": options, "targets": "letters=3,verbs=1"}
    found = cells(tiny_corpus, tmp_path / "b", keep_models=True, **settings)
    cards = {}
    for row, folder in found.items():
        out = tmp_path / row.replace(":", "-")
        export_model.run(ExportModelConfig(run=str(folder), out=str(out), quiet=True))
        assert (out / "model.safetensors").read_bytes() == (folder / "model" / "model.safetensors").read_bytes()
        cards[row] = (out / "README.md").read_text()
        assert str(tmp_path) not in cards[row]
        assert "| model | tiny |" in cards[row]
        assert "| tokens | 1,152 |" in cards[row]
        assert "weighted over domains (letters 0.75, verbs 0.25): mean loss" in cards[row]
    cost = json.loads((found["odm-released"] / "result.json").read_text())["cost"]
    assert f"| training compute | {cost['training']['flops']:.3g} FLOPs |" in cards["odm-released"]
    assert "The mixing method `odm-released` with smoothing 0.5." in cards["odm-released"]
    assert "`static` with the weights letters 0.5, numbers 0.25, verbs 0.25." in cards["half"]
    assert "the mean over time of those that `odm-released` decided" in cards["mean-of:odm-released"]


def test_a_cell_whose_model_was_not_kept(tiny_corpus, tmp_path):
    found = cells(tiny_corpus, tmp_path / "b", mixers="uniform", mean_of=False)
    refuse(found["uniform"], tmp_path, DataError, "its benchmark kept none; run it with --keep-models")


# --- what is refused --------------------------------------------------------------------------------------


def refuse(run, tmp_path, error, message, **settings):
    out = tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        export_model.run(ExportModelConfig(**({"run": str(run), "out": str(out), "quiet": True} | settings)))
    assert sorted(tmp_path.rglob("*")) == before


def test_no_run(tmp_path):
    refuse(tmp_path / "nowhere", tmp_path, ConfigError, "must be the folder of a run")


def test_a_run_of_another_command(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": {"algo": "td3"}, "versions": {}}))
    refuse(tmp_path / "run", tmp_path, ConfigError, "this one leaves none; train it by `acodm transfer`")


def test_a_run_that_has_not_ended(run, tmp_path):
    (run / "result.json").unlink()
    refuse(run, tmp_path, DataError, "it has not ended; give its command again")


@pytest.mark.parametrize(("diverged", "message"), [(True, "it diverged; go on"), (False, "was removed")])
def test_a_run_without_a_model(diverged, message, run, tmp_path):
    shutil.rmtree(run / "model")
    record = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(record | {"diverged": diverged}))
    refuse(run, tmp_path, DataError, message)


def test_weights_cut_short(run, tmp_path):
    file = run / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse(run, tmp_path, DataError, r"model\.safetensors.*cut short")


def test_a_folder_of_other_files(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    refuse(trained, tmp_path, DataError, "already holds thesis.tex")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_a_file_in_the_way(trained, tmp_path):
    (tmp_path / "out").write_text("mine")
    refuse(trained, tmp_path, DataError, "is a file; choose another folder")


def test_the_runs_own_folders(run, tmp_path):
    refuse(run, tmp_path, DataError, "already holds", out=str(run))
    refuse(run, tmp_path, DataError, "must not be the run's own model", out=str(run / "model"))


def test_the_model_of_another_run_is_not_overwritten(trained, run, tmp_path):
    before = (run / "model" / "model.safetensors").read_bytes()
    refuse(trained, tmp_path, DataError, "must be absent, empty or an earlier export", out=str(run / "model"))
    assert (run / "model" / "model.safetensors").read_bytes() == before
    (run / "model").rename(run / ".model.old")  # a kill while it was being replaced
    with pytest.raises(DataError, match="must be absent, empty or an earlier export"):
        export_model.run(ExportModelConfig(run=str(trained), out=str(run / "model"), quiet=True))
    assert (run / "model" / "model.safetensors").read_bytes() == before


def test_an_empty_folder_is_written_to(trained, tmp_path):
    (tmp_path / "out").mkdir()
    export_model.run(ExportModelConfig(run=str(trained), out=str(tmp_path / "out"), quiet=True))
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_copy_that_is_another_model_is_not_written(trained, tmp_path, monkeypatch):
    def spoilt(source, target):
        content = bytearray(source.read_bytes())
        if target.name == "model.safetensors":
            content[-1] ^= 0x40  # one bit of one weight
        target.write_bytes(content)

    monkeypatch.setattr(export_model.shutil, "copyfile", spoilt)
    refuse(trained, tmp_path, DataError, "would give other logits than the run's; nothing was written")


def test_a_negative_seed():
    with pytest.raises(ConfigError, match="seed=-1: must be at least 0"):
        ExportModelConfig(seed=-1)


def test_an_export_that_was_evaluated_is_written_again_with_its_evaluation(trained, tmp_path):
    settings = ExportModelConfig(run=str(trained), out=str(tmp_path / "out"), quiet=True)
    export_model.run(settings)
    (tmp_path / "out" / "evaluation").mkdir()
    (tmp_path / "out" / "evaluation" / "mmlu.jsonl").write_text("{}\n")
    (tmp_path / "out" / "evaluation.json").write_text("{}")
    export_model.run(settings)
    assert (tmp_path / "out" / "evaluation" / "mmlu.jsonl").read_text() == "{}\n"
    assert (tmp_path / "out" / "evaluation.json").read_text() == "{}"
