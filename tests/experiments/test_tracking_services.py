"""Weights & Biases, MLflow and Trackio, each offline in a process of its own: what they keep is what the logs hold."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
from tracked_run import assert_shows

from acodm_env.experiments.run_folder import RunFolder


def needs(package):
    missing = find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: the extra of the same name")


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import socket
def refused(self, address, *rest):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        print("CONNECTS", address, file=sys.stderr)
        raise OSError("no network in this test")
    return connect(self, address, *rest)
connect, socket.socket.connect = socket.socket.connect, refused
import tracked_run as tests
path, track = Path(sys.argv[2]), sys.argv[3]
"""
INTERRUPTED = """
tests.killed(path, track, 8)
tests.stopped(path, track, 12)
tests.run(path, track)
"""
FAILING = """
from accelerate.tracking import MLflowTracker
def fails(self, values, step):
    raise OSError("down")
log, MLflowTracker.log = MLflowTracker.log, fails
tests.run(path.with_name("first"), track)
MLflowTracker.log = log
tests.run(path, track)
"""


def offline(tmp_path, track, story=INTERRUPTED):
    """A run killed after step 8, stopped after step 12, then finished, in a process without network or terminal."""
    keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    home = tmp_path / "home"
    home.mkdir()
    places = {"HOME": home, "TRACKIO_DIR": tmp_path / "trackio", "XDG_CACHE_HOME": home, "HF_HOME": home / "hf"}
    environment = keep | {name: str(place) for name, place in places.items()} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD + story, str(Path(__file__).parents[1]), str(tmp_path / "run"), track],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "CONNECTS" not in done.stderr, done.stderr
    assert ("tracking by" in done.stderr) == (story is FAILING), done.stderr
    assert done.stdout == ""
    folder = RunFolder(tmp_path / "run", json.loads((tmp_path / "run" / "config.json").read_text())["config"])
    return folder, json.loads((folder.path / "tracking.json").read_text()), done.stderr


def wandb_rows(file):
    """Rows of a `.wandb` file: blocks of 32 KiB, in them chunks (checksum, length, kind) of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or a last part
            record = Record.FromString(whole)
            whole = b""
            if record.HasField("history"):
                yield {item.key or "/".join(item.nested_key): float(item.value_json) for item in record.history.item}


@needs("wandb")
def test_wandb_offline(tmp_path):
    folder, record, said = offline(tmp_path, "wandb")
    assert said.count("wandb has no API key: the run is kept in") == 3
    shown = {}
    files = [*(folder.path / "wandb").glob(f"offline-run-*/run-{record['id']}.wandb")]
    assert len(files) == 3
    for file in files:
        for row in wandb_rows(file):
            for key in row.keys() - {"_step", "_timestamp", "_runtime"}:
                shown.setdefault(key, []).append((row["_step"], row[key]))
    assert_shows({key: sorted(pairs) for key, pairs in shown.items()}, folder, timing=False)


@needs("mlflow")
def test_mlflow_in_local_files(tmp_path):
    folder, record, _ = offline(tmp_path, "mlflow")
    shown = {}
    root = next((folder.path / "mlflow").glob(f"*/{record['services']['mlflow']}"))
    for file in (root / "metrics").rglob("*"):
        if file.is_file():
            pairs = [line.split() for line in file.read_text().splitlines()]
            shown[file.relative_to(root / "metrics").as_posix()] = [
                (int(step), float(value)) for _, value, step in pairs
            ]
    assert_shows(shown, folder, timing=False)
    assert (root / "params" / "mixer").read_text() == "odm-released"
    assert len([*(folder.path / "mlflow").glob("*/*/metrics")]) == 1


@needs("mlflow")
def test_a_run_that_mlflow_fails_leaves_nothing_to_the_next(tmp_path):
    folder, record, said = offline(tmp_path, "mlflow", FAILING)
    assert said.count("tracking by mlflow ends: OSError: down; the run and its own logs go on") == 1
    assert (next((folder.path / "mlflow").glob(f"*/{record['services']['mlflow']}")) / "metrics" / "target").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"first", "run", "home"}  # no data base of mlflow's own choice


@needs("trackio")
def test_trackio_in_its_local_data_base(tmp_path):
    folder, record, _ = offline(tmp_path, "trackio")
    shown = {}
    with closing(sqlite3.connect(tmp_path / "trackio" / "acodm.db")) as base:
        rows = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    for name, step, metrics in rows:
        assert name == f"run-{record['id']}" == record["services"]["trackio"]
        for key, value in json.loads(metrics).items():
            shown.setdefault(key, []).append((step, value))
    assert_shows(shown, folder, timing=False)
