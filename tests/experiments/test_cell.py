"""Cells run in this process: fairness, preparations, cost, resumption, damage, divergence."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from general_policy import general
from plugin import install, tiny

from acodm_env.errors import AcodmError
from acodm_env.experiments.benchmark.config import BenchmarkConfig
from acodm_env.experiments.benchmark.jobs import guarded, run_cell, state_of
from acodm_env.experiments.benchmark.planning import make_plan
from acodm_env.experiments.benchmark.scheduler import unfinished
from acodm_env.experiments.run.loop import run_mixer
from acodm_env.files import sha256
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.policy.dense import Policy


@pytest.fixture(scope="module", autouse=True)
def _plugins(tmp_path_factory):
    folder = str(install(tmp_path_factory.mktemp("site")))
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)
    sys.modules.pop("plugin_mixers", None)


@pytest.fixture(scope="module")
def done(tiny_corpus, tmp_path_factory, _plugins):
    """A finished benchmark of an online, a two-stage and two static rows."""
    out = tmp_path_factory.mktemp("bench") / "b"
    plan = make_plan(BenchmarkConfig(**tiny(tiny_corpus, out, mixers="wander,two-stage,proportional")), out)
    for cell in plan.cells:
        run_cell(out, cell.index)
    return out, plan


def results(done):
    out, plan = done
    return {c.name: json.loads((out / c.folder / "result.json").read_text()) for c in plan.cells if c.kind == "target"}


def test_every_mixer_starts_from_the_same_model_and_data(done):
    out, plan = done
    for seed in plan.seeds:
        cells = [cell for cell in plan.cells if cell.kind == "target" and cell.seed == seed]
        lines = [(out / c.folder / "eval.jsonl").read_text().splitlines()[0] for c in cells]
        first = {json.dumps(json.loads(line)["losses"]) for line in lines}
        assert len(first) == 1  # the losses of the untrained model, bit for bit
        assert len({results(done)[c.name]["data_seed"] for c in cells}) == 1
        assert len({results(done)[c.name]["cost"]["training"]["tokens"] for c in cells}) == 1
    assert results(done)["cosine/uniform/seed0"]["data_seed"] != results(done)["cosine/uniform/seed1"]["data_seed"]


def test_preparations_are_run_and_charged(done):
    out, plan = done
    cell = next(cell for cell in plan.cells if cell.kind == "preparation" and cell.seed == 1)
    folder = out / cell.folder
    record = json.loads((folder / "result.json").read_text())
    tokens = 6 * 32
    assert set(record["results"]) == {"first", "second"}
    # 4 + 3 steps, and two evaluations of 3 targets × 2 sequences each
    assert record["cost"]["tokens"] == (4 + 3) * tokens + 2 * 2 * (3 * 2 * 32)
    assert (folder / "first" / "model.safetensors").exists()
    assert not (folder / "second" / "model.safetensors").exists()
    two_stage = results(done)["cosine/two-stage/seed1"]
    assert two_stage["cost"]["preparation"]["tokens"] == record["cost"]["tokens"]
    assert two_stage["cost"]["preparation"]["flops"] == record["cost"]["flops"]
    played = json.loads((out / "cells/cosine/two-stage/seed1/stats.jsonl").read_text().splitlines()[0])["requested"]
    # by hand: wander at pace 0.5 raises domain 1, 2, 0 in turn; its mean over 4 steps
    logits = [np.zeros(3), np.array([0, 0.5, 0]), np.array([0, 0.5, 0.5]), np.array([0.5, 0.5, 0.5])]
    mean = np.mean([np.exp(x) / np.exp(x).sum() for x in logits], axis=0)
    np.testing.assert_allclose(played, mean, atol=1e-12)


def test_the_time_average_is_replayed_and_charged(done):
    out, _ = done
    source = [json.loads(line) for line in (out / "cells/cosine/wander/seed0/stats.jsonl").read_text().splitlines()]
    replay = [
        json.loads(line) for line in (out / "cells/cosine/mean-of-wander/seed0/stats.jsonl").read_text().splitlines()
    ]
    mean = np.mean([record["requested"] for record in source], axis=0)
    np.testing.assert_allclose([record["requested"] for record in replay], [mean] * len(replay), atol=1e-12)
    cost = results(done)["cosine/wander/seed0"]["cost"]
    assert results(done)["cosine/mean-of:wander/seed0"]["cost"]["preparation"]["tokens"] == cost["training"]["tokens"]


def test_a_finished_cell_is_left_alone_and_a_damaged_one_runs_again(done, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(done[0], out)
    plan = done[1]
    index = next(cell.index for cell in plan.cells if cell.name == "cosine/wander/seed0")
    folder = out / plan.cells[index].folder
    before = (folder / "result.json").stat().st_mtime_ns
    run_cell(out, index)
    assert (folder / "result.json").stat().st_mtime_ns == before
    assert unfinished(out, plan) == []
    whole = (folder / "eval.jsonl").read_text()
    (folder / "eval.jsonl").write_text(whole.replace("1", "2", 1))
    assert state_of(folder) == "corrupted"
    assert [cell.index for cell in unfinished(out, plan)] == [index]
    assert f"cell {index} (cosine/wander/seed0): its files were edited" in capsys.readouterr().err
    run_cell(out, index)
    assert state_of(folder) == "finished"
    again = (folder / "eval.jsonl").read_text()
    assert losses_of(again) == losses_of(whole)


def losses_of(lines):
    return [json.loads(line)["losses"] for line in lines.splitlines()]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {"eval.jsonl": "0"}}', "{}"])
def test_any_damage_to_a_result_is_seen(done, tmp_path, text):
    folder = tmp_path / "cell"
    shutil.copytree(done[0] / "cells/cosine/wander/seed0", folder)
    (folder / "result.json").write_text(text)
    assert state_of(folder) == "corrupted"


def test_a_killed_cell_goes_on_to_the_same_result(done, tiny_corpus, tmp_path, monkeypatch):
    import acodm_env.experiments.benchmark.jobs as cells

    out = tmp_path / "b"
    settings = tiny(tiny_corpus, out, mixers="wander,two-stage,proportional")
    plan = make_plan(BenchmarkConfig(**settings), out)

    def stop(stats):
        if stats.step == 5:
            raise KeyboardInterrupt

    name = "cosine/wander/seed1"
    index = next(cell.index for cell in plan.cells if cell.name == name)
    monkeypatch.setattr(cells, "run_mixer", lambda *args, **kwargs: run_mixer(*args, **{**kwargs, "on_step": stop}))
    with pytest.raises(KeyboardInterrupt):
        run_cell(out, index)
    assert state_of(out / plan.cells[index].folder) == "unfinished"
    monkeypatch.undo()
    run_cell(out, index)

    def lines(folder, file):
        rows = [json.loads(line) for line in (folder / file).read_text().splitlines()]
        return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]

    for file in ("stats.jsonl", "eval.jsonl"):
        assert lines(out / plan.cells[index].folder, file) == lines(done[0] / f"cells/{name}", file)


def test_one_cell_runs_those_it_needs(tiny_corpus, tmp_path):
    out = tmp_path / "b"
    plan = make_plan(BenchmarkConfig(**tiny(tiny_corpus, out, mixers="two-stage", seeds="1")), out)
    index = next(cell.index for cell in plan.cells if cell.name == "cosine/two-stage/seed0")
    run_cell(out, index)
    states = {cell.name: state_of(out / cell.folder) for cell in plan.cells}
    assert states.pop("cosine/two-stage/seed0") == "finished"
    assert [state for name, state in states.items() if name.startswith("preparation")] == ["finished"]
    assert {state for name, state in states.items() if not name.startswith("preparation")} == {"missing"}


def test_a_crash_leaves_its_reason_and_is_tried_again(tiny_corpus, tmp_path):
    out = tmp_path / "b"
    plan = make_plan(BenchmarkConfig(**tiny(tiny_corpus, out, mixers="crash", seeds="1", mean_of=False)), out)
    index = next(cell.index for cell in plan.cells if cell.mixer == "crash")
    assert guarded(out, index) == "RuntimeError: a deliberate failure"
    record = json.loads((out / plan.cells[index].folder / "failed.json").read_text())
    assert record["error"] == "RuntimeError: a deliberate failure"
    assert "Traceback" in Path(record["log"]).read_text()
    assert guarded(out, index) == "RuntimeError: a deliberate failure"


def test_a_diverged_run_is_a_result(tiny_corpus, tmp_path):
    out = tmp_path / "b"
    settings = tiny(tiny_corpus, out, mixers="uniform", learning_rate=1e30, seeds="1", steps=12, mean_of=False)
    plan = make_plan(BenchmarkConfig(**settings), out)
    run_cell(out, 0)
    result = json.loads((out / plan.cells[0].folder / "result.json").read_text())
    assert result["diverged"] is True
    assert result["mean_loss_nats"] is None
    assert result["cost"]["training"]["tokens"] < 12 * 6 * 32


def test_another_corpus_in_its_place_is_refused(done, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(done[0], out)
    record = json.loads((out / "config.json").read_text())
    record["config"]["corpus_fingerprint"] = "0" * 64
    (out / "config.json").write_text(json.dumps(record))
    shutil.rmtree(out / "cells")
    with pytest.raises(AcodmError, match="it was replaced"):
        run_cell(out, 0)


def test_targets_that_nobody_trains_on(tiny_corpus, tmp_path):
    out = tmp_path / "b"
    settings = tiny(tiny_corpus, out, domains="letters,numbers", targets="verbs=3,letters=1", seeds="1")
    plan = make_plan(BenchmarkConfig(**settings), out)
    run_cell(out, 0)
    result = json.loads((out / plan.cells[0].folder / "result.json").read_text())
    losses = result["domain_loss_nats"]
    assert list(losses) == ["letters", "verbs"]
    assert result["mean_loss_nats"] == pytest.approx(0.75 * losses["verbs"] + 0.25 * losses["letters"])
    assert result["mean_perplexity"] == pytest.approx(0.75 * np.exp(losses["verbs"]) + 0.25 * np.exp(losses["letters"]))
    assert result["worst_domain_loss_nats"] == max(losses.values())


def test_a_thousand_finished_cells_are_read_in_two_seconds(done, tmp_path):
    """300 lines of statistics each, as a real run has."""
    source = done[0] / "cells/cosine/wander/seed0"
    cell = tmp_path / "cell"
    shutil.copytree(source, cell)
    lines = (cell / "stats.jsonl").read_text().splitlines(keepends=True)
    (cell / "stats.jsonl").write_text("".join((lines * 100)[:300]))
    result = json.loads((cell / "result.json").read_text())
    result["files"]["stats.jsonl"] = sha256(cell / "stats.jsonl")
    (cell / "result.json").write_text(json.dumps(result))
    folders = []
    for index in range(1000):
        folder = tmp_path / f"{index}"
        folder.mkdir()
        for file in cell.iterdir():
            (folder / file.name).hardlink_to(file)
        folders.append(folder)
    started = time.perf_counter()
    assert all(state_of(folder) == "finished" for folder in folders)
    assert time.perf_counter() - started < 2.0


def test_a_policy_is_charged_for_its_learning_and_its_untrained_control_is_not(tiny_store, tmp_path):
    policy = Policy(
        domains=tiny_store.domains,
        fields=(("progress", 1),),
        mean=np.zeros(1),
        scale=np.ones(1),
        clip=10.0,
        layers=((np.array([[2.0], [-2.0], [0.0]], np.float32), np.zeros(3, np.float32), "tanh"),),
        action=ActionMap(),
        bounds=Bounds(),
        interaction=InteractionConfig(),
        decision_every=2,
        horizon=6,
        provenance={
            "learning_tokens": 1000,
            "learning_seconds": 2.0,
            "config": {"proxy": "tiny", "sequence_length": 32},
        },
    )
    policy.save(tmp_path / "policy")
    out = tmp_path / "b"
    settings = tiny(tiny_store.path, out, mixers="uniform", policy=str(tmp_path / "policy"), mean_of=False)
    plan = make_plan(BenchmarkConfig(**settings), out)
    assert plan.mixers == ("odm-released", "uniform", "policy", "policy-untrained")
    shown = {}
    for cell in plan.cells:
        if cell.mixer.startswith("policy"):
            run_cell(out, cell.index)
            lines = (out / cell.folder / "stats.jsonl").read_text().splitlines()
            cost = json.loads((out / cell.folder / "result.json").read_text())["cost"]
            shown[cell.name] = ([json.loads(line)["requested"] for line in lines], cost["learning"])
    mixtures, learning = shown["cosine/policy/seed0"]
    assert mixtures[5][0] > mixtures[5][2] > mixtures[5][1]  # as its weights say, once there is progress
    assert (learning["tokens"], learning["seconds"]) == (1000, 2.0)
    assert learning["flops"] > 0
    controls = [shown[f"cosine/policy-untrained/seed{seed}"] for seed in (0, 1)]
    assert [cost["tokens"] for _, cost in controls] == [0, 0]
    assert controls[0][0] != controls[1][0]  # another draw for every seed
    assert controls[0][0] != mixtures


def test_models_are_kept_where_that_is_asked_for(tiny_corpus, tmp_path):
    from acodm_env.experiments.evaluation.subjects import find_subjects

    settings = tiny(tiny_corpus, tmp_path / "b", mixers="uniform", seeds="1", mean_of=False, keep_models=True)
    plan = make_plan(BenchmarkConfig(**settings), tmp_path / "b")
    for cell in plan.cells:
        run_cell(tmp_path / "b", cell.index)
        assert state_of(tmp_path / "b" / cell.folder) == "finished"
    first = next(cell for cell in plan.cells if cell.kind == "target")
    (subject,) = find_subjects([str(tmp_path / "b" / first.folder)])
    assert (subject.model / "model.safetensors").is_file()
    assert subject.config["corpus_fingerprint"]


def test_one_proxy_run_is_measured_on_its_way_and_charged(tiny_corpus, tmp_path):
    out = tmp_path / "b"
    names = ("letters", "numbers")
    settings = tiny(tiny_corpus, out, mixers="marginal-value", seeds="1", steps=10, mean_of=False)
    plan = make_plan(BenchmarkConfig(**settings, targets="letters=3,numbers=1"), out)
    for cell in plan.cells:
        if cell.kind == "preparation" or cell.mixer == "marginal-value":
            run_cell(out, cell.index)
    folder = out / next(cell.folder for cell in plan.cells if cell.kind == "preparation")
    record = json.loads((folder / "result.json").read_text())
    proxy = record["results"]["proxy"]
    assert proxy["steps"] == [4, 5, 8, 10]
    assert proxy["losses"][-1] == proxy["final_losses"]
    lines = [json.loads(line) for line in (folder / "proxy" / "stats.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["eval_losses"] for line in lines if line["eval_losses"] is not None}
    assert measured == dict(zip((4, 5, 8), proxy["losses"][:3], strict=True))
    # ten steps, and before, at the end and three times between: 2 targets × 2 sequences each
    assert record["cost"]["tokens"] == 10 * 6 * 32 + 5 * (2 * 2 * 32)
    played = json.loads((out / "cells/cosine/marginal-value/seed0/stats.jsonl").read_text().splitlines()[0])
    losses = np.array(proxy["losses"])
    slopes = ((losses[0] - losses[2]) / np.log(8 / 4) + (losses[1] - losses[3]) / np.log(10 / 5)) / 2
    chosen = np.maximum([0.75, 0.25] * slopes, 0) ** 0.7
    expected = dict.fromkeys(("letters", "numbers", "verbs"), 0.05 / 3)
    expected |= {name: 0.05 / 3 + 0.95 * x for name, x in zip(names, chosen / chosen.sum(), strict=True)}
    np.testing.assert_allclose(played["requested"], [expected[name] for name in sorted(expected)], atol=1e-9)


def test_pilot_replays_a_run_under_a_policy_at_its_own_pace(tiny_corpus, tmp_path):
    out, policy = tmp_path / "b", general(probe_sequences=None, decision_every=3, horizon=6)
    policy.save(tmp_path / "policy")
    options = {"pilot": {"policy": str(tmp_path / "policy")}}
    settings = tiny(tiny_corpus, out, mixers="pilot", options=options, seeds="1", mean_of=False, targets="letters")
    plan = make_plan(BenchmarkConfig(**settings), out)
    for cell in plan.cells:
        if cell.kind == "preparation" or cell.mixer == "pilot":
            run_cell(out, cell.index)
    folder = out / next(cell.folder for cell in plan.cells if cell.kind == "preparation")
    lines = [json.loads(line) for line in (folder / "proxy" / "stats.jsonl").read_text().splitlines()]
    mixtures = [line["requested"] for line in lines]
    assert mixtures[:3] == [mixtures[0]] * 3
    assert mixtures[3:] == [mixtures[3]] * 3 != [mixtures[0]] * 3
    played = json.loads((out / "cells/cosine/pilot/seed0/stats.jsonl").read_text().splitlines()[0])["requested"]
    np.testing.assert_allclose(played, np.mean(mixtures, axis=0), atol=1e-9)
    cost = json.loads((out / "cells/cosine/pilot/seed0/result.json").read_text())["cost"]
    assert cost["preparation"]["tokens"] >= 6 * 6 * 32
