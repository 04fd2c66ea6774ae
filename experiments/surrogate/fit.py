"""`acodm fit-surrogate`: a response surface from measured runs, tables of them or their logs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from acodm_env.errors import ConfigError, DataError, unknown
from acodm_env.experiments.console import listing, note, progress, say, text_table
from acodm_env.experiments.surrogate.fit_config import FitSurrogateConfig
from acodm_env.files import disk_errors, sha256
from acodm_env.laws import PowerLaw, fit_law
from acodm_env.surrogate.calibration import FEWEST_RUNS, ROUNDS, calibrate, judge, rank_correlation
from acodm_env.surrogate.surface import Surface
from acodm_env.surrogate.tables import Measured, read_measured
from acodm_env.version import __version__

ENDLESS = 1e6
"""Size, in runs, of a domain whose size nobody gave: it is never repeated."""


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
        from acodm_env.experiments.surrogate.fit_problems import fit_problems

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
    from acodm_env.experiments.surrogate.logged_runs import Logs, split

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


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm fit-surrogate, or python -m acodm_env fit-surrogate")
