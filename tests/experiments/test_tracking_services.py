"""Weights & Biases, MLflow and Trackio, each offline in a process of its own: what they keep is what the logs hold."""

import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
from tracked_run import assert_shows

from acodm_env.experiments.run.folder import RunFolder


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
SIGKILLED = """
tests.sigkilled(path, track, 10)
"""
FINISHED = """
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
    """A run that fails after step 8, is stopped after step 12, then finished; without network or terminal."""
    keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
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
    assert done.returncode == (-signal.SIGKILL if story is SIGKILLED else 0), done.stderr
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


def wandb_shown(folder, id):
    """By key, the (step, value) pairs of all files of a run, and the number of those."""
    shown = {}
    files = [*(folder.path / "wandb").glob(f"offline-run-*/run-{id}.wandb")]
    for file in files:
        for row in wandb_rows(file):
            for key in row.keys() - {"_step", "_timestamp", "_runtime"}:
                shown.setdefault(key, []).append((row["_step"], row[key]))
    return {key: sorted(pairs) for key, pairs in shown.items()}, len(files)


def mlflow_shown(folder, run):
    shown = {}
    root = next((folder.path / "mlflow").glob(f"*/{run}")) / "metrics"
    for file in root.rglob("*"):
        if file.is_file():
            pairs = [line.split() for line in file.read_text().splitlines()]
            shown[file.relative_to(root).as_posix()] = [(int(step), float(value)) for _, value, step in pairs]
    return shown


def trackio_shown(tmp_path):
    """By run and key, the (step, value) pairs."""
    shown = {}
    with closing(sqlite3.connect(tmp_path / "trackio" / "acodm.db")) as base:
        rows = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    for name, step, metrics in rows:
        for key, value in json.loads(metrics).items():
            shown.setdefault(name, {}).setdefault(key, []).append((step, value))
    return shown


@needs("wandb")
def test_wandb_offline(tmp_path):
    folder, record, said = offline(tmp_path, "wandb")
    assert said.count("wandb has no API key: the run is kept in") == 3
    shown, files = wandb_shown(folder, record["id"])
    assert files == 3
    assert_shows(shown, folder, timing=False)


@needs("mlflow")
def test_mlflow_in_local_files(tmp_path):
    folder, record, _ = offline(tmp_path, "mlflow")
    run = record["services"]["mlflow"]
    assert_shows(mlflow_shown(folder, run), folder, timing=False)
    assert (next((folder.path / "mlflow").glob(f"*/{run}")) / "params" / "mixer").read_text() == "odm-released"
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
    shown = trackio_shown(tmp_path)
    assert [*shown] == [f"run-{record['id']}"] == [record["services"]["trackio"]]
    assert_shows(shown[record["services"]["trackio"]], folder, timing=False)


@pytest.mark.parametrize(
    "track",
    [
        pytest.param("wandb", marks=needs("wandb")),
        pytest.param("trackio", marks=needs("trackio")),
        pytest.param("mlflow", marks=[needs("mlflow"), pytest.mark.slow]),  # queues nothing; the rule is for all
    ],
)
def test_after_sigkill_another_run_has_it_all(tmp_path, track):
    """What the service had not received is lost with the process."""
    offline(tmp_path, track, SIGKILLED)
    folder, record, said = offline(tmp_path, track, FINISHED)
    named = f"run-{record['id']}-2"
    assert said.count(f"{track} was not ended well and may lack steps: all are shown again, as {named}") == 1
    if track == "wandb":
        assert record["services"][track] == named
        shown, _ = wandb_shown(folder, f"{record['id']}-2")
    elif track == "trackio":
        shown = trackio_shown(tmp_path)[named]
    else:
        root = next((folder.path / "mlflow").glob(f"*/{record['services'][track]}"))
        assert (root / "tags" / "mlflow.runName").read_text() == named
        shown = mlflow_shown(folder, record["services"][track])
    assert len(shown["target/loss"]) == 20
    assert_shows(shown, folder, timing=False)
    assert record["ended"] == {track: {"stats.jsonl": 20, "eval.jsonl": 20}}
