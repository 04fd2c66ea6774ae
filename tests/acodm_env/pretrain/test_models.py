"""Models are a function of their seed, disturb no generator, and their watched layers are the ones meant."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig, MptConfig, OPTConfig

from acodm_env.errors import ConfigError, DataError
from acodm_env.pretrain.models import (
    PRESETS,
    blocks,
    build_model,
    flops_per_token,
    flops_per_token_of,
    mlp_outputs,
    model_config,
    observed_layers,
    probed_layers,
)

KINDS = {
    "gpt-2": (GPT2Config(n_layer=2, n_embd=16, n_head=2), "transformer.h.{}.mlp.c_proj"),
    "llama": (
        LlamaConfig(
            num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1
        ),
        "model.layers.{}.mlp.down_proj",
    ),
    "opt": (
        OPTConfig(num_hidden_layers=2, hidden_size=16, ffn_dim=24, num_attention_heads=2, word_embed_proj_dim=16),
        "model.decoder.layers.{}.fc2",
    ),
    "mpt": (MptConfig(n_layers=2, d_model=16, n_heads=2), "transformer.blocks.{}.ffn.down_proj"),  # found by shape
}


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_same_seed_same_weights():
    first, again, other = (weights_of(build_model("tiny", 64, 16, seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_generators_are_left_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    model = build_model("tiny", 64, 16, seed=2**62 - 1)
    model.train()(input_ids=torch.zeros(2, 16, dtype=torch.long)).logits.sum().backward()
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert states[2] == random.getstate()


@pytest.mark.parametrize(
    ("preset", "non_embedding"), [("tiny", 100_096), ("small", 793_344), ("pythia-14m", 1_189_888)]
)
def test_presets_have_their_published_size(preset, non_embedding):
    """Pythia-14m: 14,067,712 parameters, 1,189,888 of them outside of the two embeddings (50304 × 128 each)."""
    model = build_model(preset, 2048, 32, seed=0)
    hidden = PRESETS[preset][1]
    assert sum(parameter.numel() for parameter in model.parameters()) == non_embedding + 2 * 2048 * hidden
    assert model.config.use_parallel_residual
    head_size = hidden // PRESETS[preset][2]
    assert len(model.gpt_neox.rotary_emb.inv_freq) == head_size // 4 // 2  # a quarter of each head, in pairs
    assert model.config._attn_implementation == "sdpa"


def test_shapes_of_the_pythia_family():
    """Table 1 of arXiv 2304.01373, without building the large ones: non-embedding parameters."""
    published = {
        "pythia-70m": 18_915_328,
        "pythia-160m": 85_056_000,
        "pythia-410m": 302_311_424,
        "pythia-1b": 805_736_448,
    }
    for preset, expected in published.items():
        layers, hidden, _, intermediate = PRESETS[preset]
        block = 4 * hidden**2 + 4 * hidden + 2 * hidden * intermediate + intermediate + hidden + 4 * hidden
        assert layers * block + 2 * hidden == expected, preset


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_file_is_fitted_and_its_mlp_outputs_are_found(kind, tmp_path):
    config, pattern = KINDS[kind]
    config.save_pretrained(tmp_path)
    model = build_model(str(tmp_path / "config.json"), 40, 12, seed=0)
    assert [name for name, _ in mlp_outputs(model)] == [pattern.format(0), pattern.format(1)]
    assert [block.get_submodule(pattern.partition("{}.")[2]) for block in blocks(model)] == [
        module for _, module in mlp_outputs(model)
    ]
    model.train()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        assert logits.shape == (1, 12, 40)
        assert torch.equal(logits, model(input_ids=tokens).logits)  # no dropout
    if kind == "gpt-2":
        assert model.transformer.wpe.weight.shape == (12, 16)


def test_every_dropout_is_off(tmp_path):
    OPTConfig(dropout=0.3, attention_dropout=0.2, layerdrop=0.5).save_pretrained(tmp_path)
    config = model_config(str(tmp_path))
    assert (config.dropout, config.attention_dropout, config.layerdrop) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("num_blocks", "most", "expected"),
    [(1, 3, [0]), (2, 3, [1]), (3, 3, [2]), (5, 3, [3, 4]), (6, 3, [3, 4, 5]), (16, 3, [8, 11, 15]), (6, 1, [5])],
)
def test_probed_layers_lie_in_the_deep_half(num_blocks, most, expected):
    model = stack(num_blocks)
    assert [name for name, _ in probed_layers(model, most=most)] == [f"{i}.fc2" for i in expected]


def test_probed_layers_by_depth():
    """The paper's layers 12, 14 and 16 of 16, counted from 1."""
    names = [name for name, _ in probed_layers(stack(16), depths=(0.75, 0.875, 1.0))]
    assert names == ["11.fc2", "13.fc2", "15.fc2"]
    assert [name for name, _ in probed_layers(stack(2), depths=(0.9, 1.0))] == ["1.fc2"]  # each layer once
    with pytest.raises(ConfigError, match=r"depth=1\.5"):
        probed_layers(stack(2), depths=(1.5,))


def test_observed_layers_are_one_per_depth():
    model = stack(3)
    for weight, block in zip(observed_layers(model), model, strict=True):
        assert weight is block.fc2.weight
    single = stack(1)
    assert all(weight is single[0].fc2.weight for weight in observed_layers(single, depths=(0.0, 0.5, 1.0)))


def stack(num_blocks):
    """A stand-in for a model: blocks with an MLP output."""
    blocks = nn.Sequential()
    for _ in range(num_blocks):
        block = nn.Module()
        block.fc2 = nn.Linear(2, 2)
        blocks.append(block)
    return blocks


def test_a_model_without_mlp_outputs_names_its_layers():
    model = nn.Sequential()
    model.add_module("query", nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="its linear layers are query"):
        mlp_outputs(model)


def test_bad_names_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'pythia-14m'"):
        build_model("pythia-14", 64, 16, seed=0)
    with pytest.raises(ConfigError, match="no such file"):
        build_model(str(tmp_path / "nothing.json"), 64, 16, seed=0)
    broken = tmp_path / "config.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="must be a readable configuration"):
        build_model(str(broken), 64, 16, seed=0)
    broken.write_text('{"model_type": "vit"}')
    with pytest.raises(ConfigError, match="must be a causal language model's configuration"):
        build_model(str(broken), 64, 16, seed=0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set; take a preset"):
        build_model("nobody/no-such-model", 64, 16, seed=0)


def test_flops_per_token_by_hand():
    """Tiny: 100,096 parameters outside of the embeddings, 300 × 64 in the output one; 2 layers × 64 wide × 32 long."""
    model = build_model("tiny", 300, 32, seed=0)
    expected = 6 * (100_096 + 300 * 64) + 12 * 2 * 64 * 32
    assert flops_per_token(model, 32) == expected == 764_928
    assert flops_per_token_of("tiny", 300, 32) == expected
    assert flops_per_token(model, 64) == expected + 12 * 2 * 64 * 32


def test_flops_of_a_tied_model_count_its_embedding_once(tmp_path):
    """GPT-2's output layer is its input embedding: it multiplies, so it counts."""
    GPT2Config(n_layer=2, n_embd=16, n_head=2).save_pretrained(tmp_path)
    model = build_model(str(tmp_path / "config.json"), 40, 12, seed=0)
    norms, attention, mlp = 2 * 32, 16 * 48 + 48 + 16 * 16 + 16, 16 * 64 + 64 + 64 * 16 + 16
    parameters = 2 * (norms + attention + mlp) + 32 + 12 * 16 + 40 * 16  # blocks, last norm, positions, embedding
    assert flops_per_token(model, 12) == 6 * parameters + 12 * 2 * 16 * 12
