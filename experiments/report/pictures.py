"""Pictures beside the page: `forest.png`, paired differences and steps to the reference's best, and `regret.png`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.agents.baselines.recorded import MEAN_OF
from acodm_env.experiments.comparison.statistics import Interval
from acodm_env.experiments.comparison.summary import Row, Summary
from acodm_env.experiments.report.figure_style import COLORS, MUTED, NEUTRAL
from acodm_env.files import atomic_file

LOWEST = -0.6
"""Left end of the axis: what lies further left is drawn at it, as an arrow."""

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


def draw_regret(rows: Sequence[tuple[str, str, Interval]], path: Path) -> None:
    """Write a PNG.

    Args:
        rows: (name, split, interval), in the order to be drawn, best first.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    splits = sorted({split for _, split, _ in rows})
    most = max(sum(where == split for _, where, _ in rows) for split in splits)
    figure = Figure(figsize=(6.4 * len(splits), 1.4 + 0.24 * most), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits, strict=True):
        shown = [(name, interval) for name, where, interval in rows if where == split]
        for height, (name, interval) in enumerate(reversed(shown)):
            _row(axes, height, name, interval)
        axes.set_yticks(range(len(shown)), [name for name, _ in reversed(shown)], fontsize=8)
        axes.axvline(0, color=NEUTRAL, linewidth=0.8)
        axes.axvline(1, color=NEUTRAL, linewidth=0.8, linestyle="dotted")
        axes.set_xlim(LOWEST - 0.05, 1.05)
        axes.set_xlabel("regret recovered (0 uniform, 1 best schedule); mean and 95 % interval over seeds", fontsize=8)
        axes.set_title(f"{split} surfaces", fontsize=10)
        axes.grid(axis="x", color="#e5e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _row(axes, height: int, name: str, interval: Interval) -> None:  # type: ignore[no-untyped-def]
    mean = interval.mean or 0.0
    learner = not name.startswith("mean-of:")
    if mean < LOWEST:
        axes.plot(LOWEST, height, marker="<", color=MUTED, markersize=5)
        axes.annotate(
            f" {mean:.2f}", (LOWEST, height), fontsize=7, va="center", xytext=(4, 0), textcoords="offset points"
        )
        return
    if interval.low is not None and interval.high is not None:
        axes.plot([max(interval.low, LOWEST), interval.high], [height, height], color=COLORS[0], linewidth=1.6)
    axes.plot(mean, height, marker="o" if learner else "D", color=COLORS[0] if learner else COLORS[1], markersize=5)
