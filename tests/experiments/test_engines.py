"""Cells in processes of their own: the command from end to end, deaths, kills, and a Ray cluster."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plugin import flags, install, tiny

METRICS = {
    *("mean_loss_nats", "mean_perplexity", "worst_domain_loss_nats"),
    *("steps_to_reference_ratio", "cost_to_reference_ratio"),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A process environment in which the mixers of `plugin` are installed."""
    site = install(tmp_path_factory.mktemp("site"))
    return os.environ | {"PYTHONPATH": str(site), "OMP_WAIT_POLICY": "PASSIVE"}


def acodm(environment, *arguments, **popen):
    command = [sys.executable, "-m", "acodm_env", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", **popen
    )


def finish(process, timeout=500):
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output, errors


def test_the_command_from_end_to_end_and_a_death_in_it(environment, tiny_corpus, tmp_path):
    """One worker kills itself, one cell raises: the others go on, and the exit code says so."""
    jobs = min(2, len(os.sched_getaffinity(0)))
    settings = tiny(tiny_corpus, tmp_path / "b", mixers="wander,die,crash", jobs=jobs, mean_of=False, seeds="2")
    del settings["quiet"]
    code, output, errors = finish(acodm(environment, "benchmark", *flags(settings)))
    assert code == 1, errors
    assert "4 of 10 cells failed" in errors
    assert "(cosine/die/seed0): its process died (SIGKILL: out of memory?); log: " in errors
    assert "(cosine/crash/seed1): RuntimeError: a deliberate failure; log: " in errors
    log = Path(errors.split("(cosine/crash/seed1)")[1].split("log: ")[1].split("\n")[0])
    assert "Traceback" in log.read_text()
    assert "6/10 cells" in errors  # the progress bar
    assert "4 failed" in errors
    assert "uniform" in output
    with (tmp_path / "b" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["mixer", "metric", "mean", "low", "high", "num_seeds"]
    assert {row["metric"] for row in rows} == METRICS
    wander = next(row for row in rows if row["mixer"] == "wander" and row["metric"] == "mean_loss_nats")
    cells = (tmp_path / "b" / "cells/cosine/wander").glob("seed*/result.json")
    losses = [json.loads(cell.read_text())["mean_loss_nats"] for cell in cells]
    assert float(wander["mean"]) == pytest.approx(sum(losses) / 2)
    assert wander["num_seeds"] == "2"

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "b").glob("cells/**/result.json")}
    code, _, errors = finish(acodm(environment, "benchmark", "--resume", f"--out={tmp_path / 'b'}", "--quiet"))
    assert code == 1
    assert "4 of 10 cells failed" in errors
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "b").glob("cells/**/result.json")} == before


def test_a_killed_benchmark_goes_on_where_it_was(environment, tiny_corpus, tmp_path):
    """SIGKILL in mid-run; the same command finishes it, with the numbers of an uninterrupted one."""
    settings = tiny(tiny_corpus, tmp_path / "killed", mixers="wander", steps=60, seeds="1", mean_of=False)
    process = acodm(environment, "benchmark", *flags(settings), start_new_session=True)
    started, deadline = tmp_path / "killed/cells/cosine/odm-released/seed0/stats.jsonl", time.monotonic() + 120
    while not (started.exists() and started.read_text().count("\n") > 20) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finished = (tmp_path / "killed/cells/cosine/uniform/seed0/result.json").stat().st_mtime_ns
    code, _, errors = finish(acodm(environment, "benchmark", *flags(settings)))
    assert code == 0, errors
    assert (tmp_path / "killed/cells/cosine/uniform/seed0/result.json").stat().st_mtime_ns == finished
    whole = settings | {"out": str(tmp_path / "whole")}
    code, _, errors = finish(acodm(environment, "benchmark", *flags(whole)))
    assert code == 0, errors
    for mixer in ("uniform", "odm-released", "wander"):
        cell = f"cells/cosine/{mixer}/seed0/eval.jsonl"
        one, other = (
            [json.loads(line)["losses"] for line in (tmp_path / folder / cell).read_text().splitlines()]
            for folder in ("killed", "whole")
        )
        assert one == other


def test_a_cell_by_number_as_a_job_array_runs_it(environment, tiny_corpus, tmp_path):
    out = tmp_path / "b"
    settings = tiny(tiny_corpus, out, mixers="two-stage", seeds="1", mean_of=False)
    code, output, _ = finish(acodm(environment, "benchmark", *flags(settings | {"plan": True})))
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()[2:]] == ["0", "1", "2", "3"]
    assert not (out / "cells").exists()
    code, output, errors = finish(acodm(environment, "benchmark", f"--out={out}", "--cell=3"))
    assert code == 0, errors
    assert "cell 3 (cosine/two-stage/seed0) is finished" in output
    assert {path.parent.parent.name for path in out.glob("cells/cosine/*/*/result.json")} == {"two-stage"}
    code, _, errors = finish(acodm(environment, "benchmark", f"--out={out}", "--cell=4"))
    assert code == 2
    assert "cell=4: must be 0 to 3" in errors


def test_too_many_jobs_are_refused(environment, tiny_corpus, tmp_path):
    settings = tiny(tiny_corpus, tmp_path / "b", mixers="uniform", jobs=1000)
    code, _, errors = finish(acodm(environment, "benchmark", *flags(settings)))
    assert code == 2
    assert "jobs=1000: must be 1 to" in errors


RAY = """
import os, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address
from acodm_env.experiments.cli import main
try:
    main(sys.argv[1:])
finally:
    cluster.shutdown()
"""


def test_ray_runs_the_same_cells(environment, tiny_corpus, tmp_path):
    """On a local cluster of two workers, with a task that dies; equal to the local engine's numbers."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'acodm[ray]'")
    settings = tiny(
        tiny_corpus, tmp_path / "ray", mixers="wander,crash", seeds="2", mean_of=False, engine="ray", jobs=2
    )
    variables = environment | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", RAY, "benchmark", *flags(settings)],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    code, _, errors = finish(process)
    assert code == 1, errors
    assert "2 of 8 cells failed" in errors
    assert "RuntimeError: a deliberate failure" in errors
    local = settings | {"out": str(tmp_path / "local"), "engine": "local", "mixers": "wander", "jobs": 1}
    assert finish(acodm(environment, "benchmark", *flags(local)))[0] == 0
    for seed in (0, 1):
        cell = f"cells/cosine/wander/seed{seed}/eval.jsonl"
        one, other = (
            [json.loads(line)["losses"] for line in (tmp_path / engine / cell).read_text().splitlines()]
            for engine in ("ray", "local")
        )
        assert one[0] == pytest.approx(other[0], rel=1e-6)
        assert one[-1] == pytest.approx(other[-1], rel=1e-3)  # the number of threads may differ


def test_ray_without_a_cluster_is_refused(environment, tiny_corpus, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'acodm[ray]'")
    settings = tiny(tiny_corpus, tmp_path / "b", mixers="uniform", seeds="1", engine="ray")
    code, _, errors = finish(acodm(environment | {"RAY_ADDRESS": ""}, "benchmark", *flags(settings)))
    assert code == 2
    assert "engine=ray: no Ray cluster answers" in errors
