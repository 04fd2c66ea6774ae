"""`MixtureSampler`: a mixture in, a batch out, immediately, in time that does not depend on the corpus' size.

A batch is a pure function of (seed, cursors, carry, weights): a domain's sequences come in the order that its stream
fixes (`corpus.order`), so the state is a cursor per domain. The rows of several processes are parts of one batch: how
many processes there are is no part of the state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acodm_env.corpus.permutation import Order
from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError, DataError
from acodm_env.mixture import Composer
from acodm_env.step_stats import Array

_ALL = slice(None)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of one optimiser step, sorted by domain: the rows of one process, and what all of them share."""

    tokens: NDArray[np.int64]
    """Token ids (B, T) of this process's rows."""
    domains: NDArray[np.int64]
    """Index of each row's domain (B,), ascending as drawn."""
    nth: NDArray[np.int64]
    """Sequences drawn from its domain before each row (B,), since the start, by all processes."""
    counts: NDArray[np.int64]
    """Rows per domain (K,), of all processes."""
    drawn: NDArray[np.int64]
    """Sequences drawn per domain (K,) since the start by all processes, this batch included."""
    weights: Array
    """Mixture (K,) that composed it."""
    decision: int
    """Which mixture that was: calls of `draw` before the one that gave it; −1 where none did."""

    def rows(self, index: Any) -> "Batch":
        """Some of its rows, such as a micro-batch; what concerns all processes stays.

        Args:
            index: slice, mask or indices.
        """
        return replace(self, tokens=self.tokens[index], domains=self.domains[index], nth=self.nth[index])


class MixtureSampler:
    """Draws batches under a mixture, without replacement until a domain's epoch ends; then it is reshuffled."""

    def __init__(self, store: TokenStore, split: str, batch_size: int, sequence_length: int, seed: int):
        """Start at the beginning of every domain's first epoch.

        Args:
            store: the corpus.
            split: "train", "validation" or "test".
            batch_size: sequences per batch, B, of all processes together.
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
        self.store, self.split = store, split
        self.batch_size, self.sequence_length, self.seed = batch_size, sequence_length, seed
        self.sizes: NDArray[np.int64] = np.array(store.num_sequences(split, sequence_length), dtype=np.int64)
        """Whole sequences per domain (K,)."""
        self._digests = [store.domain_digest(name) for name in store.domains]
        self._composer = Composer(len(store.domains))
        self._draws = 0
        self._next_stream = len(store.domains)  # where the numbers of domains that are added begin
        self._start(list(range(len(store.domains))), [0] * len(store.domains))

    def _start(self, streams: list[int], cursors: list[int]) -> None:
        self._streams = streams  # the domains' numbers in the seeds of their orders
        self._cursors = cursors  # sequences drawn since the start, all epochs
        self._orders = [Order(int(size), self.seed, stream) for size, stream in zip(self.sizes, streams, strict=True)]

    def draw(self, weights: Array, *, rows: slice = _ALL) -> Batch:
        """The next batch.

        Args:
            weights: mixture (K,).
            rows: which of the batch's rows are read and returned: process r of n takes slice(r, None, n).

        Raises:
            ConfigError: the weights are no mixture.
        """
        before = self._composer.state_dict()
        try:
            counts = self._composer.compose(weights, self.batch_size)  # (K,)
            tokens, nth = self._read(counts, np.arange(self.batch_size)[rows])
        except BaseException:  # also when interrupted: a checkpoint written after that must not have lost a batch
            self._composer.load_state_dict(before)
            raise
        self._cursors = [cursor + count for cursor, count in zip(self._cursors, counts.tolist(), strict=True)]
        self._draws += 1
        return Batch(
            tokens=tokens,
            domains=np.repeat(np.arange(len(counts)), counts)[rows],
            nth=nth,
            counts=counts,
            drawn=self.drawn,
            weights=np.array(weights, dtype=np.float64),
            decision=self._draws - 1,
        )

    def _read(self, counts: NDArray[np.int64], mine: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids (B, T) of the rows `mine` (B,) of a batch of `counts` (K,), and their places in their domains."""
        tokens = np.empty((len(mine), self.sequence_length), dtype=np.int64)  # (B, T)
        nth = np.empty(len(mine), dtype=np.int64)  # (B,)
        ends = np.cumsum(counts)  # (K,)
        edges = np.searchsorted(mine, ends).tolist()
        begin = 0
        for domain, (count, end, edge) in enumerate(zip(counts.tolist(), ends.tolist(), edges, strict=True)):
            if edge > begin:
                places = mine[begin:edge] - (end - count)  # among this domain's rows of the batch
                indices = self._orders[domain].take(self._cursors[domain], count)[places]
                tokens[begin:edge] = self.store.sequences(self.split, domain, indices, self.sequence_length)
                nth[begin:edge] = places + self._cursors[domain]
            begin = edge
        return tokens, nth

    @property
    def drawn(self) -> NDArray[np.int64]:
        """Sequences drawn per domain (K,) since the start."""
        return np.array(self._cursors, dtype=np.int64)

    @property
    def epochs(self) -> Array:
        """Passes over each domain (K,) since the start, as a fraction."""
        passes: Array = self.drawn / self.sizes.astype(np.float64)
        return passes

    def state_dict(self) -> dict[str, Any]:
        """Seed, position and carry; domains, sizes and digests guard against another corpus."""
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "domains": list(self.store.domains),
            "sizes": self.sizes.tolist(),
            "digests": list(self._digests),
            "streams": list(self._streams),
            "next_stream": self._next_stream,
            "cursors": list(self._cursors),
            "draws": self._draws,
            "composer": self._composer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], adapt: bool = False) -> None:
        """Go on exactly from `state_dict`'s value, its seed included.

        Args:
            state: what `state_dict` gave.
            adapt: let the domains differ. Those that stay go on where they were, what they were owed included, and
                neither repeat nor skip a sequence; new ones begin with an order of their own; the others go.

        Raises:
            DataError: a domain's content differs, or the domains do and `adapt` was not given; names them.
        """
        self._check(state, adapt)
        before = {name: index for index, name in enumerate(state["domains"])}
        sources = [before.get(name) for name in self.store.domains]
        fresh = iter(range(int(state["next_stream"]), int(state["next_stream"]) + len(sources)))
        carry = np.array(state["composer"]["carry"], dtype=np.float64)
        self.seed = int(state["seed"])
        self._draws = int(state["draws"])
        self._composer.carry = np.array([0.0 if source is None else carry[source] for source in sources])
        self._start(
            [next(fresh) if source is None else int(state["streams"][source]) for source in sources],
            [0 if source is None else int(state["cursors"][source]) for source in sources],
        )
        self._next_stream = next(fresh, int(state["next_stream"]) + len(sources))

    def _check(self, state: Mapping[str, Any], adapt: bool) -> None:
        """Refuse another content of a domain; without `adapt` other domains too."""
        if int(state["sequence_length"]) != self.sequence_length:
            raise DataError(
                f"sequence_length={self.sequence_length}: must be {state['sequence_length']} tokens; the checkpoint "
                f"was made with another sequence length; use that again"
            )
        here, there = list(self.store.domains), list(state["domains"])
        known = dict(zip(there, zip(state["sizes"], state["digests"], strict=True), strict=True))
        for name, size, digest in zip(here, self.sizes.tolist(), self._digests, strict=True):
            if name in known and known[name] != (size, digest):
                raise DataError(
                    f"domain={name}: must hold what it held when the checkpoint was made, {known[name][0]} sequences "
                    f"with digest {known[name][1][:12]}…; it holds {size} with {digest[:12]}…; use that corpus again, "
                    f"or give the changed domain another name and resume with --adapt"
                )
        if here != there and not adapt:
            added, gone = [name for name in here if name not in known], [name for name in there if name not in here]
            detail = "; ".join(
                f"{what}: {', '.join(names)}" for what, names in (("added", added), ("removed", gone)) if names
            )
            raise DataError(
                f"domains={','.join(here)}: must be {','.join(there)}, as in the checkpoint; "
                f"{detail or 'they were reordered'}; use that corpus again, or go on with these by --adapt"
            )


def heldout(
    store: TokenStore, split: str, sequence_length: int, per_domain: int | Sequence[int], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The fixed sequences of a split on which every evaluation of a run is made.

    Evenly spaced over each domain from a start drawn by `seed`; all of a domain's sequences if it has fewer.
    `per_domain` is one number for all domains, or one for each (K,), of which some may be 0.

    Returns:
        Token ids (N, T) and domain indices (N,), ascending.

    Raises:
        ConfigError: `per_domain` below 1, or no such split.
        DataError: a domain holds fewer tokens than one sequence.
    """
    wanted = [per_domain] * len(store.domains) if isinstance(per_domain, int) else per_domain
    if max(wanted) < 1:
        raise ConfigError(f"per_domain={per_domain}: must be at least 1 sequence")
    tokens, domains = [], []
    for domain, size in enumerate(store.num_sequences(split, sequence_length)):
        count = min(wanted[domain], size)
        start = np.random.default_rng([seed, domain]).random()
        indices = ((np.arange(count) + start) * (size / max(count, 1))).astype(
            np.int64
        )  # (count,), distinct: spacing >= 1
        tokens.append(store.sequences(split, domain, np.minimum(indices, size - 1), sequence_length))
        domains.append(np.full(count, domain, dtype=np.int64))
    return np.concatenate(tokens), np.concatenate(domains)
