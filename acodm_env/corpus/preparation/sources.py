"""Where documents come from: "pocket", a file or folder, or the hub; and which fields hold domain and text.

Files are .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .arrow. The domain is a field of the record, or the name of the
sub-folder. One document is in memory at a time, never a whole corpus.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.corpus.document import Document, Dropped
from acodm_env.corpus.preparation.streams import (
    ENDINGS,
    FileStream,
    HubStream,
    PocketStream,
    Stream,
    ending_of,
    hub_revision,
)
from acodm_env.errors import DataError
from acodm_env.hub import looks_local

SAMPLE_FILES = 64
SAMPLE_READ_CHARS = 64_000_000
"""What `Source.sample` reads at most: files (more only where there are more domain folders) and characters."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from, and which fields hold domain and text."""

    name: str
    """ "pocket", a file or folder, or a hub name: "owner/name", "owner/name:configuration", either with "@split"."""
    domain_field: str | None = None
    """Dotted name of the domain's field (`meta.pile_set_name`); None takes the sub-folder's name."""
    text_field: str = "text"
    """Dotted name of the text's field."""

    def open(
        self,
        start: Mapping[str, Any] | None = None,
        on_dropped: Dropped | None = None,
        *,
        files: Sequence[Path] | None = None,
        revision: str | None = None,
    ) -> Stream:
        """The documents in a fixed order: files by name, records as they stand.

        Args:
            start: a position of an earlier stream, to go on from there; default the beginning.
            on_dropped: called for a domain of "pocket" that this installation lacks.
            files: what `files_of` gave; default: they are listed here.
            revision: of a hub data set, the commit to read; default: the one that it is at.

        Raises:
            DataError: here or while reading: nothing there, no readable file, a file that is not whole or malformed,
                a record without domain or text, or a hub that cannot be reached.
        """
        if self.name == "pocket":
            return PocketStream(on_dropped)
        files = files_of(self.name) if files is None else files
        if not files:
            return HubStream(self.name, revision or hub_revision(self.name), self._document, start)
        root = Path(self.name).expanduser()
        if self.domain_field is None:
            _check_folders(root, files)
        return FileStream(root, files, self._document, start)

    def sample(self, files: Sequence[Path] | None = None, revision: str | None = None) -> Iterator[Document]:
        """Documents from the beginnings of files taken evenly from each sub-folder; of the hub, its first ones."""
        files = files_of(self.name) if files is None else files
        root = Path(self.name).expanduser()
        chosen = _evenly_by_folder(root, files)
        streams: list[Stream] = [FileStream(root, [file], self._document, None) for file in chosen]
        for stream in streams if files else [self.open(files=files, revision=revision)]:
            budget = SAMPLE_READ_CHARS // max(1, len(streams))
            for document in stream:
                yield document
                budget -= len(document.text)
                if budget <= 0:
                    break

    def _document(self, record: Mapping[str, Any], folder: str | None, where: str) -> Document:
        if self.domain_field is None and folder is None:
            raise DataError(
                f"domain_field=None: must name the field that holds the domain, since the files do not lie in one "
                f"folder per domain; {where} is {abbreviated(record)}; its fields are {', '.join(_names(record))}"
            )
        domain = folder if self.domain_field is None else _value(record, self.domain_field, "domain_field", where)
        text = _value(record, self.text_field, "text_field", where)
        if not isinstance(text, str):
            raise DataError(
                f"text_field={self.text_field}: must hold text; {where} holds {text!r:.80}; name another field"
            )
        return Document(str(domain), text)


def files_of(source: str) -> list[Path]:
    """The files of a local source in the order in which they are read; none for "pocket" and hub names.

    Raises:
        DataError: the path does not exist, or holds no file with an accepted ending.
    """
    path = Path(source).expanduser()
    if source == "pocket":
        return []
    if not path.exists():
        if looks_local(source, (*ENDINGS, ".json", ".gz", ".zst")):
            raise DataError(f"source={source}: must be an existing file or folder; nothing is there; check the path")
        return []
    if path.is_file():
        files = [path] if ending_of(path) else []
    else:
        files = [file for file in path.rglob("*") if file.is_file() and ending_of(file) and _visible(file, path)]
    if not files:
        raise DataError(
            f"source={source}: must hold files ending in {', '.join(ENDINGS)}; it holds none; convert the data "
            f'to one of these, for instance a JSON object {{"text": …, "domain": …}} per line'
        )
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _check_folders(root: Path, files: Sequence[Path]) -> None:
    """Where sub-folders are domains, none may be empty."""
    filled = {file.relative_to(root).parts[0] for file in files if file != root}
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.is_dir() and _visible(folder, root) and folder.name not in filled:
            raise DataError(
                f"domain={folder.name}: must hold files ending in {', '.join(ENDINGS)}; the folder {folder} holds "
                f"none; add some or remove the folder"
            )


def _evenly_by_folder(root: Path, files: Sequence[Path]) -> list[Path]:
    """About `SAMPLE_FILES` files, from every sub-folder its share and at least one."""
    folders: dict[str, list[Path]] = {}
    for file in files:
        folders.setdefault(file.relative_to(root).parts[0] if file.parent != root and file != root else "", []).append(
            file
        )
    chosen = []
    for members in folders.values():
        count = min(len(members), max(1, SAMPLE_FILES * len(members) // len(files)))
        chosen += [members[index] for index in np.linspace(0, len(members) - 1, count).astype(int)]
    return chosen


def _value(record: Mapping[str, Any], field: str, setting: str, where: str) -> Any:
    """The value of a dotted field; missing and null are refused, and so is an empty domain."""
    value: Any = record.get(field)
    if value is None:
        value = record
        for part in field.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if value is None or isinstance(value, Mapping | list) or (value == "" and setting == "domain_field"):
        names = _names(record)
        near = get_close_matches(field, names, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near and near[0] != field else "name another field or mend the record"
        raise DataError(
            f"{setting}={field}: must be a field with a value in every record; {where} has none: "
            f"{abbreviated(record)}; its fields are {', '.join(names)}; {hint}"
        )
    return value


def _names(record: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of a record's fields."""
    names = []
    for key, value in record.items():
        names += _names(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}"]
    return names


def abbreviated(record: Mapping[str, Any], num_chars: int = 300) -> str:
    """A record as JSON, long strings and the whole cut short."""

    def shorten(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: shorten(child) for key, child in value.items()}
        return value[:40] + "…" if isinstance(value, str) and len(value) > 40 else value

    text = json.dumps(shorten(record), ensure_ascii=False, default=str)
    return text if len(text) <= num_chars else text[:num_chars] + "…"


def _visible(file: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(root).parts)
