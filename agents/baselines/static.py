"""Mixtures that do not change: uniform, proportional to size, or given."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from acodm_env.errors import ConfigError, unknown
from acodm_env.mixture import check_weights
from acodm_env.trainer import Array, Mixer, RunInfo


class _Fixed(Mixer):
    """A mixture computed once, from what is known before the run."""

    def start(self, info: RunInfo) -> None:
        """Compute the mixture."""
        super().start(info)
        self._weights = check_weights(self._compute(info), info.num_domains)

    def _compute(self, info: RunInfo) -> object:
        raise NotImplementedError

    def weights(self) -> Array:
        """The same mixture (K,) at every step."""
        return self._weights


class Uniform(_Fixed):
    """w_i = 1/K. No method for choosing mixtures beats it consistently (Aioli, arXiv 2411.05735)."""

    name = "uniform"

    def _compute(self, info: RunInfo) -> object:
        return [1.0] * info.num_domains


class Proportional(_Fixed):
    """w_i ∝ tokens of domain i: what shuffling all data together gives."""

    name = "proportional"

    def _compute(self, info: RunInfo) -> object:
        return info.sizes_tokens


class Static(_Fixed):
    """Given weights."""

    name = "static"

    def __init__(self, weights: str | Mapping[str, float] | Sequence[float] | None = None):
        """Take the weights.

        Args:
            weights: {domain: weight}, one number per domain, "name=0.5,other=0.5", or a JSON or YAML file as
                `acodm mixture` writes it. They are normalised to sum 1.

        Raises:
            ConfigError: none given, or a file that cannot be read.
        """
        if weights is None:
            raise ConfigError('weights=None: a static mixture needs weights; give --weights "name=0.5,other=0.5"')
        self._given = _parse(weights) if isinstance(weights, str) else weights

    def _compute(self, info: RunInfo) -> object:
        if not isinstance(self._given, Mapping):
            return self._given
        for name in self._given:
            if name not in info.domains:
                unknown("weights.<domain>", name, info.domains)
        missing = [name for name in info.domains if name not in self._given]
        if missing:
            raise ConfigError(f"weights: must name every domain; missing {', '.join(missing)} (0 leaves one out)")
        return [self._given[name] for name in info.domains]


def _parse(text: str) -> Mapping[str, float]:
    if Path(text).is_file():
        return _read(Path(text))
    pairs = [part.rpartition("=") for part in text.split(",") if part.strip()]
    try:
        return {name.strip(): float(value) for name, _, value in pairs if name.strip()} if pairs else {}
    except ValueError as error:
        raise ConfigError(f'weights={text}: must be a file or "name=0.5,other=0.5" ({error})') from error


def _read(path: Path) -> Mapping[str, float]:
    try:
        value: Any = yaml.safe_load(path.read_text())  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"weights={path}: cannot be read as JSON or YAML ({error})") from error
    value = value.get("time_averaged", value) if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping):
        raise ConfigError(f"weights={path}: must hold {{domain: weight}}, or what `acodm mixture` writes")
    return value
