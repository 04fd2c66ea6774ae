"""Composition, epochs and exact resume."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acodm_env.corpus.sampler import MixtureSampler, heldout
from acodm_env.errors import DataError
from acodm_env.mixture import Composer


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 8, 22]), st.integers(1, 40), st.integers(0, 2**31))
def test_constant_weights_err_below_one_sequence_and_two_over_any_window(num_domains, batch_size, seed):
    weights = np.random.default_rng(seed).dirichlet(np.full(num_domains, 0.5))
    composer = Composer(num_domains)
    counts = np.array([composer.compose(weights, batch_size) for _ in range(80)])
    assert (counts >= 0).all()
    assert (counts.sum(1) == batch_size).all()
    errors = np.cumsum(counts, 0) - np.outer(np.arange(1, 81), weights * batch_size)
    assert np.abs(errors).max() < 1 + 1e-6
    windows = errors[:, None] - errors[None]
    assert np.abs(windows).max() <= 2 + 1e-6


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 3, 8]), st.integers(0, 2**31))
def test_changing_weights_and_masks_keep_counts_whole(num_domains, seed):
    rng = np.random.default_rng(seed)
    composer = Composer(num_domains)
    for _ in range(50):
        masked = rng.random(num_domains) < 0.2
        masked[rng.integers(num_domains)] = False
        counts = composer.compose(rng.dirichlet(np.ones(num_domains)), 16, masked)
        assert (counts >= 0).all()
        assert counts.sum() == 16
        assert (counts[masked] == 0).all()


def test_ties_go_by_index_and_the_carry_follows():
    composer = Composer(3)
    thirds = np.full(3, 1 / 3)
    assert [composer.compose(thirds, 2).tolist() for _ in range(3)] == [[1, 1, 0], [1, 0, 1], [0, 1, 1]]


def test_a_mask_zeroes_the_carry():
    composer = Composer(2)
    composer.compose(np.array([0.25, 0.75]), 2)
    composer.compose(np.array([0.5, 0.5]), 2, np.array([True, False]))
    assert composer.carry.tolist() == [0.0, 0.0]


def test_no_sequence_twice_before_the_epoch_ends_and_a_new_order_after(tiny_store):
    size = tiny_store.num_sequences("train", 32)[0]
    sampler = MixtureSampler(tiny_store, "train", 7, 32, seed=3)
    only_first = np.array([1.0, 0.0, 0.0])
    rows = np.concatenate([sampler.draw(only_first).tokens for _ in range(2 * size // 7 + 1)])
    expected = tiny_store.sequences("train", 0, np.arange(size), 32)
    first, second = rows[:size], rows[size : 2 * size]
    for epoch in (first, second):
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, expected))
    assert (first != second).any()
    assert sampler.drawn.tolist() == [len(rows), 0, 0]
    assert sampler.epochs[0] == len(rows) / size


def test_resume_is_exact_whatever_the_new_seed(tiny_store):
    weights = np.array([0.2, 0.3, 0.5])
    whole = MixtureSampler(tiny_store, "train", 16, 32, seed=5)
    for _ in range(9):
        whole.draw(weights)
    resumed = MixtureSampler(tiny_store, "train", 16, 32, seed=99)
    resumed.load_state_dict(whole.state_dict())
    for _ in range(30):
        a, b = whole.draw(weights), resumed.draw(weights)
        assert (a.tokens == b.tokens).all()
        assert (a.domains == b.domains).all()


def test_state_of_another_sequence_length_is_refused(tiny_store):
    state = MixtureSampler(tiny_store, "train", 4, 32, seed=0).state_dict()
    with pytest.raises(DataError, match="another sequence length"):
        MixtureSampler(tiny_store, "train", 4, 16, seed=0).load_state_dict(state)


def test_heldout_is_fixed_distinct_and_short_where_the_domain_is(tiny_store):
    tokens, domains = heldout(tiny_store, "test", 32, 4, seed=0)
    assert np.bincount(domains).tolist() == [4, 4, 4]
    assert len(set(map(bytes, tokens))) == 12
    assert (heldout(tiny_store, "test", 32, 4, seed=0)[0] == tokens).all()
    all_of_them = heldout(tiny_store, "test", 32, 10**6, seed=0)[1]
    assert np.bincount(all_of_them).tolist() == list(tiny_store.num_sequences("test", 32))
