"""Writing so that nothing is lost: whole files or none, checksums, and state as JSON + safetensors.

No pickle is written or read here. A reader never sees a half-written file: the content goes to a temporary
name in the same folder, is synced, and is renamed over the old one.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from acodm_env.errors import DataError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "disk full", "read-only" and "permission denied" into a `DataError` that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{path}: disk full while writing; nothing half-written was left; free some space or choose another "
                f"--out, then run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise DataError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
        raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open `path` for writing; it appears, whole and synced, only if the block ends without an error."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            with suppress(FileNotFoundError):
                Path(name).unlink()
            raise


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises `DataError` with file, line and column if it is missing or malformed."""
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); it was edited or cut short") from error


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `path` only if the block ends without an error."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(path)
        old = _replaced(path)
        shutil.rmtree(old, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield fresh
            _sync(fresh)
            fresh.chmod(0o755)
            if path.exists():
                path.rename(old)
            fresh.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            recover_folder(path)
            shutil.rmtree(fresh, ignore_errors=True)
            raise


def recover_folder(path: str | Path) -> Path:
    """Put back what a kill between the two renames of `atomic_folder` left under another name; returns `path`."""
    path = Path(path)
    if not path.exists() and _replaced(path).exists():
        _replaced(path).rename(path)
    return path


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a nested dict of JSON values and numpy arrays as one safetensors file, atomically and exactly.

    Arrays become tensors named by their path ("sampler/carry"); the rest is JSON in the file's metadata, in
    which Python's shortest float representation is exact.
    """
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}
    tree = _split(state, "", arrays)
    with atomic_file(path) as file:
        file.write(save(arrays, metadata={"state": json.dumps(tree)}))


def read_state(path: str | Path) -> dict[str, Any]:
    """Read what `write_state` wrote. Raises `DataError` if the file is missing or not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            joined: dict[str, Any] = _join(json.loads(file.metadata()["state"]), arrays)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a whole state file ({error}); use an earlier checkpoint") from error
    return joined


def _split(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        while name in arrays:  # {"a/b": x} beside {"a": {"b": y}}
            name += "+"
        arrays[name] = np.ascontiguousarray(value)
        return {"__array__": name, "shape": list(value.shape)}
    if isinstance(value, Mapping):
        return {str(key): _split(child, f"{name}/{key}".lstrip("/"), arrays) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_split(child, f"{name}/{index}".lstrip("/"), arrays) for index, child in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    return value


def _join(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(value, dict):
        if "__array__" in value:
            return arrays[value["__array__"]].reshape(value["shape"])
        return {key: _join(child, arrays) for key, child in value.items()}
    if isinstance(value, list):
        return [_join(child, arrays) for child in value]
    return value
