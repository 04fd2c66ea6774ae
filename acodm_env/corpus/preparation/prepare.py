"""From documents to a token store: splits, tokenizer, encoding in several processes, shards, a journal.

Documents are read one at a time, encoded by the batch and appended, in their order, so that memory does not grow
with the corpus; every few seconds the position is committed (`staging`). A preparation that was killed, ran out of
disk or lost its network goes on from there when the same command is given again, and ends with the same bytes.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from acodm_env.corpus.document import Document
from acodm_env.corpus.preparation.encoder import Encoded, Encoder
from acodm_env.corpus.preparation.progress import Progress
from acodm_env.corpus.preparation.settings import Inputs, Preparation
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.preparation.splits import Assigned, Assignment, Plan, assign, sample
from acodm_env.corpus.preparation.staging import FILES, Workplace, file_states, first_change, remove_leftover
from acodm_env.corpus.shards import ShardWriter, token_dtype
from acodm_env.corpus.tokenizer import end_of_document, load_tokenizer, train_tokenizer, vocab_size
from acodm_env.corpus.tokens import FORMAT_VERSION, TokenStore, fingerprint
from acodm_env.errors import ConfigError, DataError
from acodm_env.files import atomic_file, disk_errors, read_json, sha256, write_json

__all__ = ["Preparation", "prepare"]

WORKERS_BYTES = 16_000_000
"""Less text than this is encoded by one process: starting others would take longer."""
MOST_WORKERS = 24
"""Workers by default at most: each takes memory of its own, and one process reads for all."""
_BATCH_DOCUMENTS = 512
_BATCH_CHARS = 1 << 18
_log = logging.getLogger(__name__)


def prepare(
    source: str | Preparation,
    out: str | Path,
    *,
    tokenizer: str = "train:2048",
    workers: int | None = None,
    quiet: bool = True,
) -> TokenStore:
    """Write a token store to `out`; the same preparation again opens it, or goes on where it was interrupted.

    Args:
        source: what to prepare; a name alone takes all defaults and `tokenizer`.
        out: the folder; it must not exist, or be empty, or hold the same preparation. A link is followed.
        tokenizer: see `Preparation`.
        workers: processes that tokenise, default one per core, at most 24; the result does not depend on it.
        quiet: no progress bar.

    Raises:
        ConfigError: shares, tokenizer or workers make no sense.
        DataError: the source cannot be read, a domain is empty or missing in a split, splits overlap, `out` holds
            something else or is a mount point, another preparation of it was begun, or the disk is full.
    """
    if isinstance(source, str):
        source = Preparation(source=Source(name=source), tokenizer=tokenizer)
    if workers is not None and workers < 1:
        raise ConfigError(f"workers={workers}: must be at least 1 process")
    out = Path(out).expanduser().resolve()
    with disk_errors(out):
        if (out / "corpus.json").exists():
            remove_leftover(out)
            return _opened(out, source.inputs())
        _check_out(out)
        inputs = source.inputs()
        with Workplace(out) as place:
            if (out / "corpus.json").exists():  # another process was faster
                return _opened(out, inputs)
            _write(inputs, place, workers or _default_workers(), quiet)
    return TokenStore.open(out)


def _check_out(out: Path) -> None:
    """Whether a store can appear at `out` by a rename: better said now than after hours."""
    if any(parent.exists() and not parent.is_dir() for parent in out.parents):
        raise DataError(f"out={out}: must lie in a folder; a part of the path is a file; choose another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"out={out}: must not exist, be an empty folder, or hold the store of the same preparation; it holds "
            f"something else; choose another --out"
        )
    if os.path.ismount(out):
        raise DataError(
            f"out={out}: must not be a mount point; a store appears by a rename; name a folder inside it, {out}/NAME"
        )


def _default_workers() -> int:
    """One per core that this process may use, up to `MOST_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def _opened(out: Path, inputs: Inputs) -> TokenStore:
    """The store that lies there already, if it is the one that would be written now."""
    try:
        store = TokenStore.open(out)
    except DataError as error:
        raise DataError(f"{error}; to do so in the same place, delete the folder {out} first") from error
    record, wanted = store.record.get("preparation", {}), inputs.preparation.record()
    other = ", ".join(f"{name}={record.get(name)}" for name in wanted if record.get(name) != wanted[name])
    if other:
        raise DataError(
            f"out={out}: must hold the store of the same preparation, or nothing; it was prepared with {other}; "
            f"choose another --out"
        )
    files = read_json(out / FILES) if (out / FILES).exists() else store.record.get("files", [])  # it stood there once
    if change := first_change(files, inputs.all_files()):
        raise DataError(
            f"out={out}: must hold a store of the same files; {change} since it was prepared; choose another --out, "
            f"or delete this one"
        )
    return store


def _write(inputs: Inputs, place: Workplace, workers: int, quiet: bool) -> None:
    preparation, files = inputs.preparation, inputs.all_files()
    place.resume(preparation.record(), files)
    inputs = inputs.at_revisions(place.journal.get("revisions"))
    dropped, file, plan = _Dropped(), place.store / "tokenizer.json", None
    if not place.journal:
        write_json(place.store / FILES, file_states(files, whole=inputs.balanced()))
        plan = _write_tokenizer(inputs, file, dropped, quiet)
        place.commit(preparation=preparation.record(), revisions=inputs.revisions, **_tokenizer_record(file))
    dtype = np.dtype(place.journal["dtype"])
    writer = ShardWriter(place.store, dtype, preparation.shard_bytes, place.journal.get("written"))
    position = place.journal.get("position")
    assignment = assign(inputs, dropped, position, _held_out(position, preparation, writer), plan)
    text_bytes = inputs.text_bytes()
    if preparation.source.name == "pocket" or (text_bytes is not None and text_bytes < WORKERS_BYTES):
        workers = 1
    _encode_all(assignment, writer, place, workers, Progress(inputs, assignment, writer, quiet))
    try:
        assignment.finish()
    except DataError:
        place.forget()  # no command could go on from it
        raise
    left_out = assignment.census.left_out
    record = {
        "format_version": FORMAT_VERSION,
        "preparation": preparation.record(),
        "revisions": dict(inputs.revisions),
        "dtype": place.journal["dtype"],
        "tokenizer": place.journal["tokenizer"],
        "dropped": [{"name": domain, "reason": reason} for domain, reason in dropped.reasons.items()],
        "left_out": [{"from": late, "since_in": early, "documents": n} for (early, late), n in left_out.items()],
        "domains": writer.finish(),
    }
    write_json(place.store / "corpus.json", record | {"fingerprint": fingerprint(record)})
    place.publish()


def _tokenizer_record(file: Path) -> dict[str, Any]:
    """What corpus.json says of the tokenizer, and the type of its ids."""
    tokenizer = load_tokenizer(str(file))
    size = vocab_size(tokenizer)
    entry = {"vocab_size": size, "end_of_document": end_of_document(tokenizer)}
    return {
        "dtype": token_dtype(size).name,
        "tokenizer": {**entry, "bytes": file.stat().st_size, "sha256": sha256(file)},
    }


def _write_tokenizer(inputs: Inputs, file: Path, dropped: "_Dropped", quiet: bool) -> Plan | None:
    """Load the tokenizer, or train it: on all train documents of a small source, on a sample of a large one.

    Returns:
        The plan of the splits where one was made.
    """
    setting, plan = inputs.preparation.tokenizer, None
    if not setting.startswith("train:"):
        tokenizer = load_tokenizer(setting)
    elif inputs.balanced():
        assignment = assign(inputs, dropped)
        with Progress(inputs, assignment, None, quiet) as progress:
            tokenizer = train_tokenizer(setting, _train_documents(assignment, progress))
        plan = assignment.plan
    else:
        tokenizer = train_tokenizer(setting, sample(inputs))
    with atomic_file(file) as content:
        content.write(tokenizer.to_str(pretty=True).encode())
    return plan


def _train_documents(assignment: Assignment, progress: "Progress") -> Iterator[Document]:
    for split, _, document in assignment:
        progress.show(len(document.text))
        if split == "train":
            yield document
    assignment.finish()


def _held_out(position: dict[str, Any] | None, preparation: Preparation, writer: ShardWriter) -> dict[str, np.ndarray]:
    """Hashes of the documents that were written from the user's own validation and test, and from the targets."""
    counted = ((position or {}).get("census") or {}).get("texts", [])
    targets = {domain for given_as, domain, _ in counted if given_as == "targets"}
    files: dict[str, list[Path]] = {}
    for split in ("validation", "test"):
        for domain, file in writer.documents_of(split).items():
            if domain in targets or split in preparation.sources():
                files.setdefault("targets" if domain in targets else split, []).append(file)
    return {name: np.concatenate([np.fromfile(file, dtype=np.uint64) for file in of]) for name, of in files.items()}


class _Batch(NamedTuple):
    """Documents that are encoded together."""

    documents: list[Assigned]
    position: dict[str, Any] | None
    """Where to go on after them; None after the last, which is never gone on from."""


def _batches(assignment: Assignment) -> Iterator[tuple[_Batch, list[str]]]:
    """Batches with their texts."""
    documents: list[Assigned] = []
    num_chars = 0
    for assigned in assignment:
        documents.append(assigned)
        num_chars += len(assigned.document.text)
        if len(documents) >= _BATCH_DOCUMENTS or num_chars >= _BATCH_CHARS:
            yield _Batch(documents, assignment.state()), [item.document.text for item in documents]
            documents, num_chars = [], 0
    if documents:
        yield _Batch(documents, None), [item.document.text for item in documents]


def _encode_all(
    assignment: Assignment, writer: ShardWriter, place: Workplace, workers: int, progress: "Progress"
) -> None:
    with Encoder(place.store / "tokenizer.json", workers) as encoder, progress:
        for batch, encoded in encoder.run(_batches(assignment)):
            _append(writer, batch.documents, encoded)
            progress.show(sum(len(item.document.text) for item in batch.documents))
            if batch.position is not None and place.due():
                place.commit(written=writer.state(), position=batch.position)


def _append(writer: ShardWriter, documents: list[Assigned], encoded: Encoded) -> None:
    """Append a batch's documents, those of one domain and split together."""
    ends = np.cumsum(encoded.lengths) * writer.dtype.itemsize
    groups: dict[tuple[str, str], list[int]] = {}
    for index, item in enumerate(documents):
        groups.setdefault((item.document.domain, item.split), []).append(index)
    for (domain, split), members in groups.items():
        parts = [encoded.tokens[int(ends[index - 1]) if index else 0 : int(ends[index])] for index in members]
        writer.append(domain, split, [documents[index].digest for index in members], b"".join(parts))


class _Dropped:
    """Domains of "pocket" that are left out, and why; said once, however often the corpus is read."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def __call__(self, domain: str, reason: str) -> None:
        if domain not in self.reasons:
            _log.warning("pocket: domain '%s' is left out: %s", domain, reason)
            self.reasons[domain] = reason
