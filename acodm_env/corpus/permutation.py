"""In which order a domain's sequences are drawn: any stretch of it, at any size, without holding all of it.

Every epoch is a fresh permutation, a pure function of (seed, stream, epoch, size). Up to `MAX_TABLE` sequences it is
numpy's own, as a table. Beyond, it is a bijection that is evaluated where it is wanted: a Feistel network on the pairs
of a near-square grid a×b ≥ size (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"), repeated on the few
results outside ("cycle walking"; at most a − 1 of a·b are).
"""

from math import isqrt

import numpy as np
from numpy.typing import NDArray

MAX_TABLE = 1 << 20
"""Sequences up to which an epoch's order is a table: at most 8 MiB a domain."""
BLOCK = 1024
"""Positions that are worked out at a time beyond it: a call costs the same for one as for hundreds."""
ROUNDS = 8


class Order:
    """The order of one domain, all epochs after one another."""

    def __init__(self, size: int, seed: int, stream: int):
        """Take the number of sequences of an epoch, the run's seed and the domain's own number in it."""
        self.size, self.seed, self.stream = size, seed, stream
        self._step = size if size <= MAX_TABLE else BLOCK
        self._known: tuple[int, int] | None = None  # (epoch, number) of the block at hand
        self._block: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """Indices (count,) of the sequences from the `start`-th on, counted from the first epoch's first."""
        parts = [np.empty(0, dtype=np.int64)] if count < 1 else []
        while count > 0:
            epoch, position = divmod(start, self.size)
            number, begin = divmod(position, self._step)
            if self._known != (epoch, number):
                self._block, self._known = self._work_out(epoch, number), (epoch, number)
            part = self._block[begin : begin + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _work_out(self, epoch: int, number: int) -> NDArray[np.int64]:
        rng = np.random.default_rng([self.seed, self.stream, epoch])
        if self.size <= MAX_TABLE:
            return rng.permutation(self.size)
        keys = rng.integers(0, 1 << 64, size=ROUNDS, dtype=np.uint64)
        begin = number * BLOCK
        return scatter(np.arange(begin, min(begin + BLOCK, self.size), dtype=np.int64), self.size, keys)


def scatter(positions: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of range(size) puts `positions` (n,), each below `size`; (n,).

    Args:
        positions: what is moved.
        size: numbers that are permuted, 1 … 2^62.
        keys: (rounds,) random numbers that select the permutation.
    """
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)  # rows · columns ≥ size, by less than `rows`
    places = _encipher(positions.astype(np.uint64), rows, columns, keys)
    while len(outside := np.flatnonzero(places >= size)):
        places[outside] = _encipher(places[outside], rows, columns, keys)
    return places.astype(np.int64)


def _encipher(values: NDArray[np.uint64], rows: int, columns: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The Feistel network: by turns row and column are shifted by a hash of the other one, which can be undone."""
    moduli = np.array([rows, columns], dtype=np.uint64)
    pair = list(np.divmod(values, moduli[1]))
    for turn, key in enumerate(keys):
        side = turn % 2
        pair[side] = (pair[side] + _hash(pair[1 - side] + key) % moduli[side]) % moduli[side]
    together: NDArray[np.uint64] = pair[0] * moduli[1] + pair[1]
    return together


def _hash(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each 64-bit number scrambled: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
