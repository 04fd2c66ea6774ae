"""`acodm cotrain` by command: one folder like a target run's, its policy, exact resume, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
import torch

from acodm_env.experiments import cli
from acodm_env.files import read_state
from acodm_env.policy.load import load_policy

SIZES = ["--target", "tiny", "--batch_size", "6", "--sequence_length", "32", "--evaluations", "3", "--quiet"]
AGENT = ["--agent", '{"batch_size": 4, "hidden": [8]}', "--start_decisions", "3", "--pretrain_steps", "2"]


def acodm(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


def cotrain(corpus, out, *arguments):
    return acodm("cotrain", "--corpus", corpus, "--steps", "12", *SIZES, *AGENT, "--out", out, *arguments)


def lines(path, name="stats.jsonl"):
    records = [json.loads(line) for line in (path / name).read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.startswith("seconds")} for record in records]


def read(path):
    return json.loads((path / "result.json").read_text())


def test_a_folder_like_a_target_runs(tiny_corpus, tmp_path, capsys):
    out = tmp_path / "run"
    assert cotrain(tiny_corpus, out, "--algo", "acodm-ddpg") == 0
    assert "policy/, model/" in capsys.readouterr().out
    result, records = read(out), lines(out)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["step"] for record in lines(out, "eval.jsonl")] == [0, 4, 8, 12]
    assert result["mixer"] == "cotrain-acodm-ddpg"
    assert result["learning"]["decisions"] == 12
    assert (
        result["learning"]["updates"] == 2 + 8 * 2
    )  # the critic before it acts; then 2 a decision, not after the last
    assert result["learning"]["export_error"] < 1e-5
    assert load_policy(out / "policy").decision_every == 1
    assert (out / "model" / "model.safetensors").exists()


def test_learning_counts_and_saving_does_not(tiny_corpus, tmp_path, monkeypatch):
    """Three checkpoints are written between what was learned and the step after; the last step teaches nothing."""
    from acodm_env.agents.cotraining import Cotrainer
    from acodm_env.experiments.run.checkpoints import Checkpoints

    def slow(seconds, call):
        def slowed(*arguments):
            time.sleep(seconds)
            return call(*arguments)

        return slowed

    monkeypatch.setattr(Cotrainer, "_learn", slow(0.1, Cotrainer._learn))
    monkeypatch.setattr(Checkpoints, "write", slow(0.5, Checkpoints.write))
    assert cotrain(tiny_corpus, tmp_path, "--checkpoint_every", "3", "--pretrain_steps", "0") == 0
    result = read(tmp_path)
    seconds = result["accounting"]["seconds"]
    assert 11 * 0.1 <= seconds["decision"] < 11 * 0.1 + 3 * 0.5
    assert result["learning"]["seconds"] == pytest.approx(seconds["decision"])
    deciding = [json.loads(line)["seconds_decision"] for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert min(deciding[1:]) >= 0.1
    assert result["accounting"]["overhead_frac"] > 1.1 / seconds["train"]


def test_the_operators_hand(tiny_corpus, tmp_path):
    assert cotrain(tiny_corpus, tmp_path, "--steps", "4") == 0
    assert read(tmp_path)["overridden_steps"] == 0
    out = tmp_path / "again"
    out.mkdir()
    (out / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    (out / "weights.override.json").write_text('{"pin": {"letters": 0.5}, "cap": {"verbs": 0.2}}')
    assert cotrain(tiny_corpus, out, "--steps", "4") == 0
    np.testing.assert_allclose([record["requested"] for record in lines(out)], [[0.5, 0.3, 0.2]] * 4, atol=2e-6)
    assert read(out)["overridden_steps"] == 4
    assert json.loads((out / "overrides.jsonl").read_text())["from_step"] == 1


def test_sigterm_while_the_corpus_is_opened_is_not_lost(tiny_corpus, tmp_path, monkeypatch, capsys):
    from acodm_env.experiments.target import cotrain as command

    original = command.open_store
    monkeypatch.setattr(command, "open_store", lambda config: signal.raise_signal(signal.SIGTERM) or original(config))
    assert cotrain(tiny_corpus, tmp_path / "run") == 0
    assert "ended by SIGTERM before it began" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "value"), [("seed", 7), ("target", "small"), ("corpus_fingerprint", "another")])
def test_checkpoint_of_another_run_is_refused_by_name(name, value, tiny_corpus, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    assert cotrain(tiny_corpus, tmp_path) == 0
    monkeypatch.undo()
    manifest = checkpoints(tmp_path)[-1].with_name("manifest.json")
    record = json.loads(manifest.read_text())
    record["identity"][name] = value
    manifest.write_text(json.dumps(record))
    assert cotrain(tiny_corpus, tmp_path) == 2
    assert f"step-00000005: must be of a run with {name}=" in capsys.readouterr().err


def test_other_commands_read_it(tiny_corpus, tmp_path, capsys):
    """Its mixture, its steps against a reference's, a curve for a surrogate, its policy on another target."""
    out = tmp_path / "run"
    assert cotrain(tiny_corpus, out) == 0
    capsys.readouterr()
    assert acodm("mixture", out, "--format", "json") == 0
    mean = json.loads(capsys.readouterr().out)["time_averaged"]
    requested = np.array([record["requested"] for record in lines(out)])
    np.testing.assert_allclose(list(mean.values()), requested.mean(0))
    assert requested.std(0).min() > 0
    transfer = ["transfer", "--corpus", tiny_corpus, "--steps", "12", *SIZES]
    assert acodm(*transfer, "--mixer", "uniform", "--out", tmp_path / "uniform", "--reference", out) == 0
    assert read(tmp_path / "uniform")["steps_to_reference_ratio"] is not None
    policy = ["--policy", out / "policy", "--no-gate"]
    assert acodm(*transfer, *policy, "--out", tmp_path / "transferred") == 0


def test_all_uniform_it_draws_what_a_uniform_run_draws(tiny_corpus, tmp_path):
    """Same model, same data, same order as every mixer gets with this seed; only the probe rounds differently."""
    whole = ["--start_decisions", "12", "--start_noise", "0", "--seed", "3"]
    assert cotrain(tiny_corpus, tmp_path / "cotrained", *whole) == 0
    run = ["--corpus", tiny_corpus, "--steps", "12", *SIZES, "--mixer", "uniform", "--seed", "3"]
    assert acodm("transfer", *run, "--out", tmp_path / "uniform") == 0
    ours, theirs = lines(tmp_path / "cotrained"), lines(tmp_path / "uniform")
    assert [record["realised"] for record in ours] == [record["realised"] for record in theirs]
    np.testing.assert_allclose([r["losses"] for r in ours], [r["losses"] for r in theirs], rtol=1e-4)


SETTINGS = ["--decision_every", "2", "--steps", "14", "--checkpoint_every", "4"]


def at_step(monkeypatch, step, act):
    """Have `act` called just after the line of optimiser step `step` is written."""
    from acodm_env.experiments.run.folder import RunFolder

    append = RunFolder.append

    def watched(self, line):
        append(self, line)
        if line.log == "stats.jsonl" and line.step == step:
            act()

    monkeypatch.setattr(RunFolder, "append", watched)


@pytest.fixture(scope="module")
def whole(tiny_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert cotrain(tiny_corpus, out, *SETTINGS) == 0
    return out


@pytest.mark.parametrize("step", [1, 5, 11])
def test_killed_at_several_decisions_it_goes_on_bit_for_bit(step, whole, tiny_corpus, tmp_path, monkeypatch):
    """Before the first checkpoint, under the teacher inside a window of two steps, and when the agent learns."""

    def interrupt():
        raise KeyboardInterrupt

    at_step(monkeypatch, step, interrupt)
    assert cotrain(tiny_corpus, tmp_path, *SETTINGS) == 1
    monkeypatch.undo()
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 (SB3 draws from it)
    assert cotrain(tiny_corpus, tmp_path, *SETTINGS) == 0
    assert_equal(whole, tmp_path)


def test_sigterm_saves_within_a_step_of_two_and_ends_well(whole, tiny_corpus, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 9, lambda: signal.raise_signal(signal.SIGTERM))
    assert cotrain(tiny_corpus, tmp_path, *SETTINGS) == 0
    assert "ended by SIGTERM after step 9 of 14" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()
    monkeypatch.undo()
    assert cotrain(tiny_corpus, tmp_path, *SETTINGS) == 0
    assert "step-00000009: step 9 of 14" in capsys.readouterr().err
    assert_equal(whole, tmp_path)


def test_killed_while_the_policy_is_written_it_trains_nothing_again(whole, tiny_corpus, tmp_path, monkeypatch):
    from acodm_env.experiments.target import cotrain as command
    from acodm_env.pretrain.trainer import LMTrainer

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_export", interrupt)
    assert cotrain(tiny_corpus, tmp_path, *SETTINGS) == 1
    monkeypatch.undo()
    monkeypatch.setattr(LMTrainer, "step", interrupt)
    assert cotrain(tiny_corpus, tmp_path, *SETTINGS) == 0
    assert_equal(whole, tmp_path)


def test_mixtures_that_take_effect_late_are_seen_and_survive_a_kill(tiny_corpus, tmp_path, monkeypatch):
    settings = [*SETTINGS, "--prefetch", "2", "--accumulation", "2"]
    assert cotrain(tiny_corpus, tmp_path / "whole", *settings) == 0
    assert {record["mixture_age"] for record in lines(tmp_path / "whole")} == {2.0}
    assert load_policy(tmp_path / "whole" / "policy").lag == 2
    at_step(monkeypatch, 9, lambda: signal.raise_signal(signal.SIGTERM))
    assert cotrain(tiny_corpus, tmp_path / "cut", *settings) == 0
    monkeypatch.undo()
    assert cotrain(tiny_corpus, tmp_path / "cut", *settings) == 0
    assert_equal(tmp_path / "whole", tmp_path / "cut")


def test_damaged_checkpoint_is_skipped_by_name(whole, tiny_corpus, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 9, lambda: signal.raise_signal(signal.SIGTERM))
    assert cotrain(tiny_corpus, tmp_path, *SETTINGS) == 0
    monkeypatch.undo()
    newest = checkpoints(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    assert cotrain(tiny_corpus, tmp_path, *SETTINGS) == 0
    error = capsys.readouterr().err
    assert "skipped " in error
    assert "step-00000009: state.safetensors was cut short" in error
    assert "step-00000008: step 8 of 14" in error
    assert_equal(whole, tmp_path)


def assert_equal(whole, cut):
    """Logs, networks, and the last checkpoint: target, optimiser, sampler, agent, replay, generators."""
    for name in ("stats.jsonl", "eval.jsonl"):
        assert lines(whole, name) == lines(cut, name)
    weights = "policy.safetensors"
    assert (whole / "policy" / weights).read_bytes() == (cut / "policy" / weights).read_bytes()
    for one, other in zip(checkpoints(whole), checkpoints(cut), strict=True):
        np.testing.assert_equal(read_state(one), read_state(other))


def checkpoints(run):
    found = sorted((run / "checkpoints").glob("step-*/*.safetensors"))
    assert found
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algo", "ppo"], "algo=ppo: must be off-policy, such as td3"),
        (["--reward", "final"], "reward=final: must be interaction, alignment or progress"),
        (
            ["--reward", '{"terms": {"progress": 1}, "progress_over_uniform": true}'],
            "takes a uniform run of the target",
        ),
        (["--teacher", "odm-relesed"], "did you mean 'odm-released'"),
        (["--batch_size", "3"], "batch_size=3: must be at least 6"),
        (["--start_decisions", "-1"], "start_decisions=-1: must be at least 0"),
        (["--decision_every", "0"], "decision_every=0: must be at least 1"),
        (["--agent", '{"gama": 1}'], "did you mean 'gamma'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_anything_is_written(arguments, message, tiny_corpus, tmp_path, capsys):
    assert cotrain(tiny_corpus, tmp_path / "run", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_finished_run_is_reported_and_another_one_refused(tiny_corpus, tmp_path, capsys):
    assert cotrain(tiny_corpus, tmp_path) == 0
    before = read(tmp_path)
    assert cotrain(tiny_corpus, tmp_path) == 0
    assert read(tmp_path) == before
    assert cotrain(tiny_corpus, tmp_path, "--start_decisions", "4") == 2
    assert "another run (start_decisions=3 there, 4 now)" in capsys.readouterr().err


def test_diverged_target_ends_with_a_result(tiny_corpus, tmp_path, capsys):
    assert cotrain(tiny_corpus, tmp_path, "--learning_rate", "1e30", "--decision_every", "2") == 0
    assert read(tmp_path)["diverged"]
    assert read(tmp_path)["mean_loss_nats"] is None
    assert "not finite; the step was not applied, and the run ends; there is no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_start_is_a_tenth_and_at_most_the_papers():
    from acodm_env.experiments.target.cotrain import CotrainConfig

    assert CotrainConfig(steps=300, decision_every=2).start_decisions == 15
    assert CotrainConfig(steps=41_667).start_decisions == 833


def launch(world, corpus, out, *arguments):
    """Start the command in processes of its own: one, or several by torchrun."""
    launcher = [sys.executable, "-m"]
    if world > 1:
        launcher += ["torch.distributed.run", "--nproc_per_node", str(world), "--standalone", "-m"]
    command = ["acodm_env.experiments.target.cotrain", "--corpus", str(corpus), *SIZES, *AGENT, "--device", "cpu"]
    return subprocess.Popen(
        [*launcher, *command, "--out", str(out), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def kill(process):
    """A command and all that it launched, at once."""
    if process.poll() is None:
        launched = psutil.Process(process.pid)
        for each in (*launched.children(recursive=True), launched):  # torchrun's have sessions of their own
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.communicate()


KILLED = ["--steps", "40", "--decision_every", "2", "--checkpoint_every", "6"]


@pytest.mark.slow
def test_sigkill_of_two_processes_and_the_same_command_again(tiny_corpus, tmp_path):
    """Under the teacher before the first checkpoint, and when the agent acts."""
    finished(launch(2, tiny_corpus, tmp_path / "whole", *KILLED))
    for step in (5, 21):
        out = tmp_path / f"cut{step}"
        process = launch(2, tiny_corpus, out, *KILLED)
        while not (out / "stats.jsonl").exists() or len((out / "stats.jsonl").read_text().splitlines()) < step:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        kill(process)
        assert not (out / "result.json").exists()
        output = finished(launch(2, tiny_corpus, out, *KILLED))
        assert output.count("mean_loss_nats") == 1  # process 0 alone speaks
        assert_equal(tmp_path / "whole", out)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_random_kills(tiny_corpus, tmp_path):
    """Runs killed up to three times each, at random moments: start-up, training, learning and saving."""
    rng = np.random.default_rng(0)
    begun = time.monotonic()
    finished(launch(1, tiny_corpus, tmp_path / "whole", *KILLED))
    duration = time.monotonic() - begun
    kills, runs = 0, 0
    while kills < 20:
        out = tmp_path / f"cut{runs}"
        for _ in range(rng.integers(1, 4)):
            process = launch(1, tiny_corpus, out, *KILLED)
            time.sleep(rng.uniform(0.2, 1.0) * duration)
            kills += process.poll() is None and not (out / "result.json").exists()
            kill(process)
        finished(launch(1, tiny_corpus, out, *KILLED))
        assert_equal(tmp_path / "whole", out)
        runs += 1
    print(f"{runs} of {runs} runs bit-equal, {kills} kills")  # noqa: T201


@pytest.mark.slow
def test_two_processes_draw_and_lose_what_one_does(tiny_corpus, tmp_path):
    """While the teacher plays; after that the agent reads projected gradients instead of whole ones."""
    settings = ["--steps", "12", "--start_decisions", "12"]
    for world in (1, 2):
        finished(launch(world, tiny_corpus, tmp_path / str(world), *settings))
    one, two = lines(tmp_path / "1"), lines(tmp_path / "2")
    assert [record["realised"] for record in one] == [record["realised"] for record in two]
    np.testing.assert_allclose([r["losses"] for r in one], [r["losses"] for r in two], rtol=1e-5)
    assert read(tmp_path / "2")["accounting"]["devices"] == 2
