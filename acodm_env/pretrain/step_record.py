"""What one optimiser step showed: losses by domain over its micro-batches and processes, and where its time went."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from acodm_env.corpus.sampler import Batch
from acodm_env.pretrain.distributed import Ranks
from acodm_env.pretrain.heldout import divide
from acodm_env.step_stats import Array, StepStats


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Losses of the whole batch, in nats."""

    loss: float
    """Mean over all tokens."""
    losses: Array
    """Mean by domain (K,); NaN where none was drawn."""
    excess: Array | None
    """The same of what exceeds a reference model's losses, if measured."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""


class StepRecord:
    """Collects one step on one process; nothing waits for the device before `reduce`."""

    def __init__(self, num_domains: int):
        self.num_domains = num_domains
        self.seconds: dict[str, float] = {}
        self._domains: list[NDArray[np.int64]] = []
        self._objectives: list[torch.Tensor] = []
        self._rows: list[torch.Tensor] = []
        self._excess: list[torch.Tensor] = []

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the block's wall clock to a part's; on CUDA it holds what the block waits for, not what it queues."""
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def add(self, domains: NDArray[np.int64], objective: torch.Tensor, rows: torch.Tensor) -> None:
        """Take in a micro-batch: its part of this process's mean loss, and its rows' mean losses (B,)."""
        self._domains.append(domains)
        self._objectives.append(objective)
        self._rows.append(rows)

    def add_excess(self, rows: torch.Tensor) -> None:
        """Take in the micro-batch's mean excess losses (B,)."""
        self._excess.append(rows)

    def reduce(self, grad_norm: torch.Tensor, counts: NDArray[np.int64], ranks: Ranks) -> Measured:
        """Losses over all micro-batches and processes: one transfer from the device, one exchange.

        Args:
            grad_norm: of the whole gradient, the same on all processes.
            counts: sequences per domain (K,) of all processes.
            ranks: the processes.
        """
        objective = torch.stack(self._objectives).double().sum()
        parts = [grad_norm.double().view(1), objective.view(1), *(rows.double() for rows in self._rows + self._excess)]
        values = torch.cat(parts).cpu().numpy()
        domains = np.concatenate(self._domains)
        kinds = values[2:].reshape(-1, len(domains))  # losses and, if measured, excess losses
        sums = [np.bincount(domains, rows, minlength=self.num_domains) for rows in kinds]
        total = ranks.sum(np.concatenate([values[1:2], *sums]))
        means = [divide(part, counts) for part in total[1:].reshape(len(kinds), -1)]
        return Measured(
            loss=float(total[0]) / ranks.world,
            losses=means[0],
            excess=means[1] if len(means) > 1 else None,
            grad_norm=float(values[0]),
        )


def halves(batch: Batch) -> NDArray[np.int64]:
    """Sequences of the whole batch by domain and half (K, 2): its first, third, … since the start, and the others."""
    before = batch.drawn - batch.counts
    even = (batch.drawn + 1) // 2 - (before + 1) // 2
    return np.stack([even, batch.counts - even], axis=1)


def skipped(stats: StepStats) -> StepStats:
    """A step that was not applied, for those who go on: what is not finite counts as not measured."""
    finite = np.isfinite(stats.losses)
    tokens = np.where(finite, stats.loss_tokens, 0.0)
    losses = np.where(finite, stats.losses, np.nan)
    return replace(
        stats,
        skipped=1,
        losses=losses,
        loss_tokens=tokens,
        loss=float(losses[finite] @ tokens[finite] / tokens.sum()) if tokens.any() else float("nan"),
        excess_losses=None if stats.excess_losses is None else np.where(finite, stats.excess_losses, np.nan),
        gradients=None,
    )
