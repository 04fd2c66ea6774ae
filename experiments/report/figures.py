"""The report's figures as plotly JSON: curves with bands, small multiples, mixtures over time.

Every function takes plain numbers; what they mean is decided in report_data.py. A figure may carry a "phone" entry:
changes to its layout where the page is narrow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from acodm_env.experiments.report.figure_style import (
    NEUTRAL,
    Figure,
    Style,
    axis,
    layout,
    rgba,
    rounded,
    text,
)
from acodm_env.step_stats import Array

MAX_BANDS = 8
"""Bands of more series than that hide each other: they are left to the small multiples."""
MAX_MIXTURE_POINTS = 200


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A mean over seeds with its 95 % band."""

    name: str
    tokens: Array
    """(E,)"""
    mean: Array
    """(E,)"""
    low: Array
    """(E,) NaN where one seed gives no interval."""
    high: Array
    """(E,)"""
    num_seeds: int


def curves_figure(curves: Sequence[Curve], styles: Mapping[str, Style], *, y_title: str, log: bool = False) -> Figure:
    """All mixers in one frame, from a fifth of the run on; a double click in the legend isolates a mixer."""
    banded = len(curves) <= MAX_BANDS
    data: list[dict[str, Any]] = []
    for curve in curves:
        style = styles[curve.name]
        if banded:
            data += _band(curve, style)
        data.append(_line(curve, style, f"%{{y:.4f}} · {curve.num_seeds} seed{'s' if curve.num_seeds != 1 else ''}"))
    low, high = _frame(curves)
    ends = np.log10([low, high]) if log else np.array([low, high])
    shown = layout(
        max(440, 60 + 21 * len(curves)),
        xaxis=_token_axis(curves, "training tokens"),
        yaxis=axis(
            y_title, type="log" if log else "linear", range=rounded(ends, 6), **(_log_ticks(low, high) if log else {})
        ),
        showlegend=True,
        legend={"x": 1.01, "y": 1, "yanchor": "top", "font": {"size": 12}, "itemwidth": 44, "tracegroupgap": 0},
    )
    phone = {"height": 340, "showlegend": False, "margin": {**shown["margin"], "r": 8}}
    return {"data": data, "layout": shown, "phone": phone}


def _line(curve: Curve, style: Style, hover: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": text(curve.name),
        "legendgroup": text(curve.name),
        "x": rounded(curve.tokens, 7),
        "y": rounded(curve.mean),
        "line": {"color": style.color, "dash": style.dash, "width": 1.8},
        "marker": {"symbol": style.symbol, "size": 7, "maxdisplayed": 9},
        "hovertemplate": f"%{{x:.3s}} tokens: {hover}",
    }


def _band(curve: Curve, style: Style) -> list[dict[str, Any]]:
    """The 95 % band as one closed outline; nothing where one seed gives no interval."""
    known = np.isfinite(curve.low) & np.isfinite(curve.high)
    if not known.any():
        return []
    x, low, high = curve.tokens[known], curve.low[known], curve.high[known]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": rounded([*x, *x[::-1]], 7),
            "y": rounded([*high, *low[::-1]]),
            "fill": "toself",
            "fillcolor": rgba(style.color, 0.12),
            "line": {"width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
            "legendgroup": text(curve.name),
        }
    ]


def _frame(curves: Sequence[Curve]) -> tuple[float, float]:
    """Vertical range of the curves after the first fifth of the run, with a little air."""
    end = max(float(curve.tokens[-1]) for curve in curves)
    later = [curve.mean[curve.tokens >= 0.2 * end] for curve in curves]
    values = np.concatenate([*later, *(curve.mean[-1:] for curve in curves)])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.5, 2.0
    low, high = float(values.min()), float(values.max())
    return low * 0.985, max(high * 1.01, low * 1.02)


def _token_axis(curves: Sequence[Curve], title: str, **settings: Any) -> dict[str, Any]:
    end = max((float(curve.tokens[-1]) for curve in curves), default=1.0)
    return axis(title, range=[0, end * 1.02 or 1.0], tickformat="~s", **settings)


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    """Some six round numbers: evenly spaced over less than a decade, else those of each decade."""
    if high < 10 * low:
        power = 10.0 ** np.floor(np.log10((high - low) / 6))
        step = power * next(digit for digit in (1, 2, 2.5, 5, 10) if digit * power * 7 >= high - low)
        values = [step * i for i in range(int(np.ceil(low / step)), int(high / step) + 1)]
    else:
        decades = range(int(np.floor(np.log10(low))), int(np.log10(high)) + 1)
        values = [digit * 10.0**power for power in decades for digit in (1, 2, 5)]
    shown = [float(f"{value:.6g}") for value in values if low <= value <= high]
    return {"tickvals": shown, "ticktext": [f"{value:g}" for value in shown]}


def difference_figure(curve: Curve, style: Style, *, span: tuple[float, float], unit: str, height: int = 150) -> Figure:
    """One small multiple: a mixer's difference to the baseline over the run, on the vertical scale of all others."""
    shown = layout(
        height,
        xaxis=_token_axis([curve], "", nticks=4),
        yaxis=axis("", range=rounded(span), nticks=5, zeroline=True, zerolinecolor=NEUTRAL, zerolinewidth=1),
        margin={"l": 8, "r": 14, "t": 6, "b": 4, "pad": 0},
    )
    data = [*_band(curve, style), _line(curve, style, f"%{{y:+.3~g}} {unit}")]
    data[-1]["marker"] |= {"size": 5, "maxdisplayed": 6}
    data[-1]["line"] |= {"width": 1.6, "dash": "solid"}
    return {"data": data, "layout": shown}


def difference_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Vertical range that all small multiples share: 0 and nearly all bounds in the last 70 % of the run."""
    values = [0.0]
    for curve in curves:
        late = curve.tokens >= 0.3 * curve.tokens[-1]
        for series in (curve.mean, curve.low, curve.high):
            values += series[late & np.isfinite(series)].tolist()
    low, high = (float(bound) for bound in np.quantile(values, (0.01, 0.99)))
    low, high = min(low, 0.0), max(high, 0.0)
    air = 0.12 * (high - low) or 1e-3
    return low - air, high + air


def mixture_figure(
    tokens: Array, requested: Array, realised: Array, styles: Mapping[str, Style], *, height: int = 210
) -> Figure:
    """One small multiple: requested mixture solid, realised dotted and smoothed; a marker per domain on both.

    Args:
        tokens: (steps,) after each step.
        requested: (steps, K).
        realised: (steps, K).
        styles: of the K domains, in order.
        height: pixels.
    """
    points = max(40, MAX_MIXTURE_POINTS * 8 // max(8, requested.shape[1]))
    at, asked = thin(tokens[:, None], points)[:, 0], thin(requested, points)
    drawn = thin(smoothed(realised, max(1, len(tokens) // 25)), points)
    data = []
    for series, dash, word in ((drawn, "dot", "realised"), (asked, "solid", "requested")):
        for k, (name, style) in enumerate(styles.items()):
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if dash == "solid" else "lines",
                    "name": text(name),
                    "x": rounded(at, 4),
                    "y": rounded(series[:, k], 3),
                    "line": {"color": style.color, "width": 1.6 if dash == "solid" else 1.2, "dash": dash},
                    "marker": {"symbol": style.symbol, "size": 6, "maxdisplayed": 5},
                    "opacity": 1 if dash == "solid" else 0.75,
                    "hovertemplate": f"%{{y:.1%}} {word}",
                }
            )
    top = float(np.nanmax([asked.max(), drawn.max(), 1e-3]))
    shown = layout(
        height,
        xaxis=axis("", range=[0, float(at[-1]) * 1.02], tickformat="~s", nticks=4),
        yaxis=axis("", range=[0, 1.08 * top], tickformat=".0%" if top > 0.05 else ".1%", nticks=5),
        margin={"l": 8, "r": 14, "t": 6, "b": 4, "pad": 0},
    )
    return {"data": data, "layout": shown}


def thin(values: Array, points: int) -> Array:
    """At most `points` rows: every n-th, the last one always."""
    step = -(-len(values) // points)
    return values[::-1][::step][::-1]


def smoothed(values: Array, window: int) -> Array:
    """Centred moving average over `window` rows, shorter at the ends."""
    total = np.vstack([np.zeros(values.shape[1]), np.nancumsum(values, axis=0)])
    rows = np.arange(len(values))
    first, last = np.maximum(rows - window // 2, 0), np.minimum(rows + (window + 1) // 2, len(values))
    mean: Array = (total[last] - total[first]) / (last - first)[:, None]
    return mean
