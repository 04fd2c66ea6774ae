"""A policy on trial, without a language model: driving a surrogate, and swept over the bounds of its fields."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from acodm_env.errors import PolicyError
from acodm_env.mixture import Bounds
from acodm_env.observation import FIELDS, Observer
from acodm_env.policy.dense import Policy
from acodm_env.policy.equivariant import EquivariantPolicy
from acodm_env.policy.mixer import PolicyMixer, scaled_interval
from acodm_env.step_stats import Array, StepStats
from acodm_env.support import outside
from acodm_env.surrogate.surface import Surface
from acodm_env.surrogate.trainer import SurrogateTrainer
from acodm_env.trainer import Mixer, RunInfo, Trainer, drive
from acodm_env.wrapper import Lagged

from .baselines import make_mixer

BASELINES = ("uniform", "odm-released-rescaled", "odm-paper-rescaled")
MOST_STEPS = 400
"""Longer runs are played on the surrogate in this many steps, decisions as often as in a target run so short."""
NOMINAL_INITIAL_NATS = float(np.log(50_257))
"""Initial loss of the run that the sweep imagines where no corpus is given: the vocabulary of GPT-2."""
NOMINAL_DOMAINS = (3, 8, 24)
"""Numbers of domains at which a policy for any number of them is swept."""
NOT_FINITE = "its output is not finite"
_DRAWS = 256


@dataclass(frozen=True)
class Played:
    """What a policy did on a surrogate."""

    surface: Surface
    losses: dict[str, Array]
    """(seeds,) final losses in nats, of the policy, its own mean mixture, and the baselines."""
    observations: NDArray[np.float32]
    """(N, D) met by the policy."""
    clipped: Array
    """(N,) share of each observation that was clipped into the bounds of its fields."""


# --- observations and what the policy makes of them ---------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Observations (N, D) and the policy's actions (N, K) and mixtures (N, K) for them."""

    observations: NDArray[np.float32]
    low: NDArray[np.float32]
    """Bounds of the fields (D,)."""
    high: NDArray[np.float32]
    actions: Array
    mixtures: Array


def answer(policy: Policy, observations: NDArray[np.float32], info: RunInfo) -> Answers:
    """Put observations (N, D) of a run to the policy."""
    observer = Observer(info, [name for name, _ in policy.fields], policy.interaction)
    actions = policy.act(observations).astype(np.float64)
    return Answers(observations, observer.low, observer.high, actions, mixtures_of(policy, actions))


def mixtures_of(policy: Policy, actions: Array) -> Array:
    """Mixtures (N, K) of actions (N, K), within the policy's bounds."""
    mixtures: Array = policy.action.weights(actions)
    if policy.bounds != Bounds():
        mixtures = np.stack([policy.bounds.project(mixture) for mixture in mixtures])
    return mixtures


def sweep(policy: Policy, info: RunInfo, rng: np.random.Generator) -> Answers:
    """Observations anywhere within the bounds of the fields, and in their corners."""
    observer = Observer(info, [name for name, _ in policy.fields], policy.interaction)
    inside = rng.uniform(size=(_DRAWS, len(observer.low)))
    corners = rng.integers(0, 2, size=(_DRAWS // 4, len(observer.low)))
    shares = np.concatenate([inside, corners, np.zeros_like(inside[:1]), np.ones_like(inside[:1])])
    observations = (observer.low + shares * (observer.high - observer.low)).astype(np.float32)
    return answer(policy, observations, info)


def plausible_observations(policy: Policy, played: Played | str, rng: np.random.Generator) -> Answers | None:
    """What the policy met on the surrogate; else draws from the statistics it learned with; None without either."""
    if isinstance(played, Played):
        return answer(policy, played.observations, surrogate_run(policy, played.surface).info)
    if isinstance(policy, EquivariantPolicy):
        return None
    info = imagined_runs(policy)[0]
    observer = Observer(info, [name for name, _ in policy.fields], policy.interaction)
    drawn = rng.normal(policy.mean, policy.scale, size=(_DRAWS, len(policy.mean)))
    return answer(policy, np.clip(drawn, observer.low, observer.high).astype(np.float32), info)


def imagined_run(
    policy: Policy,
    domains: tuple[str, ...],
    initial_loss_nats: float,
    *,
    objective: Mapping[str, float] | None = None,
    metric: str = "loss",
) -> RunInfo:
    """A target run with these domains, in which everything that no corpus says is as the policy learned it.

    Args:
        policy: that shall drive it.
        domains: to train on.
        initial_loss_nats: ln(vocabulary).
        objective: weights of the targets, summing to 1; None: as many targets as the policy saw, all alike.
        metric: what the objective averages.
    """
    sizes, pace = dict(policy.fields), _pace(policy)
    number = max(sizes.get("target_loss", 0), sizes.get("delta_target_loss", 0))
    targets = domains if number in (0, len(domains)) else tuple(f"target{index}" for index in range(number))
    return RunInfo(
        domains=domains,
        targets=targets if objective is None else tuple(objective),
        objective=() if objective is None else tuple(objective.values()),
        metric=metric,
        sizes_tokens=(1,) * len(domains),
        batch_size=len(domains),
        sequence_length=1,
        horizon=policy.horizon * pace,
        decision_every=policy.decision_every * pace,
        initial_loss_nats=initial_loss_nats,
        num_layers=max(sizes.get("layer_norm", 0), sizes.get("layer_change", 0)),
        lag=policy.lag,
        gradients=policy.gradients,
    )


def _pace(policy: Policy) -> int:
    """Optimiser steps per step of the run that the policy learned on: the fewest that its training support allows."""
    lowest = (policy.support.get("steps_per_decision") or [None])[0]
    return max(1, math.ceil((lowest or 1) / policy.decision_every))


def imagined_runs(policy: Policy) -> list[RunInfo]:
    """Runs to sweep where no corpus is given: one with the policy's own domains, or several numbers of them."""
    named = [policy.domains] if policy.domains else [_numbered(number) for number in NOMINAL_DOMAINS]
    return [imagined_run(policy, domains, NOMINAL_INITIAL_NATS) for domains in named]


def _numbered(number: int) -> tuple[str, ...]:
    return tuple(f"domain{index}" for index in range(number))


# --- on the surrogate ---------------------------------------------------------------------------------------


def surrogate_run(policy: Policy, surface: Surface) -> Trainer:
    """A run on the surface that the policy can drive, with as many decisions as it learned with.

    Raises:
        PolicyError: the surface has other domains than the policy, or lacks what it reads; says which.
    """
    horizon = min(policy.horizon * _pace(policy), MOST_STEPS)
    run = SurrogateTrainer(surface, horizon=horizon, decision_every=scaled_interval(policy, horizon))
    lacking = [name for name, _ in policy.fields if name in FIELDS and FIELDS[name].needs - run.provides]
    if lacking:
        raise PolicyError(f"no surrogate fits: it reads {', '.join(lacking)}, which no surrogate has")
    if policy.domains and policy.domains != surface.domains:
        raise PolicyError(
            f"no surrogate fits: it is bound to its {len(policy.domains)} domains, "
            f"this surface has {len(surface.domains)} others"
        )
    trainer: Trainer = Lagged(run, policy.lag) if policy.lag else run
    policy.check_fits(trainer.info)
    if reasons := outside(policy.support, trainer.info):
        raise PolicyError(f"no surrogate fits: this one is outside of its training support: {'; '.join(reasons)}")
    return trainer


class _Recorder(PolicyMixer):
    """The policy's mixer, which keeps every observation and the share of it that was clipped."""

    def __init__(self, policy: Policy):
        super().__init__(policy, say=lambda text: None)
        self.seen: list[NDArray[np.float32]] = []
        self.clipped: list[float] = []

    def _decide(self, observation: NDArray[np.float32]) -> None:
        super()._decide(observation)
        if not np.isfinite(self._weights).all():
            raise PolicyError(NOT_FINITE)
        self.seen.append(observation)
        self.clipped.append(self.observer.clipped_frac)


def play(policy: Policy, surface: Surface, seeds: range) -> Played:
    """Drive the surface with the policy, its own mean mixture, and the baselines: same seeds, same noise.

    Raises:
        PolicyError: it does not fit the surface, or gives something that is no number.
    """
    trainer = surrogate_run(policy, surface)
    recorder = _Recorder(policy)
    losses: dict[str, list[float]] = {name: [] for name in ("policy", "own mean", *BASELINES)}
    for seed in seeds:
        history = list(_drive(trainer, recorder, seed))
        mean = np.mean([stats.requested for stats in history], axis=0)
        losses["policy"].append(_objective(trainer))
        mixers = {name: make_mixer(name) for name in BASELINES}
        mixers["own mean"] = make_mixer("static", weights=mean.tolist())
        for name, mixer in mixers.items():
            list(_drive(trainer, mixer, seed))
            losses[name].append(_objective(trainer))
    return Played(
        surface,
        {name: np.array(values) for name, values in losses.items()},
        np.stack(recorder.seen),
        np.array(recorder.clipped),
    )


def _drive(trainer: Trainer, mixer: Mixer, seed: int) -> Iterator[StepStats]:
    trainer.reset(np.random.default_rng(seed))
    mixer.start(trainer.info)
    return drive(trainer, mixer, trainer.info.horizon)


def _objective(trainer: Trainer) -> float:
    return float(trainer.evaluate("validation") @ trainer.info.objective_weights)
