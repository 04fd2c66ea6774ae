"""From settings to the plan: which rows, seeds and schedules, with those of earlier plans."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.agents.baselines import mixer_names
from acodm_env.agents.baselines.recorded import MEAN_OF
from acodm_env.config import split_names
from acodm_env.errors import ConfigError
from acodm_env.experiments.benchmark.config import DEFAULTS, BenchmarkConfig
from acodm_env.experiments.benchmark.plan import Entry, Plan, build, parse_entries
from acodm_env.experiments.run.command import command_line

if TYPE_CHECKING:
    from acodm_env.trainer import RunInfo

NEED_OPTIONS = ("static", "schedule", "replay", "mean-of", "policy")
"""Mixers that say nothing without options, and so are not part of "all"."""


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
    from acodm_env.experiments.benchmark.jobs import lm_trainer, stores
    from acodm_env.experiments.benchmark.settings import shared_settings
    from acodm_env.experiments.run.folder import RunFolder

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
        command=command or command_line("benchmark", config, DEFAULTS),
        out=out,
        averaged=averaged if averaged is not None or config.mean_of else (),
    )
    if keep:
        plan.save(out)
    return plan


def check(entry: Entry, settings: Mapping[str, Any], trainer: Any) -> "RunInfo":
    """Refuse, before anything is run, a row that cannot run on `trainer`; returns the run that it is for."""
    from dataclasses import replace

    from acodm_env.experiments.benchmark.jobs import decision_interval, policy_of
    from acodm_env.policy.mixer import PolicyMixer
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
    names = split_names(mixers)
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
