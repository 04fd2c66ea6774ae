"""`TokenStore`: a tokenised corpus on disk, memory-mapped shards of token ids per domain and split.

A change of mixture must reach the *next* batch, so nothing is fetched ahead: a batch is gathered by index from
the maps. What lies in a store's folder::

    corpus.json                      domains, shards, sizes, checksums, tokenizer, fingerprint
    tokenizer.json                   the tokenizer that encoded it
    train/00-python-00000.bin        uint16 or uint32 token ids, documents end with the end-of-document token
    train/00-python.documents        uint64 hashes of the documents, in their order
    validation/…, test/…

A domain's tokens are one stream cut into shards of one size; a sequence never spans two of them. A corpus whose
held-out text was trained on is refused (method: train and test shards swapped is a known defect): up to 1 GiB on
opening, larger ones by `verify` (`integrity`). files.json, which `prepare` alone reads, lists the source files.

A domain without any train text is a target: it is only ever evaluated, and `trained` leaves it out.
"""

import hashlib
import mmap
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from acodm_env.corpus.cut import Cut, check_cut
from acodm_env.corpus.integrity import (
    WHOLE_BYTES,
    StoredFile,
    check_content,
    check_disjoint,
    check_edges,
    check_sizes,
    stored_files,
)
from acodm_env.corpus.shards import SPLITS, token_dtype
from acodm_env.errors import ConfigError, DataError, unknown
from acodm_env.files import read_json

__all__ = ["FORMAT_VERSION", "SPLITS", "TokenStore", "fingerprint", "token_dtype"]

FORMAT_VERSION = 2
MAX_MAPS = 256
"""Shards that the process has mapped at a time, of all stores: each map holds a file descriptor."""

_verified: set[tuple[tuple[str, int, int], ...]] = set()  # (file, size, mtime_ns) of the stores checked already


def fingerprint(record: Mapping[str, Any]) -> str:
    """SHA-256 over domain names, file checksums and the tokenizer's checksum: equal corpora, equal fingerprints.

    Args:
        record: the content of corpus.json; only `tokenizer` and `domains` are read.
    """
    digest = hashlib.sha256(str(record["tokenizer"]["sha256"]).encode())
    for entry in record["domains"]:
        parts = [entry["splits"][split] for split in SPLITS]
        sums = [sum_ for part in parts for sum_ in (*_checksums(part), *_documents_checksum(part))]
        digest.update("\0".join([entry["name"], *sums, *_cut_marks(entry)]).encode() + b"\n")
    return digest.hexdigest()


def _checksums(part: Mapping[str, Any]) -> list[str]:
    return [shard["sha256"] for shard in part["shards"]]


def _documents_checksum(part: Mapping[str, Any]) -> list[str]:
    return [part["documents_sha256"] if part["shards"] else "none"]


def _cut_marks(entry: Mapping[str, Any]) -> list[str]:
    """What a cut adds to fingerprint and digest; nothing for a whole domain."""
    cut = Cut.of(entry)
    return [f"cut {cut.sequences} x {cut.sequence_length}"] if cut else []


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
        self._cuts = [Cut.of(entry) for entry in record["domains"]]
        self._bounds: dict[tuple[str, int, int], NDArray[np.int64]] = {}

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Self:
        """Open the store in folder `path`, in a time that grows with its number of shards, not with their size.

        Args:
            path: a folder written by `acodm prepare`.
            verify: compare checksums and check that the splits are disjoint, once per process and store: of the
                shards' edges, and of everything up to 1 GiB. Existence and sizes are always compared.

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
            store._check(whole=False, again=not verify)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise DataError(
                f"{path / 'corpus.json'}: must list domains, sizes and checksums; {error!r}: it was edited; "
                f"prepare the corpus again"
            ) from error
        return store

    def verify(self) -> None:
        """Read every byte of the store and compare it with its checksums, and the splits with each other.

        Raises:
            DataError: something was edited, or splits share documents.
        """
        self._check(whole=True)

    def subset(self, domains: Sequence[str]) -> "TokenStore":
        """The store as if it held nothing but `domains`, in that order.

        Raises:
            ConfigError: none given, one twice, or one that is not there.
        """
        if not domains or len(set(domains)) != len(domains):
            raise ConfigError(f"domains={','.join(domains)}: must name at least one domain, each once")
        entries = {entry["name"]: entry for entry in self.record["domains"]}
        return self._holding([entries[self.domains[self._index(name)]] for name in domains])

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the domains that hold text to train on; the others are targets."""
        sizes = zip(self.domains, self._parts("train"), strict=True)
        return tuple(domain for domain, part in sizes if part["tokens"])

    def trained(self) -> "TokenStore":
        """The store as if it held nothing but its trainable domains; itself if they all are.

        Raises:
            DataError: none is.
        """
        if not self.trainable:
            raise DataError(
                f"corpus={self.path}: must hold a domain to train on; {', '.join(self.domains)} hold held-out text "
                f"only; choose training domains too"
            )
        return self if self.trainable == self.domains else self.subset(self.trainable)

    def cut(self, sequences: Mapping[str, int], sequence_length: int) -> "TokenStore":
        """The store as if the train splits of some domains held only so many sequences, evenly spaced over each.

        The held-out splits stay as they are. A cut domain has a digest of its own, gives sequences of no other
        length, and still counts all its documents. A domain may be cut again.

        Args:
            sequences: how many are left, by domain.
            sequence_length: tokens of each.

        Raises:
            ConfigError: no such domain, fewer than one sequence, or more than it holds.
        """
        entries = list(self.record["domains"])
        for domain, number in sequences.items():
            index = self._index(domain)
            check_cut(domain, number, self._count("train", index, sequence_length))
            entries[index] = {**entries[index], "cut": Cut(number, sequence_length)._asdict()}
        return self._holding(entries)

    def _holding(self, entries: list[Mapping[str, Any]]) -> "TokenStore":
        record = {**self.record, "domains": entries}
        return TokenStore(self.path, {**record, "fingerprint": fingerprint(record)})

    def __reduce__(self) -> tuple[Callable[..., "TokenStore"], tuple[Any, ...]]:
        cuts = tuple((domain, *cut) for domain, cut in zip(self.domains, self._cuts, strict=True) if cut)
        return _reopen, (str(self.path), self.domains, cuts, self.fingerprint)

    def tokens(self, domain: str, split: str) -> NDArray[Any]:
        """All token ids of a domain in a split (N,), read-only: memory-mapped, or copied if it has several shards.

        Of a cut domain, what is left of it.

        Raises:
            ConfigError: no such domain or split.
        """
        index = self._index(domain)
        part = self._part(split, index)
        if cut := self._cut(split, index):
            left = self.sequences(split, index, np.arange(cut.sequences), cut.sequence_length)
            kept = left.reshape(-1).astype(self.dtype)
            kept.flags.writeable = False
            return kept
        if len(part["shards"]) == 1:
            return self._map(part["shards"][0])
        flat, end = np.empty(int(part["tokens"]), dtype=self.dtype), 0
        for shard in part["shards"]:  # one after the other: there may be more than a process may hold open
            begin, end = end, end + int(shard["tokens"])
            flat[begin:end] = self._map(shard)
        flat.flags.writeable = False
        return flat

    def sizes_tokens(self, split: str) -> tuple[int, ...]:
        """Tokens per domain (K,) in a split."""
        cuts = [self._cut(split, index) for index in range(len(self.domains))]
        return tuple(
            cut.sequences * cut.sequence_length if cut else int(part["tokens"])
            for cut, part in zip(cuts, self._parts(split), strict=True)
        )

    def domain_digest(self, domain: str) -> str:
        """SHA-256 over a domain's train tokens and the tokenizer: equal digests, equal sequences to train on.

        Raises:
            ConfigError: no such domain.
        """
        index = self._index(domain)
        sums = [*_checksums(self._part("train", index)), *_cut_marks(self.record["domains"][index])]
        return hashlib.sha256("\0".join([self.record["tokenizer"]["sha256"], *sums]).encode()).hexdigest()

    def num_documents(self, split: str) -> tuple[int, ...]:
        """Documents per domain (K,) in a split."""
        return tuple(int(part["documents"]) for part in self._parts(split))

    def num_sequences(self, split: str, sequence_length: int) -> tuple[int, ...]:
        """Whole, non-overlapping sequences of `sequence_length` tokens per domain (K,); none spans two shards.

        Raises:
            DataError: a domain has fewer than one, as targets have in train.
            ConfigError: a domain was cut for sequences of another length.
        """
        counts = tuple(self._count(split, index, sequence_length) for index in range(len(self.domains)))
        for domain, part, count in zip(self.domains, self._parts(split), counts, strict=True):
            if count == 0 and not part["shards"]:
                raise DataError(
                    f"domain={domain}: must hold text to train on; it is a target, with held-out text only; leave it "
                    f"out of the domains to train on (`TokenStore.trained`)"
                )
            if count == 0:
                longest = max(shard["tokens"] for shard in part["shards"])
                raise DataError(
                    f"domain={domain}: must hold at least one sequence of {sequence_length} tokens in the {split} "
                    f"split; it holds {longest}; shorten the sequences to {longest} tokens or fewer, or prepare the "
                    f"corpus again with more text for {split} (its own files, or its share, --splits) or without this "
                    f"domain"
                )
        return counts

    def sequences(
        self, split: str, domain_index: int, indices: NDArray[np.int64], sequence_length: int
    ) -> NDArray[np.int64]:
        """Read sequences of a domain; the cost is theirs alone, whatever the size of the corpus.

        Args:
            split: "train", "validation" or "test".
            domain_index: the domain.
            indices: which sequences (n,), from 0 to `num_sequences` - 1.
            sequence_length: tokens per sequence, T.

        Returns:
            Token ids, int64 (n, T).
        """
        starts = self._starts(split, domain_index, sequence_length)
        if cut := self._cut(split, domain_index):
            cut.check_length(self.domains[domain_index], sequence_length)
            indices = cut.places(np.asarray(indices), int(starts[-1]))
        shards = self._part(split, domain_index)["shards"]
        if len(shards) == 1:
            only: NDArray[np.int64] = self._rows(shards[0], sequence_length)[indices].astype(np.int64)
            return only
        rows = np.empty((len(indices), sequence_length), dtype=np.int64)
        owners = np.searchsorted(starts, indices, side="right") - 1  # (n,), the shard of each
        order = np.argsort(owners, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(owners[order])) + 1) if len(order) else ():
            owner = int(owners[group[0]])
            rows[group] = self._rows(shards[owner], sequence_length)[indices[group] - starts[owner]]
        return rows

    def document_hashes(self, split: str, domain_index: int) -> NDArray[np.uint64]:
        """Hashes (uint64) of a domain's documents in a split, in the order of the documents; memory-mapped."""
        part = self._part(split, domain_index)
        if not part["shards"]:
            return np.empty(0, dtype=np.uint64)
        file = self.path / str(part["documents_file"])
        return np.memmap(file, dtype="<u8", mode="r")

    def _index(self, domain: str) -> int:
        if domain not in self.domains:
            unknown("domain", domain, self.domains)
        return self.domains.index(domain)

    def _parts(self, split: str) -> list[Mapping[str, Any]]:
        return [self._part(split, index) for index in range(len(self.domains))]

    def _part(self, split: str, domain_index: int) -> Mapping[str, Any]:
        if split not in SPLITS:
            unknown("split", split, SPLITS)
        part: Mapping[str, Any] = self.record["domains"][domain_index]["splits"][split]
        return part

    def _cut(self, split: str, domain_index: int) -> Cut | None:
        return self._cuts[domain_index] if split == "train" else None

    def _count(self, split: str, domain_index: int, sequence_length: int) -> int:
        """Sequences of a domain."""
        if cut := self._cut(split, domain_index):
            cut.check_length(self.domains[domain_index], sequence_length)
            return cut.sequences
        return int(self._starts(split, domain_index, sequence_length)[-1])

    def _starts(self, split: str, domain_index: int, sequence_length: int) -> NDArray[np.int64]:
        """Index of every shard's first sequence, and the number of all (number of shards + 1,)."""
        key = (split, domain_index, sequence_length)
        if key not in self._bounds:
            counts = [shard["tokens"] // sequence_length for shard in self._part(split, domain_index)["shards"]]
            self._bounds[key] = np.cumsum([0, *counts], dtype=np.int64)
        return self._bounds[key]

    def _rows(self, shard: Mapping[str, Any], sequence_length: int) -> NDArray[Any]:
        """Every whole sequence of a shard (n, T), a view of the memory map."""
        flat = self._map(shard)
        count = len(flat) // sequence_length
        return flat[: count * sequence_length].reshape(count, sequence_length)

    def _map(self, shard: Mapping[str, Any]) -> NDArray[Any]:
        return _mapped(f"{self.path}/{shard['file']}", self.dtype, shard["sha256"])

    def _check(self, *, whole: bool, again: bool = False) -> None:
        """Compare files and record; `again` trusts what was compared when the store was first opened."""
        files: list[StoredFile] = list(stored_files(self.path, self.record))
        head = (self.path / "corpus.json").stat()
        state = ((str(self.path / "corpus.json"), head.st_size, head.st_mtime_ns), *check_sizes(files))
        if again or (state in _verified and not whole):
            return
        check_edges(files)
        if whole or sum(file.num_bytes for file in files) <= WHOLE_BYTES:
            check_content(files)
            check_disjoint(self.path, self.domains, self.document_hashes)
        else:
            check_content(files[:1])  # the tokenizer: it is small, and an edited one changes what every id means
        if fingerprint(self.record) != self.fingerprint:
            raise DataError(
                f"{self.path / 'corpus.json'}: must match its fingerprint {self.fingerprint[:12]}…; domain names or "
                f"checksums were edited; prepare the corpus again"
            )
        _verified.add(state)


@lru_cache(maxsize=MAX_MAPS)
def _mapped(file: str, dtype: "np.dtype[Any]", checksum: str) -> NDArray[Any]:
    """A shard's token ids (N,), memory-mapped; `checksum` keeps apart what lay at the same path one after the other."""
    with Path(file).open("rb") as content:
        memory = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        memory.madvise(mmap.MADV_RANDOM)  # the kernel would read megabytes around every sequence
    # A plain array: indexing a memmap object costs several times as much.
    return np.frombuffer(memory, dtype=dtype)


def _reopen(
    path: str, domains: tuple[str, ...], cuts: tuple[tuple[str, int, int], ...], fingerprint: str
) -> TokenStore:
    """Open a pickled store again; its checksums were compared when it was first opened."""
    store = TokenStore.open(path, verify=False)
    if store.domains != domains:
        store = store.subset(domains)
    for domain, sequences, sequence_length in cuts:
        store = store.cut({domain: sequences}, sequence_length)
    if store.fingerprint != fingerprint:
        raise DataError(f"corpus={path}: must have fingerprint {fingerprint[:12]}…; it was replaced while in use")
    return store
