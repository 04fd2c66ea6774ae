"""Mixers on surfaces: a run with everything that a method asks for before it, in milliseconds."""

from dataclasses import dataclass

import numpy as np

from acodm_env.agents.baselines import make_mixer
from acodm_env.policy.mixer import PolicyMixer, scaled_interval
from acodm_env.step_stats import Array
from acodm_env.surrogate.surface import Surface
from acodm_env.surrogate.trainer import SurrogateTrainer
from acodm_env.trainer import Mixer, RunRequest, RunResult, Trainer, drive
from acodm_env.watching import Watched, held_out_curve, watched_steps
from acodm_env.wrapper import Lagged


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Length of a run and of its decisions, and how noisy it is."""

    steps: int = 200
    """Steps of the run; a baseline may change its mixture at every one."""
    steps_per_action: int = 5
    """Steps per decision of an agent or policy."""
    noise: float = 1.0
    """Factor on the observation noise."""
    lag: int = 0
    """Steps by which a mixture takes effect late."""


@dataclass(frozen=True)
class Play:
    """How a run ended."""

    objective: float
    """Mean final loss, nats."""
    mixture: Array
    """(K,) time average of the mixture."""


def play(mixer: Mixer, surface: Surface, conditions: Conditions, seed: int) -> Play:
    """Run `mixer` on `surface`, after the runs that it asks for, and judge the end without noise.

    Args:
        mixer: fresh or used; it is started anew.
        surface: where.
        conditions: how long, how noisy.
        seed: of the noise and of the preparatory runs.
    """
    runs = _runs(surface, conditions, mixer)
    trainer: Trainer = Lagged(runs, conditions.lag) if conditions.lag else runs
    mixer.prepare(_preparation(mixer, surface, conditions, seed))
    trainer.reset(np.random.default_rng(seed))
    mixer.start(trainer.info)
    mixtures = [stats.requested for stats in drive(trainer, mixer, conditions.steps)]
    return Play(float(runs.evaluate("test") @ runs.target_weights), np.mean(mixtures, axis=0))


def _runs(surface: Surface, conditions: Conditions, mixer: Mixer, reference: Array | None = None) -> SurrogateTrainer:
    """Runs for a mixer: a policy brings its own interval."""
    interval = conditions.steps_per_action
    if isinstance(mixer, PolicyMixer):
        interval = scaled_interval(mixer.policy, conditions.steps)
    return SurrogateTrainer(
        surface,
        horizon=conditions.steps,
        decision_every=interval,
        noise=conditions.noise,
        reference=reference,
    )


def _preparation(mixer: Mixer, surface: Surface, conditions: Conditions, seed: int) -> dict[str, RunResult]:
    """Results of the runs that a method needs first; a proxy is the surface itself."""
    results: dict[str, RunResult] = {}
    models: dict[str, Array] = {}
    for index, request in enumerate(mixer.preparation(_runs(surface, conditions, mixer).info)):
        reference = models[request.reference] if request.reference else None
        driver = make_mixer(request.mixer, **dict(request.options))
        runs = _runs(surface, conditions, driver, reference)
        runs.reset(np.random.default_rng([seed, index]))
        results[request.name] = _result(request, driver, runs)
        models[request.name] = runs.training_losses()
    return results


def _result(request: RunRequest, mixer: Mixer, runs: SurrogateTrainer) -> RunResult:
    if request.evaluate_at:
        mixer = Watched(mixer, watched_steps(request))
    initial = runs.evaluate("validation")
    mixer.start(runs.info)
    steps = list(drive(runs, mixer, request.steps))
    final = runs.evaluate("validation")
    return RunResult(
        mixture=np.mean([stats.effective for stats in steps], axis=0),
        initial_losses=initial,
        final_losses=final,
        **held_out_curve(request, {stats.step: stats.eval_losses for stats in steps}, final),
    )


def require_fit(mixer: Mixer, surface: Surface) -> None:
    """Refuse a mixer that does not run on a surface; it is tried for one step.

    Raises:
        ConfigError: it does not; says why.
    """
    conditions = Conditions(steps=4, steps_per_action=1)
    runs = _runs(surface, conditions, mixer)
    if not list(mixer.preparation(runs.info)):
        runs.reset(np.random.default_rng(0))
        mixer.start(runs.info)
        next(drive(runs, mixer, 1))
