"""From documents to a token store: splits, tokenizer, encoding, checksums."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from acodm_env.corpus.sources import Document, Source
from acodm_env.corpus.tokenizer import END_OF_DOCUMENT, load_tokenizer, train_tokenizer
from acodm_env.corpus.tokens import FORMAT_VERSION, SPLITS, TokenStore, fingerprint
from acodm_env.errors import ConfigError, DataError
from acodm_env.files import atomic_folder, sha256, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BATCH = 256  # documents encoded at a time


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
        if len(self.splits) != 3 or min(self.splits) < 0 or abs(sum(self.splits) - 1) > 1e-6:
            raise ConfigError(f"splits={self.splits}: must be three shares of train, validation, test that sum to 1")


@dataclass
class _Splitter:
    """Assigns documents to splits: each goes where its domain is furthest behind its share, in characters.

    So every split of even a small domain gets its part, spread evenly over the source. A repeated document follows
    its first copy, and so no document stands in two splits.
    """

    shares: dict[str, float]
    reserved: dict[int, str]
    """Hashes of documents that the user put into validation or test, and where."""
    _done: dict[str, dict[str, float]] = field(default_factory=dict)
    _seen: dict[int, str] = field(default_factory=dict)

    def assign(self, document: Document) -> tuple[str, int]:
        """Split and hash of a document.

        Raises:
            DataError: the user's own validation or test files hold it too.
        """
        digest = document_hash(document.text)
        if digest in self.reserved:
            raise DataError(
                f"{self.reserved[digest]}: holds a document that stands in the source too "
                f"({document.domain}: {document.text[:60]!r}); remove it from one of them"
            )
        if digest not in self._seen:
            done = self._done.setdefault(document.domain, dict.fromkeys(self.shares, 0.0))
            total = sum(done.values()) + len(document.text)
            split = max(self.shares, key=lambda name: self.shares[name] * total - done[name])
            done[split] += len(document.text)
            self._seen[digest] = split
        return self._seen[digest], digest


def document_hash(text: str) -> int:
    """64-bit hash of a document's text."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


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
    if (out / "corpus.json").exists():
        store = TokenStore.open(out)
        if store.record["preparation"] != _record(source):
            raise DataError(f"out={out}: already holds a store prepared otherwise; choose another folder")
        return store
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"out={out}: already holds other files; choose another folder")
    with atomic_folder(out) as folder:
        _write(source, folder, quiet)
    return TokenStore.open(out)


def _record(preparation: Preparation) -> dict[str, Any]:
    record = asdict(preparation)
    return {**record, "splits": list(record["splits"])}


def _write(preparation: Preparation, folder: Path, quiet: bool) -> None:
    total = None
    if preparation.tokenizer.startswith("train:"):
        train_only = (document for split, _, document in _assigned(preparation) if split == "train")
        tokenizer, total = train_tokenizer(preparation.tokenizer, train_only, quiet)
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        tokenizer = load_tokenizer(preparation.tokenizer)
        tokenizer.save(str(folder / "tokenizer.json"))
    writer = _Writer(folder, tokenizer)
    with writer, _bar(total, quiet) as bar:
        for split, digest, document in _assigned(preparation):
            writer.add(split, digest, document)
            bar.update(len(document.text))
    record = {
        "format_version": FORMAT_VERSION,
        "preparation": _record(preparation),
        "dtype": writer.dtype,
        "tokenizer": {
            "vocab_size": tokenizer.get_vocab_size(),
            "end_of_document": writer.end,
            "bytes": (folder / "tokenizer.json").stat().st_size,
            "sha256": sha256(folder / "tokenizer.json"),
        },
        "domains": writer.finish(),
    }
    write_json(folder / "corpus.json", record | {"fingerprint": fingerprint(record)})


def _assigned(preparation: Preparation) -> Iterator[tuple[str, int, Document]]:
    """Every document with its split and hash: the user's own validation and test first, then the source."""
    reserved: dict[int, str] = {}
    own = {"validation": preparation.validation, "test": preparation.test}
    for split, given in own.items():
        for document in given.documents() if given else ():
            digest = document_hash(document.text)
            if reserved.setdefault(digest, f"{split}={given.name if given else ''}").split("=")[0] != split:
                raise DataError(f"test={given.name if given else ''}: holds a document of the validation files too")
            yield split, digest, document
    splitter = _Splitter(_shares(preparation), reserved)
    for document in preparation.source.documents():
        split, digest = splitter.assign(document)
        yield split, digest, document


def _shares(preparation: Preparation) -> dict[str, float]:
    """Shares of the splits that are cut out of the source, summing to 1."""
    given = {"validation": preparation.validation, "test": preparation.test}
    shares = {s: share for s, share in zip(SPLITS, preparation.splits, strict=True) if not given.get(s) and share > 0}
    total = sum(shares.values())
    if total <= 0:
        raise ConfigError(f"splits={preparation.splits}: leaves nothing of the source for training")
    return {name: share / total for name, share in shares.items()}


class _Writer:
    """Appends encoded documents to one file per domain and split."""

    def __init__(self, folder: Path, tokenizer: "Tokenizer"):
        self.folder, self.tokenizer = folder, tokenizer
        self.dtype = "uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32"
        end = tokenizer.token_to_id(END_OF_DOCUMENT)
        self.end = end if end is not None else _end_token(tokenizer)
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
        encodings = self.tokenizer.encode_batch_fast([d.text for _, d in self._waiting], add_special_tokens=False)
        for (split, document), encoding in zip(self._waiting, encodings, strict=True):
            key = (document.domain, split)
            if key not in self._files:
                path = self.folder / split / f"{len(self._files):04d}.part"
                path.parent.mkdir(exist_ok=True)
                self._files[key] = self._stack.enter_context(path.open("wb"))
            tokens = np.array([*encoding.ids, self.end], dtype=self.dtype)
            self._files[key].write(tokens.tobytes())
            self._tokens[key] = self._tokens.get(key, 0) + len(tokens)
        self._waiting = []

    def finish(self) -> list[dict[str, Any]]:
        """Name the files by domain, and describe them for `corpus.json`.

        Raises:
            DataError: no document at all, or a domain that a split lacks.
        """
        domains = sorted({domain for domain, _ in self._files})
        if not domains:
            raise DataError("source: holds no documents")
        for domain in domains:
            for split in SPLITS:
                if not self._tokens.get((domain, split)):
                    raise DataError(
                        f"domain={domain}: has no documents in {split}; give {split} a larger share with --splits, "
                        f"add documents, or leave the domain out"
                    )
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


def _end_token(tokenizer: "Tokenizer") -> int:
    for name in ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"):
        if (token := tokenizer.token_to_id(name)) is not None:
            return int(token)
    raise ConfigError("tokenizer: has no end-of-text token (<|endoftext|>, </s>, <eos>); add one or use train:N")


def _bar(total: int | None, quiet: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="tokenising", unit="char", unit_scale=True, disable=quiet, dynamic_ncols=True)
