"""From a learned SB3 agent to the exported policy, verified by re-loading what was written."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from acodm_env.env import MixtureEnv
from acodm_env.errors import PolicyError
from acodm_env.policy import Policy

from .sb3 import LogitPenalty

TOLERANCE = 1e-5
Layers = tuple[tuple[NDArray[np.float32], NDArray[np.float32], str], ...]


def actor_layers(model: BaseAlgorithm) -> Layers:
    """(weight, bias, activation) of the deterministic actor's dense layers.

    Raises:
        PolicyError: an architecture that the policy format does not know.
    """
    if isinstance(model, TD3):  # DDPG is a TD3
        modules, last = list(model.actor.mu), None
    elif isinstance(model, SAC):
        modules, last = [*model.actor.latent_pi, model.actor.mu], "tanh"
    elif isinstance(model, OnPolicyAlgorithm):
        modules, last = [*model.policy.mlp_extractor.policy_net, model.policy.action_net], "clip"
    else:
        raise PolicyError(f"algo={type(model).__name__}: its actor cannot be exported; use td3, ddpg, sac, ppo or a2c")
    return _dense(modules, last)


def _dense(modules: list[nn.Module], last: str | None) -> Layers:
    names = {nn.ReLU: "relu", nn.Tanh: "tanh"}
    layers: list[tuple[NDArray[np.float32], NDArray[np.float32], str]] = []
    for module in modules:
        if isinstance(module, nn.Linear):
            weight, bias = (p.detach().cpu().float().numpy().copy() for p in (module.weight, module.bias))
            layers.append((weight, bias, "identity"))
        elif isinstance(module, LogitPenalty):
            continue  # the identity outside of learning
        elif type(module) in names and layers:
            layers[-1] = (*layers[-1][:2], names[type(module)])
        else:
            raise PolicyError(f"actor: a {type(module).__name__} layer cannot be exported; use an MLP of Linear layers")
    if last is not None:
        layers[-1] = (*layers[-1][:2], last)
    return tuple(layers)


def to_policy(model: BaseAlgorithm, venv: VecNormalize, env: MixtureEnv, provenance: Mapping[str, Any]) -> Policy:
    """The exported form of an agent: actor, observation statistics and everything a run must fit."""
    info = env.trainer.info
    statistics = cast(RunningMeanStd, venv.obs_rms)  # a dict only for dict spaces
    return Policy(
        domains=info.domains,
        fields=env.observer.layout,
        mean=np.array(statistics.mean),
        scale=np.sqrt(statistics.var + venv.epsilon),
        clip=float(venv.clip_obs),
        layers=actor_layers(model),
        action=env.action_map,
        bounds=env.bounds,
        interaction=env.observer.tracker.config,
        decision_every=info.decision_every,
        horizon=info.horizon,
        lag=info.lag,
        gradients=info.gradients,
        provenance=dict(provenance),
    )


def export(policy: Policy, path: str | Path, model: BaseAlgorithm, venv: VecNormalize) -> float:
    """Write `policy`, re-load it, and compare it with the agent on 256 observations.

    Returns:
        The largest difference of an action.

    Raises:
        PolicyError: the file and the agent differ by more than 1e-5; nothing was written then.
    """
    with tempfile.TemporaryDirectory() as trial:
        error = parity(Policy.load(policy.save(Path(trial) / "policy")), model, venv)
    if not error <= TOLERANCE:
        raise PolicyError(f"{path}: the exported policy would differ from the agent by {error:.2g}; nothing written")
    policy.save(path)
    return error


def parity(policy: Policy, model: BaseAlgorithm, venv: VecNormalize, num_observations: int = 256) -> float:
    """max |a_file − a_agent| over observations around those seen in learning, and over the whole space."""
    rng = np.random.default_rng(0)
    space = cast(Box, venv.observation_space)
    half = num_observations // 2
    near = rng.normal(policy.mean, policy.scale, (half, len(policy.mean)))
    far = rng.uniform(space.low, space.high, (num_observations - half, len(policy.mean)))
    observations = np.concatenate([near, far]).astype(np.float32)
    with torch.no_grad():
        expected, _ = model.predict(venv.normalize_obs(observations), deterministic=True)
    return float(np.abs(policy.act(observations) - expected).max())
