"""`--track`: what services show is what the logs hold, each step once, offline, and never at the cost of the run."""

import json
import math
import os
import signal
import sys
import time
import types
from dataclasses import replace

import pytest
from accelerate import tracking as accelerate_tracking
from accelerate.state import AcceleratorState, PartialState
from tracked_run import DOMAINS, assert_shows, killed, run, stopped

from acodm_env.errors import ConfigError
from acodm_env.experiments import cli
from acodm_env.experiments.run import tracking
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.experiments.run.tracking import evaluation_values, step_values, tracked, trackers
from acodm_env.run_log import EvaluationLine, StepLine

VARIABLES = ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME")


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    """No credentials, no state of Accelerate's left for other tests."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    fresh = not PartialState._shared_state
    yield
    if fresh:
        AcceleratorState._reset_state(reset_partial_state=True)


def tensorboard_scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_values_of_a_step_by_hand():
    record = {
        "step": 7, "eval_tokens": 16, "tokens": 350, "requested": [0.5, 0.5, 0.0], "realised": [0.4, 0.6, 0.0],
        "losses": [1.0, 2.0, None], "loss_weights": None, "eval_losses": [9.0], "epochs": [0.1, 0.2, 0.0], "loss": 1.5,
        "grad_norm": None, "lr": 0.001, "decision": 3, "mixture_age": 1, "diverged": False, "skipped": 0,
        "seconds": 0.25, "seconds_data": 0.125, "seconds_decision": 0.5, "reward": -1.0, "exploration": 0.75,
    }  # fmt: skip
    line = StepLine.of(record)
    assert line.record() == record  # as it stands in the file
    assert step_values(line, DOMAINS) == {
        "target/eval_tokens": 16.0, "target/loss": 1.5,
        "target/lr": 0.001, "target/tokens": 350.0, "mixture/domain0": 0.4, "mixture/domain1": 0.6,
        "mixture/web _en_": 0.0, "requested/domain0": 0.5, "requested/domain1": 0.5, "requested/web _en_": 0.0,
        "loss/domain0": 1.0, "loss/domain1": 2.0, "seconds/step": 0.25, "seconds/data": 0.125, "seconds/decision": 0.5,
        "agent/reward": -1.0, "agent/exploration": 0.75,
    }  # fmt: skip


def test_values_of_an_evaluation_by_hand():
    line = EvaluationLine(step=4, losses=[1.0, 3.0], targets=["a", "b"], seconds=0.5)
    shown = evaluation_values(line)
    mean = pytest.approx((math.e + math.e**3) / 2)
    assert shown == {
        "eval/a": 1.0, "eval/b": 3.0, "seconds/evaluation": 0.5, "eval/mean_loss": 2.0, "eval/mean_perplexity": mean,
    }  # fmt: skip
    assert evaluation_values(replace(line, losses=[1.0, None])) == {"eval/a": 1.0, "seconds/evaluation": 0.5}


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_shows_the_logs(tmp_path):
    folder = run(tmp_path / "run", "auto")
    shown = tensorboard_scalars(folder)
    assert_shows(shown, folder)
    assert len(shown["target/loss"]) == 20
    assert [step for step, _ in shown["eval/mean_loss"]] == [0, 4, 8, 12, 16, 20]
    settings = next((tmp_path / "run" / "tensorboard").glob("*/hparams.yml")).read_text()
    assert "mixer: odm-released" in settings
    assert """nested: '{"a": [1]}'""" in settings
    assert "no:" not in settings


def next_second():
    """Wait for it: TensorBoard reads files of one second in the order of their names, where .10 is before .9."""
    time.sleep(1.01 - time.time() % 1)


@pytest.mark.parametrize("end", [killed, stopped])
@pytest.mark.parametrize("step", [2, 8, 12])
def test_a_resumed_run_has_each_step_once_in_tensorboard(tmp_path, end, step):
    """Also the evaluation that is due where a run was stopped, which is made by who goes on."""
    end(tmp_path / "run", "tensorboard", step)
    next_second()
    end(tmp_path / "run", "tensorboard", step + 1)
    next_second()
    folder = run(tmp_path / "run", "tensorboard")
    assert_shows(tensorboard_scalars(folder), folder)
    assert len([*(tmp_path / "run" / "tensorboard").glob("*/hparams.yml")]) == 1


def test_an_adapted_run_goes_on_in_tensorboard(tmp_path):
    killed(tmp_path / "run", "tensorboard", 8)
    next_second()
    folder = run(tmp_path / "run", "tensorboard", adapt=True, name="other")
    assert_shows(tensorboard_scalars(folder), folder)
    assert len([*(tmp_path / "run" / "tensorboard").glob("*/hparams.yml")]) == 2


def test_none_writes_nothing(tmp_path):
    folder = run(tmp_path / "run", "none")
    assert {path.name for path in folder.path.iterdir()} == {"config.json", "stats.jsonl", "eval.jsonl", "checkpoints"}


def test_cost_of_a_step(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run", {"domains": DOMAINS})
    line = run(tmp_path / "other", "none").steps[0]
    seconds = {}
    for track in ("none", "tensorboard"):
        with tracked(folder, track):
            folder.rewind(0)
            started = time.perf_counter()
            for step in range(1, 201):
                folder.append(replace(line, step=step))
            seconds[track] = (time.perf_counter() - started) / 200
    with capsys.disabled():
        said = {name: f"{value * 1e3:.2f}" for name, value in seconds.items()}
        sys.stdout.write(f"\nms a step: {said}\n")
    assert seconds["tensorboard"] - seconds["none"] < 0.02


# --- the command -----------------------------------------------------------------------------------------------------

SIZES = ["--target", "tiny", "--batch_size", "6", "--sequence_length", "32", "--evaluations", "2", "--steps", "4"]


def acodm(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.mark.parametrize("command", [["transfer", "--mixer", "uniform"], ["cotrain", "--start_decisions", "1"]])
def test_commands_track_and_it_is_no_part_of_a_run(tiny_corpus, tmp_path, command, monkeypatch):
    out = tmp_path / "run"
    arguments = [*command, "--corpus", tiny_corpus, *SIZES, "--quiet", "--device", "cpu", "--out", out]
    append = RunFolder.append

    def cut(self, line):
        append(self, line)
        if line.step == 2 and line.log == "stats.jsonl":
            monkeypatch.undo()
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "append", cut)
    assert acodm(*arguments) == 0
    assert acodm(*arguments, "--track", "none") == 0
    folder = RunFolder(out, json.loads((out / "config.json").read_text())["config"])
    assert "track" not in folder.config
    assert [step for step, _ in tensorboard_scalars(folder)["target/loss"]] == [1, 2]
    assert len(folder.steps) == 4


def test_a_full_run_by_the_command_has_every_domain(tiny_corpus, tmp_path):
    arguments = ["--corpus", tiny_corpus, *SIZES, "--quiet", "--device", "cpu", "--out", tmp_path / "run"]
    assert acodm("transfer", "--mixer", "uniform", *arguments, "--track", "tensorboard") == 0
    shown = tensorboard_scalars(
        RunFolder(tmp_path / "run", json.loads((tmp_path / "run/config.json").read_text())["config"])
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    for index, name in enumerate(("letters", "numbers", "verbs")):
        drawn = [(step, pytest.approx(value)) for step, value in shown[f"mixture/{name}"]]
        assert drawn == [(record["step"], record["realised"][index]) for record in records]
    assert [step for step, _ in shown["eval/mean_perplexity"]] == [0, 2, 4]


# --- what can go wrong -----------------------------------------------------------------------------------------------


def test_unknown_names(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"track='tensorbord': must be one of .*; did you mean 'tensorboard'\?"):
        trackers("tensorbord")
    with pytest.raises(ConfigError, match="track='none': must be one of mlflow, tensorboard, trackio, wandb;"):
        trackers("tensorboard,none")
    with pytest.raises(ConfigError, match="track='': must be one of"):
        trackers("")
    assert trackers("tensorboard, tensorboard") == ("tensorboard",)
    assert acodm("transfer", "--mixer", "uniform", "--track", "wanbd", "--out", tmp_path / "run") == 2
    assert "did you mean 'wandb'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_absent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "_installed", lambda name: False)
    with pytest.raises(ConfigError, match=r"track=wandb: must be installed; .*pip install 'acodm\[wandb\]'"):
        trackers("wandb")
    assert trackers("auto") == ()
    assert acodm("transfer", "--mixer", "uniform", "--track", "mlflow", "--out", tmp_path / "run") == 2
    assert "pip install 'acodm[mlflow]'" in capsys.readouterr().err


def test_a_folder_of_a_packages_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandbx").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not tracking._installed("wandbx")
    assert tracking._installed("numpy")


@pytest.mark.parametrize("when", ["start", "store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails_is_left_and_said_once(tmp_path, monkeypatch, capsys, when):
    kind = accelerate_tracking.TensorBoardTracker
    works, calls = getattr(kind, when), []

    def fails(self, *arguments, **settings):
        calls.append(when)
        if when != "log" or settings["step"] == 7:
            raise OSError(28, "No space left on device\nand more")
        return works(self, *arguments, **settings)

    monkeypatch.setattr(kind, when, fails)
    folder = run(tmp_path / "run", "tensorboard")
    said = capsys.readouterr().err
    assert said.count("tracking by tensorboard ends: OSError: [Errno 28] No space left on device; the run and") == 1
    assert len(folder.steps) == 20
    assert len(calls) == (9 if when == "log" else 1)  # evaluations at 0 and 4, steps 1 to 7


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "\\xff",
        "{}",
        '{"id": "a", "name": "b"}',
        '{"id": 3, "name": "b", "services": {}}',
        '{"id": "a", "name": "b", "services": []}',
        '{"id": "a", "name": "b", "services": {"mlflow": "c"}, "ended": {"mlflow": 3}}',
        '{"id": "a", "name": "b", "services": {"mlflow": "c"}, "opened": {"mlflow": "1"}}',
    ],
)
def test_a_broken_record_is_none(tmp_path, capsys, text):
    stopped(tmp_path / "run", "tensorboard", 8)
    (tmp_path / "run" / "tracking.json").write_text(text)
    folder = run(tmp_path / "run", "auto")
    assert capsys.readouterr().err.count("tracking.json: is no record of trackers; they are told of the run as of") == 1
    assert_shows(tensorboard_scalars(folder), folder)
    assert json.loads((tmp_path / "run" / "tracking.json").read_text())["services"].keys() == {"tensorboard"}


# --- a service that keeps what it is told ----------------------------------------------------------------------------


class Service:
    """MLflow's tracker, with runs in a dict: by name, by key (step, value) pairs."""

    def __init__(self, runs):
        self.runs, self.fail_at = runs, None

    def __call__(self, project, run_name, run_id):
        self.shown = self.runs.setdefault(run_id or run_name, {})
        info = types.SimpleNamespace(run_id=run_id or run_name)
        self.tracker = types.SimpleNamespace(info=info)
        return self

    def start(self):
        pass

    def store_init_configuration(self, values):
        pass

    def log(self, values, step):
        if step == self.fail_at:
            raise OSError("down")
        for key, value in values.items():
            self.shown.setdefault(key, []).append((step, value))

    def finish(self):
        pass


@pytest.fixture
def service(monkeypatch):
    told = Service({})
    monkeypatch.setattr(tracking, "_installed", lambda name: True)
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "mlflow", told)
    return told


def test_what_was_not_tracked_is_told_by_who_goes_on(tmp_path, service):
    stopped(tmp_path / "run", "none", 4)
    stopped(tmp_path / "run", "mlflow", 8)
    stopped(tmp_path / "run", "none", 12)
    folder = run(tmp_path / "run", "mlflow")
    [shown] = service.runs.values()
    assert_shows(shown, folder)


def test_each_end_that_is_not_well_opens_another_run(tmp_path, service, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tracking.Tracking, "finish", lambda self: None)
        killed(tmp_path / "run", "mlflow", 5)
        killed(tmp_path / "run", "mlflow", 8)
    stopped(tmp_path / "run", "mlflow", 10)
    folder = run(tmp_path / "run", "mlflow")
    name = json.loads((tmp_path / "run" / "tracking.json").read_text())["name"]
    assert [*service.runs] == [name, f"{name}-2", f"{name}-3"]
    assert_shows(service.runs[f"{name}-3"], folder)


def test_what_a_service_missed_while_it_was_down_is_told_by_who_goes_on(tmp_path, service):
    service.fail_at = 7
    stopped(tmp_path / "run", "mlflow", 12)
    service.fail_at = None
    folder = run(tmp_path / "run", "mlflow")
    first, second = service.runs.values()
    assert [step for step, _ in first["target/loss"]] == [*range(1, 7)]
    assert_shows(second, folder)


def test_a_finished_run_is_told_once(tmp_path, service):
    for _ in range(2):  # the second does the steps after the last checkpoint again
        folder = run(tmp_path / "run", "mlflow")
    [shown] = service.runs.values()
    assert_shows(shown, folder, timing=False)


def test_an_adapted_run_is_another_with_all_that_its_logs_hold(tmp_path, service):
    stopped(tmp_path / "run", "mlflow", 8)
    folder = run(tmp_path / "run", "mlflow", adapt=True, name="other")
    assert len(service.runs) == 2
    assert_shows([*service.runs.values()][1], folder)


def test_lines_of_other_domains_are_not_told(tmp_path, service):
    folder = RunFolder(tmp_path / "run", {"domains": DOMAINS})
    folder.append(run(tmp_path / "other", "none").steps[0])
    adapted = RunFolder(tmp_path / "run", {"domains": DOMAINS[:2]}, adapt=True)
    with tracked(adapted, "mlflow"):
        adapted.rewind(1)
        assert adapted.listener._trackers.keys() == {"mlflow"}
    assert [*service.runs.values()] == [{}]


# --- what services are started with -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "netrc", "has"),
    [
        ({}, None, False),
        ({"WANDB_API_KEY": "x" * 40}, None, True),
        ({}, "machine api.wandb.ai\n  login user\n  password secret\n", True),
        ({}, "machine elsewhere.org\n  login user\n  password secret\n", False),
        ({}, "machine\n", False),
    ],
)
def test_where_wandb_finds_a_key(tmp_path, monkeypatch, environment, netrc, has):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc is not None:
        (tmp_path / "no-netrc").write_text(netrc)
        (tmp_path / "no-netrc").chmod(0o600)
    assert tracking._has_key("https://api.wandb.ai") == has


def test_the_environment_is_as_before(tmp_path, monkeypatch):
    monkeypatch.setenv("B", "theirs")
    told = tracking.Tracking(RunFolder(tmp_path / "run", {"domains": DOMAINS}), ())
    told._default("A", "ours")
    told._default("B", "ours")
    assert (os.environ["A"], os.environ["B"]) == ("ours", "theirs")
    told.finish()
    assert "A" not in os.environ
    assert os.environ["B"] == "theirs"
