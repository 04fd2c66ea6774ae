"""Mixtures planned for every step before the run: a schedule, a recorded run step by step, or its time average.

A recorded run counts with its *effective* mixture, requested × loss weights: a method that re-weights the loss is
replayed by the data that would weigh the same. Playing a run's time average beside it answers whether its changes over
time were worth anything.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.files import read_json
from acodm_env.run_log import StepLine, array, read_log
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Mixer, RunInfo

from .static import Static, _Fixed

MEAN_OF = "mean-of:"


class _Planned(Mixer):
    """A mixture for every step, whatever happens: a diverged step or a missing loss changes nothing.

    Where a mixture takes effect `lag` steps late it is given that much earlier, so the plan is kept.
    """

    def start(self, info: RunInfo) -> None:
        """Go to the first step."""
        super().start(info)
        self._step = 0

    def weights(self) -> Array:
        """The planned mixture (K,)."""
        return self._at(min(self._step + self.info.lag, self.info.horizon - 1)).copy()

    @abstractmethod
    def _at(self, step: int) -> Array:
        """Mixture (K,) of the optimiser step after `step` others."""

    def update(self, stats: StepStats) -> None:
        """Go to the next step."""
        self._step = stats.step

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self._step = int(state["step"])


class Schedule(_Planned):
    """Mixtures by the fraction of the run that is done, held from one point to the next or interpolated linearly."""

    name = "schedule"

    def __init__(self, points: Sequence[Mapping[str, Any]] | None = None, interpolate: bool = False):
        """Take the points.

        Args:
            points: [{"at": fraction of the horizon in [0, 1], "weights": {domain: weight}}, …], the first at 0, in
                order; weights in any form that the mixer `static` takes.
            interpolate: go linearly from one mixture to the next; after the last point its mixture is held.

        Raises:
            ConfigError: no points, or a point without "at" and "weights", out of order or out of range.
        """
        if not isinstance(points, list | tuple) or not points:
            raise ConfigError(
                f'points={points}: must be a list of {{"at": 0.5, "weights": {{domain: weight}}}}, the first at 0'
            )
        for index, point in enumerate(points):
            if not isinstance(point, Mapping) or set(point) != {"at", "weights"}:
                raise ConfigError(f'points[{index}]={point}: must have "at" and "weights", and nothing else')
        self._fractions = [_fraction(index, point["at"]) for index, point in enumerate(points)]
        if self._fractions[0] != 0:
            raise ConfigError(f"points[0].at={self._fractions[0]}: must be 0; the run needs a mixture from its start")
        if any(after <= before for before, after in zip(self._fractions, self._fractions[1:], strict=False)):
            raise ConfigError(f"points.at={self._fractions}: must increase from point to point")
        self._given = [Static(point["weights"]) for point in points]
        self.interpolate = interpolate

    def start(self, info: RunInfo) -> None:
        """Check the mixtures against the domains."""
        super().start(info)
        mixtures = []
        for index, given in enumerate(self._given):
            try:
                given.start(info)
            except ConfigError as error:
                raise ConfigError(f"points[{index}].{error}") from error
            mixtures.append(given.weights())
        self._mixtures = np.array(mixtures)  # (points, K)

    def _at(self, step: int) -> Array:
        done = step / self.info.horizon
        last = int(np.searchsorted(self._fractions, done, side="right")) - 1
        mixture: Array = self._mixtures[last]
        if self.interpolate and last + 1 < len(self._fractions):
            begin, end = self._fractions[last : last + 2]
            share = (done - begin) / (end - begin)
            mixture = (1 - share) * mixture + share * self._mixtures[last + 1]
        return mixture


def _fraction(index: int, value: Any) -> float:
    try:
        fraction = float(value)
    except (TypeError, ValueError):
        fraction = math.nan
    if not 0 <= fraction <= 1:
        raise ConfigError(f"points[{index}].at={value}: must be a fraction of the horizon in [0, 1]")
    return fraction


class Replay(_Planned):
    """The effective mixtures of another run, step by step.

    A run of another length is stretched by fraction of the horizon: step s of H plays the recorded step ⌊s·S/H⌋ of S.
    A run that ended early counts as long as it is.
    """

    name = "replay"

    def __init__(self, run: str | None = None):
        """Take the folder of the run."""
        self._run = _given(run)

    def start(self, info: RunInfo) -> None:
        """Read the run.

        Raises:
            ConfigError: there is none, or it has other domains.
        """
        super().start(info)
        self._recorded = recorded_mixtures(self._run, info.domains)  # (S, K)

    def _at(self, step: int) -> Array:
        mixture: Array = self._recorded[step * len(self._recorded) // self.info.horizon]
        return mixture


class MeanOf(_Fixed):
    """The time average of another run's effective mixtures, held throughout."""

    name = "mean-of"

    def __init__(self, run: str | None = None):
        """Take the folder of the run."""
        self._run = _given(run)

    def _compute(self, info: RunInfo) -> object:
        return recorded_mixtures(self._run, info.domains).mean(0)


def _given(run: str | None) -> Path:
    if not run:
        raise ConfigError(f"run={run}: needs the folder of a run; give the folder that holds its config.json")
    return Path(run)


def recorded_mixtures(run: Path, domains: Sequence[str]) -> Array:
    """Effective mixtures (steps, K) of the run in the folder `run`, in the order of `domains`.

    Raises:
        ConfigError: no run is there, it has other domains, or no step.
        DataError: a file of it is not whole; the last line of a log may be cut short, and is dropped.
    """
    if not (run / "config.json").exists():
        raise ConfigError(f"run={run}: must be the folder of a run (it has no config.json); check the path")
    order = _order(run, domains)
    mixtures = [
        _effective(line, len(domains), f"run={run}: {StepLine.log}, line {number}")
        for number, line in enumerate(read_log(run, StepLine), start=1)
    ]
    if not mixtures:
        raise ConfigError(f"run={run}: has no steps in stats.jsonl; train it first")
    recorded: Array = np.array(mixtures)[:, order]
    return recorded


def _order(run: Path, domains: Sequence[str]) -> list[int]:
    """Where each of `domains` stands in the run's own order."""
    record = read_json(run / "config.json")
    config = record.get("config") if isinstance(record, Mapping) else None
    theirs = config.get("domains") if isinstance(config, Mapping) else None
    if not isinstance(theirs, list):
        raise ConfigError(f"run={run}: must be the folder of a run (its config.json names no domains); check the path")
    if sorted(map(str, theirs)) != sorted(domains):
        only_there = ", ".join(str(name) for name in theirs if name not in domains) or "none"
        only_here = ", ".join(name for name in domains if name not in theirs) or "none"
        raise ConfigError(
            f"run={run}: must have the same domains; only there: {only_there}; only here: {only_here}; "
            f"choose a run over these domains"
        )
    return [theirs.index(name) for name in domains]


def _effective(line: StepLine, num_domains: int, where: str) -> Array:
    """requested × loss weights (K,), summing to 1."""
    try:
        requested = array(line.requested)
        mixture: Array = requested if line.loss_weights is None else requested * array(line.loss_weights)
        usable = mixture.shape == (num_domains,) and np.isfinite(mixture).all() and (mixture >= 0).all()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: must have requested, and loss_weights or null ({error!r})") from error
    if not (usable and mixture.sum() > 0):
        raise ConfigError(
            f"{where}: requested × loss_weights must be {num_domains} finite numbers of at least 0, not all 0; "
            f"choose another run"
        )
    normalised: Array = mixture / mixture.sum()
    return normalised
