"""Exported policies as mixers by name: the shipped generalist, any other, and the time average of one run under one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acodm_env.errors import ConfigError
from acodm_env.policy.dense import Policy
from acodm_env.policy.load import SHIPPED, open_policy
from acodm_env.policy.mixer import PolicyMixer
from acodm_env.trainer import RunInfo, RunRequest

from .doremi import ProxyMean

POLICY_ROWS = ("policy", "policy-untrained")


class NamedPolicy(PolicyMixer):
    """A shipped policy by its name, or an exported one by its folder."""

    name = "policy"

    def __init__(self, policy: str | None = None, fingerprint: str | None = None):
        """Open it.

        Args:
            policy: "generalist", or the folder of an exported policy.
            fingerprint: of the policy that is meant; None takes what is there.

        Raises:
            ConfigError: none given, none there, or another one.
            DataError, PolicyError: its files are damaged.
        """
        found = _opened(policy)
        if fingerprint not in (None, found.fingerprint):
            raise ConfigError(
                f"policy={policy}: must have the fingerprint {fingerprint}, and has {found.fingerprint}; it was "
                f"replaced; put the former one back or begin anew"
            )
        super().__init__(found, type(self).name)


class Generalist(NamedPolicy):
    """The policy that comes with this package: for any corpus and targets, learned on random surfaces alone."""

    name = "generalist"

    def __init__(self) -> None:
        """Open it.

        Raises:
            ConfigError: the package came without it.
        """
        super().__init__("generalist")


class Pilot(ProxyMean):
    """The time average of one run under a policy, held throughout.

    A policy's judgement is in its average, and its movement costs: on text a static mixture is nearly as good as the
    best schedule, and every change of the mixture loses a little. The run takes as many steps as the target's.
    """

    name = "pilot"

    def __init__(self, policy: str = "generalist", proxy_frac: float = 1.0):
        """Take the options.

        Args:
            policy: "generalist", or the folder of an exported policy.
            proxy_frac: optimiser steps of the run over those of the target's.

        Raises:
            ConfigError: an option out of range.
        """
        super().__init__(proxy_frac)
        self.policy = policy

    def preparation(self, info: RunInfo) -> Sequence[RunRequest]:
        """One run under the policy.

        Raises:
            ConfigError: there is no such policy.
            DataError, PolicyError: its files are damaged, or it does not fit the run.
        """
        policy = _opened(self.policy)
        policy.check_fits(info)
        options: dict[str, Any] = {
            "policy": self.policy if self.policy in SHIPPED else str(Path(self.policy).absolute()),
            "fingerprint": policy.fingerprint,
        }
        return (RunRequest(name="proxy", mixer="policy", options=options, steps=self._steps(info)),)


def _opened(policy: str | None) -> Policy:
    if not policy:
        raise ConfigError(
            f"policy={policy}: must be {' or '.join(SHIPPED)}, or the folder of an exported policy; give one of them"
        )
    return open_policy(policy)
