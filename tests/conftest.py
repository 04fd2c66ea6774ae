"""Fixtures for every test: a tiny token store, made once a session."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from acodm_env.corpus.preparation.prepare import Preparation, prepare
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.tokens import TokenStore

settings.register_profile("acodm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("acodm")  # the same examples everywhere, however busy the machine is
torch.set_num_threads(1)  # tiny models gain nothing from more, and tests may run beside each other

WORDS = {
    "letters": ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"],
    "numbers": [str(n) for n in range(100, 160)],
    "verbs": ["run", "walk", "sit", "stand", "read", "write", "sing", "think"],
}


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a store of three domains: >= 40 sequences of 32 tokens in train, >= 8 in each held-out split."""
    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    with (root / "data.jsonl").open("w") as file:
        for domain, words in WORDS.items():
            for _ in range(200):
                text = " ".join(rng.choice(words, size=40)) + "\n"
                file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    source = Source(name=str(root / "data.jsonl"), domain_field="domain")
    prepare(Preparation(source=source, splits=(0.8, 0.1, 0.1), tokenizer="train:300"), root / "store")
    return root / "store"


@pytest.fixture(scope="session")
def tiny_store(tiny_corpus: Path) -> TokenStore:
    """The tiny corpus, opened."""
    return TokenStore.open(tiny_corpus)
