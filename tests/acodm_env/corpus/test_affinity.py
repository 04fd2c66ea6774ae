"""How near domains lie to targets, and what their own text is worth, by counts of token pairs."""

import numpy as np
import pytest

from acodm_env.corpus.affinity import OWN, Affinity, PairCounts, leverages, pair_losses, standardised


def test_standardised_by_hand():
    own = np.array([[True, False, False, False]])
    got = standardised(np.array([[9.0, 1.0, 2.0, 3.0]]), own)
    spread = np.sqrt(2 / 3)
    np.testing.assert_allclose(got, [[OWN, -1 / spread, 0, 1 / spread]])
    np.testing.assert_allclose(standardised(np.array([[9.0, 1.0, 1.1, 1.0]]), own)[0, 1:].mean(), 0, atol=1e-12)
    assert (
        np.abs(standardised(np.array([[9.0, 1.0, 1.1, 1.0]]), own)[0, 1:]).max() < 0.3
    )  # no difference worth the name


def test_a_domain_is_nearest_to_itself(tiny_store):
    nats = pair_losses(PairCounts.count(tiny_store, tiny_store, 32))  # (M, K)
    assert nats.shape == (3, 3)
    assert (nats.argmin(1) == np.arange(3)).all()
    matrix = Affinity(tiny_store, tiny_store.subset([tiny_store.domains[1]]), 32).matrix()
    assert matrix.shape == (1, 3)
    assert matrix[0, 1] == OWN


def test_pairs_by_hand(tmp_path, tiny_store):
    """A text scored by its own kind costs less than ln V; by another kind more than that."""
    nats = pair_losses(PairCounts.count(tiny_store, tiny_store, 32))
    uniform = np.log(tiny_store.vocab_size)
    assert (np.diag(nats) < uniform).all()
    assert (nats[~np.eye(3, dtype=bool)] > uniform).all()


def test_a_target_that_is_not_trained_on_has_no_own_column(tiny_store):
    store = tiny_store.subset(tiny_store.domains[:2])
    matrix = Affinity(store, tiny_store.subset([tiny_store.domains[2]]), 32).matrix()
    assert matrix.shape == (1, 2)
    assert matrix.sum() == pytest.approx(0.0, abs=1e-9)


def test_nats_and_leverage_by_hand():
    """One token held out after one other: 4 of 8 such pairs in the first domain, none of 2 in the second."""
    counts = PairCounts(
        pairs=[np.array([[4.0], [0.0]])],
        before=[np.array([[8.0], [2.0]])],
        tokens=[np.array([[10.0], [5.0]])],
        totals=np.array([20.0, 10.0]),
        vocab_size=10,
    )
    assert counts.nats(0, np.array([1.0, 0.0])) == pytest.approx(-np.log((4 + 5 * 10.5 / 25) / (8 + 5)))
    assert counts.nats(0, np.array([0.5, 2.0])) == pytest.approx(-np.log((2 + 5 * 15.5 / 35) / (4 + 4 + 5)))
    # both domains as 20 tokens: the first at 2/3 and at 1/3 of the 40, against the second
    more, less = counts.nats(0, np.array([4 / 3, 4 / 3])), counts.nats(0, np.array([2 / 3, 8 / 3]))
    expected = [(less - more) / np.log(4), 0.0]
    np.testing.assert_allclose(leverages(counts, np.array([[True, False]])), expected)


def test_leverage_is_of_what_only_the_domain_teaches(tiny_store):
    """Each of three distinct alphabets has leverage; a target that is trained on nowhere gives none."""
    assert (Affinity(tiny_store, tiny_store, 32).leverage() > 0.005).all()
    store = tiny_store.subset(tiny_store.domains[:2])
    assert (Affinity(store, tiny_store.subset([tiny_store.domains[2]]), 32).leverage() == 0).all()
