"""The rows of a task: rules and policies that are compared, and static mixtures among which the best one counts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from acodm_env.agents.baselines.recorded import MEAN_OF
from acodm_env.config import split_names
from acodm_env.errors import ConfigError, unknown
from acodm_env.experiments.benchmark.plan import Entry
from acodm_env.experiments.benchmark.suite.tasks import Task
from acodm_env.policy.load import open_policy
from acodm_env.trainer import RunInfo

SHARES = (0.3, 0.5, 0.7, 1.0)
RULES = ("uniform", "proportional", "odm-released", "odm-released-rescaled", "marginal-value")
OBJECTIVE_FREE = ("uniform", "proportional", "odm-released", "odm-released-rescaled")
"""Mixers that neither read the objective nor measure held-out losses: one run serves every objective."""
AVERAGED = "odm-released-rescaled"
"""Whose time average the grid "mean-of-odm" has."""
LEARNED = "generalist"
UNTRAINED = "-untrained"
HALF, TWICE, PAIR = "half-", "twice-", "pair-"
PAIR_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is run for a task."""

    entries: tuple[Entry, ...]
    averaged: tuple[str, ...]
    """Rows whose time average is run too."""


def static(name: str, weights: Mapping[str, float]) -> Entry:
    """A row of given weights."""
    return Entry(name=name, mixer="static", options={"weights": dict(weights)})


def rules() -> list[Entry]:
    """The fixed rules, in the order of the table."""
    entries = [Entry(name=name, mixer=name) for name in RULES]
    shares = [Entry(name=f"share-{share:g}", mixer="target-share", options={"share": share}) for share in SHARES]
    return [*entries[:-1], *shares, entries[-1]]


def learned(policy: str) -> list[Entry]:
    """A policy and its untrained twin, with the fingerprint of what is meant.

    Args:
        policy: "generalist", the folder of a policy, or NAME=folder: rows NAME, NAME-untrained and mean-of:NAME.

    Raises:
        AcodmError: there is no such policy.
    """
    from pathlib import Path

    from acodm_env.policy.load import SHIPPED

    name, _, folder = policy.rpartition("=")
    name = name or LEARNED
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.endswith(UNTRAINED):
        raise ConfigError(f"policy={policy}: must be a folder or NAME=folder, with a name of letters, digits, - _ .")
    known = {entry.name for entry in rules()}
    if name in known:
        raise ConfigError(f"policy={policy}: must have a name of its own; {name} is a row already")
    options = {"policy": folder if folder in SHIPPED else str(Path(folder).absolute())}
    options["fingerprint"] = open_policy(folder).fingerprint
    return [
        Entry(name=name, mixer="policy", options=options),
        Entry(name=name + UNTRAINED, mixer="policy-untrained", options=options),
    ]


def grid(task: Task, info: RunInfo) -> list[Entry]:
    """The task's static mixtures beyond the rules.

    "half": half of the mixture on each domain in turn, the rest evenly over the others, where no target is trained on.
    "twice": twice the uniform weight on each domain in turn, the rest evenly.
    """
    entries = []
    if "half" in task.grid:
        entries += [static(HALF + name, tilted(info.domains, {name: 0.5})) for name in info.domains]
    if "twice" in task.grid and info.num_domains > 2:
        share = 2 / info.num_domains
        entries += [static(TWICE + name, tilted(info.domains, {name: share})) for name in info.domains]
    return entries


def tilted(domains: Sequence[str], shares: Mapping[str, float]) -> dict[str, float]:
    """Given shares of some domains, the rest of the mixture evenly over the others."""
    rest = (1 - sum(shares.values())) / max(len(domains) - len(shares), 1)
    return {name: shares.get(name, rest) for name in domains}


def pair(domains: Sequence[str], objective_of: Mapping[str, float]) -> Entry:
    """Three tenths each on the two domains whose half served the objective best, the rest evenly over the others.

    Args:
        domains: those trained on.
        objective_of: validation objective of the rows "half-NAME", nats.
    """
    best = sorted(objective_of, key=lambda row: objective_of[row])[:2]
    first, second = sorted(row.removeprefix(HALF) for row in best)
    return static(f"{PAIR}{first}-{second}", tilted(domains, {first: PAIR_SHARE, second: PAIR_SHARE}))


def rows_of(task: Task, info: RunInfo, policy: list[Entry], wanted: str | None) -> Rows:
    """The rows of a task.

    Args:
        task: it.
        info: the run they are for.
        policy: rows of a policy, `learned`; none without one.
        wanted: names of rows, separated by commas, "grid" for all of the grid; None: all.

    Raises:
        ConfigError: an unknown row.
    """
    own = grid(task, info)
    entries = [*rules(), *policy, *own]
    averages = [entry.name for entry in policy if entry.mixer == "policy"]
    averages += [AVERAGED] if "mean-of-odm" in task.grid else []
    if wanted is None:
        return Rows(entries=tuple(entries), averaged=tuple(averages))
    chosen = split_names(wanted)
    keep = _chooser(chosen, [entry.name for entry in own])
    known = [entry.name for entry in entries] + [MEAN_OF + name for name in averages]
    for name in chosen:
        rest = next((name.removeprefix(kind) for kind in (HALF, TWICE) if name.startswith(kind)), None)
        optional = name == "grid" or name.startswith(PAIR) or rest in info.domains or name == MEAN_OF + AVERAGED
        if name not in known and not optional:  # what other tasks have, this one may lack
            unknown("rows", name, known)
    averaged = [name for name in averages if keep(MEAN_OF + name) or (name == AVERAGED and "grid" in chosen)]
    kept = [entry for entry in entries if keep(entry.name) or entry.name in averaged]
    return Rows(entries=tuple(kept), averaged=tuple(averaged))


def _chooser(chosen: Sequence[str], own: Sequence[str]) -> Callable[[str], bool]:
    """Whether a row is run; uniform always is."""
    return lambda name: name in ("uniform", *chosen) or ("grid" in chosen and name in own)
