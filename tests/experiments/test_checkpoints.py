"""Checkpoints: whole or absent, which one is taken, which stay, and what is said when something is wrong."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from acodm_env import files
from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.run.checkpoints import MANIFEST, STATE, Checkpoints
from acodm_env.files import read_json, write_json

IDENTITY = {"target": "tiny", "seed": 0}


def state(step):
    return {"trainer": {"step": step, "weights": np.arange(1000.0) * step}}


def filled(folder, steps=(10, 20, 30), keep=3):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.write(step, state(step), IDENTITY, world=2)
    return checkpoints


def full_disk(monkeypatch, after=0):
    """The disk is full after so many parts of a state file."""
    parts = files._safetensors

    def some(*arguments):
        for index, part in enumerate(parts(*arguments)):
            if index == after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield part

    monkeypatch.setattr(files, "_safetensors", some)


def test_newest_is_read_with_what_it_is(tmp_path):
    found = filled(tmp_path).newest()
    assert (found.step, found.world, found.identity, found.skipped) == (30, 2, IDENTITY, ())
    assert found.path == tmp_path / "step-00000030"
    np.testing.assert_equal(found.state, state(30))
    manifest = read_json(found.path / MANIFEST)
    assert manifest["files"][STATE]["sha256"] == files.sha256(found.path / STATE)
    assert manifest["versions"]["numpy"] == np.__version__


def test_none_yet(tmp_path):
    assert Checkpoints(tmp_path / "checkpoints").newest() is None
    assert Checkpoints(tmp_path / "checkpoints").last() is None


def test_keep(tmp_path):
    checkpoints = filled(tmp_path, (10, 20, 30, 40), keep=2)
    assert checkpoints.steps() == [30, 40]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000030", "step-00000040"]
    with pytest.raises(ConfigError, match="keep=0: must be at least 1"):
        Checkpoints(tmp_path, 0)


def cut(folder):
    data = (folder / STATE).read_bytes()
    (folder / STATE).write_bytes(data[: len(data) // 2])


def flip(folder):
    data = bytearray((folder / STATE).read_bytes())
    data[-1] ^= 1
    (folder / STATE).write_bytes(data)


DAMAGE = {
    "cut short": (cut, r"state\.safetensors was cut short \(\d+ of \d+ bytes\)"),
    "gone": (lambda folder: (folder / STATE).unlink(), r"was cut short \(0 of"),
    "flipped": (flip, r"was edited or damaged \(checksum\)"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), r"manifest\.json: no such file"),
    "half a manifest": (lambda folder: (folder / MANIFEST).write_text('{"step": 3'), "not valid JSON"),
    "another's manifest": (lambda folder: write_json(folder / MANIFEST, {"files": []}), "is not a checkpoint's"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_one_that_is_not_whole_is_skipped_with_its_reason(tmp_path, kind):
    damage, reason = DAMAGE[kind]
    checkpoints = filled(tmp_path)
    damage(tmp_path / "step-00000030")
    found = checkpoints.newest()
    assert found.step == 20
    assert len(found.skipped) == 1
    with pytest.raises(AssertionError, match=rf"step-00000030: .*{reason}"):
        raise AssertionError(found.skipped[0])


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    checkpoints = filled(tmp_path, keep=3)
    cut(tmp_path / "step-00000030")
    checkpoints.keep = 2
    checkpoints.write(40, state(40), IDENTITY)
    assert checkpoints.steps() == [20, 30, 40]
    assert checkpoints.last() == tmp_path / "step-00000040"


def test_a_damaged_newer_one_neither_counts_as_kept_nor_is_the_last(tmp_path):
    """It has its full size, and its step is above that of the next write."""
    checkpoints = filled(tmp_path, (20, 30), keep=1 + 1)
    flip(tmp_path / "step-00000030")
    assert checkpoints.last() == tmp_path / "step-00000020"
    checkpoints.keep = 1
    checkpoints.write(25, state(25), IDENTITY)
    assert checkpoints.steps() == [25, 30]
    found = checkpoints.newest()
    assert found.step == 25
    assert found.skipped[0].endswith("(checksum); put aside as damaged-step-00000030")
    assert checkpoints.steps() == [25]
    assert (tmp_path / "damaged-step-00000030" / STATE).exists()
    checkpoints.write(30, state(30), IDENTITY)
    flip(tmp_path / "step-00000030")
    with pytest.raises(DataError, match="must hold a whole checkpoint"):
        checkpoints.newest()
    assert checkpoints.last() is None


def test_none_whole_is_refused_rather_than_begun_again(tmp_path):
    checkpoints = filled(tmp_path, (10, 20))
    cut(tmp_path / "step-00000010")
    flip(tmp_path / "step-00000020")
    with pytest.raises(DataError, match=r"must hold a whole checkpoint; .*00020: .*checksum.*00010: .*cut short"):
        checkpoints.newest()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_no_space_leaves_the_last_whole_one_and_names_it(tmp_path, monkeypatch, after):
    checkpoints = filled(tmp_path, (10, 20), keep=1)
    full_disk(monkeypatch, after)
    with pytest.raises(DataError, match=r"step-00000030: disk full while writing; .*step-00000020, stays; free some"):
        checkpoints.write(30, state(30), IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]
    assert checkpoints.newest().step == 20


def test_no_space_for_the_first(tmp_path, monkeypatch):
    full_disk(monkeypatch)
    with pytest.raises(DataError, match="disk full while writing; there is no checkpoint yet"):
        Checkpoints(tmp_path).write(10, state(10), IDENTITY)


def test_leftovers_of_a_kill_are_cleared_and_what_was_replaced_comes_back(tmp_path):
    filled(tmp_path, (10, 20))
    (tmp_path / ".step-00000030.abc").mkdir()
    (tmp_path / ".step-00000030.abc" / STATE).write_text("half")
    (tmp_path / ".step-00000005.gone").mkdir()
    Path(tmp_path / "step-00000020").rename(tmp_path / ".step-00000020.old")  # between the two renames
    checkpoints = Checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]
    assert checkpoints.newest().step == 20
