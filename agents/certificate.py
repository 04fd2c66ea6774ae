"""Whether a policy may drive a target: tried on a proxy with fresh seeds, against uniform, by validation alone.

The policy is kept if it beats uniform by more than its noise; else it is tried once more with its tilt halved
(`ActionMap.tilt` ½: the logarithms of its weights), which is kept by the same rule; else uniform drives. What was seen,
what it cost and what it is for are written as an artifact that a target run asks for.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError, DataError, PolicyError
from acodm_env.files import read_json, write_json
from acodm_env.objective import describe
from acodm_env.policy.dense import Policy

FILE = "certificate.json"
FORMAT_VERSION = 1
KEEP, HALVE, UNIFORM = "keep", "halve", "uniform"
LEAST_GAIN_NATS = 0.005
"""Smaller gains count for nothing, whatever their noise."""
CONFIDENCE = 0.95
FRESH = 70_000
"""First seed of certificates, less the target's: far from those that anybody counts up from 0."""
MOST_SEEDS = 100
RULE = (
    "kept if the mean gain on uniform in the validation objective is above 0.005 nats and above its noise: of two "
    "seeds the standard error of the paired differences, of more that times the one-sided 95 % quantile of Student's t"
)


def fresh_seeds(seed: int, count: int) -> list[int]:
    """Seeds of a certificate for a run with this one.

    Raises:
        ConfigError: fewer than two, which show no noise.
    """
    if not 2 <= count <= MOST_SEEDS:
        raise ConfigError(f"seeds={count}: must be 2 to {MOST_SEEDS} for a certificate; of one, the noise is unknown")
    return [FRESH + MOST_SEEDS * seed + index for index in range(count)]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How far a row is ahead of uniform in the validation objective, paired by seeds."""

    mean_nats: float | None
    """Mean over seeds of uniform's objective less the row's; None if a run of the row diverged."""
    error_nats: float | None
    """Standard error of that mean."""
    limit_nats: float
    """What the mean must exceed."""
    num_seeds: int

    @property
    def beats(self) -> bool:
        """Whether the row beats uniform by more than its noise."""
        return self.mean_nats is not None and self.mean_nats > self.limit_nats

    def __str__(self) -> str:
        if self.mean_nats is None:
            return "diverged"
        return f"{self.mean_nats:+.4f} ± {self.error_nats:.4f} nats over {self.num_seeds} seeds"


def gain(uniform: Sequence[float], other: Sequence[float | None]) -> Gain:
    """The gain of a row on uniform.

    Args:
        uniform: validation objectives (S,) under uniform, nats, two or more.
        other: the same under the row; None where it diverged.
    """
    if any(value is None for value in other):
        return Gain(mean_nats=None, error_nats=None, limit_nats=LEAST_GAIN_NATS, num_seeds=len(uniform))
    differences = np.asarray(uniform, dtype=np.float64) - np.asarray(other, dtype=np.float64)  # (S,)
    error = float(differences.std(ddof=1) / np.sqrt(len(differences)))
    factor = 1.0
    if len(differences) > 2:
        from scipy.stats import t

        factor = float(t.ppf(CONFIDENCE, len(differences) - 1))
    return Gain(
        mean_nats=float(differences.mean()),
        error_nats=error,
        limit_nats=max(factor * error, LEAST_GAIN_NATS),
        num_seeds=len(differences),
    )


def halved(policy: Policy) -> Policy:
    """The policy with half of its tilt: nearer to uniform by half in the logarithms of the weights that it decides."""
    return replace(policy, action=replace(policy.action, tilt=policy.action.tilt / 2))


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A verdict on a policy for a corpus and an objective, with what it rests on. JSON values throughout."""

    verdict: str
    """"keep", "halve" or "uniform"."""
    policy: str
    """Fingerprint of the policy that was judged."""
    corpus_fingerprint: str
    """Of the domains to train on."""
    heldout_fingerprint: str
    """Of the targets."""
    domains: Sequence[str]
    targets: Sequence[str]
    objective: Sequence[float]
    """Weights of the targets, summing to 1."""
    metric: str
    conditions: Mapping[str, Any]
    """Model, steps and data of the proxy."""
    seeds: Sequence[int]
    evidence: Mapping[str, Mapping[str, Any]]
    """Objectives in nats by row, seed and split; None where a run diverged. A row may lack seeds."""
    gains: Mapping[str, Mapping[str, Any]]
    """`Gain` by row, of the rows that all seeds were run for."""
    best_rule: str
    """The fixed rule with the best validation objective on the first seed."""
    cost: Mapping[str, float]
    """Tokens, model FLOPs and seconds of all runs."""
    record: Mapping[str, Any]
    """Package versions and commit."""
    rule: str = RULE

    @property
    def weights(self) -> dict[str, float]:
        """Targets that count, with their weights."""
        return {name: weight for name, weight in zip(self.targets, self.objective, strict=True) if weight > 0}

    def save(self, folder: str | Path) -> Path:
        """Write `certificate.json`, atomically, with its checksum."""
        content = json.loads(json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}))
        path = Path(folder) / FILE
        write_json(path, content | {"sha256": _digest(content)})
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "Certificate":
        """Read `certificate.json`.

        Raises:
            DataError: there is none, it is not finished, of another version, or was edited.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            begun = (Path(folder) / "config.json").is_file()
            raise DataError(
                f"certificate={folder}: must hold {FILE}; "
                + ("it was interrupted: the same `acodm gate` command goes on" if begun else "there is none; make one")
                + f": acodm gate --policy P --proxy tiny --corpus C --out {folder}"
            )
        content = read_json(path)
        claimed = content.pop("sha256", None) if isinstance(content, dict) else None
        if claimed is None or claimed != _digest(content):
            raise DataError(f"{path}: checksum does not match: it was edited or cut short; make it again elsewhere")
        if content.pop("format_version") != FORMAT_VERSION:
            raise DataError(f"{path}: must be of format version {FORMAT_VERSION}; make it again with this version")
        return cls(**content)

    def check_for(self, policy: Policy, identity: Mapping[str, Any], where: str) -> None:
        """Refuse a run that this is no certificate for.

        Args:
            policy: that shall drive it.
            identity: `corpus_fingerprint`, `heldout_fingerprint`, `targets`, `objective`, `metric`, `seed` of the run.
            where: the folder, to be named.

        Raises:
            PolicyError: the policy is another one.
            DataError: the corpus is.
            ConfigError: the objective is, or the seed is one that it was made with.
        """
        if policy.fingerprint != self.policy:
            raise PolicyError(
                f"certificate={where}: must be for this policy, {policy.fingerprint[:12]}…; it is for "
                f"{self.policy[:12]}…; make one for this policy"
            )
        for name in ("corpus_fingerprint", "heldout_fingerprint"):
            if identity[name] != getattr(self, name):
                raise DataError(
                    f"certificate={where}: must be for this corpus, {name}={identity[name][:12]}…; it is for "
                    f"{getattr(self, name)[:12]}…, with the domains {', '.join(self.domains)}; make one for this corpus"
                )
        named = zip(identity["targets"], identity["objective"], strict=True)
        wanted = {name: weight for name, weight in named if weight > 0}
        if identity["metric"] != self.metric or not _same(wanted, self.weights):
            raise ConfigError(
                f"certificate={where}: must be for {describe(identity['metric'], wanted)}, as this run is; it is for "
                f"{describe(self.metric, self.weights)}; make one for this objective"
            )
        if identity["seed"] in self.seeds:
            raise ConfigError(f"seed={identity['seed']}: must be none of the certificate's, {[*self.seeds]}")

    def apply(self, policy: Policy) -> Policy | None:
        """What the verdict leaves of the policy: itself, with half of its tilt, or nothing: uniform."""
        return {KEEP: policy, HALVE: halved(policy)}.get(self.verdict)

    def summary(self) -> str:
        """Verdict and what it rests on, in a line."""
        told = "; ".join(f"{name} {Gain(**numbers)}" for name, numbers in self.gains.items())
        return f"certificate: {self.verdict} (gain on uniform in validation: {told})"


def _same(first: Mapping[str, float], second: Mapping[str, float]) -> bool:
    return first.keys() == second.keys() and all(abs(first[name] - second[name]) < 1e-9 for name in first)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
