"""The networks of the equivariant agents: how an observation is read domain by domain, actor, critics and value.

What the actor computes is written in `acodm_env.policy.equivariant`, which runs the exported one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from acodm_env.errors import ConfigError
from acodm_env.policy.equivariant import Fields, Scaling, features, fields_of, num_features, scalings_of, split_mask

_SHARPNESS = 2.0
"""The critic also sees softmax(this · action): the mixture under the default `ActionMap`, but for its floor."""


@dataclass(frozen=True, kw_only=True)
class ObservationView:
    """How a flat observation is read, domain by domain."""

    layout: tuple[tuple[str, int], ...]
    """(name, size) of every field, the mask among them."""
    num_domains: int
    fields: Fields
    """The same without the mask, see `fields_of`."""
    scalings: Mapping[str, Scaling]

    def read(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features (B, K, F) and (B, G) of observations (B, D), and which domains are none of the padding (B, K)."""
        observation, mask = split_mask(observation, self.layout, torch)
        if mask is None:
            mask = observation.new_ones(len(observation), self.num_domains)
        present = mask > 0
        local, context = features(observation, present, self.fields, self.scalings, mean_over, torch)
        return local, context, present

    def column(self, observation: torch.Tensor, name: str) -> torch.Tensor:
        """A field (B, size) of observations (B, D).

        Raises:
            ConfigError: it is not among them.
        """
        offset = 0
        for field, size in self.layout:
            if field == name:
                return observation[:, offset : offset + size]
            offset += size
        raise ConfigError(f"fields={[field for field, _ in self.layout]}: must hold '{name}'; add it")

    def choices(self, observation: torch.Tensor) -> torch.Tensor:
        """Bool (B, K): rows whose action changes something, neither padding nor mere targets."""
        names = [name for name, _ in self.layout]
        known = [self.column(observation, name) > 0 for name in ("mask", "trainable") if name in names]
        if not known:
            return torch.ones(len(observation), self.num_domains, dtype=torch.bool)
        return known[0] & known[-1]

    def counts(self, observation: torch.Tensor) -> torch.Tensor:
        """(B,) rows that are not padding."""
        if not any(name == "mask" for name, _ in self.layout):
            return torch.full((len(observation),), self.num_domains)
        return (self.column(observation, "mask") > 0).sum(1)

    def trimmed(self, observation: torch.Tensor) -> tuple[torch.Tensor, "ObservationView"]:
        """The same without the last rows, as far as they are padding everywhere, and how that is read."""
        mask = self.column(observation, "mask") > 0 if any(name == "mask" for name, _ in self.layout) else None
        width = self.num_domains if mask is None else max(2, int(mask.any(0).nonzero().max()) + 1)
        if width == self.num_domains:
            return observation, self
        blocks = torch.split(observation, [size for _, size in self.layout], 1)
        sizes = [width if size == self.num_domains else size for _, size in self.layout]
        kept = torch.cat([block[:, :size] for block, size in zip(blocks, sizes, strict=True)], 1)
        layout = tuple((name, size) for (name, _), size in zip(self.layout, sizes, strict=True))
        return kept, replace(self, layout=layout, num_domains=width)


class LocalNetwork(nn.Module):
    """Dense layers applied to every domain's own input, beside one context that all domains share."""

    def __init__(
        self,
        local: int,
        context: int,
        units: Sequence[int],
        activation: type[nn.Module],
        outputs: int = -1,
    ):
        super().__init__()
        self.layers = nn.Sequential(*create_mlp(local + context, outputs, list(units), activation))

    def forward(self, local: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """(B, K, L), (B, C) → (B, K, O); what the context adds to the first layer is computed once for all domains."""
        first, *rest = self.layers
        assert isinstance(first, nn.Linear)
        width = local.shape[-1]
        shared = nn.functional.linear(context, first.weight[:, width:], first.bias)
        hidden = nn.functional.linear(local, first.weight[:, :width]) + shared.unsqueeze(1)
        for layer in rest:
            hidden = layer(hidden)
        return hidden


class DomainActor(nn.Module):
    """Logits (B, K) of observations (B, D), of mean 0 over the domains; −∞ for padding."""

    def __init__(self, view: ObservationView, units: Sequence[int], activation: type[nn.Module]):
        super().__init__()
        self.view = view
        local, context = num_features(view.fields, view.scalings)
        self.encoder = LocalNetwork(local, context, units, activation)
        self.head = LocalNetwork(units[-1], 2 * units[-1] + context, units[-1:], activation, outputs=1)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """The mean of logits is taken out because a softmax does not see it, but a tanh would saturate by it."""
        observation, view = self.view.trimmed(observation)
        local, context, present = view.read(observation)
        hidden = self.encoder(local, context)
        largest = hidden.masked_fill(~present.unsqueeze(-1), -torch.inf).amax(1)
        pooled = torch.cat([mean_over(hidden, present).squeeze(1), largest, context], 1)
        logits = self.head(hidden, pooled).squeeze(-1)
        centred: torch.Tensor = (logits - mean_over(logits, present)).masked_fill(~present, -torch.inf)
        return nn.functional.pad(centred, (0, self.view.num_domains - view.num_domains), value=-torch.inf)


class DomainValue(nn.Module):
    """Value (B, 1) of observations (B, D): a mean and a maximum over domains, so that K may change."""

    def __init__(self, view: ObservationView, units: Sequence[int], activation: type[nn.Module]):
        super().__init__()
        self.view = view
        local, context = num_features(view.fields, view.scalings)
        self.encoder = LocalNetwork(local, context, units, activation)
        self.head = nn.Sequential(*create_mlp(2 * units[-1] + context, 1, list(units[-1:]), activation))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """(B, 1)."""
        observation, view = self.view.trimmed(observation)
        local, context, present = view.read(observation)
        hidden = self.encoder(local, context)
        largest = hidden.masked_fill(~present.unsqueeze(-1), -torch.inf).amax(1)
        value: torch.Tensor = self.head(torch.cat([mean_over(hidden, present).squeeze(1), largest, context], 1))
        return value


class ConstantValue(nn.Module):
    """One value (B, 1) for all observations."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """(B, 1)."""
        return self.value + observation.new_zeros(len(observation), 1)


class DomainCritic(nn.Module):
    """Value (B, 1) of observation and action (B, D + K): a mean over domains, so that K may change."""

    def __init__(self, view: ObservationView, units: Sequence[int], activation: type[nn.Module]):
        super().__init__()
        self.view = view
        local, context = num_features(view.fields, view.scalings)
        self.encoder = LocalNetwork(local + 2, context, units, activation)
        self.head = nn.Sequential(*create_mlp(units[-1] + context, 1, list(units[-1:]), activation))

    def forward(self, observation_and_action: torch.Tensor) -> torch.Tensor:
        """Each domain shows its features, its action, and its share of the mixture against an even one, less 1."""
        action = observation_and_action[:, -self.view.num_domains :]
        local, context, present = self.view.read(observation_and_action[:, : -self.view.num_domains])
        shares = torch.softmax((_SHARPNESS * action).masked_fill(~present, -torch.inf), 1)
        choice = torch.stack([action, shares * present.sum(1, keepdim=True) - 1], -1)
        hidden = self.encoder(torch.cat([local, choice], -1), context)
        value: torch.Tensor = self.head(torch.cat([mean_over(hidden, present).squeeze(1), context], 1))
        return value


def view_of(
    layout: Sequence[tuple[str, int]],
    num_domains: int | None,
    observation_space: spaces.Box,
    action_space: spaces.Box,
    net_arch: Sequence[int],
    scaling: Mapping[str, Mapping[str, Any]] | None,
) -> ObservationView:
    """How a policy reads the spaces' observations; arguments as of `EquivariantTD3Policy`.

    Raises:
        ConfigError: layout, K or network do not fit the spaces, or a field cannot be read domain by domain.
    """
    num_domains = action_space.shape[0] if num_domains is None else num_domains
    if not isinstance(net_arch, list | tuple) or not net_arch:
        raise ConfigError(f"net_arch={net_arch}: must be the units of one layer or more, e.g. [64, 64]")
    width = sum(size for _, size in layout)
    if observation_space.shape != (width,) or action_space.shape != (num_domains,):
        raise ConfigError(
            f"layout={list(layout)}, num_domains={num_domains}: must fit the spaces, an observation of "
            f"{observation_space.shape} and an action of {action_space.shape}; take them from env.observer.layout"
        )
    fields = fields_of(layout, num_domains)
    return ObservationView(
        layout=tuple((name, int(size)) for name, size in layout),
        num_domains=num_domains,
        fields=fields,
        scalings=scalings_of(fields, scaling),
    )


def layout_of(policy_kwargs: dict[str, Any], env: VecEnv | None) -> dict[str, Any]:
    """A policy's arguments, with the layout of the environment's observations if they have none."""
    if "layout" in policy_kwargs:
        return policy_kwargs
    if env is None:
        raise ConfigError("env=None: must be a MixtureEnv, or policy_kwargs must hold the observation's layout")
    return policy_kwargs | {"layout": env.get_attr("observer")[0].layout}


def mean_over(values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Mean over the domains present (B, 1, …) of (B, K, …)."""
    shares = present / present.sum(1, keepdim=True)  # (B, K)
    if values.dim() == 2:
        return (shares * values).sum(1, keepdim=True)
    return shares.unsqueeze(1) @ values
