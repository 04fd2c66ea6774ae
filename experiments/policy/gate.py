"""`acodm gate`: judge an exported policy before a target run, offline, and by --proxy with a certificate.

`acodm transfer` asks the same first.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from acodm_env.agents.certificate import FILE, fresh_seeds
from acodm_env.agents.gate import FAILED, NOT_CHECKED, Check, Thresholds, judge, other_objective
from acodm_env.agents.gate_rollouts import imagined_run
from acodm_env.corpus import open_corpus
from acodm_env.corpus.problem import Problem, choose_problem
from acodm_env.errors import ConfigError, PolicyError
from acodm_env.experiments.console import note, say, text_table
from acodm_env.experiments.run.preemption import Preempted, catch_sigterm
from acodm_env.files import write_json
from acodm_env.objective import check_metric, parse_targets
from acodm_env.policy.dense import Policy
from acodm_env.policy.load import open_policy
from acodm_env.surrogate.surface import Surface
from acodm_env.trainer import RunInfo

SURFACE = "regmix-1m"


@dataclass(frozen=True, kw_only=True)
class GateConfig(Thresholds):
    """Judge an exported policy before a target run: exit code 0, or 1 with the checks that it failed. With --proxy, try
    it there against uniform with fresh seeds, and write a certificate."""

    policy: str = "runs/policy"
    """Folder of the exported policy, or generalist: the shipped one."""
    surface: str = SURFACE
    """Surrogate to drive: a shipped surface, or a JSON file written by `acodm fit-surrogate`."""
    corpus: str | None = None
    """Folder of the target's token store, or "pocket": whether the policy fits it, and the bounds of its fields."""
    domains: str | None = None
    """The domains of the corpus to train on, separated by commas; default: all."""
    objective: str = "loss"
    """What the target's run averages over its targets: loss, or perplexity (its logarithm)."""
    targets: str | None = None
    """Held-out targets of that run with their weights, such as "prose=2,licences=1"; default: all domains alike."""
    cut: str | None = None
    """Sequences to which the training text of domains is cut in that run, such as "prose=160"."""
    seeds: int | None = None
    """Runs on the surrogate for every mixture, default 5; with --proxy seeds there, default 2."""
    proxy: str | None = None
    """Make a certificate: the model (preset, config.json or hub name) on which the policy is tried. Needs --corpus."""
    steps: int = 400
    """Optimiser steps of every run of the certificate."""
    batch_size: int = 16
    """Sequences per step of those runs."""
    sequence_length: int = 128
    """Tokens per sequence."""
    learning_rate: float = 3e-3
    """Peak learning rate of those runs."""
    eval_sequences: int = 64
    """Held-out sequences per target and split of those runs."""
    target_tokens: int | None = None
    """Tokens of the target's run: domains are cut so that the certificate's runs pass over them as often. Default: none
    is cut."""
    device: str = "auto"
    """Device of those runs: auto, cpu, cuda or cuda:N."""
    json: str | None = None
    """JSON file to write the verdicts to as well."""
    out: str | None = None
    """With --proxy the folder of the certificate, default runs/certificate; the same command goes on there. Else the
    same as --json."""
    seed: int = 0
    """First seed of the runs on the surrogate, and of the sweep over the bounds; with --proxy the seed that the
    target's run will have: those of the certificate are others."""
    quiet: bool = False
    """Print only the checks that failed, and the verdict."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json is not None and self.out is not None and self.proxy is None:
            raise ConfigError(f"json={self.json}, out={self.out}: mean the same; give one of them")
        if self.proxy is not None and self.corpus is None:
            raise ConfigError(f"proxy={self.proxy}: must come with --corpus, on which the policy is tried")
        for name, least in (("seeds", 1), ("seed", 0), ("steps", 1), ("target_tokens", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name}={value}: must be at least {least}")
        check_metric(self.objective)
        parse_targets(self.targets)
        if self.proxy is not None:
            fresh_seeds(self.seed, self.seeds or 2)


def run(config: GateConfig) -> int:
    """Judge and say; 1 if a check failed.

    Raises:
        ConfigError, DataError, PolicyError: there is no such policy, surface or corpus, or it is damaged.
    """
    policy = open_policy(config.policy)
    problem = None if config.corpus is None else _problem(config, config.corpus)
    thresholds = Thresholds(**{one.name: getattr(config, one.name) for one in fields(Thresholds)})
    seeds = 5 if config.seeds is None or config.proxy is not None else config.seeds
    checks = judge(
        policy,
        Surface.load(config.surface),
        run=None if problem is None else _target_run(policy, problem),
        thresholds=thresholds,
        seeds=seeds,
        seed=config.seed,
    )
    failed = _named(checks, FAILED)
    if not config.quiet:
        say(table(checks))
    if failed:
        say(f"gate: failed: {', '.join(failed)}")
    elif not config.quiet:
        say(f"gate: {passed(checks)}")
    file = config.json or (config.out if config.proxy is None else None)
    if file is not None:
        about = {"policy": config.policy, "fingerprint": policy.fingerprint, "seeds": seeds, "seed": config.seed}
        write_json(file, about | outcome(checks, config.surface, thresholds))
    if not failed and config.proxy is not None and problem is not None:
        _certify(config, policy, problem)
    return 1 if failed else 0


def _problem(config: GateConfig, corpus: str) -> Problem:
    return choose_problem(
        open_corpus(corpus, config.quiet),
        sequence_length=config.sequence_length,
        domains=config.domains,
        targets=config.targets,
        objective=config.objective,
        cut=config.cut,
    )


def _target_run(policy: Policy, problem: Problem) -> RunInfo:
    """The target's run as far as corpus and objective tell."""
    initial = math.log(problem.store.vocab_size)
    weights = dict(problem.targets) or None
    return imagined_run(policy, problem.store.domains, initial, objective=weights, metric=problem.metric)


def _certify(config: GateConfig, policy: Policy, problem: Problem) -> None:
    """Try the policy on the proxy; say verdict, cost and place."""
    from acodm_env.experiments.policy.certify import Conditions, certify

    out = config.out or "runs/certificate"
    shared = ("steps", "batch_size", "sequence_length", "learning_rate", "eval_sequences", "device", "target_tokens")
    conditions = Conditions(proxy=config.proxy or "tiny", **{name: getattr(config, name) for name in shared})
    seeds = fresh_seeds(config.seed, config.seeds or 2)
    with catch_sigterm() as asked:
        try:
            certificate = certify(policy, problem, conditions, seeds, out, quiet=config.quiet, stop=asked)
        except Preempted as end:
            note(f"acodm: {end}")
            return
    cost = certificate.cost
    if not config.quiet:
        say(f"cost: {cost['tokens']:,.0f} tokens, {cost['flops']:.3g} FLOPs, {cost['seconds']:.0f} s")
    say(f"{certificate.summary()}")
    say(f"{out}/{FILE}; next: acodm transfer --policy {config.policy} --certificate {out} …")


def passed(checks: Sequence[Check]) -> str:
    """ "passed", and how many checks were not made, which those are and why."""
    reasons: dict[str, list[str]] = {}
    for check in checks:
        if check.verdict == NOT_CHECKED:
            reasons.setdefault(" ".join(check.explanation.split()), []).append(check.name)
    if not reasons:
        return "passed"
    number = len(_named(checks, NOT_CHECKED))
    told = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    were = "check was" if number == 1 else "checks were"
    return f"passed; {number} of {len(checks)} {were} not made: {told}"


def table(checks: Sequence[Check]) -> str:
    """Verdicts with the number each rests on, its limit, and what was found."""
    rows = (
        (check.name, check.verdict, _number(check.value), check.limit, " ".join(check.explanation.split()))
        for check in checks
    )
    return text_table(("check", "verdict", "value", "limit", "what was found"), rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def outcome(checks: Sequence[Check], surface: str, thresholds: Thresholds) -> dict[str, Any]:
    """Verdicts as JSON has them."""
    return {
        "passed": not _named(checks, FAILED),
        "failed": _named(checks, FAILED),
        "not_checked": _named(checks, NOT_CHECKED),
        "surface": surface,
        "thresholds": asdict(thresholds),
        "checks": [
            asdict(check)
            | {
                "value": _finite(check.value),
                "measured": {name: _finite(value) for name, value in check.measured.items()},
            }
            for check in checks
        ],
    }


def _named(checks: Sequence[Check], verdict: str) -> list[str]:
    return [check.name for check in checks if check.verdict == verdict]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def ask_before(policy: Policy, problem: Problem, quiet: bool) -> dict[str, Any]:
    """The gate of `acodm transfer`, with the default thresholds: its outcome for the run's record.

    Raises:
        PolicyError: a check failed, names all that did; the policy was learned for another objective; or it cannot
            drive this corpus at all.
    """
    run = _target_run(policy, problem)
    policy.check_fits(run)
    if other := other_objective(policy, run):
        raise PolicyError(
            f"policy: must be learned for this run's objective; {other}; learn one for it, take generalist, which is "
            f"for any, or go on all the same with --no-gate"
        )
    checks = judge(policy, Surface.load(SURFACE), run=run)
    failed = [
        f"{check.name} ({_number(check.value)}, must be {check.limit})" for check in checks if check.verdict == FAILED
    ]
    if failed:
        raise PolicyError(
            f"policy: fails the offline gate: {'; '.join(failed)}; learn on, or go on all the same with --no-gate "
            f"(`acodm gate --policy DIR` shows every check)"
        )
    if not quiet:
        note(f"gate: {passed(checks)}")
    return outcome(checks, SURFACE, Thresholds())


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm gate, or python -m acodm_env gate")
