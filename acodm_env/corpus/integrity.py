"""Whether a token store is what was written: sizes and edges on every opening, all of it where asked for.

Opening may cost no more than the number of shards, however large they are: existence, size, and a checksum over the
first and last 64 KiB of each. Every byte of a store of at most `WHOLE_BYTES` is read as well; larger ones are read
whole by `acodm prepare --verify`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from acodm_env.corpus.shards import SPLITS, edges_sha256
from acodm_env.errors import DataError
from acodm_env.files import sha256

WHOLE_BYTES = 1 << 30
"""Stores up to this size (1 GiB) are checked byte by byte on opening."""
_SLICE = 1 << 22  # hashes compared at a time: 32 MiB


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
    """Every file of the store in folder `path` that `record`, the content of corpus.json, lists."""
    tokenizer = record["tokenizer"]
    yield StoredFile(path / "tokenizer.json", tokenizer["bytes"], tokenizer["sha256"], None, "the tokenizer")
    for entry in record["domains"]:
        for split in SPLITS:
            part = entry["splits"][split]
            owner = f"domain '{entry['name']}', {split}"
            if sum(shard["tokens"] for shard in part["shards"]) != part["tokens"]:
                raise ValueError(f"the shards of {owner} do not hold its {part['tokens']} tokens")
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


def check_disjoint(path: Path, domains: tuple[str, ...], hashes: Mapping[str, list[NDArray[np.uint64]]]) -> None:
    """Refuse a document that stands in two splits, in whichever domains.

    Args:
        path: the store's folder, for the message.
        domains: names (K,).
        hashes: per split the document hashes of every domain, K arrays, memory-mapped or not.

    Raises:
        DataError: there is one.
    """
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        shared = [_num_shared(own, hashes[first]) for own in hashes[second]]
        if any(shared):
            guilty = ", ".join(f"{name} ({n})" for name, n in zip(domains, shared, strict=True) if n)
            raise DataError(
                f"corpus={path}: {first} and {second} must share no document; {sum(shared)} documents of {second} "
                f"also stand in {first}, by domain: {guilty}; prepare the corpus again without them"
            )


def _num_shared(own: NDArray[np.uint64], others: list[NDArray[np.uint64]]) -> int:
    """How many of `own` stand in any of `others`; a slice of each is in memory at a time."""
    count = 0
    for part in _slices(own):
        part = np.sort(part)
        found = np.zeros(len(part), dtype=np.bool_)
        for other in others:
            for slice_ in _slices(other):
                spots = np.searchsorted(part, slice_)
                spots[spots == len(part)] = 0
                found[spots[part[spots] == slice_]] = True
        copies = np.concatenate([[True], part[1:] != part[:-1]])  # only a value's first copy is ever found
        count += int(found[np.maximum.accumulate(np.where(copies, np.arange(len(part)), 0))].sum())
    return count


def _slices(array: NDArray[np.uint64]) -> Iterator[NDArray[np.uint64]]:
    for start in range(0, len(array), _SLICE):
        yield np.asarray(array[start : start + _SLICE])
