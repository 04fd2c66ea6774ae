"""One critic head per domain: the networks, and a replay buffer that keeps a reward for every head.

A `MixtureEnv` rewards R = Σ_i α_i·r_i + g, where g are the terms that belong to no domain (`progress`, `final`, the
penalty of a divergence). Head i learns the discounted return of h_i = α_i·r_i + α_i·g. The paper has no g; sharing
it out by the mixture is ours: since Σα_i = 1 the head rewards sum to R, so the sum of the heads is the ordinary
critic of the scalar reward, whatever the reward's terms are.

Under a lag `info["weights"]` is the mixture decided, not the one in effect, so that r_i is weighed by the decision;
the sum over heads is R all the same.
"""

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch import nn

from acodm_env.errors import ConfigError
from acodm_env.step_stats import Array


def head_rewards(rewards: NDArray[Any], infos: list[dict[str, Any]]) -> Array:
    """Rewards of the heads, α_i·r_i + α_i·(R − Σ_j α_j·r_j), which sum to R.

    Args:
        rewards: scalar rewards R (N,), not normalised.
        infos: the N infos of the same step.

    Returns:
        float64 (N, K).

    Raises:
        ConfigError: an info lacks the domains' rewards or the mixture.
    """
    try:
        weights = np.stack([info["weights"] for info in infos]).astype(np.float64)  # (N, K)
        domain_rewards = np.stack([info["domain_rewards"] for info in infos])  # (N, K)
    except KeyError as error:
        raise ConfigError(
            f"info[{error}]: must be in the info of every step; the environment is no MixtureEnv, or a wrapper drops "
            f"its info; pass 'weights' and 'domain_rewards' on, or use td3 or ddpg, which need neither"
        ) from error
    own = weights * domain_rewards
    rest = np.asarray(rewards, dtype=np.float64) - own.sum(axis=1)  # (N,)
    total: Array = own + weights * rest[:, None]
    return total


class HeadReplayBuffer(ReplayBuffer):
    """SB3's replay buffer whose samples hold the heads' rewards (B, K) in place of the scalar reward (B, 1)."""

    head_rewards: NDArray[np.float32]
    """(buffer_size, n_envs, K), not normalised."""

    def __init__(self, *args: Any, optimize_memory_usage: bool = False, **kwargs: Any):
        if optimize_memory_usage:
            raise ConfigError("optimize_memory_usage=True: must be False; head rewards are kept per transition")
        super().__init__(*args, **kwargs)
        self.head_rewards = np.zeros((self.buffer_size, self.n_envs, self.action_dim), dtype=np.float32)

    def add(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        action: NDArray[Any],
        reward: NDArray[Any],
        done: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """Add one transition of every environment, with its head rewards."""
        self.head_rewards[self.pos] = head_rewards(reward, infos)
        super().add(obs, next_obs, action, reward, done, infos)

    def _get_samples(self, batch_inds: NDArray[Any], env: VecNormalize | None = None) -> ReplayBufferSamples:
        """As SB3's, drawing the same numbers; `rewards` is (B, K)."""
        env_inds = np.random.randint(0, high=self.n_envs, size=(len(batch_inds),))  # noqa: NPY002 (SB3's own draw)
        at = (batch_inds, env_inds)
        dones = self.dones[at] * (1 - self.timeouts[at])  # (B,)
        data = (
            self._normalize_obs(self.observations[at], env),
            self.actions[at],
            self._normalize_obs(self.next_observations[at], env),
            dones[:, None],
            self.head_rewards[at] * _reward_factor(self.rewards[at], env)[:, None],
        )
        return ReplayBufferSamples(*(self.to_torch(np.asarray(array)) for array in data))


def _reward_factor(rewards: NDArray[np.float32], env: VecNormalize | None) -> NDArray[np.float32]:
    """What normalisation, clipping included, multiplies each scalar reward (B,) by."""
    if env is None or not env.norm_reward:
        return np.ones(len(rewards), dtype=np.float32)
    scale = 1 / np.sqrt(env.ret_rms.var + env.epsilon)
    size = np.abs(rewards.astype(np.float64) * scale)
    clipped = np.divide(env.clip_reward, size, out=np.ones(len(rewards)), where=size > env.clip_reward)
    factor: NDArray[np.float32] = (scale * clipped).astype(np.float32)
    return factor


def _mlp(
    sizes: tuple[int, int], hidden: list[int], activation: type[nn.Module], layer_norm: bool, squash: bool = False
) -> nn.Sequential:
    """Linear (→ LayerNorm) → activation for every hidden layer, then Linear (→ Tanh)."""
    norms: list[type[nn.Module]] = [nn.LayerNorm] if layer_norm else []
    return nn.Sequential(*create_mlp(*sizes, hidden, activation, squash_output=squash, post_linear_modules=norms))


class MultiHeadCritic(ContinuousCritic):
    """C critics of one head per domain: observations (B, S) and actions (B, K) → C tensors (B, K)."""

    def __init__(
        self,
        *,
        action_space: spaces.Box,
        net_arch: list[int],
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        layer_norm: bool = False,
        **kwargs: Any,
    ):
        # SB3's networks have one output; they are made without hidden layers and replaced.
        super().__init__(action_space=action_space, net_arch=[], features_dim=features_dim, **kwargs)
        num_domains = get_action_dim(action_space)
        for index in range(self.n_critics):
            network = _mlp((features_dim + num_domains, num_domains), net_arch, activation_fn, layer_norm)
            self.add_module(f"qf{index}", network)
            self.q_networks[index] = network


class MultiHeadPolicy(TD3Policy):
    """TD3's networks with multi-head critics; `layer_norm` puts a LayerNorm between every hidden layer's two parts."""

    def __init__(self, *args: Any, layer_norm: bool = False, **kwargs: Any):
        self.layer_norm = layer_norm  # before the networks are made
        super().__init__(*args, **kwargs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        """SB3's actor; its `mu` is a Sequential that ends in Tanh."""
        actor = super().make_actor(features_extractor)
        if self.layer_norm:
            sizes = actor.features_dim, get_action_dim(self.action_space)
            actor.mu = _mlp(sizes, actor.net_arch, actor.activation_fn, layer_norm=True, squash=True)
        return actor.to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        """A `MultiHeadCritic`."""
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return MultiHeadCritic(**kwargs, layer_norm=self.layer_norm).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"layer_norm": self.layer_norm}
