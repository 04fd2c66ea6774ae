"""A trainer of pure arithmetic with a known best mixture: what an agent must be able to find."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import RunInfo


class ToyGradients:
    """Additive gradient sums (K, P) whose Gram matrix is exact."""

    def __init__(self, sums: Array, counts: Array):
        self.sums, self.counts = sums, counts

    def __add__(self, other: "ToyGradients") -> "ToyGradients":
        return ToyGradients(self.sums + other.sums, self.counts + other.counts)

    def gram(self) -> tuple[Array, Array]:
        means = self.sums / np.maximum(self.counts, 1)[:, None]
        return means @ means.T, np.zeros(len(means))


class ToyTrainer:
    """Held-out loss falls by 0.1·(1 − ‖w − best‖²) a step; training losses are fixed per domain."""

    provides = frozenset({"losses", "gram", "layers", "validation"})

    def __init__(self, best: tuple[float, ...], horizon: int = 20, decision_every: int = 1, diverge_at: int = 0):
        num_domains = len(best)
        names = tuple(f"domain{i}" for i in range(num_domains))
        self.best = np.array(best)
        self.diverge_at = diverge_at
        self.measure: frozenset[str] = frozenset()
        self.info = RunInfo(
            domains=names,
            targets=names,
            sizes_tokens=(1000,) * num_domains,
            batch_size=64,
            sequence_length=5,
            horizon=horizon,
            decision_every=decision_every,
            initial_loss_nats=5.0,
            num_layers=3,
            initial_layer_norms=(0.1, 0.1, 0.1),
        )
        self.steps_done = 0

    def reset(self, rng: np.random.Generator) -> None:
        self.offset = float(rng.uniform(0, 0.01))
        self.gradients = rng.normal(size=(self.info.num_domains, 4))
        self.objective = 5.0
        self.drawn = np.zeros(self.info.num_domains)
        self.steps_done = 0

    def step(self, weights: Array, loss_weights: Array | None = None) -> StepStats:
        self.steps_done += 1
        counts = np.asarray(weights) * 10
        self.drawn = self.drawn + counts
        self.objective -= 0.1 * (1 - float(((weights - self.best) ** 2).sum()))
        diverged = self.steps_done == self.diverge_at
        losses = np.arange(1.0, 1 + self.info.num_domains) + self.offset
        return StepStats(
            step=self.steps_done,
            tokens=self.steps_done * 50,
            requested=np.asarray(weights),
            realised=counts / 10,
            counts=counts,
            loss_tokens=counts * 4,
            losses=np.where(counts > 0, np.nan if diverged else losses, np.nan),
            epochs=self.drawn / 200,
            drawn=self.drawn,
            gradients=ToyGradients(self.gradients * counts[:, None], counts) if "gram" in self.measure else None,
            layer_norms=np.full(3, 0.1),
            layer_changes=np.full(3, 0.01),
            loss=float("nan") if diverged else float(losses @ counts / 10),
            grad_norm=1.0,
            lr=1e-3,
            diverged=diverged,
        )

    def evaluate(self, split: str) -> Array:
        return np.full(self.info.num_domains, self.objective)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.steps_done,
            "objective": self.objective,
            "drawn": self.drawn,
            "offset": self.offset,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps_done = int(state["step"])
        self.objective, self.offset = float(state["objective"]), float(state["offset"])
        self.drawn = np.asarray(state["drawn"])
