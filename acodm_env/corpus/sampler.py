"""`MixtureSampler`: a mixture in, a batch out, immediately.

A batch is a pure function of (seed, cursors, carry, weights): the order of a domain's epoch e is the permutation
seeded by (seed, domain, e), so the state is a cursor per domain.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError, DataError
from acodm_env.mixture import Composer
from acodm_env.trainer import Array


@dataclass(frozen=True)
class Batch:
    """Sequences of one optimiser step, sorted by domain."""

    tokens: NDArray[np.int64]
    """Token ids (B, T)."""
    domains: NDArray[np.int64]
    """Index of each row's domain (B,), ascending as drawn."""
    counts: NDArray[np.int64]
    """Rows per domain (K,)."""


class MixtureSampler:
    """Draws batches under a mixture, without replacement until a domain's epoch ends; then it is reshuffled."""

    def __init__(self, store: TokenStore, split: str, batch_size: int, sequence_length: int, seed: int):
        """Start at the beginning of every domain's first epoch.

        Args:
            store: the corpus.
            split: "train", "validation" or "test".
            batch_size: sequences per batch, B.
            sequence_length: tokens per sequence, T.
            seed: of the order, 0 or more.

        Raises:
            ConfigError: a size below 1, a negative seed, or no such split.
            DataError: a domain holds fewer tokens than one sequence.
        """
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("sequence_length", sequence_length, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{name}={value}: must be at least {least}")
        self.batch_size, self.sequence_length, self.seed = batch_size, sequence_length, seed
        self._sizes = store.num_sequences(split, sequence_length)
        self._windows = [store.windows(split, index, sequence_length) for index in range(len(store.domains))]
        self._composer = Composer(len(store.domains))
        self._cursors = [0] * len(store.domains)  # sequences drawn since the start, all epochs
        self._orders: list[tuple[int, NDArray[np.int64]] | None] = [None] * len(store.domains)

    def draw(self, weights: Array, masked: NDArray[np.bool_] | None = None) -> Batch:
        """The next batch.

        Args:
            weights: mixture (K,).
            masked: bool (K,), domains that get nothing and lose what they were owed; None masks none.

        Raises:
            ConfigError: the weights are no mixture.
        """
        counts = self._composer.compose(weights, self.batch_size, masked)  # (K,)
        tokens = np.empty((self.batch_size, self.sequence_length), dtype=np.int64)  # (B, T)
        start = 0
        for domain, count in enumerate(counts.tolist()):
            if count:
                tokens[start : start + count] = self._windows[domain][self._next(domain, count)]
                start += count
        return Batch(tokens=tokens, domains=np.repeat(np.arange(len(counts)), counts), counts=counts)

    def _next(self, domain: int, count: int) -> NDArray[np.int64]:
        """Indices (count,) of a domain's next sequences; they may span the end of an epoch."""
        size, cursor = self._sizes[domain], self._cursors[domain]
        self._cursors[domain] = cursor + count
        epoch, begin = divmod(cursor, size)
        parts = []
        while count > 0:
            part = self._order(domain, epoch)[begin : begin + count]
            parts.append(part)
            count, epoch, begin = count - len(part), epoch + 1, 0
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _order(self, domain: int, epoch: int) -> NDArray[np.int64]:
        known = self._orders[domain]
        if known is None or known[0] != epoch:
            rng = np.random.default_rng([self.seed, domain, epoch])
            known = (epoch, rng.permutation(self._sizes[domain]))
            self._orders[domain] = known
        return known[1]

    @property
    def drawn(self) -> NDArray[np.int64]:
        """Sequences drawn per domain (K,) since the start."""
        return np.array(self._cursors, dtype=np.int64)

    @property
    def epochs(self) -> Array:
        """Passes over each domain (K,) since the start, as a fraction."""
        passes: Array = self.drawn / np.array(self._sizes, dtype=np.float64)
        return passes

    def state_dict(self) -> dict[str, Any]:
        """Seed, cursors and carry; the sizes guard against another corpus."""
        return {
            "seed": self.seed,
            "cursors": list(self._cursors),
            "sizes": list(self._sizes),
            "composer": self._composer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly from `state_dict`'s value, its seed included.

        Raises:
            DataError: the state belongs to a corpus or sequence length with other numbers of sequences.
        """
        if list(state["sizes"]) != list(self._sizes):
            raise DataError(
                f"sampler.sizes={list(state['sizes'])}: must be {list(self._sizes)} sequences per domain; the "
                f"checkpoint was made on another corpus or with another sequence length; use those again"
            )
        self.seed = int(state["seed"])
        self._cursors = [int(cursor) for cursor in state["cursors"]]
        self._orders = [None] * len(self._sizes)
        self._composer.load_state_dict(state["composer"])


def heldout(
    store: TokenStore, split: str, sequence_length: int, per_domain: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The fixed sequences of a split on which every evaluation of a run is made.

    Evenly spaced over each domain from a start drawn by `seed`; all of a domain's sequences if it has fewer.

    Returns:
        Token ids (N, T) and domain indices (N,), ascending.

    Raises:
        ConfigError: `per_domain` below 1, or no such split.
        DataError: a domain holds fewer tokens than one sequence.
    """
    if per_domain < 1:
        raise ConfigError(f"per_domain={per_domain}: must be at least 1 sequence")
    tokens, domains = [], []
    for domain, size in enumerate(store.num_sequences(split, sequence_length)):
        count = min(per_domain, size)
        start = np.random.default_rng([seed, domain]).random()
        indices = ((np.arange(count) + start) * (size / count)).astype(np.int64)  # (count,), distinct: spacing >= 1
        tokens.append(store.sequences(split, domain, np.minimum(indices, size - 1), sequence_length))
        domains.append(np.full(count, domain, dtype=np.int64))
    return np.concatenate(tokens), np.concatenate(domains)
