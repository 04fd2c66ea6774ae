"""`acodm transfer` with a certificate: asked for, or made first, and what its verdict leaves of the policy."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from acodm_env.agents.baselines import make_mixer
from acodm_env.agents.certificate import Certificate, fresh_seeds
from acodm_env.corpus.problem import Problem
from acodm_env.errors import ConfigError
from acodm_env.experiments.console import note, say
from acodm_env.policy.dense import Policy
from acodm_env.policy.mixer import PolicyMixer
from acodm_env.trainer import Mixer

if TYPE_CHECKING:
    from acodm_env.experiments.target.config import TransferConfig

PASSES_APART = 1.5
"""Runs whose passes over a domain differ by more than this factor are said to."""


@dataclass(frozen=True)
class Certified:
    """A certificate, and the policy that it is for."""

    certificate: Certificate
    policy: Policy

    def mixer(self) -> Mixer:
        """What drives the run by the verdict."""
        left = self.certificate.apply(self.policy)
        return make_mixer("uniform") if left is None else PolicyMixer(left, say=note)

    def identity(self) -> dict[str, Any]:
        """What of it makes a run this run."""
        return {"policy": self.certificate.policy, "certificate": self.certificate.verdict}

    def record(self) -> dict[str, Any]:
        """For `result.json`: everything but the verdict's rule."""
        return {name: value for name, value in asdict(self.certificate).items() if name != "rule"}


def folder_of(config: "TransferConfig") -> str | None:
    """Where the certificate is, or will be made; None if none is asked for."""
    return config.certificate or (f"{config.out.rstrip('/')}-certificate" if config.certify else None)


def obtain(
    config: "TransferConfig", problem: Problem, policy: Policy, ask_gate: Callable[[], object], stop: Callable[[], bool]
) -> Certified | None:
    """The certificate that the run is to have, made first where that is asked for; None if none is.

    Args:
        config: of the target's run.
        problem: its data and objective.
        policy: that shall drive it.
        ask_gate: the offline checks, which come before any run.
        stop: asked before and after every step: whether to save and end now.

    Raises:
        ConfigError, DataError, PolicyError: it is missing, edited, or for another policy, corpus or objective.
        Preempted: `stop` said so.
    """
    folder = folder_of(config)
    if folder is None:
        return None
    certificate = _make(config, problem, policy, folder, ask_gate, stop) if config.certify else Certificate.load(folder)
    identity = problem.full_identity() | {"corpus_fingerprint": problem.store.fingerprint, "seed": config.seed}
    certificate.check_for(policy, identity, folder)
    if not config.quiet and int(os.environ.get("RANK", "0")) == 0:
        say(f"{certificate.summary()}, {folder}")
        _say_passes(config, certificate.conditions)
    return Certified(certificate, policy)


def _make(
    config: "TransferConfig",
    problem: Problem,
    policy: Policy,
    folder: str,
    ask_gate: Callable[[], object],
    stop: Callable[[], bool],
) -> Certificate:
    from acodm_env.experiments.policy.certify import Conditions, certify

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"certify=True: must be left out with several processes; make the certificate first, with acodm gate "
            f"--policy {config.policy} --proxy {config.proxy} … --out {folder}, and give --certificate {folder}"
        )
    ask_gate()
    conditions = Conditions(
        proxy=config.proxy,
        steps=config.proxy_steps,
        sequence_length=config.sequence_length,
        eval_sequences=config.eval_sequences,
        device=config.device,
        precision=config.precision,
        target_tokens=_tokens(config),
    )
    seeds = fresh_seeds(config.seed, config.proxy_seeds)
    return certify(policy, problem, conditions, seeds, folder, quiet=config.quiet, stop=stop)


def _tokens(config: "TransferConfig") -> int:
    return config.steps * config.batch_size * config.sequence_length


def _say_passes(config: "TransferConfig", conditions: Mapping[str, Any]) -> None:
    """Repetition decides how much of a scarce target is good: say where the certificate saw another one."""
    own = conditions["steps"] * conditions["batch_size"] * conditions["sequence_length"]
    meant, here = max(own, conditions["target_tokens"] or 0), _tokens(config)
    if max(meant, here) > PASSES_APART * min(meant, here):
        note(
            f"certificate: made for runs of {meant:,} tokens, this one has {here:,} and passes over its domains "
            f"{here / meant:.2g} times as often; --certify, or acodm gate --target-tokens {here}, tries that"
        )
