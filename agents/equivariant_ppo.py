"""Permutation-equivariant PPO: one network for every domain, a Gaussian on the logits, a critic that pools.

    EquivariantPPO("MlpPolicy", env)    agent of `MixtureEnv`s or their arrays, any number of domains (padded)

The actor is `equivariant.DomainActor`, exported like that of `EquivariantTD3`. Exploration is Gaussian *in front of*
the tanh, so that the likelihood of an action is linear in the logits and a saturated actor finds its way back. Only
rows that an action can change count in the likelihood: padding and mere targets would add nothing but noise.

Noise of successive decisions is independent. Noise that lasts, so that a running average of the decisions does not
cancel it, learned less: docs/lab-log.md, 2026-11-30.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, RolloutBufferSamples, Schedule
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from .domain_networks import ConstantValue, DomainActor, DomainValue, ObservationView, layout_of, view_of


class EquivariantPPOPolicy(ActorCriticPolicy):
    """SB3's actor-critic policy with an equivariant actor and an invariant critic that share nothing."""

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        layout: Sequence[tuple[str, int]],
        num_domains: int | None = None,
        net_arch: Sequence[int] = (64, 64),
        critic_arch: Sequence[int] | None = None,
        log_std_init: float = -0.7,
        scaling: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Any,
    ):
        """Build actor and critic.

        Args:
            observation_space: of the environment, (D,).
            action_space: of the environment, (K,).
            lr_schedule: as SB3 gives it.
            layout: (name, size) of every observation field (`MixtureEnv.observer.layout`).
            num_domains: K, padding included; by default the size of the action space.
            net_arch: units of φ; ρ and the critic's head have one hidden layer as wide as the last of them.
            critic_arch: units of the critic; None: the actor's. (): one number, where runs are judged by their copies.
            log_std_init: ln of the exploration's standard deviation, in logits; one number for all domains.
            scaling: changes to `acodm_env.policy.equivariant.SCALINGS`, by field and setting.
            options: of SB3's `ActorCriticPolicy`.

        Raises:
            ConfigError: layout, K or network do not fit the spaces, or a field cannot be read domain by domain.
        """
        self.view = view_of(layout, num_domains, observation_space, action_space, net_arch, scaling)
        self.scaling, self.critic_arch = scaling, net_arch if critic_arch is None else critic_arch
        super().__init__(
            observation_space, action_space, lr_schedule, list(net_arch), log_std_init=log_std_init, **options
        )
        self._squash_output = True  # SB3 then maps actions to the environment's by `unscale_action`

    def _build(self, lr_schedule: Schedule) -> None:
        units: Any = self.net_arch
        self.actor = DomainActor(self.view, units, nn.ReLU)
        critic_units = list(self.critic_arch)
        self.critic = DomainValue(self.view, critic_units, nn.ReLU) if critic_units else ConstantValue()
        self.log_std = nn.Parameter(torch.tensor(float(self.log_std_init)))
        last = self.actor.head.layers[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():  # an untrained actor is uniform
            last.weight.mul_(0.01)
            last.bias.zero_()
        kwargs = self.optimizer_kwargs
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"layout": self.view.layout, "num_domains": self.view.num_domains, "scaling": self.scaling}
        own["critic_arch"] = self.critic_arch
        data = super()._get_constructor_parameters() | own
        known = ("observation_space", "action_space", "lr_schedule", "net_arch", "log_std_init", "optimizer_class",
                 "optimizer_kwargs", *own)  # fmt: skip
        return {name: data[name] for name in known}

    def forward(
        self, obs: torch.Tensor, deterministic: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits with noise (B, K), values (B, 1) and log-likelihoods (B,)."""
        logits, choices = self._logits(obs)
        actions = logits if deterministic else logits + self.log_std.exp() * torch.randn_like(logits)
        return actions, self.critic(obs), self._log_likelihood(actions, logits, choices)

    def _logits(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, K), −20 for padding, and 1 where an action changes something (B, K)."""
        logits = self.actor(obs)
        return logits.clamp(min=-_FAR), self.view.choices(obs).to(logits.dtype)

    def _log_likelihood(self, actions: torch.Tensor, logits: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
        errors = (actions - logits) / self.log_std.exp()
        return ((-0.5 * errors.square() - self.log_std - _HALF_LOG_2PI) * choices).sum(1)

    def evaluate_actions(
        self, obs: PyTorchObs, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values (B, 1), log-likelihoods (B,) and entropies (B,) of actions (B, K)."""
        assert isinstance(obs, torch.Tensor)
        logits, choices = self._logits(obs)
        entropy = (0.5 + _HALF_LOG_2PI + self.log_std) * choices.sum(1)
        return self.critic(obs), self._log_likelihood(actions, logits, choices), entropy

    def get_distribution(self, obs: PyTorchObs) -> DiagGaussianDistribution:
        """Of logits, padding included."""
        assert isinstance(obs, torch.Tensor)
        logits, _ = self._logits(obs)
        given = DiagGaussianDistribution(self.view.num_domains)
        return given.proba_distribution(logits, self.log_std.expand_as(logits))

    def predict_values(self, obs: PyTorchObs) -> torch.Tensor:
        """(B, 1)."""
        values: torch.Tensor = self.critic(obs)
        return values

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> torch.Tensor:
        assert isinstance(observation, torch.Tensor)
        return self.forward(observation, deterministic)[0]

    def unscale_action(self, scaled_action: NDArray[Any]) -> NDArray[Any]:
        """The environment's actions in [−1, 1] of logits."""
        squashed: NDArray[Any] = np.tanh(scaled_action)
        return squashed


_FAR = 20.0
"""A logit whose tanh is −1 in float32."""
_HALF_LOG_2PI = 0.9189385332046727


class ProblemRolloutBuffer(RolloutBuffer):
    """SB3's rollout buffer for many problems at once.

    Minibatches hold runs of like numbers of domains, so that little padding is computed; every transition still comes
    once per epoch, and the order of the minibatches is random. Where `copies` runs share a problem, their advantages
    are taken relative to their mean and in units of their standard deviation (after GRPO, arXiv 2402.03300, which has
    no critic): a critic cannot know a surface from its first losses, its copies can; and problems in which little can
    be won count like those with a lot.
    """

    view: ObservationView | None = None
    copies: int = 1

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: NDArray[Any]) -> None:
        """SB3's, then advantages relative to the copies' (steps, N)."""
        super().compute_returns_and_advantage(last_values, dones)
        if self.copies > 1:
            groups = self.advantages.reshape(self.buffer_size, -1, self.copies)
            groups = groups - groups.mean(-1, keepdims=True)
            spread = groups.std(-1).mean(0)[None, :, None]  # (1, N / copies, 1)
            groups = groups / (spread + 0.1 * spread.mean() + 1e-8)
            self.advantages = groups.reshape(self.advantages.shape)

    def get(self, batch_size: int | None = None) -> Any:
        """Minibatches of `batch_size`, in random order."""
        if self.view is None:
            yield from super().get(batch_size)
            return
        self._flatten()
        total = self.buffer_size * self.n_envs
        size = batch_size or total
        order = np.random.permutation(total)  # noqa: NPY002 (SB3's own draw)
        counts = self.view.counts(torch.as_tensor(self.observations[order])).numpy()
        order = order[np.argsort(counts, kind="stable")]
        starts = np.arange(0, total, size)
        for start in np.random.permutation(starts):  # noqa: NPY002
            yield self._get_samples(order[start : start + size])

    def _flatten(self) -> None:
        if self.generator_ready:
            return
        for name in ("observations", "actions", "values", "log_probs", "advantages", "returns"):
            setattr(self, name, self.swap_and_flatten(getattr(self, name)))
        self.generator_ready = True

    def _get_samples(self, batch_inds: NDArray[Any], env: VecNormalize | None = None) -> RolloutBufferSamples:
        return super()._get_samples(batch_inds, env)


class EquivariantPPO(PPO):
    """SB3's PPO with an equivariant policy, which learns from the environment how an observation is laid out."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": EquivariantPPOPolicy}

    def _setup_model(self) -> None:
        self.policy_kwargs = layout_of(self.policy_kwargs, self.env)
        self.rollout_buffer_class = self.rollout_buffer_class or ProblemRolloutBuffer
        super()._setup_model()
        known = isinstance(self.policy, EquivariantPPOPolicy) and self.env is not None
        if isinstance(self.rollout_buffer, ProblemRolloutBuffer) and known:
            assert isinstance(self.policy, EquivariantPPOPolicy)
            assert self.env is not None
            self.rollout_buffer.view = self.policy.view
            runs = getattr(self.env.get_attr("trainer")[0], "inner", None) or self.env.get_attr("trainer")[0]
            self.rollout_buffer.copies = getattr(runs, "copies", 1)
