"""What a benchmark will run: its cells, in an order in which every cell comes after those it needs.

A *target* cell trains the target model under one mixer, with one seed and one learning-rate schedule; a *preparation*
cell makes the runs that a method needs beforehand (a reference model, proxies), once for all mixers and schedules that
ask for the same ones with the same seed. The plan is a pure function of the settings, so any process can run any cell.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from acodm_env.agents.baselines import make_mixer, mixer_factory
from acodm_env.agents.baselines.policies import POLICY_ROWS
from acodm_env.agents.baselines.recorded import MEAN_OF
from acodm_env.config import split_names
from acodm_env.errors import ConfigError
from acodm_env.files import read_json, write_json
from acodm_env.policy.load import SHIPPED
from acodm_env.trainer import Mixer, RunInfo, RunRequest


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the benchmark's table: a mixer with its options, under a name of its own."""

    name: str
    mixer: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_policy(self) -> bool:
        """Whether an exported policy drives it."""
        return self.mixer in POLICY_ROWS

    def make(self) -> Mixer:
        """A fresh baseline; policies and `mean-of:` rows are made by the cell, which knows their files."""
        mixer = make_mixer(self.mixer, **self.options)
        mixer.name = self.name
        return mixer


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One unit of work, and where it leaves its result."""

    index: int
    kind: str
    """"target" or "preparation"."""
    name: str
    mixer: str
    """Row of the table; of a preparation, the rows that share it."""
    schedule: str
    seed: int
    folder: str
    """Relative to the benchmark's folder."""
    steps: int
    """Optimiser steps, for the forecast."""
    needs: tuple[int, ...] = ()
    """Cells that must be finished before."""
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a benchmark runs; `plan.json`."""

    reference: str
    entries: tuple[Entry, ...]
    schedules: tuple[str, ...]
    seeds: tuple[int, ...]
    command: str
    cells: tuple[Cell, ...]

    @property
    def mixers(self) -> tuple[str, ...]:
        """Rows of the table, in order."""
        rows = dict.fromkeys(cell.mixer for cell in self.cells if cell.kind == "target")
        return tuple(sorted(rows, key=lambda name: self._order(name)))

    def _order(self, name: str) -> tuple[int, bool]:
        names = [entry.name for entry in self.entries]
        return names.index(name.removeprefix(MEAN_OF)), name.startswith(MEAN_OF)

    def entry(self, name: str) -> Entry:
        """The entry of a row; of "mean-of:NAME" that of NAME."""
        return next(entry for entry in self.entries if entry.name == name.removeprefix(MEAN_OF))

    def save(self, out: Path) -> None:
        """Write `plan.json`, atomically."""
        write_json(out / "plan.json", {**asdict(self), "mixers": self.mixers})

    @classmethod
    def load(cls, out: Path) -> "Plan":
        """Read `plan.json`.

        Raises:
            DataError: there is none, or it is not whole.
        """
        record = read_json(out / "plan.json")
        return cls(
            reference=record["reference"],
            entries=tuple(Entry(**entry) for entry in record["entries"]),
            schedules=tuple(record["schedules"]),
            seeds=tuple(record["seeds"]),
            command=record["command"],
            cells=tuple(Cell(**{**cell, "needs": tuple(cell["needs"])}) for cell in record["cells"]),
        )


def parse_entries(mixers: str, options: Mapping[str, Any], policy: str | None) -> tuple[Entry, ...]:
    """The rows that `--mixers` and `--options` name; policies come with their untrained control.

    Raises:
        ConfigError: a mixer is named twice or unknown, or options are given for one that is not in the list.
    """
    names = split_names(mixers)
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"mixers={mixers}: '{name}' is named twice; give a second form another name by --options")
    names += [name for name in POLICY_ROWS if policy is not None and name not in names]
    if policy is None and set(POLICY_ROWS) & set(names):
        raise ConfigError("policy=None: the rows policy and policy-untrained need --policy DIR, an exported policy")
    for name in options:
        if name not in names:
            raise ConfigError(f"options.{name}: is not among --mixers {mixers}; add it there")
    return tuple(_entry(name, options.get(name, {}), policy) for name in names)


def _entry(name: str, options: Any, policy: str | None) -> Entry:
    if not isinstance(options, Mapping):
        raise ConfigError(f'options.{name}={options}: must be a mapping such as {{"learning_rate": 0.5}}')
    if name in POLICY_ROWS:
        where = str(policy) if policy in SHIPPED else str(Path(str(policy)).absolute())
        return Entry(name=name, mixer=name, options={"policy": where})
    if name.startswith(MEAN_OF):
        raise ConfigError(f"mixers: {name} is run by itself beside every dynamic {name.removeprefix(MEAN_OF)}")
    entry = Entry(
        name=name,
        mixer=str(options.get("mixer", name)),
        options={key: value for key, value in options.items() if key != "mixer"},
    )
    mixer_factory(entry.mixer)  # refuse an unknown name before anything is opened
    return entry


def build(
    entries: Sequence[Entry],
    *,
    infos: Mapping[str, RunInfo],
    schedules: Sequence[str],
    seeds: Sequence[int],
    reference: str,
    command: str,
    out: Path,
    averaged: Collection[str] | None = None,
) -> Plan:
    """The plan of a benchmark.

    Args:
        entries: rows of the table.
        infos: the run each row is for, by its name.
        schedules: learning-rate schedules.
        seeds: of model initialisation and data order.
        reference: row that steps and cost are counted against.
        command: what the user typed.
        out: the benchmark's folder, for the command of every cell.
        averaged: dynamic rows whose time average is run too; None: all of them.
    """
    requests = {entry.name: _requests(entry, infos[entry.name]) for entry in entries}
    cells: list[Cell] = []

    def add(kind: str, name: str, mixer: str, schedule: str, seed: int, steps: int, needs: Iterable[int] = ()) -> int:
        index = len(cells)
        cells.append(
            Cell(
                index=index,
                kind=kind,
                name=name,
                mixer=mixer,
                schedule=schedule,
                seed=seed,
                folder=f"cells/{name.replace(':', '-')}",
                steps=steps,
                needs=tuple(needs),
                command=f"acodm benchmark --out {out} --cell {index}",
            )
        )
        return index

    prepared: dict[tuple[str, int], int] = {}
    for digest, mixers in _sharing(requests).items():
        asked = requests[mixers[0]]
        for seed in seeds:
            name = f"preparation/{digest}/seed{seed}"
            steps = sum(request.steps for request in asked)
            prepared |= {
                (mixer, seed): index
                for index in [add("preparation", name, ", ".join(mixers), "cosine", seed, steps)]
                for mixer in mixers
            }
    for replayed in (False, True):
        for schedule in schedules:
            for entry in entries:
                if replayed and not ((averaged is None or entry.name in averaged) and is_dynamic(entry)):
                    continue
                horizon = infos[entry.name].horizon
                row = MEAN_OF + entry.name if replayed else entry.name
                for seed in seeds:
                    needs = [prepared[entry.name, seed]] if (entry.name, seed) in prepared else []
                    if replayed:
                        needs = [index_of(cells, schedule, entry.name, seed)]
                    add("target", f"{schedule}/{row}/seed{seed}", row, schedule, seed, horizon, needs)
    return Plan(
        reference=reference,
        entries=tuple(entries),
        schedules=tuple(schedules),
        seeds=tuple(seeds),
        command=command,
        cells=tuple(cells),
    )


def is_dynamic(entry: Entry) -> bool:
    """Whether the row's mixture may change during a run."""
    return entry.is_policy or entry.make().dynamic


def index_of(cells: Sequence[Cell], schedule: str, row: str, seed: int) -> int:
    """Index of a target cell."""
    targets = (cell for cell in cells if cell.kind == "target")
    return next(cell.index for cell in targets if (cell.schedule, cell.mixer, cell.seed) == (schedule, row, seed))


def _requests(entry: Entry, info: RunInfo) -> tuple[RunRequest, ...]:
    return () if entry.is_policy else tuple(entry.make().preparation(info))


def digest_of(requests: Sequence[RunRequest]) -> str:
    """Name of a set of requests: equal requests, equal names."""
    text = json.dumps([request.record() for request in requests], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _sharing(requests: Mapping[str, Sequence[RunRequest]]) -> dict[str, list[str]]:
    """Rows by what they ask for; those that ask for nothing left out."""
    shared: dict[str, list[str]] = {}
    for name, asked in requests.items():
        if asked:
            shared.setdefault(digest_of(asked), []).append(name)
    return shared
