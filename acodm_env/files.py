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

_KINDS = {
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("float", "int", "uint") for bits in (8, 16, 32, 64)},
    "bool": "BOOL",
}
"""numpy's names of types in safetensors' words."""


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
            _sync(path.parent)
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
            for inside in (*fresh.rglob("*"), fresh):
                _sync(inside)
            fresh.chmod(0o755)
            if path.exists():
                path.rename(old)
            fresh.rename(path)
            _sync(path.parent)
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


def clear_leftovers(folder: str | Path, pattern: str) -> None:
    """Remove what a kill left half-written in `folder`, of names that match `pattern`; put back what was replaced.

    Only for who knows that nobody writes there.
    """
    for left in [*Path(folder).glob(f".{pattern}.old"), *Path(folder).glob(f".{pattern}.*")]:
        if left.suffix == ".old":
            recover_folder(left.with_name(left.stem[1:]))
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not sync folders
            raise
    finally:
        os.close(handle)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_state(path: str | Path, state: Mapping[str, Any]) -> str:
    """Write a nested dict of JSON values and numpy arrays as one safetensors file, atomically and exactly.

    Arrays become tensors named by their path ("sampler/carry"); the rest is JSON in the file's metadata, in
    which Python's shortest float representation is exact. Arrays are written one after the other: no second copy
    of a large state is made.

    Returns:
        SHA-256 of the file.
    """
    arrays: dict[str, np.ndarray] = {}
    tree = _split(state, "", arrays)
    return write_arrays(path, arrays, {"state": json.dumps(tree)})


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Write named arrays as a safetensors file, atomically, without a copy of them; returns the file's SHA-256."""
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        for part in _safetensors(arrays, metadata):
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def _safetensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Iterator[Any]:
    """A safetensors file in parts: length of the header, header, arrays; wide ones first, so that all are aligned.

    Source: https://github.com/huggingface/safetensors#format.
    """
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        array = arrays[name]
        kind = _KINDS.get(array.dtype.name)
        if kind is None:
            raise TypeError(f"{name}: arrays of {array.dtype} cannot be saved")
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        if arrays[name].nbytes:
            yield arrays[name].reshape(-1).view(np.uint8).data


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
        arrays[name] = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))
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
