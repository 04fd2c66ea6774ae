"""Permutation-equivariant TD3: one network for every domain and a pooled context, so that K and names are free.

SB3's spaces have a fixed shape: learning takes place padded to some largest K, with a `mask` field in the observation
that tells domains from padding. The padding gets the logit −∞ and is seen by no domain and no critic. Either of::

    EquivariantTD3("MlpPolicy", env)
    TD3(EquivariantTD3Policy, env, policy_kwargs={"layout": env.observer.layout})

with `VecNormalize(norm_obs=False)` if any: running statistics per entry would tell the domains apart. What the
networks compute is written in `acodm_env.policy.equivariant`, which runs the exported actor.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch import nn

from acodm_env.errors import ConfigError

from .domain_networks import (
    DomainActor,
    DomainCritic,
    layout_of,
    view_of,
)
from .noise import PersistentNoise
from .penalty import LogitPenalty


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
            scaling: changes to `acodm_env.policy.equivariant.SCALINGS`, by field and setting.
            options: of SB3's `TD3Policy`.

        Raises:
            ConfigError: layout, K or network do not fit the spaces, or a field cannot be read domain by domain.
        """
        self.view = view_of(layout, num_domains, observation_space, action_space, net_arch, scaling)
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

    def __init__(self, *args: Any, persistence: float = 0.0, actor_rate: float = 1.0, **kwargs: Any):
        """TD3's arguments.

        Args:
            args: of TD3.
            persistence: correlation of the exploration noise of successive decisions, in [0, 1]; see `PersistentNoise`.
            actor_rate: learning rate of the actor over the critic's.
            kwargs: of TD3.
        """
        if not 0 <= persistence <= 1:
            raise ConfigError(f"persistence={persistence}: must be between 0 and 1")
        if not actor_rate >= 0:
            raise ConfigError(f"actor_rate={actor_rate}: must be 0 or more")
        self.persistence, self.actor_rate = persistence, actor_rate
        super().__init__(*args, **kwargs)

    def _setup_model(self) -> None:
        self.policy_kwargs = layout_of(self.policy_kwargs, self.env)
        super()._setup_model()
        if self.persistence > 0 and isinstance(self.action_noise, NormalActionNoise):
            self.action_noise = PersistentNoise(self.action_noise._sigma, self.persistence, self.n_envs)

    def _update_learning_rate(self, optimizers: list[torch.optim.Optimizer] | torch.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        for group in self.actor.optimizer.param_groups:
            group["lr"] *= self.actor_rate
