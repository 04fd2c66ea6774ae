"""Regret, standings and comparisons of a suite, against numbers computed by hand."""

import csv
import math

import numpy as np
import pytest

from acodm_env.experiments.benchmark.plan import Cell, Entry, Plan
from acodm_env.experiments.benchmark.suite.certificates import told, verdicts
from acodm_env.experiments.benchmark.suite.regret import BEST, Outcome, best_static, outcome_of
from acodm_env.experiments.benchmark.suite.report import COLUMNS, sentences, tables_of, write_regret
from acodm_env.experiments.benchmark.suite.standing import best_rule, over_seeds, paired, policies_of, rows_of, standing
from acodm_env.experiments.benchmark.suite.tasks import Task
from acodm_env.experiments.comparison.load import Comparison
from acodm_env.experiments.comparison.run import Run

PROSE = Task(name="prose", corpus="c", targets={"prose": 1.0})
EVERY = Task(name="mean-loss", corpus="c")


def outcome(task, objective, statics, **tables):
    empty = {row: {} for row in objective}
    shown = {"validation": objective, "steps_to": empty, "flops_to": empty, "measurement": empty, "preparation": empty}
    seeds = tuple(objective["uniform"])
    return Outcome(task=task, seeds=seeds, objective=objective, statics=statics, num_static_runs=0, **(shown | tables))


@pytest.fixture
def prose():
    """share-1 is the best static row: mean 4.2 against uniform's 5.1, a gain of .9 nats."""
    objective = {
        "uniform": {0: 5.0, 1: 5.2},
        "share-0.5": {0: 4.5, 1: 4.5},
        "share-1": {0: 4.0, 1: 4.4},
        "generalist": {0: 3.9, 1: 4.4},
        "generalist-untrained": {0: 5.0, 1: 5.2},
    }
    return outcome(PROSE, objective, ("uniform", "share-0.5", "share-1"))


def test_regret_is_the_share_of_the_best_static_gain_that_is_missed(prose):
    assert (prose.best, prose.has_gain) == ("share-1", True)
    assert prose.gain == pytest.approx(0.9)
    assert prose.regret("share-1") == {0: 0.0, 1: 0.0}
    assert prose.regret("uniform") == pytest.approx({0: 1.0 / 0.9, 1: 0.8 / 0.9})  # 1 on average
    assert prose.regret("share-0.5") == pytest.approx({0: 0.5 / 0.9, 1: 0.1 / 0.9})
    assert prose.regret("generalist") == pytest.approx({0: -0.1 / 0.9, 1: 0.0})  # better than any static mixture
    assert prose.regret("not there") == {}
    assert prose.behind("share-0.5") == pytest.approx({0: -0.5, 1: -0.7})


def test_only_whole_static_rows_can_be_best():
    objective = {
        "uniform": {0: 5.0, 1: 5.0},
        "share-1": {0: 1.0},
        "dynamic": {0: 2.0, 1: 2.0},
        "share-0.5": {0: 4, 1: 4},
    }
    assert best_static(objective, ("uniform", "share-1", "share-0.5")) == "share-0.5"
    assert best_static({"uniform": {}, "share-1": {0: 1.0}}, ("uniform", "share-1")) is None
    assert best_static(objective, ("uniform",)) == "uniform"
    found = outcome(PROSE, objective, ("uniform", "share-1", "share-0.5"))
    assert found.partial == ("share-1",)
    assert sentences([found])[-1] == "prose: share-1 lack seeds and cannot be best"


def test_without_a_gain_there_is_no_regret_but_nats():
    flat = outcome(EVERY, {"uniform": {0: 4.0, 1: 4.0}, "share-1": {0: 3.99, 1: 3.995}}, ("uniform", "share-1"))
    assert flat.gain == pytest.approx(0.0075)
    assert (flat.has_gain, flat.regret("share-1")) == (False, {})
    assert flat.behind("share-1") == pytest.approx({0: -0.01, 1: -0.005})
    titles = [title for title, _, _ in tables_of([flat])]
    assert titles == [
        "Tasks: test objective at the end",
        "Nats behind uniform, where no static mixture gains 0.01 nats",
    ]


def test_rows_stand_by_the_mean_over_tasks_and_the_interval_over_seeds(prose):
    other = outcome(
        Task(name="code", corpus="c", targets={"code": 1.0}),
        {"uniform": {0: 3.0, 1: 3.0}, "share-0.5": {0: 2.0, 1: 2.0}, "share-1": {0: 2.5, 1: 2.9}},
        ("uniform", "share-0.5", "share-1"),
    )
    found = standing([prose, other], "share-1")
    assert found.tasks == ("prose", "code")
    # by seed: (0 + .5)/2 = .25 and (0 + .9)/2 = .45; mean .35 ± 12.7062 · .1
    assert found.regret.mean == pytest.approx(0.35)
    assert found.regret.high == pytest.approx(0.35 + 12.7062 * 0.1, abs=1e-4)
    assert (found.worst, found.worst_task) == (pytest.approx(0.7), "code")
    assert standing([prose, other], "generalist").tasks == ("prose",)
    rule = best_rule([prose, other])
    assert rule.row == "share-0.5"  # (.5/.9 + .1/.9)/2/2 = .167 < .35
    assert rule.regret.mean == pytest.approx((0.5 / 0.9 + 0.1 / 0.9) / 4)
    difference, tasks = paired([prose, other], "generalist", "share-1")
    assert (difference.mean, tasks) == (pytest.approx(-0.05 / 0.9), 1)


def test_seeds_that_not_all_tasks_have_are_left_out():
    found = over_seeds([{0: 1.0, 1: 3.0, 2: 9.0}, {0: 3.0, 1: 5.0}])
    assert (found.mean, found.num_seeds) == (3.0, 2)
    assert over_seeds([]).mean is None


def test_policies_are_told_from_bandits_and_grids(prose):
    names = ["uniform", "odm-released-rescaled", "mean-of:odm-released-rescaled", "p", "p-untrained", "q", "mean-of:q"]
    assert policies_of(names) == ["p", "q"]
    assert rows_of([prose]) == ["uniform", "share-0.5", "share-1", "generalist", "generalist-untrained", BEST]
    lines = sentences([prose])
    assert lines[0].startswith("best single fixed rule: share-1, mean regret 0.000")
    assert any(line.startswith("generalist against generalist-untrained: regret -1.056") for line in lines)


def test_regret_csv(prose, tmp_path):
    write_regret([prose], tmp_path / "regret.csv")
    with (tmp_path / "regret.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    line = next(row for row in rows if (row["mixer"], row["seed"]) == ("share-0.5", "1"))
    assert (line["task"], line["objective_nats"], line["regret"], line["steps_to"]) == ("prose", "4.5", "0.111111", "")


def comparison_of(losses_of, cost_of):
    """Runs of one seed with test losses (E, 2) at steps 0, 4, 8, and their plan."""
    training = {"tokens": 8, "flops": 80.0, "seconds": 1.0}
    runs = []
    for row, losses in losses_of.items():
        measured, prepared = cost_of.get(row, (0.0, 0.0))
        cost = {"training": training, "measurement": {"flops": measured}, "preparation": {"flops": prepared}}
        result = {"objective_nats": losses[-1][0], "validation_objective_nats": 9.0, "cost": cost}
        settings = {"mixer": row, "schedule": "cosine", "seed": 0, "folder": row, "status": "finished"}
        runs.append(Run(**settings, result=result, steps=np.array([0.0, 4.0, 8.0]), losses=np.array(losses)))
    entries = [Entry(name="uniform", mixer="uniform"), Entry(name="odm-released", mixer="odm-released")]
    entries.append(Entry(name="share-1", mixer="target-share", options={"share": 1.0}))
    cells = [
        Cell(index=i, kind="target", name=row, mixer=row, schedule="cosine", seed=0, folder=row, steps=8)
        for i, row in enumerate(losses_of)
    ]
    plan = Plan(
        reference="odm-released",
        entries=tuple(entries),
        schedules=("cosine",),
        seeds=(0,),
        command="",
        cells=tuple(cells),
    )
    comparison = Comparison(
        **{"title": "", "reference": "odm-released", "schedules": ("cosine",), "seeds": (0,), "mixers": plan.mixers},
        **{"domains": ("a", "b"), "targets": ("a", "b"), "objective": np.array([1.0, 0.0]), "horizon": 8},
        **{"tokens_per_step": 1, "runs": tuple(runs), "versions": {}, "git_commit": None, "command": ""},
        settings={"metric": "loss"},
    )
    return comparison, plan


def test_steps_and_flops_to_the_bandits_best_objective():
    losses = {
        "uniform": [[5.0, 1.0], [4.5, 1.0], [4.2, 1.0]],
        "odm-released": [[5.0, 9.0], [4.4, 9.0], [4.0, 9.0]],
        "share-1": [[5.0, np.nan], [3.0, np.nan], [2.0, np.nan]],  # the other target does not count
    }
    found = outcome_of(PROSE, *comparison_of(losses, {"share-1": (8.0, 40.0)}), same={"share-0.5": "uniform"})
    assert found.steps_to["uniform"] == {0: math.inf}
    assert found.steps_to["odm-released"] == {0: 1.0}
    # 5 → 3 nats over 4 steps crosses 4 at step 2 of odm-released's 8
    assert found.steps_to["share-1"] == {0: pytest.approx(0.25)}
    # 2 steps with a tenth more for measurements, and half a run of 8 steps beforehand
    assert found.flops_to["share-1"] == {0: pytest.approx((2 * 1.1 + 4) / 8)}
    assert found.measurement["share-1"] == {0: pytest.approx(0.1)}
    assert found.statics == ("uniform", "share-1", "share-0.5")
    assert found.num_static_runs == 2  # share-0.5 is uniform's run under another name
    assert found.objective["share-0.5"] == found.objective["uniform"]
    assert found.objective[BEST] == {0: 2.0}


def test_certificates_by_the_other_seeds():
    """Validation ahead by .2 ± 0 except with seed 2; a test split that says otherwise with seed 1."""
    test = {"uniform": {0: 5.0, 1: 5.0, 2: 5.0}, "generalist": {0: 4.8, 1: 5.1, 2: 4.9}}
    validation = {"uniform": {0: 5.0, 1: 5.0, 2: 5.0}, "generalist": {0: 4.8, 1: 4.8, 2: 5.3}}
    found = outcome(PROSE, test, ("uniform",), validation=validation)
    got = [(each.seed, each.kept, each.right) for each in verdicts([found], "generalist")]
    # without seed 2 both others agree; with it the mean is behind
    assert got == [(0, False, False), (1, False, True), (2, True, True)]
    assert told([found], "generalist") == [
        "certificates of generalist by the other seeds: 2/3 right, 1 kept; "
        "wrong: prose seed 0 (refused, gain +0.200 nats)"
    ]


def test_two_seeds_give_no_certificate(prose):
    assert verdicts([prose], "generalist") == []
    assert told([prose], "generalist") == []
