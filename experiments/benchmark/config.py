"""What `acodm benchmark` is told."""

from dataclasses import dataclass, field
from typing import Any

from acodm_env.config import split_names
from acodm_env.errors import ConfigError, unknown
from acodm_env.objective import check_metric

DEFAULT_MIXERS = "uniform,proportional,odm-released,odm-released-rescaled,softmax-loss"
DEFAULTS = {
    "model": "small",
    "steps": 300,
    "schedules": "cosine,constant",
    "seeds": "5",
    "evaluations": 30,
    "learning_rate": 2e-3,
}
"""Of settings for which a suite has defaults of its own."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Compare mixers on one target model: several seeds, two learning-rate schedules, every cost counted."""

    suite: str | None = None
    """Run a suite of mixing problems instead of one: mixing. Then --corpus may be several, and --policy NAME=DIR."""
    tasks: str | None = None
    """Of a suite: names of its tasks, separated by commas; default: all."""
    rows: str | None = None
    """Of a suite: names of its rows, separated by commas, "grid" for the further static mixtures; default: all."""
    mixers: str = DEFAULT_MIXERS
    """Rows of the table, separated by commas; "all" for every baseline. `--list` names them."""
    policy: str | None = None
    """Folder of an exported policy: adds the rows policy and policy-untrained. Of a suite: NAME=DIR, see --suite."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options per row, as JSON: {"doremi": {"learning_rate": 0.5}, "tilt": {"mixer": "static", "weights": "…"}}."""
    corpus: str = "pocket"
    """Folder of a token store, or "pocket"."""
    domains: str | None = None
    """Domains to train on, separated by commas; default: all of the corpus."""
    exclude: str | None = None
    """Domains not to train on, separated by commas; they may still be targets."""
    cut: str | None = None
    """Domains of which only so many training sequences are left, name=160,other=40."""
    objective: str = "loss"
    """What is averaged over the targets: loss, or perplexity (the logarithm of its mean)."""
    targets: str | None = None
    """Held-out targets and their weights, name=1,other=2, from any domains of the corpus; default: those trained on."""
    model: str | None = None
    """Target: preset (tiny, small, pythia-14m … pythia-1b), a config.json, or a hub name; default: small, of a suite
    tiny."""
    proxy: str | None = None
    """Model of preparatory runs; default: the target's."""
    steps: int | None = None
    """Optimiser steps of every target run; default: 300, of a suite 400."""
    batch_size: int = 16
    """Sequences per step."""
    sequence_length: int = 128
    """Tokens per sequence."""
    learning_rate: float | None = None
    """Peak learning rate; default: 2e-3, of a suite 3e-3."""
    schedules: str | None = None
    """Learning-rate schedules: crossings under a cosine depend on the horizon, those under a constant rate do not.
    Default: cosine,constant, of a suite cosine."""
    decision_every: int = 5
    """Steps between decisions and validations of the mixers that make them; a policy brings its own interval."""
    seeds: str | None = None
    """Number of seeds, or the seeds themselves: 0,1,2; default: 5, of a suite 3."""
    reference: str = "odm-released"
    """Row whose best objective the others have to reach."""
    evaluations: int | None = None
    """Evaluations on the test split during each run; default: 30, of a suite 8."""
    eval_sequences: int = 64
    """Held-out sequences per target and split."""
    mean_of: bool = True
    """Also run the time-averaged static mixture of every dynamic row."""
    keep_models: bool = False
    """Keep every target's trained model, for `acodm evaluate` and `acodm export-model`."""
    jobs: int = 1
    """Cells at a time on this machine, each pinned to its share of the cores."""
    engine: str = "local"
    """local: processes here; ray: a running Ray cluster."""
    cell: int | None = None
    """Run just this cell of the benchmark in --out, and those that it needs (for job arrays)."""
    plan: bool = False
    """Write and print the cells, and stop."""
    resume: bool = False
    """Go on with the benchmark in --out as it was begun; of the other settings only --jobs and --engine count."""
    list: bool = False
    """Print every mixer with its paper, needs and defaults, and stop."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """auto (bf16 where a CUDA device has it), fp32 or bf16."""
    out: str = "runs/benchmark"
    """Folder of the benchmark; the same command again resumes it, with other mixers or seeds it extends it."""
    seed: int = 0
    """First seed, where --seeds is a number."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        from acodm_env.experiments.benchmark.executors import ENGINES

        self._fill_defaults()
        for name, least in (("steps", 1), ("evaluations", 1), ("jobs", 1), ("seed", 0), ("decision_every", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.engine not in ENGINES:
            unknown("engine", self.engine, ENGINES)
        check_metric(self.objective)
        self.seed_list()
        self.schedule_list()

    def _fill_defaults(self) -> None:
        defaults = dict(DEFAULTS)
        if self.suite is not None:
            from acodm_env.experiments.benchmark.suite.tasks import suite_file

            defaults |= suite_file(self.suite)["settings"]
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def seed_list(self) -> tuple[int, ...]:
        """The seeds."""
        text = self.seeds or ""
        parts = split_names(text)
        if not parts or not all(part.isdecimal() for part in parts):
            raise ConfigError(f"seeds={self.seeds}: must be a number of seeds, or seeds of at least 0: 0,1,2")
        numbers = [int(part) for part in parts]
        if "," not in text:
            if numbers[0] < 1:
                raise ConfigError(f"seeds={self.seeds}: must be at least 1 seed")
            return tuple(range(self.seed, self.seed + numbers[0]))
        repeated = sorted({n for n in numbers if numbers.count(n) > 1})
        if repeated:
            raise ConfigError(
                f"seeds={self.seeds}: must differ; {', '.join(map(str, repeated))} is repeated, and the same run twice "
                f"would count as two"
            )
        return tuple(numbers)

    def schedule_list(self) -> tuple[str, ...]:
        """The learning-rate schedules."""
        names = tuple(dict.fromkeys(split_names(self.schedules)))
        for name in names or ("",):
            if name not in ("cosine", "constant"):
                unknown("schedules", name, ("cosine", "constant"))
        return names
