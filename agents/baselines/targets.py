"""Mixtures aimed at the user's targets: a fixed share on them, and what a nat of each domain's loss is worth.

Most methods were made for one objective, the mean loss over all training domains. Where the user's is another one, what
a method says of a domain counts by `domain_values`: K·∂objective/∂L_i, which is 1 for every domain in the papers' case.
A target that is trained on nowhere has no domain whose weight could follow it; a domain that is no target is worth 0.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError
from acodm_env.objective import marginal
from acodm_env.step_stats import Array
from acodm_env.support import own_weights, target_share
from acodm_env.trainer import RunInfo

from .static import _Fixed


def is_plain(info: RunInfo) -> bool:
    """Whether the objective is the papers': the mean loss over all training domains, and nothing else."""
    return (
        info.metric == "loss"
        and sorted(info.targets) == sorted(info.domains)
        and float(np.ptp(info.objective_weights)) < 1e-12
    )


def domain_values(info: RunInfo, losses: Array) -> Array:
    """K·∂objective/∂L (K,): what a nat of each domain's loss is worth, 1 where all are alike.

    Args:
        info: of the run.
        losses: (K,) held-out losses of the domains or what stands for them, nats; perplexities weigh by them. A target
            that is trained on nowhere counts there as the mean of those that are.
    """
    if is_plain(info):
        return np.ones(info.num_domains)
    weights = own_weights(info)
    trained = float(weights.sum())
    if info.metric == "perplexity" and trained > 0:
        heavy: Array = marginal(losses, weights / trained, True)
        weights = trained * heavy
    return info.num_domains * weights


class DomainValues:
    """`domain_values` during a run, by the domains' last training losses; ln V before a domain's first draw."""

    def __init__(self, info: RunInfo):
        """Begin a run."""
        self._info, self._plain = info, is_plain(info)
        self._losses = np.full(info.num_domains, info.initial_loss_nats)  # (K,)

    def update(self, losses: Array) -> None:
        """Take in the training losses (K,) of a step or window; NaN keeps the last."""
        self._losses = np.where(np.isfinite(losses), losses, self._losses)

    def now(self) -> Array | None:
        """The values (K,), or None where all count alike."""
        return None if self._plain else domain_values(self._info, self._losses)

    def state_dict(self) -> dict[str, Any]:
        """The losses."""
        return {"losses": self._losses.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value; one of a run saved before there were values says nothing."""
        self._losses = np.array(state.get("losses", self._losses), dtype=np.float64)


class TargetShare(_Fixed):
    """A fixed share s on the targets: s·ω_i on each that is trained on, (1−s) spread evenly over all other domains.

    ω_i are the objective's weights of the targets among the domains, summing to 1; a target with weight 0 is none.
    Where every domain is a target the rest is spread over all of them, so equal weights give the uniform mixture; where
    no target is trained on the mixture is uniform. On text the best share falls with a target's size: all of it where
    data are ample, its even share where there are 40 sequences.
    """

    name = "target-share"

    def __init__(self, share: float = 0.5):
        """Take s, a number in [0, 1].

        Raises:
            ConfigError: it is none.
        """
        if isinstance(share, bool) or not (math.isfinite(share) and 0 <= share <= 1):
            raise ConfigError(f"share={share}: must be a number in [0, 1], the targets' share of the mixture")
        self.share = share

    def _compute(self, info: RunInfo) -> object:
        return target_share(info, self.share)
