"""The operator's hand on a running run: ``weights.override.json`` pins or caps domains, whoever decides otherwise.

::

    {"pin": {"python": 0.3}, "cap": {"web": 0.5}}

Applied after the mixer's decision: a pinned domain gets exactly its share, the others divide the rest in proportion to
what the mixer wanted for them, none above its cap. Write it while the run goes on; remove it to let go.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.errors import AcodmError, ConfigError, DataError, unknown
from acodm_env.experiments.console import note
from acodm_env.files import read_json
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Mixer, RunInfo

FILE = "weights.override.json"
LOG = "overrides.jsonl"
PATIENCE_SECONDS = 1.0
"""The file is looked at no more often than that."""
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Override:
    """What the operator wants."""

    pin: Mapping[str, float] = field(default_factory=dict)
    """Share of the mixture by domain."""
    cap: Mapping[str, float] = field(default_factory=dict)
    """Largest share by domain; a pin wins over it."""

    def check(self, domains: tuple[str, ...]) -> None:
        """Refuse what no mixture of `domains` can be.

        Raises:
            ConfigError: an unknown domain, a share out of range, or shares that cannot sum to 1.
        """
        for kind, shares in (("pin", self.pin), ("cap", self.cap)):
            for name, share in shares.items():
                if name not in domains:
                    unknown(f"{kind}.<domain>", name, domains)
                if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                    raise ConfigError(f"{kind}.{name}={share!r}: must be a share, 0 to 1")
        pinned = sum(self.pin.values())
        if pinned > 1 + _ROUNDING:
            raise ConfigError(f"pin={dict(self.pin)}: must sum to at most 1; it sums to {pinned:g}")
        free = [name for name in domains if name not in self.pin]
        room = pinned + sum(self.cap.get(name, 1.0) for name in free)
        if room < 1 - _ROUNDING:
            raise ConfigError(f"pin and cap: must leave room for a whole mixture; they leave {room:g} of one")

    def apply(self, weights: Array, domains: tuple[str, ...]) -> Array:
        """The mixture (K,) nearest to `weights` (K,) in proportions that is pinned and capped."""
        pinned = np.array([name in self.pin for name in domains])
        result = np.array([self.pin.get(name, 0.0) for name in domains], dtype=np.float64)
        caps = np.array([self.cap.get(name, 1.0) for name in domains], dtype=np.float64)
        active = ~pinned
        while active.any():
            rest = max(0.0, 1.0 - result[~active].sum())
            wanted = np.where(active, weights, 0.0)
            wanted = wanted if wanted.sum() > 0 else active.astype(np.float64)
            shares = rest * wanted / wanted.sum()
            over = active & (shares > caps + _ROUNDING)
            if not over.any():
                result[active] = shares[active]
                break
            result[over] = caps[over]
            active &= ~over
        normalised: Array = result / result.sum()
        return normalised


class WeightOverride:
    """The operator's hand on one run: reads the file in its folder, and applies what it wants."""

    def __init__(self, folder: str | Path, domains: tuple[str, ...], clock: Callable[[], float] = time.monotonic):
        """Look for the file in a run's folder.

        Args:
            folder: of the run; changes are logged into its ``overrides.jsonl``.
            domains: that the run draws from.
            clock: seconds.
        """
        self.folder, self.domains = Path(folder), domains
        self.override: Override | None = None
        self._clock = clock
        self._looked = -np.inf
        self._seen: tuple[int, ...] | None = None  # the file's identity when it was read last

    def on(self, weights: Array, step: int) -> Array:
        """The mixture (K,) after the operator's change, itself if there is none.

        Args:
            weights: what was decided (K,).
            step: optimiser steps done.
        """
        self._look(step)
        return weights if self.override is None else self.override.apply(weights, self.domains)

    def diagnostics(self) -> dict[str, float]:
        """For the log of a step: whether the hand is on the mixture."""
        return {} if self.override is None else {"overridden": 1.0}

    def _look(self, step: int) -> None:
        """Read the file if it is time and if it changed; nothing that is wrong with it ends the run."""
        now = self._clock()
        if now - self._looked < PATIENCE_SECONDS:
            return
        self._looked = now
        file = self.folder / FILE
        try:
            about = file.stat()
            seen: tuple[int, ...] | None = (about.st_ino, about.st_size, about.st_mtime_ns)
        except OSError:
            seen = None
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._set(None if seen is None else read_override(file, self.domains), step)
        except (AcodmError, OSError, RecursionError, ValueError) as error:
            stays = "nothing is overridden" if self.override is None else "what it said before stays in effect"
            note(f"ignored {file}: {error}; {stays}")

    def _set(self, override: Override | None, step: int) -> None:
        """Log a change with the time, and take it into effect."""
        wanted = {} if override is None else {"pin": dict(override.pin), "cap": dict(override.cap)}
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            with (self.folder / LOG).open("a") as stream:
                stream.write(json.dumps({"time": now, "from_step": step + 1, **wanted}) + "\n")
        except OSError as error:
            note(f"{self.folder / LOG}: could not be written ({error}); the change takes effect all the same")
        self.override = override
        note(f"override from step {step + 1}: {json.dumps(wanted) if wanted else 'none any more'}")


class OverriddenMixer(Mixer):
    """A mixer with a clock for what its decisions take, and under the operator's hand where there is one."""

    def __init__(self, inner: Mixer, override: WeightOverride | None = None):
        """Take the mixer that decides."""
        self.inner, self.override = inner, override
        self.name, self.needs, self.paper, self.dynamic = inner.name, inner.needs, inner.paper, inner.dynamic
        self.probe_sequences = inner.probe_sequences
        self.step = 0
        """Optimiser steps done."""
        self._seconds = 0.0

    def start(self, info: RunInfo) -> None:
        """Begin a run."""
        super().start(info)
        self.inner.start(info)

    def due(self, step: int) -> bool:
        """As the inner mixer wants it."""
        return self.inner.due(step)

    def weights(self) -> Array:
        """The inner mixer's mixture (K,), itself if nothing is overridden."""
        started = time.perf_counter()
        weights = self.inner.weights()
        if self.override is not None:
            weights = self.override.on(weights, self.step)
        self._seconds += time.perf_counter() - started
        return weights

    def loss_weights(self) -> Array | None:
        """The inner mixer's."""
        return self.inner.loss_weights()

    def update(self, stats: StepStats) -> None:
        """Let the inner mixer learn."""
        started = time.perf_counter()
        self.step = stats.step
        self.inner.update(stats)
        self._seconds += time.perf_counter() - started

    def take_seconds(self) -> float:
        """Seconds of decisions since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def diagnostics(self) -> dict[str, float]:
        """The inner mixer's, and whether a hand is on the mixture."""
        return self.inner.diagnostics() | (self.override.diagnostics() if self.override else {})

    def state_dict(self) -> dict[str, Any]:
        """The inner mixer's; what the operator wants stands in the file."""
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self.inner.load_state_dict(state)


def read_override(file: Path, domains: tuple[str, ...]) -> Override:
    """What a file wants.

    Raises:
        ConfigError, DataError: it is broken, or cannot be.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise DataError('must be an object such as {"pin": {"python": 0.3}, "cap": {"web": 0.5}}')
    for key, shares in content.items():
        if key not in ("pin", "cap"):
            unknown("<key>", key, ("pin", "cap"))
        if not isinstance(shares, dict):
            raise ConfigError(f"{key}={shares!r}: must be an object of domains and shares")
    override = Override(**content)
    override.check(domains)
    return override
