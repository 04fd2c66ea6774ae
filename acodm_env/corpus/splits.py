"""Which document goes into which split.

Small sources are shared out evenly, domain by domain; that takes a memory of every document. Of larger ones each
document's split follows from its hash alone, so that a preparation of any size takes the same memory and can go on
from any position.
"""

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from acodm_env.corpus.census import Census
from acodm_env.corpus.pocket import Dropped
from acodm_env.corpus.preparation import Inputs
from acodm_env.corpus.streams import Document, Stream
from acodm_env.errors import DataError

HELD_OUT_DOCUMENTS = 1 << 26
"""Documents that the user's own validation and test may hold in all: 8 bytes of memory each."""
BALANCED_DOCUMENTS = 1 << 23
"""Different documents that may be shared out evenly: the hash and split of each are kept in memory."""


class Assigned(NamedTuple):
    """A document, its hash, and the split that it goes into."""

    split: str
    digest: int
    document: Document


def document_hash(text: str) -> int:
    """64-bit hash of a document's text."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


class Assignment(ABC):
    """Every document with its split: the user's own validation and test first, then the source; blank ones skipped.

    `finish` is for when all have been handed out.
    """

    def __init__(self, inputs: Inputs, on_dropped: Dropped | None = None):
        self._inputs, self._on_dropped = inputs, on_dropped
        self._sources = inputs.preparation.sources()
        self._shares = inputs.preparation.shares()
        self._stream: Stream | None = None
        self._bytes_before = 0
        self.census = Census({name: source.name for name, source in self._sources.items()})

    @abstractmethod
    def __iter__(self) -> Iterator[Assigned]:
        """Hand out the documents."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Where to go on after the document handed out last, as JSON."""

    def bytes_read(self) -> int | None:
        """Bytes of the files read so far, where known."""
        read = self._stream.bytes_read() if self._stream else 0
        return None if read is None else self._bytes_before + read

    def finish(self) -> None:
        """Check the counts.

        Raises:
            DataError: documents that stand in two of the user's sources, a domain without any text, or one that a
                split lacks.
        """
        self.census.check()

    def _order(self) -> list[str]:
        return [name for name in ("validation", "test", "source") if name in self._sources]

    def _documents(self, given_as: str, start: Mapping[str, Any] | None = None) -> Iterator[tuple[int, Document]]:
        """Documents of one source that hold text, counted, with their hashes."""
        self._stream = self._inputs.open(given_as, start, self._on_dropped)
        for document in self._stream:
            if self.census.count(given_as, document):
                yield document_hash(document.text), document
        self._bytes_before += self._stream.bytes_read() or 0
        self._stream = None


def assign(
    inputs: Inputs,
    on_dropped: Dropped | None = None,
    state: Mapping[str, Any] | None = None,
    held_out: Mapping[str, NDArray[np.uint64]] | None = None,
) -> Assignment:
    """How the documents of a preparation are assigned.

    Args:
        inputs: the sources and shares.
        on_dropped: called for a domain of "pocket" that this installation lacks.
        state: an earlier assignment's `state()`, to go on from there.
        held_out: with `state`, the hashes of what went into "validation" and "test" before.
    """
    if inputs.balanced():
        return _Balanced(inputs, on_dropped, state)
    return _Hashed(inputs, on_dropped, state, held_out)


class _Balanced(Assignment):
    """Each document goes where its domain is furthest behind its share, in characters.

    So every split of even a small domain gets its part, spread evenly over the source. A repeated document follows
    its first copy, and so no document stands in two splits. Going on means reading again what was read.
    """

    def __init__(self, inputs: Inputs, on_dropped: Dropped | None, state: Mapping[str, Any] | None):
        super().__init__(inputs, on_dropped)
        self._splitter = _Splitter(self._shares)
        self._count = 0
        self._skipped = int(state["documents"]) if state else 0

    def __iter__(self) -> Iterator[Assigned]:
        for assigned in islice(self._all(), self._skipped, None):
            self._count += 1
            yield assigned

    def _all(self) -> Iterator[Assigned]:
        owners: dict[int, str] = {}  # hash: the split that the user put the document into
        for given_as in self._order():
            for digest, document in self._documents(given_as):
                if owners.get(digest, given_as) != given_as:
                    self.census.overlap(owners[digest], given_as, digest, document)
                    continue
                if given_as == "source":
                    split = self._splitter.split(digest, document)
                else:
                    split = owners[digest] = given_as
                if len(owners) + self._splitter.documents > BALANCED_DOCUMENTS:
                    raise DataError(
                        f"{given_as}={self._sources[given_as].name}: must hold at most {BALANCED_DOCUMENTS:,} "
                        f"documents in up to 256 MB of text, all splits together; it holds more: their hashes are "
                        f"kept in memory; join short texts into longer documents"
                    )
                self.census.splits[document.domain, split] += 1
                yield Assigned(split, digest, document)

    def state(self) -> dict[str, Any]:
        """The number of documents handed out."""
        return {"documents": self._skipped + self._count}


class _Hashed(Assignment):
    """A document's split follows from its hash: u = hash / 2^64 lies in one of the intervals that the shares cut.

    What also stands in the user's own validation is left out of test, and what stands in either is left out of train.
    """

    def __init__(
        self,
        inputs: Inputs,
        on_dropped: Dropped | None,
        state: Mapping[str, Any] | None,
        held_out: Mapping[str, NDArray[np.uint64]] | None,
    ):
        super().__init__(inputs, on_dropped)
        self._given_as = str(state["given_as"]) if state else self._order()[0]
        self._start = state["position"] if state else None
        self._held_out = {name: array("Q", np.asarray(own).tobytes()) for name, own in (held_out or {}).items()}
        if state:
            self.census.load(state["census"])
            self._bytes_before = int(state["bytes_before"])

    def __iter__(self) -> Iterator[Assigned]:
        order = self._order()
        for given_as in order[order.index(self._given_as) :]:
            self._given_as = given_as
            known = {name: self._sorted(name) for name in order[: order.index(given_as)]}  # these are complete
            for digest, document in self._documents(given_as, self._start):
                if earlier := next((name for name, hashes in known.items() if _contains(hashes, digest)), None):
                    self.census.left_out[earlier, given_as] += 1
                    continue
                split = split_of(digest, self._shares) if given_as == "source" else given_as
                if given_as != "source":
                    self._hold_out(given_as, digest)
                self.census.splits[document.domain, split] += 1
                yield Assigned(split, digest, document)
            self._start = None

    def state(self) -> dict[str, Any]:
        """Source, position within it, and the counts."""
        position = self._stream.position() if self._stream else self._start
        return {
            "given_as": self._given_as,
            "position": position,
            "bytes_before": self._bytes_before,
            "census": self.census.state(),
        }

    def _hold_out(self, split: str, digest: int) -> None:
        self._held_out.setdefault(split, array("Q")).append(digest)
        if sum(map(len, self._held_out.values())) > HELD_OUT_DOCUMENTS:
            raise DataError(
                f"{split}={self._sources[split].name}: must hold at most {HELD_OUT_DOCUMENTS:,} documents, validation "
                f"and test together; it holds more: their hashes are kept in memory; give fewer files"
            )

    def _sorted(self, split: str) -> NDArray[np.uint64]:
        hashes = np.frombuffer(self._held_out.get(split, array("Q")), dtype=np.uint64)
        hashes.sort()  # in place: there is no second copy of them
        return hashes


def split_of(digest: int, shares: Mapping[str, float]) -> str:
    """The split that a document's hash alone gives it."""
    point, total = digest / 2**64, 0.0
    for split, share in shares.items():
        total += share
        if point < total:
            return split
    return next(reversed(list(shares)))


def sample(inputs: Inputs) -> Iterator[Document]:
    """Train documents from which a tokenizer is trained when there are too many to read them all twice."""
    shares = inputs.preparation.shares()
    for document in inputs.sample():
        if document.text.strip() and split_of(document_hash(document.text), shares) == "train":
            yield document


def _contains(hashes: NDArray[np.uint64], digest: int) -> bool:
    spot = int(np.searchsorted(hashes, np.uint64(digest)))
    return spot < len(hashes) and int(hashes[spot]) == digest


@dataclass
class _Splitter:
    """Keeps the splits of every domain in step with their shares."""

    shares: dict[str, float]
    _done: dict[str, dict[str, float]] = field(default_factory=dict)
    _seen: dict[int, str] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        """Different documents so far."""
        return len(self._seen)

    def split(self, digest: int, document: Document) -> str:
        """The split of a document."""
        if digest not in self._seen:
            done = self._done.setdefault(document.domain, dict.fromkeys(self.shares, 0.0))
            total = sum(done.values()) + len(document.text)
            split = max(self.shares, key=lambda name: self.shares[name] * total - done[name])
            done[split] += len(document.text)
            self._seen[digest] = split
        return self._seen[digest]
