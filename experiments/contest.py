"""`acodm contest`: which learner gets most out of the same time on random mixing problems, judged on unseen ones.

Share of the gain = (uniform − policy)/(uniform − best static mixture), each problem's own objective, mean over problems
that no learner met; 0 is uniform, 1 the best mixture that stays the same (by descent on the surface). Problems in which
the best static mixture gains less than `apg.LEAST_GAIN` nats count nothing. Fixed rules stand beside the learners: so
much on the targets, by their weights, the rest spread evenly. What a learner made of apg's actor is taken only where it
is better than that on problems drawn for this choice; the row ", last" has it in any case.
"""

import csv
import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from acodm_env.errors import ConfigError
from acodm_env.experiments.console import progress, say, text_table
from acodm_env.experiments.run_folder import RunFolder
from acodm_env.experiments.statistics import mean_interval
from acodm_env.files import atomic_file

LEARNERS = (
    "apg", "equivariant-ppo", "equivariant-td3", "equivariant-ppo@apg", "equivariant-td3@apg",
    "acodm-td3", "td3", "ppo", "sac", "ddpg",
)  # fmt: skip
"""Who enters: @apg begins with apg's actor of the same seed; those of the second line know neither order nor number."""


@dataclass(frozen=True, kw_only=True)
class ContestConfig:
    """Compare learners on random mixing problems at equal time; the same command again goes on."""

    learners: str = ",".join(LEARNERS)
    """Separated by commas; NAME@apg begins with apg's actor."""
    minutes: float = 5.0
    """CPU minutes of learning for each learner and seed, on one core; @apg has them on top of apg's."""
    seeds: int = 5
    """Seeds of learning and of the unseen problems."""
    problems: dict[str, Any] = field(default_factory=dict)
    """Settings of `ProblemFamily`, as JSON."""
    decisions: int = 20
    """Decisions of a run."""
    unseen: int = 256
    """Unseen problems per seed."""
    ablate: bool = False
    """Instead: learn apg with each field of the observation left out, beside all of them, and print their shares."""
    out: str = "runs/contest"
    """Folder of the comparison."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("decisions", 2), ("unseen", 8)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not self.minutes > 0:
            raise ConfigError(f"minutes={self.minutes}: must be positive")
        self._check_learners()

    def _check_learners(self) -> None:
        from acodm_env.agents.algorithms import require_fit

        for name in self.names:
            algo, at, start = name.partition("@")
            require_fit(algo)
            if at and (start != "apg" or not algo.startswith("equivariant-")):
                raise ConfigError(f"learners: {name}: must be an equivariant learner, such as equivariant-ppo@apg")
            if at and "apg" not in self.names:
                raise ConfigError(f"learners: {name}: must come with apg, whose actor it begins with; add apg")

    @property
    def names(self) -> list[str]:
        """Of the learners."""
        return [name.strip() for name in self.learners.split(",") if name.strip()]


def run(config: ContestConfig) -> None:
    """Learn and judge what is not done yet; print and write the table."""
    from acodm_env.experiments.contest_cells import cells_of, read_cell, run_cell

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
    from acodm_env.experiments.cli import main

    main(command="contest")
