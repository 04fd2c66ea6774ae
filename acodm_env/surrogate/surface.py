"""A fitted response surface with everything that the dynamics need, as JSON: what `acodm fit-surrogate` writes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Self

import numpy as np

from acodm_env.errors import ConfigError, DataError
from acodm_env.files import read_json, write_json
from acodm_env.laws import PowerLaw
from acodm_env.step_stats import Array
from acodm_env.surrogate.dynamics import FLOOR, Parameters

FORMAT_VERSION = 1
SHIPPED = ("regmix-1m",)
"""Surfaces that come with the package: data/NAME.json."""
REPETITION = 15.4
"""R of arXiv 2305.16264: passes after which a repeated token has lost 63 % of its worth."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Losses of M targets as a function of the mixture of K domains, and how they are reached."""

    domains: tuple[str, ...]
    """Names of the K domains."""
    targets: tuple[str, ...]
    """Names of the M held-out targets."""
    law: PowerLaw
    """Final losses of static mixtures."""
    sizes_tokens: tuple[float, ...]
    """(K,) tokens available per domain."""
    run_tokens: float
    """Tokens of the runs that the law was fitted on."""
    sequence_length: int = 2048
    """Tokens per sequence of those runs."""
    initial_loss_nats: float
    """Loss of an untrained model, ln(vocabulary)."""
    forgetting: tuple[float, ...]
    """(K,) φ_j ≥ 0 per run: what domain j taught decays as e^(−φ_j t)."""
    repetition: float = REPETITION
    """R in passes; infinity: repetition costs nothing."""
    pace: float = 0.0
    """q ≥ 0: memory counts t^q at time t."""
    noise_nats: float = 0.3
    """Standard deviation of one training sequence's mean loss."""
    length: float = 1.0
    """Length of a run in units of `run_tokens`."""
    objective: tuple[float, ...] = ()
    """(M,) weights of the targets in the objective, summing to 1; empty: all equal."""
    spearman: Mapping[str, float] = field(default_factory=dict)
    """Mean rank correlation with held-out runs, by label."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from."""

    def __post_init__(self) -> None:
        num_domains, num_targets = len(self.domains), len(self.targets)
        shapes = {
            "law.usefulness": (np.shape(self.law.usefulness), (num_targets, num_domains)),
            "law.scales": (np.shape(self.law.scales), (num_targets,)),
            "law.exponents": (np.shape(self.law.exponents), (num_targets,)),
            "law.floors": (np.shape(self.law.floors), (num_targets,)),
            "sizes_tokens": (np.shape(self.sizes_tokens), (num_domains,)),
            "forgetting": (np.shape(self.forgetting), (num_domains,)),
            "objective": (np.shape(self.objective), (num_targets if self.objective else 0,)),
        }
        for name, (found, wanted) in shapes.items():
            if found != wanted:
                raise ConfigError(f"{name}: must have shape {wanted}, one entry per domain or target; it has {found}")
        arrays = {"law": np.concatenate([np.ravel(array) for array in vars(self.law).values()])}
        arrays |= {name: np.array(getattr(self, name)) for name in ("sizes_tokens", "forgetting", "objective")}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ConfigError(f"{name}: must hold finite numbers")
        for name in ("run_tokens", "initial_loss_nats", "repetition", "length"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive")
        if min(self.sizes_tokens) <= 0 or min(self.forgetting) < 0 or self.pace < 0 or self.noise_nats < 0:
            raise ConfigError("sizes_tokens must be positive; forgetting, pace and noise_nats at least 0")
        if self.objective and (min(self.objective) < 0 or abs(sum(self.objective) - 1) > 1e-6):
            raise ConfigError(f"objective={self.objective}: must be at least 0 and sum to 1")

    @property
    def max_domains(self) -> int:
        """K: a surface draws itself, see `Family`."""
        return len(self.domains)

    @property
    def max_targets(self) -> int:
        """M."""
        return len(self.targets)

    def draw(self, rng: np.random.Generator) -> "Surface":
        """Itself: there is nothing random about a fitted surface."""
        return self

    @property
    def objective_weights(self) -> Array:
        """(M,) summing to 1."""
        return np.array(self.objective) if self.objective else np.full(len(self.targets), 1 / len(self.targets))

    @cached_property
    def stand_ins(self) -> Array:
        """(K, M) rows summing to 1: whose held-out loss is domain j's training loss.

        A domain that is a target has its own. For one that is not, the runs show none; the targets that it helps most
        stand in for it, in proportion to e^a_ij. An assumption, for mixers that cannot do without.
        """
        rows = np.zeros((len(self.domains), len(self.targets)))
        for index, name in enumerate(self.domains):
            if name in self.targets:
                rows[index, self.targets.index(name)] = 1.0
            else:
                helps = np.exp(self.law.usefulness[:, index])
                rows[index] = helps / helps.sum()
        return rows

    def parameters(self) -> Parameters:
        """The arrays of the dynamics, float64."""
        law = self.law
        powers = np.exp(law.exponents)
        gap = np.maximum(self.initial_loss_nats - law.floors, 1e-3)
        with np.errstate(over="ignore"):
            start = np.exp((law.scales - np.log(gap)) / powers)
        return Parameters(
            helps=np.exp(law.usefulness),
            scales=np.asarray(law.scales),
            powers=powers,
            floors=np.asarray(law.floors),
            start=np.clip(start, FLOOR / 100, None) - FLOOR,  # negative where even the law's floor is no worse
            forgetting=np.array(self.forgetting),
            sizes=np.array(self.sizes_tokens) / self.run_tokens,
            repetition=np.array([min(self.repetition, 1e9)]),  # beyond that nothing wears out
            pace=np.array([self.pace]),
        )

    def without_repetition(self) -> Self:
        """The same, with as much fresh data of every domain as a run can ask for."""
        return replace(self, sizes_tokens=tuple(1e6 * self.run_tokens for _ in self.domains))

    def save(self, path: str | Path) -> Path:
        """Write as JSON, atomically."""
        content = asdict(self) | {"format_version": FORMAT_VERSION}
        content["law"] = {name: np.asarray(value).tolist() for name, value in content["law"].items()}
        content["repetition"] = None if np.isinf(self.repetition) else self.repetition
        write_json(Path(path), content)
        return Path(path)

    @classmethod
    def load(cls, name: str | Path) -> "Surface":
        """A shipped surface by name, or one from a JSON file.

        Raises:
            ConfigError: no such name or file.
            DataError: the file is no surface, or of another version.
        """
        if str(name) in SHIPPED:
            with resources.as_file(resources.files("acodm_env.surrogate") / "data" / f"{name}.json") as path:
                return cls._read(path)
        if not Path(name).is_file():
            raise ConfigError(
                f"surface={name}: must be one of {', '.join(SHIPPED)} or a JSON file; "
                f"`acodm fit-surrogate` writes one from your own runs"
            )
        return cls._read(Path(name))

    @classmethod
    def _read(cls, path: Path) -> "Surface":
        content = read_json(path)
        if not isinstance(content, dict) or content.pop("format_version", None) != FORMAT_VERSION:
            raise DataError(f"{path}: is no surface of format {FORMAT_VERSION}; write it again: acodm fit-surrogate")
        try:
            law = PowerLaw(**{key: np.array(value, dtype=np.float64) for key, value in content.pop("law").items()})
            repetition = content.pop("repetition")
            lists = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
            return cls(**content | lists, law=law, repetition=np.inf if repetition is None else repetition)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path}: is no surface ({error}); write it again: acodm fit-surrogate") from error


def add_noise_domain(surface: Surface, name: str = "noise") -> Surface:
    """The surface with one more domain of pure noise: it teaches nothing and its own loss hardly falls.

    Its loss is a target of weight 0, so that mixers see it and the objective does not.
    """
    law, (num_targets, num_domains) = surface.law, np.shape(surface.law.usefulness)
    usefulness = np.full((num_targets + 1, num_domains + 1), -30.0)
    usefulness[:-1, :-1] = law.usefulness
    floor = 0.97 * surface.initial_loss_nats
    return replace(
        surface,
        domains=(*surface.domains, name),
        targets=(*surface.targets, name),
        law=PowerLaw(
            usefulness,
            np.append(law.scales, np.log(0.03 * surface.initial_loss_nats)),
            np.append(law.exponents, -5.0),
            np.append(law.floors, floor),
        ),
        sizes_tokens=(*surface.sizes_tokens, 1e6 * surface.run_tokens),
        forgetting=(*surface.forgetting, 0.0),
        objective=(*(float(weight) for weight in surface.objective_weights), 0.0),
    )
