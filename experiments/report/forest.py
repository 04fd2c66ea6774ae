"""A forest plot as plotly JSON: estimates with their intervals, one row each, told apart by shape as well as colour."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

from acodm_env.experiments.report.figure_style import BETTER, MUTED, NEUTRAL, WORSE, Figure, axis, layout, rounded, text

MARKS = {
    "better": (BETTER, "triangle-left", "better"),
    "worse": (WORSE, "triangle-right", "worse"),
    "": (MUTED, "circle-open", "no difference shown"),
    "none": (MUTED, "arrow-bar-right", "beyond the axis"),
}
"""Verdict: colour, marker, and the word for it."""
LONG_NAME = 16
"""Characters after which a phone breaks a name."""
LONG_LINE = 18
"""Characters that it then shows of each half."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a forest plot."""

    name: str
    mean: float | None
    """None: there is no number; `note` says why."""
    low: float | None = None
    high: float | None = None
    endless: bool = False
    """Whether the interval has no upper bound: it is drawn to the edge of the axis."""
    beyond: bool = False
    """Whether the estimate lies beyond the axis, at "never": an arrow at its edge."""
    verdict: str = ""
    """"better", "worse", or anything else for neither."""
    note: str = ""
    """Printed at the right."""
    short: str = ""
    """The note on a phone; default: the same."""

    @property
    def kind(self) -> str:
        """Its entry in `MARKS`."""
        if self.mean is None:
            return "none"
        return self.verdict if self.verdict in ("better", "worse") else ""


def forest_figure(rows: Sequence[Row], *, x_title: str, line: float) -> Figure:
    """Estimates with their intervals, in the order given from the top; shape and colour say which leave `line` out."""
    edges = _edges(rows, line)
    positions = {row.name: len(rows) - 1 - i for i, row in enumerate(rows)}
    drawn = [row for row in rows if row.mean is not None or row.beyond]
    groups = {kind: [row for row in drawn if row.kind == kind] for kind in MARKS}
    names = {"tickvals": [*positions.values()], "ticktext": [text(name) for name in positions]}
    y_axis = {"showline": False, "ticks": "", "range": [-0.6, len(rows) - 0.4], "fixedrange": True}
    shown = layout(
        64 + 24 * len(rows),
        xaxis=axis(x_title, range=rounded(edges, 6), nticks=7, tickformat="~g"),
        yaxis=axis("", **y_axis, **names),
        shapes=[_vertical(line)],
        annotations=[_note(positions[row.name], row.note, 11.5) for row in rows if row.note],
        margin={
            "l": 8,
            "t": 6,
            "b": 8,
            "pad": 0,
            "r": 14 + round(6.7 * max((len(row.note) for row in rows), default=0)),
        },
        hovermode="closest",
    )
    data = [_points(group, positions, kind, edges[1]) for kind, group in groups.items() if group]
    return {"data": data, "layout": shown, "phone": _phone(shown, rows, positions)}


def _edges(rows: Sequence[Row], line: float) -> tuple[float, float]:
    """Horizontal range: everything, the line, some air, and room on the right for what lies beyond."""
    ends = [line, *(x for row in rows for x in (row.mean, row.low, row.high) if x is not None)]
    low, high = min(ends), max(ends)
    span = (high - low) or max(abs(high), 1e-3)
    beyond = any(row.endless or row.beyond for row in rows)
    return low - 0.06 * span, high + (0.16 if beyond else 0.06) * span


def _points(rows: Sequence[Row], positions: Mapping[str, int], kind: str, edge: float) -> dict[str, Any]:
    """The rows of one verdict, as a trace; what lies beyond at the right `edge`."""
    color, symbol, label = MARKS[kind]
    means = [edge if row.mean is None else row.mean for row in rows]
    tops = [edge if row.endless else row.high for row in rows]
    high = [nan if top is None else max(top - x, 0.0) for top, x in zip(tops, means, strict=True)]
    low = [nan if row.low is None else x - row.low for row, x in zip(rows, means, strict=True)]
    bars = {"type": "data", "symmetric": False, "array": rounded(high), "arrayminus": rounded(low)}
    bars |= {"color": color, "thickness": 2, "width": 4, "visible": kind != "none"}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label,
        "x": rounded(means, 6),
        "y": [positions[row.name] for row in rows],
        "marker": {"color": color, "symbol": symbol, "size": 11, "line": {"width": 1.8, "color": color}},
        "error_x": bars,
        "cliponaxis": False,
        "text": [text(f"{row.name}: {row.note or label}") for row in rows],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _vertical(at: float) -> dict[str, Any]:
    line = {"color": NEUTRAL, "width": 1}
    return {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": line, "layer": "above"}


def _note(position: int, words: str, size: float) -> dict[str, Any]:
    anchor = {"xref": "paper", "x": 1, "xanchor": "left", "xshift": 10, "yref": "y", "y": position}
    return anchor | {"text": text(words), "showarrow": False, "align": "left", "font": {"size": size}}


def _phone(shown: Figure, rows: Sequence[Row], positions: Mapping[str, int]) -> dict[str, Any]:
    """Changes on a phone: short notes, names on two lines, fewer ticks."""
    notes = {row.name: row.short or row.note for row in rows}
    longest = max(map(len, notes.values()), default=0)
    return {
        "annotations": [_note(positions[name], note, 10.5) for name, note in notes.items() if note],
        "xaxis": {**shown["xaxis"], "nticks": 4},
        "yaxis": {**shown["yaxis"], "tickfont": {"size": 10.5}, "ticktext": [broken(name) for name in positions]},
        "margin": {**shown["margin"], "r": 20 + round(6.4 * longest)},
        "height": shown["height"] + 5 * len(rows),
    }


def broken(name: str) -> str:
    """A long name on two lines, broken after the hyphen or colon nearest to its middle, the rest left out."""
    if len(name) <= LONG_NAME:
        return text(name)
    places = [i + 1 for i, letter in enumerate(name) if letter in "-:_ " and i + 1 < len(name)] or [len(name) // 2]
    at = min(places, key=lambda place: abs(place - len(name) / 2))
    return "<br>".join(text(_cut(part)) for part in (name[:at], name[at:]))


def _cut(part: str) -> str:
    return part if len(part) <= LONG_LINE else part[: LONG_LINE - 1] + "…"
