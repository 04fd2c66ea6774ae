"""Which files of the running Python installation count: the standard library and acodm's core dependencies.

Never everything in site-packages: two environments with the same core must give the same corpus.
"""

import re
import sysconfig
from importlib import metadata
from pathlib import Path

CORE = (
    *("accelerate", "datasets", "filelock", "gymnasium", "jsonargparse", "matplotlib", "numpy", "pyyaml"),
    *(
        "safetensors",
        "scipy",
        "stable-baselines3",
        "tokenizers",
        "torch",
        "tqdm",
        "transformers",
        "zstandard",
    ),
)
"""The core dependencies, for a source tree that was never installed; a test compares them with the metadata."""


class Package:
    """An installed distribution and its files, in the order of their relative names, wherever they lie."""

    def __init__(self, distribution: metadata.Distribution):
        self.distribution = distribution
        names = sorted(str(name) for name in distribution.files or [])
        root = str(distribution.locate_file(""))
        self.files = [Path(root, name) for name in names if not name.startswith("..") and not name.endswith(".pyc")]

    def read(self, name: str) -> str:
        """A file of the distribution's metadata, or nothing."""
        return self.distribution.read_text(name) or ""


def core_distributions() -> list[metadata.Distribution]:
    """The installed core dependencies and what they need in turn, extras left out, sorted by name."""
    try:
        pending = _requirements(metadata.distribution("acodm"))
    except metadata.PackageNotFoundError:
        pending = list(CORE)
    found: dict[str, metadata.Distribution] = {}
    missing = {"acodm"}  # its own files change with every checkout
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in found or name in missing:
            continue
        try:
            found[name] = metadata.distribution(name)
            pending += _requirements(found[name])
        except metadata.PackageNotFoundError:  # for another platform or Python version
            missing.add(name)
    return [found[name] for name in sorted(found)]


def _requirements(distribution: metadata.Distribution) -> list[str]:
    """Names of what a distribution needs without any of its extras."""
    names = []
    for requirement in distribution.requires or []:
        spec, _, marker = requirement.partition(";")
        name = re.match(r"[A-Za-z0-9._-]+", spec.strip())
        if name and not re.search(r"\bextra\b", marker):
            names.append(name.group())
    return names


def standard_library(endings: set[str]) -> list[Path]:
    """Files of the standard library; its tests and what others installed are no part of it."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in below(root, endings) if not skipped.intersection(path.relative_to(root).parts)]


def below(root: Path, endings: set[str]) -> list[Path]:
    """Files under a folder with one of the endings, in the order of their relative names."""
    files = [path for path in root.rglob("*") if path.suffix in endings and path.is_file()]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())
