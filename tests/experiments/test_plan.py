"""The plan: which cells, in which order, shared preparations, and what is refused before anything runs."""

import sys
from dataclasses import replace

import pytest
from plugin import install, tiny

from acodm_env.errors import AcodmError, ConfigError
from acodm_env.experiments.benchmark.command import list_mixers
from acodm_env.experiments.benchmark.config import BenchmarkConfig
from acodm_env.experiments.benchmark.plan import Plan, parse_entries
from acodm_env.experiments.benchmark.planning import make_plan


@pytest.fixture(autouse=True)
def _plugins(tmp_path_factory, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path_factory.mktemp("site")))
    yield
    sys.modules.pop("plugin_mixers", None)


def plan_of(corpus, out, **changes):
    return make_plan(BenchmarkConfig(**tiny(corpus, out, **changes)), out)


def test_cells_come_after_those_they_need(tiny_corpus, tmp_path):
    plan = plan_of(tiny_corpus, tmp_path / "b", mixers="wander,two-stage", schedules="cosine,constant")
    for cell in plan.cells:
        assert cell.index == plan.cells.index(cell)
        assert all(needed < cell.index for needed in cell.needs)
    kinds = [cell.kind for cell in plan.cells]
    # uniform, odm-released, wander, two-stage, and the time averages of all but uniform; 2 seeds, 2 schedules
    assert kinds.count("preparation") == 2
    assert kinds.count("target") == (4 + 3) * 2 * 2
    assert plan.mixers == (
        *("uniform", "odm-released", "mean-of:odm-released", "wander", "mean-of:wander"),
        *("two-stage", "mean-of:two-stage"),
    )
    for name in ("wander", "two-stage"):  # not the preparation of two-stage, which has the same schedule and seed
        replayed = next(cell for cell in plan.cells if cell.name == f"cosine/mean-of:{name}/seed1")
        assert [plan.cells[i].name for i in replayed.needs] == [f"cosine/{name}/seed1"]


def test_equal_requests_are_run_once(tiny_corpus, tmp_path):
    options = {"again": {"mixer": "two-stage", "pace": 0.3}}
    plan = plan_of(
        tiny_corpus,
        tmp_path / "b",
        mixers="two-stage,again",
        options=options,
        schedules="cosine,constant",
        mean_of=False,
    )
    preparations = [cell for cell in plan.cells if cell.kind == "preparation"]
    assert [(cell.seed, cell.mixer, cell.steps) for cell in preparations] == [
        (0, "two-stage, again", 7),
        (1, "two-stage, again", 7),
    ]
    users = [cell.mixer for cell in plan.cells if preparations[0].index in cell.needs]
    assert sorted(users) == ["again", "again", "two-stage", "two-stage"]


def test_the_plan_is_read_back_as_it_was(tiny_corpus, tmp_path):
    plan = plan_of(tiny_corpus, tmp_path / "b")
    assert Plan.load(tmp_path / "b") == plan


def test_a_later_command_adds_to_the_plan(tiny_corpus, tmp_path):
    out = tmp_path / "b"
    plan_of(tiny_corpus, out, mixers="wander", mean_of=False)
    plan = plan_of(tiny_corpus, out, mixers="exp3", seeds="1,2", mean_of=False)
    assert plan.mixers == ("uniform", "odm-released", "wander", "exp3")
    assert plan.seeds == (0, 1, 2)
    with pytest.raises(ConfigError, match=r"already has wander with .*wander-2"):
        plan_of(tiny_corpus, out, mixers="wander", options={"wander": {"pace": 0.7}})
    with pytest.raises(AcodmError, match="steps=6 there, 7 now"):
        plan_of(tiny_corpus, out, steps=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": "unifrom"}, "did you mean 'uniform'"),
        ({"mixers": "exp3,exp3"}, "'exp3' is named twice"),
        ({"mixers": "doremi-proxy"}, "mixer=doremi-proxy: needs excess; LMTrainer provides only"),
        ({"mixers": "static"}, "a static mixture needs weights"),
        ({"mixers": "policy"}, "need --policy DIR"),
        ({"mixers": "mean-of:exp3"}, "run by itself beside every dynamic exp3"),
        ({"options": {"aioli": {}}}, "options.aioli: is not among --mixers"),
        ({"mixers": "exp3", "options": {"exp3": 3}}, "must be a mapping"),
        ({"mixers": "exp3", "options": {"exp3": {"lr": 3}}}, "unexpected keyword argument 'lr'"),
        ({"targets": "leters=1"}, "did you mean 'letters'"),
        ({"targets": "letters=0"}, "positive weight"),
        ({"targets": "letters=much"}, "must be a finite weight"),
        ({"domains": "letters,verb"}, "did you mean 'verbs'"),
        ({"policy": "nowhere"}, "nowhere"),
        ({"reference": "odm"}, "did you mean"),
    ],
)
def test_bad_input_is_refused_before_the_folder_is_claimed(tiny_corpus, tmp_path, changes, message):
    with pytest.raises(AcodmError, match=message):
        plan_of(tiny_corpus, tmp_path / "b", **changes)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": "0,1,1"}, "1 is repeated"),
        ({"seeds": "0"}, "at least 1 seed"),
        ({"seeds": "-1"}, "must be a number of seeds"),
        ({"schedules": "cosin"}, "did you mean 'cosine'"),
        ({"engine": "rey"}, "did you mean 'ray'"),
        ({"jobs": 0}, "at least 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        BenchmarkConfig(**changes)


def test_seeds_are_a_number_or_a_list():
    assert BenchmarkConfig(seeds="3", seed=4).seed_list() == (4, 5, 6)
    assert BenchmarkConfig(seeds="7,").seed_list() == (7,)


def test_policies_bring_their_control():
    names = [entry.name for entry in parse_entries("uniform", {}, "somewhere")]
    assert names == ["uniform", "policy", "policy-untrained"]


def test_the_list_names_paper_needs_and_defaults():
    lines = {line.split("  ")[0]: line for line in list_mixers().splitlines()}
    assert "2305.10429" in lines["doremi"]
    assert "validation" in lines["aioli"]
    assert "smoothing=0.5" in lines["odm-released"]
    assert "pace=0.1" in lines["wander"]


def test_domains_and_targets_may_differ(tiny_corpus, tmp_path):
    config = BenchmarkConfig(
        **tiny(tiny_corpus, tmp_path / "b", domains="letters,numbers", targets="verbs=3,letters=1")
    )
    make_plan(config, tmp_path / "b")
    from acodm_env.experiments.run.folder import recorded_config

    settings = recorded_config(tmp_path / "b")
    assert settings["domains"] == ["letters", "numbers"]
    assert settings["targets"] == ["letters", "verbs"]
    assert settings["objective"] == [0.25, 0.75]
    with pytest.raises(AcodmError, match="domains"):
        make_plan(replace(config, domains="letters,verbs"), tmp_path / "b")
