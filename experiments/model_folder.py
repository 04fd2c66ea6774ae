"""The trained model as `transformers` loads it: configuration, weights, tokenizer.

::

    AutoModelForCausalLM.from_pretrained("runs/mine/model")
    AutoTokenizer.from_pretrained("runs/mine/model")
"""

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

from acodm_env.corpus import TokenStore
from acodm_env.files import atomic_folder, write_arrays
from acodm_env.wrapper import innermost

if TYPE_CHECKING:
    from acodm_env.pretrain.leader import Led
    from acodm_env.pretrain.trainer import LMTrainer


def save_model(path: str | Path, trainer: "LMTrainer | Led", store: TokenStore) -> None:
    """Write the model of a trainer into a folder, which it replaces.

    Args:
        path: the folder.
        trainer: the one, or what leads several; all processes take part, and the model is put together.
        store: the corpus, whose tokenizer is copied.
    """
    from transformers import PreTrainedTokenizerFast

    weights, model = trainer.model_state(), innermost(trainer).bare_model
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(store.path / "tokenizer.json"))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(store.end_of_document)
    with atomic_folder(path) as fresh:
        write_arrays(fresh / "model.safetensors", weights, {"format": "pt"})
        config.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
