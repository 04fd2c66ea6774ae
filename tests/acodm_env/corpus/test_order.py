"""Every epoch is a permutation, whatever part of it is asked for, and looks like a random one."""

import tracemalloc
from bisect import bisect_left

import numpy as np
import pytest
from scipy.stats import chi2, spearmanr

from acodm_env.corpus.permutation import BLOCK, MAX_TABLE, ROUNDS, Order, scatter

LARGE = MAX_TABLE + 12_345


def keys_of(seed):
    return np.random.default_rng(seed).integers(0, 1 << 64, size=ROUNDS, dtype=np.uint64)


def scatter_by_hand(position, size, keys):
    """The definition with Python's integers."""
    rows = bisect_left(range(2**31 + 1), size, key=lambda n: n * n)
    columns = -(-size // rows)
    while True:
        pair = list(divmod(position, columns))
        for turn, key in enumerate(keys.tolist()):
            side = turn % 2
            z = (pair[1 - side] + key) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            modulus = (rows, columns)[side]
            pair[side] = (pair[side] + (z ^ (z >> 31)) % modulus) % modulus
        position = pair[0] * columns + pair[1]
        if position < size:
            return position


@pytest.mark.parametrize("sizes", [range(1, 400), [2**12 - 1, 2**12, 2**12 + 1, 99_991, 2**20 + 7]])
def test_it_is_a_bijection(sizes):
    for size in sizes:
        places = scatter(np.arange(size), size, keys_of(size))
        assert (np.bincount(places, minlength=size) == 1).all()


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 10**6, 10**12 + 39, 2**62])
def test_it_equals_its_definition_at_any_size(size):
    keys = keys_of(1)
    positions = np.unique(np.random.default_rng(0).integers(0, size, size=20))
    assert scatter(positions, size, keys).tolist() == [scatter_by_hand(x, size, keys) for x in positions.tolist()]


def test_places_are_uniform_and_independent():
    """Over many keys a position lands anywhere; under one key neighbours and far positions are unrelated."""
    size, num_keys, positions = 101, 4000, np.array([0, 1, 50, 100])
    places = np.array([scatter(positions, size, keys_of(seed)) for seed in range(num_keys)])  # (keys, 4)
    limit = chi2.ppf(1 - 1e-6, size - 1)
    for column in range(len(positions)):
        counts = np.bincount(places[:, column], minlength=size)
        assert ((counts - num_keys / size) ** 2 / (num_keys / size)).sum() < limit
        differences = np.bincount((places[:, column] - places[:, column - 1]) % size, minlength=size)[1:]
        expected = num_keys / (size - 1)
        assert ((differences - expected) ** 2 / expected).sum() < limit
    one = scatter(np.arange(100_000), 10**9, keys_of(0))
    cells = np.histogram2d(one[:-1], one[1:], bins=16, range=[[0, 1e9], [0, 1e9]])[0]
    expected = (len(one) - 1) / 256
    assert ((cells - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-6, 255)
    assert abs(spearmanr(np.arange(len(one)), one).statistic) < 0.02


@pytest.mark.parametrize("size", [1, 5, 1000, LARGE])
def test_any_stretch_is_part_of_the_same_order(size):
    order = Order(size, seed=3, stream=1)
    start = max(2 * size - 1500, 0)
    whole = order.take(start, 3000)
    rng = np.random.default_rng(0)
    for _ in range(20):
        begin, end = np.sort(rng.integers(0, 3001, size=2)).tolist()
        assert (Order(size, seed=3, stream=1).take(start + begin, end - begin) == whole[begin:end]).all()


def test_small_epochs_are_numpys_permutations():
    taken = Order(50, seed=3, stream=2).take(0, 100)
    assert taken.tolist() == [x for epoch in (0, 1) for x in np.random.default_rng([3, 2, epoch]).permutation(50)]


def test_a_large_epoch_holds_every_sequence_once_and_the_next_one_is_another():
    order = Order(LARGE, seed=0, stream=0)
    first = np.concatenate([order.take(start, min(5000, LARGE - start)) for start in range(0, LARGE, 5000)])
    assert (np.bincount(first, minlength=LARGE) == 1).all()
    second = order.take(LARGE, 5000)
    assert len(np.unique(second)) == 5000
    assert (second != first[:5000]).mean() > 0.99
    assert (Order(LARGE, seed=0, stream=1).take(0, 5000) != first[:5000]).mean() > 0.99
    assert (Order(LARGE, seed=1, stream=0).take(0, 5000) != first[:5000]).mean() > 0.99


def test_memory_does_not_grow_with_the_domain():
    tracemalloc.start()
    order = Order(10**9, seed=0, stream=0)
    for start in range(0, 10**9, 10**8):
        order.take(start, 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * BLOCK * 8
