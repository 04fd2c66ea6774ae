"""Permutation-equivariant TD3: one network for every domain and a pooled context, so that K and names are free.

SB3's spaces have a fixed shape: learning takes place padded to some largest K, with a `mask` field in the observation
that tells domains from padding. The padding gets the logit −∞ and is seen by no domain and no critic. Either of::

    EquivariantTD3("MlpPolicy", env)
    TD3(EquivariantTD3Policy, env, policy_kwargs={"layout": env.observer.layout})

with `VecNormalize(norm_obs=False)` if any: running statistics per entry would tell the domains apart. What the
networks compute is written in `acodm_env.equivariant`, which runs the exported actor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch import nn

from acodm_env.equivariant import Fields, Scaling, features, fields_of, num_features, scalings_of, split_mask
from acodm_env.errors import ConfigError

from .penalty import LogitPenalty

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
        local, context = features(observation, present, self.fields, self.scalings, _mean, torch)
        return local, context, present


class LocalNetwork(nn.Module):
    """Dense layers applied to every domain's own input, beside one context that all domains share."""

    def __init__(self, local: int, context: int, units: Sequence[int], activation: type[nn.Module], outputs: int = -1):
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
        local, context, present = self.view.read(observation)
        hidden = self.encoder(local, context)
        largest = hidden.masked_fill(~present.unsqueeze(-1), -torch.inf).amax(1)
        pooled = torch.cat([_mean(hidden, present).squeeze(1), largest, context], 1)
        logits = self.head(hidden, pooled).squeeze(-1)
        centred: torch.Tensor = logits - _mean(logits, present)
        return centred.masked_fill(~present, -torch.inf)


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
        value: torch.Tensor = self.head(torch.cat([_mean(hidden, present).squeeze(1), context], 1))
        return value


class EquivariantTD3Policy(TD3Policy):
    """SB3's TD3 policy with equivariant actors and invariant critics; works with DDPG too."""

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        layout: Sequence[tuple[str, int]],
        num_domains: int | None = None,
        net_arch: Sequence[int] = (64, 64),
        logit_penalty: float = 0.0,
        scaling: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Any,
    ):
        """Build actors and critics.

        Args:
            observation_space: of the environment, (D,).
            action_space: of the environment, (K,).
            lr_schedule: as SB3 gives it.
            layout: (name, size) of every observation field (`MixtureEnv.observer.layout`).
            num_domains: K, padding included; by default the size of the action space.
            net_arch: units of φ; ρ and the critic's head have one hidden layer as wide as the last of them.
            logit_penalty: λ of `LogitPenalty` in front of the tanh; 0 with `make_agent`, which adds its own.
            scaling: changes to `acodm_env.equivariant.SCALINGS`, by field and setting.
            options: of SB3's `TD3Policy`.

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
        self.view = ObservationView(
            layout=tuple((name, int(size)) for name, size in layout),
            num_domains=num_domains,
            fields=fields,
            scalings=scalings_of(fields, scaling),
        )
        self.logit_penalty = logit_penalty
        self.scaling = scaling
        super().__init__(observation_space, action_space, lr_schedule, list(net_arch), **options)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"layout": self.view.layout, "num_domains": self.view.num_domains, "scaling": self.scaling}
        return super()._get_constructor_parameters() | own | {"logit_penalty": self.logit_penalty}

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        """SB3's actor with the equivariant network in it."""
        actor = super().make_actor(features_extractor)
        logits = DomainActor(self.view, actor.net_arch, self.activation_fn)
        penalty = [LogitPenalty(self.logit_penalty)] if self.logit_penalty > 0 else []
        actor.mu = nn.Sequential(logits, *penalty, nn.Tanh())
        return actor.to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        """SB3's critics with invariant networks in them."""
        critic = super().make_critic(features_extractor)
        units: Any = self.critic_kwargs["net_arch"]
        for index in range(critic.n_critics):
            network = DomainCritic(self.view, units, self.activation_fn)
            setattr(critic, f"qf{index}", network)
            critic.q_networks[index] = network
        return critic.to(self.device)


class EquivariantTD3(TD3):
    """SB3's TD3 with an equivariant policy, which learns from the environment how an observation is laid out."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": EquivariantTD3Policy}

    def _setup_model(self) -> None:
        if "layout" not in self.policy_kwargs:
            if self.env is None:
                raise ConfigError("env=None: must be a MixtureEnv, or policy_kwargs must hold the observation's layout")
            self.policy_kwargs = self.policy_kwargs | {"layout": self.env.get_attr("observer")[0].layout}
        super()._setup_model()


def _mean(values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Mean over the domains present (B, 1, …) of (B, K, …)."""
    shares = present / present.sum(1, keepdim=True)  # (B, K)
    if values.dim() == 2:
        return (shares * values).sum(1, keepdim=True)
    return shares.unsqueeze(1) @ values
