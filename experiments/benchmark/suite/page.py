"""`suite.html`: the suite's tables and picture on one page that opens offline."""

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from acodm_env.experiments.report.page import Figures, document, element, join, listing, table
from acodm_env.files import atomic_file

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, header, rows."""
TITLE = "A suite of mixing problems"
LEAD = (
    "Every task is a corpus, an objective and a cut of its data. Regret is the share of the best static mixture's gain "
    "over uniform sampling that a row misses: 0 is as good as the best static mixture, 1 is uniform, more than 1 is "
    "worse than uniform. The best static mixture is chosen after the fact, by its mean over seeds on the test split. "
    "`acodm report` on a task's folder makes the page of that task."
)


def write_page(path: Path, tables: Sequence[Table], sentences: Sequence[str], picture: Path | None) -> Path:
    """Write the page, atomically; returns `path`.

    Args:
        path: of the page.
        tables: in order.
        sentences: comparisons in words.
        picture: a PNG to show, if there is one.
    """
    sections = [element("section", element("h2", title), table(header, rows)) for title, header, rows in tables]
    if picture is not None:
        data = b64encode(picture.read_bytes()).decode()
        image = element("img", src=f"data:image/png;base64,{data}", alt="regret by task and row", style="width:100%")
        sections.append(element("section", element("h2", "Regret of every seed"), image))
    if sentences:
        sections.append(element("section", element("h2", "In words"), listing(sentences)))
    header = element("header", element("h1", TITLE), element("p", LEAD, class_="facts"))
    with atomic_file(path) as file:
        file.write(document(TITLE, join([header, element("main", *sections)]), Figures()).encode())
    return path
