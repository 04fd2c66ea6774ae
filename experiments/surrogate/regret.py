"""`acodm regret`: do agents learn on the surrogate, and what is left of it on surfaces that they have never seen?

Regret recovered = (uniform − policy)/(uniform − best schedule) on the mean final loss: 0 is uniform sampling, 1 the
best that descent through the dynamics finds. Every learner, its untrained self, its own time average as a static
mixture, the best constant mixture of the training surfaces, and the baselines stand in one table, over seeds, with
intervals; differences are paired by seed.
"""

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from acodm_env.config import from_dict, split_names
from acodm_env.errors import ConfigError
from acodm_env.experiments.comparison.statistics import Interval, mean_interval, paired_interval
from acodm_env.experiments.console import progress, say, text_table
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.files import atomic_file

if TYPE_CHECKING:
    from acodm_env.experiments.surrogate.regret_jobs import Cell, Setting

SHIPPED = Path(__file__).parent / "regret.yaml"
"""Learners whose environment is not the default one."""
UNTRAINED = "policy-untrained"
"""Row of the best learner's policy before its first update."""
AGAINST = ("uniform", "best-constant", "odm-paper-rescaled", "odm-released-rescaled", "eg-interaction")
"""What the best learner is compared with, beside its own time average."""


@dataclass(frozen=True, kw_only=True)
class RegretConfig:
    """Learn on surrogates with several agents and report the regret that each recovers, beside every baseline."""

    agents: str = "td3,ddpg,sac,ppo,acodm-td3,equivariant-td3"
    """Learners, separated by commas: algorithms, or names from --variants; "" for none."""
    variants: str | None = None
    """YAML file of further learners: {name: {algo: td3, env: {…}, agent: {…}, teacher: …, timesteps: 1.0}}, beside
    those of the shipped regret.yaml."""
    baselines: str = "all"
    """Mixers, separated by commas; "all": every one that runs on the surface; "" for none."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of the baselines by name, as JSON."""
    surface: str = "regmix-1m"
    """The surface of the split "seen", and the middle of the family."""
    family: dict[str, Any] = field(default_factory=dict)
    """Settings of the family of the split "unseen" (`Family`), as JSON."""
    env: dict[str, Any] = field(default_factory=dict)
    """Settings of the learners' environment (`SurrogateConfig`), as JSON."""
    splits: str = "seen,unseen"
    """seen: learn and be judged on the surface; unseen: learn on the family, be judged on other draws from it."""
    seeds: int = 10
    """Seeds of learning, of the noise and of the unseen surfaces."""
    unseen: int = 8
    """Unseen surfaces per seed."""
    training: int = 64
    """Surfaces per seed that best-constant is fitted on."""
    steps: int = 200
    """Steps of a run; baselines may change the mixture at every one."""
    steps_per_action: int = 5
    """Steps per decision of a learner."""
    noise: float = 1.0
    """Factor on the observation noise."""
    jobs: int = 1
    """Processes at a time, one core each."""
    out: str = "runs/regret"
    """Folder of the comparison; the same command again goes on with it."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("unseen", 1), ("training", 1), ("jobs", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        for split in split_names(self.splits):
            if split not in ("seen", "unseen"):
                raise ConfigError(f"splits={self.splits}: must be seen, unseen or both, separated by commas")


def run(config: RegretConfig) -> None:
    """Do what is not done yet; print and write the table, the comparisons and the picture."""
    from acodm_env.experiments.report.pictures import draw_regret
    from acodm_env.experiments.surrogate.regret_jobs import REFERENCES, Cell

    setting = _setting(config)
    identity = {key: value for key, value in asdict(config).items() if key not in ("jobs", "out", "quiet", "seeds")}
    identity["learners"] = {name: asdict(contender) for name, contender in setting.contenders.items()}
    folder = RunFolder(config.out, identity).path
    names = (REFERENCES, *setting.baselines, *setting.contenders)
    cells = [
        Cell(name=name, split=split, seed=seed, folder=folder)
        for name in names
        for split in split_names(config.splits)
        for seed in range(config.seeds)
    ]
    _work(setting, cells, config)
    values = _recovered(cells)
    best = _best(values, set(setting.contenders))
    values |= {(UNTRAINED, split): values[f"untrained:{name}", split] for split, name in best.items()}
    rows = [(name, split, mean_interval(values[name, split])) for name, split in values]
    rows.sort(key=lambda row: (row[1], -(row[2].mean or 0.0)))
    _write(folder / "regret.csv", rows)
    draw_regret([row for row in rows if not row[0].startswith("untrained:")], folder / "regret.png")
    say(_table(rows))
    say()
    say(_comparisons(values, best))
    say(f"run: {config.out} (regret.csv, regret.png, policies/)")


def _setting(config: RegretConfig) -> "Setting":
    from acodm_env.agents.surrogate_learner import Contender
    from acodm_env.experiments.surrogate.playing import Conditions
    from acodm_env.experiments.surrogate.regret_jobs import Setting

    variants = _variants(config.variants)
    names = split_names(config.agents)
    contenders = {name: variants.get(name) or Contender(algo=name) for name in names}
    for name, contender in contenders.items():
        _check_algorithm(name, contender.algo)
    return Setting(
        surface=config.surface,
        family=config.family,
        conditions=Conditions(steps=config.steps, steps_per_action=config.steps_per_action, noise=config.noise),
        unseen=config.unseen,
        training=config.training,
        env={"reward": {"terms": {"progress": 1.0}, "progress_over_uniform": True}} | config.env,
        contenders=contenders,
        baselines=_baselines(config),
    )


def _check_algorithm(name: str, algo: str) -> None:
    from acodm_env.agents.algorithms import require_fit as require_exportable

    try:
        require_exportable(algo)
    except ConfigError as error:
        raise ConfigError(f"agents: {name}: {error}; learners of your own come from --variants FILE") from error


def _variants(path: str | None) -> Mapping[str, Any]:
    from acodm_env.agents.surrogate_learner import Contender

    own = {} if path is None else _read(Path(path))
    return {name: from_dict(Contender, settings, name) for name, settings in (_read(SHIPPED) | own).items()}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"variants={path}: must be a YAML file of learners ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise ConfigError(f"variants={path}: must map names to settings, such as td3-myopic: {{algo: td3}}")
    return {str(name): settings for name, settings in content.items()}


def _baselines(config: RegretConfig) -> dict[str, dict[str, Any]]:
    """Options of every baseline that is to run; of "all", those that need no file and fit the surface."""
    from acodm_env.agents.baselines import make_mixer, mixer_names
    from acodm_env.experiments.surrogate.playing import require_fit
    from acodm_env.surrogate.surface import Surface

    surface = Surface.load(config.surface)
    everyone = config.baselines == "all"
    names = mixer_names() if everyone else split_names(config.baselines)
    chosen = {}
    for name in names:
        options = dict(config.options.get(name, {}))
        try:
            require_fit(make_mixer(name, **options), surface)
        except ConfigError:
            if not everyone:
                raise
            continue
        if name != "uniform":  # a reference already
            chosen[name] = options
    return chosen


def _work(setting: "Setting", cells: "list[Cell]", config: RegretConfig) -> None:
    """Run the cells that have no result yet, in processes of one thread each."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    from acodm_env.experiments.surrogate.regret_jobs import run_cell

    open_cells = [cell for cell in cells if not cell.done]
    with progress(len(cells), "regret", quiet=config.quiet, done=len(cells) - len(open_cells), unit="cell") as bar:
        if config.jobs == 1:
            for cell in open_cells:
                run_cell(setting, cell)
                bar.update()
            return
        with ProcessPoolExecutor(config.jobs, mp_context=get_context("spawn")) as pool:
            for future in as_completed([pool.submit(run_cell, setting, cell) for cell in open_cells]):
                future.result()
                bar.update()


def _recovered(cells: "list[Cell]") -> dict[tuple[str, str], list[float]]:
    """Regret recovered per row and split, one value per seed, in the order of the seeds."""
    from acodm_env.experiments.surrogate.regret_jobs import REFERENCES, read_cell

    ends: dict[tuple[str, int], tuple[float, float]] = {}
    values: dict[tuple[str, str], list[float]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.name != REFERENCES, cell.seed)):
        rows = read_cell(cell)
        if cell.name == REFERENCES:
            ends[cell.split, cell.seed] = (
                float(np.mean(rows["uniform"]["objective"])),
                float(np.mean(rows["best-schedule"]["objective"])),
            )
        uniform, best = ends[cell.split, cell.seed]
        for name, row in rows.items():
            recovered = (uniform - float(np.mean(row["objective"]))) / (uniform - best)
            values.setdefault((name, cell.split), []).append(recovered)
    return values


Rows = list[tuple[str, str, Interval]]


def _write(path: Path, rows: Rows) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["agent", "regret_recovered", "low", "high", "num_seeds", "split"])
    for name, split, interval in rows:
        numbers = (interval.mean, interval.low, interval.high)
        writer.writerow(
            [name, *("" if number is None else f"{number:.4f}" for number in numbers), interval.num_seeds, split]
        )
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def _table(rows: Rows) -> str:
    return text_table(
        ["split", "agent", "regret recovered", "95 % interval", "seeds"],
        [
            [split, name, _number(i.mean), f"{_number(i.low)} … {_number(i.high)}", str(i.num_seeds)]
            for name, split, i in rows
        ],
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _best(values: Mapping[tuple[str, str], list[float]], learners: set[str]) -> dict[str, str]:
    """The learner with the highest mean in each split; the choice itself favours it a little."""
    entered = [key for key in values if key[0] in learners]
    ranked = sorted(entered, key=lambda key: float(np.mean(values[key])))
    return {split: name for name, split in ranked}


def _comparisons(values: Mapping[tuple[str, str], list[float]], best_of: Mapping[str, str]) -> str:
    """The best learner of each split against what it has to beat, paired by seed."""
    lines = []
    for split, best in sorted(best_of.items()):
        for other in (*AGAINST, f"mean-of:{best}", UNTRAINED):
            if (other, split) in values:
                gap = paired_interval(values[best, split], values[other, split])
                verdict = "no interval" if gap.low is None else ("beats it" if gap.low > 0 else "does not beat it")
                lines.append(
                    [split, best, other, _number(gap.mean), f"{_number(gap.low)} … {_number(gap.high)}", verdict]
                )
    return text_table(["split", "best learner", "against", "difference", "95 % interval", ""], lines) if lines else ""


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm regret, or python -m acodm_env regret")
