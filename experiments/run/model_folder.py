"""The trained model as `transformers` loads it: configuration, weights, tokenizer.

::

    AutoModelForCausalLM.from_pretrained("runs/mine/model")
    AutoTokenizer.from_pretrained("runs/mine/model")

Of some architectures (Qwen2, Phi-3) `AutoTokenizer` builds another tokenizer, whatever the folder says;
`PreTrainedTokenizerFast` takes the one that lies there.
"""

import shutil
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.corpus import TokenStore
from acodm_env.files import atomic_folder, write_arrays, write_json
from acodm_env.wrapper import innermost

if TYPE_CHECKING:
    from acodm_env.pretrain.leader import Led
    from acodm_env.pretrain.trainer import LMTrainer

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"


def save_model(path: str | Path, trainer: "LMTrainer | Led", store: TokenStore) -> None:
    """Write the model of a trainer into a folder, which it replaces.

    Args:
        path: the folder.
        trainer: the one, or what leads several; all processes take part, and the model is put together.
        store: the corpus, whose tokenizer is copied.
    """
    weights, model = trainer.model_state(), innermost(trainer).bare_model
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    with atomic_folder(path) as fresh:
        write_arrays(fresh / WEIGHTS, weights, {"format": "pt"})
        write_settings(fresh, config, store.path / TOKENIZER, store.end_of_document)


def write_settings(folder: Path, config: Any, tokenizer: Path, end_of_document: int) -> None:
    """Write all that a model's folder holds beside the weights.

    The end-of-document token stands before, after and beside every text: documents are a stream in which one ends where
    the next begins, so it is the first token of a text without a beginning, the last one, and what fills up a batch.
    Without this a model has its architecture's default ids, which are other tokens here, and does not stop.

    Args:
        folder: where to; what is there is replaced.
        config: the model's, which is changed.
        tokenizer: a `tokenizer.json`. It is copied byte for byte: read and written again it would be another file, and
            nobody could tell that it encodes as the corpus was encoded.
        end_of_document: id of the token that ends every document.
    """
    from tokenizers import Tokenizer
    from transformers import GenerationConfig

    ids = {f"{role}_token_id": end_of_document for role in ("bos", "eos", "pad")}
    for name, value in ids.items():
        setattr(config, name, value)
    config.dtype = "float32"
    config.use_cache = True  # in training it was off; without it every generated token costs the whole text again
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / TOKENIZER)
    end = Tokenizer.from_file(str(tokenizer)).id_to_token(end_of_document)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that every release of transformers knows
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
    }
    context = getattr(config, "max_position_embeddings", None)
    write_json(folder / "tokenizer_config.json", about | ({"model_max_length": context} if context else {}))
