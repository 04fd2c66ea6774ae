"""From a learned SB3 agent to the exported policy, verified by re-loading what was written."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize
from torch import nn

from acodm_env.env import MixtureEnv
from acodm_env.errors import PolicyError
from acodm_env.layers import LAYER_NORM_EPSILON, Layers
from acodm_env.policy.dense import Policy
from acodm_env.policy.equivariant import EquivariantPolicy, split_mask
from acodm_env.policy.load import load_policy
from acodm_env.step_stats import Array

from .domain_networks import DomainActor
from .equivariant import EquivariantTD3Policy
from .equivariant_ppo import EquivariantPPOPolicy
from .penalty import LogitPenalty

TOLERANCE = 1e-5
NO_CLIP = 1e9
"""The clip of observations that were not normalised: beyond the bounds of every field."""
EXPORTED = "td3, ddpg, sac, ppo, a2c, and of sb3-contrib tqc, crossq, trpo and ars"


def actor_layers(model: BaseAlgorithm) -> Layers:
    """(weight, bias, activation) of the deterministic actor's layers.

    Raises:
        PolicyError: an architecture that the policy format does not know.
    """
    policy: Any = model.policy
    actor: Any = getattr(policy, "actor", None)
    if hasattr(actor, "latent_pi"):  # SAC, TQC, CrossQ: the mean of a squashed Gaussian
        return layers_of([*actor.latent_pi, actor.mu], "tanh")
    if isinstance(getattr(actor, "mu", None), nn.Sequential):  # TD3, DDPG
        return layers_of(actor.mu)
    if hasattr(policy, "mlp_extractor") and not hasattr(policy, "lstm_actor"):  # PPO, A2C, TRPO: the mean, clipped
        return layers_of([*policy.mlp_extractor.policy_net, policy.action_net], "clip")
    if isinstance(getattr(policy, "action_net", None), nn.Sequential):  # ARS
        return layers_of(policy.action_net, None if policy.squash_output else "clip")
    raise PolicyError(f"algo={type(model).__name__}: its actor cannot be exported; those of {EXPORTED} can")


def layers_of(modules: Iterable[nn.Module], last: str | None = None) -> Layers:
    """(weight, bias, activation) of dense layers and layer normalisations in order; `last` names the final activation.

    Raises:
        PolicyError: a layer that the policy format does not know.
    """
    names = {nn.ReLU: "relu", nn.Tanh: "tanh"}
    layers: list[tuple[NDArray[np.float32], NDArray[np.float32], str]] = []
    before: tuple[Array, Array] | None = None  # factor and shift of a BatchRenorm: part of the next dense layer
    for module in modules:
        if isinstance(module, nn.Linear):
            layers.append((*_dense(module, before), "identity"))
            before = None
        elif isinstance(module, nn.LayerNorm):
            layers.append((*_layer_norm(module), "identity"))
        elif type(module).__name__ == "BatchRenorm1d":  # CrossQ's
            before = _batch_norm(module)
        elif isinstance(module, LogitPenalty):
            continue  # the identity outside of learning
        elif type(module) in names and layers:
            layers[-1] = (*layers[-1][:2], names[type(module)])
        else:
            raise PolicyError(
                f"actor: a {type(module).__name__} layer cannot be exported; use Linear layers with ReLU or Tanh, "
                f"normalised by LayerNorm or not at all"
            )
    if last is not None:
        layers[-1] = (*layers[-1][:2], last)
    return tuple(layers)


def _numpy(tensor: torch.Tensor) -> Array:
    values: Array = tensor.detach().cpu().double().numpy()
    return values


def _dense(module: nn.Linear, before: tuple[Array, Array] | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    weight = _numpy(module.weight)
    bias = np.zeros(len(weight)) if module.bias is None else _numpy(module.bias)
    if before is not None:
        factor, shift = before
        weight, bias = weight * factor, bias + weight @ shift
    return weight.astype(np.float32), bias.astype(np.float32)


def _layer_norm(module: nn.LayerNorm) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if module.eps != LAYER_NORM_EPSILON or len(module.normalized_shape) != 1:
        raise PolicyError(
            f"actor: LayerNorm with eps={module.eps} over {tuple(module.normalized_shape)} cannot be exported; it must "
            f"be over one dimension, with eps={LAYER_NORM_EPSILON}"
        )
    size = module.normalized_shape[0]
    weight = np.ones(size) if module.weight is None else _numpy(module.weight)
    bias = np.zeros(size) if module.bias is None else _numpy(module.bias)
    return weight.astype(np.float32), bias.astype(np.float32)


def _batch_norm(module: Any) -> tuple[Array, Array]:
    """Factor and shift by its running statistics, as it works outside of learning."""
    factor = _numpy(module.scale) / np.sqrt(_numpy(module.ra_var) + module.eps)
    return factor, _numpy(module.bias) - factor * _numpy(module.ra_mean)


def to_policy(model: BaseAlgorithm, venv: VecEnv, env: MixtureEnv, provenance: Mapping[str, Any]) -> Policy:
    """The exported form of an agent: actor, observation statistics and everything a run must fit.

    Raises:
        PolicyError: the actor cannot be exported.
    """
    info = env.trainer.info
    common: dict[str, Any] = {
        "action": env.action_map,
        "bounds": env.bounds,
        "interaction": env.observer.tracker.config,
        "decision_every": info.decision_every,
        "horizon": info.horizon,
        "lag": info.lag,
        "gradients": info.gradients,
        "probe_sequences": env.probe_sequences,
    }
    if isinstance(model.policy, EquivariantTD3Policy | EquivariantPPOPolicy):
        return _equivariant(model.policy, venv, common, provenance)
    mean, scale, clip = _statistics(venv, sum(size for _, size in env.observer.layout))
    return Policy(
        domains=info.domains,
        fields=env.observer.layout,
        mean=mean,
        scale=scale,
        clip=clip,
        layers=actor_layers(model),
        provenance=dict(provenance),
        **common,
    )


def domain_actor(policy: EquivariantTD3Policy | EquivariantPPOPolicy) -> DomainActor:
    """The equivariant network of an agent's actor."""
    network = policy.actor if isinstance(policy, EquivariantPPOPolicy) else policy.actor.mu[0]
    assert isinstance(network, DomainActor)
    return network


def _equivariant(
    policy: EquivariantTD3Policy | EquivariantPPOPolicy,
    venv: VecEnv,
    common: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> EquivariantPolicy:
    """Without the mask: what is exported knows no padding. How many domains it learned on is its provenance."""
    if _normaliser(venv) is not None:
        raise PolicyError(
            "norm_obs=True: statistics of every entry tell the domains apart, so that this policy would fit none but "
            "them; learn with VecNormalize(norm_obs=False)"
        )
    network = domain_actor(policy)
    encoder, head = layers_of(network.encoder.layers), layers_of(network.head.layers)
    return EquivariantPolicy(
        fields=policy.view.fields,
        scalings=policy.view.scalings,
        encoder=len(encoder),
        layers=encoder + head,
        provenance={"trained_on": {"num_domains": policy.view.num_domains}} | dict(provenance),
        **common,
    )


def _normaliser(venv: VecEnv) -> VecNormalize | None:
    """The wrapper that normalises observations, if any."""
    wrapper = unwrap_vec_normalize(venv)
    return wrapper if wrapper is not None and wrapper.norm_obs else None


def _statistics(venv: VecEnv, size: int) -> tuple[Array, Array, float]:
    """Mean (D,), standard deviation (D,) and clip of the observations that the agent was shown."""
    wrapper = _normaliser(venv)
    if wrapper is None:
        return np.zeros(size), np.ones(size), NO_CLIP
    statistics = cast(RunningMeanStd, wrapper.obs_rms)  # a dict only for dict spaces
    return np.array(statistics.mean), np.sqrt(statistics.var + wrapper.epsilon), float(wrapper.clip_obs)


def export(policy: Policy, path: str | Path, model: BaseAlgorithm, venv: VecEnv) -> float:
    """Write `policy`, re-load it, and compare it with the agent on 256 observations.

    Returns:
        The largest difference of an action.

    Raises:
        PolicyError: the file and the agent differ by more than 1e-5; nothing was written then.
    """
    with tempfile.TemporaryDirectory() as trial:
        error = parity(load_policy(policy.save(Path(trial) / "policy")), model, venv)
    if not error <= TOLERANCE:
        raise PolicyError(f"{path}: the exported policy would differ from the agent by {error:.2g}; nothing written")
    policy.save(path)
    return error


def parity(policy: Policy, model: BaseAlgorithm, venv: VecEnv, num_observations: int = 256) -> float:
    """max |a_file − a_agent| over observations around those seen in learning, and over the whole space.

    Where the agent knows padding, some of the domains are made padding, and the policy is told so.
    """
    rng = np.random.default_rng(0)
    space = cast(Box, venv.observation_space)
    shape = (num_observations // 2, len(space.low))
    near = rng.normal(policy.mean, policy.scale, shape) if len(policy.mean) else rng.normal(size=shape)
    far = rng.uniform(space.low, space.high, (num_observations - len(near), len(space.low)))
    observations = np.concatenate([near, far]).astype(np.float32)
    layout: tuple[tuple[str, int], ...] = ()
    if isinstance(model.policy, EquivariantTD3Policy | EquivariantPPOPolicy):
        layout = model.policy.view.layout
    _pad(observations, layout, rng)
    wrapper = _normaliser(venv)
    with torch.no_grad():
        shown = observations if wrapper is None else wrapper.normalize_obs(observations)
        expected, _ = model.predict(cast(NDArray[np.float32], shown), deterministic=True)
    observations, mask = split_mask(observations, layout)
    return float(np.abs(policy.act(observations, mask) - expected).max())


def _pad(observations: NDArray[np.float32], layout: Iterable[tuple[str, int]], rng: np.random.Generator) -> None:
    """Fill the mask field, if there is one, with 2 domains or more and padding, in place."""
    offset = 0
    for name, size in layout:
        if name == "mask":
            numbers = rng.integers(2, size + 1, len(observations))
            observations[:, offset : offset + size] = np.arange(size) < numbers[:, None]
        offset += size
