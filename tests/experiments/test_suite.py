"""A suite on a hand-made corpus, in this process: shared runs, resumption, policies, what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from acodm_env.corpus.preparation.prepare import Preparation, prepare
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import AcodmError, ConfigError
from acodm_env.experiments.benchmark.command import run
from acodm_env.experiments.benchmark.config import BenchmarkConfig
from acodm_env.experiments.benchmark.jobs import guarded
from acodm_env.experiments.benchmark.plan import Plan
from acodm_env.experiments.benchmark.scheduler import unfinished
from acodm_env.experiments.benchmark.suite import command as suite
from acodm_env.experiments.benchmark.suite import tasks as suite_tasks
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.policy.dense import Policy

WORDS = {
    "greek": ["alpha", "beta", "gamma", "delta", "epsilon"],
    "numbers": [str(n) for n in range(100, 140)],
    "verbs": ["run", "walk", "sit", "stand", "read", "write"],
    "colours": ["red", "green", "blue", "yellow", "violet", "orange"],
}
TASKS = {
    "greek": {"targets": {"greek": 1}, "cut": {"greek": 12}},
    "untrained": {"targets": {"verbs": 1}, "exclude": ["verbs"], "grid": ["half"]},
    "mean": {},
    "perplexity": {"objective": "perplexity", "grid": ["mean-of-odm"]},
}
ROWS = "uniform,odm-released,share-0.5,share-1,marginal-value,grid"
ran: list[str] = []


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("suite")
    rng = np.random.default_rng(0)
    with (root / "data.jsonl").open("w") as file:
        for domain, words in WORDS.items():
            for _ in range(120):
                text = " ".join(rng.choice(words, size=40)) + "\n"
                file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    source = Source(name=str(root / "data.jsonl"), domain_field="domain")
    prepare(Preparation(source=source, splits=(0.8, 0.1, 0.1), tokenizer="train:300"), root / "store")
    return root / "store"


@pytest.fixture(scope="module", autouse=True)
def _here():
    """Cells run in this process, and the suite has tasks of its own."""
    patch = pytest.MonkeyPatch()

    def in_process(out: Path, plan: Plan, engine: str, jobs: int, quiet: bool, label: str) -> dict[int, str]:
        failures = {}
        for cell in unfinished(out, plan):
            ran.append(f"{label}/{cell.name}")
            message = guarded(out, cell.index)
            if message is not None:
                failures[cell.index] = message
        return failures

    settings = {"model": "tiny", "steps": 6, "seeds": "2", "schedules": "cosine", "evaluations": 2}
    file = {"settings": settings, "corpora": [{"domains": [*WORDS], "tasks": TASKS}]}
    known = suite_tasks.suite_file
    patch.setattr(suite, "run_unfinished", in_process)
    patch.setattr(suite_tasks, "suite_file", lambda name: file if name == "mixing" else known(name))
    yield
    patch.undo()


def config_of(corpus, out, **changes):
    settings = {"suite": "mixing", "corpus": str(corpus), "batch_size": 8, "sequence_length": 32, "eval_sequences": 4}
    return BenchmarkConfig(**(settings | {"out": str(out), "quiet": True} | changes))


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    """A finished suite, without a policy; and what was run for it."""
    out = tmp_path_factory.mktemp("done") / "s"
    ran.clear()
    assert run(config_of(corpus, out, rows=ROWS)) == 0
    return out, list(ran)


def result_of(out, task, row, seed=0):
    return json.loads((out / task / "cells/cosine" / row.replace(":", "-") / f"seed{seed}/result.json").read_text())


def rows_of(out):
    with (out / "regret.csv").open() as file:
        return list(csv.DictReader(file))


def test_runs_that_differ_in_the_objective_alone_are_made_once(done):
    out, cells = done
    assert "mean/cosine/uniform/seed0" in cells
    for name in ("uniform/seed0", "odm-released/seed1"):
        assert f"perplexity/cosine/{name}" not in cells
    assert not [cell for cell in cells if cell.startswith("perplexity/preparation")]
    one, other = (result_of(out, task, "odm-released", 1) for task in ("mean", "perplexity"))
    assert other["run_by"].endswith("mean/cells/cosine/odm-released/seed1")
    assert one["domain_loss_nats"] == other["domain_loss_nats"]
    assert one["cost"] == other["cost"]
    losses = np.array([*one["domain_loss_nats"].values()])
    assert one["objective_nats"] == pytest.approx(losses.mean())
    assert other["objective_nats"] == pytest.approx(np.log(np.exp(losses).mean()))
    held = np.array([*one["validation_loss_nats"].values()])
    assert other["validation_objective_nats"] == pytest.approx(np.log(np.exp(held).mean()))


def test_a_borrowed_run_is_the_run(done, corpus, tmp_path):
    """Made alone, the same row has the same losses, and so has one that needs a preparatory run."""
    run(config_of(corpus, tmp_path / "alone", tasks="perplexity", rows="uniform,marginal-value", seeds="1"))
    for row in ("uniform", "odm-released", "marginal-value"):
        mine, theirs = (result_of(out, "perplexity", row) for out in (tmp_path / "alone", done[0]))
        assert mine["domain_loss_nats"] == theirs["domain_loss_nats"]
        assert mine["objective_nats"] == theirs["objective_nats"]
        assert mine["cost"]["preparation"]["flops"] == theirs["cost"]["preparation"]["flops"]


def test_equal_mixtures_are_one_row(done):
    out, cells = done
    assert not [cell for cell in cells if cell.startswith(("mean/cosine/share", "untrained/cosine/share"))]
    same = json.loads((out / "mean/task.json").read_text())["same"]
    assert {"share-0.5": "uniform", "share-1": "uniform"}.items() <= same.items()
    lines = {row["mixer"]: row for row in rows_of(out) if (row["task"], row["seed"]) == ("mean", "0")}
    assert lines["share-0.5"]["objective_nats"] == lines["uniform"]["objective_nats"]


def test_cut_excluded_and_weighted_as_the_task_says(done):
    out, _ = done
    config = json.loads((out / "greek/config.json").read_text())["config"]
    assert (config["cut"], config["metric"]) == ({"greek": 12}, "loss")
    assert dict(zip(config["targets"], config["objective"], strict=True))["greek"] == 1.0
    result = result_of(out, "greek", "share-1")
    assert result["objective_nats"] == result["domain_loss_nats"]["greek"]
    line = (out / "greek/cells/cosine/share-1/seed0/stats.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["epochs"][[*config["domains"]].index("greek")] == pytest.approx(6 * 8 / 12)
    config = json.loads((out / "untrained/config.json").read_text())["config"]
    assert "verbs" not in config["domains"]
    assert "verbs" in config["targets"]


def test_the_pair_is_of_the_best_two_by_validation(done):
    out, cells = done
    halves = {cell.split("/")[2] for cell in cells if "/half-" in cell}
    assert halves == {"half-greek", "half-numbers", "half-colours"}
    found = {row: result_of(out, "untrained", row)["validation_objective_nats"] for row in halves}
    best = sorted(sorted(found, key=found.get)[:2])
    pairs = {cell.split("/")[2] for cell in cells if "/pair-" in cell}
    assert pairs == {"pair-" + "-".join(row.removeprefix("half-") for row in best)}


def test_the_same_command_runs_nothing_and_shows_the_same(done, corpus, capsys):
    out, _ = done
    before = (out / "regret.csv").read_text()
    ran.clear()
    assert run(config_of(corpus, out, rows=ROWS)) == 0
    assert ran == []
    assert (out / "regret.csv").read_text() == before
    text = capsys.readouterr().out
    assert "Tasks: test objective at the end" in text
    assert all(task in text for task in TASKS)
    assert "regret" in (out / "suite.html").read_text()
    assert (out / "suite.png").read_bytes()[:4] == b"\x89PNG"


def test_an_interrupted_suite_goes_on(done, corpus):
    out, _ = done
    (out / "greek/cells/cosine/share-0.5/seed1/result.json").unlink()
    ran.clear()
    assert run(config_of(corpus, out, tasks="greek", rows="share-0.5")) == 0
    assert ran == ["greek/cosine/share-0.5/seed1"]


def policy_of(store: TokenStore, tilt: float) -> Policy:
    """Towards the first domain as the run goes on."""
    weights = np.zeros((len(store.domains), 1), np.float32)
    weights[0] = tilt
    return Policy(
        **{"domains": store.domains, "fields": (("progress", 1),), "mean": np.zeros(1), "scale": np.ones(1)},
        **{"clip": 10.0, "layers": ((weights, np.zeros(len(store.domains), np.float32), "tanh"),)},
        **{"action": ActionMap(), "bounds": Bounds(), "interaction": InteractionConfig()},
        **{"decision_every": 2, "horizon": 6},
    )


def test_policies_have_rows_of_their_own(corpus, tmp_path):
    store, out = TokenStore.open(corpus), tmp_path / "s"
    policy_of(store, 2.0).save(tmp_path / "first")
    chosen = {"tasks": "mean", "rows": "uniform,generalist,generalist-untrained,mean-of:generalist", "seeds": "1"}
    assert run(config_of(corpus, out, policy=str(tmp_path / "first"), **chosen)) == 0
    rows = {row["mixer"] for row in rows_of(out)}
    assert {"generalist", "generalist-untrained", "mean-of:generalist", "best-static"} <= rows
    policy_of(store, -2.0).save(tmp_path / "second")
    with pytest.raises(ConfigError, match="--policy NAME=DIR"):
        run(config_of(corpus, out, policy=str(tmp_path / "second"), **chosen))
    ran.clear()
    named = {**chosen, "rows": "mine,mean-of:mine"}
    assert run(config_of(corpus, out, policy=f"mine={tmp_path / 'second'}", **named)) == 0
    assert ran == ["mean/cosine/mine/seed0", "mean/cosine/mean-of:mine/seed0"]
    assert {"mine", "mean-of:mine", "generalist", "mean-of:generalist"} <= {row["mixer"] for row in rows_of(out)}
    policy_of(store, 1.0).save(tmp_path / "second")  # replaced behind the plan's back
    (out / "mean/cells/cosine/mine/seed0/result.json").unlink()
    plan = Plan.load(out / "mean")
    index = next(cell.index for cell in plan.cells if cell.mixer == "mine")
    assert "it was replaced" in guarded(out / "mean", index)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "greek"}, "targets=greek: cannot be chosen for --suite mixing"),
        ({"cut": "greek=3"}, "cannot be chosen for --suite"),
        ({"rows": "share-0.4"}, "did you mean 'share-0"),
        ({"tasks": "grek"}, "did you mean 'greek'"),
        ({"schedules": "cosine,constant"}, "must be one learning-rate schedule"),
        ({"policy": "nowhere"}, "policy=nowhere"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(corpus, tmp_path, changes, message):
    with pytest.raises(AcodmError, match=message):
        run(config_of(corpus, tmp_path / "s", **changes))
    assert not (tmp_path / "s").exists()


def test_tasks_and_rows_are_of_suites(corpus, tmp_path):
    with pytest.raises(ConfigError, match="give --suite mixing too"):
        run(config_of(corpus, tmp_path / "s", suite=None, rows="uniform"))
    with pytest.raises(ConfigError, match="did you mean 'mixing'"):
        config_of(corpus, tmp_path / "s", suite="mixin")


def test_the_plan_alone_runs_nothing(corpus, tmp_path, capsys):
    ran.clear()
    assert run(config_of(corpus, tmp_path / "s", plan=True, tasks="mean")) == 0
    assert ran == []
    assert "mean" in capsys.readouterr().out
    assert not (tmp_path / "s").exists()  # else a part that is run later would bring all that was planned
