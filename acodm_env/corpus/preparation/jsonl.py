"""Records of JSON lines, plain or compressed, with the file and line of whatever is wrong with one.

Read here and not through `datasets`, which names the row of a block where users need the line, guesses types (a text
that looks like a date becomes one), and cannot say how much of a compressed file it has read.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from acodm_env.errors import DataError

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_CHUNK_BYTES = 1 << 14  # compressed: what comes out of it may be a thousand times as long


class JsonLines:
    """The records of a file of JSON lines, one at a time."""

    def __init__(self, file: Path, line: int = 0, offset: int = 0):
        """Start behind line number `line`, which ends at byte `offset` of the file (unused where compressed).

        Raises:
            DataError: the file is empty or cannot be opened.
        """
        check_not_empty(file)
        self.file, self.line = file, line
        """`line`: number of the line of the record handed out last, from 1."""
        self._raw = file.open("rb")
        self._lines = _decompressed(self._raw, file)
        if self._lines is self._raw:
            self._raw.seek(offset)
        else:
            self._guarded(line)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while content := self._guarded(1):
            self.line += 1
            if content.strip():
                yield self._record(content)

    def close(self) -> None:
        """Close the file."""
        self._raw.close()

    @property
    def offset(self) -> int:
        """Bytes of the file read so far: exactly to the end of the line if it is not compressed."""
        return self._raw.tell()

    def _guarded(self, count: int) -> bytes:
        """Read lines; the last of them."""
        content = b""
        try:
            for _ in range(count):
                content = self._lines.readline()
        except (OSError, EOFError, zlib.error) as error:
            if getattr(error, "errno", None) is not None:  # not from decompressing
                raise DataError(f"{self.file}: must be readable; {error}; check its disk") from error
            raise DataError(
                f"{self.file}: must be whole compressed data; it cannot be decompressed ({error}): it was cut short, "
                f"edited or is not what its ending says; copy or compress it again"
            ) from error
        return content

    def _record(self, content: bytes) -> dict[str, Any]:
        try:
            record = json.loads(content.decode("utf-8-sig" if self.line == 1 else "utf-8"))
            if b"\\ud" in content or b"\\uD" in content:
                json.dumps(record, ensure_ascii=False).encode()  # refuses half a surrogate pair
            problem = None if isinstance(record, dict) else f"it is a {type(record).__name__}"
        except ValueError as error:  # malformed, or not UTF-8
            problem = str(error)
        if problem is not None:
            raise DataError(
                f"{self.file}, line {self.line}: must be one JSON object; {problem}; correct or remove the line, or "
                f"write the file again"
            )
        return record  # type: ignore[no-any-return]


def check_not_empty(file: Path) -> None:
    """Refuse an empty file.

    Raises:
        DataError: the file is empty, or it cannot be opened.
    """
    try:
        with file.open("rb") as content:
            size = os.fstat(content.fileno()).st_size
    except OSError as error:
        raise DataError(f"{file}: must be readable; {error.strerror}; check its permissions") from error
    if size == 0:
        raise DataError(f"{file}: must hold records; the file is empty; remove it or write it again")


def describe_failure(file: Path, error: Exception) -> str:
    """The message for a Parquet or Arrow file that could not be read."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"{file}: must be readable as records of one shape; {lines[0]}; a field that changes its type, or a file "
        f"that was cut short: write it again"
    )


def _decompressed(raw: "BinaryIO", file: Path) -> "BinaryIO | gzip.GzipFile | io.BufferedReader":
    if file.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if file.name.endswith(".zst"):
        return io.BufferedReader(_Zstandard(raw), 1 << 17)
    return raw


class _Zstandard(io.RawIOBase):
    """Decompressed content; unlike the library's reader, it does not take a file that was cut short for a whole one."""

    def __init__(self, raw: "BinaryIO"):
        import zstandard

        self._raw, self._errors = raw, zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(_CHUNK_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._output = self._frame.decompress(self._input)
            except self._errors as error:
                raise EOFError(str(error)) from error
            self._input = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size
