"""What could be reached: the best static mixture and the best schedule, by descent through the surrogate's dynamics.

Mixtures are softmaxes of logits, the objective is the mean final loss, its gradient comes from torch through
`dynamics`, the code that the environments run. Without repetition the final losses are convex in the mixture of every
step (memory is linear in them, u^(−p) convex and falling), so descent finds the optimum; with it a few starts help.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from acodm_env.step_stats import Array
from acodm_env.surrogate.dynamics import Parameters, learn, losses
from acodm_env.surrogate.trainer import SurrogateTrainer


@dataclass(frozen=True)
class Optimum:
    """A mixture, or one per step, and the objective at the end of a run under it."""

    weights: Array
    """(…, K) static, or (horizon, …, K)."""
    objective: Array
    """(…) mean final loss, nats."""


def best_static(runs: SurrogateTrainer, iterations: int = 400, shared: bool = False) -> Optimum:
    """The best static mixture of every run's surface, or one for all of them.

    Args:
        runs: their surfaces are those drawn at the last reset; nothing of it is changed.
        iterations: gradient steps.
        shared: one mixture (K,) that is best on average, for all surfaces of the batch.
    """
    return _descend(runs, 1, iterations, shared)


def best_schedule(runs: SurrogateTrainer, iterations: int = 400) -> Optimum:
    """The best mixture of every step: weights (horizon, …, K)."""
    return _descend(runs, runs.info.horizon, iterations, shared=False)


def final_objective(runs: SurrogateTrainer, weights: Array) -> Array:
    """(…) mean final loss, nats, of a static mixture (…, K) or of a schedule (horizon, …, K) on the runs' surfaces."""
    again, horizon = runs.again(), runs.info.horizon
    schedule = weights if weights.ndim == len(runs.batch) + 2 else np.broadcast_to(weights, (horizon, *weights.shape))
    for mixture in schedule:
        again.step(np.broadcast_to(mixture, runs.mask.shape))
    objective: Array = (again.evaluate("test") * again.target_weights).sum(-1)
    return objective


def _descend(runs: SurrogateTrainer, num_mixtures: int, iterations: int, shared: bool) -> Optimum:
    import torch

    def tensor(array: Any) -> torch.Tensor:
        return torch.as_tensor(np.array(array, dtype=np.float64))

    law = Parameters(**{f.name: tensor(getattr(runs.law, f.name)) for f in fields(Parameters)})
    mask, target_weights = tensor(runs.mask), tensor(runs.target_weights)
    length, horizon = tensor(runs.length), runs.info.horizon
    hidden = torch.where(mask > 0, 0.0, -torch.inf)
    shape = mask.shape[-1:] if shared else mask.shape
    logits = torch.zeros((num_mixtures, *shape), dtype=torch.float64, requires_grad=True)

    def objectives() -> torch.Tensor:
        mixtures = torch.softmax(logits + hidden, dim=-1)  # (1 or horizon, …, K)
        memory = epochs = torch.zeros_like(mask)
        for step in range(horizon):
            weights = mixtures[min(step, num_mixtures - 1)].expand(mask.shape)
            memory, epochs = learn(law, memory, epochs, weights, length / horizon, torch)
        objective: torch.Tensor = (losses(law, memory, length, torch) * target_weights).sum(-1)
        return objective

    optimiser = torch.optim.Adam([logits], lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations, eta_min=0.002)
    for _ in range(iterations):
        optimiser.zero_grad()
        objectives().sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    weights = torch.softmax(logits.detach() + hidden, dim=-1).numpy()
    best: Array = weights[0] if num_mixtures == 1 else weights
    if shared:
        best = best.reshape(shape)
    reached = final_objective(runs, np.broadcast_to(best, runs.mask.shape) if num_mixtures == 1 else best)
    return Optimum(best, reached)
