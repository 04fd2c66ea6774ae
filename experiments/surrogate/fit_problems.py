"""`acodm fit-surrogate --problems`: a mixing problem's surface from runs with other mixtures and cuts, and its verdict.

Each third of the runs is held out in turn, so that every run is predicted once by a fit that has not seen it, and every
parameter has three estimates beside that of all runs, which is the one written.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.experiments.console import progress, say, text_table
from acodm_env.experiments.surrogate.logged_problems import ProblemLogs
from acodm_env.files import write_json
from acodm_env.surrogate.calibrated import FORMAT, OVERFIT_PASSES, Calibrated, Record
from acodm_env.surrogate.problem_calibration import FEWEST_RUNS, ROUNDS, calibrate, check
from acodm_env.surrogate.problem_verdict import PARTS, against, judge, quantities, residuals, split
from acodm_env.surrogate.problems import ProblemFamily
from acodm_env.version import __version__

if TYPE_CHECKING:
    from acodm_env.experiments.surrogate.fit_config import FitSurrogateConfig


def fit_problems(config: "FitSurrogateConfig", out: Path) -> None:
    """Fit, judge, print and write.

    Raises:
        ConfigError, DataError: the runs are too few, or not of one corpus, model and length.
    """
    logs = ProblemLogs(config.problems, config.untrained_loss)
    check(logs.domains, logs.records)
    parts, which = _parts(logs, config.held_out)
    fits, final = _fits(logs, parts, once=bool(config.held_out), quiet=config.quiet)
    verdicts = [judge(one, *part) for one, part in zip(fits, parts, strict=True)]
    report = {"held_out": which, "parts": verdicts, **_pooled(verdicts), "residuals": _residuals(fits, parts)}
    family, spread = against(final, ProblemFamily()), _spread(fits)
    record = {
        "format": FORMAT,
        "parameters": final.record(),
        "overfit_passes": OVERFIT_PASSES,
        "family": family,
        "spread": spread,
        "calibration": report,
        "provenance": {"runs": len(logs.records), "version": __version__, "command": config.command},
    }
    write_json(out, record)
    if not config.quiet:
        say("\n\n".join((_described(final), _within(family, spread), _wrong(report["residuals"]))) + "\n")
    say(f"held out: {which}")
    say(_verdict(report))
    say(f"problem: {out} ({len(logs.domains)} rows, {len(logs.records)} runs)")


def _fits(
    logs: ProblemLogs, parts: Sequence[tuple[Sequence[Record], Sequence[Record]]], *, once: bool, quiet: bool
) -> tuple[list[Calibrated], Calibrated]:
    """A fit without each part's held-out runs, and the one that is written: of all runs, or the first if `once`."""
    wanted = [fitted for fitted, _ in parts] + ([] if once else [logs.records])
    fits = []
    with progress(ROUNDS * len(wanted), "fit", quiet=quiet, unit="round") as bar:
        for number, records in enumerate(wanted):

            def on_round(done: int, cost: float, before: int = number * ROUNDS) -> None:
                bar.update(before + done - bar.n)

            fits.append(calibrate(logs.domains, records, logs.initial, on_round))
    return fits[: len(parts)], fits[-1]


def _parts(logs: ProblemLogs, held_out: Sequence[str]) -> tuple[list[tuple[list[Record], list[Record]]], str]:
    """What is fitted and what is held out, once or thrice, and in words which that is."""
    if not held_out:
        parts = [split(logs.records, part) for part in range(PARTS)]
        which = f"each third of {len(logs.records)} runs in turn; runs that played the same stay together"
    else:
        names = logs.below(held_out)
        parts = [([r for r in logs.records if r.name not in names], [r for r in logs.records if r.name in names])]
        which = f"{len(names)} runs of --held-out"
    fewest = min(len(fitted) for fitted, _ in parts)
    if fewest < FEWEST_RUNS or not all(left_out for _, left_out in parts):
        raise ConfigError(
            f"runs={len(logs.records)}: must leave at least {FEWEST_RUNS} to fit beside those that are held out; they "
            f"leave {fewest}; give runs with more mixtures"
        )
    return parts, which


def _pooled(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The parts' errors as one: roots of mean squares, weighted by runs; mean rank correlations."""

    def pooled(values: Sequence[float], runs: Sequence[int]) -> float:
        return float(np.sqrt(np.average(np.square(values), weights=runs)))

    outside = [verdict["held_out_runs"] for verdict in verdicts]
    inside = [verdict["fitted_runs"] for verdict in verdicts]
    return {
        "in_sample_rmse_nats": {
            when: pooled([v["in_sample_rmse_nats"][when] for v in verdicts], inside) for when in ("all", "end")
        },
        "rmse_nats": {
            who: {when: pooled([v["rmse_nats"][who][when] for v in verdicts], outside) for when in ("all", "end")}
            for who in verdicts[0]["rmse_nats"]
        },
        "spearman": {
            name: float(np.mean(known))
            if (known := [v["spearman"][name] for v in verdicts if v["spearman"][name]])
            else None
            for name in ("target", "mean_loss")
        },
    }


def _residuals(
    fits: Sequence[Calibrated], parts: Sequence[tuple[Sequence[Record], Sequence[Record]]]
) -> list[dict[str, Any]]:
    predicted = [guess for fit, (_, held_out) in zip(fits, parts, strict=True) for guess in fit.predict(held_out)]
    return residuals(predicted, [record for _, held_out in parts for record in held_out])


def _spread(fits: Sequence[Calibrated]) -> dict[str, list[float]]:
    """Of every field's median over domains, the least and the most that the parts' fits have."""
    medians = {name: [float(np.median(quantities(fit)[name])) for fit in fits] for name in quantities(fits[0])}
    return {name: [min(values), max(values)] for name, values in medians.items()}


# --- what is printed ---------------------------------------------------------------------------------------


def _described(surface: Calibrated) -> str:
    other = surface.transfer - np.eye(len(surface.domains))
    rows = [
        (
            name,
            f"{surface.exponents[i]:.2f}",
            f"{surface.gains[i]:.2f}",
            f"{surface.slopes[i]:.2f}",
            f"{surface.floors[i]:.2f}",
            f"{surface.start[i]:.4f}",
            f"{surface.recency[i]:.3f}",
            ", ".join(f"{surface.domains[j]} {other[i, j]:.2f}" for j in other[i].argsort()[::-1][:2]),
        )
        for i, name in enumerate(surface.domains)
        if surface.measured[i]
    ]
    return text_table(("domain", "β", "A", "slope", "c", "δ", "κ", "helped most by (T)"), rows)


def _within(family: Mapping[str, Mapping[str, Any]], spread: Mapping[str, Sequence[float]]) -> str:
    rows = [
        (
            name,
            *(f"{found[key]:.3g}" for key in ("least", "median", "most")),
            f"{spread[name][0]:.3g} to {spread[name][1]:.3g}",
            f"{found['range'][0]:g} to {found['range'][1]:g}",
            f"{found['within']} of {found['of']}",
        )
        for name, found in family.items()
        if name != "junk"
    ]
    return text_table(("parameter", "least", "median", "most", "median by part", "ProblemFamily", "within"), rows)


def _wrong(groups: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (group["by"], group["group"], f"{group['mean_nats']:+.3f}", f"{group['rmse_nats']:.3f}", str(group["number"]))
        for group in groups
    ]
    return text_table(("held-out errors by", "", "mean (predicted − measured)", "RMSE", "number"), rows)


def _verdict(report: Mapping[str, Any]) -> str:
    named = {"surface, runs it was fitted on": report["in_sample_rmse_nats"], "surface": report["rmse_nats"]["surface"]}
    named["mean of the fitted runs"] = report["rmse_nats"]["mean_of_runs"]
    table = text_table(
        ("RMSE, nats", "all evaluations", "at the end"),
        [(name, f"{found['all']:.4f}", f"{found['end']:.4f}") for name, found in named.items()],
    )
    correlations = ", ".join(
        f"{name.replace('_', ' ')} {'-' if value is None else f'{value:.3f}'}"
        for name, value in report["spearman"].items()
    )
    return f"{table}\nSpearman of final losses within a problem: {correlations}"
