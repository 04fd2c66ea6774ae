"""A small surface with round numbers, for figures by hand."""

import numpy as np
import pytest

from acodm_env.laws import PowerLaw
from acodm_env.surrogate.surface import Surface

HELPS = np.array([[4.0, 1.0, 0.5], [0.5, 2.0, 1.0]])  # e^a_ij (M, K)


def small_surface(**changes):
    """K = 3, M = 2; L_a = 1 + 2·u^(−½), L_x = 2 + 1·u^(−1); an untrained model's loss is 6, so u₀ = 0.16 and 0.25."""
    settings = {
        "domains": ("a", "b", "c"),
        "targets": ("a", "x"),
        "law": PowerLaw(np.log(HELPS), np.log([2.0, 1.0]), np.log([0.5, 1.0]), np.array([1.0, 2.0])),
        "sizes_tokens": (1e9, 1e9, 1e9),
        "run_tokens": 1000.0,
        "sequence_length": 10,
        "initial_loss_nats": 6.0,
        "forgetting": (0.0, 1.0, 2.0),
        "noise_nats": 0.5,
    }
    return Surface(**settings | changes)


@pytest.fixture(scope="session")
def small():
    """Builds the small surface, with changes by keyword."""
    return small_surface
