"""`acodm train --algo apg`: a policy for any mixing problem, learned by a gradient through random surfaces."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.config import from_dict
from acodm_env.errors import ConfigError
from acodm_env.experiments.console import listing, progress, say
from acodm_env.experiments.policy_card import write_policy_card
from acodm_env.experiments.run_folder import RunFolder, git_commit, versions
from acodm_env.files import read_json, write_json

if TYPE_CHECKING:
    from acodm_env.agents.apg import ApgConfig, Learned
    from acodm_env.experiments.train import TrainConfig
    from acodm_env.surrogate.problems import ProblemFamily

_UNUSED = ("episodes", "envs", "conf_file", "teacher", "evaluate_every", "init")
"""Settings of agents that learn from transitions."""
_READ = {"problems", "action", "fields", "surface", "reward", "episode_steps"}
"""Settings of the surrogate that are read, or come with `--surrogate problems`."""
DECISIONS = 20
"""Of a run under the policy, whatever its number of steps."""
LEAST_STEPS = 4
"""Optimiser steps between two decisions below which training losses show little."""
UNSEEN_SEED = 7_654_321
"""Of the surfaces that the policy is judged on: no learner draws from it."""


def check_apg(config: "TrainConfig") -> None:
    """Refuse settings that mean nothing here.

    Raises:
        ConfigError: it is not to learn on random problems, or a setting of other algorithms is given.
    """
    if config.surrogate is None or "problems" not in config.env_kwargs():
        raise ConfigError(
            f"surrogate={config.surrogate}: must be problems for apg, which differentiates through them; "
            f'--surrogate problems, or JSON: {{"problems": {{…}}}}; on a proxy learn with equivariant-ppo or another'
        )
    for name in _UNUSED:
        if getattr(config, name, None) is not None:
            raise ConfigError(
                f"{name}={getattr(config, name)}: must be left out with apg; its settings are those of `ApgConfig`: "
                f"--agent '{{\"iterations\": 4000}}'"
            )
    if config.resume:
        raise ConfigError("resume=True: must be left out with apg: an interrupted run starts again, to the same result")
    if config.seed < 0:
        raise ConfigError(f"seed={config.seed}: must be at least 0")
    if ignored := sorted(config.env_kwargs().keys() - _READ):
        raise ConfigError(f"surrogate.{ignored[0]}: means nothing to apg; it reads problems, action and fields")
    settings_of_apg(config)


def settings_of_apg(config: "TrainConfig") -> "tuple[ProblemFamily, ApgConfig]":
    """What is drawn, and how is learned.

    Raises:
        ConfigError: an unknown setting, with a suggestion.
    """
    from acodm_env.agents.apg import ApgConfig
    from acodm_env.surrogate.env import SurrogateConfig
    from acodm_env.surrogate.problems import ProblemFamily

    kwargs = config.env_kwargs()
    surrogate = from_dict(SurrogateConfig, kwargs, "surrogate")
    action = surrogate.action_map()
    shared = {"scale": action.scale, "floor": action.floor, "rate": action.rate, "seed": config.seed}
    fields = {} if surrogate.fields is None else {"fields": list(surrogate.fields)}
    family = from_dict(ProblemFamily, surrogate.problems or {}, "problems")
    return family, from_dict(ApgConfig, {**shared, **fields, **config.agent}, "agent")


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
