"""Numbers and figures of the report: bands, pairs, smoothing, styles, forests."""

import numpy as np
import pytest
from fake_benchmark import fake_benchmark

from acodm_env.experiments.comparison.load import load
from acodm_env.experiments.report.curves import Mixtures, curve, difference_curve, usable
from acodm_env.experiments.report.figure_style import DASHES, domain_styles, mixer_styles
from acodm_env.experiments.report.figures import Curve, curves_figure, difference_range, mixture_figure, smoothed, thin
from acodm_env.experiments.report.forest import Row, broken, forest_figure
from acodm_env.experiments.report.tables import compact

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
    assert by_symbol["arrow-bar-right"]["x"] == [edge]
    assert by_symbol["arrow-bar-right"]["y"] == [2]  # what diverged has no mark at all
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
