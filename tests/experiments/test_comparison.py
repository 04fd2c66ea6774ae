import json
import shutil

import numpy as np
import pytest
from fake_benchmark import BATCH, COMMIT, DOMAINS, LENGTH, MIXERS, fake_benchmark, fake_transfer, plan_cells

from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.benchmark.plan import Cell
from acodm_env.experiments.comparison.load import load


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_whole_benchmark(tmp_path):
    found = load([fake_benchmark(tmp_path / "out", schedules=("cosine", "constant"), steps=40)])
    assert found.problems == ()
    assert (found.mixers, found.seeds, found.schedules) == (MIXERS, (0, 1, 2, 3, 4), ("cosine", "constant"))
    assert (found.domains, found.targets, found.reference) == (DOMAINS, DOMAINS, "odm-released")
    assert (found.horizon, found.tokens_per_step, found.git_commit) == (40, BATCH * LENGTH, COMMIT)
    assert found.objective.tolist() == [1 / 3] * 3
    assert found.title == "3 mixers, tiny on pocket, 40 steps"
    assert len(found.runs) == 2 * 3 * 5
    assert {run.status for run in found.runs} == {"finished"}
    assert [run.seed for run in found.select("uniform", "constant")] == [0, 1, 2, 3, 4]
    run = found.run("mean-of:odm-released", "cosine", 3)
    assert run.folder == tmp_path / "out" / "cells" / "cosine" / "mean-of-odm-released" / "seed3"
    assert run.command.startswith("acodm benchmark --out OUT --cell ")
    assert run.steps.tolist() == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert run.losses.shape == (9, 3)
    assert run.losses[0].tolist() == pytest.approx([5.0] * 3)
    assert [line.step for line in run.steps_taken()] == list(range(1, 41))
    assert found.run("uniform", "cosine", 9) is None


def test_fabricated_cells_have_what_a_plan_has():
    assert all(set(cell) == set(Cell.__dataclass_fields__) for cell in plan_cells(MIXERS, [0], ["cosine"]))


def test_every_state_is_told_apart(tmp_path):
    out = fake_benchmark(
        tmp_path / "out",
        missing=["cosine/uniform/seed0"],
        unfinished=["cosine/uniform/seed1"],
        failed=["cosine/uniform/seed2"],
        diverged=["cosine/uniform/seed3"],
        corrupted=["cosine/uniform/seed4"],
    )
    found = load([out])
    runs = found.select("uniform", "cosine")
    assert [run.status for run in runs] == ["missing", "unfinished", "failed", "diverged", "failed"]
    assert [run.ended for run in runs] == [False, False, False, True, False]
    assert runs[1].message == "evaluated up to step 20"
    assert runs[1].steps[-1] == 20  # the half that is there can be drawn
    assert runs[2].message.startswith("MemoryError: out of memory (log: ")
    assert runs[3].result["mean_loss_nats"] is None
    assert np.isnan(runs[3].losses[-1]).all()
    assert runs[4].message == "eval.jsonl was edited or cut short since the run finished; run it again"
    assert runs[0].losses.shape == (0, 3)
    assert runs[0].steps_taken() == []
    (problem,) = found.problems
    assert problem.startswith("4 of 15 runs are not finished: cosine/uniform/seed0 (missing); ")
    assert "cosine/uniform/seed2 (failed: MemoryError" in problem


def test_failed_preparation_explains_the_runs_that_it_kept_from_starting(tmp_path):
    out = fake_benchmark(
        tmp_path / "out",
        preparation_tokens={"odm-released": 100},
        missing=["cosine/odm-released/seed0"],
    )
    folder = out / "cells/preparation/odm-released/seed0"
    (folder / "result.json").unlink()
    (folder / "failed.json").write_text('{"error": "no space", "log": null}')
    found = load([out])
    assert found.run("odm-released", "cosine", 0).message == (
        "its preparation failed: preparation/odm-released/seed0 (no space)"
    )
    assert found.problems[0] == "1 of 5 preparations failed: preparation/odm-released/seed0 (no space)"


def test_half_written_folders_say_what_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    found = load([tmp_path / "empty"])
    assert (found.runs, found.mixers, found.reference, found.horizon) == ((), (), "", 0)
    assert found.problems[-1] == "no run is there yet"
    assert sum("no such file" in problem for problem in found.problems) == 2

    out = fake_benchmark(tmp_path / "begun", seeds=[0])
    shutil.rmtree(out / "cells")
    found = load([out])
    assert {run.status for run in found.runs} == {"missing"}
    assert found.problems[0].startswith("3 of 3 runs are not finished")
    (out / "plan.json").unlink()
    assert load([out]).runs == ()


def test_without_plan_or_config_the_runs_speak_for_themselves(tmp_path):
    out = fake_benchmark(tmp_path / "out", seeds=[0, 1])
    (out / "plan.json").write_text('{"reference": "od')
    (out / "config.json").unlink()
    found = load([out])
    assert sorted(found.mixers) == sorted(MIXERS)
    assert (found.seeds, found.reference, found.horizon) == ((0, 1), "odm-released", 40)
    assert {run.status for run in found.runs} == {"finished"}
    assert "mixer" not in found.settings
    assert any("not valid JSON" in problem for problem in found.problems)
    (out / "plan.json").write_text("[]")
    assert "is not the plan of a benchmark" in " ".join(load([out]).problems)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"diverged": false}', '{"domain_loss_nats": 3, "files": {}}'])
def test_broken_result_is_a_failed_run(tmp_path, text):
    out = fake_benchmark(tmp_path / "out", seeds=[0])
    (out / "cells/cosine/uniform/seed0/result.json").write_text(text)
    run = load([out]).run("uniform", "cosine", 0)
    assert (run.status, run.result) == ("failed", None)
    assert "result.json is not whole" in run.message


def test_results_that_do_not_belong_are_failed_runs(tmp_path):
    out = fake_benchmark(tmp_path / "out", seeds=[0])

    def strip(record):
        record.pop("files")
        record["domain_loss_nats"] = {"other": 1.0}

    edit(out / "cells/cosine/uniform/seed0/result.json", strip)
    assert load([out]).run("uniform", "cosine", 0).message.startswith("its evaluations are not those of its result")

    def poison(record):
        record.pop("files")
        record["mean_loss_nats"] = float("nan")

    edit(out / "cells/cosine/odm-released/seed0/result.json", poison)
    assert "not finite (mean_loss_nats)" in load([out]).run("odm-released", "cosine", 0).message

    edit(out / "cells/cosine/mean-of-odm-released/seed0/result.json", lambda record: record["cost"].pop("learning"))
    assert "KeyError: 'learning'" in load([out]).run("mean-of:odm-released", "cosine", 0).message


def test_garbage_in_a_log_is_named_and_never_its_end(tmp_path):
    out = fake_benchmark(tmp_path / "out", seeds=[0], unfinished=["cosine/uniform/seed0"])
    folder = out / "cells/cosine/uniform/seed0"
    whole = (folder / "eval.jsonl").read_bytes()
    (folder / "eval.jsonl").write_bytes(whole + b'{"step": 25, "losses": [1.0], "targets": ["a"]}\n')
    assert load([out]).run("uniform", "cosine", 0).steps[-1] == 20  # a row of one loss belongs to no three targets
    (folder / "eval.jsonl").write_bytes(b"\xff\xfe{\n" + whole)
    found = load([out])
    assert found.run("uniform", "cosine", 0).status == "failed"
    assert "eval.jsonl, line 1: must be a whole line" in " ".join(found.problems)
    with (folder / "stats.jsonl").open("ab") as file:
        file.write(b'{"step": 99}\n')
    with pytest.raises(DataError, match=r"stats\.jsonl, line 21: must be a whole line"):
        found.run("uniform", "cosine", 0).steps_taken()


def test_perplexity_and_loss_leave_out_targets_without_weight(tmp_path):
    out = fake_benchmark(tmp_path / "out", seeds=[0], objective=[0.25, 0.75, 0.0], noise=0.0)
    found = load([out])
    run = found.run("uniform", "cosine", 0)
    run.losses[-1] = [np.log(2.0), np.log(10.0), np.nan]
    assert run.perplexity(found.objective)[-1] == pytest.approx(0.25 * 2 + 0.75 * 10)
    assert run.mean_loss(found.objective)[-1] == pytest.approx(0.25 * np.log(2) + 0.75 * np.log(10))
    run.losses[-1] = 1000.0
    assert np.isinf(run.perplexity(found.objective)[-1])  # and no warning


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        load([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="folder of a benchmark"):
        load([])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load([tmp_path / "thesis"])
    (tmp_path / "thesis" / "config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(ConfigError, match="no run's"):
        load([tmp_path / "thesis"])
    (tmp_path / "thesis" / "config.json").write_text('{"config": {"agent": "td3"}, "versions": {}}')
    with pytest.raises(ConfigError, match="another command"):
        load([tmp_path / "thesis"])
    out, run = fake_benchmark(tmp_path / "out", seeds=[0]), fake_transfer(tmp_path / "run")
    with pytest.raises(ConfigError, match="a benchmark alone, or only runs"):
        load([run, out])
    with pytest.raises(ConfigError, match="did you mean 'uniform'"):
        load([out], reference="unifrom")
    assert load([out], reference="uniform").reference == "uniform"


def test_plain_runs(tmp_path):
    folders = [fake_transfer(tmp_path / f"{name}{seed}", name, seed) for name in ("uniform", "ado") for seed in (1, 0)]
    found = load(folders)
    assert (found.mixers, found.seeds, found.schedules) == (("uniform", "ado"), (0, 1), ("cosine",))
    assert (found.reference, found.targets, found.problems) == ("uniform", DOMAINS, ())
    assert found.title == "2 mixers, tiny on pocket, 40 steps"
    run = found.run("ado", "cosine", 1)
    assert run.status == "finished"
    assert run.result["worst_domain_loss_nats"] == max(run.result["domain_loss_nats"].values())
    assert run.command == f"acodm transfer --mixer ado --out {tmp_path / 'ado1'}"  # as the run recorded it


def test_plain_runs_half_done(tmp_path):
    whole, half = fake_transfer(tmp_path / "whole"), fake_transfer(tmp_path / "half", "ado")
    broken = fake_transfer(tmp_path / "broken", "exp3")
    (half / "result.json").unlink()
    (half / "eval.jsonl").unlink()
    (broken / "config.json").write_text("{")
    found = load([half, whole, broken])
    assert [run.status for run in found.runs] == ["unfinished", "finished"]
    assert found.targets == DOMAINS
    assert len(found.problems) == 2
    assert str(broken) in found.problems[0]


def test_plain_runs_of_two_policies_are_two_rows(tmp_path):
    folders = [
        fake_transfer(tmp_path / name, "policy", seed, policy=fingerprint)
        for name, seed, fingerprint in (("a0", 0, "11"), ("a1", 1, "11"), ("b0", 0, "22"))
    ]
    found = load(folders)
    assert found.mixers == ("policy (a0)", "policy (b0)")
    assert [run.mixer for run in found.runs] == ["policy (a0)", "policy (a0)", "policy (b0)"]
    with pytest.raises(ConfigError, match="must not repeat policy with seed 0"):
        load([*folders, fake_transfer(tmp_path / "twin", "policy", 0, policy="11")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 80}, "must have steps=40 as .*; it has 80"),
        ({"corpus_fingerprint": "0" * 64}, "must have corpus_fingerprint="),
        ({"targets": ["a", "b"]}, "must have targets="),
    ],
)
def test_plain_runs_that_measure_different_things_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load([fake_transfer(tmp_path / "a"), fake_transfer(tmp_path / "b", "ado", **change)])


def test_plain_runs_that_differ_in_more_than_the_mixer_say_so(tmp_path):
    found = load([fake_transfer(tmp_path / "a"), fake_transfer(tmp_path / "b", "ado", learning_rate=4e-3)])
    assert found.problems == ("the runs differ in learning_rate (0.002, 0.004): not only the mixers differ",)
