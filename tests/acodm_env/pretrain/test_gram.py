"""The Gram matrix of domain gradients against numbers worked out by hand."""

import numpy as np
import pytest
import torch

from acodm_env.pretrain.gradients import DomainGradients


def test_gram_is_unbiased_where_the_naive_diagonal_is_not():
    """Samples g + ε in 200 dimensions, ‖g‖² = 4, noise power per sample 200: two samples leave 100 in ‖ĝ‖²."""
    rng = np.random.default_rng(0)
    mean = np.zeros((2, 200))
    mean[:, 0] = 2.0
    mean[1, 1] = 3.0  # ‖g_1‖² = 13, ⟨g_0, g_1⟩ = 4
    grams, noises, naive = [], [], []
    for _ in range(2000):
        samples = mean[:, None] + rng.normal(size=(2, 2, 200))  # (K, halves, P)
        gradients = DomainGradients(torch.from_numpy(samples).float(), np.ones((2, 2)))
        gram, noise = gradients.gram()
        grams.append(gram)
        noises.append(noise)
        naive.append((samples.mean(1) ** 2).sum(1))
    np.testing.assert_allclose(np.mean(grams, 0), [[4, 4], [4, 13]], atol=1.0)  # standard error 0.33
    np.testing.assert_allclose(np.mean(noises, 0), [100, 100], rtol=0.02)
    np.testing.assert_allclose(np.mean(naive, 0), [104, 113], rtol=0.02)


def test_gram_weights_halves_by_their_tokens():
    gradients = DomainGradients(torch.tensor([[[6.0], [2.0]], [[0.0], [5.0]]]), np.array([[3.0, 1.0], [0.0, 5.0]]))
    gram, noise = gradients.gram()
    np.testing.assert_allclose(gram, [[2 * 2, 2 * 1], [2 * 1, np.nan]])  # means 8/4 and 5/5; halves 6/3 and 2/1
    np.testing.assert_allclose(noise, [0, np.nan])


def test_gram_of_absent_domains_is_nan():
    gradients = DomainGradients(torch.tensor([[[1.0], [3.0]], [[0.0], [0.0]]]), np.array([[1.0, 1.0], [0.0, 0.0]]))
    gram, noise = gradients.gram()
    np.testing.assert_array_equal(np.isnan(gram), [[False, True], [True, True]])
    np.testing.assert_array_equal(np.isnan(noise), [False, True])
    assert gram[0, 0] == 3.0


def test_gram_sums_in_float64_over_chunks():
    """2¹⁸ equal entries of 1 + 2⁻¹²: in float32 the sum of squares would be off by 1e-5 or more."""
    entry = 1 + 2.0**-12
    sums = torch.full((1, 2, 2**18), entry)
    gram, _ = DomainGradients(sums, np.ones((1, 2))).gram()
    assert gram[0, 0] == pytest.approx(2**18 * entry**2, rel=1e-14)
