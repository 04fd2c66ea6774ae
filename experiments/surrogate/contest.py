"""`acodm contest`: which learner gets most out of the same time on random mixing problems, judged on unseen ones.

Share of the gain = (uniform − policy)/(uniform − best static mixture), each problem's own objective, mean over problems
that no learner met; 0 is uniform, 1 the best mixture that stays the same (by descent on the surface). Problems in which
the best static mixture gains less than `apg.LEAST_GAIN` nats count nothing. Fixed rules stand beside the learners: so
much on the targets, by their weights, the rest spread evenly. What a learner made of apg's actor is taken only where it
is better than that on problems drawn for this choice; the row ", last" has it in any case.
"""

import csv
import io
from dataclasses import asdict
from pathlib import Path

from acodm_env.experiments.comparison.statistics import mean_interval
from acodm_env.experiments.console import progress, say, text_table
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.experiments.surrogate.contest_config import ContestConfig
from acodm_env.files import atomic_file


def run(config: ContestConfig) -> None:
    """Learn and judge what is not done yet; print and write the table."""
    from acodm_env.experiments.surrogate.contest_jobs import cells_of, read_cell, run_cell

    identity = {key: value for key, value in asdict(config).items() if key not in ("out", "quiet", "seeds", "learners")}
    folder = RunFolder(config.out, identity).path
    cells = cells_of(config, folder)
    done = sum(cell.done for cell in cells)
    with progress(len(cells), "contest", quiet=config.quiet, done=done, unit="cell") as bar:
        for cell in cells:
            if not cell.done:
                bar.set_postfix_str(f"{cell.name}, seed {cell.seed}", refresh=True)
                run_cell(config, cell)
                bar.update()
    shares: dict[str, list[dict[str, float]]] = {}
    for cell in cells:
        for name, row in read_cell(cell).items():
            shares.setdefault(name, []).append(row)
    _report(shares, folder / "contest.csv", ablation=config.ablate)
    say(f"run: {config.out} (contest.csv, cells/, policies/)")


def _report(shares: dict[str, list[dict[str, float]]], path: Path, *, ablation: bool) -> None:
    """The table, the best first, on the screen and as CSV."""
    rows = []
    for name, found in shares.items():
        interval = mean_interval([row["share"] for row in found])
        median = sum(row["median"] for row in found) / len(found)
        minutes = sum(row.get("seconds", 0.0) for row in found) / len(found) / 60
        rows.append((name, interval, median, minutes))
    rows.sort(key=lambda row: -(row[1].mean or 0.0))
    header = ["learner", "share", "low", "high", "median", "minutes", "seeds"]
    cells = [
        [name, _number(one.mean), _number(one.low), _number(one.high), _number(median), f"{minutes:.1f}",
         str(one.num_seeds)]
        for name, one, median, minutes in rows
    ]  # fmt: skip
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *cells])
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())
    say(text_table(["fields" if ablation else "learner", *header[1:]], cells))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm contest, or python -m acodm_env contest")
