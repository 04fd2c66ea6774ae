"""What `acodm fit-surrogate` is told."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from acodm_env.errors import ConfigError

TABLES_ONLY = ("losses", "check", "run_tokens", "sequence_length", "strip", "forgetting")


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


def _nameless(setting: str, value: Any) -> str:
    """A flag's value with the names of files and folders instead of their paths."""
    if setting == "check":
        label, _, files = str(value).partition("=")
        return f"{label}=" + ",".join(Path(file).name for file in files.split(","))
    is_path = setting in ("mixtures", "losses", "from_run", "problems", "held_out") or (
        setting == "sizes" and "=" not in str(value)
    )
    return Path(value).name if is_path else f"{value:g}" if isinstance(value, float) else str(value)
