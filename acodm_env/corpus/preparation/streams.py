"""Documents one at a time, from any position on: what makes a preparation of any size resumable.

A position is JSON: file, line and byte of local files; for a hub data set, the state of `datasets`' own iterator.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from acodm_env.corpus.document import Document, Dropped
from acodm_env.corpus.preparation.jsonl import JSON_LINES, JsonLines, check_not_empty, describe_failure
from acodm_env.corpus.preparation.pocket import pocket_documents
from acodm_env.errors import AcodmError, DataError
from acodm_env.hub import require_hub

READERS = {**dict.fromkeys(JSON_LINES, "json"), ".parquet": "parquet", ".arrow": "arrow"}
"""Accepted endings, and the kind of reader."""
ENDINGS = tuple(READERS)
_REMEDY = "download the data elsewhere, copy its files here and give their folder instead"
_PARQUET_ROWS = 256  # decoded at a time; by default a whole row group, which may be gigabytes


ToDocument = Callable[[Mapping[str, Any], str | None, str], Document]
"""From a record, the folder that it lies in (or None) and where it stands, in words."""


class Stream(ABC):
    """An iterator over documents that knows where it is."""

    @abstractmethod
    def __iter__(self) -> Iterator[Document]:
        """Hand out the documents."""

    @abstractmethod
    def position(self) -> dict[str, Any]:
        """Where the next document begins, as JSON; valid between documents."""

    def bytes_read(self) -> int | None:
        """Bytes of the files read so far, where known."""
        return None


class PocketStream(Stream):
    """The embedded corpus; always read from its beginning."""

    def __init__(self, on_dropped: Dropped | None):
        self._on_dropped = on_dropped

    def __iter__(self) -> Iterator[Document]:
        for domain, text in pocket_documents(self._on_dropped):
            yield Document(domain, text)

    def position(self) -> dict[str, Any]:
        """Nothing: there is no going on in the middle."""
        return {}


class _Place(NamedTuple):
    file: int = 0
    record: int = 0
    """Records of the file handed out; lines of a file of JSON lines."""
    offset: int = 0


class FileStream(Stream):
    """Files in their order, records as they stand."""

    def __init__(self, root: Path, files: Sequence[Path], to_document: ToDocument, start: Mapping[str, Any] | None):
        self._root, self._files, self._to_document = root, files, to_document
        self._place = _Place(**start) if start else _Place()
        self._sizes = [file.stat().st_size for file in files]

    def __iter__(self) -> Iterator[Document]:
        for index in range(self._place.file, len(self._files)):
            file, any_record = self._files[index], self._place.record > 0
            folder = _folder(file, self._root)
            for record in self._json_lines(file) if READERS[ending_of(file)] == "json" else self._rows(file):
                any_record = True
                yield self._to_document(record, folder, f"record {self._place.record} of {file}")
            if not any_record:
                raise DataError(f"{file}: must hold records; it holds none; remove it or write it again")
            self._place = _Place(index + 1)

    def position(self) -> dict[str, Any]:
        """File, record and byte."""
        return self._place._asdict()

    def bytes_read(self) -> int:
        """Bytes on disk, of a Parquet or Arrow file only when it is done."""
        return sum(self._sizes[: self._place.file]) + self._place.offset

    def _json_lines(self, file: Path) -> Iterator[Mapping[str, Any]]:
        with closing(JsonLines(file, self._place.record, self._place.offset)) as lines:
            for record in lines:
                self._place = _Place(self._place.file, lines.line, lines.offset)
                yield record

    def _rows(self, file: Path) -> Iterator[Mapping[str, Any]]:
        """The rows of a Parquet or Arrow file."""
        import glob

        import datasets

        check_not_empty(file)
        done = self._place.record
        with _quiet_datasets():
            try:
                kind, data_files = READERS[ending_of(file)], glob.escape(str(file.absolute()))
                options = {"batch_size": _PARQUET_ROWS} if kind == "parquet" else {}
                rows = datasets.load_dataset(kind, data_files=data_files, split="train", streaming=True, **options)
                for row in rows.skip(done) if done else rows:
                    done += 1
                    self._place = _Place(self._place.file, done)
                    yield row
            except Exception as error:  # datasets, pyarrow and fsspec each raise their own kinds
                raise DataError(describe_failure(file, error)) from error


class HubStream(Stream):
    """A split of a data set on the hub, read while it is downloaded."""

    def __init__(self, name: str, revision: str, to_document: ToDocument, start: Mapping[str, Any] | None):
        self._name, self._revision, self._to_document = name, revision, to_document
        self._start: Any = start["state"] if start else None
        self._number = int(start["number"]) if start else 0
        self._rows: Any = None

    def __iter__(self) -> Iterator[Document]:
        import datasets

        name, configuration, split = hub_parts(self._name)
        with _hub_errors(self._name):
            self._rows = datasets.load_dataset(
                name, configuration, split=split, revision=self._revision, streaming=True
            )
            if self._start is not None:
                self._rows.load_state_dict(self._start)
            for record in self._rows:
                self._number += 1
                yield self._to_document(record, None, f"record {self._number} of {self._name}")

    def position(self) -> dict[str, Any]:
        """State of the iterator, and the number of records behind it."""
        state = self._start if self._rows is None else self._rows.state_dict()
        return {"state": state, "number": self._number}


def hub_parts(name: str) -> tuple[str, str | None, str]:
    """Data set, configuration and split of a hub name "owner/name[:configuration][@split]"."""
    rest, _, split = name.partition("@")
    data_set, _, configuration = rest.partition(":")
    return data_set, configuration or None, split or "train"


def hub_revision(name: str) -> str:
    """The commit that a data set on the hub is at.

    Raises:
        DataError: the hub cannot be reached, or has no such data set.
    """
    require_hub("source", name, _REMEDY)
    with _hub_errors(name):
        return _revision(hub_parts(name)[0])


def _revision(data_set: str) -> str:
    import huggingface_hub

    return str(huggingface_hub.HfApi().dataset_info(data_set).sha)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Say what may be wrong with a hub name, whatever was raised."""
    try:
        yield
    except AcodmError:
        raise
    except Exception as error:  # datasets, fsspec and the HTTP libraries each raise their own kinds
        raise DataError(
            f"source={name}: must be a hub data set with a split '{hub_parts(name)[2]}', while there is a network; "
            f"{first_line(error)}; if it was interrupted, run the same command again to go on; else {_REMEDY}"
        ) from error


def ending_of(file: Path) -> str:
    """The accepted ending that a file has, or nothing."""
    return next((ending for ending in ENDINGS if file.name.endswith(ending)), "")


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _folder(file: Path, root: Path) -> str | None:
    """The sub-folder of `root` that a file lies in."""
    return file.relative_to(root).parts[0] if file not in (root, root / file.name) else None


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep `datasets` from logging what becomes our error message."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)
