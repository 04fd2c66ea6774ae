import errno
import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from acodm_env.errors import DataError
from acodm_env.files import (
    atomic_file,
    atomic_folder,
    clear_leftovers,
    read_json,
    read_state,
    sha256,
    write_json,
    write_state,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def failing(code):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    return fail


# --- atomic writes -----------------------------------------------------------------------------------------


def test_file_appears_only_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_leaves_the_old_file_and_no_rubbish(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted():
        with atomic_file(path) as file:
            file.write(b"half of the n")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "disk full"), (errno.EDQUOT, "disk full"), (errno.EROFS, "cannot be written")],
)
def test_disk_errors_name_the_file_and_leave_the_old_one(tmp_path, monkeypatch, code, message):
    path = tmp_path / "file.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", failing(code))
    with pytest.raises(DataError, match=rf"file\.json: .*{message}"):
        write_json(path, {"new": 1})
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.json"]


def test_other_os_errors_are_not_dressed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_json(tmp_path / "file.json", {})


def test_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "folder"
    for content in ("first", "second"):
        with atomic_folder(path) as fresh:
            (fresh / content).write_text(content)
        assert names(path) == [content]
    assert names(tmp_path) == ["folder"]


def test_failure_leaves_the_old_folder(tmp_path):
    path = tmp_path / "folder"
    with atomic_folder(path) as fresh:
        (fresh / "old").write_text("old")

    def interrupted():
        with atomic_folder(path) as fresh:
            (fresh / "new").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_failure_between_the_two_renames_brings_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    with atomic_folder(path) as fresh:
        (fresh / "old").write_text("old")
    rename = Path.rename

    def no_second_rename(self, target):
        if Path(target) == path and not self.name.endswith(".old"):
            failing(errno.ENOSPC)()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", no_second_rename)
    with pytest.raises(DataError, match="disk full"), atomic_folder(path) as fresh:
        (fresh / "new").write_text("new")
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_a_file_system_that_does_not_sync_folders_is_good_enough(tmp_path, monkeypatch):
    sync = os.fsync

    def no_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            failing(errno.EINVAL)()
        sync(handle)

    monkeypatch.setattr(os, "fsync", no_folders)
    with atomic_folder(tmp_path / "folder") as fresh:
        write_json(fresh / "file.json", {})
    assert names(tmp_path / "folder") == ["file.json"]


def test_leftovers_go_and_what_was_replaced_comes_back(tmp_path):
    for name in (".step-1.abc", ".step-2.old", ".step-3.old", "step-3", "mine", ".step"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".step-4.xyz").write_text("half a file")
    clear_leftovers(tmp_path, "step-*")
    assert names(tmp_path) == [".step", "mine", "step-2", "step-3"]
    assert (tmp_path / "step-3" / "file").read_text() == "step-3"
    clear_leftovers(tmp_path / "nowhere", "step-*")


# --- JSON --------------------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"ü": "é"}}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value
    assert list(read_json(tmp_path / "file.json")) == ["b", "a"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_json_refuses_what_json_is_not(tmp_path, bad):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file.json", {"x": bad})
    assert names(tmp_path) == []


def test_missing_json(tmp_path):
    with pytest.raises(DataError, match=r"file\.json: no such file"):
        read_json(tmp_path / "file.json")


def test_malformed_json_names_file_line_and_column(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{\n  "a": 1,\n  "b": \n}')
    with pytest.raises(DataError, match=r"file\.json: not valid JSON .*line 4 column 1"):
        read_json(path)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match=r"file\.json: not valid JSON"):
        read_json(path)


def test_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- state -------------------------------------------------------------------------------------------------

STATE = {
    "arrays": {
        "float64": np.array([0.1, -0.0, np.nan, np.inf, 5e-324, 1 / 3]),
        "float32": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
        "int64": np.array([-(2**63), 2**63 - 1]),
        "uint16": np.array([0, 65535], dtype=np.uint16),
        "bool": np.array([True, False]),
        "scalar": np.array(0.1),
        "empty": np.zeros((0, 3)),
        "column": np.arange(12.0).reshape(3, 4)[:, 1],
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    },
    "list": [1, [np.array([1.0, 2.0]), {"x": np.array([3])}], "text", None, True],
    "big": 2**127 + 1,  # the state of a PCG64 generator
    "floats": [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0],
    "empty": {},
    "none": [],
    "ü/é": "ß",
}


def assert_equal(left, right):
    """Same types, dtypes, shapes and bits."""
    if isinstance(left, np.ndarray):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.tobytes() == right.tobytes()
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    elif isinstance(left, float):
        assert left.hex() == right.hex()
    else:
        assert type(left) is type(right)
        assert left == right


def test_state_round_trip_is_exact(tmp_path):
    write_state(tmp_path / "state.safetensors", STATE)
    assert_equal(STATE, read_state(tmp_path / "state.safetensors"))
    assert names(tmp_path) == ["state.safetensors"]


def test_state_is_a_safetensors_file_and_its_checksum_is_returned(tmp_path):
    from safetensors.numpy import load_file

    digest = write_state(tmp_path / "state", {"b": np.arange(3, dtype=np.int8), "a": {"c": np.array([[0.5, 1.5]])}})
    assert digest == sha256(tmp_path / "state")
    loaded = load_file(tmp_path / "state")
    assert {name: array.tolist() for name, array in loaded.items()} == {"b": [0, 1, 2], "a/c": [[0.5, 1.5]]}
    head = int.from_bytes((tmp_path / "state").read_bytes()[:8], "little")
    assert head % 8 == 0  # so that arrays may be mapped


def test_arrays_of_another_byte_order_or_kind(tmp_path):
    write_state(tmp_path / "state", {"x": np.array([1.5, -2.5], dtype=">f8")})
    assert read_state(tmp_path / "state")["x"].tolist() == [1.5, -2.5]
    with pytest.raises(TypeError, match="x: arrays of complex128 cannot be saved"):
        write_state(tmp_path / "other", {"x": np.array([1j])})
    assert names(tmp_path) == ["state"]


def test_state_without_arrays_and_empty_state(tmp_path):
    for state in ({}, {"step": 3}):
        write_state(tmp_path / "state", state)
        assert read_state(tmp_path / "state") == state


def test_numpy_scalars_and_tuples_become_plain(tmp_path):
    write_state(tmp_path / "state", {"a": np.float64(0.1), "b": np.int64(3), "c": np.bool_(True), "d": (1, 2)})
    assert_equal({"a": 0.1, "b": 3, "c": True, "d": [1, 2]}, read_state(tmp_path / "state"))


def test_keys_with_slashes_do_not_collide(tmp_path):
    state = {"a/b": np.array([1.0]), "a": {"b": np.array([2.0])}, "/a": {"b": np.array([3.0])}}
    write_state(tmp_path / "state", state)
    assert_equal(state, read_state(tmp_path / "state"))


def test_generator_goes_on_exactly(tmp_path):
    rng = np.random.default_rng(0)
    rng.normal(size=7)
    write_state(tmp_path / "state", {"rng": rng.bit_generator.state})
    other = np.random.default_rng(1)
    other.bit_generator.state = read_state(tmp_path / "state")["rng"]
    np.testing.assert_array_equal(other.normal(size=5), rng.normal(size=5))


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.6, 0.99])
def test_truncated_state_is_a_data_error(tmp_path, kept):
    path = tmp_path / "state.safetensors"
    write_state(path, STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(DataError, match=r"state\.safetensors: not a whole state file"):
        read_state(path)


def test_missing_or_foreign_state_is_a_data_error(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(DataError, match="state: not a whole state file"):
        read_state(tmp_path / "state")
    for metadata in (None, {"state": "{"}, {"state": json.dumps({"x": {"__array__": "y", "shape": [2]}})}):
        save_file({"x": np.zeros(2)}, tmp_path / "state", metadata=metadata)
        with pytest.raises(DataError, match="state: not a whole state file"):
            read_state(tmp_path / "state")


def test_failed_state_write_leaves_the_old_state(tmp_path, monkeypatch):
    write_state(tmp_path / "state", {"step": 1})
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(DataError, match="disk full"):
        write_state(tmp_path / "state", {"step": 2})
    assert read_state(tmp_path / "state") == {"step": 1}
