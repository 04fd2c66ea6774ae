"""A run's folder: what is logged, saved, resumed, adapted and refused, with toy trainers."""

import errno
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from acodm_env import files
from acodm_env.agents.baselines import make_mixer
from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.run.checkpoints import Checkpoints
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.experiments.run.loop import Saving, nonfinite, run_mixer
from acodm_env.experiments.run.preemption import Preempted
from acodm_env.files import disk_errors, read_json
from acodm_env.lock import claimed
from toy import ToyTrainer

BEST = (0.6, 0.3, 0.1)


def config(**changes):
    domains = [f"domain{index}" for index in range(3)]
    return {"domains": domains, "mixer": "odm-released", "seed": 0, "batch_size": 64} | changes


def run(path, *, trainer=None, mixer="odm-released", changes=(), **saving):
    folder = RunFolder(path, config(mixer=mixer, **dict(changes)), adapt=saving.get("adapt", False))
    trainer = trainer or ToyTrainer(BEST)
    settings = Saving(**{"every": 3, **saving})
    run_mixer(folder, trainer, make_mixer(mixer), seed=0, evaluations=5, saving=settings)
    return folder


def lines(folder, name):
    records = (json.loads(line) for line in (folder.path / name).read_text().splitlines())
    return [{key: value for key, value in record.items() if not key.startswith("seconds")} for record in records]


def logged(path):
    return len((path / "stats.jsonl").read_text().splitlines()) if (path / "stats.jsonl").exists() else 0


def stopped(path, step, **saving):
    """Ask a run to end once it has done `step` steps."""
    with pytest.raises(Preempted) as end:
        run(path, stop=lambda: logged(path) >= step, **saving)
    return end.value


def assert_same(folder, whole):
    for name in ("stats.jsonl", "eval.jsonl"):
        assert lines(folder, name) == lines(whole, name)


# --- saving and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 4, 7, 19])
def test_asked_to_stop_it_saves_at_that_step_and_goes_on_to_the_same_lines(tmp_path, step, capsys):
    """Evaluations are due after 4, 8, … steps: one that is due at the end is made by who goes on."""
    end = stopped(tmp_path / "cut", step)
    assert f"after step {step} of 20" in str(end)
    last = Checkpoints(tmp_path / "cut" / "checkpoints").last()
    assert end.checkpoint == last
    assert last is None or last.name == f"step-{step:08d}"
    folder = run(tmp_path / "cut")
    assert_same(folder, run(tmp_path / "whole"))
    assert ("resumed from" in capsys.readouterr().err) == (step > 0)


@pytest.mark.parametrize(("when", "at"), [("test evaluation", 4), ("first evaluation", 0), ("checkpoint", 6)])
def test_asked_while_it_evaluates_or_saves_it_takes_no_further_step(tmp_path, when, at):
    asked = []

    class Interrupted(ToyTrainer):
        def evaluate(self, split):
            asked.extend([1] * (when != "checkpoint" and self.steps_done == at))
            return super().evaluate(split)

        def state_dict(self):
            asked.extend([1] * (when == "checkpoint" and self.steps_done == at))
            return super().state_dict()

    with pytest.raises(Preempted, match=f"after step {at} of 20"):
        run(tmp_path / "cut", trainer=Interrupted(BEST), stop=lambda: bool(asked))
    assert logged(tmp_path / "cut") == at
    last = Checkpoints(tmp_path / "cut" / "checkpoints").last()
    assert last is None if at == 0 else last.name == f"step-{at:08d}"
    assert_same(run(tmp_path / "cut"), run(tmp_path / "whole"))


def test_default_interval_and_final_checkpoint(tmp_path):
    run(tmp_path / "a", every=None, keep=100)
    assert Checkpoints(tmp_path / "a" / "checkpoints").steps() == [*range(2, 20, 2)]
    run(tmp_path / "b", every=7, keep=2, final=True)
    assert Checkpoints(tmp_path / "b" / "checkpoints").steps() == [14, 20]


def test_a_finished_run_that_lost_its_result_trains_no_more(tmp_path):
    folder = run(tmp_path / "a", final=True)
    before = lines(folder, "stats.jsonl")
    trainer = ToyTrainer(BEST)
    trainer.step = None
    assert lines(run(tmp_path / "a", trainer=trainer, final=True), "stats.jsonl") == before


def test_a_truncated_checkpoint_is_skipped_and_said(tmp_path, capsys):
    stopped(tmp_path / "cut", 13)
    state = tmp_path / "cut" / "checkpoints" / "step-00000013" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    folder = run(tmp_path / "cut")
    said = capsys.readouterr().err
    assert "skipped" in said
    assert "step-00000013: state.safetensors was cut short" in said
    assert "step-00000012: step 12 of 20" in said
    assert_same(folder, run(tmp_path / "whole"))


def test_a_line_cut_short_is_written_again(tmp_path):
    stopped(tmp_path / "cut", 13)
    with (tmp_path / "cut" / "stats.jsonl").open("a") as file:
        file.write('{"step": 14, "tok')
    (tmp_path / "cut" / ".stats.jsonl.abc").write_text("a kill's")
    assert_same(run(tmp_path / "cut"), run(tmp_path / "whole"))
    assert not (tmp_path / "cut" / ".stats.jsonl.abc").exists()


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    yield


def test_no_space_for_a_checkpoint(tmp_path, monkeypatch):
    parts, calls = files._safetensors, []
    monkeypatch.setattr(files, "_safetensors", lambda *a: full() if len(calls) == 2 else calls.append(1) or parts(*a))
    with pytest.raises(DataError, match=r"step-00000009: disk full .* last whole checkpoint, .*step-00000006, stays"):
        run(tmp_path / "cut")
    monkeypatch.undo()
    assert_same(run(tmp_path / "cut"), run(tmp_path / "whole"))


@pytest.mark.parametrize("log", ["stats.jsonl", "eval.jsonl"])
def test_no_space_for_a_line(tmp_path, monkeypatch, log):
    append = RunFolder.append

    def limited(self, line):
        if line.step == 8 and line.log == log:
            with disk_errors(self.path / log), (self.path / log).open("a") as stream:
                stream.write('{"step": 8, "to')
                stream.flush()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, line)

    monkeypatch.setattr(RunFolder, "append", limited)
    with pytest.raises(DataError, match=rf"{log}: disk full .* last whole checkpoint, .*step-00000006, stays"):
        run(tmp_path / "cut")
    monkeypatch.undo()
    assert_same(run(tmp_path / "cut"), run(tmp_path / "whole"))


def test_another_number_of_processes_is_said(tmp_path, capsys):
    two = ToyTrainer(BEST)
    two.ranks = SimpleNamespace(world=2)
    stopped(tmp_path / "cut", 7, trainer=two)
    assert "processes instead" not in capsys.readouterr().err
    run(tmp_path / "cut")
    assert "1 processes instead of 2: cursors are global, nothing was redistributed" in capsys.readouterr().err


# --- other settings --------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_and_adapted_to_by_the_flag(tmp_path, capsys):
    stopped(tmp_path / "run", 7)
    with pytest.raises(DataError, match=r"another run \(mixer='odm-released' there, 'uniform' now\).*--adapt"):
        run(tmp_path / "run", mixer="uniform")
    folder = run(tmp_path / "run", mixer="uniform", adapt=True)
    assert "adapted: mixer='uniform' (was 'odm-released'); the mixer begins anew" in capsys.readouterr().err
    records = lines(folder, "stats.jsonl")
    assert [record["step"] for record in records] == [*range(1, 21)]
    np.testing.assert_allclose([record["requested"] for record in records[7:]], 1 / 3)
    record = read_json(folder.path / "config.json")
    assert record["config"]["mixer"] == "uniform"
    assert record["adapted"] == [{"step": 7, "changed": {"mixer": ["odm-released", "uniform"]}}]
    assert read_json(folder.path / "before-step-00000007" / "config.json")["config"]["mixer"] == "odm-released"
    assert [path.name for path in (folder.path / "before-step-00000007").iterdir()] == ["config.json"]


def test_killed_just_after_adapting_it_goes_on_with_the_new_settings(tmp_path):
    stopped(tmp_path / "run", 7)
    stopped(tmp_path / "run", 0, mixer="uniform", adapt=True)
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest().identity["mixer"] == "uniform"
    assert len(lines(run(tmp_path / "run", mixer="uniform"), "stats.jsonl")) == 20


def test_logs_of_other_domains_are_put_aside(tmp_path):
    class Adaptable(ToyTrainer):
        def load_state_dict(self, state, adapt=False):
            super().load_state_dict(dict(state, drawn=np.zeros(2)) if adapt else state)

    stopped(tmp_path / "run", 7)
    fewer = {"domains": ["domain0", "domain1"]}
    folder = run(tmp_path / "run", trainer=Adaptable((0.6, 0.4)), changes=fewer, adapt=True)
    assert [record["step"] for record in lines(folder, "stats.jsonl")] == [*range(8, 21)]
    assert [record["step"] for record in lines(folder, "eval.jsonl")] == [7, 8, 12, 16, 20]
    old = [json.loads(line) for line in (folder.path / "before-step-00000007/stats.jsonl").read_text().splitlines()]
    assert [record["step"] for record in old] == [*range(1, 8)]
    assert len(old[0]["requested"]) == 3


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("batch_size", 32)])
@pytest.mark.parametrize("step", [2, 7])
def test_some_settings_never_change(tmp_path, name, value, step):
    """Not even before the first checkpoint, which comes after step 3."""
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", stop=lambda: 0 if logged(tmp_path / "run") < step else 1 // 0)
    with pytest.raises(DataError, match=f"must be of a run with {name}={value}; it is of one with"):
        run(tmp_path / "run", changes={name: value}, adapt=True)
    assert read_json(tmp_path / "run" / "config.json")["config"] == config()


def test_fewer_steps_than_done(tmp_path):
    stopped(tmp_path / "run", 7)
    with pytest.raises(ConfigError, match="steps=5: must be at least 7, which the run has done"):
        run(tmp_path / "run", trainer=ToyTrainer(BEST, horizon=5), changes={"steps": 5}, adapt=True)


def test_adapted_before_the_first_checkpoint_it_begins_again(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", stop=lambda: 0 if logged(tmp_path / "run") < 2 else 1 // 0)
    other = {"changes": {"corpus_fingerprint": "another"}, "trainer": ToyTrainer((0.1, 0.3, 0.6))}
    folder = run(tmp_path / "run", adapt=True, **other)
    other["trainer"] = ToyTrainer((0.1, 0.3, 0.6))
    assert_same(folder, run(tmp_path / "whole", **other))
    assert read_json(folder.path / "config.json")["adapted"][0]["step"] == 0


@pytest.mark.parametrize("data", [{"domains": ["domain0", "domain1"]}, {"corpus_fingerprint": "another"}])
def test_a_finished_run_learns_nothing_of_other_data_without_more_steps(tmp_path, data):
    run(tmp_path / "run", final=True)
    with pytest.raises(ConfigError, match="steps=20: must be more than 20, which the run has done"):
        run(tmp_path / "run", changes=data, adapt=True)
    assert read_json(tmp_path / "run" / "config.json")["config"] == config()


def test_adapted_twice_at_the_same_step_nothing_old_is_left_or_lost(tmp_path):
    run(tmp_path / "run", final=True)
    for count, steps in enumerate((21, 22, 23)):
        (tmp_path / "run" / "result.json").write_text(f'{{"of": {count}}}')
        (tmp_path / "run" / "model").mkdir()
        stopped(tmp_path / "run", 20, trainer=ToyTrainer(BEST, horizon=steps), changes={"steps": steps}, adapt=True)
        assert not (tmp_path / "run" / "result.json").exists()
        assert not (tmp_path / "run" / "model").exists()
    for count, name in enumerate(("", "-2", "-3")):
        archive = tmp_path / "run" / f"before-step-00000020{name}"
        assert read_json(archive / "result.json") == {"of": count}
        assert (archive / "model").is_dir()
    assert read_json(archive / "config.json")["config"]["steps"] == 22


def test_a_checkpoint_from_elsewhere_is_named(tmp_path):
    stopped(tmp_path / "there", 7, changes={"corpus_fingerprint": "aaa"})
    folder = RunFolder(tmp_path / "here", config(corpus_fingerprint="bbb"))
    (tmp_path / "there" / "checkpoints").rename(folder.path / "checkpoints")
    with pytest.raises(DataError, match=r"step-00000007: must be of a run with corpus_fingerprint='bbb'; .* 'aaa'"):
        run(tmp_path / "here", changes={"corpus_fingerprint": "bbb"})


# --- what is not finite ---------------------------------------------------------------------------------------------


def test_divergence_names_step_and_last_good_checkpoint(tmp_path, capsys):
    folder = run(tmp_path / "run", trainer=ToyTrainer(BEST, diverge_at=8), final=True)
    said = capsys.readouterr().err
    assert "step 8: the loss of domain0, domain1, domain2 is not finite; the step was not applied, and the run" in said
    assert f"the last good checkpoint is {folder.path / 'checkpoints' / 'step-00000006'}" in said
    assert [record["step"] for record in lines(folder, "eval.jsonl")] == [0, 4, 8]
    assert Checkpoints(folder.path / "checkpoints").steps() == [3, 6]


def test_guilty_domains_are_those_that_were_drawn(tmp_path):
    trainer = ToyTrainer(BEST)
    trainer.reset(np.random.default_rng(0))
    stats = trainer.step(np.array([0.5, 0.5, 0.0]))
    bad = replace(stats, losses=np.array([1.0, np.nan, np.nan]), diverged=True)
    names, none = trainer.info.domains, Checkpoints(tmp_path)
    assert nonfinite(bad, names, none) == (
        "step 1: the loss of domain1 is not finite; the step was not applied, and the run ends; "
        "there is no checkpoint yet"
    )
    gradient = replace(stats, losses=np.array([1.0, 2.0, np.nan]), skipped=1)
    assert nonfinite(gradient, names, none) == (
        "step 1: the gradient is, though no loss, not finite; the step was skipped, the run goes on"
    )


# --- the folder -----------------------------------------------------------------------------------------------------


def test_a_folder_of_other_things_is_refused_and_leftovers_of_a_kill_are_not(tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", ".holder.json", ".config.json.abc", "..holder.json.abc"):
        (tmp_path / "run" / name).write_text("")
    RunFolder(tmp_path / "run", config())
    (tmp_path / "git").mkdir()
    (tmp_path / "git" / ".git").mkdir()
    with pytest.raises(DataError, match="already holds other files"):
        RunFolder(tmp_path / "git", config())


def test_a_claim_ends_with_its_block(tmp_path):
    with claimed(tmp_path / "run"):
        holder = read_json(tmp_path / "run" / ".holder.json")
        assert holder["pid"] == os.getpid()
        with pytest.raises(DataError, match=f"must not be in use; process {os.getpid()} on .* writes there since"):
            claimed(tmp_path / "run").__enter__()
    with claimed(tmp_path / "run"):
        (tmp_path / "run" / ".holder.json").unlink()
        with pytest.raises(DataError, match="must not be in use; another process writes there"):
            claimed(tmp_path / "run").__enter__()
    assert not (tmp_path / "run" / ".holder.json").exists()
