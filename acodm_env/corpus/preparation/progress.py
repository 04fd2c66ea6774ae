"""How far a preparation is: bytes of the source, tokens per second, time left."""

import time
from typing import Any

from acodm_env.corpus.preparation.settings import Inputs
from acodm_env.corpus.preparation.splits import Assignment
from acodm_env.corpus.shards import ShardWriter


class Progress:
    """A bar over the bytes of the source files, or over characters where there are none; a context manager."""

    def __init__(self, inputs: Inputs, assignment: Assignment, writer: ShardWriter | None, quiet: bool):
        self._assignment, self._writer, self._quiet = assignment, writer, quiet
        self._total = sum(file.stat().st_size for file in inputs.source_files()) or None
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        from tqdm import tqdm

        self._start = time.monotonic()
        self._tokens = self._writer.tokens if self._writer else 0
        self._bar = tqdm(
            desc="tokenising" if self._writer else "reading",
            total=self._total,
            initial=self._assignment.bytes_read() or 0,
            unit="B" if self._total else "char",
            unit_scale=True,
            disable=self._quiet,
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None and self._total:
            self._bar.update(self._total - self._bar.n)
        self._bar.close()

    def show(self, num_chars: int) -> None:
        """After so many characters more."""
        if self._quiet:
            return
        read = self._assignment.bytes_read()
        if self._writer is not None:
            rate = (self._writer.tokens - self._tokens) / max(time.monotonic() - self._start, 1e-9)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(num_chars if not self._total or read is None else read - self._bar.n)
