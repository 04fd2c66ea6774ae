"""`Preparation`: what decides what a token store holds, and nothing else; `Inputs`: what it found to read."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from acodm_env.corpus.document import Document, Dropped
from acodm_env.corpus.preparation.sources import Source, files_of
from acodm_env.corpus.preparation.streams import Stream, hub_parts, hub_revision
from acodm_env.corpus.shards import SHARD_BYTES, SPLITS
from acodm_env.corpus.tokenizer import tokenizer_file
from acodm_env.errors import ConfigError

BALANCED_BYTES = 256_000_000
"""Sources up to this size are shared out evenly; compressed files count `_EXPANSION`-fold."""
_EXPANSION = 4
_PLAIN = (".jsonl", ".arrow")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Everything that decides what a token store holds."""

    source: Source
    validation: Source | None = None
    test: Source | None = None
    targets: Source | None = None
    """Domains to be evaluated, never trained on: half of their text is for validation, half for test."""
    splits: tuple[float, float, float] = (0.9, 0.05, 0.05)
    """Shares of train, validation and test, in characters; of those not given as sources of their own."""
    tokenizer: str = "train:2048"
    """"train:N" trains a byte-level BPE of N entries on train documents; else a tokenizer.json or a hub name."""
    shard_bytes: int = SHARD_BYTES
    """Largest size of a file of token ids."""

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

        if self.shard_bytes < 4 or self.shard_bytes % 4:
            raise ConfigError(f"shard_bytes={self.shard_bytes}: must be a multiple of 4, at least 4 bytes")

    def sources(self) -> dict[str, Source]:
        """The sources by what they are given as: "source" and, where given, "validation", "test", "targets"."""
        given = {"source": self.source, "validation": self.validation, "test": self.test, "targets": self.targets}
        return {name: source for name, source in given.items() if source is not None}

    def shares(self) -> dict[str, float]:
        """Shares, summing to 1, of the splits that are cut out of the source."""
        given = zip(SPLITS, self.splits, strict=True)
        shares = {split: share for split, share in given if split not in self.sources()}
        total = sum(shares.values()) or 1.0
        return {split: share / total for split, share in shares.items()}

    def record(self) -> dict[str, Any]:
        """All settings as JSON."""
        return {**asdict(self), "splits": list(self.splits)}

    def inputs(self) -> "Inputs":
        """What is there to read now.

        Raises:
            DataError: a path does not exist, or holds no file with an accepted ending.
        """
        return Inputs(preparation=self, files={name: files_of(own.name) for name, own in self.sources().items()})


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the sources of a preparation were when it began, listed once."""

    preparation: Preparation
    files: Mapping[str, list[Path]]
    """Files by "source", "validation", "test", "targets"; none for "pocket" and hub names."""
    revisions: Mapping[str, str] = field(default_factory=dict)
    """The commits of hub data sets."""

    def at_revisions(self, known: Mapping[str, str] | None = None) -> "Inputs":
        """The same with the commit of every hub data set: the known one, or the one that it is at now.

        Raises:
            DataError: the hub cannot be reached, or has no such data set.
        """
        revisions = dict(known or {})
        for name in self._hub_names().values():
            data_set = hub_parts(name)[0]
            revisions[data_set] = revisions.get(data_set) or hub_revision(name)
        return replace(self, revisions=revisions)

    def open(self, given_as: str, start: Mapping[str, Any] | None = None, on_dropped: Dropped | None = None) -> Stream:
        """The documents of one source, as `Source.open`."""
        source = self.preparation.sources()[given_as]
        return source.open(start, on_dropped, files=self.files[given_as], revision=self._revision(source))

    def sample(self) -> Iterator[Document]:
        """Some documents of the source, as `Source.sample`."""
        source = self.preparation.source
        return source.sample(self.files["source"], self._revision(source))

    def _revision(self, source: Source) -> str | None:
        return self.revisions.get(hub_parts(source.name)[0])

    def _hub_names(self) -> dict[str, str]:
        sources = self.preparation.sources().items()
        return {name: own.name for name, own in sources if own.name != "pocket" and not self.files[name]}

    def source_files(self) -> list[Path]:
        """Every local file that documents are read from."""
        return [file for files in self.files.values() for file in files]

    def all_files(self) -> list[Path]:
        """Every local file that decides what the store holds."""
        tokenizer = tokenizer_file(self.preparation.tokenizer)
        return [*self.source_files(), tokenizer] if tokenizer.is_file() else self.source_files()

    def text_bytes(self) -> int | None:
        """About how much text there is to read, compressed files counted fourfold; None for "pocket" and the hub."""
        return _text_bytes(self.source_files()) if all(self.files.values()) else None

    def balanced(self) -> bool:
        """Whether every split gets its part of every domain: for "pocket", and files up to `BALANCED_BYTES`."""
        size = self.text_bytes()
        return not self._hub_names() if size is None else size <= BALANCED_BYTES

    def few_targets(self) -> bool:
        """Whether the targets are few enough to be shared out evenly, however large the source is."""
        return 0 < _text_bytes(self.files.get("targets", [])) <= BALANCED_BYTES


def _text_bytes(files: list[Path]) -> int:
    return sum(file.stat().st_size * (1 if file.name.endswith(_PLAIN) else _EXPANSION) for file in files)
