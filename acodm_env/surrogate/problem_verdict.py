"""How well a fitted problem surface predicts runs that it has not seen, where it errs, and what it says of ranges."""

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from acodm_env.step_stats import Array
from acodm_env.surrogate.calibrated import IGNORED, ONE, SINCE, Calibrated, Record
from acodm_env.surrogate.calibration import rank_correlation
from acodm_env.surrogate.problems import ProblemFamily

QUARTERS = 4
RANKED = 3
"""Fewest runs of a problem whose order is judged."""
PARTS = 3
"""One run in so many is held out."""
_JUNK = 0.08  # largest slope of a domain that teaches next to nothing, as `ProblemFamily` draws them
_BINS: dict[str, tuple[float, ...]] = {
    "own share": (IGNORED, 0.02, 0.1, 0.2, 0.4, 0.7),
    "own passes": (0.5, 1.0, 4.0, 12.0, 25.0),
    "progress": (0.1, 0.25, 0.5, 0.75),
}
"""Upper edges of the groups in which errors are told; the last group is open."""


def signature(record: Record) -> tuple[Any, ...]:
    """What runs share that must be fitted or held out together: problem and mixtures by quarter, to a fiftieth."""
    parts = np.array_split(record.mixtures, QUARTERS)
    return record.problem, *np.round(50 * np.concatenate([part.mean(0) for part in parts])).astype(int).tolist()


def split(records: Sequence[Record], part: int) -> tuple[list[Record], list[Record]]:
    """Runs to fit and runs to judge by: of every three groups of one `signature` the `part`-th is held out."""
    ordered = sorted(records, key=lambda record: (signature(record), record.name))
    groups = [list(group) for _, group in groupby(ordered, key=signature)]
    held_out = [record for index, group in enumerate(groups) if index % PARTS == part for record in group]
    out = {record.name for record in held_out}
    return [record for record in records if record.name not in out], held_out


def errors(predicted: Sequence[Array], records: Sequence[Record]) -> dict[str, float]:
    """RMSE in nats over what is fitted, of all evaluations but the one before the first step, and of the last one."""
    missed = _missed(predicted, records)
    later = [row[record.times >= SINCE] for row, record in zip(missed, records, strict=True)]
    return {"all": _rms(np.concatenate(later)), "end": _rms(np.stack([row[-1] for row in missed]))}


def _missed(predicted: Sequence[Array], records: Sequence[Record]) -> list[Array]:
    """Predicted − measured (E, K) of every run; NaN for targets that a fit does not read."""
    pairs = zip(predicted, records, strict=True)
    return [np.where(record.fitted, guess - record.losses, np.nan) for guess, record in pairs]


def _rms(missed: Array) -> float:
    return float(np.sqrt(np.nanmean(missed**2)))


def mean_course(fitted: Sequence[Record], records: Sequence[Record]) -> list[Array]:
    """What the mean of the fitted runs says of `records`, whatever their mixtures: (E, K) each."""
    guesses = []
    for record in records:
        rows = np.stack([_at(other, record.times) for other in fitted])  # (R, E, K)
        known = np.isfinite(rows)
        guesses.append(np.where(known, rows, 0).sum(0) / np.maximum(known.sum(0), 1))
    return guesses


def _at(record: Record, times: Array) -> Array:
    """(E, K) losses at other times."""
    return np.stack([np.interp(times, record.times, column) for column in record.losses.T], 1)


def ranks(predicted: Sequence[Array], records: Sequence[Record]) -> dict[str, float | None]:
    """Spearman's ρ of final losses between runs of one problem: mean over its targets, and of the mean loss."""
    ends = np.stack([guess[-1] for guess in predicted]), np.stack([record.losses[-1] for record in records])
    by_target, of_mean = [], []
    for problem in sorted({record.problem for record in records}):
        mine = [index for index, record in enumerate(records) if record.problem == problem]
        known = np.isfinite(ends[1][mine]).all(0)
        if len(mine) < RANKED or not known.any():
            continue
        guess, truth = (rows[mine][:, known] for rows in ends)
        by_target += [rank_correlation(one, other) for one, other in zip(guess.T, truth.T, strict=True)]
        of_mean.append(rank_correlation(guess.mean(1), truth.mean(1)))
    return {"target": _mean(by_target), "mean_loss": _mean(of_mean)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def residuals(predicted: Sequence[Array], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Where predictions are wrong: mean of predicted − measured, RMSE and number, in groups of targets of runs.

    Groups: by the target's own share of the run and by the passes over it, of the last evaluation; by progress, of all;
    by whether the mixture moved, and by problem, of the last one. Domains that a run could train on and never did are
    in the least share only.
    """
    missed = _missed(predicted, records)
    ends = np.stack([row[-1] for row in missed])  # (R, K)
    every_end = np.stack([guess[-1] - record.losses[-1] for guess, record in zip(predicted, records, strict=True)])
    shares = np.stack([record.drawn[-1] for record in records])
    sizes = np.stack([record.sizes for record in records])
    passes = np.divide(shares, sizes, out=np.zeros_like(shares), where=sizes > 0)
    every = np.concatenate([row[record.times > 0] for row, record in zip(missed, records, strict=True)])
    times = np.concatenate([record.times[record.times > 0] for record in records])
    trained = np.where(np.stack([record.trainable for record in records]) > 0, 0.0, np.nan)
    moved = np.array(["mixture moves" if record.moves else "mixture stands" for record in records])
    names = np.array([record.problem for record in records])
    found = [
        *_binned("own share", shares + trained, every_end),
        *_binned("own passes", passes + trained, ends),
        *_binned("progress", np.broadcast_to(times[:, None], every.shape), every),
        _group("own share", "not trained on", ends[np.isnan(trained)]),
        *(_group("order", str(kind), ends[moved == kind]) for kind in np.unique(moved)),
        *(_group("problem", str(name), ends[names == name]) for name in np.unique(names)),
    ]
    return [group for group in found if group["number"]]


def _binned(kind: str, values: Array, missed: Array) -> list[dict[str, Any]]:
    edges = (-np.inf, *_BINS[kind], np.inf)
    groups = []
    for low, high in pairwise(edges):
        words = f"≤ {high:g}" if low == -np.inf else f"> {low:g}" if high == np.inf else f"{low:g}–{high:g}"
        groups.append(_group(kind, words, missed[(values > low) & (values <= high)]))
    return groups


def _group(kind: str, words: str, missed: Array) -> dict[str, Any]:
    known = missed[np.isfinite(missed)]
    mean, rms = (float(known.mean()), _rms(known)) if len(known) else (0.0, 0.0)
    return {"by": kind, "group": words, "mean_nats": mean, "rmse_nats": rms, "number": len(known)}


def judge(surface: Calibrated, fitted: Sequence[Record], held_out: Sequence[Record]) -> dict[str, Any]:
    """Errors of the surface on the runs it was fitted on, on the others, and of the mean course; rank correlation."""
    inside, outside = surface.predict(fitted), surface.predict(held_out)
    return {
        "fitted_runs": len(fitted),
        "held_out_runs": len(held_out),
        "in_sample_rmse_nats": errors(inside, fitted),
        "rmse_nats": {
            "surface": errors(outside, held_out),
            "mean_of_runs": errors(mean_course(fitted, held_out), held_out),
        },
        "spearman": ranks(outside, held_out),
    }


def quantities(surface: Calibrated) -> dict[str, Array]:
    """What `ProblemFamily` draws, as the fit has it, by its fields: one number or one per measured row or pair."""
    known = surface.measured
    other = surface.transfer[known[:, None] & ~np.eye(len(known), dtype=bool)]
    return {
        "exponents": surface.exponents[known],
        "slopes": surface.slopes[known],
        "recency": surface.recency[known],
        **{name: np.array([getattr(surface, name)]) for name in ONE},
        "transfer": other,
    }


def against(surface: Calibrated, family: ProblemFamily) -> dict[str, dict[str, Any]]:
    """Where the fitted numbers lie in a family's ranges: least, median, most, the range, and how many are within.

    Junk has slopes below the range on purpose, and κ is drawn from its range times .3 to 1; both count as within.
    """
    ranges: Mapping[str, tuple[float, float]] = {
        name: getattr(family, name) for name in quantities(surface) if name != "transfer"
    } | {"transfer": (0.0, family.transfer + family.background)}
    found = {}
    for name, values in quantities(surface).items():
        low, high = ranges[name]
        least = {"slopes": 0.0 if family.junk else low, "recency": 0.3 * low}.get(name, low)
        found[name] = {
            "least": float(values.min()),
            "median": float(np.median(values)),
            "most": float(values.max()),
            "range": [float(low), float(high)],
            "within": int(((values >= least) & (values <= high)).sum()),
            "of": int(values.size),
        }
    rows = zip(surface.domains, surface.slopes, surface.measured, strict=True)
    found["junk"] = {"domains": [name for name, slope, known in rows if known and slope < _JUNK]}
    return found
