"""The exported policy: a folder of JSON and safetensors that drives a run without the library that learned it.

`policy.safetensors` holds the actor's weights, `policy.json` everything that must fit: format version, domains in
order, observation fields with their sizes and normalisation statistics, action map, bounds, decision interval,
provenance, and the SHA-256 of the weights. numpy and safetensors are all it takes to act.

Two architectures share the folder's format: "dense" (here), for the domains it learned on, and "equivariant"
(`acodm_env.policy.equivariant`), for any. `load_policy` reads both.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from acodm_env import layers as dense
from acodm_env.config import from_dict
from acodm_env.errors import PolicyError
from acodm_env.files import atomic_folder, sha256, write_json
from acodm_env.interaction import InteractionConfig
from acodm_env.layers import Layers, check_layers
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.observation import FIELDS
from acodm_env.step_stats import Array
from acodm_env.support import check_sees
from acodm_env.trainer import RunInfo

FORMAT_VERSION = 1
"""Of the folder; another is refused."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A deterministic actor: normalise the observation, apply dense layers, map the action to a mixture."""

    architecture: ClassVar[str] = "dense"

    domains: tuple[str, ...]
    fields: tuple[tuple[str, int], ...]
    """(name, size) of every observation field, in order."""
    mean: Array
    """Observation mean (D,)."""
    scale: Array
    """Observation standard deviation (D,)."""
    clip: float
    """The normalised observation is clipped to ± this."""
    layers: Layers
    action: ActionMap
    bounds: Bounds
    interaction: InteractionConfig
    decision_every: int
    """Optimiser steps between decisions in the run it learned on."""
    horizon: int
    """Optimiser steps of the run it learned on."""
    lag: int = 0
    gradients: str = ""
    """How gradients were measured (`RunInfo.gradients`)."""
    probe_sequences: int | None = None
    """Held-out sequences of one of its measurements (`objective.probe_counts`); None: as many as the run evaluates."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Configuration, corpus fingerprint, proxy, tokens and seconds of learning, package versions."""

    def act(self, observation: NDArray[np.float32], mask: NDArray[Any] | None = None) -> NDArray[np.float32]:
        """Action (K,) in [−1, 1] for an observation (D,); (N, K) for (N, D).

        Args:
            observation: the fields, in order.
            mask: (K,) or (N, K), 1 for a domain, 0 for padding; only the equivariant architecture looks at it.
        """
        hidden = np.clip((observation - self.mean) / self.scale, -self.clip, self.clip).astype(np.float32)
        return dense.forward(self.layers, hidden)

    def untrained(self, rng: np.random.Generator) -> "Policy":
        """The same policy with a freshly drawn actor (`layers.fresh`): the control that tells learning from luck."""
        provenance = {**self.provenance, "checkpoint": "untrained"}
        return replace(self, layers=dense.fresh(self.layers, rng), provenance=provenance)

    def save(self, path: str | Path) -> Path:
        """Write the policy folder, atomically."""
        from safetensors.numpy import save

        with atomic_folder(path) as folder:
            weights = folder / "policy.safetensors"
            weights.write_bytes(save(dense.as_tensors(self.layers)))
            contract = self._contract() | {"architecture": self.architecture, "weights_sha256": sha256(weights)}
            write_json(folder / "policy.json", contract | {"contract_sha256": digest_of(contract)})
        return Path(path)

    def _contract(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "domains": list(self.domains),
            "fields": self._describe_fields(),
            "clip": self.clip,
            "activations": [activation for _, _, activation in self.layers],
            "action": _action(self.action),
            "bounds": asdict(self.bounds),
            "interaction": asdict(self.interaction),
            "decision_every": self.decision_every,
            "horizon": self.horizon,
            "lag": self.lag,
            "gradients": self.gradients,
            **({} if self.probe_sequences is None else {"probe_sequences": self.probe_sequences}),
            "provenance": dict(self.provenance),
        }

    def _describe_fields(self) -> list[dict[str, Any]]:
        parts = zip(self.fields, self._split(self.mean), self._split(self.scale), strict=True)
        return [
            {"name": name, "size": size, "mean": mean.tolist(), "scale": scale.tolist()}
            for (name, size), mean, scale in parts
        ]

    @property
    def support(self) -> dict[str, Any]:
        """What it was trained for (`acodm_env.support`), {} where it declares nothing."""
        return dict(self.provenance.get("support") or {})

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides what the policy does."""
        known = self._contract() | ({"support": self.support} if self.support else {})  # beyond it, it decides nothing
        del known["provenance"]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
        for weight, bias, _ in self.layers:
            digest.update(np.ascontiguousarray(weight).tobytes() + np.ascontiguousarray(bias).tobytes())
        return digest.hexdigest()

    def _split(self, values: Array) -> list[Array]:
        return np.split(values, np.cumsum([size for _, size in self.fields])[:-1])

    @classmethod
    def from_contract(cls, contract: Mapping[str, Any], weights: Path) -> "Policy":
        """The policy that `policy.json` says, with the weights of that file."""
        return cls(
            domains=tuple(contract["domains"]),
            fields=tuple((entry["name"], int(entry["size"])) for entry in contract["fields"]),
            mean=np.array([x for entry in contract["fields"] for x in entry["mean"]], dtype=np.float64),
            scale=np.array([x for entry in contract["fields"] for x in entry["scale"]], dtype=np.float64),
            **cls._common(contract, weights),
        )

    @staticmethod
    def _common(contract: Mapping[str, Any], weights: Path) -> dict[str, Any]:
        """What every architecture has."""
        from safetensors.numpy import load_file

        return {
            "clip": float(contract["clip"]),
            "layers": dense.from_tensors(load_file(weights), contract["activations"]),
            "action": from_dict(ActionMap, contract["action"], "action"),
            "bounds": from_dict(Bounds, contract["bounds"], "bounds"),
            "interaction": from_dict(InteractionConfig, contract["interaction"], "interaction"),
            "decision_every": int(contract["decision_every"]),
            "horizon": int(contract["horizon"]),
            "lag": int(contract["lag"]),
            "gradients": contract["gradients"],
            "probe_sequences": contract.get("probe_sequences"),
            "provenance": contract["provenance"],
        }

    def check_shapes(self, path: Path) -> None:
        """Refuse layers that do not fit each other, the fields or the domains; `path` is named."""
        width = check_layers(self.layers, sum(size for _, size in self.fields), path)
        if width != len(self.domains):
            raise PolicyError(f"{path}: {width} outputs for {len(self.domains)} domains; export it again")

    def check_fits(self, info: RunInfo) -> None:
        """Refuse a run whose domains or fields are not the ones learned on, naming the mismatch."""
        self._check_domains(info)
        names = [name for name, _ in self.fields]
        for name, size in self.fields:
            if name not in FIELDS:
                raise PolicyError(f"fields: this version of the package has no field '{name}'; export it again")
            self._check_size(name, size, info)
            if "gram" in FIELDS[name].needs and _quantity(self.gradients) != _quantity(info.gradients):
                raise PolicyError(
                    f"fields: '{name}' was learned with gradients measured as [{self.gradients}], this run measures "
                    f"[{info.gradients}]; use the same settings, or learn without the gradient fields"
                )
        check_sees(names, info)

    def _check_domains(self, info: RunInfo) -> None:
        if info.domains != self.domains:
            only_policy = [name for name in self.domains if name not in info.domains]
            only_run = [name for name in info.domains if name not in self.domains]
            detail = f"only in the policy: {only_policy}; only in the corpus: {only_run}"
            if not only_policy and not only_run:
                detail = f"same names in another order: {list(self.domains)} against {list(info.domains)}"
            raise PolicyError(f"domains: the policy does not fit this corpus; {detail}; learn one on this corpus")

    def _check_size(self, name: str, size: int, info: RunInfo) -> None:
        if FIELDS[name].size(info) != size:
            raise PolicyError(
                f"fields: '{name}' has {FIELDS[name].size(info)} entries here, {size} in the policy; "
                f"use the lag and layer depths it learned on (lag={self.lag})"
            )


def _action(action: ActionMap) -> dict[str, Any]:
    """Its settings, without a rate or tilt of 1, of which earlier versions knew nothing: equal policies are equal."""
    return {name: value for name, value in asdict(action).items() if name not in ("rate", "tilt") or value != 1.0}


def _quantity(gradients: str) -> str:
    """What is measured, whether whole or through a projection, which keeps inner products in expectation."""
    return re.sub(r"sketch=\S+ ?", "", gradients)


def digest_of(contract: Mapping[str, Any]) -> str:
    """SHA-256 of a contract, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()
