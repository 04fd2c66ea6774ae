"""HTML of the report: one file that opens offline, on a phone, and on paper.

What is not `Html` is text and gets escaped; only this module and those that build on it make `Html`. A content security
policy in the page itself forbids every request, whatever a name may contain.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from acodm_env.errors import ConfigError
from acodm_env.experiments.report.figure_style import Figure, Style

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


class Html(str):
    """Markup, as against text that is yet to be escaped."""

    __slots__ = ()


def markup(content: str) -> Html:
    """`Html` as it is, text escaped."""
    return content if isinstance(content, Html) else Html(escape(content))


def join(parts: Iterable[str], between: str = "\n") -> Html:
    """Pieces one after the other."""
    return Html(between.join(markup(part) for part in parts if part))


def element(tag: str, *content: str, **attributes: str | None) -> Html:
    """`<tag …>content</tag>`; `class_` is the attribute class, and an attribute that is None is left out."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{given}>{join(content, '')}</{tag}>")


def listing(items: Iterable[str], **attributes: str | None) -> Html:
    """A bulleted list."""
    return element("ul", *(element("li", item) for item in items), **attributes)


def folded(title: str, *content: str) -> Html:
    """Something to open by a click; printing opens it."""
    return element("details", element("summary", title), *content)


def definitions(pairs: Iterable[tuple[str, str]]) -> Html:
    """Names and values, in two columns."""
    return element("dl", *(element("dt", name) + element("dd", value) for name, value in pairs))


@dataclass(frozen=True)
class Cell:
    """A table's cell with a class of its own."""

    content: str
    kind: str


def table(header: Sequence[str | Cell], rows: Iterable[Sequence[str | Cell]], caption: str = "") -> Html:
    """A table that scrolls sideways in its own frame; the first column stays."""
    head = element("tr", *(_column(name) for name in header))
    body = [element("tr", _head_cell(row[0]), *map(_cell, row[1:])) for row in rows]
    label = caption or "table"
    whole = element("table", element("thead", head), element("tbody", *body), aria_label=label)
    frame = element("div", whole, class_="scroll", tabindex="0", role="region", aria_label=label)
    return join([element("p", caption, class_="caption"), frame]) if caption else frame


def _column(name: str | Cell) -> Html:
    if isinstance(name, Cell):
        return element("th", name.content, scope="col", class_=name.kind)
    return element("th", name, scope="col")


def _head_cell(content: str | Cell) -> Html:
    return element("th", content.content if isinstance(content, Cell) else content, scope="row", class_="long")


def _cell(content: str | Cell) -> Html:
    if isinstance(content, Cell):
        return element("td", content.content, class_=content.kind)
    return element("td", content)


@dataclass
class Figures:
    """The figures of one page: each a frame, and its numbers as JSON beside it."""

    count: int = 0
    scripts: list[str] = field(default_factory=list)

    def frame(self, figure: Figure, label: str, title: str = "", caption: str = "") -> Html:
        """A place where the page's script will draw `figure`; `label` says in words what it shows."""
        self.count += 1
        name = f"figure-{self.count}"
        self.scripts.append(f'<script type="application/json" id="{name}">{as_json(figure)}</script>')
        place = element(
            "div",
            class_="plot",
            data_figure=name,
            data_traces=str(len(figure["data"])),
            style=f"height:{figure['layout']['height']}px",
            role="img",
            aria_label=label,
        )
        return element(
            "figure",
            element("h4", title) if title else Html(""),
            place,
            element("figcaption", caption) if caption else Html(""),
        )


def as_json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def key(styles: dict[str, Style], kind: str = "legend") -> Html:
    """A legend for figures that share one: colour, line and marker of every name."""
    return listing((Html(_sample(style) + markup(name)) for name, style in styles.items()), class_=kind)


LINES = {"solid": "", "dash": "6 3", "dot": "2 2", "dashdot": "6 2 2 2", "longdash": "9 3", "longdashdot": "9 2 2 2"}


SHAPES = {
    "circle": '<circle cx="13" cy="7" r="4"/>',
    "square": '<rect x="9" y="3" width="8" height="8"/>',
    "diamond": '<path d="M13 2l5 5-5 5-5-5z"/>',
    "triangle-up": '<path d="M13 2l5 9H8z"/>',
    "triangle-down": '<path d="M13 12l5-9H8z"/>',
    "cross": '<path d="M11.5 2h3v3.5H18v3h-3.5V12h-3V8.5H8v-3h3.5z"/>',
    "x": '<path d="M9 1.5l4 4 4-4 1.5 1.5-4 4 4 4-1.5 1.5-4-4-4 4L7.5 11l4-4-4-4z"/>',
    "star": '<path d="M13 1l1.8 4H19l-3.4 2.7L17 12l-4-2.600L9 12l1.4-4.300L7 5h4.200z"/>',
    "hexagon": '<path d="M13 2l4.5 2.5v5L13 12 8.5 9.5v-5z"/>',
    "pentagon": '<path d="M13 2l5 3.7-2 6h-6l-2-6z"/>',
    "bowtie": '<path d="M8 3l5 3 5-3v8l-5-3-5 3z"/>',
}


def _sample(style: Style) -> str:
    shape, filled = style.symbol.removesuffix("-open"), not style.symbol.endswith("-open")
    fill = style.color if filled else "#fff"
    return (
        f'<svg width="26" height="14" aria-hidden="true" stroke="{style.color}" fill="{fill}">'
        f'<path d="M0 7h26" stroke-width="1.8" stroke-dasharray="{LINES[style.dash]}"/>{SHAPES[shape]}</svg>'
    )


def document(title: str, body: str, figures: Figures) -> str:
    """The whole page, plotly's script inside.

    Raises:
        ConfigError: plotly is not installed.
    """
    script = plotly_script() if figures.count else ""
    here = Path(__file__).parent
    drawing = f"<script>{script}</script>\n<script>{(here / 'page.js').read_text()}</script>" if figures.count else ""
    numbers = "\n".join(figures.scripts)
    content = markup(body).replace(" %", "\u00a0%")  # no line ends between a number and its sign
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{(here / "page.css").read_text()}</style>
</head>
<body>
{content}
{numbers}
{drawing}
</body>
</html>
"""


def plotly_script() -> str:
    """Source of plotly.js.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError(
            "report: must have plotly, which draws the page and is not installed; "
            "pip install 'acodm[report]', or use --csv for the numbers alone"
        ) from error
    script: str = get_plotlyjs()
    return script
