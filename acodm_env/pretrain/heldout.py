"""What a run is judged by: held-out targets, their weights in the objective, and their losses on fixed sequences."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from acodm_env.corpus.sampler import heldout
from acodm_env.corpus.tokens import TokenStore
from acodm_env.objective import normalised
from acodm_env.pretrain.config import LMConfig
from acodm_env.pretrain.distributed import Ranks
from acodm_env.step_stats import Array


def parse_objective(
    objective: Mapping[str, float] | None, store: TokenStore
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Names and normalised weights of the held-out targets; no weights where all count the same.

    Raises:
        ConfigError: an unknown target, a negative weight, or none that is positive.
    """
    return normalised(objective, store.domains) if objective else (store.domains, ())


class HeldOut:
    """The targets' fixed sequences, of which every process evaluates a part."""

    def __init__(self, targets: TokenStore, config: LMConfig, ranks: Ranks):
        """Count the sequences; they are read when they are needed.

        Raises:
            DataError: a target has fewer tokens than one sequence.
        """
        self.targets, self.config, self.ranks = targets, config, ranks
        sizes = [targets.num_sequences(split, config.sequence_length) for split in ("validation", "test")]
        self.num_tokens = sum(min(size, config.eval_sequences) for size in sizes[0]) * config.sequence_length
        """Tokens of one evaluation."""
        self.available = tuple(int(size) for size in sizes[0])
        """Validation sequences (M,)."""
        self._rows: dict[tuple[str, tuple[int, ...]], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @torch.no_grad()
    def losses(
        self,
        split: str,
        token_losses: Callable[[NDArray[np.int64]], torch.Tensor],
        counts: tuple[int, ...] | None = None,
    ) -> Array:
        """Mean token losses in nats (M,); NaN for a target of which nothing is read.

        Args:
            split: "validation" or "test".
            token_losses: of token ids (B, T), (B, T-1) in nats; called equally often on all processes.
            counts: sequences of each target (M,); None: as configured.
        """
        counts = (self.config.eval_sequences,) * len(self.targets.domains) if counts is None else counts
        if not any(counts):
            return np.full(len(counts), np.nan)
        if (split, counts) not in self._rows:
            self._rows[split, counts] = heldout(self.targets, split, self.config.sequence_length, counts, seed=0)
        tokens, targets = self._rows[split, counts]
        world, rank = self.ranks.world, self.ranks.rank
        least = 16 if self.config.accumulation == 1 else 1  # who accumulates has no memory for more
        size = max(self.config.local_batch(world), least)
        padded = -(-len(tokens) // world) * world  # with rows that do not count: processes go in step
        mine = np.arange(rank, padded, world)
        parts = [token_losses(tokens[mine[i : i + size] % len(tokens)]).mean(1) for i in range(0, len(mine), size)]
        rows = torch.cat(parts).double().cpu().numpy()[mine < len(tokens)]
        mine = mine[mine < len(tokens)]
        num_targets = len(self.targets.domains)
        sums = self.ranks.sum(np.bincount(targets[mine], rows, minlength=num_targets).astype(np.float64))
        return divide(sums, np.bincount(targets, minlength=num_targets))


def divide(sums: Array, counts: NDArray[np.int64]) -> Array:
    """Means (K,) from sums and counts; NaN where there is nothing."""
    means: Array = np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    return means
