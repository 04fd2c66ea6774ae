"""Causal language models from configurations, randomly initialised, and which of their layers are watched.

Pre-training here starts from random weights, so a configuration is all a model needs: a preset, a `config.json`, or a
hub model's configuration. Nothing is downloaded for the presets.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acodm_env.errors import ConfigError, unknown
from acodm_env.hub import require_hub

PRESETS: dict[str, tuple[int, int, int, int]] = {
    "tiny": (2, 64, 4, 256),
    "small": (4, 128, 4, 512),
    "pythia-14m": (6, 128, 4, 512),
    "pythia-31m": (6, 256, 8, 1024),
    "pythia-70m": (6, 512, 8, 2048),
    "pythia-160m": (12, 768, 12, 3072),
    "pythia-410m": (24, 1024, 16, 4096),
    "pythia-1b": (16, 2048, 8, 8192),
}
"""(layers, hidden, heads, intermediate) of GPT-NeoX; the Pythia shapes are the published ones (arXiv 2304.01373)."""

_MLP_OUTPUTS = ("dense_4h_to_h", "mlp.c_proj", "mlp.down_proj", "fc2", "mlp.fc_out")
_PROBED_DEPTH = 0.5  # the paper probes the deep half (arXiv 2505.23878)


def build_model(name: str, vocab_size: int, sequence_length: int, seed: int) -> nn.Module:
    """A transformers causal language model with random weights: the same seed, the same weights, bit for bit.

    Attention is transformers' own choice, "sdpa" wherever the architecture has it.

    Args:
        name: a preset, the path of a `config.json`, or a hub name (its configuration only, no weights).
        vocab_size: entries of the tokenizer.
        sequence_length: tokens per sequence, the model's context.
        seed: of the initialisation; global generators are left as they were.

    Raises:
        ConfigError: an unknown preset, or a configuration that cannot be read or is no causal language model's.
    """
    from transformers import AutoModelForCausalLM

    config = model_config(name)
    _fit(config, vocab_size, sequence_length)
    with _seeded(seed):
        try:
            model: nn.Module = AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError, ImportError) as error:
            first_line = str(error).splitlines()[0][:200]
            raise ConfigError(f"model={name}: must be a causal language model's configuration; {first_line}") from error
    return model


def flops_per_token(model: nn.Module, sequence_length: int) -> float:
    """Model FLOPs of training on one token, forward and backward: 6N + 12·layers·width·length.

    N leaves out the input embedding, which multiplies nothing; the second term is attention's, not halved for
    causality (PaLM, arXiv 2204.02311, appendix B).
    """
    inputs = model.get_input_embeddings()  # type: ignore[operator]
    tied = inputs.weight is getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    num_parameters = sum(p.numel() for p in model.parameters()) - (0 if tied else inputs.weight.numel())
    config: Any = model.config
    attention = 12 * getattr(config, "num_hidden_layers", 0) * getattr(config, "hidden_size", 0) * sequence_length
    return float(6 * num_parameters + attention)


def flops_per_token_of(name: str, vocab_size: int, sequence_length: int) -> float:
    """`flops_per_token` of a model that is not built: only its shapes are."""
    with torch.device("meta"):
        model = build_model(name, vocab_size, sequence_length, seed=0)
    return flops_per_token(model, sequence_length)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's CPU generator set to `seed` inside the block and put back after it; CUDA's are not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def model_config(name: str) -> Any:
    """The transformers configuration of a preset, a `config.json` or a hub name, without dropout.

    Raises:
        ConfigError: see `build_model`.
    """
    config = _preset(name) if name in PRESETS else _read_config(name)
    for part in (config, *(child for child in vars(config).values() if hasattr(child, "to_dict"))):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)  # dropout and layer-drop would draw from the global generator
    return config


def _preset(name: str) -> Any:
    from transformers import GPTNeoXConfig

    layers, hidden, heads, intermediate = PRESETS[name]
    return GPTNeoXConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        use_parallel_residual=True,
        tie_word_embeddings=False,
    )  # rotary on a quarter of each head is the default, in every release's own spelling


def _read_config(name: str) -> Any:
    from transformers import AutoConfig

    is_path = Path(name).exists() or name.endswith(".json") or name.startswith((".", "/"))
    if not is_path and "/" not in name:
        unknown("model", name, PRESETS)
    if is_path and not Path(name).exists():
        raise ConfigError(f"model={name}: no such file; give a preset ({', '.join(PRESETS)}) or a config.json")
    if not is_path and not _is_cached(name):
        require_hub("model", name, f"take a preset ({', '.join(PRESETS)}) or give the path of its config.json")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"model={name}: must be a readable configuration ({first_line}); without network, take a preset "
            f"({', '.join(PRESETS)}), or download the model's config.json elsewhere and give its path"
        ) from error


def _is_cached(name: str) -> bool:
    """Whether the hub's local cache holds the model's configuration."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _fit(config: Any, vocab_size: int, sequence_length: int) -> None:
    """The corpus decides vocabulary and context; special tokens outside of the vocabulary are dropped."""
    config.vocab_size = vocab_size
    config.use_cache = False  # keys and values are kept for generation only
    if hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = sequence_length
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, key, None)
        if isinstance(token, list) or (isinstance(token, int) and token >= vocab_size):
            setattr(config, key, None)


def mlp_outputs(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The output projection of every block's MLP as (name, module), from the first block to the last.

    Known by name for the common architectures (GPT-NeoX, GPT-2, Llama and their kin); otherwise the widest-input
    linear layer of each block that leads back to the hidden size.

    Raises:
        ConfigError: there is none.
    """
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    known = [(name, module) for name, module in linear.items() if name.endswith(_MLP_OUTPUTS)]
    found = known or _by_shape(model, linear)
    if not found:
        kinds = sorted({name.split(".")[-1] for name in linear})
        raise ConfigError(
            f"model={type(model).__name__}: must have an MLP output layer per block; none is known for this "
            f"architecture; its linear layers are {', '.join(kinds) or 'none'}"
        )
    return found


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of the model's longest stack, from first to last; empty where there is none."""
    stacks = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=len, default=[])


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _by_shape(model: nn.Module, linear: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Per block of the model's longest stack, the layer hidden ← wider with the most inputs."""
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if hidden is None or not stacks:
        return []
    stack_name, stack = max(stacks, key=lambda entry: len(entry[1]))
    found = []
    for index in range(len(stack)):
        inputs = {
            name: width
            for name, module in linear.items()
            if name.startswith(f"{stack_name}.{index}.")
            for out, width in [_out_in(module)]
            if out == hidden < width
        }
        if inputs:
            widest = max(inputs, key=lambda name: inputs[name])
            found.append((widest, linear[widest]))
    return found


def _out_in(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def probed_layers(
    model: nn.Module, depths: Sequence[float] | None = None, most: int = 3
) -> list[tuple[str, nn.Module]]:
    """Layers whose per-domain gradients are measured, as (name, module).

    Args:
        model: any causal language model with known MLP outputs.
        depths: relative depths, 0 (first block) to 1 (last block); None is evenly spread over the deep half.
        most: how many at most without `depths`; at least 1.

    Raises:
        ConfigError: a depth outside of [0, 1].
    """
    outputs = mlp_outputs(model)
    if depths is None:
        deep = outputs[min(math.ceil(_PROBED_DEPTH * len(outputs)), len(outputs) - 1) :]
        return [deep[index] for index in _spread(len(deep), most)]
    return [outputs[index] for index in sorted({_at_depth(depth, len(outputs)) for depth in depths})]


def observed_layers(model: nn.Module, depths: Sequence[float] = (0.0, 0.5, 1.0)) -> list[nn.Parameter]:
    """Weights (MLP outputs) at fixed relative depths, whose norms an agent may see; one per depth."""
    outputs = mlp_outputs(model)
    return [outputs[_at_depth(depth, len(outputs))][1].weight for depth in depths]  # type: ignore[misc]


def _at_depth(depth: float, count: int) -> int:
    if not 0 <= depth <= 1:
        raise ConfigError(f"depth={depth}: must be between 0 (first block) and 1 (last block)")
    return math.floor(depth * (count - 1) + 0.5)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, evenly spread, the last one included."""
    number = min(count, most)
    return [count - 1 - math.floor(i * (count - 1) / max(number - 1, 1) + 0.5) for i in reversed(range(number))]
