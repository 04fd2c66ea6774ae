"""The report's numbers, words and escaping, on fabricated benchmarks; its looks are test_page_in_browser.py's."""

import html
import json
import re
import sys

import pytest
from fake_benchmark import MIXERS, fake_benchmark, fake_transfer

from acodm_env.errors import ConfigError
from acodm_env.experiments import cli
from acodm_env.experiments.comparison.load import load
from acodm_env.experiments.comparison.summary import summarise
from acodm_env.experiments.report.answer import answer
from acodm_env.experiments.report.command import render, write_report
from acodm_env.experiments.report.forests import crossing_forests
from acodm_env.experiments.report.page import Figures, Html, as_json, element, table

EVIL = "<script>alert(1)</script>"


def acodm(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


def words(page: str) -> str:
    """The page's visible text, without scripts, styles and tags."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def figures_of(page: str) -> list[dict]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page)]


def rendered(folder, **settings) -> str:
    return render(load([folder]), **settings)


# --- words -------------------------------------------------------------------------------------------------


def told(folder) -> str:
    comparison = load([folder])
    return words(answer(summarise(comparison, "cosine"), "uniform"))


def test_the_answer_names_what_is_better_worse_and_not_told_apart(tmp_path):
    gains = {"good": 0.2, "bad": -0.2, "same": 0.0}
    mixers = ("uniform", "odm-released", *gains)
    text = told(fake_benchmark(tmp_path / "b", mixers=mixers, gains=gains, noise=0.01))
    assert "In mean loss, good (−0.1" in text
    assert "Worse: bad." in text
    assert re.search(r"No difference shown: [^.]*\bsame\b", text)
    assert "stand after Holm's adjustment" in text


def test_no_difference_is_a_result(tmp_path):
    text = told(
        fake_benchmark(tmp_path / "b", mixers=("uniform", "odm-released"), gains={"odm-released": 0.01}, noise=0.05)
    )
    assert "In mean loss, no mixer is shown to be better than uniform. No difference shown: odm-released." in text


def test_one_seed_ranks_nothing(tmp_path):
    text = told(fake_benchmark(tmp_path / "b", seeds=(0,)))
    assert "nothing is ranked" in text
    assert "better" not in text


def test_problems_are_the_first_thing_on_the_page_and_name_every_run(tmp_path):
    folder = fake_benchmark(
        tmp_path / "b",
        missing=("cosine/uniform/seed0",),
        failed=("cosine/uniform/seed1",),
        unfinished=("cosine/uniform/seed2",),
        diverged=("cosine/odm-released/seed3",),
    )
    text = words(rendered(folder))
    box = text[text.index("What is missing") : text.index("Cosine schedule", text.index("What is missing"))]
    for name in ("uniform/seed0", "uniform/seed1", "uniform/seed2", "odm-released/seed3"):
        assert f"cosine/{name}" in box
    assert "out of memory" in box
    assert text.index("What is missing") < text.index("In mean loss")


def test_a_whole_benchmark_has_no_problems_and_every_part(tmp_path):
    folder = fake_benchmark(tmp_path / "b", schedules=("cosine", "constant"), preparation_tokens={"odm-released": 9999})
    text = words(rendered(folder))
    assert "What is missing" not in text
    for part in (
        *(
            "Cosine schedule",
            "Constant schedule",
            "Differences to uniform",
            "Held-out perplexity and loss over training",
        ),
        *("Steps and cost to reach odm-released", "Is the dynamics worth anything?", "Held-out loss per domain", "★"),
        *("Mixture over time", "Epochs used", "Cost of learning the mixture", "Exploration left at the end", "K·ε"),
        *("How to read this page", "Configuration that all runs share", "Versions", "Command of every run", "2.8.0"),
        *("acodm benchmark --out OUT --cell 7", "0123456789abcdef0123456789abcdef01234567", "Seed 0, against"),
    ):
        assert part in text, part


def test_a_policy_is_held_against_its_untrained_self(tmp_path):
    mixers = ("uniform", "odm-released", "policy", "policy-untrained")
    text = words(rendered(fake_benchmark(tmp_path / "b", mixers=mixers, gains={"policy": 0.3}, noise=0.01)))
    found = re.search(
        r"policy minus policy-untrained: mean loss −(0\.\d+) nats \[−[^]]*\], better; mean perplexity −", text
    )
    assert found
    assert float(found[1]) == pytest.approx(0.3, abs=0.03)
    assert "policy-untrained:" not in words(rendered(fake_benchmark(tmp_path / "c", seeds=(0, 1))))


def test_repeated_data_is_warned_of(tmp_path):
    folder = fake_benchmark(tmp_path / "b", seeds=(0,))
    assert "No domain was used more often" in words(rendered(folder))
    log = folder / "cells" / "cosine" / "uniform" / "seed0" / "stats.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[-1]["epochs"] = [4.0, 4.4, 0.5]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (log.parent / "result.json").write_text(
        json.dumps(json.loads((log.parent / "result.json").read_text()) | {"files": {}})
    )
    text = words(rendered(folder))
    assert "⚠ More than that: prose under uniform (4.4)." in text


def test_a_diverged_mixer_has_no_mean_and_its_curve_says_that_it_flatters(tmp_path):
    text = words(rendered(fake_benchmark(tmp_path / "b", diverged=("cosine/odm-released/seed1",))))
    assert "odm-released: only the seeds that did not diverge are drawn" in text
    assert "not decided: odm-released diverged" in text


def test_what_never_gets_there_is_said_and_few_seeds_decide_no_ratio(tmp_path):
    gains = {"quick": 0.4, "slow": -0.4}
    for seeds, quick in (((0, 1, 2, 3, 4), "triangle-left"), ((0, 1, 2), "circle-open")):
        mixers = ("odm-released", *gains)
        folder = fake_benchmark(tmp_path / str(len(seeds)), mixers=mixers, gains=gains, seeds=seeds)
        figures = Figures()
        text = crossing_forests(summarise(load([folder]), "cosine"), figures)
        assert f"slow never (0 of {len(seeds)})" in text
        steps = json.loads(re.search(r">(.*)<", figures.scripts[0])[1])
        assert [trace["marker"]["symbol"] for trace in steps["data"]] == [quick, "arrow-bar-right"]


def test_plotly_accepts_every_figure(tmp_path):
    graph = pytest.importorskip("plotly.graph_objects")
    found = figures_of(rendered(fake_benchmark(tmp_path / "b", diverged=("cosine/uniform/seed1",))))
    assert len(found) >= 8
    for figure in found:
        graph.Figure({"data": figure["data"], "layout": figure["layout"]})
        graph.Figure({"layout": figure["layout"] | figure.get("phone", {})})


# --- what names may hold -------------------------------------------------------------------------------------


def test_a_name_cannot_become_markup_or_end_a_script(tmp_path):
    folder = fake_benchmark(
        tmp_path / "b", mixers=("uniform", "odm-released", EVIL.replace("/", "")), domains=(EVIL, "b&b", "</style>")
    )
    page = rendered(folder)
    assert "<script>alert" not in page
    assert "</style>" not in page.replace("</style>\n</head>", "")
    assert EVIL in words(page)
    texts = json.dumps(figures_of(page))
    assert "&lt;script&gt;" in texts  # as plotly wants it: its text would obey a few tags
    assert "<script" not in texts


def test_text_is_escaped_and_html_is_not():
    assert element("p", "a<b", Html("<i>c</i>"), title='"') == '<p title="&quot;">a&lt;b<i>c</i></p>'
    assert "<td>&lt;b&gt;</td>" in table(("x", "y"), [("row", "<b>")])
    assert as_json({"a": "</script>&"}) == '{"a":"\\u003c/script\\u003e\\u0026"}'
    assert json.loads(as_json("</script>")) == "</script>"
    with pytest.raises(ValueError, match="JSON"):
        as_json(float("nan"))


def test_figures_are_numbered(tmp_path):
    figures = Figures()
    figure = {"data": [{}, {}], "layout": {"height": 100}}
    assert 'data-figure="figure-1"' in figures.frame(figure, "what")
    assert 'data-traces="2"' in figures.frame(figure, "<what>")
    assert len(figures.scripts) == figures.count == 2


# --- the command -------------------------------------------------------------------------------------------


def test_the_page_lies_in_the_benchmark_and_asks_for_nothing(tmp_path, capsys):
    pytest.importorskip("plotly")
    folder = fake_benchmark(tmp_path / "b")
    assert acodm("report", folder) == 0
    assert f"page: {folder / 'report.html'}" in capsys.readouterr().err
    page = (folder / "report.html").read_text()
    shell = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)  # plotly's own source names addresses
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:)", shell)
    assert "default-src &#x27;none&#x27;" in shell
    assert "plotly.js v" in page


def test_several_runs_of_transfer_make_one_page(tmp_path):
    pytest.importorskip("plotly")
    runs = [fake_transfer(tmp_path / name, name, gain=0.1 * i) for i, name in enumerate(("uniform", "odm-released"))]
    assert acodm("report", *runs, "--quiet") == 0
    text = words((runs[0] / "report.html").read_text())
    assert "do not record their cost" not in text
    assert "acodm transfer --mixer odm-released" in text
    assert acodm("report", *runs, "--out", tmp_path / "page.html", "--reference", "uniform") == 0
    assert "Steps and cost to reach uniform" in words((tmp_path / "page.html").read_text())


def test_csv_prints_the_numbers_and_writes_no_page(tmp_path, capsys):
    folder = fake_benchmark(tmp_path / "b", schedules=("cosine", "constant"), missing=("constant/uniform/seed0",))
    assert acodm("report", folder, "--csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mixer,metric,mean,low,high,num_seeds"
    assert lines[1].startswith("uniform,mean_loss_nats,3.")
    assert lines[1].endswith(",5")
    assert not (folder / "report.html").exists()
    assert acodm("report", folder, "--csv", "--schedule", "constant") == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(",4")
    assert acodm("report", folder, "--csv", "--schedule", "cosin") == 2
    assert "did you mean 'cosine'" in capsys.readouterr().err


def test_without_plotly_the_numbers_are_there_and_the_page_says_how(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    folder = fake_benchmark(tmp_path / "b", seeds=(0, 1))
    with pytest.raises(ConfigError, match=r"pip install 'acodm\[report\]'"):
        write_report([folder], folder / "report.html")
    assert acodm("report", folder, "--csv") == 0
    assert acodm("report", folder) == 2
    assert "acodm[report]" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_an_empty_or_half_written_benchmark_still_makes_a_page(tmp_path):
    pytest.importorskip("plotly")
    folder = fake_benchmark(
        tmp_path / "b", seeds=(0, 1), missing=[f"cosine/{m}/seed{s}" for m in MIXERS for s in (0, 1)]
    )
    text = words(write_report([folder], folder / "report.html").read_text())
    assert "No run has finished yet" in text
    assert "cosine/uniform/seed1 (missing)" in text
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no run is there yet" in words(write_report([empty], empty / "report.html").read_text())
    cut = fake_benchmark(tmp_path / "cut", seeds=(0,), unfinished=("cosine/odm-released/seed0",))
    (cut / "plan.json").unlink()
    assert "no such file" in words(write_report([cut], cut / "report.html").read_text())


@pytest.mark.parametrize(("arguments", "message"), [((), "runs"), (("nowhere",), "there is no such folder")])
def test_bad_input_is_one_line(arguments, message, capsys):
    assert acodm("report", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_leading_run_still_works_for_commands_that_take_one(tmp_path, capsys):
    run = fake_transfer(tmp_path / "run")
    assert acodm("mixture", run, "--format", "json", "--quiet") == 0
    assert "time_averaged" in capsys.readouterr().out


def test_the_page_of_twenty_five_mixers_stays_small(tmp_path):
    mixers = ("uniform", "odm-released", *(f"mixer-{i}" for i in range(23)))
    folder = fake_benchmark(
        tmp_path / "b", mixers=mixers, schedules=("cosine", "constant"), evaluations=30, steps=60, gains={}
    )
    figures = figures_of(rendered(folder))
    assert len(json.dumps(figures)) < 3e6
    assert max(len(trace["x"]) for figure in figures for trace in figure["data"]) <= 200
