"""`acodm fit-surrogate`: a response surface from measured runs, tables of them or their logs."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from acodm_env.errors import ConfigError, DataError, unknown
from acodm_env.experiments.console import listing, note, progress, say, text_table
from acodm_env.files import disk_errors, sha256
from acodm_env.laws import PowerLaw, fit_law
from acodm_env.surrogate.calibration import FEWEST_RUNS, ROUNDS, calibrate, judge, rank_correlation
from acodm_env.surrogate.surface import Surface
from acodm_env.surrogate.tables import Measured, read_measured
from acodm_env.version import __version__

TABLES_ONLY = ("losses", "check", "run_tokens", "sequence_length", "strip", "forgetting")
ENDLESS = 1e6
"""Size, in runs, of a domain whose size nobody gave: it is never repeated."""


@dataclass(frozen=True, kw_only=True)
class FitSurrogateConfig:
    """Fit a response surface to finished runs: two tables (--mixtures, --losses), their folders (--from-run), or the
    surface of a mixing problem to runs with other mixtures and cuts (--problems)."""

    mixtures: str | None = None
    """CSV with a header: a column that names the run, then a column per domain with its weight."""
    losses: str | None = None
    """CSV with a header: the same runs, then a column per held-out target with its final loss in nats."""
    check: list[str] = field(default_factory=list)
    """Held-out runs to judge the fit by, LABEL=MIXTURES.csv,LOSSES.csv; may be given several times."""
    from_run: list[str] = field(default_factory=list)
    """Folders of finished runs, or of a benchmark: fits the course of the losses, not their ends alone."""
    problems: list[str] = field(default_factory=list)
    """Folders of finished runs of one corpus, model and length, whatever their mixtures, domains and cuts: fits what
    `acodm_env.surrogate.problems` has, repetition, over-fitting, starvation and the learning rate's fall included."""
    held_out: list[str] = field(default_factory=list)
    """Folders of runs to judge a fit by. Default with --from-run: every fifth mixer of those, or every fifth run where
    fewer than five mixers drove them. With --problems they lie below those; default: each third of them in turn."""
    out: str = "runs/surrogate.json"
    """File of the surface, or of a problem's parameters."""
    sizes: str | None = None
    """Tokens of the domains: "name=tokens,other=tokens" or a YAML file of them. Default: endless with tables; what the
    logs show with --from-run."""
    run_tokens: float | None = None
    """Tokens of one of the runs (tables only). It counts only beside --sizes; default 1e9."""
    initial_loss: float | None = None
    """Loss of an untrained model in nats. With --from-run the first evaluation says it."""
    vocabulary: int | None = None
    """Entries of the tokeniser, instead of --initial-loss, which is the logarithm of it."""
    sequence_length: int | None = None
    """Tokens per sequence of the runs (tables only); default 2048."""
    strip: str | None = None
    """Texts to remove from the ends of the columns' names, separated by commas (tables only); default: what all columns
    of a table begin and end with, up to a separator."""
    forgetting: float | None = None
    """Factor on the assumed forgetting, 0.7 to 1.3 by the share of targets that a domain helps (tables only); default
    1, and 0 is none."""
    seed: int = 0
    """Not used: a fit is deterministic; accepted because every command takes it."""
    quiet: bool = False
    """No progress bar and no tables."""

    def __post_init__(self) -> None:
        if bool(self.from_run) + bool(self.problems) + (self.mixtures is not None) != 1:
            raise ConfigError(
                "mixtures, from_run, problems: give exactly one of them, --mixtures CSV --losses CSV, --from-run DIR "
                "or --problems DIR"
            )
        if self.from_run or self.problems:
            self._refuse(TABLES_ONLY, "only tables take it; leave it out, or give --mixtures")
            if self.problems:
                self._refuse(("sizes",), "the logs of --problems say it; leave it out")
        else:
            self._refuse(("held_out",), "only --from-run and --problems take it; tables take --check")
            if self.losses is None:
                raise ConfigError("losses=None: must be a CSV file of the same runs as --mixtures; add --losses CSV")
            if (self.initial_loss is None) == (self.vocabulary is None):
                raise ConfigError("initial_loss, vocabulary: give exactly one of them; the tables do not say it")
        if self.initial_loss is not None and self.vocabulary is not None:
            raise ConfigError("initial_loss, vocabulary: give one of them at most")
        for name, least in (("run_tokens", 1), ("initial_loss", 1e-6), ("vocabulary", 2), ("sequence_length", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ConfigError(f"{name}={value}: must be a number of at least {least:g}")
        if self.forgetting is not None and not 0 <= self.forgetting < math.inf:
            raise ConfigError(f"forgetting={self.forgetting}: must be a factor of at least 0")

    def _refuse(self, names: Sequence[str], why: str) -> None:
        for name in names:
            if getattr(self, name) not in (None, []):
                raise ConfigError(f"{name}={getattr(self, name)}: {why}")

    @property
    def untrained_loss(self) -> float | None:
        """Initial loss in nats; None if the logs are to say it."""
        return math.log(self.vocabulary) if self.vocabulary is not None else self.initial_loss

    @property
    def command(self) -> str:
        """The command for the record, with the names of files only."""
        words = ["acodm", "fit-surrogate"]
        for item in fields(self):
            value = getattr(self, item.name)
            standard = item.default_factory() if item.default_factory is not MISSING else item.default
            if item.name not in ("out", "seed", "quiet") and value != standard:
                values = value if isinstance(value, list) else [value]
                words += [f"--{item.name.replace('_', '-')}", *(_nameless(item.name, entry) for entry in values)]
        return shlex.join(words)


def run(config: FitSurrogateConfig) -> None:
    """Fit, print how good it is, and write the surface or the problem's parameters.

    Raises:
        ConfigError, DataError: a setting or a file is not what it must be, or `out` cannot be written.
    """
    out = Path(config.out)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise DataError(f"{out}: is a folder; choose another --out")
    if config.problems:
        from acodm_env.experiments.fit_problems import fit_problems

        return fit_problems(config, out)
    surface = _from_logs(config) if config.from_run else _from_tables(config)
    surface.save(out)
    say(f"surface: {out} ({len(surface.domains)} domains, {len(surface.targets)} targets)")


# --- from tables -------------------------------------------------------------------------------------------


def _from_tables(config: FitSurrogateConfig) -> Surface:
    assert config.mixtures is not None
    assert config.losses is not None
    strip = None if config.strip is None else [text for text in config.strip.split(",") if text]
    measured = read_measured(config.mixtures, config.losses, strip)
    if len(measured.weights) < FEWEST_RUNS:
        raise DataError(f"{config.mixtures}: must have at least {FEWEST_RUNS} runs; it has {len(measured.weights)}")
    checks = {label: read_measured(*files, strip) for label, files in parse_checks(config.check).items()}
    checks = {
        label: runs.reordered(measured.domains, measured.targets, f"check '{label}'") for label, runs in checks.items()
    }
    sizes = parse_sizes(config.sizes, measured.domains)
    law = fit_law("power", measured.weights, measured.losses)
    assert isinstance(law, PowerLaw)
    run_tokens = 1e9 if config.run_tokens is None else config.run_tokens
    files = [config.mixtures, config.losses, *(file for pair in parse_checks(config.check).values() for file in pair)]
    initial = config.untrained_loss
    assert initial is not None
    surface = Surface(
        domains=measured.domains,
        targets=measured.targets,
        law=law,
        sizes_tokens=tuple(sizes.get(name, ENDLESS * run_tokens) for name in measured.domains),
        run_tokens=run_tokens,
        sequence_length=config.sequence_length or 2048,
        initial_loss_nats=initial,
        forgetting=assumed_forgetting(law, 1.0 if config.forgetting is None else config.forgetting),
        spearman={label: spearman(law, runs, label) for label, runs in checks.items()},
        provenance={
            "law": "power",
            "runs": len(measured.weights),
            "sha256": {Path(file).name: sha256(file) for file in files},
            **_made_by(config),
        },
    )
    if not config.quiet:
        for text in measured.removed:
            note(f"names of columns without '{text}'")
        say(describe(surface))
    for label, correlation in surface.spearman.items():
        runs = len(checks[label].weights)
        say(f"Spearman {label}: {correlation:.4f} (mean of {len(law.floors)} targets, {runs} runs)")
    return surface


def parse_checks(checks: Sequence[str]) -> dict[str, tuple[str, str]]:
    """LABEL=MIXTURES.csv,LOSSES.csv as {label: (mixtures, losses)}.

    Raises:
        ConfigError: one has another form, or a label is there twice.
    """
    found: dict[str, tuple[str, str]] = {}
    for check in checks:
        label, _, files = check.partition("=")
        mixtures, _, losses = files.partition(",")
        if not (label and mixtures and losses) or "," in losses:
            raise ConfigError(f"check={check}: must be LABEL=MIXTURES.csv,LOSSES.csv")
        if label in found:
            raise ConfigError(f"check={check}: the label '{label}' is there twice; give every check one of its own")
        found[label] = (mixtures, losses)
    return found


def parse_sizes(sizes: str | None, domains: Sequence[str]) -> dict[str, float]:
    """Tokens by domain from "name=tokens,…" or a YAML file; {} for None.

    Raises:
        ConfigError: a domain is unknown or a size is no positive number.
    """
    if sizes is None:
        return {}
    given: Any = dict(item.split("=", 1) for item in sizes.split(",") if "=" in item) if "=" in sizes else None
    if given is None:
        try:
            given = yaml.safe_load(Path(sizes).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f'sizes={sizes}: must be "name=tokens,…" or a YAML file of names and tokens') from error
    if not isinstance(given, Mapping):
        raise ConfigError(f'sizes={sizes}: must be "name=tokens,…" or a YAML file of names and tokens')
    tokens = {}
    for key, value in given.items():
        name = str(key).strip()
        if name not in domains:
            unknown("sizes: domain", name, domains)
        try:
            tokens[name] = float(value)
        except (TypeError, ValueError):
            tokens[name] = math.nan
        if not 1 <= tokens[name] < math.inf:
            raise ConfigError(f"sizes: {name}={value}: must be a number of tokens, at least 1")
    return tokens


def assumed_forgetting(law: PowerLaw, factor: float) -> tuple[float, ...]:
    """φ_j = 1.3 − 0.6·(share of targets that domain j helps at least as much as an average one, a_ij ≥ 0), × `factor`.

    An assumption, since final losses of static mixtures say nothing about it: the common level of about 1 is what
    logged runs on two corpora show (`--from-run`); the small spread, by which what few targets need is overwritten
    sooner, is not measured: those runs do not identify it.
    """
    breadth = (law.usefulness >= 0).mean(0)  # (K,)
    return tuple((factor * (1.3 - 0.6 * breadth)).round(6).tolist())


def spearman(law: PowerLaw, runs: Measured, label: str) -> float:
    """Mean over the targets of the rank correlation between predicted and measured losses.

    Raises:
        DataError: the runs of a target all have the same loss, or there are fewer than three.
    """
    predicted = law.predict(runs.weights)
    found = [rank_correlation(one, other) for one, other in zip(predicted.T, runs.losses.T, strict=True)]
    for name, value in zip(runs.targets, found, strict=True):
        if value is None:
            raise DataError(f"check '{label}', target '{name}': must have at least three runs with different losses")
    return float(np.mean([value for value in found if value is not None]))


def describe(surface: Surface) -> str:
    """Domains and targets as two tables."""
    helps, law = np.exp(surface.law.usefulness), surface.law
    uniform = law.predict(np.full((1, len(surface.domains)), 1 / len(surface.domains)))[0]
    domains = [
        (name, "endless" if size >= ENDLESS * surface.run_tokens else f"{size / surface.run_tokens:.3g}", f"{rate:.2f}")
        for name, size, rate in zip(surface.domains, surface.sizes_tokens, surface.forgetting, strict=True)
    ]
    targets = [
        (name, f"{loss:.4f}", f"{floor:.2f}", ", ".join(surface.domains[index] for index in row.argsort()[::-1][:3]))
        for name, loss, floor, row in zip(surface.targets, uniform, law.floors, helps, strict=True)
    ]
    return "\n\n".join(
        (
            text_table(("domain", "size in runs", "forgotten at rate"), domains),
            text_table(("target", "uniform's loss", "floor", "helped most by"), targets),
        )
    )


# --- from logs ---------------------------------------------------------------------------------------------


def _from_logs(config: FitSurrogateConfig) -> Surface:
    from acodm_env.experiments.logged_runs import Logs, split

    logs = Logs(config.from_run)
    domains = logs.config["domains"]
    setting = logs.setting(config.untrained_loss, parse_sizes(config.sizes, domains))
    if config.held_out:
        fitted, held_out, which = logs.courses, Logs(config.held_out, like=logs).courses, "those of --held-out"
        twice = {course.name for course in fitted} & {course.name for course in held_out}
        if twice:
            raise ConfigError(f"held_out={min(twice)}: is one of --from-run too; a run is fitted or held out")
    else:
        fitted, held_out, which = split(logs.courses)
    with progress(ROUNDS, "fit", quiet=config.quiet, unit="round") as bar:

        def on_round(done: int, cost: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix_str(f"cost {cost:.2f}", refresh=False)

        surface = calibrate(setting, fitted, on_round)
    verdict = judge(surface, fitted, held_out)
    provenance = {"law": "power", "runs": len(fitted), "held_out": which, "calibration": verdict, **_made_by(config)}
    surface = replace(surface, provenance=provenance)
    if not config.quiet:
        say(describe(surface) + "\n")
    say(f"held out: {which} ({verdict['held_out_runs']} runs; {verdict['fitted_runs']} fitted)")
    say(table_of(verdict))
    say(listing(_summary(surface, verdict)))
    return surface


def table_of(verdict: Mapping[str, Any]) -> str:
    """Errors of the surface and of the two predictors that know no mixture."""
    rows = [
        (name.replace("_", " "), f"{error:.4f}", f"{verdict['error_at_end_nats'][name]:.4f}")
        for name, error in verdict["error_nats"].items()
    ]
    return text_table(("held-out error, nats", "all evaluations", "at the end"), rows)


def _summary(surface: Surface, verdict: Mapping[str, Any]) -> list[tuple[str, object]]:
    times = verdict["error_by_time_nats"]
    quarters = [np.mean(part) for part in np.array_split(times, min(4, len(times)))]
    correlation = verdict["spearman_of_final_loss"]
    return [
        ("error by quarter of the run", ", ".join(f"{error:.3f}" for error in quarters)),
        ("Spearman of final mean loss", "-" if correlation is None else f"{correlation:.3f}"),
        ("forgetting", f"{min(surface.forgetting):.2f} to {max(surface.forgetting):.2f} per run"),
        ("pace", f"{surface.pace:.3f}"),
        ("noise of one sequence", f"{surface.noise_nats:.3f} nats"),
    ]


def _made_by(config: FitSurrogateConfig) -> dict[str, Any]:
    return {"version": __version__, "command": config.command}


def _nameless(setting: str, value: Any) -> str:
    """A flag's value with the names of files and folders instead of their paths."""
    if setting == "check":
        label, _, files = str(value).partition("=")
        return f"{label}=" + ",".join(Path(file).name for file in files.split(","))
    is_path = setting in ("mixtures", "losses", "from_run", "problems", "held_out") or (
        setting == "sizes" and "=" not in str(value)
    )
    return Path(value).name if is_path else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    from acodm_env.experiments.cli import main

    main(command="fit-surrogate")
