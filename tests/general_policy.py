"""A small policy that sees the problem and so fits any, with random numbers: what the shipped one looks like."""

import numpy as np

from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.policy.equivariant import PER_DOMAIN, EquivariantPolicy, scalings_of

FIELDS = (("objective_weight", PER_DOMAIN), ("size", PER_DOMAIN), ("elasticity", PER_DOMAIN), ("progress", 1))


def general(fields=FIELDS, support=None, seed=0, **changes):
    """A small random policy that sees the problem."""
    rng = np.random.default_rng(seed)
    local = sum(size == PER_DOMAIN for _, size in fields)
    whole = len(fields) - local
    shapes = [((6, local + whole), "relu"), ((1, 3 * 6 + whole), "identity")]
    layers = tuple(
        (rng.normal(size=shape).astype(np.float32), np.zeros(shape[0], np.float32), name) for shape, name in shapes
    )
    known = {
        "fields": fields,
        "scalings": scalings_of(fields),
        "encoder": 1,
        "layers": layers,
        "action": ActionMap(),
        "bounds": Bounds(),
        "interaction": InteractionConfig(),
        "decision_every": 2,
        "horizon": 20,
        "probe_sequences": 8,
        "provenance": {"support": support} if support else {},
    }
    return EquivariantPolicy(**known | changes)
