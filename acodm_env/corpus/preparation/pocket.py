"""The embedded corpus: real text harvested from the running Python installation. No download, nothing bundled.

Only the standard library and the installed files of acodm's core dependencies are read, never everything that
happens to lie in site-packages: two environments with the same core give the same corpus. The domains differ as
real domains do: some saturate (licences), some are mostly noise (manifests, arithmetic).

A folder under `ACODM_CACHE` (default ~/.cache/acodm) keeps the token store, named after everything it depends on;
a lock makes two processes that need it at once build it once.
"""

import hashlib
import logging
import re
import sysconfig
from collections.abc import Iterable, Iterator
from email.parser import Parser
from importlib import import_module
from pathlib import Path

import numpy as np

from acodm_env.corpus.document import Dropped
from acodm_env.corpus.preparation.installation import Package, below, core_distributions, standard_library

VERSION = 2
"""Raised whenever the harvest or its splits change, so that an older cached store is not taken for this one."""

DOMAINS = ("arithmetic", "headers", "licences", "manifests", "prose", "python", "structured", "stubs")
DOMAIN_CHARS = 3_000_000
"""Characters taken from a domain at most, evenly over its files."""
DOCUMENT_CHARS = 100_000
"""Characters taken from a file at most, its leading part."""
SMALLEST_CHARS = 200_000
"""A domain with fewer characters is dropped: 5 % of it would hold too few held-out sequences."""
SMALLEST_DOCUMENTS = 40
"""A domain with fewer documents is dropped: they could not be split three ways."""

PIECE_CHARS = 20_000
"""Manifests and structured files are few and long: they are cut at line ends into documents of this size."""

_HEADERS = {".h", ".hpp", ".hxx", ".cuh"}
_STRUCTURED = {".json", ".yaml", ".yml"}
_LICENCE = re.compile(r"(licen[cs]e|copying|notice|authors)", re.IGNORECASE)
_log = logging.getLogger(__name__)


def pocket_documents(on_dropped: Dropped | None = None) -> Iterator[tuple[str, str]]:
    """Yield (domain, text) in a fixed order, exact duplicates left out.

    Args:
        on_dropped: called for a domain that this installation lacks or has too little of; default: a warning.
    """
    seen: set[bytes] = set()
    packages = [Package(distribution) for distribution in core_distributions()]
    for domain in DOMAINS:
        documents = []
        for text in _harvest(domain, packages):
            digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                documents.append(text)
        num_chars = sum(map(len, documents))
        if num_chars < SMALLEST_CHARS or len(documents) < SMALLEST_DOCUMENTS:
            reason = f"only {num_chars} characters in {len(documents)} documents in this Python installation"
            (on_dropped or _warn)(domain, reason)
            continue
        yield from ((domain, text) for text in documents)


def _harvest(domain: str, packages: list[Package]) -> Iterator[str]:
    if domain == "arithmetic":
        return _arithmetic()
    if domain == "python":
        return _read(standard_library({".py"}))
    if domain == "headers":
        include = Path(sysconfig.get_paths()["include"])
        return _read([*below(include, _HEADERS), *_installed(packages, _HEADERS)])
    if domain == "stubs":
        return _read(_installed(packages, {".pyi"}))
    if domain == "licences":
        own = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
        return _read([*([own] if own.is_file() else []), *_licences(packages)])
    if domain == "prose":
        return _evenly([*_topics(), *_descriptions(packages)])
    if domain == "manifests":
        return _evenly([piece for package in packages for piece in _pieces(_manifest(package))])
    texts = (_text(path) for path in _installed(packages, _STRUCTURED))
    return _evenly([piece for text in texts if text for piece in _pieces(text)])


def _warn(domain: str, reason: str) -> None:
    _log.warning("pocket: domain '%s' is left out: %s", domain, reason)


def _installed(packages: Iterable[Package], endings: set[str]) -> list[Path]:
    return [path for package in packages for path in package.files if path.suffix in endings]


def _licences(packages: Iterable[Package]) -> list[Path]:
    allowed = {"", ".txt", ".md", ".rst"}
    paths = (path for package in packages for path in package.files if _LICENCE.match(path.stem))
    return [path for path in paths if path.suffix in allowed or path.suffix[1:].isupper()]


def _topics() -> list[str]:
    """Python's own reference, one document per topic."""
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return [topics[name] for name in sorted(topics)]


def _descriptions(packages: Iterable[Package]) -> list[str]:
    """The packages' descriptions and the readable files among theirs."""
    bodies, prose = [], []
    for package in packages:
        bodies.append(Parser().parsestr(package.read("METADATA")).get_payload())
        prose += [path for path in package.files if path.suffix in {".md", ".rst"}]
    texts = [_text(path, DOCUMENT_CHARS) for path in prose if not _LICENCE.match(path.stem)]
    return [body for body in bodies if isinstance(body, str)] + [text for text in texts if text]


def _manifest(package: Package) -> str:
    """Paths, hashes and sizes; without lines that depend on the installer or on where Python lies."""
    lines = package.read("RECORD").splitlines()
    kept = [line for line in lines if not line.startswith("..") and ".pyc," not in line and ".dist-info/" not in line]
    return "\n".join(sorted(kept)) + "\n"


def _pieces(text: str) -> Iterator[str]:
    """Consecutive parts of a text, cut at line ends where there are any."""
    start = 0
    while start < len(text):
        end = min(start + PIECE_CHARS, len(text))
        cut = text.rfind("\n", start, end) + 1 if end < len(text) else end
        end = cut if cut > start else end
        yield text[start:end]
        start = end


def _text(path: Path, num_chars: int = 2_000_000) -> str | None:
    """The leading part of a file, or None if it is not readable text."""
    try:
        with path.open(encoding="utf-8", newline=None) as file:
            return file.read(num_chars)
    except (OSError, UnicodeDecodeError):
        return None


def _read(paths: Iterable[Path]) -> Iterator[str]:
    """Texts of files taken evenly from the list, about `DOMAIN_CHARS` in all; unreadable ones are skipped."""
    sized = []
    for path in paths:
        try:
            sized.append((path, min(path.stat().st_size, DOCUMENT_CHARS)))
        except OSError:
            continue
    chosen = evenly([size for _, size in sized], DOMAIN_CHARS)
    texts = (_text(sized[index][0], DOCUMENT_CHARS) for index in chosen)
    return (text for text in texts if text)


def _evenly(texts: list[str]) -> Iterator[str]:
    pieces = [text[:DOCUMENT_CHARS] for text in texts]
    return (pieces[index] for index in evenly([len(piece) for piece in pieces], DOMAIN_CHARS))


def evenly(sizes: list[int], budget: int) -> list[int]:
    """Indices of items taken evenly from a list until their sizes sum to about `budget`."""
    share = min(1.0, budget / max(sum(sizes), 1))
    chosen, passed, taken = [], 0, 0
    for index, size in enumerate(sizes):
        passed += size
        if taken + size <= passed * share + size * (1 - share) / 2:
            chosen.append(index)
            taken += size
    return chosen


def _arithmetic() -> Iterator[str]:
    """Sums, differences, products and quotients of random numbers, always the same ones."""
    rng = np.random.default_rng(20250529)
    num_lines, per_document = 150_000, 100
    digits = rng.integers(1, 6, size=(num_lines, 2))
    operands = (rng.random((num_lines, 2)) * 10**digits).astype(np.int64) + 1
    operators = rng.integers(4, size=num_lines)
    lines = [_equation(int(a), int(b), int(op)) for (a, b), op in zip(operands, operators, strict=True)]
    return ("\n".join(lines[start : start + per_document]) + "\n" for start in range(0, num_lines, per_document))


def _equation(a: int, b: int, operator: int) -> str:
    if operator == 3:
        return f"{a} / {b} = {a // b} remainder {a % b}"
    result = (a + b, a - b, a * b)[operator]
    return f"{a} {'+-*'[operator]} {b} = {result}"
