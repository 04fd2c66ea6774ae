"""Learning that begins with a given policy: its actor is copied, and the critic is warmed up under it.

The untrained agent then *is* the policy: the same network on the same observation, mapped to a mixture in the same way.
What comes after is the algorithm's own. A critic that knows nothing would ruin the actor within a few updates, so the
actor stays frozen until the critic has seen `warm_up` decisions of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from acodm_env.errors import ConfigError, PolicyError
from acodm_env.mixture import ActionMap
from acodm_env.policy.dense import Policy
from acodm_env.policy.equivariant import EquivariantPolicy

from .domain_networks import DomainActor
from .equivariant import EquivariantTD3Policy
from .equivariant_ppo import EquivariantPPOPolicy
from .export import domain_actor
from .hyperparameters import Settings
from .penalty import LogitPenalty


def environment_for(policy: Policy) -> dict[str, Any]:
    """Settings of an environment in which the policy can act: its fields and its action map.

    Raises:
        PolicyError: it is bound to domains.
    """
    require_equivariant(policy)
    action = {"scale": policy.action.scale, "floor": policy.action.floor, "rate": policy.action.rate}
    return {"fields": [name for name, _ in policy.fields], "action": action}


def hidden_of(policy: Policy) -> list[int]:
    """Units of the layers of φ, as `net_arch` has them."""
    assert isinstance(policy, EquivariantPolicy)
    return [len(bias) for _, bias, _ in policy.layers[: policy.encoder]]


def settings_to_begin(settings: Settings, policy: Policy) -> Settings:
    """Hyper-parameters of an agent that begins with the policy: its layers, and what the file has `from_policy`."""
    kwargs = settings["policy_kwargs"] | {"net_arch": hidden_of(policy)}
    begun: Settings = settings | {"policy_kwargs": kwargs} | settings.get("from_policy", {})
    return begun


def require_equivariant(policy: Policy) -> None:
    """Refuse a policy that an equivariant agent cannot begin with.

    Raises:
        PolicyError: it is bound to domains.
    """
    if not isinstance(policy, EquivariantPolicy):
        raise PolicyError(
            f"init: must be an equivariant policy, which fits any domains; this one is {policy.architecture} and bound "
            f"to {', '.join(policy.domains)}; learn one with apg, equivariant-ppo or equivariant-td3"
        )


def begin_with(agent: BaseAlgorithm, policy: Policy) -> None:
    """Copy a policy's actor into an agent's, target actor included; nothing else of the agent changes.

    A logit penalty is switched off: it pulls towards the uniform mixture and away from the policy.

    Raises:
        ConfigError: the agent is not equivariant, its networks have other sizes, or it acts in another way.
        PolicyError: the policy is bound to domains, or sees other fields.
    """
    require_equivariant(policy)
    assert isinstance(policy, EquivariantPolicy)
    own = agent.policy
    if not isinstance(own, EquivariantTD3Policy | EquivariantPPOPolicy):
        raise ConfigError(
            f"init: must be left out for {type(agent).__name__}, whose actor is bound to domains; learn with "
            f"equivariant-td3 or equivariant-ppo"
        )
    if own.view.fields != policy.fields:
        raise PolicyError(
            f"init: the policy sees {[name for name, _ in policy.fields]}, the environment shows "
            f"{[name for name, _ in own.view.fields]}; they must be the same, in this order"
        )
    _check_action(agent.get_env(), policy.action)
    _copy(domain_actor(own), policy)
    if isinstance(own, EquivariantTD3Policy):
        own.actor_target.load_state_dict(own.actor.state_dict())
        for actor in (own.actor, own.actor_target):
            for module in actor.modules():
                if isinstance(module, LogitPenalty):
                    module.strength = 0.0


def _check_action(env: VecEnv | None, action: ActionMap) -> None:
    given: ActionMap | None = None if env is None else env.get_attr("action_map")[0]
    if given is not None and (given.scale, given.floor, given.rate) != (action.scale, action.floor, action.rate):
        raise ConfigError(f"action={given}: must be the policy's, {action}; take `environment_for`'s settings")


def _copy(actor: DomainActor, policy: EquivariantPolicy) -> None:
    dense = [module for part in (actor.encoder, actor.head) for module in part.layers if isinstance(module, nn.Linear)]
    shapes = [tuple(module.weight.shape) for module in dense]
    given = [weight.shape for weight, _, _ in policy.layers]
    if shapes != given:
        raise ConfigError(f"net_arch: the actor's layers {shapes} must be those of the policy, {given}; set hidden")
    with torch.no_grad():
        for module, (weight, bias, _) in zip(dense, policy.layers, strict=True):
            module.weight.copy_(torch.as_tensor(weight))
            module.bias.copy_(torch.as_tensor(bias))


@contextmanager
def frozen_actor(agent: BaseAlgorithm) -> Iterator[None]:
    """Within, updates change the critic alone: no step, no weight decay, no moments of the actor."""
    own: Any = agent.policy
    parameters = list(own.actor.parameters()) + ([own.log_std] if isinstance(own, EquivariantPPOPolicy) else [])
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def warm_up_critic(agent: BaseAlgorithm, decisions: int) -> None:
    """Let the agent learn for so many decisions, its actor as it is; the algorithm's own exploration is on."""
    if decisions > 0:
        with frozen_actor(agent):
            agent.learn(decisions)
