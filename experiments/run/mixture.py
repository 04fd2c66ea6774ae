"""`acodm mixture`: the mixture of a run, for frameworks that take static weights."""

import json
from dataclasses import dataclass

import yaml

from acodm_env.errors import DataError, unknown
from acodm_env.experiments.console import note, say
from acodm_env.experiments.run.folder import open_run
from acodm_env.experiments.run.results import time_averaged
from acodm_env.files import atomic_file

FORMATS = ("all", "json", "yaml", "interleave")


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Print the time-averaged and the final mixture of a run."""

    run: str = "runs/transfer"
    """Folder of a target run."""
    format: str = "all"
    """json, yaml, interleave (the call of datasets.interleave_datasets), or all of them."""
    out: str | None = None
    """File to write to as well (JSON, or YAML with --format yaml)."""
    seed: int = 0
    """Seed in the printed interleave_datasets call."""
    quiet: bool = False
    """Print nothing but the mixture."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            unknown("format", self.format, FORMATS)


def run(config: MixtureConfig) -> None:
    """Print, and write if asked.

    Raises:
        DataError: the run has not trained a step.
    """
    folder = open_run(config.run)
    if not folder.steps:
        raise DataError(f"run={config.run}: has no steps in stats.jsonl; train it first")
    mixtures = time_averaged(folder)
    texts = {
        "json": json.dumps(mixtures, indent=2),
        "yaml": yaml.safe_dump(mixtures, sort_keys=False, allow_unicode=True).rstrip(),
        "interleave": interleave_call(mixtures["time_averaged"], config.seed),
    }
    for name, text in texts.items():
        if config.format == "all" and not config.quiet:
            note(f"# {name}")
        if config.format in ("all", name):
            say(text)
    if config.out is not None:
        with atomic_file(config.out) as file:
            file.write((texts["yaml" if config.format == "yaml" else "json"] + "\n").encode())
    if not config.quiet:
        note(f"# mixture of the run {config.run}" + (f", written to {config.out}" if config.out else ""))


def interleave_call(mixture: dict[str, float], seed: int) -> str:
    """Source of the call that samples `datasets` in these proportions; probabilities sum to 1 exactly.

    Our weights are shares of equally long sequences: give it data sets of packed sequences, not of documents.
    """
    rounded = {name: round(weight, 6) for name, weight in mixture.items()}
    largest = max(rounded, key=lambda name: rounded[name])
    rounded[largest] = round(rounded[largest] + 1 - sum(rounded.values()), 6)
    names = ", ".join(f"by_domain[{name!r}]" for name in rounded)
    return (
        f"datasets.interleave_datasets(\n    [{names}],\n    probabilities={list(rounded.values())},\n"
        f"    seed={seed}, stopping_strategy='all_exhausted',\n)"
    )


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm mixture, or python -m acodm_env mixture")
