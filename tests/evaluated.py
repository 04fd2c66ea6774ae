"""Model folders, and models whose numbers can be worked out by hand, for the tests of evaluation."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from acodm_env.corpus.tokens import TokenStore
from acodm_env.experiments.evaluation.loading import LoadedModel
from acodm_env.pretrain.models import build_model


def save_folder(path: Path, store: TokenStore, model: str = "tiny", context: int = 32, seed: int = 0) -> Path:
    """A model with random weights and the store's tokenizer, as a run leaves them."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    build_model(model, store.vocab_size, context, seed).save_pretrained(path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(store.path / "tokenizer.json"))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(store.end_of_document)
    tokenizer.save_pretrained(path)
    return path


class ByPosition(nn.Module):
    """After t inputs of its window the end token is t times as likely as any other: P(end) = t / (t + V - 1)."""

    def __init__(self, vocab_size: int, end: int):
        super().__init__()
        self.config = Config(vocab_size)
        self.end = end
        self.seen: list[list[list[int]]] = []  # what every forward pass was given

    def forward(self, input_ids, use_cache=None):
        self.seen.append(input_ids.tolist())
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        logits[..., self.end] = torch.arange(1, input_ids.shape[1] + 1).log()
        return SimpleNamespace(logits=logits)


class ByContext(nn.Module):
    """Logits from a table, by all the inputs of the window so far: causal, and no two contexts alike."""

    def __init__(self, vocab_size: int, keeps: bool = True):
        super().__init__()
        self.config = Config(vocab_size)
        self.table = torch.randn(997, vocab_size, generator=torch.Generator().manual_seed(0))
        if not keeps:
            self.forward = self.whole

    def forward(self, input_ids, use_cache=None, logits_to_keep=0):
        logits = self.whole(input_ids).logits
        return SimpleNamespace(logits=logits[:, -logits_to_keep:] if logits_to_keep else logits)

    def whole(self, input_ids, use_cache=None):
        places = torch.arange(1, input_ids.shape[1] + 1)
        return SimpleNamespace(logits=self.table[((input_ids + 3) * places).cumsum(1) % 997])


class Config(SimpleNamespace):
    """What is read of a configuration."""

    def __init__(self, vocab_size: int):
        super().__init__(vocab_size=vocab_size, hidden_size=1)

    def get_text_config(self):
        return self


class Given(TokenStore):
    """A store whose domains are given as lists of ids, with the tokenizer of another one."""

    def __init__(self, base: TokenStore, streams: dict[str, list[int]]):
        parts = [{"name": name, "splits": {"test": {"tokens": len(ids)}}} for name, ids in streams.items()]
        super().__init__(base.path, {**base.record, "domains": parts})
        self.streams = streams

    def tokens(self, domain, split):
        assert split == "test"
        return np.array(self.streams[domain], dtype=self.dtype)

    def subset(self, domains):
        return Given(self, {domain: self.streams[domain] for domain in domains})


def loaded(model: nn.Module, store: TokenStore, context: int, **changes) -> LoadedModel:
    """A model of a test, as if it had been loaded, with the store's tokenizer."""
    facts = {
        "model": model,
        "tokenizer": SimpleNamespace(eos_token_id=store.end_of_document),
        "path": store.path,
        "device": torch.device("cpu"),
        "bf16": False,
        "context": context,
        "num_parameters": 0,
        "sha256": "",
        "tokenizer_sha256": "",
    }
    return LoadedModel(**{**facts, **changes})
