"""Warm-up by a teacher: a named mixer fills the replay buffer, then actor and critic are pre-trained on what it did.

The paper plays fixed weights plus noise for the first 2 % of its steps and pre-trains on them (the released code
stepped the critic's optimiser for both). Here the teacher is any mixer whose needs the environment measures. Its
weights are turned into actions by the inverse of the action map; what the map cannot express (a weight below the
floor, a ratio beyond its scale) is clipped, and the error reported.

    actor:  mean ‖μ(s) − a_teacher(s)‖² by a regression of its own, so that the agent's optimiser starts afresh
    critic: the algorithm's own updates, bootstrapped targets and all, with the actor's parameters frozen
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch.nn.functional import mse_loss

from acodm_env.errors import ConfigError
from acodm_env.mixture import ActionMap, check_weights
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Mixer, Trainer

from .baselines import make_mixer

KEPT = frozenset({"losses", "layers", "validation"})
"""What the environment's statistics of a decision still hold once it is over; gradients are dropped."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """What a warm-up did."""

    teacher: str
    decisions: int
    """Transitions stored: they cost as many decisions of the environment."""
    inversion_error: float
    """Largest error of a weight, over all decisions, where the action map could not express the teacher's mixture."""
    mean_inversion_error: float
    """Mean over decisions of each one's largest error."""
    actor_loss_before: float
    """Mean squared error of the actor's action from the teacher's, over all decisions."""
    actor_loss_after: float
    critic_loss_before: float
    """Mean loss over the first tenth of the critic's updates; NaN without any."""
    critic_loss_after: float
    """Mean loss over the other nine tenths."""


def warm_up(
    agent: BaseAlgorithm,
    teacher: str | Mixer,
    *,
    decisions: int,
    actor_steps: int = 1000,
    critic_steps: int = 1000,
    noise: float = 0.1,
    learning_rate: float = 1e-3,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> WarmUp:
    """Let a teacher drive the agent's environment, and pre-train the agent on it.

    Afterwards `agent.learning_starts` is 0, since the teacher's decisions stand in for random ones. The agent's
    count of timesteps is left alone: add the report's `decisions` where cost is compared.

    Args:
        agent: an off-policy agent (td3, ddpg, sac, tqc, or with heads per domain), on a vectorised `MixtureEnv`.
        teacher: name of a mixer, or a mixer, of which every environment gets a copy. It decides, and is shown
            statistics, once per decision of the environment.
        decisions: transitions to collect, over all environments.
        actor_steps: gradient steps of the regression, on minibatches of the agent's `batch_size`.
        critic_steps: gradient steps of the critic.
        noise: standard deviation of Gaussian noise on the actions played and stored; without it a critic sees only
            one action per state and learns nothing of its slope. The regression aims at the actions without noise.
        learning_rate: of the regression (Adam).
        seed: of noise and minibatches.
        options: keyword arguments of a teacher given by name.

    Raises:
        ConfigError: an unknown teacher, one that needs what the environment does not measure or runs made
            beforehand, an on-policy agent, or a number out of range.
    """
    _check(decisions, actor_steps, critic_steps, noise, learning_rate)
    if not isinstance(agent, OffPolicyAlgorithm):
        raise ConfigError(
            f"algo={type(agent).__name__}: must be off-policy, such as td3, ddpg or sac; a warm-up fills a replay "
            f"buffer, which it does not have"
        )
    venv = agent.get_env()
    assert venv is not None
    first = make_mixer(teacher, **dict(options or {})) if isinstance(teacher, str) else teacher
    check_teacher(first, venv)
    rng = np.random.default_rng(seed)
    mixers = [copy.deepcopy(first) for _ in range(venv.num_envs)]
    observations, actions, errors = _drive(agent, venv, mixers, decisions, noise, rng)
    before, after = imitate(agent, observations, actions, actor_steps, learning_rate, rng)
    critic_before, critic_after = train_critic(agent, critic_steps)
    agent.learning_starts = 0
    report = WarmUp(
        teacher=first.name,
        decisions=len(errors),
        inversion_error=float(errors.max()),
        mean_inversion_error=float(errors.mean()),
        actor_loss_before=before,
        actor_loss_after=after,
        critic_loss_before=critic_before,
        critic_loss_after=critic_after,
    )
    _log.info("warm-up: %s", report)
    return report


def _check(decisions: int, actor_steps: int, critic_steps: int, noise: float, learning_rate: float) -> None:
    if decisions < 1:
        raise ConfigError(f"decisions={decisions}: must be at least 1")
    for name, value in (("actor_steps", actor_steps), ("critic_steps", critic_steps), ("noise", noise)):
        if not value >= 0:
            raise ConfigError(f"{name}={value}: must be at least 0")
    if not learning_rate > 0:
        raise ConfigError(f"learning_rate={learning_rate}: must be positive")


def check_teacher(mixer: Mixer, venv: VecEnv) -> None:
    """Refuse a teacher that the environments cannot show what it needs.

    Raises:
        ConfigError: which need, and what to do.
    """
    trainer: Trainer = venv.get_attr("trainer")[0]
    given = KEPT & trainer.measure
    if missing := sorted(mixer.needs - given):
        raise ConfigError(
            f"teacher={mixer.name}: needs {', '.join(missing)}; this environment measures and keeps only "
            f"{', '.join(sorted(given)) or 'nothing'}; choose another teacher, such as uniform, or, for losses, add "
            f"'loss' to the environment's fields, for validation 'progress' to its reward"
        )
    if requests := mixer.preparation(trainer.info):
        raise ConfigError(
            f"teacher={mixer.name}: needs runs made beforehand ({', '.join(r.name for r in requests)}); "
            f"make them with the benchmark and pass the mixture that it found as teacher=static"
        )
    if type(mixer).due is not Mixer.due and trainer.info.decision_every > 1:
        raise ConfigError(
            f"teacher={mixer.name}: evaluates at optimiser steps of its own choice; decision_every="
            f"{trainer.info.decision_every} must be 1 for it; choose another teacher"
        )
    if mixer.dynamic:
        _last_window(venv, None)


def _last_window(venv: VecEnv, index: int | None) -> StepStats | None:
    """Statistics of an environment's last decision, or only whether the environments keep any (None)."""
    try:
        histories: list[list[StepStats]] = venv.get_attr("_history", index)
    except AttributeError as error:
        raise ConfigError(
            f"env={type(venv.unwrapped).__name__}: keeps no statistics of its decisions, from which a teacher learns; "
            f"use a DummyVecEnv of MixtureEnvs, or a teacher with a fixed mixture"
        ) from error
    return histories[0][-1] if index is not None else None


def _drive(
    agent: OffPolicyAlgorithm, venv: VecEnv, mixers: list[Mixer], decisions: int, noise: float, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], Array]:
    """Observations (D, S), not normalised, the teachers' actions (D, K) without noise, and inversion errors (D,)."""
    assert agent.replay_buffer is not None
    maps: list[ActionMap] = venv.get_attr("action_map")
    agent.policy.set_training_mode(False)
    agent._last_obs = cast(NDArray[Any], venv.reset())
    if agent._vec_normalize_env is not None:
        agent._last_original_obs = agent._vec_normalize_env.get_original_obs()
    for index, mixer in enumerate(mixers):
        start_mixer(mixer, venv, index)
    observations: list[NDArray[np.float32]] = []
    actions: list[NDArray[np.float32]] = []
    errors: list[float] = []
    while len(errors) < decisions:
        inverted = [invert(mixer, action_map) for mixer, action_map in zip(mixers, maps, strict=True)]
        clean = np.array([action for action, _ in inverted])  # (N, K)
        played = np.clip(clean + noise * rng.normal(size=clean.shape), -1, 1).astype(np.float32)  # (N, K)
        observations += list(_current(agent))
        actions += list(clean.astype(np.float32))
        errors += [error for _, error in inverted]
        new_obs, rewards, dones, infos = venv.step(played)
        agent._store_transition(agent.replay_buffer, played, cast(NDArray[Any], new_obs), rewards, dones, infos)
        for index, mixer in enumerate(mixers):
            if dones[index]:
                start_mixer(mixer, venv, index)
            else:
                show_mixer(mixer, venv, index)
    return np.array(observations), np.array(actions), np.array(errors)


def start_mixer(mixer: Mixer, venv: VecEnv, index: int) -> None:
    """Start a teacher on the run of an environment that was just reset."""
    mixer.start(venv.get_attr("trainer", index)[0].info)  # after the reset, which may add to it


def show_mixer(mixer: Mixer, venv: VecEnv, index: int) -> None:
    """Show a teacher what the environment's last decision led to."""
    if mixer.dynamic:
        stats = cast(StepStats, _last_window(venv, index))
        mixer.update(stats if mixer.due(stats.step) else replace(stats, eval_losses=None))


def invert(mixer: Mixer, action_map: ActionMap) -> tuple[Array, float]:
    """The teacher's action (K,), and the largest error of a weight where the map cannot express its mixture."""
    weights = mixer.weights()
    return action_map.action(check_weights(weights, len(weights), f"weights of teacher {mixer.name}"))


def _current(agent: OffPolicyAlgorithm) -> NDArray[np.float32]:
    """The environments' observations (N, S), not normalised."""
    normalised = agent._vec_normalize_env is not None
    return cast(NDArray[np.float32], agent._last_original_obs if normalised else agent._last_obs)


def imitate(
    agent: OffPolicyAlgorithm,
    observations: NDArray[np.float32],
    actions: NDArray[np.float32],
    steps: int,
    learning_rate: float,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Regress the actor on actions (D, K) at observations (D, S), not normalised.

    Returns:
        Mean squared error of the deterministic action before and after.
    """
    venv = agent._vec_normalize_env
    normalised = observations if venv is None else venv.normalize_obs(observations)
    inputs = torch.as_tensor(np.asarray(normalised), device=agent.device)  # (D, S)
    wanted = torch.as_tensor(actions, device=agent.device)  # (D, K)

    def loss(rows: NDArray[np.int64] | slice) -> torch.Tensor:
        return mse_loss(agent.policy._predict(inputs[rows], deterministic=True), wanted[rows])

    with torch.no_grad():
        before = loss(slice(None)).item()
    optimizer = torch.optim.Adam(agent.actor.parameters(), lr=learning_rate)
    agent.policy.set_training_mode(True)
    for _ in range(steps):
        error = loss(rng.integers(len(inputs), size=agent.batch_size))
        optimizer.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()
    agent.policy.set_training_mode(False)
    if isinstance(agent, TD3):
        agent.actor_target.load_state_dict(agent.actor.state_dict())
    with torch.no_grad():
        return before, loss(slice(None)).item()


def train_critic(agent: OffPolicyAlgorithm, steps: int) -> tuple[float, float]:
    """The algorithm's own updates with a frozen actor: mean critic loss over the first tenth, and over the rest."""
    if not hasattr(agent, "_logger"):
        agent._logger = Logger(None, [])  # `learn` makes the proper one
    losses = [float("nan"), float("nan")]
    first = -(-steps // 10)
    with _frozen(agent.actor):
        for part, number in enumerate((first, steps - first)):
            if number:
                agent.train(gradient_steps=number, batch_size=agent.batch_size)
                losses[part] = float(agent.logger.name_to_value["train/critic_loss"])
    return losses[0], losses[1]


@contextmanager
def _frozen(actor: torch.nn.Module) -> Iterator[None]:
    """Without gradients an optimiser skips the actor's parameters: no step, no weight decay, no moments."""
    actor.requires_grad_(False)
    try:
        yield
    finally:
        actor.requires_grad_(True)
