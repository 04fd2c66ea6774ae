"""The report in a browser: it draws everything, asks the network for nothing, fits a phone, and prints."""

import re
from pathlib import Path

import pytest
from fake_benchmark import fake_benchmark

from acodm_env.experiments.report.command import write_report

pytest.importorskip("plotly", reason="plotly is not installed: no page to look at")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser to look with")

CHROMIUM = Path("/usr/bin/chromium")
SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
]
EVIL = "<script>document.title='owned'</script>"
MIXERS = ("uniform", "odm-released", "mean-of:odm-released", "a-mixer-with-an-unreasonably-long-name-of-its-own", EVIL)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there: apt-get install chromium")
    with playwright.sync_playwright() as driver:  # a new, empty profile each time
        running = driver.chromium.launch(executable_path=str(CHROMIUM), args=SWITCHES)
        yield running
        running.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = fake_benchmark(
        tmp_path_factory.mktemp("report") / "benchmark",
        mixers=MIXERS,
        schedules=("cosine", "constant"),
        domains=("prose", "</script><img src=x onerror=alert(1)>", "<b>bold</b>"),
        seeds=(0, 1, 2),
        missing=("constant/odm-released/seed1",),
        failed=("constant/uniform/seed2",),
        diverged=(f"cosine/{MIXERS[3]}/seed0",),
    )
    return write_report([folder], folder / "report.html")


class Visit:
    """An open page, and what went wrong or out since."""

    def __init__(self, browser, file, width):
        self.complaints, self.requests = [], []
        self.page = browser.new_page(viewport={"width": width, "height": 800})
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-figures=drawn]", state="attached", timeout=120_000)


@pytest.fixture(scope="module", params=[1200, 390, 320])
def visit(request, browser, page_file):
    visit = Visit(browser, page_file, request.param)
    yield visit
    visit.page.close()


def test_it_is_silent_alone_and_draws_every_trace(visit, page_file):
    assert visit.complaints == []
    assert visit.requests == [page_file.as_uri()]
    counts = visit.page.evaluate(
        "[...document.querySelectorAll('.plot')].map(box => [Number(box.dataset.traces), (box.data || []).length,"
        " box.querySelectorAll('.main-svg').length > 0])"
    )
    assert len(counts) > 20
    assert all(expected == drawn and svg for expected, drawn, svg in counts)
    expected = len(re.findall(r'<script type="application/json"', page_file.read_text()))
    assert len(counts) == expected


def test_the_page_never_scrolls_sideways_and_tables_do_so_in_their_frame(visit):
    width = visit.page.viewport_size["width"]
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    wide = visit.page.evaluate(
        "[...document.querySelectorAll('.scroll, .plot, figure, p, pre')].filter("
        "part => part.offsetParent && part.getBoundingClientRect().right > window.innerWidth + 0.5).length"
    )
    assert wide == 0


def test_nothing_in_a_figure_lies_outside_it(visit):
    """No label is cut off at the edge of its picture."""
    cut = visit.page.evaluate(
        """[...document.querySelectorAll('.plot')].flatMap(box => {
            const frame = box.getBoundingClientRect();
            return [...box.querySelectorAll('text')].filter(label => label.textContent.trim()).filter(label => {
                const place = label.getBoundingClientRect();
                return place.width && (place.left < frame.left - 2 || place.right > frame.right + 2);
            }).map(label => label.textContent);
        })"""
    )
    assert cut == []


def test_names_are_shown_and_harmless(visit):
    page = visit.page
    assert page.title() != "owned"
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert EVIL in page.inner_text("main")
    labels = page.evaluate("[...document.querySelectorAll('.plot text')].map(label => label.textContent)")
    assert any("<script>" in label for label in labels)


def test_it_prints_with_everything_opened_and_goes_back_to_the_screen(browser, page_file, tmp_path):
    visit = Visit(browser, page_file, 1200)
    visit.page.evaluate(
        "window.addEventListener('beforeprint', () => { window.opened ="
        " document.querySelectorAll('details:not([open])').length;"
        " window.widths = [...document.querySelectorAll('.plot')].map(box => box._fullLayout.width); })"
    )
    visit.page.pdf(path=str(tmp_path / "page.pdf"), format="A4", print_background=True)
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert visit.page.evaluate("window.opened") == 0
    assert max(visit.page.evaluate("window.widths")) <= 690
    assert visit.page.evaluate("document.querySelectorAll('details[open]').length") == 0
    assert visit.complaints == []
    visit.page.close()
