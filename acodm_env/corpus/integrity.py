"""Whether a token store is what was written: sizes and edges on every opening, all of it where asked for.

Opening may cost no more than the number of shards, however large they are: existence, size, and a checksum over the
first and last 64 KiB of each, and of all of the tokenizer. Every byte of a store of at most `WHOLE_BYTES` is read as
well; larger ones are read whole by `acodm prepare --verify`.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from acodm_env.corpus.shards import SPLITS, edges_sha256
from acodm_env.errors import DataError
from acodm_env.files import sha256

WHOLE_BYTES = 1 << 30
"""Stores up to this size (1 GiB) are checked byte by byte on opening."""
_SLICE = 1 << 22  # hashes read at a time: 32 MiB


class StoredFile(NamedTuple):
    """A file of a store, as corpus.json describes it."""

    path: Path
    num_bytes: int
    checksum: str
    edges: str | None
    """Checksum of the edges; None for files that are not shards."""
    owner: str
    """What it belongs to, in words."""


def stored_files(path: Path, record: Mapping[str, Any]) -> Iterator[StoredFile]:
    """Every file of the store in `path` that `record`, the content of corpus.json, lists; the tokenizer comes first."""
    tokenizer = record["tokenizer"]
    yield StoredFile(path / "tokenizer.json", tokenizer["bytes"], tokenizer["sha256"], None, "the tokenizer")
    for entry in record["domains"]:
        for split in SPLITS:
            part = entry["splits"][split]
            owner = f"domain '{entry['name']}', {split}"
            if sum(shard["tokens"] for shard in part["shards"]) != part["tokens"]:
                raise ValueError(f"the shards of {owner} do not hold its {part['tokens']} tokens")
            if split == "train" and not part["shards"]:
                continue  # a target: nothing was written
            num_bytes = int(part["documents_bytes"])
            yield StoredFile(path / part["documents_file"], num_bytes, part["documents_sha256"], None, owner)
            for shard in part["shards"]:
                yield StoredFile(
                    path / shard["file"], int(shard["bytes"]), shard["sha256"], shard["edges_sha256"], owner
                )


def check_sizes(files: list[StoredFile]) -> tuple[tuple[str, int, int], ...]:
    """(file, size, time of change) of every file.

    Raises:
        DataError: a file is missing or of another size.
    """
    states = []
    for file in files:
        if not file.path.is_file():
            raise DataError(
                f"{file.path}: must exist; the token store is not whole, a file of {file.owner} is missing; copy it "
                f"from where the store came from, or prepare the corpus again"
            )
        stat = file.path.stat()
        if stat.st_size != file.num_bytes or file.num_bytes == 0:
            raise DataError(
                f"{file.path}: must hold {file.num_bytes} bytes; it holds {stat.st_size}: the token store was cut "
                f"short or edited; copy this file again or prepare the corpus again"
            )
        states.append((str(file.path), stat.st_size, stat.st_mtime_ns))
    return tuple(states)


def check_edges(files: list[StoredFile]) -> None:
    """Compare the edges of every shard.

    Raises:
        DataError: they were edited.
    """
    for file in files:
        if file.edges is not None and edges_sha256(file.path) != file.edges:
            raise _edited(file)


def check_content(files: list[StoredFile]) -> None:
    """Compare every byte of every file.

    Raises:
        DataError: a file was edited.
    """
    for file in files:
        if sha256(file.path) != file.checksum:
            raise _edited(file)


def _edited(file: StoredFile) -> DataError:
    return DataError(
        f"{file.path}: must have SHA-256 {file.checksum[:12]}…; this file of {file.owner} was edited after it was "
        f"written, or its disk is failing; copy it again or prepare the corpus again"
    )


def check_disjoint(path: Path, domains: tuple[str, ...], hashes: Callable[[str, int], NDArray[np.uint64]]) -> None:
    """Refuse a document that stands in two splits, in whichever domains.

    Args:
        path: the store's folder, for the message.
        domains: names (K,).
        hashes: gives the document hashes of a split and domain, memory-mapped or not.

    Raises:
        DataError: there is one.
    """
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        shared = np.zeros(len(domains), dtype=np.int64)
        for part, owners in _pieces(hashes, second, len(domains)):
            found = np.zeros(len(part), dtype=np.bool_)
            for other, _ in _pieces(hashes, first, len(domains)):
                found |= np.isin(part, other)
            shared += np.bincount(owners[found], minlength=len(domains))
        if shared.any():
            guilty = ", ".join(f"{name} ({n})" for name, n in zip(domains, shared, strict=True) if n)
            raise DataError(
                f"corpus={path}: {first} and {second} must share no document; {shared.sum()} documents of {second} "
                f"also stand in {first}, by domain: {guilty}; prepare the corpus again without them"
            )


def _pieces(
    hashes: Callable[[str, int], NDArray[np.uint64]], split: str, num_domains: int
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
    """All hashes of a split and the domain of each, from `_SLICE` to twice as many at a time, the last piece fewer."""
    parts: list[NDArray[np.uint64]] = []
    owners: list[NDArray[np.int64]] = []
    for domain in range(num_domains):
        own = hashes(split, domain)
        for start in range(0, len(own), _SLICE):
            parts.append(np.array(own[start : start + _SLICE]))
            owners.append(np.full(len(parts[-1]), domain, dtype=np.int64))
            if sum(map(len, parts)) >= _SLICE:
                yield np.concatenate(parts), np.concatenate(owners)
                parts, owners = [], []
    if parts:
        yield np.concatenate(parts), np.concatenate(owners)
