"""`suite.png`: the regret of every row, a panel per task, a dot per seed; what lies beyond the frame is an arrow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.experiments.benchmark.suite.regret import Outcome
from acodm_env.experiments.report.figure_style import COLORS, MUTED, NEUTRAL
from acodm_env.files import atomic_file

LOWEST, HIGHEST = -0.5, 1.6
COLUMNS = 4
TINT = {"policy": COLORS[1], "bandit": COLORS[2], "rule": COLORS[0], "control": MUTED}


def kind_of(row: str, policies: Sequence[str]) -> str:
    """What a row is: "policy", its "control" or time average, "bandit", or "rule"."""
    if row in policies:
        return "policy"
    if any(name in row for name in policies):
        return "control"
    return "bandit" if "odm-" in row else "rule"


def draw(outcomes: Sequence[Outcome], rows: Sequence[str], policies: Sequence[str], path: Path) -> Path:
    """Write a PNG; returns `path`.

    Args:
        outcomes: of the tasks with a gain.
        rows: from the top.
        policies: those that are policies.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(outcomes))
    lines = -(-len(outcomes) // columns)
    size = (1.8 + 3.1 * columns, lines * (0.8 + 0.23 * len(rows)) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, outcome in zip(grid.flat, outcomes, strict=False):
        _panel(axes, outcome, rows, policies)
    for axes in grid.flat[len(outcomes) :]:
        axes.set_axis_off()
    figure.supxlabel("regret: 0 the best static mixture, 1 uniform; dots are seeds, the bar their mean", fontsize=9)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return path


def _panel(axes: Any, outcome: Outcome, rows: Sequence[str], policies: Sequence[str]) -> None:
    for height, row in enumerate(reversed(rows)):
        regret = outcome.regret(row)
        if regret:
            _dots(axes, height, regret, TINT[kind_of(row, policies)])
        else:
            axes.annotate("not run", (0.02, height), fontsize=6.5, color=MUTED, va="center")
    axes.axvline(0, color=NEUTRAL, linewidth=0.8)
    axes.axvline(1, color=NEUTRAL, linewidth=0.8, linestyle="dotted")
    axes.set_xlim(LOWEST, HIGHEST)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_yticks(range(len(rows)), list(reversed(rows)), fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(f"{outcome.task.name}\nbest: {outcome.best}, {outcome.gain:.3f} nats", fontsize=8.5)
    axes.grid(axis="both", color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)


def _dots(axes: Any, height: int, regret: Mapping[int, float], color: str) -> None:
    values = np.array([*regret.values()])
    mean = float(values.mean())
    inside = values[(values >= LOWEST) & (values <= HIGHEST)]
    axes.plot(inside, np.full(len(inside), height), marker="o", linestyle="", color=color, alpha=0.45, markersize=3.5)
    if mean > HIGHEST or mean < LOWEST:
        right = mean > HIGHEST
        text, edge = f"{mean:.1f} →" if right else f"← {mean:.1f}", HIGHEST if right else LOWEST
        where = "right" if right else "left"
        axes.annotate(text, (edge, height), fontsize=7, color=color, va="center", ha=where)
        return
    axes.plot([mean, mean], [height - 0.32, height + 0.32], color=color, linewidth=2.2)
