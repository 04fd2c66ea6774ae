"""A model folder of `transformers`, opened to be measured: whole, as it was saved, or not at all.

`transformers` itself draws weights that a folder lacks at random and goes on; a score of such a model means nothing,
so here it is an error. Nothing is downloaded, and nothing that was downloaded is run: weights are read from
safetensors only, never from pickles, and code beside a model stays where it is.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acodm_env.corpus.tokenizer import end_of_document, load_tokenizer
from acodm_env.errors import ConfigError, DataError, unknown
from acodm_env.files import sha256
from acodm_env.pretrain.config import PRECISIONS, resolve_device

UNBOUNDED_CONTEXT = 2048
"""Context of an architecture that has no longest one, in tokens."""
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A causal language model and its tokenizer, ready to be evaluated."""

    model: torch.nn.Module
    """In evaluation mode, on `device`, float32, without gradients."""
    tokenizer: Any
    """`transformers`' fast tokenizer; it has an end-of-sequence token."""
    path: Path
    device: torch.device
    bf16: bool
    """Whether forward passes run under bfloat16 autocast."""
    context: int
    """Longest input, in tokens."""
    num_parameters: int
    sha256: str
    """Of the weights' files, one after the other in the order of their names."""
    tokenizer_sha256: str
    """Of tokenizer.json."""


def load_model(
    path: str | Path, *, device: str = "auto", precision: str = "auto", context: int | None = None
) -> LoadedModel:
    """Load a folder as `save_pretrained` writes it; no network, no pickle, no code from the folder.

    Args:
        path: the folder: config.json, safetensors, tokenizer.json.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "auto" (bf16 autocast on a CUDA device that has it), "fp32" or "bf16".
        context: longest input in tokens; None is the model's.

    Raises:
        DataError: the folder lacks a file or holds a damaged one, weights are missing, left over or of another
            shape, or the tokenizer has ids that the model does not embed.
        ConfigError: `device` or `precision` is unknown or not here, or `context` is longer than the model's.
    """
    folder = Path(path).expanduser().absolute()
    where = resolve_device(device)
    if precision not in PRECISIONS:
        unknown("precision", precision, PRECISIONS)
    config = _config(folder)
    files = weight_files(folder)
    tokens = _context(folder, config, context)
    tokenizer, largest = _tokenizer(folder)
    model = _model(folder, config)
    _check_vocabulary(folder, model, largest)
    bf16_here = where.type == "cuda" and torch.cuda.is_bf16_supported()
    return LoadedModel(
        model=model.to(where).requires_grad_(False).eval(),
        tokenizer=tokenizer,
        path=folder,
        device=where,
        bf16=precision == "bf16" or (precision == "auto" and bf16_here),
        context=tokens,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        sha256=_sha256(files),
        tokenizer_sha256=sha256(folder / "tokenizer.json"),
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder in the order of their names, each readable and as long as it says.

    Raises:
        DataError: there are none, one is missing or cut short, or they are pickles.
    """
    from safetensors import SafetensorError, safe_open

    names = [_WEIGHTS]
    if not (folder / _WEIGHTS).is_file():
        names = _sharded(folder)
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: must be there, {_INDEX} lists it; copy the model folder again")
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise DataError(
                f"{folder / name}: must be a whole safetensors file; {error}: it was cut short or is something else; "
                f"copy or export the model again"
            ) from error
    return [folder / name for name in names]


def _sharded(folder: Path) -> list[str]:
    if (folder / _INDEX).is_file():
        try:
            return sorted({str(name) for name in json.loads((folder / _INDEX).read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{folder / _INDEX}: must map weights to files; {error!r}; copy the model folder again"
            ) from error
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise DataError(
            f"model={folder}: must hold {_WEIGHTS}; its weights are in {pickles[0]}, a pickle, which can run code when "
            f"it is read; where you trust it, load it with transformers and save it with save_pretrained"
        )
    raise DataError(
        f"model={folder}: must hold {_WEIGHTS}; the folder is empty of weights: was the run ended, the copy whole?; "
        f"end the run, or copy the model again"
    )


def _config(folder: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        cause = "it is empty of one" if folder.is_dir() else "there is no such folder"
        raise DataError(
            f"model={folder}: must be a model folder with a config.json; {cause}; name the folder that a run or "
            f"save_pretrained wrote"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise DataError(
            f"{folder / 'config.json'}: must be a configuration that transformers knows; {_first_line(error)}; copy "
            f"the model again, or take a newer transformers"
        ) from error


def _context(folder: Path, config: Any, wanted: int | None) -> int:
    config = config.get_text_config()
    lengths = [getattr(config, name) for name in _CONTEXTS if isinstance(getattr(config, name, None), int)]
    if lengths and lengths[0] < 1:
        raise DataError(
            f"{folder / 'config.json'}: must give the model's context; it says {lengths[0]} tokens; it was edited: "
            f"copy the model again"
        )
    if wanted is None:
        return int(lengths[0]) if lengths else UNBOUNDED_CONTEXT
    if wanted < 1:
        raise ConfigError(f"context={wanted}: must be at least 1 token")
    if lengths and wanted > lengths[0]:
        raise ConfigError(
            f"context={wanted}: must be at most {lengths[0]} tokens, the most that the model in {folder} takes; it was "
            f"trained on no more; leave context out, or shorten it"
        )
    return wanted


def _tokenizer(folder: Path) -> tuple[Any, int]:
    """The tokenizer, with an end token, and its largest id."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"model={folder}: must hold its tokenizer; there is no tokenizer.json; copy it beside the weights, or save "
            f"a fast tokenizer there with save_pretrained"
        )
    plain = load_tokenizer(str(folder))
    try:
        with _quiet():
            if (folder / "tokenizer_config.json").is_file():
                kind = PreTrainedTokenizerFast if _is_plain(folder) else AutoTokenizer
                tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            else:  # the architecture's own class would add its special tokens to a tokenizer that has none of them
                tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise DataError(
            f"model={folder}: must hold a tokenizer that transformers loads; {_first_line(error)}; save it again with "
            f"save_pretrained"
        ) from error
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = plain.id_to_token(end_of_document(plain))
    return tokenizer, max(tokenizer.get_vocab().values())


def _is_plain(folder: Path) -> bool:
    """Whether tokenizer_config.json names the class that takes tokenizer.json as it is.

    `AutoTokenizer` does not believe this of some architectures (Qwen2, Phi-3) and builds their own tokenizer from the
    vocabulary: other ids than those that the model was trained on.
    """
    return json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class") in _PLAIN_TOKENIZERS


def _model(folder: Path, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        # Weights that the folder lacks would be drawn: from a generator that is put back, and then refused.
        with _quiet(), torch.random.fork_rng(devices=[]):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise DataError(
            f"model={folder}: must be a causal language model that transformers loads; {_first_line(error)}; check "
            f"config.json, or copy the model again"
        ) from error
    wrong = {
        "lack": report["missing_keys"],
        "have in another shape": {entry[0] for entry in report["mismatched_keys"]},
        "have beyond that": report["unexpected_keys"],
    }
    for verb, names in wrong.items():
        if names:
            raise DataError(
                f"model={folder}: must hold the weights of the {type(model).__name__} that its config.json describes; "
                f"its files {verb} {_listed(sorted(names))}: config.json is another model's, or the copy is not whole; "
                f"copy or export the model again"
            )
    return model


def _check_vocabulary(folder: Path, model: Any, largest: int) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < largest + 1:
        raise DataError(
            f"model={folder}: must embed every id of its tokenizer; it has {rows} rows and the tokenizer's largest id "
            f"is {largest}: the tokenizer is another model's; put the one beside it that it was trained with"
        )


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while part := content.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports: what is wrong is said by our errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
