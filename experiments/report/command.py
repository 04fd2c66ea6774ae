"""`acodm report`: what a benchmark, or several runs, show, as one page that opens offline in any browser."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from acodm_env.errors import ConfigError, unknown
from acodm_env.experiments.comparison.load import Comparison, load
from acodm_env.experiments.comparison.summary import Summary, summarise, write_csv
from acodm_env.experiments.console import note, say
from acodm_env.experiments.report.answer import answer_sections, problems_box
from acodm_env.experiments.report.course import curve_sections, mixture_sections
from acodm_env.experiments.report.curves import Mixtures
from acodm_env.experiments.report.evaluation import evaluation_section
from acodm_env.experiments.report.forests import crossing_sections
from acodm_env.experiments.report.page import Figures, Html, document, element, join, plotly_script
from acodm_env.experiments.report.tables import appendix, cost_section, domain_section, exploration_section
from acodm_env.files import atomic_file


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Compare a benchmark's mixers, or several runs, on one HTML page."""

    runs: list[str]
    """Folder of a benchmark, or folders of several target runs on the same targets."""
    out: str | None = None
    """File of the page; default: report.html in the first of the folders."""
    csv: bool = False
    """Print the numbers as CSV (mixer, metric, mean, low, high, num_seeds); a page only if --out is given."""
    schedule: str | None = None
    """Learning-rate schedule whose numbers --csv prints; default: the first. The page shows all of them."""
    reference: str | None = None
    """Mixer whose best perplexity the others have to reach; default: the benchmark's."""
    seed: int | None = None
    """Seed whose mixtures are drawn; default: the first that has finished."""
    quiet: bool = False
    """Do not say where the page is."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("runs=[]: must name a folder; acodm report RUN [RUN …]")


def run(config: ReportConfig) -> None:
    """Print the numbers, or write the page, or both."""
    if config.csv:
        say(csv_text(config).rstrip())
    if config.csv and config.out is None:
        return
    out = Path(config.out) if config.out is not None else Path(config.runs[0]) / "report.html"
    write_report(config.runs, out, config.reference, config.seed)
    if not config.quiet:
        note(f"page: {out}")


def csv_text(config: ReportConfig) -> str:
    """The numbers of one schedule as CSV.

    Raises:
        ConfigError: there is no such schedule.
    """
    comparison = load(config.runs, config.reference)
    schedule = config.schedule or next(iter(comparison.schedules), "")
    if schedule not in comparison.schedules:
        unknown("schedule", schedule, comparison.schedules)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "summary.csv"
        write_csv(summarise(comparison, schedule), file)
        return file.read_text(encoding="utf-8")


def write_report(
    paths: Sequence[str | Path], out: str | Path, reference: str | None = None, seed: int | None = None
) -> Path:
    """Write the page; what is missing is said on it.

    Args:
        paths: folder of a benchmark, or of several runs.
        out: file to write.
        reference: mixer that steps and cost are counted against; default: the benchmark's.
        seed: whose mixtures are drawn; default: the first finished one.

    Raises:
        ConfigError: plotly is not installed, or there is nothing to read in `paths`.
    """
    plotly_script()  # before the work
    comparison = load(paths, reference)
    page = render(comparison, seed)
    with atomic_file(out) as file:
        file.write(page.encode())
    return Path(out)


def render(comparison: Comparison, seed: int | None = None) -> str:
    """The page as HTML."""
    figures = Figures()
    summaries = [summarise(comparison, schedule) for schedule in comparison.schedules]
    sections = [_schedule(comparison, summary, seed, figures) for summary in summaries]
    body = join(
        [
            element("header", element("h1", comparison.title), _facts(comparison)),
            _navigation(comparison),
            element(
                "main",
                problems_box(comparison),
                *sections,
                appendix(comparison, plain=not comparison.command),
            ),
            element(
                "footer",
                f"Made by acodm {comparison.versions.get('acodm', '')} on {datetime.now():%Y-%m-%d %H:%M}. "
                "This page loads nothing from the network.",
            ),
        ]
    )
    return document(comparison.title, body, figures)


def _facts(comparison: Comparison) -> Html:
    finished = sum(run.status == "finished" for run in comparison.runs)
    seeds = len(comparison.seeds)
    tokens = comparison.horizon * comparison.tokens_per_step
    facts = [
        f"{finished} of {len(comparison.runs)} runs finished",
        f"{seeds} seed{'s' if seeds != 1 else ''}",
        f"{len(comparison.domains)} domains",
        f"{comparison.horizon:,} steps of {comparison.tokens_per_step:,} tokens ({tokens / 1e6:,.2f} M)",
        f"steps and cost counted against {comparison.reference}" if comparison.reference else "",
    ]
    return element("p", " · ".join(filter(None, facts)), class_="facts")


def _navigation(comparison: Comparison) -> Html:
    links = [(f"#schedule-{i}", f"{name} schedule") for i, name in enumerate(comparison.schedules)]
    links.append(("#appendix", "How it was made"))
    items = [element("li", element("a", text, href=target)) for target, text in links]
    return element("nav", element("ul", *items), aria_label="Parts of this page")


def _schedule(comparison: Comparison, summary: Summary, seed: int | None, figures: Figures) -> Html:
    index = comparison.schedules.index(summary.schedule)
    return element(
        "section",
        element("h2", f"{summary.schedule[:1].upper()}{summary.schedule[1:]} schedule"),
        answer_sections(comparison, summary, figures),
        curve_sections(comparison, summary.schedule, figures),
        crossing_sections(summary, figures),
        domain_section(comparison, summary),
        evaluation_section(comparison, summary),
        mixture_sections(comparison, Mixtures.read(comparison, summary.schedule, seed), figures),
        cost_section(comparison, summary),
        exploration_section(comparison, summary),
        class_="schedule",
        id=f"schedule-{index}",
    )


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm report, or python -m acodm_env report")
