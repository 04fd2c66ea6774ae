"""The report's numbers, words and escaping, on fabricated benchmarks; its looks are test_page_in_browser.py's."""

import html
import json
import re
import sys

import numpy as np
import pytest
from fake_benchmark import MIXERS, fake_benchmark, fake_transfer

from acodm_env.errors import ConfigError
from acodm_env.experiments import cli
from acodm_env.experiments.comparison import load
from acodm_env.experiments.figure_style import DASHES, domain_styles, mixer_styles
from acodm_env.experiments.figures import Curve, curves_figure, difference_range, mixture_figure, smoothed, thin
from acodm_env.experiments.forest_figure import Row, broken, forest_figure
from acodm_env.experiments.page import Figures, Html, as_json, element, table
from acodm_env.experiments.page_answer import answer
from acodm_env.experiments.page_tables import compact
from acodm_env.experiments.report import render, write_report
from acodm_env.experiments.report_data import Mixtures, curve, difference_curve, usable
from acodm_env.experiments.summary import summarise

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


# --- numbers -----------------------------------------------------------------------------------------------


def test_a_curve_is_the_mean_over_seeds_with_a_student_t_band(tmp_path):
    comparison = load([fake_benchmark(tmp_path / "b", seeds=(0, 1, 2))])
    found = curve(comparison, "odm-released", "cosine", "loss")
    runs = comparison.select("odm-released", "cosine")
    values = np.array([run.losses.mean(1) for run in runs])
    assert found.tokens.tolist() == [step * 4 * 32 for step in runs[0].steps]
    np.testing.assert_allclose(found.mean, values.mean(0))
    half = 4.30265 * values.std(0, ddof=1) / np.sqrt(3)  # t of 2 degrees of freedom
    np.testing.assert_allclose(found.high - found.mean, half, rtol=1e-5, atol=1e-12)
    assert found.num_seeds == 3


def test_a_difference_is_paired_by_seed_so_what_seeds_share_is_not_in_its_band(tmp_path):
    folder = fake_benchmark(tmp_path / "b", mixers=("uniform", "odm-released"), gains={"odm-released": 0.1}, noise=0)
    comparison = load([folder])
    loss = difference_curve(comparison, "odm-released", "cosine", "loss")
    assert loss.mean[-1] == pytest.approx(-0.1)
    assert loss.high[-1] - loss.low[-1] == pytest.approx(0, abs=1e-9)
    perplexity = difference_curve(comparison, "odm-released", "cosine", "perplexity")
    assert perplexity.mean[-1] == pytest.approx(np.exp(-0.1) - 1)
    assert curve(comparison, "odm-released", "cosine", "loss").high[-1] > loss.high[-1] + 2.9


def test_one_seed_has_a_curve_but_no_band(tmp_path):
    comparison = load([fake_benchmark(tmp_path / "b", seeds=(0,))])
    found = curve(comparison, "uniform", "cosine", "loss")
    assert np.isnan(found.low).all()
    figure = curves_figure([found], mixer_styles(["uniform"], "uniform"), y_title="loss")
    assert len(figure["data"]) == 1


def test_finished_runs_are_drawn_before_unfinished_ones(tmp_path):
    folder = fake_benchmark(tmp_path / "b", seeds=(0, 1), unfinished=("cosine/uniform/seed0",))
    assert usable(load([folder]).select("uniform", "cosine")).keys() == {1}
    every = ("cosine/uniform/seed0", "cosine/uniform/seed1")
    folder = fake_benchmark(tmp_path / "c", seeds=(0, 1), unfinished=every)
    found = curve(load([folder]), "uniform", "cosine", "loss")
    assert (found.num_seeds, found.tokens[-1]) == (2, 20 * 4 * 32)


def test_smoothing_and_thinning_by_hand():
    values = np.array([[0.0], [3.0], [6.0], [9.0]])
    assert smoothed(values, 3)[:, 0].tolist() == [1.5, 3.0, 6.0, 7.5]
    assert thin(np.arange(10.0), 4).tolist() == [0.0, 3.0, 6.0, 9.0]
    assert thin(np.arange(3.0), 4).tolist() == [0.0, 1.0, 2.0]


def test_mixtures_are_those_of_the_seed_asked_for(tmp_path):
    comparison = load([fake_benchmark(tmp_path / "b", seeds=(3, 4), missing=("cosine/uniform/seed3",))])
    assert Mixtures.read(comparison, "cosine", None).seeds == (3, 4)
    only = Mixtures.read(comparison, "cosine", 3)
    assert "uniform" not in only.found
    assert only.found["odm-released"].changes
    assert not only.found["mean-of:odm-released"].changes
    assert only.found["odm-released"].epochs.tolist() == [1, 1, 1]


def test_costs_are_short():
    assert [compact(x, "flops") for x in (0, 950, 1.234e6, 5e12)] == ["–", "950", "1.23 M", "5 T"]
    assert [compact(x, "seconds") for x in (3.14159, 1234.5)] == ["3.1 s", "1,234 s"]


# --- figures -----------------------------------------------------------------------------------------------


def test_every_two_of_thirty_mixers_differ_without_colour():
    names = [f"mixer-{i}" for i in range(30)]
    styles = mixer_styles([*names, "mean-of:mixer-1"], "mixer-0")
    assert len({(style.dash, style.symbol) for style in styles.values()}) == 31
    assert styles["mean-of:mixer-1"].color == styles["mixer-1"].color
    assert len({style.symbol for style in domain_styles([str(i) for i in range(22)]).values()}) == 22
    assert all(style.dash in DASHES for style in styles.values())


def test_a_forest_says_by_shape_what_is_better_worse_undecided_and_never():
    rows = [
        Row(name="a", mean=-2.0, low=-3.0, high=-1.0, verdict="better"),
        Row(name="b", mean=0.5, low=-1.0, high=2.0, verdict="no difference shown"),
        Row(name="c", mean=2.0, low=1.0, high=3.0, verdict="worse"),
        Row(name="d", mean=None, beyond=True, note="never (0 of 5)"),
        Row(name="e", mean=1.0, low=0.5, endless=True),
        Row(name="f", mean=None, note="diverged"),
    ]
    figure = forest_figure(rows, x_title="x", line=0.0)
    by_symbol = {trace["marker"]["symbol"]: trace for trace in figure["data"]}
    assert by_symbol["triangle-left"]["y"] == [5]  # the first row is on top
    assert by_symbol["triangle-right"]["y"] == [3]
    assert by_symbol["circle-open"]["y"] == [4, 1]
    edge = figure["layout"]["xaxis"]["range"][1]
    assert by_symbol["arrow-right"]["x"] == [edge]
    assert by_symbol["arrow-right"]["y"] == [2]  # what diverged has no mark at all
    assert edge > 3
    assert by_symbol["circle-open"]["error_x"]["array"][1] == pytest.approx(edge - 1)
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["never (0 of 5)", "diverged"]


def test_long_names_are_broken_on_a_phone():
    assert broken("mean-of:odm-released") == "mean-of:<br>odm-released"
    assert broken("uniform") == "uniform"
    assert broken("a" * 20) == "a" * 10 + "<br>" + "a" * 10
    assert broken("a" * 50) == "a" * 17 + "…<br>" + "a" * 17 + "…"
    assert "<b>" not in broken("<b>" + "x" * 20)


def test_small_multiples_share_a_range_around_zero():
    line = np.linspace(0, 1, 11)
    curves = [Curve(name="a", tokens=line, mean=sign * line, low=line, high=line, num_seeds=2) for sign in (1.0, -0.5)]
    low, high = difference_range(curves)
    assert -0.75 < low < -0.4
    assert 1.0 < high < 1.3


def test_mixtures_have_two_lines_per_domain_and_at_most_two_hundred_points():
    rng = np.random.default_rng(0)
    requested = rng.dirichlet(np.ones(3), size=5000)
    figure = mixture_figure(np.arange(5000.0), requested, requested, domain_styles(["a", "b", "c"]))
    assert [trace["line"]["dash"] for trace in figure["data"]] == ["dot"] * 3 + ["solid"] * 3
    assert all(100 <= len(trace["x"]) <= 200 for trace in figure["data"])


def test_plotly_accepts_every_figure(tmp_path):
    graph = pytest.importorskip("plotly.graph_objects")
    found = figures_of(rendered(fake_benchmark(tmp_path / "b", diverged=("cosine/uniform/seed1",))))
    assert len(found) >= 8
    for figure in found:
        graph.Figure({"data": figure["data"], "layout": figure["layout"]})
        graph.Figure({"layout": figure["layout"] | figure.get("phone", {})})


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
    assert "The runs do not record their cost" in text
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
