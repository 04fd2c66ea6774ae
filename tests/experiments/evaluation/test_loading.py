"""A model folder is loaded as it was saved, or refused with what is wrong and where."""

import hashlib
import json
import shutil

import pytest
import torch
from evaluated import save_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.evaluation.loading import UNBOUNDED_CONTEXT, load_model, weight_files
from acodm_env.pretrain.models import build_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_store):
    return save_folder(tmp_path_factory.mktemp("model") / "tiny", tiny_store)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def load(folder, **settings):
    return load_model(folder, device="cpu", **settings)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_folder_as_it_was_saved(saved, tiny_store):
    before = torch.get_rng_state()
    loaded = load(saved)
    assert torch.equal(before, torch.get_rng_state())
    built = build_model("tiny", tiny_store.vocab_size, 32, seed=0)
    for name, weight in built.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight)
    tokens = torch.arange(32)[None]
    assert torch.equal(
        loaded.model(input_ids=tokens).logits, AutoModelForCausalLM.from_pretrained(saved)(input_ids=tokens).logits
    )
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert (loaded.context, loaded.bf16, loaded.device) == (32, False, torch.device("cpu"))
    assert loaded.num_parameters == sum(parameter.numel() for parameter in built.parameters())
    assert loaded.sha256 == hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.tokenizer_sha256 == hashlib.sha256((saved / "tokenizer.json").read_bytes()).hexdigest()
    assert loaded.tokenizer.eos_token_id == tiny_store.end_of_document
    assert loaded.path == saved


def test_nothing_is_asked_of_the_network(saved, monkeypatch):
    import socket

    def connect(*args, **kwargs):
        raise AssertionError("no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    load(saved)


def test_weights_in_several_files(folder):
    whole = load(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="300KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    files = weight_files(folder)
    assert len(files) > 1
    parts = load(folder)
    assert all(
        torch.equal(one, other) for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    )
    assert parts.sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    files[1].unlink()
    with pytest.raises(DataError, match=rf"{files[1].name}: must be there"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(DataError, match=r"index\.json: must map weights to files"):
        load(folder)


def test_half_precision_weights_are_widened(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: weight.bfloat16() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    change_config(folder, dtype="bfloat16")
    loaded = load(folder)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    name = "gpt_neox.embed_in.weight"
    assert torch.equal(loaded.model.state_dict()[name], weights[name].bfloat16().float())


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_weights_that_were_cut_short(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"copy/model\.safetensors: must be a whole safetensors file; .*cut short"):
        load(folder)


def test_weights_that_are_missing_are_not_drawn(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"lack gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.weight: "):
        load(folder)


def test_weights_that_belong_nowhere(folder):
    weights = load_file(folder / "model.safetensors")
    extra = {f"extra.{index}": torch.zeros(2) for index in range(5)}
    save_file(weights | extra, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"beyond that extra\.0, extra\.1, extra\.2 and 2 more"):
        load(folder)


def test_weights_of_another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.final_layer_norm.bias"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"have in another shape gpt_neox\.final_layer_norm\.bias"):
        load(folder)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model\.bin, a pickle, which can run code.*save_pretrained"):
        load(folder)


def test_an_empty_folder(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="empty of weights"):
        load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"must be a model folder with a config\.json; it is empty of one"):
        load(tmp_path / "empty")
    with pytest.raises(DataError, match="there is no such folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "no-such-thing"}', "{}"])
def test_a_configuration_that_is_none(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(DataError, match=r"config\.json: must be a configuration that transformers knows"):
        load(folder)


def test_code_in_the_folder_is_not_run(folder, tmp_path):
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    change_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    with pytest.raises(DataError, match="must be a configuration that transformers knows"):
        load(folder)
    assert not marker.exists()


def test_no_causal_language_model(folder):
    change_config(folder, model_type="vit")
    with pytest.raises(DataError, match="must be a causal language model that transformers loads"):
        load(folder)


def test_tokenizer_missing_or_damaged(folder):
    file = folder / "tokenizer.json"
    content = file.read_text()
    file.write_text(content[:100])
    with pytest.raises(DataError, match=r"must be a tokenizer\.json"):
        load(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"must hold its tokenizer; there is no tokenizer\.json"):
        load(folder)
    file.write_text(content)
    (folder / "tokenizer_config.json").unlink()
    assert load(folder).tokenizer.eos_token == "<|endofdocument|>"  # its own token for this purpose


def test_a_vocabulary_larger_than_the_embedding(tmp_path, tiny_store):
    folder = save_folder(tmp_path / "model", tiny_store)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": tiny_store.vocab_size, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    size = tiny_store.vocab_size
    with pytest.raises(DataError, match=rf"it has {size} rows and the tokenizer's largest id is {size}"):
        load(folder)


def test_more_rows_than_ids_are_padding(tmp_path, tiny_store):
    folder = save_folder(tmp_path / "model", tiny_store)
    wide = build_model("tiny", tiny_store.vocab_size + 20, 32, 0)
    wide.save_pretrained(folder)
    assert load(folder).model.config.vocab_size == tiny_store.vocab_size + 20


def test_context(saved, folder):
    assert load(saved, context=8).context == 8
    with pytest.raises(ConfigError, match=r"context=33: must be at most 32 tokens"):
        load(saved, context=33)
    with pytest.raises(ConfigError, match="context=0: must be at least 1"):
        load(saved, context=0)
    assert UNBOUNDED_CONTEXT == 2048


def test_an_architecture_without_a_longest_context(tmp_path, tiny_store):
    from transformers import BloomConfig

    folder = save_folder(tmp_path / "model", tiny_store)
    config = BloomConfig(vocab_size=tiny_store.vocab_size, hidden_size=16, n_layer=1, n_head=2)
    with torch.random.fork_rng():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert load(folder).context == UNBOUNDED_CONTEXT
    assert load(folder, context=5000).context == 5000


def test_settings_that_are_not_there(saved):
    with pytest.raises(ConfigError, match="precision='fp8': must be one of auto, bf16, fp32"):
        load(saved, precision="fp8")
    with pytest.raises(ConfigError, match="device=tpu9"):
        load_model(saved, device="tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device=cuda: no CUDA device"):
            load_model(saved, device="cuda")


@pytest.mark.parametrize(
    "changes",
    [{"num_attention_heads": 7}, {"max_position_embeddings": "128"}, {"max_position_embeddings": 0}],
    ids=["does not divide", "a text for a number", "no context"],
)
def test_an_edited_configuration_is_named(folder, changes):
    change_config(folder, **changes)
    with pytest.raises(DataError, match=r"copy/config\.json: must "):
        load(folder)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_the_tokenizer_is_the_one_in_the_folder_whatever_the_architecture(name, folder, tiny_store):
    """`AutoTokenizer` builds Qwen2's own from the vocabulary: other ids."""
    from tokenizers import Tokenizer
    from transformers import Qwen2Config

    config = Qwen2Config(vocab_size=tiny_store.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 2
    with torch.random.fork_rng():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    end = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(tiny_store.end_of_document)
    about = {"tokenizer_class": name, "eos_token": end, "pad_token": end, "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    tokenizer, plain = load(folder).tokenizer, Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("  two  spaces , ok .", "don't 12345\n\n x", "e\u0301"):
        assert tokenizer(text)["input_ids"] == plain.encode(text).ids
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (tiny_store.end_of_document,) * 2
    assert (len(tokenizer), tokenizer.model_max_length) == (tiny_store.vocab_size, 32)


def test_an_edited_tokenizer_configuration_is_named(folder):
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="must hold a tokenizer that transformers loads"):
        load(folder)
