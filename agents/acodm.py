"""The paper's own agent on Stable-Baselines3: `AcodmDDPG`, and `AcodmTD3` for TD3's three improvements.

    y_i = h_i + γ·Q'_i(s', μ'(s'))          head i learns the return of h_i = α_i·(r_i + g), see `heads`
    L_critic = mean_batch Σ_i (Q_i(s, a) − y_i)²
    L_actor  = −mean_batch Σ_i Q_i(s, μ(s))

The sum of the heads' targets is the target of SB3's scalar critic, so both agents maximise the same return; K heads
give the network K errors to learn from in place of one. (arXiv 2505.23878 has one critic; heads per domain are ours.)

TD3 bootstraps from the smaller of two critics. Here that is, per sample, all heads of the critic whose *sum* is the
smaller one: a minimum head by head would make the sum smaller than either critic's, and what is to be protected from
over-estimation is the sum, which the actor climbs.
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from stable_baselines3 import DDPG, TD3
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import polyak_update
from torch import nn

from acodm_env.errors import ConfigError

from .heads import HeadReplayBuffer, MultiHeadPolicy


class AcodmTD3(TD3):
    """TD3 with one critic head per domain. Takes TD3's arguments; `policy_kwargs` also `layer_norm`.

    The environment must be a (vectorised) `MixtureEnv`: head rewards come from every step's `info`.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MultiHeadPolicy}

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, MultiHeadPolicy):
            raise ConfigError(
                f"policy={self.policy_class.__name__}: must be 'MlpPolicy' or derive from MultiHeadPolicy, whose "
                f"critics have one output per domain"
            )
        if self.n_steps != 1:
            raise ConfigError(f"n_steps={self.n_steps}: must be 1; the heads bootstrap from the next decision")
        self.replay_buffer_class = self.replay_buffer_class or HeadReplayBuffer
        if not issubclass(self.replay_buffer_class, HeadReplayBuffer):
            raise ConfigError(
                f"replay_buffer_class={self.replay_buffer_class.__name__}: must derive from HeadReplayBuffer, which "
                f"keeps the heads' rewards; leave it out"
            )
        super()._setup_model()

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Take `gradient_steps` of the critic, and of the actor one in `policy_delay`."""
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        self._update_learning_rate([self.actor.optimizer, self.critic.optimizer])
        actor_losses, critic_losses = [], []
        for _ in range(gradient_steps):
            self._n_updates += 1
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            critic_losses.append(self._update_critic(batch))
            if self._n_updates % self.policy_delay == 0:
                actor_losses.append(self._update_actor(batch))
                self._update_targets()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if actor_losses:
            self.logger.record("train/actor_loss", np.mean(actor_losses))
        self.logger.record("train/critic_loss", np.mean(critic_losses))

    @torch.no_grad()
    def head_targets(self, batch: ReplayBufferSamples) -> torch.Tensor:
        """y (B, K) of a batch whose `rewards` are the heads' (B, K)."""
        noise = batch.actions.clone().normal_(0, self.target_policy_noise)
        noise = noise.clamp(-self.target_noise_clip, self.target_noise_clip)  # (B, K)
        actions = (self.actor_target(batch.next_observations) + noise).clamp(-1, 1)  # (B, K)
        heads = torch.stack(self.critic_target(batch.next_observations, actions))  # (C, B, K)
        smaller = heads.sum(dim=2).argmin(dim=0)  # (B,)
        chosen = heads[smaller, torch.arange(len(smaller), device=heads.device)]  # (B, K)
        return batch.rewards + (1 - batch.dones) * self.gamma * chosen

    def _update_critic(self, batch: ReplayBufferSamples) -> float:
        targets = self.head_targets(batch)  # (B, K)
        errors = torch.stack(self.critic(batch.observations, batch.actions)) - targets  # (C, B, K)
        loss = errors.square().sum(dim=(0, 2)).mean()
        self.critic.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.critic.optimizer.step()
        return loss.item()

    def _update_actor(self, batch: ReplayBufferSamples) -> float:
        heads = self.critic.q1_forward(batch.observations, self.actor(batch.observations))  # (B, K)
        loss = -heads.sum(dim=1).mean()
        self.actor.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # critic gradients are cleared before its own next step
        self.actor.optimizer.step()
        return loss.item()

    def _update_targets(self) -> None:
        polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
        polyak_update(self.actor.parameters(), self.actor_target.parameters(), self.tau)
        polyak_update(self.critic_batch_norm_stats, self.critic_batch_norm_stats_target, 1.0)
        polyak_update(self.actor_batch_norm_stats, self.actor_batch_norm_stats_target, 1.0)


class AcodmDDPG(AcodmTD3, DDPG):
    """The paper's algorithm: one critic, no smoothing of targets, no delay. Takes DDPG's arguments."""


def paper_learning_rate(progress_remaining: float) -> float:
    """Cosine from 0.01 to 0.001 (method §3); `progress_remaining` goes from 1 to 0, as SB3 counts."""
    return 0.001 + 0.009 * (1 + math.cos(math.pi * (1 - progress_remaining))) / 2


def paper() -> dict[str, Any]:
    """Keyword arguments of the published hyper-parameters (method §3): `AcodmDDPG("MlpPolicy", env, **paper())`.

    Actor and critic have 5 hidden layers of 1024 units, each Linear → LayerNorm → ReLU. With the paper's state
    (3K + 1 + 18 numbers, K = 22) actor, critic and their targets hold 17.3 million parameters. That the weight decay
    is decoupled (AdamW) is ours: the paper does not say. A fresh dictionary each time, since SB3 writes into it.
    """
    return {
        "learning_rate": paper_learning_rate,
        "gamma": 0.95,
        "tau": 0.001,
        "buffer_size": 10_000,
        "batch_size": 32,
        "policy_kwargs": {
            "net_arch": [1024] * 5,
            "layer_norm": True,
            "activation_fn": nn.ReLU,
            "optimizer_class": torch.optim.AdamW,
            "optimizer_kwargs": {"weight_decay": 0.1},
        },
    }
