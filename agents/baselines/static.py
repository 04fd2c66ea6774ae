"""Mixtures that do not change: uniform, by size in three ways, or given."""

import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from acodm_env.errors import ConfigError, unknown
from acodm_env.mixture import check_weights
from acodm_env.objective import weight
from acodm_env.step_stats import Array
from acodm_env.trainer import Mixer, RunInfo

from .options import positive

_SUFFIXES = (".json", ".yaml", ".yml")


class _Fixed(Mixer):
    """A mixture computed once, from what is known before the run."""

    dynamic = False

    def start(self, info: RunInfo) -> None:
        """Compute the mixture."""
        super().start(info)
        self._weights = check_weights(self._compute(info), info.num_domains)

    @abstractmethod
    def _compute(self, info: RunInfo) -> object: ...

    def weights(self) -> Array:
        """The same mixture (K,) at every step."""
        return self._weights.copy()


class Uniform(_Fixed):
    """w_i = 1/K. No method for choosing mixtures beats it consistently (Aioli, arXiv 2411.05735)."""

    name = "uniform"
    paper = "arXiv 1910.10683"  # T5, "equal mixing"

    def _compute(self, info: RunInfo) -> object:
        return [1.0] * info.num_domains


class Proportional(_Fixed):
    """w_i ∝ tokens of domain i: what shuffling all data together gives."""

    name = "proportional"
    paper = "arXiv 1910.10683"  # T5, "examples-proportional mixing" without its limit

    def _compute(self, info: RunInfo) -> object:
        return info.sizes_tokens


class Temperature(_Fixed):
    """w_i ∝ n_i^(1/τ): proportional at τ = 1, uniform as τ grows.

    The default is the exponent 0.3 of XLM-R (arXiv 1911.02116) and mT5 (arXiv 2010.11934). T5, which names the method,
    has τ = 2 beside a limit on the sizes, which is left out here.
    """

    name = "temperature"
    paper = "arXiv 1911.02116"

    def __init__(self, tau: float = 1 / 0.3):
        """Take τ, a positive number."""
        self.tau = positive("tau", tau)

    def _compute(self, info: RunInfo) -> object:
        sizes = np.array(info.sizes_tokens, dtype=np.float64)  # (K,)
        # Relative to the largest, so that a small τ underflows to 0 and does not overflow.
        return (sizes / max(sizes.max(), 1.0)) ** (1 / self.tau)


class UniMax(_Fixed):
    """As uniform as it can be while no domain is seen more than N times (algorithm 1).

    From the smallest domain to the largest, each gets an equal share of the tokens left, b, but at most N of its
    epochs: U = min(b, N·n); w = U/ΣU. Deviation: the paper counts characters, this counts tokens.
    """

    name = "unimax"
    paper = "arXiv 2304.09151"

    def __init__(self, max_epochs: float = 4.0, budget_tokens: float | None = None):
        """Take the limits.

        Args:
            max_epochs: N, how often a domain may be seen; up to four passes are nearly as good as fresh data
                (arXiv 2305.16264).
            budget_tokens: C, tokens of the run; None: those of the run that it drives.
        """
        self.max_epochs = positive("max_epochs", max_epochs)
        self.budget_tokens = None if budget_tokens is None else positive("budget_tokens", budget_tokens)

    def _compute(self, info: RunInfo) -> object:
        left = self.budget_tokens or float(info.batch_size * info.sequence_length * info.horizon)
        sizes = np.array(info.sizes_tokens, dtype=np.float64)  # (K,)
        self._check(left, float(sizes.sum()))
        used = np.zeros_like(sizes)
        for rank, domain in enumerate(np.argsort(sizes, kind="stable")):
            used[domain] = min(left / (len(sizes) - rank), self.max_epochs * sizes[domain])
            left -= used[domain]
        return used

    def _check(self, budget: float, available: float) -> None:
        most = self.max_epochs * available
        if budget > most:
            enough = math.ceil(1000 * budget / max(available, 1.0)) / 1000
            raise ConfigError(
                f"max_epochs={self.max_epochs:g}: must be at least {enough:.3f}; the run takes {budget:.0f} tokens, "
                f"{budget - most:.0f} more than {available:.0f} seen so often give; raise max_epochs, or train for less"
            )


class Static(_Fixed):
    """Given weights."""

    name = "static"

    def __init__(self, weights: str | Mapping[str, float] | Sequence[float] | None = None):
        """Take the weights.

        Args:
            weights: {domain: weight}, one number per domain, "name=0.5,other=0.5", or a JSON or YAML file as
                `acodm mixture` writes it (its time average is taken) or of plain {domain: weight}. They are
                normalised to sum 1.

        Raises:
            ConfigError: none given, a text that is neither form, or a file that cannot be read. Domains and
                values are checked by `start`, which knows them.
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
        return [weight(f"weights.{name}", self._given[name]) for name in info.domains]


def _parse(text: str) -> Mapping[str, float]:
    if "=" not in text or Path(text).suffix in _SUFFIXES:
        return _read(Path(text))
    mixture: dict[str, float] = {}
    for part in filter(str.strip, text.split(",")):
        name, _, value = (piece.strip() for piece in part.rpartition("="))
        if not name or name in mixture:
            raise ConfigError(f"weights={text}: '{part}' must be name=weight, each domain once")
        mixture[name] = weight(f"weights.{name}", value)
    return mixture


def _read(path: Path) -> Mapping[str, float]:
    try:
        text = path.read_text(encoding="utf-8")
        value: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f'weights={path}: must be "name=0.5,other=0.5" or a JSON or YAML file ({error})') from error
    for key in ("time_averaged", "domains"):  # `acodm mixture` writes the time average beside the final mixture
        inner = value.get(key) if isinstance(value, Mapping) else None
        value = inner if isinstance(inner, Mapping) else value
    if not isinstance(value, Mapping):
        raise ConfigError(f"weights={path}: must hold {{domain: weight}}, or what `acodm mixture` writes")
    return {str(name): weight for name, weight in value.items()}
