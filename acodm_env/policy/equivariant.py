"""An exported policy for any number of domains, in any order, under any names.

One network φ looks at every domain alone; another, ρ, turns what φ saw there, and on average and at most over all
domains, into that domain's logit::

    h_i = φ(x_i, g)    z_i = ρ(h_i, mean_j h_j, max_j h_j, g)    a_i = tanh(z_i − mean_j z_j)

with features x_i of a domain and g of the whole run. Permuting the domains permutes the actions, and leaving out
padding changes nothing, both bit for bit: every domain's products are summed in the same order, and sums over domains
are taken of sorted values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from acodm_env.config import from_dict
from acodm_env.errors import ConfigError, PolicyError, unknown
from acodm_env.layers import ACTIVATIONS, Layers, check_layers
from acodm_env.observation import FIELDS
from acodm_env.policy.dense import Policy
from acodm_env.step_stats import Array
from acodm_env.trainer import RunInfo
from acodm_env.view import PER_ROW

PER_DOMAIN = 0
"""Size of a field that has one entry for every domain, however many there are."""
CLIP = 10.0
"""Features are clipped to ± this."""
_NOT_OF_DOMAINS = ("layer_norm", "layer_change")  # even where there are as many of them as domains
_SQUASHES = ("none", "asinh")

Fields = tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A fixed map of a field to features of the order of 1, the same for every K and every vocabulary."""

    shift: float = 0.0
    """Subtracted first, in the field's unit."""
    scale: float = 1.0
    """Divides what is left, > 0."""
    squash: str = "none"
    """"none", or "asinh": linear below 1, logarithmic above."""
    times_domains: bool = False
    """Whether the entries are shares: multiplied by K first, so that an even share is 1."""
    relative: bool = False
    """Whether the difference to the mean over all domains is a feature of its own."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.shift) and np.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"shift={self.shift}, scale={self.scale}: must be finite, the scale positive")
        if self.squash not in _SQUASHES:
            unknown("squash", self.squash, _SQUASHES)

    def apply(self, values: Any, num_domains: Any, xp: Any) -> Any:
        """Scaled entries (…, K); `xp` is the array library, numpy or torch."""
        values = ((values * num_domains if self.times_domains else values) - self.shift) / self.scale
        return xp.arcsinh(values) if self.squash == "asinh" else values


_LOSS = Scaling(shift=4.0, scale=2.0, relative=True)
_CHANGE = Scaling(scale=0.05, squash="asinh", relative=True)
_SHARE = Scaling(shift=1.0, times_domains=True)
SCALINGS: dict[str, Scaling] = {
    "loss": _LOSS,
    "delta_loss": _CHANGE,
    "sample_share": _SHARE,
    "interaction": Scaling(squash="asinh"),
    "progress": Scaling(shift=0.5, scale=0.5),
    "pending": _SHARE,
    "target_loss": _LOSS,
    "delta_target_loss": _CHANGE,
}
"""Scaling by field; the others are taken as they are."""


def scalings_of(fields: Fields, changes: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Scaling]:
    """The scaling of every field, with `changes` to some of their settings.

    Raises:
        ConfigError: a change to a field that is not there, or a setting that is none.
    """
    names = [name for name, _ in fields]
    for name in changes or {}:
        if name not in names:
            unknown("scaling", name, names)
    return {
        name: from_dict(Scaling, asdict(SCALINGS.get(name, Scaling())) | dict((changes or {}).get(name, {})), name)
        for name in names
    }


def fields_of(layout: Sequence[tuple[str, int]], num_domains: int) -> Fields:
    """(name, `PER_DOMAIN` or 1) of every field of an observation's (name, size) layout but its mask.

    Raises:
        ConfigError: a field that is neither one number per domain nor one for the run, or none per domain.
    """
    fields = []
    for name, size in layout:
        if size == 1:
            fields.append((name, 1))
        elif size != num_domains or name in _NOT_OF_DOMAINS:
            raise ConfigError(
                f"fields='{name}': must have one entry per domain ({num_domains}) or one for the whole run, it has "
                f"{size}; an equivariant policy cannot read it: leave it out"
            )
        elif name != "mask":
            fields.append((name, PER_DOMAIN))
    if not any(size == PER_DOMAIN for _, size in fields):
        raise ConfigError(f"fields={fields}: must hold a field with one entry per domain, e.g. loss")
    return tuple(fields)


def split_mask(observation: Any, layout: Sequence[tuple[str, int]], xp: Any = np) -> tuple[Any, Any]:
    """The observation (…, D) without its `mask` field, and the mask (…, K), or None where there is none."""
    offset = 0
    for name, size in layout:
        if name == "mask":
            mask = observation[..., offset : offset + size]
            return xp.concatenate([observation[..., :offset], observation[..., offset + size :]], -1), mask
        offset += size
    return observation, None


def features(
    observation: Any,
    present: Any,
    fields: Fields,
    scalings: Mapping[str, Scaling],
    mean: Callable[[Any, Any], Any],
    xp: Any,
) -> tuple[Any, Any]:
    """Features x (N, K, F) of every domain and g (N, G) of the run, within ± `CLIP`.

    Args:
        observation: (N, D) without mask.
        present: bool (N, K), false for padding.
        fields: see `fields_of`.
        scalings: of every field.
        mean: (values (N, K), present) → (N, 1), the mean over the domains present.
        xp: the array library, numpy or torch.
    """
    local, context, offset = [], [], 0
    count = present.sum(1)[:, None]
    for name, size in fields:
        end = offset + (present.shape[1] if size == PER_DOMAIN else size)
        values = scalings[name].apply(observation[:, offset:end], count, xp)
        offset = end
        if size != PER_DOMAIN:
            context.append(values)
            continue
        local.append(values)
        if scalings[name].relative:
            local.append(values - mean(values, present))
    whole = xp.concatenate(context, -1) if context else observation[:, :0]
    return xp.clip(xp.stack(local, -1), -CLIP, CLIP), xp.clip(whole, -CLIP, CLIP)


def num_features(fields: Fields, scalings: Mapping[str, Scaling]) -> tuple[int, int]:
    """F and G of `features`."""
    local = [name for name, size in fields if size == PER_DOMAIN]
    return sum(1 + scalings[name].relative for name in local), len(fields) - len(local)


@dataclass(frozen=True, kw_only=True)
class EquivariantPolicy(Policy):
    """A deterministic actor that treats all domains alike, and so fits any of them."""

    architecture: ClassVar[str] = "equivariant"

    domains: tuple[str, ...] = ()
    """None: it is bound to no names."""
    fields: Fields
    """(name, `PER_DOMAIN` or 1) of every observation field, in order."""
    mean: Array = field(default_factory=lambda: np.zeros(0))
    """Unused: entries have a fixed scaling instead of statistics."""
    scale: Array = field(default_factory=lambda: np.ones(0))
    """Unused."""
    clip: float = CLIP
    encoder: int
    """How many of the layers are φ's; the others are ρ's. Their first layers take (x_i, g) and (h_i, pooled, g)."""
    scalings: Mapping[str, Scaling]
    """Of every field."""

    def __post_init__(self) -> None:
        limits = {"prior": self.action.prior, "minimum": self.bounds.minimum, "maximum": self.bounds.maximum}
        for name, value in limits.items():
            if value is not None:
                raise PolicyError(
                    f"{name}={value}: must be None in an equivariant policy, which has no fixed domains that it could "
                    f"belong to; learn without it"
                )

    def act(self, observation: NDArray[np.float32], mask: NDArray[Any] | None = None) -> NDArray[np.float32]:
        """Action (K,) in [−1, 1] for an observation (D,) of any K ≥ 2; (N, K) for (N, D).

        Args:
            observation: the fields, in order, without a mask among them.
            mask: (K,) or (N, K), 1 for a domain, 0 for padding, which gets −1 and is seen by no other domain.

        Raises:
            PolicyError: the observation's length fits no number of domains.
        """
        observation = np.asarray(observation)
        batch = np.atleast_2d(observation).astype(np.float64)
        shape = (len(batch), self._num_domains(batch.shape[1]))
        present = np.broadcast_to(True if mask is None else np.asarray(mask) > 0, shape)
        local, context = features(batch, present, self.fields, self.scalings, _mean, np)
        hidden = _forward(self.layers[: self.encoder], local, context)  # (N, K, H)
        largest = np.where(present[..., None], hidden, -np.inf).max(axis=1)
        pooled = np.concatenate([_mean(hidden, present)[:, 0], largest, context], axis=1)
        logits = _forward(self.layers[self.encoder :], hidden, pooled)[..., 0]
        action = np.where(present, np.tanh(logits - _mean(logits, present)), -1.0)
        return action.astype(np.float32).reshape(*observation.shape[:-1], -1)

    def _num_domains(self, width: int) -> int:
        whole = sum(size for _, size in self.fields)
        num_domains, rest = divmod(width - whole, len(self.fields) - whole)
        if rest or num_domains < 2:
            raise PolicyError(
                f"observation: {width} entries are not {len(self.fields) - whole} per domain, for 2 domains or more, "
                f"and {whole} for the run; give it the fields {[name for name, _ in self.fields]}"
            )
        return num_domains

    def _contract(self) -> dict[str, Any]:
        return super()._contract() | {"domains": None, "any_domains": True, "encoder": self.encoder}

    def _describe_fields(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "size": "per_domain" if size == PER_DOMAIN else size,
                "scaling": asdict(self.scalings[name]),
            }
            for name, size in self.fields
        ]

    @classmethod
    def from_contract(cls, contract: Mapping[str, Any], weights: Path) -> "EquivariantPolicy":
        """As `Policy.from_contract`."""
        sizes = {"per_domain": PER_DOMAIN}
        return cls(
            fields=tuple((entry["name"], sizes.get(entry["size"], entry["size"])) for entry in contract["fields"]),
            scalings={entry["name"]: from_dict(Scaling, entry["scaling"], "scaling") for entry in contract["fields"]},
            encoder=int(contract["encoder"]),
            **cls._common(contract, weights),
        )

    def check_shapes(self, path: Path) -> None:
        """As `Policy.check_shapes`."""
        local, whole = num_features(self.fields, self.scalings)
        width = check_layers(self.layers[: self.encoder], local + whole, path)
        width = check_layers(self.layers[self.encoder :], 3 * width + whole, path)
        if width != 1 or any(weight.ndim != 2 for weight, _, _ in self.layers):
            raise PolicyError(f"{path}: must be dense layers with one logit per domain; export it again")

    def _check_domains(self, info: RunInfo) -> None:
        if info.num_domains < 2:
            raise PolicyError(f"domains: {list(info.domains)} leaves nothing to choose; a mixture takes two or more")

    def _check_size(self, name: str, size: int, info: RunInfo) -> None:
        here = FIELDS[name].size(info)
        general = any(field in PER_ROW for field, _ in self.fields)  # those have a row for mere targets too
        wanted = (len(info.rows) if general else info.num_domains) if size == PER_DOMAIN else size
        if here != wanted:
            raise PolicyError(
                f"fields: '{name}' has {here} entries here, the policy reads {wanted} "
                f"({'one per domain' if size == PER_DOMAIN else 'whatever the number of domains'}); "
                f"learn one without '{name}' for runs like this (lag={self.lag})"
            )


def _mean(values: Array, present: NDArray[np.bool_]) -> Array:
    """Mean over the domains present (N, 1, …) of (N, K, …), whatever their order.

    Padding counts as 0, which changes no partial sum.
    """
    present = present.reshape(present.shape + (1,) * (values.ndim - 2))
    total = np.cumsum(np.sort(np.where(present, values, 0.0), axis=1), axis=1)[:, -1:]
    mean: Array = total / present.sum(axis=1, keepdims=True)
    return mean


def _forward(layers: Layers, local: Array, context: Array) -> Array:
    """Layers applied to (local_i, context), domain by domain: (N, K, L), (N, C) → (N, K, O)."""
    width = local.shape[-1]
    hidden = local
    for index, (weight, bias, activation) in enumerate(layers):
        if index == 0:
            shared = _product(context, weight[:, width:]) + bias
            hidden = _product(local, weight[:, :width]) + shared[:, None]
        else:
            hidden = _product(hidden, weight) + bias
        hidden = ACTIVATIONS[activation](hidden)  # type: ignore[arg-type, assignment]
    return hidden


def _product(inputs: Array, weight: NDArray[np.float32]) -> Array:
    """inputs (…, I) @ weight.T (I, O): equal rows give equal results wherever they stand.

    einsum takes one dot product after the other; the rounding of a matrix product (BLAS) depends on a row's place.
    """
    product: Array = np.einsum("...i,oi->...o", inputs, weight.astype(np.float64))
    return product
