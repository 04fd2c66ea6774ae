"""Which document goes into which split.

Small sources are dealt out evenly, domain by domain (`dealing`); that takes a memory of every document. Of larger
ones each document's split follows from its hash alone, so that a preparation of any size takes the same memory and
can go on from any position.
"""

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from acodm_env.corpus.document import Document, Dropped
from acodm_env.corpus.preparation.counts import Census
from acodm_env.corpus.preparation.dealing import Dealer
from acodm_env.corpus.preparation.settings import Inputs
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.preparation.streams import Stream
from acodm_env.errors import DataError

TARGET_SHARES = {"validation": 0.5, "test": 0.5}
"""Shares of the splits in the text of a target."""
HELD_OUT_DOCUMENTS = 1 << 26
"""Documents that the user's own validation and test, and the targets, may hold in all: 8 bytes of memory each."""
BALANCED_DOCUMENTS = 1 << 23
"""Different documents that may be shared out evenly: hash, split and length of each are kept in memory."""


class Assigned(NamedTuple):
    """A document, its hash, and the split that it goes into."""

    split: str
    digest: int
    document: Document


class Plan(NamedTuple):
    """Where the documents of small sources go, by hash."""

    owners: dict[int, str]
    """What each document that is not of the source was given as."""
    dealt: dict[int, str]
    """The split of each that is dealt."""


def document_hash(text: str) -> int:
    """64-bit hash of a document's text."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


class Assignment(ABC):
    """Every document with its split: the user's own validation and test, targets, the source; blank ones skipped.

    `finish` is for when all have been handed out.
    """

    def __init__(self, inputs: Inputs, on_dropped: Dropped | None = None):
        self._inputs, self._on_dropped = inputs, on_dropped
        self._sources = inputs.preparation.sources()
        self._shares = inputs.preparation.shares()
        self._stream: Stream | None = None
        self._bytes_before = 0
        self.plan: Plan | None = None
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
        return [name for name in ("validation", "test", "targets", "source") if name in self._sources]

    def _documents(self, given_as: str, start: Mapping[str, Any] | None = None) -> Iterator[tuple[int, Document]]:
        """Documents of one source that hold text, counted, with their hashes."""
        self._stream = self._inputs.open(given_as, start, self._on_dropped)
        yield from _texts(self._stream, given_as, self.census)
        self._bytes_before += self._stream.bytes_read() or 0
        self._stream = None


def assign(
    inputs: Inputs,
    on_dropped: Dropped | None = None,
    state: Mapping[str, Any] | None = None,
    held_out: Mapping[str, NDArray[np.uint64]] | None = None,
    plan: "Plan | None" = None,
) -> Assignment:
    """How the documents of a preparation are assigned.

    Args:
        inputs: the sources and shares.
        on_dropped: called for a domain of "pocket" that this installation lacks.
        state: an earlier assignment's `state()`, to go on from there.
        held_out: with `state`, the hashes of what was read before as "validation", "test" and "targets".
        plan: the `plan` of an assignment of the same inputs, which saves reading them once more.
    """
    if inputs.balanced():
        return _Balanced(inputs, on_dropped, state, plan)
    return _Hashed(inputs, on_dropped, state, held_out)


class _Balanced(Assignment):
    """Every domain is dealt out to the splits by `Dealer`, in characters, which takes reading the sources beforehand.

    So every split of even a small domain gets its part, and validation and test are alike. A repeated document goes
    where its first copy goes, and so no document stands in two splits. Going on means reading again what was read.
    """

    def __init__(
        self, inputs: Inputs, on_dropped: Dropped | None, state: Mapping[str, Any] | None, plan: Plan | None = None
    ):
        super().__init__(inputs, on_dropped)
        self.plan = plan
        self._count = 0
        self._skipped = int(state["documents"]) if state else 0

    def __iter__(self) -> Iterator[Assigned]:
        for assigned in islice(self._all(), self._skipped, None):
            self._count += 1
            yield assigned

    def _all(self) -> Iterator[Assigned]:
        self.plan = self.plan or self._plan()
        owners, dealt = self.plan
        for given_as in self._order():
            for digest, document in self._documents(given_as):
                if owners.get(digest, given_as) != given_as:
                    self.census.overlap(owners[digest], given_as, digest, document)
                    continue
                split = dealt.get(digest) or owners.get(digest)
                if split is None:
                    raise _changed(given_as, self._sources[given_as])
                self.census.splits[document.domain, split] += 1
                yield Assigned(split, digest, document)

    def _plan(self) -> Plan:
        owners: dict[int, str] = {}
        dealers, counted = {"targets": Dealer(), "source": Dealer()}, Census(self.census.names)
        for given_as in self._order():
            for digest, document in _texts(self._inputs.open(given_as, None, self._on_dropped), given_as, counted):
                if given_as != "source":
                    owners.setdefault(digest, given_as)
                if given_as in dealers and owners.get(digest, given_as) == given_as:
                    dealers[given_as].note(digest, document)
                if len(owners) + len(dealers["source"]) > BALANCED_DOCUMENTS:
                    raise DataError(
                        f"{given_as}={self._sources[given_as].name}: must hold at most {BALANCED_DOCUMENTS:,} "
                        f"documents in up to 256 MB of text, all splits together; it holds more: their hashes are "
                        f"kept in memory; join short texts into longer documents"
                    )
        return Plan(owners, dealers["targets"].deal(TARGET_SHARES) | dealers["source"].deal(self._shares))

    def state(self) -> dict[str, Any]:
        """The number of documents handed out."""
        return {"documents": self._skipped + self._count}


class _Hashed(Assignment):
    """A document's split follows from its hash: u = hash / 2^64 lies in one of the intervals that the shares cut.

    What also stands in the user's own validation is left out of test, and what stands in either, or among the
    targets, is left out of what is read later. Targets of up to `BALANCED_BYTES` are dealt out all the same: there
    may be few documents of them, and they are read twice.
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
            split_by = self._split_by(given_as)
            for digest, document in self._documents(given_as, self._start):
                if earlier := next((name for name, hashes in known.items() if _contains(hashes, digest)), None):
                    self.census.left_out[earlier, given_as] += 1
                    continue
                split = split_by(digest)
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

    def _split_by(self, given_as: str) -> Callable[[int], str]:
        """What gives the documents of a source their splits, by their hashes."""
        if given_as == "source":
            return partial(split_of, shares=self._shares)
        if given_as != "targets":
            return lambda digest: given_as
        if not self._inputs.few_targets():
            return partial(split_of, shares=TARGET_SHARES)
        dealer = Dealer()
        for digest, document in _texts(self._inputs.open("targets"), "targets", Census(self.census.names)):
            dealer.note(digest, document)
        dealt = dealer.deal(TARGET_SHARES)

        def split_by(digest: int) -> str:
            if digest not in dealt:
                raise _changed("targets", self._sources["targets"])
            return dealt[digest]

        return split_by

    def _hold_out(self, given_as: str, digest: int) -> None:
        self._held_out.setdefault(given_as, array("Q")).append(digest)
        if sum(map(len, self._held_out.values())) > HELD_OUT_DOCUMENTS:
            raise DataError(
                f"{given_as}={self._sources[given_as].name}: must hold at most {HELD_OUT_DOCUMENTS:,} documents, "
                f"validation, test and targets together; it holds more: their hashes are kept in memory; give fewer "
                f"files"
            )

    def _sorted(self, given_as: str) -> NDArray[np.uint64]:
        hashes = np.frombuffer(self._held_out.get(given_as, array("Q")), dtype=np.uint64)
        hashes.sort()  # in place: there is no second copy of them
        return hashes


def _texts(stream: Stream, given_as: str, census: Census) -> Iterator[tuple[int, Document]]:
    """The documents that hold text, with their hashes; all are counted."""
    for document in stream:
        if census.count(given_as, document):
            yield document_hash(document.text), document


def _changed(given_as: str, source: Source) -> DataError:
    return DataError(
        f"{given_as}={source.name}: must not change while it is read; it holds a document that was not there before; "
        f"run the same command again"
    )


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
