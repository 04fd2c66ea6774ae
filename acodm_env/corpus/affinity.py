"""How near domains lie to targets, before anything is trained: what counts of pairs of tokens say of held-out text.

A model of pairs is counted on a sample of each domain's training text and scored on each target's validation text;
the fewer nats, the more a token of that domain is likely to teach the target. It takes about a second a domain and no
language model. The pairs are hashed, so that any vocabulary fits.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from acodm_env.corpus.tokens import TokenStore
from acodm_env.trainer import Array

TOKENS = 150_000
"""Training tokens of each domain that are counted."""
HELD_OUT_TOKENS = 8_000
"""Validation tokens of each target that are scored."""
OWN = 2.0
"""Affinity of a target to itself, and the largest of any other."""
_BUCKETS = 1 << 20
_PRIOR = 5.0  # pairs' counts worth of the single tokens' distribution
_SPREAD = 0.3  # nats: smaller differences are none


@dataclass(frozen=True)
class Affinity:
    """Affinities of domains to targets, computed when they are first asked for."""

    store: TokenStore
    """The domains to train on."""
    targets: TokenStore
    """The held-out targets."""
    sequence_length: int = 128
    """Tokens per sequence."""

    def matrix(self) -> Array:
        """(M, K) from −2 to 2: how much nearer than the other domains each lies to each target; to itself 2."""
        key = (self.store.fingerprint, self.targets.fingerprint, self.sequence_length)
        if key not in _known:
            nats = pair_losses(self.store, self.targets, self.sequence_length)
            own = np.array([[name == target for name in self.store.domains] for target in self.targets.domains])
            _known[key] = standardised(-nats, own)
        return _known[key]


_known: dict[tuple[str, str, int], Array] = {}


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


def pair_losses(store: TokenStore, targets: TokenStore, sequence_length: int) -> Array:
    """(M, K) nats per token of each target's validation text under the pairs of each domain's training text."""
    length = sequence_length
    held_out = [_sample(targets, "validation", index, HELD_OUT_TOKENS, length) for index in range(len(targets.domains))]
    losses = np.empty((len(held_out), len(store.domains)))
    for domain in range(len(store.domains)):
        rows = _sample(store, "train", domain, TOKENS, length)
        single = np.bincount(rows.ravel(), minlength=store.vocab_size).astype(np.float64)
        pairs = np.bincount(_bucket(rows[:, :-1], rows[:, 1:]), minlength=_BUCKETS).astype(np.float64)
        first = np.bincount(rows[:, :-1].ravel(), minlength=store.vocab_size).astype(np.float64)
        base = (single + 0.5) / (single.sum() + 0.5 * store.vocab_size)
        for target, text in enumerate(held_out):
            before, after = text[:, :-1], text[:, 1:]
            alone = base[after].ravel()
            known = first[before].ravel()
            likely = (pairs[_bucket(before, after)] + _PRIOR * alone) / (known + _PRIOR)
            losses[target, domain] = -np.log(np.minimum(likely, 1.0)).mean()
    return losses


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
