"""`acodm export`: turn a learned agent into a policy folder that needs no RL library."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.config import from_dict
from acodm_env.errors import DataError, unknown
from acodm_env.experiments.console import say
from acodm_env.experiments.run_folder import git_commit, open_run, versions
from acodm_env.experiments.train import TrainConfig, make_learner, settings_of

if TYPE_CHECKING:
    from acodm_env.agents.learning import Learner

POLICY_FILES = {"policy.json", "policy.safetensors"}
CHECKPOINTS = ("best", "last", "untrained")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a learned agent as a policy folder: safetensors and JSON, verified by re-loading."""

    run: str = "runs/train"
    """Folder of an `acodm train` run."""
    which: str = "best"
    """best (by held-out objective), last, or untrained: the actor at its initialisation, as a control."""
    out: str = "runs/policy"
    """Folder of the exported policy."""
    seed: int = 0
    """Not used by an export; accepted because every command takes it."""
    quiet: bool = False
    """Print only where the policy lies."""

    def __post_init__(self) -> None:
        if self.which not in CHECKPOINTS:
            unknown("which", self.which, CHECKPOINTS)


def run(config: ExportConfig) -> None:
    """Export and say how exactly the file reproduces the agent."""
    recorded = open_run(config.run).config
    train = from_dict(TrainConfig, recorded, "run")
    learner = make_learner(replace(train, out=config.run))
    error = export_from(learner, train, config.which, Path(config.out))
    if not config.quiet:
        say(f"re-loaded: max |a_file - a_agent| = {error:.2g} on 256 observations")
    say(f"policy: {config.out} (policy.json, policy.safetensors)")


def export_from(learner: "Learner", train: TrainConfig, which: str, out: Path) -> float:
    """Write the policy folder of a checkpoint and return the largest difference from the agent.

    "untrained" takes the actor of the initial checkpoint with the observation statistics of the best one, so that
    it differs from the exported policy in nothing but the actor's learning.

    Raises:
        DataError: the run has not got that far, or `out` holds something that is no policy.
    """
    from acodm_env.agents.export import export

    if out.exists() and (not out.is_dir() or {file.name for file in out.iterdir()} - POLICY_FILES):
        raise DataError(f"out={out}: already holds other files; choose another folder")
    if not learner.checkpoint("best").exists():
        raise DataError(f"run={learner.folder}: has no finished episode yet; go on with `acodm train` first")
    learner.load("last" if which == "last" else "best", resume=False)
    provenance = _provenance(learner, train, which)
    if which == "untrained":
        learner.load_networks("initial")
    return export(learner.policy(provenance), out, learner.agent, learner.venv)


def _provenance(learner: "Learner", train: TrainConfig, which: str) -> dict[str, Any]:
    info = learner.env.trainer.info
    provenance = {
        "checkpoint": which,
        "config": settings_of(train),
        "corpus_fingerprint": info.corpus_fingerprint,
        "learning_transitions": learner.agent.num_timesteps,
        "learning_tokens": learner.steps * info.batch_size * info.sequence_length,
        "learning_seconds": learner.seconds,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(provenance))
    return plain
