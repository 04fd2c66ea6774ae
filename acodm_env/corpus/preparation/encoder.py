"""Tokenising in several processes, in order, without pickle: texts go in by a pipe, token ids come back.

Each worker is this module run as a program: it loads the tokenizer once, reads requests until its input ends, and
so ends with its parent, however that ends. A request is the number of texts, their lengths in bytes, and the texts
as UTF-8; the answer is the number of tokens of each, and the token ids in the store's type.
"""

import os
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from acodm_env.corpus.shards import token_dtype
from acodm_env.corpus.tokenizer import encode, end_of_document, load_tokenizer, vocab_size
from acodm_env.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Batch = TypeVar("Batch")


class Encoded(NamedTuple):
    """Documents as token ids."""

    lengths: NDArray[np.uint64]
    """Tokens of each document (n,), the end-of-document token included."""
    tokens: bytes
    """All token ids, one document after the other, in the store's type."""


class Encoder:
    """Encodes batches of texts, in this process or in `workers` others; the result is the same."""

    def __init__(self, tokenizer_file: Path, workers: int):
        """Start the workers.

        Args:
            tokenizer_file: the tokenizer.json.
            workers: processes; with fewer than 2 this one does the work.
        """
        self._local = _LocalEncoder(tokenizer_file) if workers < 2 else None
        self._workers = [_Worker(tokenizer_file) for _ in range(workers)] if workers > 1 else []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(max(1, workers))

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:  # those that wait for an answer get none, and end
            worker.stop()
        self._threads.shutdown(cancel_futures=True)

    def run(self, batches: Iterable[tuple[Batch, list[str]]]) -> Iterator[tuple[Batch, Encoded]]:
        """Encode the texts of every batch; batches come back in their order, a few are under way at a time.

        Raises:
            DataError: a worker ended, for instance for want of memory.
        """
        if self._local is not None:
            for batch, texts in batches:
                yield batch, self._local.encode(texts)
            return
        waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
        for batch, texts in batches:
            waiting.append((batch, self._threads.submit(self._encode, texts)))
            if len(waiting) > 2 * len(self._workers):
                yield _done(waiting)
        while waiting:
            yield _done(waiting)

    def _encode(self, texts: list[str]) -> Encoded:
        worker = self._idle.get()
        try:
            return worker.encode(texts)
        finally:
            self._idle.put(worker)


def _done(waiting: "deque[tuple[Batch, Future[Encoded]]]") -> tuple[Batch, Encoded]:
    batch, future = waiting.popleft()
    return batch, future.result()


class _LocalEncoder:
    """The work itself: texts in, token ids out."""

    def __init__(self, tokenizer_file: Path):
        self.tokenizer: Tokenizer = load_tokenizer(str(tokenizer_file))
        self.end = end_of_document(self.tokenizer)
        self.dtype = token_dtype(vocab_size(self.tokenizer))

    def encode(self, texts: list[str]) -> Encoded:
        parts = [np.array([*ids, self.end], dtype=self.dtype) for ids in encode(self.tokenizer, texts, self.end)]
        return Encoded(np.array([len(part) for part in parts], dtype=np.uint64), b"".join(map(bytes, parts)))


class _Worker:
    """A process that encodes; used by one thread at a time."""

    def __init__(self, tokenizer_file: Path):
        command = [sys.executable, "-m", "acodm_env.corpus.preparation.encoder", str(tokenizer_file)]
        environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def encode(self, texts: list[str]) -> Encoded:
        """Send texts, wait for their token ids."""
        requests, answers = self._process.stdin, self._process.stdout
        if requests is None or answers is None:
            raise AssertionError("both were asked for as pipes")
        encoded = [text.encode() for text in texts]
        try:
            lengths = np.array([len(text) for text in encoded], dtype=np.uint64)
            requests.write(b"".join([struct.pack("<Q", len(encoded)), lengths.tobytes(), *encoded]))
            requests.flush()
            return _read_answer(answers, len(texts))
        except (BrokenPipeError, EOFError, ValueError) as error:
            code = self._process.wait()
            raise DataError(
                f"tokenising: a worker process ended with status {code}; it may have run out of memory (a very long "
                f"document?); run the same command again, with fewer --workers, to go on from what was committed"
            ) from error

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _read_answer(pipe: IO[bytes], count: int) -> Encoded:
    num_bytes = struct.unpack("<Q", _exactly(pipe, 8))[0]
    lengths = np.frombuffer(_exactly(pipe, 8 * count), dtype=np.uint64)
    return Encoded(lengths, _exactly(pipe, num_bytes))


def _exactly(pipe: IO[bytes], num_bytes: int) -> bytes:
    content = pipe.read(num_bytes)
    if len(content) < num_bytes:
        raise EOFError
    return content


def _serve(tokenizer_file: Path, requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until they end."""
    encoder = _LocalEncoder(tokenizer_file)
    while head := requests.read(8):
        lengths = np.frombuffer(_exactly(requests, 8 * struct.unpack("<Q", head)[0]), dtype=np.uint64)
        texts = [_exactly(requests, int(length)).decode() for length in lengths]
        encoded = encoder.encode(texts)
        answers.write(struct.pack("<Q", len(encoded.tokens)) + encoded.lengths.tobytes() + encoded.tokens)
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    with suppress(BrokenPipeError, EOFError):
        _serve(Path(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
    os._exit(0)
