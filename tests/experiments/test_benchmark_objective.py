"""A benchmark under the user's own objective: targets, metric, cuts, exclusions; what is shown, and what it costs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from fake_benchmark import fake_benchmark
from plugin import tiny

from acodm_env.errors import ConfigError
from acodm_env.experiments.benchmark.config import BenchmarkConfig
from acodm_env.experiments.benchmark.jobs import run_cell, running_cost, stores
from acodm_env.experiments.benchmark.planning import make_plan
from acodm_env.experiments.benchmark.settings import shared_settings
from acodm_env.experiments.comparison.contrasts import steps_ratio
from acodm_env.experiments.comparison.load import load
from acodm_env.experiments.comparison.summary import summarise, table_text
from acodm_env.experiments.report.command import render
from acodm_env.experiments.run.results import judged, objective_name
from acodm_env.trainer import RunInfo
from log_lines import step_line


def settings_of(corpus, out, **changes):
    return shared_settings(BenchmarkConfig(**tiny(corpus, out, **changes)))


def test_targets_cut_and_exclusions_are_recorded_and_held(tiny_corpus, tiny_store, tmp_path, capsys):
    settings = settings_of(
        tiny_corpus, tmp_path, targets="verbs=3,letters", exclude="verbs", cut="letters=7", quiet=False
    )
    assert settings["domains"] == [name for name in tiny_store.domains if name != "verbs"]
    assert dict(zip(settings["targets"], settings["objective"], strict=True)) == {"letters": 0.25, "verbs": 0.75}
    assert (settings["metric"], settings["cut"]) == ("loss", {"letters": 7})
    store, whole = stores(settings)
    assert store.num_sequences("train", 32)[store.domains.index("letters")] == 7
    assert store.fingerprint == settings["corpus_fingerprint"]
    assert whole.num_sequences("train", 32) == tiny_store.num_sequences("train", 32)
    assert "eval_sequences" not in capsys.readouterr().err  # two are there


def test_a_benchmark_without_an_objective_records_none(tiny_corpus, tmp_path):
    settings = settings_of(tiny_corpus, tmp_path)
    assert not {"metric", "cut"} & settings.keys()
    assert settings_of(tiny_corpus, tmp_path, objective="perplexity")["metric"] == "perplexity"


def test_what_does_not_fit_is_said(tiny_corpus, tmp_path, capsys):
    settings = settings_of(tiny_corpus, tmp_path, cut="letters=100000", eval_sequences=4096, quiet=False)
    assert "cut" not in settings
    text = capsys.readouterr().err
    assert "sequences and is left whole" in text
    assert "eval_sequences=4096: the test split holds fewer of" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "letters=1"}, "must be loss or perplexity; targets and weights go to --targets"),
        ({"objective": "perplexty"}, "did you mean 'perplexity'"),
        ({"targets": "letters=-1"}, "at least 0"),
        ({"exclude": "leters"}, "did you mean 'letters'"),
        ({"exclude": "letters,numbers,verbs"}, "must leave a domain to train on"),
        ({"cut": "verb=3"}, "did you mean 'verbs'"),
        ({"cut": "verbs=0"}, "at least 1"),
        ({"cut": "verbs=3", "exclude": "verbs"}, "cut"),
    ],
)
def test_bad_input_is_refused(tiny_corpus, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(BenchmarkConfig(**tiny(tiny_corpus, tmp_path / "b", **changes)), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_results_have_the_objective_on_both_splits(tiny_corpus, tmp_path):
    out = tmp_path / "b"
    settings = tiny(tiny_corpus, out, objective="perplexity", targets="verbs=3,letters=1", seeds="1", mean_of=False)
    plan = make_plan(BenchmarkConfig(**settings), out)
    run_cell(out, plan.cells[0].index)
    result = json.loads((out / plan.cells[0].folder / "result.json").read_text())
    losses, held = result["domain_loss_nats"], result["validation_loss_nats"]

    def log_mean(of):
        return np.log(0.75 * np.exp(of["verbs"]) + 0.25 * np.exp(of["letters"]))

    assert result["metric"] == "perplexity"
    assert result["objective_nats"] == pytest.approx(log_mean(losses))
    assert result["validation_objective_nats"] == pytest.approx(log_mean(held))
    assert losses["verbs"] != held["verbs"]


INFO = RunInfo(
    **{"domains": ("a", "b"), "targets": ("a", "b"), "objective": (1.0, 0.0), "sizes_tokens": (9, 9)},
    **{"batch_size": 4, "sequence_length": 8, "horizon": 4, "initial_loss_nats": 3.0},
    **{"flops_per_token": 30.0, "eval_tokens": 100},
)


def test_a_target_without_weight_need_not_be_known():
    found = judged(INFO, {"a": 2.0, "b": None}, np.array([1.0, np.nan]))
    assert (found["objective_nats"], found["validation_objective_nats"]) == (2.0, 1.0)
    assert found["validation_loss_nats"] == {"a": 1.0, "b": None}
    assert judged(INFO, {"a": None, "b": None}, None)["objective_nats"] is None


def test_measurements_are_charged_by_what_they_read():
    assert step_line(eval_losses=[1.0, 2.0], eval_tokens=16).measured_tokens(100) == 16
    assert step_line(eval_losses=[1.0, 2.0]).measured_tokens(100) == 100  # logged before that was recorded
    assert step_line().measured_tokens(100) == 0
    lines = [step_line(1, eval_losses=[1.0], eval_tokens=16), step_line(2, seconds=2.0)]
    folder = SimpleNamespace(steps=lines)
    cost = running_cost(folder, INFO, evaluations=2)
    assert cost["training"] == {"tokens": 64, "flops": 64 * 30.0, "seconds": 3.0}
    assert cost["measurement"] == {"tokens": 216, "flops": 216 * 10.0, "seconds": 0.0}


def test_the_objective_has_a_name():
    targets = {"targets": ["a", "b"], "objective": [0.75, 0.25]}
    assert objective_name(targets) == ""
    assert objective_name({**targets, "metric": "loss"}) == "mean loss of a ×3, b"
    assert objective_name({**targets, "objective": [1.0, 0.0], "metric": "loss"}) == "loss of a"
    assert objective_name({**targets, "objective": [0.5, 0.5], "metric": "perplexity"}) == (
        "log mean perplexity over all domains"
    )


def test_steps_count_to_the_objective(tmp_path):
    """odm-released is .05 nats ahead at the end; the level is of the mean loss, where that is what counts."""
    by_loss = load([fake_benchmark(tmp_path / "loss", seeds=[0], noise=0.0, objective=[1, 0, 0], metric="loss")])
    usual = load([fake_benchmark(tmp_path / "usual", seeds=[0], noise=0.0, objective=[1, 0, 0])])
    run = by_loss.run("mean-of:odm-released", "cosine", 0)
    np.testing.assert_allclose(by_loss.level(run), np.exp(run.losses[:, 0]))
    assert steps_ratio(by_loss, run) == pytest.approx(steps_ratio(usual, usual.run(run.mixer, "cosine", 0)))
    equal = load([fake_benchmark(tmp_path / "equal", seeds=[0], noise=0.0, metric="loss")])
    run = equal.run("uniform", "cosine", 0)
    np.testing.assert_allclose(equal.level(run), np.exp(run.losses.mean(1)))


def test_tables_and_page_name_the_objective_and_rank_by_it(tmp_path):
    out = fake_benchmark(tmp_path / "out", seeds=[0, 1, 2], objective=[0.5, 0.25, 0.25], metric="perplexity")
    comparison = load([out])
    summary = summarise(comparison, "cosine")
    name = "log mean perplexity of python ×2, prose, arithmetic"
    assert (summary.primary, summary.objective) == ("objective_nats", name)
    row = summary.row("uniform")
    runs = comparison.select("uniform", "cosine")
    wanted = np.mean([np.log(np.exp(run.losses[-1]) @ [0.5, 0.25, 0.25]) for run in runs])
    assert row.metrics["objective_nats"].mean == pytest.approx(wanted)
    assert summary.difference("odm-released", "uniform").metric == "objective_nats"
    text = table_text(summary)
    assert f"{name}, nats" in text
    assert "objective against uniform, paired" in text
    page = render(comparison)
    assert page.count(name) > 3
    assert f"best {name}" in page


def test_without_a_choice_tables_stay_as_they_were(tmp_path):
    summary = summarise(load([fake_benchmark(tmp_path / "out", seeds=[0, 1])]), "cosine")
    assert (summary.objective, summary.primary) == ("", "mean_loss_nats")
    assert "objective_nats" not in summary.row("uniform").metrics
    assert {one.metric for one in summary.differences} == {"mean_loss_nats", "mean_perplexity"}
    assert "mean loss, nats" in table_text(summary)
