import csv
import json
import math
import re

import numpy as np
import pytest
from fake_benchmark import fake_benchmark, fake_transfer

from acodm_env.experiments.comparison.contrasts import baselines_of, cost_ratio, cost_unit, steps_ratio
from acodm_env.experiments.comparison.load import load
from acodm_env.experiments.comparison.summary import METRICS, summarise, table_text, write_csv, write_summaries

ALL = ("uniform", "odm-released", "mean-of:odm-released", "policy", "policy-untrained")


def summary_of(path, *mixers_and_seeds, **options):
    return summarise(load([fake_benchmark(path, *mixers_and_seeds, **options)]), "cosine")


def set_curves(folder, steps, perplexities):
    """Give a run the same loss on every target: log perplexity at those steps."""
    lines = [
        {"step": step, "losses": [None if x is None else math.log(x)] * 3, "targets": []}
        for step, x in zip(steps, perplexities, strict=True)
    ]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = json.loads((folder / "result.json").read_text())
    result.pop("files", None)
    (folder / "result.json").write_text(json.dumps(result))


def set_result(folder, **changes):
    result = json.loads((folder / "result.json").read_text())
    result.pop("files", None)
    (folder / "result.json").write_text(json.dumps(result | changes))


def test_means_and_paired_differences_by_hand(tmp_path):
    out = fake_benchmark(tmp_path / "out", ("uniform", "odm-released"))
    for seed, (base, own) in enumerate(zip((1.0, 2.0, 3.0, 4.0, 5.0), (0.9, 1.8, 2.7, 3.6, 4.5), strict=True)):
        set_result(out / f"cells/cosine/uniform/seed{seed}", mean_loss_nats=base)
        set_result(out / f"cells/cosine/odm-released/seed{seed}", mean_loss_nats=own)
    summary = summarise(load([out]), "cosine")
    mean = summary.row("uniform").metrics["mean_loss_nats"]
    assert (mean.mean, mean.num_seeds) == (3.0, 5)
    assert mean.high == pytest.approx(3 + 1.963243, abs=1e-6)
    found = summary.difference("odm-released", "uniform")  # −0.1 … −0.5: t = −0.3/0.0707107
    assert found.interval.mean == pytest.approx(-0.3)
    assert found.interval.low == pytest.approx(-0.3 - 0.1963243, abs=1e-6)
    assert found.p == pytest.approx(0.0132356, abs=1e-6)
    assert found.verdict == "better"
    assert summary.difference("uniform", "odm-released").verdict == "worse"
    assert summary.difference("uniform", "uniform") is None


def test_verdict_needs_an_interval_that_excludes_zero(tmp_path):
    summary = summary_of(tmp_path / "out", gains={"odm-released": 0.0}, noise=0.05)
    found = summary.difference("odm-released", "uniform")
    assert found.interval.low < 0 < found.interval.high
    assert found.verdict == "no difference shown"


def test_what_is_compared_with_what(tmp_path):
    found = load([fake_benchmark(tmp_path / "out", ALL, seeds=[0, 1], reference="uniform")])
    assert {mixer: baselines_of(found, mixer) for mixer in ALL} == {
        "uniform": (),
        "odm-released": ("uniform", "mean-of:odm-released"),
        "mean-of:odm-released": ("uniform",),
        "policy": ("uniform", "policy-untrained"),
        "policy-untrained": ("uniform",),
    }
    assert len(summarise(found, "cosine").differences) == 2 * 6


def test_holm_counts_a_pair_once_and_every_metric(tmp_path):
    summary = summary_of(tmp_path / "out", ("uniform", "odm-released"), noise=0.03)
    ps = {metric: summary.difference("odm-released", "uniform", metric).p for metric in METRICS[:2]}
    small, large = sorted(ps.values())
    adjusted = {summary.difference("odm-released", "uniform", metric).p_holm for metric in ps}
    assert adjusted == {min(1.0, 2 * small), max(large, min(1.0, 2 * small))}
    assert summary.difference("uniform", "odm-released").p_holm == summary.difference("odm-released", "uniform").p_holm


def test_diverged_seed_takes_the_mean_and_is_said(tmp_path):
    summary = summary_of(tmp_path / "out", diverged=["cosine/uniform/seed2"])
    row = summary.row("uniform")
    assert (row.num_planned, row.num_finished, row.num_diverged, row.note) == (5, 4, 1, "1 of 5 diverged")
    for name in ("mean_loss_nats", "mean_perplexity", "worst_domain_loss_nats"):
        assert (row.metrics[name].mean, row.metrics[name].low, row.metrics[name].num_seeds) == (None, None, 4)
    assert row.domain_loss_nats["prose"].mean is None
    found = summary.difference("odm-released", "uniform")
    assert (found.verdict, found.note, found.p, found.p_holm) == ("not decided", "uniform diverged", None, None)
    assert "1 of 5 diverged" in table_text(summary)


def test_missing_seeds_leave_the_pairs_that_are_there(tmp_path):
    summary = summary_of(tmp_path / "out", missing=["cosine/uniform/seed0"], failed=["cosine/odm-released/seed1"])
    found = summary.difference("odm-released", "uniform")
    assert (found.interval.num_seeds, found.note) == (3, "3 of 5 seeds")
    assert summary.row("uniform").note == "1 of 5 not finished"
    assert summary.row("uniform").metrics["mean_loss_nats"].num_seeds == 4
    assert "3 of 5 seeds" in table_text(summary)


def test_ratios_by_hand(tmp_path):
    prepared = {"uniform": 2560}  # half of the 5120 training tokens
    out = fake_benchmark(tmp_path / "out", ("uniform", "odm-released"), seeds=[0], preparation_tokens=prepared)
    set_curves(out / "cells/cosine/odm-released/seed0", [0, 10, 20, 40], [100, 50, 10, 20])  # best at step 20
    set_curves(out / "cells/cosine/uniform/seed0", [0, 10, 20, 40], [1000, 100, 1, 1])  # crosses 10 at step 15
    found = load([out])
    run, reference = found.run("uniform", "cosine", 0), found.run("odm-released", "cosine", 0)
    assert steps_ratio(found, run) == pytest.approx(15 / 20)
    assert steps_ratio(found, reference) == 1.0
    assert cost_ratio(found, run, "tokens") == pytest.approx((2560 + 5120 * 15 / 40) / (5120 * 20 / 40))
    assert cost_ratio(found, run, "flops") == pytest.approx((2560 + 5120 * 15 / 40) / (5120 * 20 / 40))
    assert cost_ratio(found, reference, "tokens") == 1.0
    row = summarise(found, "cosine").row("uniform")
    assert row.metrics["steps_to_reference_ratio"].mean == pytest.approx(0.75)
    assert row.extra_cost_frac == pytest.approx(0.5)
    assert row.cost["preparation"]["tokens"] == 2560


def test_measurement_counts_by_the_share_of_the_run(tmp_path):
    out = fake_benchmark(tmp_path / "out", ("uniform", "odm-released"), seeds=[0])
    set_curves(out / "cells/cosine/odm-released/seed0", [0, 40], [100, 10])
    set_curves(out / "cells/cosine/uniform/seed0", [0, 20, 40], [100, 10, 9])
    part = {"tokens": 0, "flops": 0.0, "seconds": 0.0}
    cost = {
        "training": part | {"flops": 100.0},
        "measurement": part | {"flops": 60.0},
        "preparation": part | {"flops": 10.0},
        "learning": part | {"flops": 30.0},
    }
    set_result(out / "cells/cosine/uniform/seed0", cost=cost)
    set_result(out / "cells/cosine/odm-released/seed0", cost=cost)
    found = load([out])
    assert cost_ratio(found, found.run("uniform", "cosine", 0), "flops") == pytest.approx((40 + 80) / (40 + 160))


def test_never_reaching_is_censored_and_never_dropped(tmp_path):
    out = fake_benchmark(tmp_path / "out", ("uniform", "odm-released"))
    for seed in range(5):
        set_curves(out / f"cells/cosine/odm-released/seed{seed}", [0, 40], [100, 10])
        set_curves(out / f"cells/cosine/uniform/seed{seed}", [0, 20, 40], [100, 10 if seed < 3 else 11, 11])
    summary = summarise(load([out]), "cosine")
    for name in ("steps_to_reference_ratio", "cost_to_reference_ratio"):
        found = summary.row("uniform").metrics[name]
        assert (found.mean, found.low, found.high, found.num_seeds) == (0.5, 0.5, None, 3)
        assert "covers 93.75%" in found.method
    assert summary.row("uniform").num_compared == 5
    assert "0.500 [0.500, never] 3/5" in table_text(summary)
    for seed in range(5):
        set_curves(out / f"cells/cosine/uniform/seed{seed}", [0, 40], [100, 11])
    assert "never 0/5" in table_text(summarise(load([out]), "cosine"))


def test_no_ratio_where_there_is_nothing_to_reach(tmp_path):
    out = fake_benchmark(
        tmp_path / "out", diverged=["cosine/odm-released/seed0"], missing=["cosine/odm-released/seed1"]
    )
    set_curves(out / "cells/cosine/odm-released/seed2", [0, 40], [10, 20])  # never better than before its first step
    found = load([out])
    ratios = [steps_ratio(found, found.run("uniform", "cosine", seed)) for seed in range(5)]
    assert ratios[:3] == [None, None, None]
    assert None not in ratios[3:]
    assert summarise(found, "cosine").row("uniform").num_compared == 2
    gone = summarise(load([fake_benchmark(tmp_path / "b", ("uniform", "ado"), reference="ado")], "uniform"), "cosine")
    assert gone.reference == "uniform"


def test_evaluations_that_are_not_finite_are_stepped_over(tmp_path):
    out = fake_benchmark(tmp_path / "out", ("uniform", "odm-released"), seeds=[0], diverged=["cosine/uniform/seed0"])
    set_curves(out / "cells/cosine/odm-released/seed0", [0, 20, 30, 40], [100, None, 10, 12])
    set_curves(out / "cells/cosine/uniform/seed0", [0, 10, 20, 30], [1000, None, 10, 1])
    found = load([out])
    run = found.run("uniform", "cosine", 0)
    assert steps_ratio(found, run) == pytest.approx(20 / 30)  # reached before it diverged
    set_curves(out / "cells/cosine/uniform/seed0", [0, 20, 30], [1000, 11, 1])
    found = load([out])
    assert steps_ratio(found, found.run("uniform", "cosine", 0)) == math.inf  # not by the step that diverged


def test_tokens_count_where_flops_are_unknown(tmp_path):
    assert cost_unit(load([fake_benchmark(tmp_path / "a")]).runs) == "flops"
    assert cost_unit(load([fake_benchmark(tmp_path / "b", flops_per_token=0)]).runs) == "tokens"
    out = fake_benchmark(tmp_path / "c", preparation_tokens={"uniform": 100})
    cost = json.loads((out / "cells/cosine/uniform/seed0/result.json").read_text())["cost"]
    cost["learning"] = {"tokens": 500, "flops": 0.0, "seconds": 1.0}  # learned on a model that is not known
    set_result(out / "cells/cosine/uniform/seed0", cost=cost)
    assert summarise(load([out]), "cosine").cost_unit == "tokens"


def test_ten_seeds_have_interquartile_means_and_nine_have_not(tmp_path):
    few = summary_of(tmp_path / "a", ("uniform", "odm-released"), range(9))
    many = summary_of(tmp_path / "b", ("uniform", "odm-released"), range(10), diverged=["cosine/odm-released/seed0"])
    assert few.row("uniform").interquartile_means == {}
    assert set(many.row("uniform").interquartile_means) == {
        "mean_loss_nats",
        "mean_perplexity",
        "worst_domain_loss_nats",
    }
    assert many.row("odm-released").interquartile_means == {}


def test_csv_has_exactly_its_columns_and_blanks(tmp_path):
    out = fake_benchmark(tmp_path / "out", diverged=["cosine/mean-of:odm-released/seed0"])
    summary = summarise(load([out]), "cosine")
    write_csv(summary, tmp_path / "x.csv")
    text = (tmp_path / "x.csv").read_text()
    assert text.splitlines()[0] == "mixer,metric,mean,low,high,num_seeds"
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["metric"] for row in rows[:5]] == [*METRICS]
    assert [row["mixer"] for row in rows[::5]] == ["uniform", "odm-released", "mean-of:odm-released"]
    by = {(row["mixer"], row["metric"]): row for row in rows}
    mean = summary.row("uniform").metrics["mean_loss_nats"]
    assert float(by["uniform", "mean_loss_nats"]["mean"]) == mean.mean
    assert by["mean-of:odm-released", "mean_loss_nats"] | {"num_seeds": ""} == {
        "mixer": "mean-of:odm-released",
        "metric": "mean_loss_nats",
        "mean": "",
        "low": "",
        "high": "",
        "num_seeds": "",
    }
    assert by["mean-of:odm-released", "mean_loss_nats"]["num_seeds"] == "4"
    assert by["uniform", "steps_to_reference_ratio"]["mean"] == ""  # it never gets there
    assert by["uniform", "steps_to_reference_ratio"]["num_seeds"] == "0"


def test_write_summaries_leaves_a_file_per_schedule_and_everything_as_json(tmp_path):
    out = fake_benchmark(
        tmp_path / "out",
        schedules=("constant", "cosine"),
        diverged=["cosine/uniform/seed1"],
        missing=["cosine/uniform/seed2"],
    )
    summaries = write_summaries(out)
    assert [summary.schedule for summary in summaries] == ["constant", "cosine"]
    assert sorted(path.name for path in out.glob("summary*")) == ["summary-cosine.csv", "summary.csv", "summary.json"]
    assert re.search(r"^uniform,mean_loss_nats,3\.\d+,3\.\d+,3\.\d+,5$", (out / "summary.csv").read_text(), re.M)
    assert re.search(r"^uniform,mean_loss_nats,,,,3$", (out / "summary-cosine.csv").read_text(), re.M)
    record = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert record["reference"] == "odm-released"
    assert len(record["problems"]) == 1
    first = record["schedules"][0]["rows"][0]
    assert first["metrics"]["mean_loss_nats"]["mean"] == summaries[0].row("uniform").metrics["mean_loss_nats"].mean
    assert {one["verdict"] for one in record["schedules"][0]["differences"]} == {"better", "worse"}
    before = (out / "summary.json").read_bytes()
    write_summaries(out)
    assert (out / "summary.json").read_bytes() == before


def test_summary_of_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    assert write_summaries(tmp_path / "empty") == []
    assert "no run is there yet" in (tmp_path / "empty" / "summary.json").read_text()
    out = fake_benchmark(tmp_path / "out", seeds=[0], missing=[f"cosine/{mixer}/seed0" for mixer in ALL[:3]])
    (summary,) = write_summaries(out)
    text = table_text(summary)
    assert text.count("0 (1 of 1 not finished)") == 3
    assert "problem: 3 of 3 runs are not finished" in text
    assert ",".join(["uniform", "mean_loss_nats", "", "", "", "0"]) in (out / "summary.csv").read_text()


def test_table_is_sorted_by_mean_loss_with_intervals_and_verdicts(tmp_path):
    text = table_text(summary_of(tmp_path / "out", gains={"odm-released": 0.3, "mean-of:odm-released": 0.1}))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["odm-released", "mean-of:odm-released", "uniform"]
    assert re.search(
        r"\d\.\d{4} \[\d\.\d{4}, \d\.\d{4}\] .*-0\.\d{4} \[-0\.\d{4}, -0\.\d{4}\] better, Holm p", lines[3]
    )
    assert re.search("odm-released against mean-of:odm-released, mean loss: -0.(19|20)", text)


def test_one_seed_is_not_ranked(tmp_path):
    text = table_text(summary_of(tmp_path / "out", seeds=[0]))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["uniform", "odm-released", "mean-of:odm-released"]  # the plan's
    assert "no intervals, so nothing is ranked" in text
    assert "not decided: one seed: no interval" in text
    assert "better" not in text


def test_targets_without_weight_do_not_count(tmp_path):
    summary = summary_of(tmp_path / "out", seeds=[0, 1], noise=0.0, objective=[0.5, 0.5, 0.0])
    row = summary.row("uniform")
    worst, second = row.metrics["worst_domain_loss_nats"].mean, row.domain_loss_nats["prose"].mean
    assert worst == pytest.approx(second)
    assert row.domain_loss_nats["arithmetic"].mean == pytest.approx(second + 0.2)


def test_plain_runs_are_summarised_with_their_cost(tmp_path):
    folders = [
        fake_transfer(tmp_path / f"{name}{seed}", name, seed, gain=gain)
        for name, gain in (("uniform", 0.0), ("ado", 0.2))
        for seed in range(3)
    ]
    summary = summarise(load(folders), "cosine")
    assert summary.difference("ado", "uniform").verdict == "better"
    row = summary.row("ado")
    assert row.metrics["steps_to_reference_ratio"].num_seeds == 3
    assert row.metrics["cost_to_reference_ratio"].num_seeds == 3
    assert (row.cost["training"]["seconds"], row.extra_cost_frac) == (4.0, 0.0)


def test_interval_of_the_difference_is_narrower_than_those_of_the_means(tmp_path):
    summary = summary_of(tmp_path / "out", noise=0.005)  # seeds share most of their luck
    width = np.ptp(
        [summary.row("uniform").metrics["mean_loss_nats"].low, summary.row("uniform").metrics["mean_loss_nats"].high]
    )
    paired = summary.difference("odm-released", "uniform").interval
    assert paired.high - paired.low < 0.5 * width
