"""What counts of pairs of tokens say of a mixture before anything is trained.

Pairs are counted on a sample of each domain's training text and scored on each target's validation text. *Affinity*:
the fewer nats a target costs under the pairs of one domain, the more a token of that domain is likely to teach it.
*Leverage*: the nats by which a domain's own loss falls with its share of all counts; what other domains teach as well
has little. It takes about a second a corpus and no language model. The pairs are hashed, so that any vocabulary fits.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from acodm_env.corpus.tokens import TokenStore
from acodm_env.step_stats import Array

TOKENS = 150_000
"""Training tokens of each domain that are counted."""
HELD_OUT_TOKENS = 8_000
"""Validation tokens of each target that are scored."""
OWN = 2.0
"""Affinity of a target to itself, and the largest of any other."""
_BUCKETS = 1 << 20
_PRIOR = 5.0  # pairs' counts worth of the single tokens' distribution
_SPREAD = 0.3  # nats: smaller differences are none
_STEP = 2.0  # a domain's counts times and over so much, for its leverage


@dataclass(frozen=True)
class Affinity:
    """Affinities of domains to targets and leverages, computed when they are first asked for."""

    store: TokenStore
    """The domains to train on."""
    targets: TokenStore
    """The held-out targets."""
    sequence_length: int = 128
    """Tokens per sequence."""

    def matrix(self) -> Array:
        """(M, K) from −2 to 2: how much nearer than the other domains each lies to each target; to itself 2."""
        return self._both()[0]

    def leverage(self) -> Array:
        """(K,) −∂L/∂ln(share) of every domain by the counts, nats; 0 for one that is no target."""
        return self._both()[1]

    def _both(self) -> tuple[Array, Array]:
        key = (self.store.fingerprint, self.targets.fingerprint, self.sequence_length)
        if key not in _known:
            counts = PairCounts.count(self.store, self.targets, self.sequence_length)
            own = np.array([[name == target for name in self.store.domains] for target in self.targets.domains])
            _known[key] = standardised(-pair_losses(counts), own), leverages(counts, own)
        return _known[key]


_known: dict[tuple[str, str, int], tuple[Array, Array]] = {}


def standardised(closeness: Array, own: NDArray[np.bool_], least: float = _SPREAD) -> Array:
    """(…, M, K) closeness less its mean over the other domains, over their spread, within ±2; 2 for a target's own.

    Args:
        closeness: (…, M, K), larger is nearer.
        own: (…, M, K) where the domain is the target itself; left out of mean and spread.
        least: smallest spread that counts.
    """
    others = ~own
    count = np.maximum(others.sum(-1, keepdims=True), 1)
    mean = np.where(others, closeness, 0.0).sum(-1, keepdims=True) / count
    spread = np.sqrt((np.where(others, closeness - mean, 0.0) ** 2).sum(-1, keepdims=True) / count)
    scaled: Array = np.where(own, OWN, np.clip((closeness - mean) / np.maximum(spread, least), -OWN, OWN))
    return scaled


@dataclass(frozen=True)
class PairCounts:
    """What each domain's training text says of the held-out tokens of each target: counts where they are needed."""

    pairs: list[Array]
    """By target: (K, n) how often each domain has the pair that ends in the token."""
    before: list[Array]
    """Likewise its first token."""
    tokens: list[Array]
    """Likewise the token itself."""
    totals: Array
    """(K,) tokens counted."""
    vocab_size: int

    @classmethod
    def count(cls, store: TokenStore, targets: TokenStore, sequence_length: int) -> Self:
        """Count a sample of every domain, and look up the validation text of every target."""
        numbers = range(len(targets.domains))
        texts = [_sample(targets, "validation", index, HELD_OUT_TOKENS, sequence_length) for index in numbers]
        asked = [(_bucket(text[:, :-1], text[:, 1:]), text[:, :-1].ravel(), text[:, 1:].ravel()) for text in texts]
        found: list[list[list[Array]]] = [[[], [], []] for _ in texts]
        totals = []
        for domain in range(len(store.domains)):
            rows = _sample(store, "train", domain, TOKENS, sequence_length)
            counted = (
                np.bincount(_bucket(rows[:, :-1], rows[:, 1:]), minlength=_BUCKETS),
                np.bincount(rows[:, :-1].ravel(), minlength=store.vocab_size),
                np.bincount(rows.ravel(), minlength=store.vocab_size),
            )
            totals.append(float(rows.size))
            for target, where in enumerate(asked):
                for kind in range(3):
                    found[target][kind].append(counted[kind][where[kind]].astype(np.float64))
        pairs, before, tokens = ([np.stack(each[kind]) for each in found] for kind in range(3))
        return cls(pairs, before, tokens, np.array(totals), store.vocab_size)

    def nats(self, target: int, amounts: Array) -> float:
        """Nats per token of a target under the counts times `amounts` (K,)."""
        total = amounts @ self.totals + 0.5 * self.vocab_size
        alone = (amounts @ self.tokens[target] + 0.5) / total
        likely = (amounts @ self.pairs[target] + _PRIOR * alone) / (amounts @ self.before[target] + _PRIOR)
        return float(-np.log(np.minimum(likely, 1.0)).mean())


def pair_losses(counts: PairCounts) -> Array:
    """(M, K) nats per token of each target's validation text under the pairs of each domain's training text."""
    alone = np.eye(len(counts.totals))
    return np.array([[counts.nats(target, one) for one in alone] for target in range(len(counts.pairs))])


def leverages(counts: PairCounts, own: NDArray[np.bool_]) -> Array:
    """(K,) nats by which a target's loss falls per e-fold of its own share; 0 for a domain that is no target.

    Every domain counts alike, whatever its size, and all of them together always as much.

    Args:
        counts: of the corpus.
        own: (M, K) where the domain is the target.
    """
    even = counts.totals.max() / counts.totals
    values = np.zeros(len(even))
    for target, domain in np.argwhere(own):
        nats = []
        for factor in (_STEP, 1 / _STEP):
            shares = np.where(np.arange(len(even)) == domain, factor, 1.0)
            nats.append(counts.nats(target, even * shares * len(even) / shares.sum()))
        values[domain] = (nats[1] - nats[0]) / (2 * math.log(_STEP))
    return values


def _sample(store: TokenStore, split: str, domain: int, tokens: int, length: int) -> NDArray[np.int64]:
    """Evenly spaced sequences (n, T) of a domain."""
    size = store.num_sequences(split, length)[domain]
    count = min(max(tokens // length, 1), size)
    return store.sequences(split, domain, np.arange(count) * size // count, length)


def _bucket(before: NDArray[np.int64], after: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) hashes of pairs of tokens."""
    mixed = (before * 1_000_003 + after) * 2_654_435_761
    buckets: NDArray[np.int64] = ((mixed >> 12) & (_BUCKETS - 1)).ravel()
    return buckets
