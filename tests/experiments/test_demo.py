import json
import math

import pytest

from acodm_env.experiments import cli
from acodm_env.experiments.demo import ROWS, DemoConfig, problem, summary


def demo(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--recipe", "smoke", "--jobs", "1", *map(str, arguments)])
    return stop.value.code


@pytest.fixture(scope="module")
def finished(tiny_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert demo("--corpus", tiny_corpus, "--targets", "verbs", "--cut", "verbs=6", "--out", out, "--quiet") == 0
    return out


def test_result_has_the_stable_names(finished):
    result = json.loads((finished / "result.json").read_text())
    assert result["reference"] == "odm-released"
    assert tuple(result["mixers"]) == ROWS
    for mixer in result["mixers"].values():
        assert math.isfinite(mixer["objective_nats"])
        assert sum(mixer["mixture"].values()) == pytest.approx(1.0)
    assert result["mixers"]["odm-released"]["steps_to_reference_ratio"] == 1.0
    assert result["mixers"]["share-1"]["mixture"]["verbs"] == pytest.approx(1.0)
    assert result["mixers"]["uniform"]["measurement_share"] == 0
    assert result["mixers"]["generalist"]["measurement_share"] > 0  # it measures, and says so
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")


def test_every_mixer_starts_from_the_same_model(finished):
    files = (finished / "runs" / "cells" / "cosine").glob("*/seed0/eval.jsonl")
    first = [json.loads(file.read_text().splitlines()[0])["losses"] for file in files]
    assert len(first) == len(ROWS)
    assert all(losses == first[0] for losses in first)


def test_second_run_reprints_without_training(finished, tiny_corpus, capsys):
    before = (finished / "result.json").stat().st_mtime_ns
    assert demo("--corpus", tiny_corpus, "--targets", "verbs", "--cut", "verbs=6", "--out", finished) == 0
    out = capsys.readouterr().out
    assert "lowest loss on verbs with 6 sequences of verbs to train on" in out
    assert "generalist is" in out
    assert (finished / "result.json").stat().st_mtime_ns == before


def test_what_the_table_says():
    def row(nats, ratio, measured, share):
        names = ("objective_nats", "steps_to_reference_ratio", "measurement_share")
        return dict(zip(names, (nats, ratio, measured), strict=True)) | {"mixture": {"a": share, "b": 1 - share}}

    mixers = {"uniform": row(5.0, None, 0.0, 0.5), "share-1": row(None, None, 0.0, 1.0)}
    mixers["generalist"] = row(4.5, 0.25, 0.03, 0.75)
    text = summary({"problem": "lowest loss on a", "targets": {"a": 1.0}, "mixers": mixers})
    lines = [line.split() for line in text.splitlines() if line]
    assert ["generalist", "4.5000", "-0.500", "0.25×", "3.0%", "0.75"] in lines
    assert ["uniform", "5.0000", "+0.000", "never", "0.0%", "0.50"] in lines
    assert "generalist is 0.500 nats ahead of the best of the others (uniform); one seed" in text


def test_the_problem_of_any_corpus_is_its_smallest_domain(tiny_corpus, tiny_store):
    task = problem(DemoConfig(corpus=str(tiny_corpus)))
    sizes = dict(zip(tiny_store.domains, tiny_store.sizes_tokens("train"), strict=True))
    assert task.targets == {min(sizes, key=lambda name: sizes[name]): 1.0}
    assert task.cut == {}


def test_what_does_not_fit_is_refused_before_the_folder_is_claimed(tiny_corpus, tmp_path, capsys):
    assert demo("--corpus", tiny_corpus, "--targets", "verb", "--out", tmp_path / "demo") == 2
    assert "did you mean 'verbs'" in capsys.readouterr().err
    assert demo("--corpus", tiny_corpus, "--objective", "los", "--out", tmp_path / "demo") == 2
    assert "did you mean 'loss'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_rows_with_the_same_mixture_are_one_run(tiny_corpus, tmp_path):
    """Where all domains count alike, every share is uniform."""
    out = tmp_path / "demo"
    assert demo("--corpus", tiny_corpus, "--targets", "verbs,letters,numbers", "--out", out, "--quiet") == 0
    mixers = json.loads((out / "result.json").read_text())["mixers"]
    assert mixers["share-0.5"]["objective_nats"] == mixers["uniform"]["objective_nats"]
    assert not (out / "runs" / "cells" / "cosine" / "share-0.5").exists()


def test_folder_of_something_else_is_refused(tiny_corpus, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert demo("--corpus", tiny_corpus, "--out", tmp_path, "--fresh") == 2
    assert "already holds other files" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"
