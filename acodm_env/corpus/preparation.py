"""`Preparation`: what decides what a token store holds, and nothing else."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from acodm_env.corpus.shards import SHARD_BYTES, SPLITS
from acodm_env.corpus.sources import Source, files_of
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
        files, tokenizer = self.source_files(), Path(self.tokenizer)
        return [*files, tokenizer] if tokenizer.is_file() else files

    def source_files(self) -> list[Path]:
        """Every local file that documents are read from.

        Raises:
            DataError: as `files`.
        """
        return [file for source in self.sources().values() for file in files_of(source.name)]

    def text_bytes(self) -> int | None:
        """About how much text there is to read, compressed files counted fourfold; None for "pocket" and the hub.

        Raises:
            DataError: as `files`.
        """
        total = 0
        for source in self.sources().values():
            files = files_of(source.name)
            if not files:
                return None
            total += sum(file.stat().st_size * (1 if file.name.endswith(_PLAIN) else _EXPANSION) for file in files)
        return total

    def balanced(self) -> bool:
        """Whether every split gets its part of every domain: for "pocket", and files up to `BALANCED_BYTES`."""
        size = self.text_bytes()
        if size is None:
            return all(source.name == "pocket" or files_of(source.name) for source in self.sources().values())
        return size <= BALANCED_BYTES

    def record(self) -> dict[str, Any]:
        """All settings as JSON."""
        return {**asdict(self), "splits": list(self.splits)}
