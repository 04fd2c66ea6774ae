"""`acodm gate`: judge an exported policy before a target run is spent on it. `acodm transfer` asks the same first."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from acodm_env.agents.gate import FAILED, NOT_CHECKED, Check, Thresholds, judge
from acodm_env.agents.trial import imagined_run
from acodm_env.corpus import TokenStore, open_corpus
from acodm_env.errors import ConfigError, PolicyError
from acodm_env.experiments.console import note, say, text_table
from acodm_env.files import write_json
from acodm_env.policy import Policy
from acodm_env.surrogate.surface import Surface

SURFACE = "regmix-1m"


@dataclass(frozen=True, kw_only=True)
class GateConfig(Thresholds):
    """Judge an exported policy before a target run: exit code 0, or 1 with the checks that it failed."""

    policy: str = "runs/policy"
    """Folder of the exported policy."""
    surface: str = SURFACE
    """Surrogate to drive: a shipped surface, or a JSON file written by `acodm fit-surrogate`."""
    corpus: str | None = None
    """Folder of the target's token store, or "pocket": whether the policy fits it, and the bounds of its fields."""
    seeds: int = 5
    """Runs on the surrogate for every mixture."""
    json: str | None = None
    """JSON file to write the verdicts to as well."""
    out: str | None = None
    """The same as --json; every command takes it."""
    seed: int = 0
    """First seed of the runs, and seed of the sweep over the bounds."""
    quiet: bool = False
    """Print only the checks that failed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json is not None and self.out is not None:
            raise ConfigError(f"json={self.json}, out={self.out}: mean the same; give one of them")
        for name, least in (("seeds", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")


def run(config: GateConfig) -> int:
    """Judge and say; 1 if a check failed.

    Raises:
        ConfigError, DataError, PolicyError: there is no such policy, surface or corpus, or it is damaged.
    """
    policy = Policy.load(config.policy)
    store = None if config.corpus is None else open_corpus(config.corpus, config.quiet)
    thresholds = Thresholds(**{one.name: getattr(config, one.name) for one in fields(Thresholds)})
    checks = judge(
        policy,
        Surface.load(config.surface),
        run=None if store is None else imagined_run(policy, store.domains, math.log(store.vocab_size)),
        thresholds=thresholds,
        seeds=config.seeds,
        seed=config.seed,
    )
    failed = _named(checks, FAILED)
    if not config.quiet:
        say(table(checks))
    if failed:
        say(f"gate: failed: {', '.join(failed)}")
    elif not config.quiet:
        say("gate: passed")
    file = config.json or config.out
    if file is not None:
        about = {"policy": config.policy, "fingerprint": policy.fingerprint, "seeds": config.seeds, "seed": config.seed}
        write_json(file, about | outcome(checks, config.surface, thresholds))
    return 1 if failed else 0


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


def ask_before(policy: Policy, store: TokenStore, quiet: bool) -> dict[str, Any]:
    """The gate of `acodm transfer`, with the default thresholds: its outcome for the run's record.

    Raises:
        PolicyError: a check failed, names all that did; or the policy cannot drive this corpus at all.
    """
    run = imagined_run(policy, store.domains, math.log(store.vocab_size))
    policy.check_fits(run)
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
        reasons: dict[str, list[str]] = {}
        for check in checks:
            if check.verdict == NOT_CHECKED:
                reasons.setdefault(check.explanation, []).append(check.name)
        note("gate: passed" + "".join(f"; not checked: {', '.join(ones)} ({why})" for why, ones in reasons.items()))
    return outcome(checks, SURFACE, Thresholds())


if __name__ == "__main__":
    from acodm_env.experiments.cli import main

    main(command="gate")
