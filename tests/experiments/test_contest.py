"""`acodm contest` and `acodm train --algo apg` on problems small enough for a test."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.agents.apg import ApgConfig
from acodm_env.errors import ConfigError
from acodm_env.experiments import cli
from acodm_env.experiments.policy.config import TrainConfig
from acodm_env.experiments.policy.train import make_learner
from acodm_env.experiments.surrogate import contest_jobs as contest_cells
from acodm_env.experiments.surrogate.contest import run
from acodm_env.experiments.surrogate.contest_config import ContestConfig
from acodm_env.policy.load import load_policy

PROBLEMS = {"num_domains": [3, 4], "decisions": [4, 5]}
QUICK = {"problems": PROBLEMS, "decisions": 4, "unseen": 24, "minutes": 0.02, "seeds": 1, "quiet": True}


@pytest.fixture
def small(monkeypatch):
    """apg's defaults, made small."""
    defaults = {"iterations": 4, "rows": 24, "pool": 1, "hidden": 8}
    monkeypatch.setattr(contest_cells.apg, "ApgConfig", lambda **given: ApgConfig(**(defaults | given)))


def test_learners_and_rules_stand_in_one_table_and_are_not_learned_twice(tmp_path, capsys, small):
    config = ContestConfig(learners="apg,equivariant-ppo@apg", out=str(tmp_path / "run"), **QUICK)
    run(config)
    printed = capsys.readouterr().out
    with (tmp_path / "run" / "contest.csv").open() as file:
        rows = {row["learner"]: row for row in csv.DictReader(file)}
    rules = {f"target share {share}" for share in ("0.3", "0.5", "0.7", "1")}
    begun = {"equivariant-ppo@apg", "equivariant-ppo@apg, last"}
    assert rows.keys() == {"apg", "uniform", "best static"} | begun | rules
    assert float(rows["uniform"]["share"]) == pytest.approx(0, abs=1e-3)
    assert float(rows["best static"]["share"]) == 1
    assert all(float(row["share"]) < 1.2 for row in rows.values())
    policy = load_policy(tmp_path / "run" / "policies" / "equivariant-ppo@apg-0")
    assert policy.domains == ()
    before = "equivariant-ppo@apg, last" if policy.provenance["algo"] == "equivariant-ppo" else "apg"
    assert rows["equivariant-ppo@apg"]["share"] == rows[before]["share"]  # it or what it began with
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "cells").iterdir()}
    run(config)
    assert capsys.readouterr().out == printed
    assert stamps == {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "cells").iterdir()}


def test_a_policy_decides_as_often_as_it_learned_to(monkeypatch, small):
    judge = contest_cells.Judge(ContestConfig(**QUICK | {"decisions": 8}), 0)
    policy = contest_cells.learn_apg(judge.config, 0, 0.1)
    asked = []
    monkeypatch.setattr(type(policy), "act", counting(type(policy).act, asked))
    judge.policy(policy)
    judge.policy(replace(policy, decision_every=4))
    assert len(asked) == 8 + 2


def counting(act, asked):
    def counted(*arguments):
        asked.append(1)
        return act(*arguments)

    return counted


def test_ablation_leaves_out_a_field_each(tmp_path, capsys, small, monkeypatch):
    monkeypatch.setattr(contest_cells, "GENERAL_FIELDS", ("size", "elasticity", "progress"))
    run(ContestConfig(ablate=True, out=str(tmp_path / "run"), **QUICK))
    printed = capsys.readouterr().out
    assert all(f"without {name}" in printed for name in ("size", "elasticity", "progress"))
    policy = load_policy(tmp_path / "run" / "policies" / "without-size-0")
    assert [name for name, _ in policy.fields] == ["elasticity", "progress"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learners": "apg,td4"}, "did you mean 'td3'"),
        ({"learners": "td3@apg,apg"}, "must be an equivariant learner"),
        ({"learners": "equivariant-ppo@apg"}, "must come with apg"),
        ({"minutes": 0}, "minutes=0"),
        ({"seeds": 0}, "seeds=0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ContestConfig(**settings)


APG = ["train", "--algo", "apg", "--quiet"]
AGENT = json.dumps({"iterations": 3, "rows": 16, "pool": 1, "hidden": 8})
SURROGATE = json.dumps({"problems": PROBLEMS})


def acodm(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


def test_apg_by_command_writes_a_policy_and_prints_it_again(tmp_path, capsys):
    command = [
        "train",
        "--algo",
        "apg",
        "--surrogate",
        SURROGATE,
        "--agent",
        AGENT,
        "--quiet",
        "--out",
        tmp_path / "run",
    ]
    assert acodm(*command) == 0
    printed = capsys.readouterr().out
    assert "unseen_share" in printed
    policy = load_policy(tmp_path / "run" / "policy")
    assert (policy.action.rate, policy.probe_sequences) == (0.0, 28)
    assert "## What it sees" in (tmp_path / "run" / "policy" / "README.md").read_text()
    assert acodm(*command) == 0
    assert capsys.readouterr().out == printed
    assert acodm(*command[:-1], tmp_path / "other", "--seed", 1) == 0
    assert load_policy(tmp_path / "other" / "policy").fingerprint != policy.fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--surrogate", "regmix-1m"], "must be problems for apg"),
        ([], "must be problems for apg"),
        (["--surrogate", "problems", "--agent", '{"iteration": 3}'], "did you mean 'iterations'"),
        (["--surrogate", "problems", "--episodes", "3"], "episodes=3: must be left out with apg"),
    ],
    ids=str,
)
def test_what_apg_cannot_do_is_refused(arguments, message, tmp_path, capsys):
    assert acodm("train", "--algo", "apg", "--out", tmp_path / "run", *arguments) == 2
    assert message in capsys.readouterr().err


def test_learning_on_a_proxy_begins_with_the_policy(tmp_path, tiny_corpus):
    """The agent before its first update, its exported form, and the policy drive the same run to the same loss."""
    assert (
        acodm(
            "train", "--algo", "apg", "--surrogate", SURROGATE, "--agent", AGENT, "--quiet", "--out", tmp_path / "apg"
        )
        == 0
    )
    config = TrainConfig(
        algo="equivariant-td3", init=str(tmp_path / "apg" / "policy"), corpus=str(tiny_corpus), episodes=1,
        episode_steps=8, steps_per_action=2, reward="final", batch_size=4, sequence_length=32, warm_up=4, quiet=True,
        eval_sequences=2, out=str(tmp_path / "run"),
    )  # fmt: skip
    learner = make_learner(config)
    policy = load_policy(tmp_path / "apg" / "policy")
    begun = learner.policy({})
    for (one, bias, _), (other, other_bias, _) in zip(begun.layers, policy.layers, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(bias, other_bias)
    assert (begun.fields, begun.action, begun.probe_sequences) == (policy.fields, policy.action, policy.probe_sequences)
    observation, _ = learner.env.reset(seed=0)
    np.testing.assert_allclose(
        begun.act(observation), learner.agent.predict(observation, deterministic=True)[0], atol=1e-5
    )
    objectives = iter([3.0, 4.0])  # of what it began with, and of what it learned
    learner.evaluate = lambda: {"eval_return": 0.0, "eval_objective": next(objectives), "eval_steps": 8}
    learner.learn()
    assert learner.warm_up["decisions"] >= 4
    assert len(learner.rows) == 1
    assert learner.steps == 2 * learner.warm_up["decisions"] + 8 + 8 + 8
    assert (learner.best_objective, learner.rows[-1]["eval_objective"]) == (3.0, 4.0)
    learner.load_networks("best")  # what it began with stays the best until something better is learned
    for (one, _, _), (other, _, _) in zip(learner.policy({}).layers, policy.layers, strict=True):
        np.testing.assert_array_equal(one, other)
