"""Which document goes into which split, and the refusal of what cannot become train, validation and test."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from acodm_env.corpus.pocket import Dropped
from acodm_env.corpus.sources import Document, Source, files_of
from acodm_env.corpus.tokens import SPLITS
from acodm_env.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Everything that decides what a token store holds."""

    source: Source
    validation: Source | None = None
    test: Source | None = None
    splits: tuple[float, float, float] = (0.9, 0.05, 0.05)
    """Shares of train, validation and test, in characters; of those not given as sources of their own."""
    tokenizer: str = "train:2048"
    """"train:N" trains a byte-level BPE of N entries on train documents; else a tokenizer.json or a hub name."""

    def __post_init__(self) -> None:
        if len(self.splits) != 3 or not min(self.splits) >= 0 or not abs(sum(self.splits) - 1) <= 1e-6:
            raise ConfigError(f"splits={self.splits}: must be three shares of train, validation, test that sum to 1")
        given = dict(zip(SPLITS, self.splits, strict=True))
        for split, share in self.shares().items():
            if share == 0:
                raise ConfigError(
                    f"splits={self.splits}: must give {split} a share above 0; it is {given[split]:g} and {split} is "
                    f"not given as files of its own; raise it or lower the others"
                )

    def sources(self) -> dict[str, Source]:
        """The sources by what they are given as: "source" and, where the user has their own, "validation", "test"."""
        given = {"source": self.source, "validation": self.validation, "test": self.test}
        return {name: source for name, source in given.items() if source is not None}

    def shares(self) -> dict[str, float]:
        """Shares, summing to 1, of the splits that are cut out of the source."""
        given = zip(SPLITS, self.splits, strict=True)
        shares = {split: share for split, share in given if split not in self.sources()}
        total = sum(shares.values()) or 1.0
        return {split: share / total for split, share in shares.items()}

    def files(self) -> list[Path]:
        """Every local file that decides what the store holds; "pocket" and hub names have none.

        Raises:
            DataError: a path does not exist, or holds no file with an accepted ending.
        """
        files = [file for source in self.sources().values() for file in files_of(source.name)]
        tokenizer = Path(self.tokenizer)
        return [*files, tokenizer] if tokenizer.is_file() else files


class Assigned(NamedTuple):
    """A document, its hash, and the split that it goes into."""

    split: str
    digest: int
    document: Document


def assign(preparation: Preparation, on_dropped: Dropped | None = None) -> Iterator[Assigned]:
    """Every document with its split: the user's own validation and test first, then the source; blank ones skipped.

    Args:
        preparation: the sources and shares.
        on_dropped: called for a domain of "pocket" that this installation lacks.

    Raises:
        DataError: at the end, when everything was counted: documents that stand in two of the user's sources, a
            domain without any text, or one that a split lacks.
    """
    sources = preparation.sources()
    census = _Census({name: source.name for name, source in sources.items()})
    splitter = _Splitter(preparation.shares())
    owners: dict[int, str] = {}  # hash: the split that the user put the document into
    for given_as in ("validation", "test", "source"):
        for document in sources[given_as].documents(on_dropped) if given_as in sources else ():
            if not census.count(given_as, document):
                continue
            digest = document_hash(document.text)
            if owners.get(digest, given_as) != given_as:
                census.overlap(owners[digest], given_as, digest, document)
                continue
            if given_as == "source":
                split = splitter.split(digest, document)
            else:
                split = owners[digest] = given_as
            census.splits[document.domain, split] += 1
            yield Assigned(split, digest, document)
    census.check()


def document_hash(text: str) -> int:
    """64-bit hash of a document's text."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


@dataclass
class _Splitter:
    """Assigns documents to splits: each goes where its domain is furthest behind its share, in characters.

    So every split of even a small domain gets its part, spread evenly over the source. A repeated document follows
    its first copy, and so no document stands in two splits.
    """

    shares: dict[str, float]
    _done: dict[str, dict[str, float]] = field(default_factory=dict)
    _seen: dict[int, str] = field(default_factory=dict)

    def split(self, digest: int, document: Document) -> str:
        """The split of a document."""
        if digest not in self._seen:
            done = self._done.setdefault(document.domain, dict.fromkeys(self.shares, 0.0))
            total = sum(done.values()) + len(document.text)
            split = max(self.shares, key=lambda name: self.shares[name] * total - done[name])
            done[split] += len(document.text)
            self._seen[digest] = split
        return self._seen[digest]


@dataclass
class _Census:
    """What was counted while the documents went by, and the errors that need the counts."""

    names: dict[str, str]
    """What the user gave, by "source", "validation", "test"."""
    texts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Documents by (given as, domain)."""
    blank: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Documents without text, likewise."""
    splits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Documents by (domain, split)."""
    shared: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    """Hashes of the documents that stand in two sources."""
    examples: dict[tuple[str, str], Document] = field(default_factory=dict)

    def count(self, given_as: str, document: Document) -> bool:
        """Count a document; whether it holds text."""
        holds_text = bool(document.text.strip())
        (self.texts if holds_text else self.blank)[given_as, document.domain] += 1
        return holds_text

    def overlap(self, first: str, second: str, digest: int, document: Document) -> None:
        """Note a document of source `second` that stands in `first` too."""
        self.shared.setdefault((first, second), set()).add(digest)
        self.examples.setdefault((first, second), document)

    def check(self) -> None:
        """Raise the error that the counts call for, if any."""
        self._check_overlaps()
        self._check_blank()
        known = self._domains("source")
        if not known:
            raise DataError(f"source={self.names['source']}: must hold at least one document; it holds none; check it")
        for split in ("validation", "test"):
            if split in self.names:
                self._check_own(split, known)
        for split in SPLITS:
            if missing := [domain for domain in known if not self.splits[domain, split]]:
                held = ", ".join(f"{domain} ({self.texts['source', domain]})" for domain in missing)
                raise DataError(
                    f"domain={missing[0]}: must have documents in {split}; too few documents to be shared out, by "
                    f"domain: {held}; give {split} a larger share with --splits, add documents, or leave the domain out"
                )

    def _domains(self, given_as: str) -> list[str]:
        return sorted(domain for name, domain in self.texts if name == given_as)

    def _check_overlaps(self) -> None:
        for (first, second), digests in self.shared.items():
            example = self.examples[first, second]
            raise DataError(
                f"{first}={self.names[first]}: must share no document with {second}={self.names[second]}; "
                f"{len(digests):,} {'document stands' if len(digests) == 1 else 'documents stand'} in both, for "
                f"instance {example.domain}: {example.text[:60]!r}; remove them from one of the two"
            )

    def _check_blank(self) -> None:
        for (given_as, domain), number in self.blank.items():
            if not self.texts[given_as, domain]:
                raise DataError(
                    f"domain={domain}: must hold text; all its {number:,} documents in "
                    f"{given_as}={self.names[given_as]} are empty or white space; check the text field (--text-field) "
                    f"or leave the domain out"
                )

    def _check_own(self, split: str, known: list[str]) -> None:
        """The user's own file for a split and the source must hold the same domains."""
        theirs = self._domains(split)
        file, source = f"{split}={self.names[split]}", f"source={self.names['source']}"
        if missing := [domain for domain in known if domain not in theirs]:
            raise DataError(
                f"domain={', '.join(missing)}: must have documents in {file} too; only {source} holds them; add "
                f"documents to that file, drop the domain from the source, or leave out --{split} so that a share of "
                f"the source is taken"
            )
        if extra := [domain for domain in theirs if domain not in known]:
            near = get_close_matches(extra[0], known, n=1, cutoff=0.5)
            raise DataError(
                f"domain={', '.join(extra)}: must have documents in {source} too, to train on; only {file} holds them; "
                + (f"is '{near[0]}' of the source meant? else " if near else "")
                + "add documents to the source or drop the domain from that file"
            )
