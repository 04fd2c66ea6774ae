"""`acodm regret`: rows, intervals, comparisons, resume; on budgets that teach nothing."""

import csv
import json

import pytest

from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.surrogate.regret import RegretConfig, _best, run
from acodm_env.policy.load import load_policy

VARIANTS = """
quick: {algo: ppo, timesteps: 0.002}
still: {algo: td3, timesteps: 0.02, agent: {settings: {n_envs: 4, learning_starts: 100000}}}
"""
SMALL = {"seeds": 2, "unseen": 2, "training": 2, "steps": 8, "steps_per_action": 4, "quiet": True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regret")
    (folder / "variants.yaml").write_text(VARIANTS)
    config = RegretConfig(
        agents="quick,still", variants=str(folder / "variants.yaml"), baselines="pike", out=str(folder / "run"), **SMALL
    )
    run(config)
    return config, folder / "run"


def rows_of(folder):
    with (folder / "regret.csv").open() as file:
        return {(row["agent"], row["split"]): row for row in csv.DictReader(file)}


def test_every_row_stands_in_both_splits_with_its_seeds(finished):
    rows = rows_of(finished[1])
    learners = {f"{kind}{name}" for kind in ("", "mean-of:", "untrained:") for name in ("quick", "still")}
    references = {"uniform", "best-schedule", "best-static", "best-constant", "policy-untrained", "pike"}
    assert rows.keys() == {(name, split) for name in learners | references for split in ("seen", "unseen")}
    assert {row["num_seeds"] for row in rows.values()} == {"2"}
    for row in rows.values():
        assert float(row["low"]) <= float(row["regret_recovered"]) <= float(row["high"])


def test_the_ends_of_the_scale(finished):
    rows = rows_of(finished[1])
    for split in ("seen", "unseen"):
        assert float(rows["uniform", split]["regret_recovered"]) == 0
        assert float(rows["best-schedule", split]["regret_recovered"]) == 1
        static = float(rows["best-static", split]["regret_recovered"])
        assert float(rows["best-constant", split]["regret_recovered"]) <= static + 1e-4
        assert 0 < static <= 1.01


def test_a_learner_that_took_no_step_is_its_untrained_self(finished):
    rows = rows_of(finished[1])
    for split in ("seen", "unseen"):
        assert rows["still", split]["regret_recovered"] == rows["untrained:still", split]["regret_recovered"]
        assert rows["quick", split]["regret_recovered"] != rows["untrained:quick", split]["regret_recovered"]


def test_again_does_nothing_again_and_more_seeds_go_on(finished, capsys):
    config, folder = finished
    before = {file.name: file.stat().st_mtime_ns for file in (folder / "cells").iterdir()}
    run(config)
    assert {file.name: file.stat().st_mtime_ns for file in (folder / "cells").iterdir()} == before
    said = capsys.readouterr().out
    assert "best learner" in said
    assert "policy-untrained" in said
    with pytest.raises(DataError, match="already holds another run"):
        run(RegretConfig(agents="quick", variants=config.variants, baselines="pike", out=str(folder), **SMALL))


def test_the_policies_are_left_for_use(finished):

    policy = load_policy(finished[1] / "policies" / "quick-unseen-1")
    assert policy.horizon == 8
    assert policy.provenance["seed"] == 1
    cell = json.loads((finished[1] / "cells" / "quick-unseen-1.json").read_text())
    assert cell["quick"]["seconds"] > 0
    assert len(cell["quick"]["objective"]) == 2


def test_the_picture_is_drawn(finished):
    assert (finished[1] / "regret.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_learner_is_the_best_one():
    values = {
        ("a", "seen"): [0.1, 0.2],
        ("b", "seen"): [0.3, 0.1],
        ("a", "unseen"): [0.5],
        ("uniform", "unseen"): [1.0],
    }
    assert _best(values, {"a", "b"}) == {"seen": "b", "unseen": "a"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "seeds=0"),
        ({"splits": "sen"}, "splits=sen"),
        ({"agents": "td4"}, "did you mean 'td3'"),
        ({"agents": "ars"}, "agents: ars"),
        ({"agents": "", "baselines": "odm-relesed"}, "did you mean 'odm-released'"),
        ({"agents": "", "baselines": "sheared-llama"}, "held-out targets"),
        ({"variants": "nowhere.yaml"}, "variants=nowhere.yaml"),
        ({"surface": "pile"}, "surface=pile"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_run(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(RegretConfig(out=str(tmp_path / "run"), **settings))
    assert not (tmp_path / "run").exists()


def test_variants_must_be_settings(tmp_path):
    (tmp_path / "variants.yaml").write_text("td3: 5")
    with pytest.raises(ConfigError, match="must map names to settings"):
        run(RegretConfig(variants=str(tmp_path / "variants.yaml"), out=str(tmp_path / "run")))
