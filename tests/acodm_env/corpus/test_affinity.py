"""How near domains lie to targets, by counts of token pairs."""

import numpy as np
import pytest

from acodm_env.corpus.affinity import OWN, Affinity, pair_losses, standardised


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
    nats = pair_losses(tiny_store, tiny_store, 32)  # (M, K)
    assert nats.shape == (3, 3)
    assert (nats.argmin(1) == np.arange(3)).all()
    matrix = Affinity(tiny_store, tiny_store.subset([tiny_store.domains[1]]), 32).matrix()
    assert matrix.shape == (1, 3)
    assert matrix[0, 1] == OWN


def test_pairs_by_hand(tmp_path, tiny_store):
    """A text scored by its own kind costs less than ln V; by another kind more than that."""
    nats = pair_losses(tiny_store, tiny_store, 32)
    uniform = np.log(tiny_store.vocab_size)
    assert (np.diag(nats) < uniform).all()
    assert (nats[~np.eye(3, dtype=bool)] > uniform).all()


def test_a_target_that_is_not_trained_on_has_no_own_column(tiny_store):
    store = tiny_store.subset(tiny_store.domains[:2])
    matrix = Affinity(store, tiny_store.subset([tiny_store.domains[2]]), 32).matrix()
    assert matrix.shape == (1, 2)
    assert matrix.sum() == pytest.approx(0.0, abs=1e-9)
