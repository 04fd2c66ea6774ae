"""Token ids in files of bounded size: written by appending, so that a killed preparation can go on.

Per domain and split the token ids are one stream, cut into shards of exactly `shard_bytes` (the last one is shorter),
and the documents' hashes are another file. Both only ever grow, and what a journal committed is a length: going on
means cutting each file back to it.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.errors import DataError
from acodm_env.files import sha256

SPLITS = ("train", "validation", "test")
SHARD_BYTES = 1 << 28
"""Default size of a shard: 256 MiB."""
EDGE_BYTES = 1 << 16
"""What is compared of every shard on opening a store: this many bytes at its beginning and at its end."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def edges_sha256(file: Path, edge_bytes: int = EDGE_BYTES) -> str:
    """SHA-256 of a file's first and last `edge_bytes`, as hexadecimal; of the whole file if it is no longer."""
    with file.open("rb") as content:
        digest = hashlib.sha256(content.read(edge_bytes))
        size = os.fstat(content.fileno()).st_size
        content.seek(max(edge_bytes, size - edge_bytes))
        digest.update(content.read(edge_bytes))
    return digest.hexdigest()


@dataclass
class _Output:
    """What one domain has in one split so far."""

    domain: str
    split: str
    stem: str
    """Path within the store without shard number and ending."""
    tokens: int = 0
    documents: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    """The shards that are full, as corpus.json lists them."""

    @property
    def shard(self) -> str:
        """Path of the shard that is being written."""
        return f"{self.stem}-{len(self.shards):05d}.bin"


class ShardWriter:
    """Appends encoded documents to the files of a token store."""

    def __init__(self, folder: Path, dtype: "np.dtype[Any]", shard_bytes: int, state: Mapping[str, Any] | None = None):
        """Write into `folder`; with `state`, go on from what it describes and drop whatever was written after it.

        Raises:
            DataError: a file holds less than the state says.
        """
        self.folder, self.dtype, self.shard_bytes = folder, dtype, shard_bytes
        self._outputs = [_Output(**entry) for entry in state["outputs"]] if state else []
        self._of = {(output.domain, output.split): output for output in self._outputs}
        self._numbers = {name: number for number, name in enumerate(state["domains"])} if state else {}
        self._touched: set[Path] = set()
        for split in SPLITS:
            (folder / split).mkdir(exist_ok=True)
        self._cut_back()

    @property
    def tokens(self) -> int:
        """Token ids written in all."""
        return sum(output.tokens for output in self._outputs)

    def append(self, domain: str, split: str, hashes: Sequence[int], tokens: bytes) -> None:
        """Append documents of one domain and split.

        Args:
            domain: its name.
            split: its split.
            hashes: of the documents.
            tokens: their token ids one after the other, in the store's type.
        """
        output = self._output(domain, split)
        self._extend(f"{output.stem}.documents", np.array(hashes, dtype="<u8").tobytes())
        output.documents += len(hashes)
        rest = memoryview(tokens)
        while rest:
            part = rest[: self.shard_bytes - self._open_bytes(output)]
            self._extend(output.shard, part)
            output.tokens += len(part) // self.dtype.itemsize
            if self._open_bytes(output) == self.shard_bytes:
                output.shards.append(self._described(output))
            rest = rest[len(part) :]

    def state(self) -> dict[str, Any]:
        """What was written, for the journal; synced to disk first."""
        for file in self._touched:
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        self._touched.clear()
        return {"domains": list(self._numbers), "outputs": [asdict(output) for output in self._outputs]}

    def documents_of(self, split: str) -> dict[str, Path]:
        """Files with the document hashes (uint64) that were written to a split, by domain."""
        own = [output for output in self._outputs if output.split == split]
        return {output.domain: self.folder / f"{output.stem}.documents" for output in own}

    def finish(self) -> list[dict[str, Any]]:
        """Every domain by name, as corpus.json lists them."""
        self.state()
        return [
            {"name": domain, "splits": {split: self._listed(domain, split) for split in SPLITS}}
            for domain in sorted(self._numbers)
        ]

    def _output(self, domain: str, split: str) -> _Output:
        if (domain, split) not in self._of:
            number = self._numbers.setdefault(domain, len(self._numbers))
            name = re.sub(r"[^A-Za-z0-9]+", "-", domain).strip("-").lower()[:60]
            output = _Output(domain, split, f"{split}/{number:02d}-{name}")
            self._outputs.append(output)
            self._of[domain, split] = output
        return self._of[domain, split]

    def _open_bytes(self, output: _Output) -> int:
        """Bytes in the shard that is being written."""
        return output.tokens * self.dtype.itemsize - len(output.shards) * self.shard_bytes

    def _extend(self, name: str, content: "bytes | memoryview") -> None:
        file = self.folder / name
        with file.open("ab") as handle:
            handle.write(content)
        self._touched.add(file)

    def _described(self, output: _Output) -> dict[str, Any]:
        file, num_bytes = self.folder / output.shard, self._open_bytes(output)
        return {
            "file": output.shard,
            "tokens": num_bytes // self.dtype.itemsize,
            "bytes": num_bytes,
            "sha256": sha256(file),
            "edges_sha256": edges_sha256(file),
        }

    def _listed(self, domain: str, split: str) -> dict[str, Any]:
        if (domain, split) not in self._of:
            return {"tokens": 0, "documents": 0, "shards": []}  # train of a target
        output = self._of[domain, split]
        documents = self.folder / f"{output.stem}.documents"
        return {
            "tokens": output.tokens,
            "documents": output.documents,
            "documents_file": f"{output.stem}.documents",
            "documents_bytes": output.documents * 8,
            "documents_sha256": sha256(documents),
            "shards": [*output.shards, *([self._described(output)] if self._open_bytes(output) else [])],
        }

    def _cut_back(self) -> None:
        """Make the files be what the state says: longer ones are cut, those that it does not know are removed."""
        known = {}
        for output in self._outputs:
            known[self.folder / f"{output.stem}.documents"] = output.documents * 8
            known |= {self.folder / shard["file"]: shard["bytes"] for shard in output.shards}
            if self._open_bytes(output):
                known[self.folder / output.shard] = self._open_bytes(output)
        for file, size in known.items():
            if not file.is_file() or file.stat().st_size < size:
                raise DataError(
                    f"{file}: must hold the {size:,} bytes that were committed; it does not: the disk lost them, or "
                    f"they were removed; delete the folder {self.folder.parent} and prepare again"
                )
            if file.stat().st_size > size:
                os.truncate(file, size)
        for split in SPLITS:
            for file in (self.folder / split).iterdir():
                if file not in known:
                    file.unlink()
