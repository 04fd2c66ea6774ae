"""How long the demo will take on this machine, from a few timed steps of each of its models."""

import time
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from acodm_env.corpus import TokenStore
from acodm_env.experiments.train import TrainConfig
from acodm_env.experiments.transfer import TransferConfig

if TYPE_CHECKING:
    from acodm_env.pretrain.config import LMConfig

_STEPS = 4


def forecast_seconds(learning: TrainConfig, target: TransferConfig, num_runs: int, store: TokenStore) -> float:
    """Seconds of learning and of `num_runs` target runs, started from nothing."""
    from acodm_env.pretrain.config import LMConfig

    sizes = {"batch_size": learning.batch_size, "sequence_length": learning.sequence_length}
    step, evaluation = _time(LMConfig(model=learning.proxy, **sizes), store, frozenset({"gram", "layers"}))
    evaluations = -(-learning.episodes // learning.evaluate_every) if learning.evaluate_every else 1
    episode = learning.episode_steps * step + evaluation
    proxy_seconds = (learning.episodes + evaluations) * episode
    sizes = {"batch_size": target.batch_size, "sequence_length": target.sequence_length}
    step, evaluation = _time(LMConfig(model=target.target, **sizes), store, frozenset())
    return proxy_seconds + num_runs * (target.steps * step + target.evaluations * evaluation)


def _time(config: "LMConfig", store: TokenStore, measure: frozenset[str]) -> tuple[float, float]:
    """Median seconds of a step and of an evaluation, the first of each left out."""
    from acodm_env.pretrain.trainer import LMTrainer

    trainer = LMTrainer(config, store)
    trainer.measure = measure
    trainer.reset(np.random.default_rng(0))
    uniform = np.full(len(store.domains), 1 / len(store.domains))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_STEPS):
        started = time.perf_counter()
        trainer.step(uniform)
        between = time.perf_counter()
        trainer.evaluate("validation")
        times[0].append(between - started)
        times[1].append(time.perf_counter() - between)
    return median(times[0][1:]), median(times[1][1:])
