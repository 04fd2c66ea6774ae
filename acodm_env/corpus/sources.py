"""Documents with their domain, streamed from wherever they lie; one at a time, never a whole corpus in memory.

A source is "pocket", a file or folder of .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .arrow, or a hub name; files
and hub are read through `datasets`. The domain is a field of the record, or the name of the sub-folder.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from acodm_env.corpus.pocket import Dropped, pocket_documents
from acodm_env.corpus.records import JSON_LINES, check_whole, describe_failure
from acodm_env.errors import DataError
from acodm_env.hub import looks_local, require_hub

READERS = {**dict.fromkeys(JSON_LINES, "json"), ".parquet": "parquet", ".arrow": "arrow"}
"""Accepted endings, and the builder of `datasets` that reads them."""
ENDINGS = tuple(READERS)


@dataclass(frozen=True)
class Document:
    """A text and the domain it counts for."""

    domain: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from, and which fields hold domain and text."""

    name: str
    """ "pocket", a file or folder, or a hub name."""
    domain_field: str | None = None
    """Dotted name of the domain's field; None takes the sub-folder's name."""
    text_field: str = "text"
    """Dotted name of the text's field."""

    def documents(self, on_dropped: Dropped | None = None) -> Iterator[Document]:
        """Stream the documents; see `documents` for order and errors."""
        return documents(self.name, domain_field=self.domain_field, text_field=self.text_field, on_dropped=on_dropped)


def documents(
    source: str,
    *,
    domain_field: str | None = None,
    text_field: str = "text",
    hub_split: str = "train",
    on_dropped: Dropped | None = None,
) -> Iterator[Document]:
    """Stream the documents of `source` in a fixed order: files by name, records as they stand.

    Args:
        source: "pocket", a path, or a hub name ("owner/name", or "owner/name:configuration").
        domain_field: dotted name of the record's domain (`meta.pile_set_name`); None takes the sub-folder's name.
        text_field: dotted name of the text.
        hub_split: which split of a hub data set to read.
        on_dropped: called for a domain of "pocket" that this installation lacks.

    Raises:
        DataError: nothing there, no readable file, a file that is not whole or malformed, a record without
            domain or text, or a hub that cannot be reached.
    """
    if source == "pocket":
        for domain, text in pocket_documents(on_dropped):
            yield Document(domain, text)
        return
    empty = True
    for document in _documents(source, domain_field, text_field, hub_split):
        empty = False
        yield document
    if empty:
        raise DataError(f"source={source}: must hold at least one record; it is empty; check what wrote it")


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
        files = [path] if _ending(path) else []
    else:
        files = [file for file in path.rglob("*") if file.is_file() and _ending(file) and _visible(file, path)]
    if not files:
        raise DataError(
            f"source={source}: must hold files ending in {', '.join(ENDINGS)}; it holds none; convert the data "
            f'to one of these, for instance a JSON object {{"text": …, "domain": …}} per line'
        )
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _documents(source: str, domain_field: str | None, text_field: str, hub_split: str) -> Iterator[Document]:
    files = files_of(source)
    if not files:
        yield from _hub_documents(source, domain_field, text_field, hub_split)
    root = Path(source).expanduser()
    if domain_field is None:
        _check_folders(root, files)
    for file in files:
        check_whole(file)
        folder = file.relative_to(root).parts[0] if file.parent != root and file != root else None
        number = 0
        for number, record in enumerate(_records(file), start=1):
            where = f"record {number} of {file}"
            yield _document(record, domain_field, text_field, folder, where)
        if number == 0:
            raise DataError(f"{file}: must hold records; it holds none; remove it or write it again")


def _check_folders(root: Path, files: list[Path]) -> None:
    """Where sub-folders are domains, none may be empty."""
    filled = {file.relative_to(root).parts[0] for file in files if file != root}
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.is_dir() and _visible(folder, root) and folder.name not in filled:
            raise DataError(
                f"domain={folder.name}: must hold files ending in {', '.join(ENDINGS)}; the folder {folder} holds "
                f"none; add some or remove the folder"
            )


def _hub_documents(source: str, domain_field: str | None, text_field: str, split: str) -> Iterator[Document]:
    import datasets

    remedy = "download the data elsewhere, copy its files here and give their folder instead"
    require_hub("source", source, remedy)
    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        for number, record in enumerate(rows, start=1):
            yield _document(record, domain_field, text_field, None, f"record {number} of {source}")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"source={source}: must be a hub data set with a split '{split}'; {_first_line(error)}; {remedy}"
        ) from error


def _records(file: Path) -> Iterator[Mapping[str, Any]]:
    """The records of one file; a failure names the file and, where it can be found, the line."""
    import glob

    import datasets

    with _quiet_datasets():
        try:
            yield from datasets.load_dataset(
                READERS[_ending(file)],
                data_files=glob.escape(str(file.absolute())),
                split="train",
                streaming=True,
            )
        except Exception as error:  # datasets, pyarrow, gzip, zstd and fsspec each raise their own kinds
            raise DataError(describe_failure(file, error)) from error


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


def _document(
    record: Mapping[str, Any], domain_field: str | None, text_field: str, folder: str | None, where: str
) -> Document:
    if domain_field is None and folder is None:
        raise DataError(
            f"domain_field=None: must name the field that holds the domain, since the files do not lie in one folder "
            f"per domain; {where} is {abbreviated(record)}; its fields are {', '.join(_names(record))}"
        )
    domain = folder if domain_field is None else _value(record, domain_field, "domain_field", where)
    text = _value(record, text_field, "text_field", where)
    if not isinstance(text, str):
        raise DataError(f"text_field={text_field}: must hold text; {where} holds {text!r:.80}; name another field")
    return Document(str(domain), text)


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


def _ending(file: Path) -> str:
    return next((ending for ending in ENDINGS if file.name.endswith(ending)), "")


def _visible(file: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(root).parts)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
