"""What is wrong with a data file: `datasets` names the row of a block, users need the file and the line."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from acodm_env.errors import DataError

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_CHUNK_BYTES = 1 << 20


def check_whole(file: Path) -> None:
    """Refuse an empty file, and a .zst file that was cut short: its readers just stop early, without an error.

    Raises:
        DataError: the file is empty, its compression is damaged, or it cannot be opened.
    """
    try:
        size = file.stat().st_size
        if size and file.name.endswith(".zst"):
            _check_zstd(file)
    except OSError as error:
        raise DataError(f"{file}: must be readable; {error.strerror}; check its permissions") from error
    if size == 0:
        raise DataError(f"{file}: must hold records; the file is empty; remove it or write it again")


def describe_failure(file: Path, error: Exception) -> str:
    """The message for a file that could not be read: damaged compression, the malformed line, or the error itself."""
    if file.name.endswith(JSON_LINES):
        try:
            found = _first_bad_line(file)
        except (OSError, EOFError, zlib.error) as damage:
            return _damaged(file, damage)
        if found:
            number, problem = found
            return (
                f"{file}, line {number}: must be one JSON object; {problem}; correct or remove the line, or write the "
                f"file again"
            )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"{file}: must be readable as records of one shape; {lines[0]}; a field that changes its type, or a file "
        f"that was cut short: write it again"
    )


def _first_bad_line(file: Path) -> tuple[int, str] | None:
    """Number (from 1) of the first line that is no JSON object, and why; None if there is none."""
    number = 0
    with _lines(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                json.dumps(record, ensure_ascii=False).encode()  # refuses half a surrogate pair
            except ValueError as error:  # malformed, or not UTF-8
                return number, str(error)
            if not isinstance(record, dict):
                return number, f"it is a {type(record).__name__}"
    return (1, "the file holds no line") if number == 0 else None


@contextmanager
def _lines(file: Path) -> Iterator[BinaryIO | io.BufferedReader | gzip.GzipFile]:
    if file.name.endswith(".gz"):
        with gzip.open(file) as lines:
            yield lines
    elif file.name.endswith(".zst"):
        import zstandard

        with file.open("rb") as raw:
            reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            yield io.BufferedReader(reader)
    else:
        with file.open("rb") as plain:
            yield plain


def _check_zstd(file: Path) -> None:
    """Decompress the whole file; every frame must end."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = None
    with file.open("rb") as raw:
        try:
            while chunk := raw.read(_CHUNK_BYTES):
                while chunk:
                    frame = frame or decompressor.decompressobj()
                    frame.decompress(chunk)
                    chunk = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
        except zstandard.ZstdError as error:
            raise DataError(_damaged(file, error)) from error
    if frame is not None:
        raise DataError(_damaged(file, EOFError("it ends within a frame")))


def _damaged(file: Path, error: Exception) -> str:
    return (
        f"{file}: must be whole compressed data; it cannot be decompressed ({error}): it was cut short, edited or "
        f"is not what its ending says; copy or compress it again"
    )
