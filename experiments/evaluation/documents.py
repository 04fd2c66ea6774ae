"""The documents of a corpus's split as a model reads them: token ids, where each ends, and how many bytes it has.

A model with another tokenizer than the corpus's reads the same texts: they are decoded and encoded again. Bytes are
always those of the text that the corpus's tokenizer gives back, so bits per byte compare over tokenizers. What a
tokenizer drops when it encodes (Unicode normalisation, nothing for byte-level BPE) is not in the store to be counted.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from acodm_env.corpus.tokenizer import encode, load_tokenizer
from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError, DataError, unknown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BATCH_TOKENS = 1 << 18  # decoded at a time; a longer document is decoded whole


@dataclass(frozen=True, kw_only=True)
class Documents:
    """One domain's documents in a split, as one stream of token ids."""

    domain: str
    tokens: NDArray[Any]
    """Token ids (N,); every document ends with the end token, the stream's last one perhaps not."""
    ends: NDArray[np.int64]
    """Where each document ends (D,): the position after its last token."""
    num_bytes: NDArray[np.int64]
    """Bytes of each document's text as UTF-8 (D,); the end token has none."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How a store's documents reach a model."""

    store: TokenStore
    tokenizer_file: Path | None
    """The model's tokenizer.json where it is another one than the store's; None leaves the ids as they are."""
    end: int
    """The id that ends a document for the model."""

    @classmethod
    def of(cls, store: TokenStore, tokenizer_file: Path, end: int) -> "Reader":
        """The reader for a model.

        Args:
            store: the corpus.
            tokenizer_file: the model's tokenizer.json.
            end: the id of its end token.
        """
        theirs = tokenizer_fingerprint(store.path / "tokenizer.json")
        same = end == store.end_of_document and theirs == tokenizer_fingerprint(tokenizer_file)
        return cls(store=store, tokenizer_file=None if same else tokenizer_file, end=end)

    def read(self, domain: str, split: str, limit: int | None = None) -> Documents:
        """A domain's documents.

        Args:
            domain: its name.
            split: "train", "validation" or "test".
            limit: only the first so many documents.

        Raises:
            ConfigError: no such domain or split, or a limit below 1.
            DataError: it holds no document.
        """
        tokens, ends = stored_documents(self.store, domain, split, limit)
        own = load_tokenizer(str(self.store.path))
        num_bytes, lengths, parts = [], [], []
        other = load_tokenizer(str(self.tokenizer_file)) if self.tokenizer_file else None
        for texts in _texts(own, tokens, ends, self.store.end_of_document):
            num_bytes += [len(text.encode()) for text in texts]
            if other is not None:
                for ids in encode(other, texts, self.end):
                    parts.append(np.array([*ids, self.end], dtype=np.uint32))
                    lengths.append(len(ids) + 1)
        if other is not None:
            tokens, ends = np.concatenate(parts), np.cumsum(lengths, dtype=np.int64)
        return Documents(domain=domain, tokens=tokens, ends=ends, num_bytes=np.array(num_bytes, dtype=np.int64))


def stored_documents(
    store: TokenStore, domain: str, split: str, limit: int | None = None
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """A domain's token ids (N,) in a split as they are stored, and where each document ends (D,).

    Raises:
        ConfigError: no such domain or split, or a limit below 1.
        DataError: it holds no document.
    """
    if domain not in store.domains:
        unknown("domain", domain, store.domains)
    check_documents(store.subset([domain]), split, limit)
    tokens = store.tokens(domain, split)
    ends = np.flatnonzero(tokens == store.end_of_document) + 1
    if len(ends) == 0 or ends[-1] != len(tokens):  # a stream that was cut has no end token at its end
        ends = np.append(ends, len(tokens))
    ends = ends[:limit]
    return tokens[: ends[-1]], ends


def check_documents(store: TokenStore, split: str, limit: int | None = None) -> None:
    """Refuse what a reader would refuse, without reading.

    Raises:
        ConfigError: no such split, or a limit below 1.
        DataError: a domain holds no document in the split.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: must be at least 1 document per domain")
    for domain, size in zip(store.domains, store.sizes_tokens(split), strict=True):
        if size == 0:
            raise DataError(
                f"domain={domain}: must hold a document in the {split} split; it is empty; prepare the corpus again "
                f"with more text for {split}, or leave the domain out"
            )


def num_stored_tokens(store: TokenStore, split: str, limit: int | None = None) -> int:
    """Tokens of a split's documents (the first `limit` of each domain) in the corpus's own tokens: for progress."""
    if limit is None:
        return sum(store.sizes_tokens(split))
    return sum(len(stored_documents(store, domain, split, limit)[0]) for domain in store.domains)


def tokenizer_fingerprint(file: Path) -> str:
    """SHA-256 of what a tokenizer.json does to text: its steps, vocabulary and added tokens.

    `save_pretrained` writes the file anew with empty settings added, so equal tokenizers have unequal files.

    Raises:
        DataError: no such file, or a damaged one.
    """
    stat = file.stat() if file.is_file() else None
    return _fingerprint(file, stat.st_mtime_ns if stat else 0, stat.st_size if stat else 0)


@lru_cache(maxsize=8)
def _fingerprint(file: Path, mtime_ns: int, size: int) -> str:
    content = json.loads(load_tokenizer(str(file)).to_str())
    steps = {key: content.get(key) for key in ("normalizer", "pre_tokenizer", "model", "decoder")}
    added = sorted((token["id"], token["content"]) for token in content.get("added_tokens") or ())
    return hashlib.sha256(json.dumps([steps, added], sort_keys=True).encode()).hexdigest()


def _texts(tokenizer: "Tokenizer", tokens: NDArray[Any], ends: NDArray[np.int64], end: int) -> Iterator[list[str]]:
    """Texts of the documents, in batches of bounded size."""
    first = 0
    while first < len(ends):
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + _BATCH_TOKENS, side="right")))
        pieces = np.split(tokens[begin : ends[last - 1]], ends[first : last - 1] - begin)
        ids = [piece[: len(piece) - int(piece[-1] == end)].tolist() for piece in pieces]
        yield tokenizer.decode_batch(ids, skip_special_tokens=False)
        first = last
