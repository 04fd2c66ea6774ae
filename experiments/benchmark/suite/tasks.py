"""The problems of a suite: corpus × objective × cut × horizon, from the YAML of the package or made for a corpus."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from acodm_env.config import from_dict, split_names
from acodm_env.errors import ConfigError, unknown
from acodm_env.experiments.console import note

if TYPE_CHECKING:
    from acodm_env.corpus import TokenStore

SUITES = ("mixing",)
CUTS = (640, 160, 40)
"""Sequences that are left of the target in the tasks made for a corpus that no list names."""
GRIDS = ("half", "twice", "mean-of-odm")
"""Static mixtures beyond those of every task, see `suite_rows.grid`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One mixing problem."""

    name: str
    corpus: str
    targets: Mapping[str, float] = field(default_factory=dict)
    """Weights by domain; empty: all domains alike."""
    objective: str = "loss"
    """loss or perplexity."""
    cut: Mapping[str, int] = field(default_factory=dict)
    """Training sequences that are left, by domain."""
    exclude: tuple[str, ...] = ()
    """Domains that are not trained on."""
    horizon: int = 1
    """Optimiser steps over the suite's."""
    grid: tuple[str, ...] = ()
    """Of `GRIDS`."""

    @property
    def is_targeted(self) -> bool:
        """Whether some domains count and others do not."""
        return bool(self.targets)


@cache
def suite_file(suite: str) -> Mapping[str, Any]:
    """The suite's YAML.

    Raises:
        ConfigError: no such suite.
    """
    if suite not in SUITES:
        unknown("suite", suite, SUITES)
    text = (resources.files("acodm_env.experiments.benchmark.suite") / f"{suite}.yaml").read_text(encoding="utf-8")
    found: Mapping[str, Any] = yaml.safe_load(text)
    return found


def tasks_of(suite: str, corpora: str, wanted: str | None, sequence_length: int, quiet: bool = False) -> list[Task]:
    """The suite's tasks on the corpora, in order.

    Args:
        suite: its name.
        corpora: "pocket" and folders of token stores, separated by commas.
        wanted: names of tasks, separated by commas; None: all.
        sequence_length: tokens per sequence.
        quiet: no progress bar where a corpus is made.

    Raises:
        ConfigError: an unknown suite or task; a corpus with fewer than two domains to train on.
    """
    from acodm_env.corpus import open_corpus

    found: list[Task] = []
    for corpus in dict.fromkeys(split_names(corpora)):
        store = _mixable(corpus, open_corpus(corpus, quiet))
        found += listed(suite_file(suite), corpus, store) or made_for(corpus, store, sequence_length)
    names = [task.name for task in found]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"corpus={corpora}: two tasks are called {doubled[0]}; give one corpus a folder at a time")
    if wanted is None:
        return found
    chosen = split_names(wanted)
    for name in chosen:
        if name not in names:
            unknown("tasks", name, names)
    return [task for task in found if task.name in chosen]


def _mixable(corpus: str, store: "TokenStore") -> "TokenStore":
    """The store, if there is something to mix in it."""
    if len(store.trainable) < 2:
        raise ConfigError(
            f"corpus={corpus}: must hold at least two domains to mix; it holds {len(store.trainable)}; prepare one "
            f"with more"
        )
    return store


def listed(file: Mapping[str, Any], corpus: str, store: "TokenStore") -> list[Task]:
    """The tasks that the suite's file has for a corpus with these domains; none if it knows no such corpus."""
    for entry in file["corpora"]:
        if {*entry["domains"]} == {*store.domains}:
            return [_task(name, corpus, given, store.domains) for name, given in entry["tasks"].items()]
    return []


def _task(name: str, corpus: str, given: Mapping[str, Any], domains: Sequence[str]) -> Task:
    """A task of the file.

    Raises:
        ConfigError: an unknown setting, domain or grid.
    """
    task = from_dict(Task, {"name": name, "corpus": corpus, **given}, f"tasks.{name}")
    for domain in (*task.targets, *task.cut, *task.exclude):
        if domain not in domains:
            unknown(f"tasks.{name}.<domain>", domain, domains)
    for grid in task.grid:
        if grid not in GRIDS:
            unknown(f"tasks.{name}.grid", grid, GRIDS)
    return task


def made_for(corpus: str, store: "TokenStore", sequence_length: int) -> list[Task]:
    """Tasks for any corpus: its largest domain as target, whole and cut; mean loss; mean perplexity."""
    held = dict(zip(store.trainable, store.trained().num_sequences("train", sequence_length), strict=True))
    largest = max(held, key=lambda name: held[name])
    prefix, target = slug(Path(corpus).name), {largest: 1.0}
    tasks = [Task(name=f"{prefix}-{slug(largest)}", corpus=corpus, targets=target)]
    for left in CUTS:
        if left >= held[largest]:
            note(f"corpus={corpus}: {largest} has {held[largest]} sequences, so there is no task with {left} of them")
            continue
        name = f"{prefix}-{slug(largest)}-{left}"
        tasks.append(Task(name=name, corpus=corpus, targets=target, cut={largest: left}))
    every = ("twice", "mean-of-odm")
    tasks.append(Task(name=f"{prefix}-mean-loss", corpus=corpus, grid=every))
    return [*tasks, Task(name=f"{prefix}-mean-perplexity", corpus=corpus, objective="perplexity", grid=every)]


def slug(name: str) -> str:
    """A name fit for a folder: "Common Crawl" is "common-crawl"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "corpus"
