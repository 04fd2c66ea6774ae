"""`acodm train --algo apg`: a policy for any mixing problem, learned by a gradient through random surfaces."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.experiments.console import listing, progress, say
from acodm_env.experiments.policy.config import settings_of_apg
from acodm_env.experiments.publish.policy_card import write_policy_card
from acodm_env.experiments.run.folder import RunFolder, git_commit, versions
from acodm_env.files import read_json, write_json

if TYPE_CHECKING:
    from acodm_env.agents.apg import ApgConfig, Learned
    from acodm_env.experiments.policy.config import TrainConfig
    from acodm_env.surrogate.problems import ProblemFamily

DECISIONS = 20
"""Of a run under the policy, whatever its number of steps."""
LEAST_STEPS = 4
"""Optimiser steps between two decisions below which training losses show little."""
UNSEEN_SEED = 7_654_321
"""Of the surfaces that the policy is judged on: no learner draws from it."""


def train_apg(config: "TrainConfig", identity: dict[str, Any]) -> dict[str, Any]:
    """Learn, or report what was learned before, and return the run's `result.json`; the policy lies in `policy`.

    A run that was interrupted starts again: it takes minutes, and is the same for the same seed.
    """
    folder = RunFolder(config.out, identity)
    result_file = folder.path / "result.json"
    if result_file.exists() and (folder.path / "policy" / "policy.json").exists():
        found: dict[str, Any] = read_json(result_file)
        return found
    family, settings = settings_of_apg(config)
    learned = _learn(family, settings, quiet=config.quiet)
    write_policy(learned, family, settings, folder.path / "policy")
    result = {
        "algo": "apg",
        "iterations": len(learned.rows),
        "seconds": learned.seconds,
        **judge(learned, family, settings),
        "rows": learned.rows,
        "config": folder.config,
        "versions": versions(),
    }
    write_json(result_file, result)
    return result


def _learn(family: "ProblemFamily", settings: "ApgConfig", *, quiet: bool) -> "Learned":
    from acodm_env.agents import apg

    with progress(settings.iterations, "apg learns", quiet=quiet, unit="batch") as bar:

        def on_step(row: dict[str, float]) -> None:
            bar.update()
            bar.set_postfix_str(f"regret {row['regret']:.2f}", refresh=False)

        return apg.learn(family, settings, on_step)


def write_policy(learned: "Learned", family: "ProblemFamily", settings: "ApgConfig", path: Path) -> None:
    """The policy folder: contract, weights and card."""
    from acodm_env.agents import apg

    provenance = {
        "algo": "apg",
        "objective": "any",
        "support": {
            "num_rows": list(family.num_domains),
            "decisions": list(family.decisions),
            "steps_per_decision": [LEAST_STEPS, None],
            "sizes": list(family.sizes),
        },
        "config": {"surrogate": "problems", "seed": settings.seed, **apg.describe(settings, family)},
        "learning_seconds": learned.seconds,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    policy = learned.actor.policy(DECISIONS, family.probe_sequences, json.loads(json.dumps(provenance)))
    policy.save(path)
    write_policy_card(path, policy)


def judge(learned: "Learned", family: "ProblemFamily", settings: "ApgConfig", number: int = 512) -> dict[str, float]:
    """Share of the best static mixture's gain that the policy has on surfaces that it has never seen, 20 decisions.

    Problems in which the best static mixture gains less than `apg.LEAST_GAIN` nats count nothing.
    """
    import numpy as np
    import torch

    from acodm_env.agents import apg

    problems = family.draw(np.random.default_rng(UNSEEN_SEED), number).tensors()
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        played = apg.play(problems, apg.deciding(learned.actor), DECISIONS, settings.rate, generator)
    shares = 1 - apg.regrets(problems, played.objective)
    return {"unseen_share": float(shares.nanmean()), "unseen_share_median": float(shares.nanmedian())}


def run_apg(config: "TrainConfig", identity: dict[str, Any]) -> None:
    """Learn and print what came of it."""
    result = train_apg(config, identity)
    say(listing((name, value) for name, value in result.items() if name not in ("rows", "config", "versions")))
    say(f"policy: {Path(config.out) / 'policy'}; next: acodm transfer --policy {Path(config.out) / 'policy'} …")
