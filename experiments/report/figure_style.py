"""What the report's figures share: how each series is told apart without colour, and how text gets into them.

Figures are plain plotly JSON (`{"data": …, "layout": …}`); plotly itself is needed only for the script that draws them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

COLORS = ("#0072b2", "#c4501b", "#00845f", "#a3488a", "#8a6500", "#3d8fc9", "#5a4fa3", "#7a4a3a")
"""Dark enough on white for thin lines, and apart for the common forms of colour blindness (after Okabe and Ito)."""
NEUTRAL = "#3a3f47"
MUTED = "#6b7280"
BETTER, WORSE = "#00704f", "#b3420e"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "triangle-down",
    "cross",
    "x",
    "star",
    "hexagon",
    "pentagon",
    "bowtie",
)
"""6 dashes and 11 symbols have no common divisor: 66 series before a pair of them comes again."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
MEAN_OF = "mean-of:"

Figure = dict[str, Any]


@dataclass(frozen=True)
class Style:
    """How one series looks: any two differ in line and marker, not by colour alone."""

    color: str
    dash: str
    symbol: str


def mixer_styles(mixers: Sequence[str], baseline: str) -> dict[str, Style]:
    """A style per mixer; `mean-of:NAME` has the colour of NAME, the baseline a neutral one."""
    names = [name for name in dict.fromkeys(name.removeprefix(MEAN_OF) for name in mixers) if name != baseline]
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)} | {baseline: NEUTRAL}
    return {
        name: Style(colors[name.removeprefix(MEAN_OF)], DASHES[i % len(DASHES)], SYMBOLS[i % len(SYMBOLS)])
        for i, name in enumerate(mixers)
    }


def domain_styles(domains: Sequence[str]) -> dict[str, Style]:
    """A style per domain: colour and marker, filled or open; the dash is taken, it tells requested from realised."""
    markers = (*SYMBOLS, *(f"{symbol}-open" for symbol in SYMBOLS))
    return {name: Style(COLORS[i % len(COLORS)], "solid", markers[i % len(markers)]) for i, name in enumerate(domains)}


def text(name: str) -> str:
    """A name as plotly shall print it: its own small subset of HTML would otherwise be obeyed."""
    return escape(name, quote=False)


def rounded(values: Any, digits: int = 5) -> list[float | None]:
    """Numbers for JSON: `digits` significant ones, null where not finite."""
    return [float(f"{x:.{digits}g}") if x == x and abs(x) != float("inf") else None for x in map(float, values)]


def axis(title: str = "", **settings: Any) -> dict[str, Any]:
    """An axis with a thin line, quiet grid and room for its labels."""
    named = {"title": {"text": title, "standoff": 8, "font": {"size": 12}}} if title else {}
    return {
        **named,
        "automargin": True,
        "tickangle": 0,
        "gridcolor": "#e8eaee",
        "linecolor": "#b8bec8",
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "#b8bec8",
        "zeroline": False,
        **settings,
    }


def layout(height: int, **settings: Any) -> dict[str, Any]:
    """A layout in the page's type, with small margins."""
    return {
        "height": height,
        "font": {"family": FONT, "size": 12, "color": NEUTRAL},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8, "pad": 0},
        "hoverlabel": {"font": {"family": FONT, "size": 12}, "namelength": -1},
        "showlegend": False,
        **settings,
    }


def rgba(color: str, alpha: float) -> str:
    """ "#rrggbb" with transparency."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
