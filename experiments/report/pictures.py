"""`forest.png`: every mixer's paired difference to uniform sampling, and how soon it reaches the reference's best."""

from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.agents.baselines.recorded import MEAN_OF
from acodm_env.experiments.comparison.statistics import Interval
from acodm_env.experiments.comparison.summary import Row, Summary
from acodm_env.files import atomic_file

_MARKERS = {"better": ("o", "#1b6e3c", "better"), "worse": ("s", "#a3311f", "worse")}
_UNDECIDED = ("D", "#6b6b6b", "no difference shown")


def draw_forest(summary: Summary, path: Path) -> Path:
    """Write the picture of one schedule, mixers sorted by their difference in mean loss; returns `path`.

    The replayed time averages, `mean-of:`, are on the page only.

    Left, the paired difference in mean held-out loss with its 95 % interval over the seeds: marker shape and colour
    give the verdict. Right, the median of the steps to the reference's best perplexity over the reference's own.
    """
    from matplotlib.figure import Figure

    chosen = [row for row in summary.rows if row.mixer != "uniform" and not row.mixer.startswith(MEAN_OF)]
    rows = sorted(chosen, key=lambda row: _key(summary, row))
    figure = Figure(figsize=(10, 1.6 + 0.3 * len(rows)), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for height, row in enumerate(reversed(rows)):
        _draw_difference(left, summary, row, height)
        _draw_steps(right, row, height)
    left.set_yticks(range(len(rows)), [row.mixer for row in reversed(rows)])
    left.axvline(0, color="black", lw=0.8)
    what = summary.objective or "mean held-out loss"
    left.set_xlabel(f"{what} minus uniform's, nats (left is better)")
    right.axvline(1, color="black", lw=0.8, ls=":")
    left_end, right_end = right.get_xlim()
    right.set_xlim(left_end, right_end + 0.35 * (right_end - left_end))  # room for the counts
    level = "objective" if summary.objective else "perplexity"
    right.set_xlabel(f"steps to {summary.reference}'s best\n{level}, over its own")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.set_ylim(-0.7, len(rows) - 0.3)
    handles, labels = left.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    figure.suptitle(
        f"{summary.title}, {summary.schedule} schedule: {len(summary.seeds)} seeds, 95 % intervals", fontsize="medium"
    )
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
    return path


def _key(summary: Summary, row: Row) -> float:
    difference = summary.difference(row.mixer, "uniform")
    return np.inf if difference is None or difference.interval.mean is None else difference.interval.mean


def _draw_difference(axes: Any, summary: Summary, row: Row, height: int) -> None:
    difference = summary.difference(row.mixer, "uniform")
    if difference is None or difference.interval.mean is None:
        note = difference.note if difference is not None and difference.note else row.note or "no result"
        axes.annotate(note, (0.02, height), xycoords=("axes fraction", "data"), va="center", fontsize="small")
        return
    marker, colour, label = _MARKERS.get(difference.verdict, _UNDECIDED)
    _draw(axes, difference.interval, height, marker, colour, label)


def _draw_steps(axes: Any, row: Row, height: int) -> None:
    found = row.metrics["steps_to_reference_ratio"]
    reached = f"{found.num_seeds} of {row.num_compared}"
    if found.mean is None:
        text = f"never ({reached}) →" if row.num_compared else "–"
        axes.annotate(
            text, (0.98, height), xycoords=("axes fraction", "data"), va="center", ha="right", fontsize="small"
        )
        return
    _draw(axes, found, height, "o", "#26547c", "")
    axes.annotate(
        reached, (0.98, height), xycoords=("axes fraction", "data"), va="center", ha="right", fontsize="x-small"
    )


def _draw(axes: Any, found: Interval, height: int, marker: str, colour: str, label: str) -> None:
    assert found.mean is not None
    if found.low is not None and found.high is not None:
        axes.plot([found.low, found.high], [height, height], color=colour, lw=1.4)
    elif found.low is not None:  # open to the right: not every seed reached it
        axes.annotate(
            "", (found.mean * 1.04, height), (found.low, height), arrowprops={"arrowstyle": "->", "color": colour}
        )
    axes.plot([found.mean], [height], marker=marker, color=colour, ls="", ms=6, label=label)
