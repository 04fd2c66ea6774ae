"""From documents to a token store: splits, tokenizer, encoding, checksums."""

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from acodm_env.corpus.pocket import Dropped
from acodm_env.corpus.sources import Document, Source
from acodm_env.corpus.splits import Preparation, assign
from acodm_env.corpus.tokenizer import encode, end_of_document, load_tokenizer, train_tokenizer
from acodm_env.corpus.tokens import FORMAT_VERSION, SPLITS, TokenStore, fingerprint, token_dtype
from acodm_env.corpus.workplace import file_states, first_change, work_folder
from acodm_env.errors import DataError
from acodm_env.files import disk_errors, sha256, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Preparation", "prepare"]

_BATCH = 256  # documents encoded at a time
_log = logging.getLogger(__name__)


def prepare(
    source: str | Preparation, out: str | Path, *, tokenizer: str = "train:2048", quiet: bool = True
) -> TokenStore:
    """Write a token store to `out`, whole or not at all; the same preparation again just opens it.

    Args:
        source: what to prepare; a name alone takes all defaults and `tokenizer`.
        out: the folder; it must not exist, or be empty, or hold the same preparation.
        tokenizer: see `Preparation`.
        quiet: no progress bar.

    Raises:
        ConfigError: shares or tokenizer make no sense.
        DataError: the source cannot be read, a domain is empty or missing in a split, splits overlap, or `out` holds
            something else.
    """
    if isinstance(source, str):
        source = Preparation(source=Source(name=source), tokenizer=tokenizer)
    out = Path(out)
    with disk_errors(out):
        if (out / "corpus.json").exists():
            return _opened(out, source)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(
                f"out={out}: must not exist, be an empty folder, or hold the store of the same preparation; it holds "
                f"something else; choose another --out"
            )
    if any(parent.exists() and not parent.is_dir() for parent in out.absolute().parents):
        raise DataError(f"out={out}: must lie in a folder; a part of the path is a file; choose another --out")
    with work_folder(out) as folder:
        _write(source, folder, quiet)
    return TokenStore.open(out)


def _opened(out: Path, preparation: Preparation) -> TokenStore:
    """The store that lies there already, if it is the one that would be written now."""
    try:
        store = TokenStore.open(out)
    except DataError as error:
        raise DataError(f"{error}; to do so in the same place, delete the folder {out} first") from error
    record, wanted = store.record.get("preparation", {}), _record(preparation)
    other = ", ".join(f"{name}={record.get(name)}" for name in wanted if record.get(name) != wanted[name])
    if other:
        raise DataError(
            f"out={out}: must hold the store of the same preparation, or nothing; it was prepared with {other}; "
            f"choose another --out"
        )
    if change := first_change(store.record.get("files", []), preparation.files()):
        raise DataError(
            f"out={out}: must hold a store of the same files; {change} since it was prepared; choose another --out, "
            f"or delete this one"
        )
    return store


def _record(preparation: Preparation) -> dict[str, Any]:
    record = asdict(preparation)
    return {**record, "splits": list(record["splits"])}


def _write(preparation: Preparation, folder: Path, quiet: bool) -> None:
    files = file_states(preparation.files())
    dropped = _Dropped()
    num_chars = None
    if preparation.tokenizer.startswith("train:"):
        with _bar("reading", None, quiet) as bar:
            tokenizer = train_tokenizer(preparation.tokenizer, _train_documents(preparation, dropped, bar))
            num_chars = bar.n
    else:
        tokenizer = load_tokenizer(preparation.tokenizer)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    writer = _Writer(folder, tokenizer)
    with writer, _bar("tokenising", num_chars, quiet) as bar:
        for split, digest, document in assign(preparation, dropped):
            writer.add(split, digest, document)
            bar.update(len(document.text))
    record = {
        "format_version": FORMAT_VERSION,
        "preparation": _record(preparation),
        "files": files,
        "dropped": [{"name": domain, "reason": reason} for domain, reason in dropped.reasons.items()],
        "dtype": writer.dtype.name,
        "tokenizer": {
            "vocab_size": writer.vocab_size,
            "end_of_document": writer.end,
            "bytes": (folder / "tokenizer.json").stat().st_size,
            "sha256": sha256(folder / "tokenizer.json"),
        },
        "domains": writer.finish(),
    }
    write_json(folder / "corpus.json", record | {"fingerprint": fingerprint(record)})


def _train_documents(preparation: Preparation, dropped: Dropped, bar: Any) -> Iterator[Document]:
    """The documents of train; the bar counts all of them."""
    for split, _, document in assign(preparation, dropped):
        bar.update(len(document.text))
        if split == "train":
            yield document


class _Dropped:
    """Domains of "pocket" that are left out, and why; said once, however often the corpus is read."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def __call__(self, domain: str, reason: str) -> None:
        if domain not in self.reasons:
            _log.warning("pocket: domain '%s' is left out: %s", domain, reason)
            self.reasons[domain] = reason


class _Writer:
    """Appends encoded documents to one file per domain and split."""

    def __init__(self, folder: Path, tokenizer: "Tokenizer"):
        self.folder, self.tokenizer = folder, tokenizer
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1  # ids of added tokens may leave gaps
        self.dtype = token_dtype(self.vocab_size)
        self.end = end_of_document(tokenizer)
        self._stack = ExitStack()
        self._files: dict[tuple[str, str], BinaryIO] = {}
        self._tokens: dict[tuple[str, str], int] = {}
        self._hashes: dict[tuple[str, str], list[int]] = {}
        self._waiting: list[tuple[str, Document]] = []

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._flush()
        self._stack.close()

    def add(self, split: str, digest: int, document: Document) -> None:
        """Queue a document; documents are encoded by the batch, on all cores."""
        self._hashes.setdefault((document.domain, split), []).append(digest)
        self._waiting.append((split, document))
        if len(self._waiting) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        texts = [document.text for _, document in self._waiting]
        for (split, document), ids in zip(self._waiting, encode(self.tokenizer, texts, self.end), strict=True):
            key = (document.domain, split)
            if key not in self._files:
                path = self.folder / split / f"{len(self._files):04d}.part"
                path.parent.mkdir(exist_ok=True)
                self._files[key] = self._stack.enter_context(path.open("wb"))
            tokens = np.array([*ids, self.end], dtype=self.dtype)
            self._files[key].write(tokens.tobytes())
            self._tokens[key] = self._tokens.get(key, 0) + len(tokens)
        self._waiting = []

    def finish(self) -> list[dict[str, Any]]:
        """Name the files by domain, and describe them for `corpus.json`."""
        domains = sorted({domain for domain, _ in self._files})
        return [
            {"name": domain, "splits": {split: self._finish_file(index, domain, split) for split in SPLITS}}
            for index, domain in enumerate(domains)
        ]

    def _finish_file(self, index: int, domain: str, split: str) -> dict[str, Any]:
        stem = f"{split}/{index:02d}-{re.sub(r'[^A-Za-z0-9]+', '-', domain).strip('-').lower()}"
        tokens, documents = self.folder / f"{stem}.bin", self.folder / f"{stem}.documents"
        Path(self._files[domain, split].name).rename(tokens)
        hashes = np.array(sorted(self._hashes[domain, split]), dtype="<u8")
        documents.write_bytes(hashes.tobytes())
        return {
            "tokens": self._tokens[domain, split],
            "documents": len(hashes),
            "tokens_file": f"{stem}.bin",
            "tokens_bytes": tokens.stat().st_size,
            "tokens_sha256": sha256(tokens),
            "documents_file": f"{stem}.documents",
            "documents_bytes": documents.stat().st_size,
            "documents_sha256": sha256(documents),
        }


def _bar(label: str, total: int | None, quiet: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit="char", unit_scale=True, disable=quiet, dynamic_ncols=True)
