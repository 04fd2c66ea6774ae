"""The regret that every row recovers, as dots with intervals: one panel per split."""

from collections.abc import Sequence
from pathlib import Path

from acodm_env.experiments.comparison.statistics import Interval
from acodm_env.experiments.report.figure_style import COLORS, MUTED, NEUTRAL
from acodm_env.files import atomic_file

LOWEST = -0.6
"""Left end of the axis: what lies further left is drawn at it, as an arrow."""


def draw(rows: Sequence[tuple[str, str, Interval]], path: Path) -> None:
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
