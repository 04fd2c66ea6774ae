"""`TokenStore`: a tokenised corpus on disk, one memory-mapped flat array per domain and split.

A change of mixture must reach the *next* batch, so nothing is fetched ahead: a batch is gathered by index from
the maps. What lies in a store's folder::

    corpus.json                     domains, sizes, checksums, tokenizer, fingerprint
    tokenizer.json                  the tokenizer that encoded it
    train/00-python.bin             uint16 or uint32 token ids, documents end with the end-of-document token
    train/00-python.documents       sorted uint64 hashes of the documents
    validation/…, test/…

On opening, sizes and SHA-256 are compared with corpus.json, and the splits' document hashes with each other: a
corpus whose held-out text was trained on is refused (method: train and test shards swapped is a known defect).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from acodm_env.errors import ConfigError, DataError, unknown
from acodm_env.files import read_json, sha256

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")

_verified: set[tuple[tuple[str, int, int], ...]] = set()  # (file, size, mtime_ns) of the stores checked already


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def fingerprint(record: Mapping[str, Any]) -> str:
    """SHA-256 over domain names, file checksums and the tokenizer's checksum: equal corpora, equal fingerprints.

    Args:
        record: the content of corpus.json; only `tokenizer` and `domains` are read.
    """
    digest = hashlib.sha256(str(record["tokenizer"]["sha256"]).encode())
    for entry in record["domains"]:
        sums = [entry["splits"][split][key] for split in SPLITS for key in ("tokens_sha256", "documents_sha256")]
        digest.update("\0".join([entry["name"], *sums]).encode() + b"\n")
    return digest.hexdigest()


class TokenStore:
    """A token store opened for reading. Get one with `TokenStore.open`; it pickles as its path."""

    def __init__(self, path: Path, record: Mapping[str, Any]):
        self.path = path
        self.record = record
        """The content of corpus.json."""
        self.domains: tuple[str, ...] = tuple(entry["name"] for entry in record["domains"])
        self.vocab_size = int(record["tokenizer"]["vocab_size"])
        self.end_of_document = int(record["tokenizer"]["end_of_document"])
        self.fingerprint = str(record["fingerprint"])
        self.dtype = np.dtype(record["dtype"])
        self._maps: dict[tuple[str, int], np.memmap[Any, Any]] = {}
        self._windows: dict[tuple[str, int, int], NDArray[Any]] = {}

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Self:
        """Open the store in folder `path`.

        Args:
            path: a folder written by `acodm prepare`.
            verify: compare checksums and check that the splits are disjoint, once per process and store; sizes
                are always compared.

        Raises:
            DataError: no store, another format, cut short, edited, or splits that share documents.
        """
        path = Path(path).expanduser().absolute()
        if not (path / "corpus.json").is_file():
            raise DataError(
                f"corpus={path}: must be the folder of a token store; there is no corpus.json in it; "
                f"make one with `acodm prepare --source S --out {path}`"
            )
        record = read_json(path / "corpus.json")
        if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{path / 'corpus.json'}: must be of format version {FORMAT_VERSION}; it was written by another "
                f"version or is no corpus; prepare it again"
            )
        try:
            store = cls(path, record)
            state = tuple(store._check_sizes())
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path / 'corpus.json'}: must list domains, sizes and checksums; {error!r}: it was edited; "
                f"prepare the corpus again"
            ) from error
        if verify and state not in _verified:
            store._check_content()
            _verified.add(state)
        return store

    def subset(self, domains: Sequence[str]) -> "TokenStore":
        """The store as if it held nothing but `domains`, in that order.

        Raises:
            ConfigError: none given, one twice, or one that is not there.
        """
        if not domains or len(set(domains)) != len(domains):
            raise ConfigError(f"domains={','.join(domains)}: must name at least one domain, each once")
        for name in domains:
            if name not in self.domains:
                unknown("domain", name, self.domains)
        entries = {entry["name"]: entry for entry in self.record["domains"]}
        record = {**self.record, "domains": [entries[name] for name in domains]}
        return TokenStore(self.path, {**record, "fingerprint": fingerprint(record)})

    def __reduce__(self) -> tuple[Callable[[str, tuple[str, ...], str], "TokenStore"], tuple[Any, ...]]:
        return _reopen, (str(self.path), self.domains, self.fingerprint)

    def tokens(self, domain: str, split: str) -> "np.memmap[Any, Any]":
        """All token ids of a domain in a split (N,), memory-mapped and read-only.

        Raises:
            ConfigError: no such domain or split.
        """
        if domain not in self.domains:
            unknown("domain", domain, self.domains)
        return self._map(split, self.domains.index(domain))

    def sizes_tokens(self, split: str) -> tuple[int, ...]:
        """Tokens per domain (K,) in a split."""
        return tuple(int(entry["tokens"]) for entry in self._entries(split))

    def num_documents(self, split: str) -> tuple[int, ...]:
        """Documents per domain (K,) in a split."""
        return tuple(int(entry["documents"]) for entry in self._entries(split))

    def num_sequences(self, split: str, sequence_length: int) -> tuple[int, ...]:
        """Whole, non-overlapping sequences of `sequence_length` tokens per domain (K,).

        Raises:
            DataError: a domain has fewer than one.
        """
        sizes = self.sizes_tokens(split)
        for domain, size in zip(self.domains, sizes, strict=True):
            if size < sequence_length:
                raise DataError(
                    f"domain={domain}: must hold at least one sequence of {sequence_length} tokens in the {split} "
                    f"split; it holds {size}; shorten the sequences to {size} tokens or fewer, or prepare the "
                    f"corpus again with more text for {split} (its own files, or its share, --splits) or without this "
                    f"domain"
                )
        return tuple(size // sequence_length for size in sizes)

    def sequences(
        self, split: str, domain_index: int, indices: NDArray[np.int64], sequence_length: int
    ) -> NDArray[np.int64]:
        """The sequences `indices` (n,) of a domain, int64 (n, sequence_length)."""
        rows: NDArray[np.int64] = self.windows(split, domain_index, sequence_length)[indices].astype(np.int64)
        return rows

    def windows(self, split: str, domain_index: int, sequence_length: int) -> NDArray[Any]:
        """Every whole sequence of a domain (num_sequences, sequence_length), a view of the memory map."""
        key = (split, domain_index, sequence_length)
        if key not in self._windows:
            # A plain array over the same memory: indexing a memmap object costs several times as much.
            flat = np.asarray(self._map(split, domain_index))
            num_sequences = len(flat) // sequence_length
            self._windows[key] = flat[: num_sequences * sequence_length].reshape(num_sequences, sequence_length)
        return self._windows[key]

    def document_hashes(self, split: str, domain_index: int) -> NDArray[np.uint64]:
        """Sorted hashes (uint64) of a domain's documents in a split."""
        return np.fromfile(self._file(split, domain_index, "documents"), dtype="<u8")

    def _entries(self, split: str) -> list[Mapping[str, Any]]:
        if split not in SPLITS:
            unknown("split", split, SPLITS)
        return [entry["splits"][split] for entry in self.record["domains"]]

    def _file(self, split: str, domain_index: int, ending: str) -> Path:
        return self.path / str(self._entries(split)[domain_index][f"{ending}_file"])

    def _map(self, split: str, domain_index: int) -> "np.memmap[Any, Any]":
        if split not in SPLITS:
            unknown("split", split, SPLITS)
        key = (split, domain_index)
        if key not in self._maps:
            self._maps[key] = np.memmap(self._file(split, domain_index, "tokens"), dtype=self.dtype, mode="r")
        return self._maps[key]

    def _files(self) -> Iterator[tuple[Path, int, str]]:
        """Every file of the store with its recorded size in bytes and SHA-256."""
        tokenizer = self.record["tokenizer"]
        yield self.path / "tokenizer.json", tokenizer["bytes"], tokenizer["sha256"]
        for index, entry in enumerate(self.record["domains"]):
            for split in SPLITS:
                sizes = entry["splits"][split]
                num_bytes = sizes["tokens"] * self.dtype.itemsize
                yield self._file(split, index, "tokens"), num_bytes, sizes["tokens_sha256"]
                yield self._file(split, index, "documents"), sizes["documents"] * 8, sizes["documents_sha256"]

    def _check_sizes(self) -> Iterator[tuple[str, int, int]]:
        head = (self.path / "corpus.json").stat()
        yield str(self.path / "corpus.json"), head.st_size, head.st_mtime_ns
        for file, size, _ in self._files():
            if not file.is_file():
                raise DataError(f"{file}: must exist; the token store is not whole; prepare the corpus again")
            stat = file.stat()
            if stat.st_size != size or size == 0:
                raise DataError(
                    f"{file}: must hold {size} bytes; it holds {stat.st_size}: the token store was cut short or "
                    f"edited; copy it again or prepare the corpus again"
                )
            yield str(file), stat.st_size, stat.st_mtime_ns

    def _check_content(self) -> None:
        for file, _, checksum in self._files():
            if sha256(file) != checksum:
                raise DataError(
                    f"{file}: must have SHA-256 {checksum[:12]}…; the token store was edited after it was written; "
                    f"copy it again or prepare the corpus again"
                )
        if fingerprint(self.record) != self.fingerprint:
            raise DataError(
                f"{self.path / 'corpus.json'}: must match its fingerprint {self.fingerprint[:12]}…; domain names or "
                f"checksums were edited; prepare the corpus again"
            )
        self._check_disjoint()

    def _check_disjoint(self) -> None:
        """Refuse a document that stands in two splits, in whichever domains."""
        owners = {split: [self.document_hashes(split, index) for index in range(len(self.domains))] for split in SPLITS}
        for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
            known = np.concatenate(owners[first])
            shared = [int(np.isin(hashes, known).sum()) for hashes in owners[second]]
            if any(shared):
                guilty = ", ".join(f"{name} ({n})" for name, n in zip(self.domains, shared, strict=True) if n)
                raise DataError(
                    f"corpus={self.path}: {first} and {second} must share no document; {sum(shared)} documents of "
                    f"{second} also stand in {first}, by domain: {guilty}; prepare the corpus again without them"
                )


def _reopen(path: str, domains: tuple[str, ...], fingerprint: str) -> TokenStore:
    """Open a pickled store again; its checksums were compared when it was first opened."""
    store = TokenStore.open(path, verify=False)
    if store.domains != domains:
        store = store.subset(domains)
    if store.fingerprint != fingerprint:
        raise DataError(f"corpus={path}: must have fingerprint {fingerprint[:12]}…; it was replaced while in use")
    return store
