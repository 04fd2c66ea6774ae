"""A penalty on the actor's pre-tanh logits, and the policies that have it: what keeps TD3's actor out of saturation.

λ/2·mean‖z‖² is added to the actor's loss through the backward pass of an identity in front of the tanh, so that the
algorithms' own training code stays as it is. Not in the paper.
"""

from typing import Any

import torch
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.td3.policies import Actor, TD3Policy

from .heads import MultiHeadPolicy


class _Pull(torch.autograd.Function):
    """The identity, whose backward pass adds the gradient of λ/2·mean_batch‖z‖²."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.strength = strength
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (logits,) = ctx.saved_tensors
        return gradient + ctx.strength * logits / len(logits), None


class LogitPenalty(torch.nn.Module):
    """Penalises the logits that pass through it, wherever a loss is back-propagated through them."""

    def __init__(self, strength: float):
        super().__init__()
        self.strength = strength

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits themselves (B, K)."""
        penalised: torch.Tensor = _Pull.apply(logits, self.strength)  # type: ignore[no-untyped-call]
        return penalised


class Penalised(TD3Policy):
    """Puts a `LogitPenalty` in front of the tanh of actor and target actor; for policies of TD3 and DDPG."""

    def __init__(self, *args: Any, logit_penalty: float = 0.0, **kwargs: Any):
        self.logit_penalty = logit_penalty  # before the networks are made
        super().__init__(*args, **kwargs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        """An actor whose logits are penalised."""
        actor = super().make_actor(features_extractor)
        if self.logit_penalty > 0:
            *dense, squash = actor.mu
            actor.mu = torch.nn.Sequential(*dense, LogitPenalty(self.logit_penalty), squash)
        return actor

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"logit_penalty": self.logit_penalty}


class PenalisedTD3Policy(Penalised):
    """SB3's policy of TD3 and DDPG, its logits penalised."""


class PenalisedHeadsPolicy(Penalised, MultiHeadPolicy):
    """The policy of `AcodmTD3` and `AcodmDDPG`, its logits penalised."""
