"""How every command speaks: results to standard output, progress and its forecast to standard error."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm


def say(text: str = "") -> None:
    """One line of result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """A remark that is no result: to standard error, so that a pipe does not carry it."""
    sys.stderr.write(text + "\n")


def progress(total: int, label: str, *, quiet: bool, done: int = 0, unit: str = "step") -> "tqdm[Any]":
    """A bar with the time left; silent when `quiet`."""
    return tqdm(total=total, initial=done, desc=label, unit=unit, disable=quiet, dynamic_ncols=True, smoothing=0.1)


def listing(rows: Iterable[tuple[str, object]]) -> str:
    """Aligned "name  value" lines."""
    pairs = [(name, str(value)) for name, value in rows]
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in pairs)


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, the first and every worded one to the left."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([texts[0], "  ".join("-" * width for width in widths), *texts[1:]])
