"""The exported policy: a folder of JSON and safetensors that drives a run without the library that learned it.

`policy.safetensors` holds the actor's weights, `policy.json` everything that must fit: format version, domains in
order, observation fields with their sizes and normalisation statistics, action map, bounds, decision interval,
provenance, and the SHA-256 of the weights. numpy and safetensors are all it takes to act.

Two architectures share the folder's format: "dense" (here), for the domains it learned on, and "equivariant"
(`acodm_env.equivariant`), for any. `Policy.load` reads both.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from acodm_env import layers as dense
from acodm_env.config import from_dict
from acodm_env.errors import ConfigError, PolicyError
from acodm_env.files import atomic_folder, read_json, sha256, write_json
from acodm_env.interaction import InteractionConfig
from acodm_env.layers import ACTIVATIONS, LAYER_NORM_EPSILON, Layers, check_layers
from acodm_env.mixture import ActionMap, Bounds, Controller
from acodm_env.observation import FIELDS, Observer
from acodm_env.support import check_sees, nearest_rule, outside, unusual
from acodm_env.trainer import Array, Mixer, RunInfo, StepStats, merge
from acodm_env.window import load_window, window_state

FORMAT_VERSION = 1
__all__ = [
    "ACTIVATIONS", "FORMAT_VERSION", "LAYER_NORM_EPSILON", "SHIPPED", "Layers", "Policy", "PolicyMixer", "check_layers",
    "open_policy", "scaled_interval",
]  # fmt: skip


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
            write_json(folder / "policy.json", contract | {"contract_sha256": _digest(contract)})
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
    def load(cls, path: str | Path) -> "Policy":
        """Read a policy folder.

        Raises:
            DataError: there is no policy, or its JSON is malformed.
            PolicyError: format version, checksum, field names or layer shapes do not fit; says which.
        """
        path = Path(path)
        contract = read_json(path / "policy.json")
        if not isinstance(contract, dict):
            raise PolicyError(f"{path}/policy.json: is no policy's contract; export it again")
        if contract.get("format_version") != FORMAT_VERSION:
            raise PolicyError(
                f"{path}: format_version={contract.get('format_version')}: must be {FORMAT_VERSION}; "
                f"it was written by another version of this package; export it again"
            )
        claimed = contract.pop("contract_sha256", None)
        if claimed != _digest(contract):
            raise PolicyError(f"{path}/policy.json: checksum does not match: the file was edited; export it again")
        weights = path / "policy.safetensors"
        if not weights.is_file() or sha256(weights) != contract["weights_sha256"]:
            raise PolicyError(f"{weights}: missing, or its checksum does not match: cut short or edited; export again")
        policy = _kind(contract, path)._from_contract(contract, weights)
        policy._check_shapes(path)
        return policy

    @classmethod
    def _from_contract(cls, contract: Mapping[str, Any], weights: Path) -> "Policy":
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

    def _check_shapes(self, path: Path) -> None:
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


def _kind(contract: Mapping[str, Any], path: Path) -> type[Policy]:
    """The class that reads this architecture; policies written before there were two are dense."""
    architecture = contract.get("architecture", Policy.architecture)
    if architecture == Policy.architecture:
        return Policy
    from acodm_env.equivariant import EquivariantPolicy

    if architecture == EquivariantPolicy.architecture:
        return EquivariantPolicy
    raise PolicyError(
        f"{path}: architecture='{architecture}': must be dense or equivariant; it was written by a newer version of "
        f"this package; update it"
    )


def _digest(contract: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()


SHIPPED = ("generalist",)
"""Policies of this package, by name."""
POLICIES = resources.files("acodm_env") / "policies"
"""Where their folders are."""


def open_policy(policy: str | Path) -> Policy:
    """A shipped policy by its name, or an exported one by its folder ("./generalist" is a folder, not the name).

    Raises:
        ConfigError: neither such a name nor such a folder, or the package came without its policies.
        DataError, PolicyError: its files are damaged, see `Policy.load`.
    """
    name = str(policy)
    shipped = POLICIES / name if name in SHIPPED else None
    if shipped is not None and not (shipped / "policy.json").is_file():
        raise ConfigError(f"policy={name}: must come with the package, and its files are not there; install it again")
    if shipped is not None:
        return Policy.load(str(shipped))
    if not (Path(policy) / "policy.json").is_file():
        near = get_close_matches(name, SHIPPED, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`acodm export` writes one"
        raise ConfigError(
            f"policy={policy}: must be {' or '.join(SHIPPED)}, or the folder of an exported policy; it holds no "
            f"policy.json; {hint}"
        )
    return Policy.load(policy)


def scaled_interval(policy: Policy, horizon: int) -> int:
    """Decision interval for a run of `horizon` steps: the learned one times the ratio of horizons, at least 1."""
    return max(1, round(policy.decision_every * horizon / policy.horizon))


class PolicyMixer(Mixer):
    """An exported policy driving a run: observes exactly as the environment did, computes only what it reads.

    A run outside of the policy's training support is driven by the nearest fixed rule (`acodm_env.support`) instead.
    """

    def __init__(
        self, policy: Policy | str | Path, name: str = "policy", say: Callable[[str], None] | None = None
    ) -> None:
        """Take the policy.

        Args:
            policy: a policy, or the name or folder of one (`open_policy`).
            name: of the mixer.
            say: told, once, why another rule than the policy drives; default: a warning.
        """
        self.policy = policy if isinstance(policy, Policy) else open_policy(policy)
        self.name = name
        self.probe_sequences = self.policy.probe_sequences
        self.needs = frozenset().union(*(FIELDS[field].needs for field, _ in self.policy.fields if field in FIELDS))
        self.rule = ""
        """Name of the fixed rule that drives the run, "" where the policy does; known once it was started."""
        self.say: Callable[[str], Any] = say or partial(warnings.warn, stacklevel=5)
        self._said = {""}

    def start(self, info: RunInfo) -> None:
        """Check that the policy fits and take the first decision.

        Raises:
            PolicyError: domains or fields do not fit.
        """
        self.policy.check_fits(info)
        super().start(info)
        self.observer = Observer(info, [name for name, _ in self.policy.fields], self.policy.interaction)
        self._controller = Controller(self.policy.action)
        self._window: StepStats | None = None
        self.rule = ""
        if reasons := outside(self.policy.support, info):
            self.rule, fixed = nearest_rule(info)
            self._weights = self.policy.bounds.project(fixed)
            self._tell(f"outside of the policy's training support: {'; '.join(reasons)}; {self.rule} drives instead")
            return
        self._tell("; ".join(unusual(self.policy.support, info)))
        self._decide(self.observer.start(info))

    def _tell(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(f"{self.name}: {text}")

    def weights(self) -> Array:
        """The mixture decided last."""
        return self._weights

    def due(self, step: int) -> bool:
        """At every decision; after the last step there is none, and under a fixed rule none at all."""
        return not self.rule and super().due(step) and (step < self.info.horizon or self.probe_sequences is None)

    def update(self, stats: StepStats) -> None:
        """Collect the window; decide when it is full."""
        if self.rule:
            return
        self._window = stats if self._window is None else merge(self._window, stats)
        if stats.step % self.info.decision_every == 0 and not stats.diverged:
            self._decide(self.observer.observe(self._window))
            self._window = None

    def _decide(self, observation: NDArray[np.float32]) -> None:
        mask = self.observer.mask if self.info.padding else None
        action = self.policy.act(observation, mask).astype(np.float64)
        decided = self._controller.take(action, self.observer.choices(), self.info.num_domains)
        self._weights = self.policy.bounds.project(decided, self.observer.epochs)
        self.observer.decided(self._weights)

    def diagnostics(self) -> dict[str, float]:
        """Share of the last observation that was clipped into its bounds; where a fixed rule drives, that one does."""
        return {"fixed_rule": 1.0} if self.rule else {"clipped_frac": self.observer.clipped_frac}

    def state_dict(self) -> dict[str, Any]:
        """Observer, mixture, and the steps since the last decision.

        Raises:
            ValueError: called between two decisions, with gradients that cannot be saved.
        """
        if self.rule:
            return {"weights": self._weights.copy()}
        state = {"observer": self.observer.state_dict(), "weights": self._weights.copy()}
        state |= {"controller": self._controller.state_dict()}
        return state if self._window is None else state | {"window": window_state(self._window)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        if self.rule:
            return
        self.observer.load_state_dict(state["observer"])
        self._weights = np.array(state["weights"], dtype=np.float64)
        if "controller" in state:  # of runs that were saved before there were slow policies
            self._controller.load_state_dict(state["controller"])
        self._window = load_window(state.get("window"))
