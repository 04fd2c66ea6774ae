"""`acodm benchmark`: which mixture trains a model better, by how much, how sure we are, and what finding it cost."""

import inspect
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.agents.baselines import mixer_factory, mixer_names
from acodm_env.errors import ConfigError, unknown
from acodm_env.experiments.console import say, text_table
from acodm_env.experiments.plan import MEAN_OF, Entry, Plan, build, parse_entries
from acodm_env.objective import check_metric

if TYPE_CHECKING:
    from acodm_env.trainer import RunInfo

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
NEED_OPTIONS = ("static", "schedule", "replay", "mean-of", "policy")
"""Mixers that say nothing without options, and so are not part of "all"."""


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
        from acodm_env.experiments.engines import ENGINES

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
            from acodm_env.experiments.suite_tasks import suite_file

            defaults |= suite_file(self.suite)["settings"]
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def seed_list(self) -> tuple[int, ...]:
        """The seeds."""
        parts = [part.strip() for part in self.seeds.split(",") if part.strip()]
        if not parts or not all(part.isdecimal() for part in parts):
            raise ConfigError(f"seeds={self.seeds}: must be a number of seeds, or seeds of at least 0: 0,1,2")
        numbers = [int(part) for part in parts]
        if "," not in self.seeds:
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
        names = tuple(dict.fromkeys(part.strip() for part in self.schedules.split(",") if part.strip()))
        for name in names or ("",):
            if name not in ("cosine", "constant"):
                unknown("schedules", name, ("cosine", "constant"))
        return names


def run(config: BenchmarkConfig) -> int:
    """Plan, run, summarise; 1 if a cell failed."""
    if config.list:
        say(list_mixers())
        return 0
    if config.suite is not None:
        from acodm_env.experiments import suite

        return suite.run(config)
    for name in ("tasks", "rows"):
        if getattr(config, name) is not None:
            raise ConfigError(f"{name}={getattr(config, name)}: is of a suite; give --suite mixing too")
    from acodm_env.experiments import running

    out = Path(config.out)
    if config.cell is not None:
        return running.run_one(out, config.cell)
    plan = Plan.load(out) if config.resume else make_plan(config, out)
    if config.plan:
        say(text_table(("cell", "kind", "name", "needs"), [_row(cell) for cell in plan.cells]))
        return 0
    return running.run_all(out, plan, config.engine, config.jobs, config.quiet)


def _row(cell: Any) -> tuple[str, ...]:
    return str(cell.index), cell.kind, cell.name, ",".join(map(str, cell.needs)) or "-"


def list_mixers() -> str:
    """Every mixer: name, paper, what it needs of a run, its options with their defaults."""
    rows = []
    for name in sorted(mixer_names()):
        factory = mixer_factory(name)
        defaults = [
            parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default}"
            for parameter in inspect.signature(factory).parameters.values()
        ]
        needs = ", ".join(sorted(getattr(factory, "needs", ()))) or "-"
        rows.append((name, getattr(factory, "paper", "") or "-", needs, ", ".join(defaults) or "-"))
    return text_table(("mixer", "paper", "needs", "defaults"), rows)


def make_plan(config: BenchmarkConfig, out: Path) -> Plan:
    """Check everything, claim the folder and write the plan; an earlier plan's rows, seeds and schedules stay.

    Raises:
        AcodmError: something does not fit; the folder is untouched then.
    """
    return plan_rows(config, parse_entries(_all(config.mixers), config.options, config.policy), out)


def plan_rows(
    config: BenchmarkConfig,
    entries: Sequence[Entry],
    out: Path,
    averaged: Collection[str] | None = None,
    command: str | None = None,
    keep: bool = True,
) -> Plan:
    """The plan of given rows, see `make_plan`.

    Args:
        config: everything else.
        entries: the rows.
        out: the benchmark's folder.
        averaged: rows whose time average is run too, with those of an earlier plan; None: as `mean_of` says.
        command: that leads here; None: the one that `config` is.
        keep: write the plan into the folder, whose later plans have these rows too.
    """
    from acodm_env.experiments.benchmark_settings import shared_settings
    from acodm_env.experiments.cell import lm_trainer, stores
    from acodm_env.experiments.run_folder import RunFolder

    settings = shared_settings(config)
    earlier = Plan.load(out) if (out / "plan.json").exists() else None
    entries = _merged(_with_references(entries, config.reference), earlier)
    store, heldout = stores(settings)
    trainer = lm_trainer(settings, store, heldout)
    infos = {entry.name: check(entry, settings, trainer) for entry in entries}
    if keep:
        RunFolder(out, settings)
    if averaged is not None:
        averaged = {*averaged, *_averaged(earlier)}
    plan = build(
        entries,
        infos=infos,
        schedules=_union(config.schedule_list(), earlier.schedules if earlier else ()),
        seeds=_union(config.seed_list(), earlier.seeds if earlier else ()),
        reference=config.reference,
        command=command or shlex.join(command_line(config)),
        out=out,
        averaged=averaged if averaged is not None or config.mean_of else (),
    )
    if keep:
        plan.save(out)
    return plan


def check(entry: Entry, settings: Mapping[str, Any], trainer: Any) -> "RunInfo":
    """Refuse, before anything is run, a row that cannot run on `trainer`; returns the run that it is for."""
    from dataclasses import replace

    from acodm_env.experiments.cell import decision_interval, policy_of
    from acodm_env.policy import PolicyMixer
    from acodm_env.trainer import require

    mixer = PolicyMixer(policy_of(entry)) if entry.is_policy else entry.make()
    require(trainer, mixer.needs, f"mixer={entry.name}")
    info: RunInfo = replace(trainer.info, decision_every=decision_interval(mixer, settings))
    if isinstance(mixer, PolicyMixer):
        mixer.policy.check_fits(replace(info, lag=mixer.policy.lag))
    elif not mixer.preparation(info):
        mixer.start(info)
    return info


def _all(mixers: str) -> str:
    names = [name.strip() for name in mixers.split(",")]
    every = [name for name in mixer_names() if name not in NEED_OPTIONS and not name.endswith("-proxy")]
    return ",".join(part for name in names for part in (every if name == "all" else [name]))


def _with_references(entries: Sequence[Entry], reference: str) -> tuple[Entry, ...]:
    """Uniform sampling and the reference are in every table."""
    names = [entry.name for entry in entries]
    missing = [name for name in dict.fromkeys(("uniform", reference)) if name not in names]
    return (*parse_entries(",".join(missing), {}, None), *entries)


def _merged(entries: Sequence[Entry], earlier: Plan | None) -> tuple[Entry, ...]:
    """Rows of an earlier command on the same folder, then the new ones."""
    known = {entry.name: entry for entry in earlier.entries} if earlier else {}
    for entry in entries:
        before = known.get(entry.name, entry)
        if asdict(before) != asdict(entry):
            raise ConfigError(
                f"options.{entry.name}={dict(entry.options)}: this benchmark already has {entry.name} with "
                f"{dict(before.options)}; give the new form a name of its own: "
                f'--options \'{{"{entry.name}-2": {{"mixer": "{entry.mixer}", …}}}}\''
            )
    return (*known.values(), *(entry for entry in entries if entry.name not in known))


def _averaged(earlier: Plan | None) -> list[str]:
    """Rows whose time average an earlier plan has."""
    rows = earlier.mixers if earlier else ()
    return [name.removeprefix(MEAN_OF) for name in rows if name.startswith(MEAN_OF)]


def _union(new: Sequence[Any], old: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys((*old, *new)))


def command_line(config: BenchmarkConfig) -> list[str]:
    """The command line that this configuration is."""
    import json

    words = ["acodm", "benchmark"]
    for setting in fields(config):
        value = getattr(config, setting.name)
        default = DEFAULTS.get(setting.name, setting.default) if setting.name != "options" else {}
        if value != default:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            words += [f"--{setting.name}", text] if value is not True else [f"--{setting.name}"]
    return words


if __name__ == "__main__":
    from acodm_env.experiments.cli import main

    main(command="benchmark")
