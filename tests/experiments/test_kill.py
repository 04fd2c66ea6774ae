"""SIGKILL and SIGTERM at any moment: what is left goes on to the same bits. Real processes, killed for real."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from acodm_env.corpus.tokens import TokenStore
from acodm_env.experiments import cli
from acodm_env.experiments.overhead.throughput import random_policy
from acodm_env.experiments.run.checkpoints import Checkpoints
from acodm_env.files import read_json
from acodm_env.pretrain.config import LMConfig
from acodm_env.pretrain.trainer import LMTrainer

KINDS = {
    "bandit": ["--mixer", "odm-released"],
    "gradients, ahead": ["--mixer", "eg-interaction", "--decision_every", "3", "--prefetch", "2"],
    "accumulated": ["--mixer", "odm-released", "--accumulation", "2", "--domains", "verbs,letters"],
    "policy": ["--no-gate", "--policy"],
}
FIXED = ["--mixer", "static", "--weights", "letters=0.5,numbers=0.3,verbs=0.2"]


def settings(corpus, out, kind, steps):
    sizes = ["--batch_size", "8", "--sequence_length", "32", "--eval_sequences", "2", "--evaluations", "7"]
    saving = ["--checkpoint_every", "4", "--keep", "2"]
    run = ["--corpus", str(corpus), "--target", "tiny", "--steps", str(steps), "--quiet", "--out", str(out)]
    chosen = (KINDS | {"fixed": FIXED})[kind]
    if kind == "policy":
        chosen = [*chosen, str(exported(corpus, out.parent / "exported"))]
    return [*run, *sizes, *saving, *chosen]


def exported(corpus, path):
    """A policy of random weights that decides every third step, with all that it observes."""
    if not path.exists():
        trainer = LMTrainer(
            LMConfig(model="tiny", batch_size=8, sequence_length=32, decision_every=3, horizon=150),
            TokenStore.open(corpus),
        )
        trainer.reset(np.random.default_rng(0))
        random_policy(trainer.info, seed=1).save(path)
    return path


def lines(out, name):
    """A log without times."""
    records = [json.loads(line) for line in (out / name).read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.startswith("seconds")} for record in records]


def logged(out):
    """How many steps are logged by now."""
    file = out / "stats.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def assert_same(out, whole):
    """Draws, losses, mixtures, evaluations; model, optimiser, sampler, mixer: every bit."""
    for name in ("stats.jsonl", "eval.jsonl"):
        assert lines(out, name) == lines(whole, name)
    last, expected = (Checkpoints(run / "checkpoints").newest() for run in (out, whole))
    assert last.step == expected.step == read_json(whole / "config.json")["config"]["steps"]
    assert last.state["trainer"]["model"].keys() == expected.state["trainer"]["model"].keys()
    np.testing.assert_equal(last.state, expected.state)
    model = "model/model.safetensors"
    assert (out / model).read_bytes() == (whole / model).read_bytes()
    assert len(Checkpoints(out / "checkpoints").steps()) == 2
    hidden = {path.name for path in [*out.iterdir(), *(out / "checkpoints").iterdir()] if path.name.startswith(".")}
    assert hidden <= {".lock"}


# --- without a start of Python for every process ----------------------------------------------------------------


@pytest.fixture(scope="module")
def launch():
    """Starts `acodm transfer` in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    heavy = ["accelerate", "jsonargparse", "safetensors.numpy", "transformers.models.gpt_neox.modeling_gpt_neox"]
    ours = ["acodm_env.pretrain.trainer", "acodm_env.pretrain.leader", "acodm_env.experiments.target.transfer"]
    context.set_forkserver_preload([*heavy, *ours, "tokenizers", "torch.distributed.tensor"])
    started = []

    def start(arguments):
        process = context.Process(target=cli.main, args=(arguments, "transfer"))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


def wait_for(process, out, steps):
    deadline = time.monotonic() + 60
    while logged(out) < steps and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert process.is_alive(), "it ended before it could be killed"
    assert logged(out) >= steps


def finish(process):
    process.join(100)
    return process.exitcode


@pytest.mark.parametrize("kind", ["gradients, ahead", "policy"])
def test_killed_twice_it_ends_with_the_same_bits(launch, tiny_corpus, tmp_path, kind):
    whole = launch(settings(tiny_corpus, tmp_path / "whole", kind, 40))
    assert finish(whole) == 0
    cut = tmp_path / "cut"
    for steps in (2, 19):  # before the first checkpoint, and later
        process = launch(settings(tiny_corpus, cut, kind, 40))
        wait_for(process, cut, steps)
        process.kill()
        assert finish(process) == -signal.SIGKILL
    assert finish(launch(settings(tiny_corpus, cut, kind, 40))) == 0
    assert_same(cut, tmp_path / "whole")


def test_sigterm_saves_and_ends_well_within_a_step(launch, tiny_corpus, tmp_path):
    """At a step that is no decision and for which no checkpoint was planned."""
    arguments = settings(tiny_corpus, tmp_path / "cut", "gradients, ahead", 40)
    arguments[arguments.index("--checkpoint_every") + 1] = "1000"
    process = launch(arguments)
    wait_for(process, tmp_path / "cut", 5)
    os.kill(process.pid, signal.SIGTERM)
    seen = logged(tmp_path / "cut")
    assert finish(process) == 0
    done = logged(tmp_path / "cut")
    assert done <= seen + 2  # the step that was under way, and one that may have begun while we looked
    assert Checkpoints(tmp_path / "cut" / "checkpoints").newest().step == done
    assert not (tmp_path / "cut" / "result.json").exists()
    assert finish(launch(arguments)) == 0
    whole = [*arguments[: arguments.index("--out")], "--out", str(tmp_path / "whole")]
    whole += arguments[arguments.index("--out") + 2 :]
    assert finish(launch(whole)) == 0
    for name in ("stats.jsonl", "eval.jsonl"):
        assert lines(tmp_path / "cut", name) == lines(tmp_path / "whole", name)
    model = "model/model.safetensors"
    assert (tmp_path / "cut" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()


def test_a_second_run_on_the_folder_is_refused_and_names_the_first(launch, tiny_corpus, tmp_path, capsys):
    arguments = settings(tiny_corpus, tmp_path / "run", "bandit", 100_000)
    process = launch(arguments)
    wait_for(process, tmp_path / "run", 2)
    with pytest.raises(SystemExit) as stop:
        cli.main(["transfer", *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"must not be in use; process {process.pid} on {socket.gethostname()} writes there since 20" in said
    assert process.is_alive()
    process.kill()
    finish(process)
    assert read_json(tmp_path / "run" / ".holder.json")["pid"] == process.pid  # a dead one's record holds nobody off
    again = launch(arguments)
    wait_for(again, tmp_path / "run", 2)
    again.kill()


# --- the commands that users type ---------------------------------------------------------------------------------


def command(world, arguments):
    module = ["-m", "acodm_env.experiments", "transfer", *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return [sys.executable, *(launcher if world > 1 else []), *module]


def start(world, arguments, log):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with Path(log).open("ab") as stream:
        return subprocess.Popen(
            command(world, arguments), env=environment, start_new_session=True, stdout=stream, stderr=stream
        )


def children(pid):
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += children(int(child))
    return found


def kill_all(process):
    for pid in children(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", [1, 2])
def test_twenty_random_kills(world, tiny_corpus, tmp_path):
    """Every kind of run, killed one to three times each at random moments, start-up and saving included."""
    rng = np.random.default_rng(world)
    steps, training, startup = 150, {}, {}
    log = tmp_path / "log"
    for kind in KINDS:
        whole, begun = tmp_path / f"whole {kind}", time.monotonic()
        process = start(world, settings(tiny_corpus, whole, kind, steps), log)
        while not logged(whole) and process.poll() is None:
            time.sleep(0.005)
        startup[kind] = time.monotonic() - begun
        assert process.wait() == 0, log.read_text()
        training[kind] = time.monotonic() - begun - startup[kind]
    kills = 0
    for trial in range(20):
        kind = [*KINDS][trial % len(KINDS)]
        out = tmp_path / f"cut {trial}"
        alive = 0
        while alive < rng.integers(1, 4):
            process = start(world, settings(tiny_corpus, out, kind, steps), log)
            if rng.random() < 0.2:
                time.sleep(rng.uniform(0.0, startup[kind]))
            else:
                before = logged(out)
                while logged(out) == before and process.poll() is None:
                    time.sleep(0.002)
                time.sleep(rng.uniform(0.0, training[kind] * (steps - before) / steps))
            alive += process.poll() is None
            kill_all(process)
            if (out / "result.json").exists():  # too late: it had ended
                shutil.rmtree(out)
                alive = 0
        kills += alive
        process = start(world, settings(tiny_corpus, out, kind, steps), log)
        assert process.wait() == 0, log.read_text()
        assert_same(out, tmp_path / f"whole {kind}")
    print(f"{world} process(es): 20 of 20 bit-equal, {kills} kills")  # noqa: T201
    assert kills >= 20


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(first, then, tiny_corpus, tmp_path):
    """The same draws; losses agree as far as sums in another order can."""
    arguments = settings(tiny_corpus, tmp_path / "cut", "fixed", 60)
    process = start(first, arguments, tmp_path / "log")
    while logged(tmp_path / "cut") < 21 and process.poll() is None:
        time.sleep(0.002)
    kill_all(process)
    assert logged(tmp_path / "cut") < 60
    assert start(then, arguments, tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()
    assert f"{then} processes instead of {first}: cursors are global" in (tmp_path / "log").read_text()
    assert start(1, settings(tiny_corpus, tmp_path / "whole", "fixed", 60), tmp_path / "log").wait() == 0
    ours, theirs = lines(tmp_path / "cut", "stats.jsonl"), lines(tmp_path / "whole", "stats.jsonl")
    for name in ("step", "realised", "epochs", "lr"):
        assert [record[name] for record in ours] == [record[name] for record in theirs]
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["the launcher", "process 0"])
def test_sigterm_under_torchrun(whom, tiny_corpus, tmp_path):
    arguments = settings(tiny_corpus, tmp_path / "run", "bandit", 100_000)
    process = start(2, arguments, tmp_path / "log")
    while logged(tmp_path / "run") < 10 and process.poll() is None:
        time.sleep(0.01)
    worker = read_json(tmp_path / "run" / ".holder.json")["pid"]
    seen = logged(tmp_path / "run")
    os.kill(process.pid if whom == "the launcher" else worker, signal.SIGTERM)
    code = process.wait(60)
    said = (tmp_path / "log").read_text()
    done = logged(tmp_path / "run")
    assert f"ended by SIGTERM after step {done} of 100000; saved in" in said
    assert done <= seen + 20  # the launcher takes its time to hand the signal on
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest().step == done
    assert "LostRank" not in said
    if whom == "process 0":
        assert code == 0
