"""Whether validation and test are alike: under one model their losses must agree but for chance."""

import math
from collections.abc import Sequence

from acodm_env.errors import ConfigError

LIMIT_NATS = 0.3
"""Losses of one domain further apart than this are said to differ."""


def split_differences(
    domains: Sequence[str],
    validation: Sequence[float],
    test: Sequence[float],
    limit_nats: float = LIMIT_NATS,
) -> list[str]:
    """A sentence for each domain whose validation and test losses differ by more than `limit_nats`, the worst first.

    Args:
        domains: names (K,).
        validation: losses in nats (K,) of one model on the validation split; NaN where unmeasured.
        test: losses in nats (K,) of the same model on the test split; NaN where unmeasured.
        limit_nats: how far apart they may be.

    Raises:
        ConfigError: not as many losses as domains, or a limit that is not positive.
    """
    if not len(domains) == len(validation) == len(test):
        raise ConfigError(
            f"domains={','.join(domains)}: must have one validation and one test loss each; there are "
            f"{len(validation)} and {len(test)}; evaluate the same domains on both splits"
        )
    if not limit_nats > 0:
        raise ConfigError(f"limit_nats={limit_nats}: must be above 0 nats")
    rows = [(abs(test[i] - validation[i]), i) for i in range(len(domains))]
    apart = sorted((row for row in rows if math.isfinite(row[0]) and row[0] > limit_nats), reverse=True)
    return [_sentence(domains[i], float(validation[i]), float(test[i])) for _, i in apart]


def _sentence(domain: str, validation: float, test: float) -> str:
    return (
        f"domain '{domain}': validation ({validation:.2f} nats) and test ({test:.2f}) differ by "
        f"{abs(test - validation):.2f} nats under one model; what is chosen on one need not hold on the other; give "
        f"it more documents or a larger share of held-out text (--splits), or prepare a corpus of an earlier version "
        f"again"
    )
