"""`acodm export`: turn a learned agent into a policy folder that needs no RL library."""

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.config import from_dict
from acodm_env.errors import ConfigError, DataError, unknown
from acodm_env.experiments.console import note, say
from acodm_env.experiments.policy.config import TrainConfig
from acodm_env.experiments.policy.train import make_learner, settings_of
from acodm_env.experiments.publish.hub import check_push, push_folder
from acodm_env.experiments.publish.policy_card import CARD, without_paths, write_policy_card
from acodm_env.experiments.run.folder import git_commit, open_run, versions
from acodm_env.policy.dense import Policy
from acodm_env.policy.load import load_policy
from acodm_env.wrapper import innermost

if TYPE_CHECKING:
    from acodm_env.agents.learning import Learner

POLICY_FILES = {"policy.json", "policy.safetensors", CARD}
CHECKPOINTS = ("best", "last", "untrained")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a learned agent as a policy folder: safetensors, JSON and a card, verified by re-loading."""

    run: str = "runs/train"
    """Folder of an `acodm train` run."""
    which: str = "best"
    """best (by held-out objective), last, or untrained: the actor at its initialisation, as a control."""
    out: str = "runs/policy"
    """Folder of the exported policy."""
    policy: str | None = None
    """Folder of a policy that was exported before, to be pushed as it is: nothing is exported then."""
    push: str | None = None
    """OWNER/NAME on the hub to push the policy to, after it was checked. Needs HF_TOKEN; HF_ENDPOINT names another
    hub."""
    private: bool = False
    """Make the repository visible to its owner alone."""
    seed: int = 0
    """Not used by an export; accepted because every command takes it."""
    quiet: bool = False
    """Print only where the policy lies."""

    def __post_init__(self) -> None:
        if self.which not in CHECKPOINTS:
            unknown("which", self.which, CHECKPOINTS)
        if self.policy is not None and self.push is None:
            raise ConfigError(f"policy={self.policy}: must come with --push OWNER/NAME; it is exported already")


def run(config: ExportConfig) -> None:
    """Export and say how exactly the file reproduces the agent; push if asked."""
    check_push(config.push, private=config.private)
    if config.policy is None:
        _export(config)
    if config.push is not None:
        say(f"pushed: {push_policy(config.policy or config.out, config.push, private=config.private)}")


def push_policy(path: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a policy folder, with a card if it has none yet, and return the commit's URL.

    Paths in the record of its learning, which earlier versions wrote, are told as bare names: a rewritten copy is
    pushed then, which decides the same and has the same fingerprint.

    Args:
        path: of the policy, which is loaded first.
        repo: OWNER/NAME on the hub.
        private: the repository must be visible to its owner alone.

    Raises:
        ConfigError, DataError, PolicyError: it is no whole policy, or cannot be pushed; nothing was pushed then.
    """
    policy = load_policy(path)
    if not (Path(path) / CARD).exists():
        write_policy_card(path, policy, repo)
    message = f"Policy {policy.fingerprint[:16]}"
    told = _without_paths(policy)
    if told.provenance == policy.provenance:
        return push_folder(path, repo, POLICY_FILES, message=message, private=private)
    note(f"{path}: policy.json names local paths; a copy with bare names instead is pushed, the folder stays as it is")
    with tempfile.TemporaryDirectory() as place:
        copy = told.save(Path(place) / "policy")
        shutil.copyfile(Path(path) / CARD, copy / CARD)
        return push_folder(copy, repo, POLICY_FILES, message=message, private=private, original=path)


def _without_paths(policy: Policy) -> Policy:
    """The same policy, whose provenance names no paths."""
    config = policy.provenance.get("config")
    if not isinstance(config, dict):
        return policy
    return replace(policy, provenance={**policy.provenance, "config": without_paths(config)})


def _export(config: ExportConfig) -> None:
    recorded = open_run(config.run).config
    train = from_dict(TrainConfig, recorded, "run")
    learner = make_learner(replace(train, out=config.run))
    error = export_from(learner, train, config.which, Path(config.out), config.push)
    if not config.quiet:
        say(f"re-loaded: max |a_file - a_agent| = {error:.2g} on 256 observations")
    say(f"policy: {config.out} ({', '.join(sorted(POLICY_FILES))})")


def export_from(learner: "Learner", train: TrainConfig, which: str, out: Path, repo: str | None = None) -> float:
    """Write the policy folder of a checkpoint and return the largest difference from the agent.

    "untrained" takes the actor of the initial checkpoint with the observation statistics of the best one, so that
    it differs from the exported policy in nothing but the actor's learning. `repo` is where on the hub it will lie, for
    its card.

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
    policy = learner.policy(provenance)
    error = export(policy, out, learner.agent, learner.venv)
    write_policy_card(out, policy, repo)
    return error


def _flops_per_token(learner: "Learner", train: TrainConfig) -> float:
    """Model FLOPs of the proxy's training on one token; 0 on a surrogate, which trains no model."""
    if train.surrogate is not None:
        return 0.0
    from acodm_env.pretrain.models import flops_per_token_of

    vocab_size = innermost(learner.env.trainer).store.vocab_size
    return flops_per_token_of(train.proxy, vocab_size, train.sequence_length)


def _provenance(learner: "Learner", train: TrainConfig, which: str) -> dict[str, Any]:
    info = learner.env.trainer.info
    tokens = learner.steps * info.batch_size * info.sequence_length
    provenance = {
        "checkpoint": which,
        "config": without_paths(settings_of(train)),  # others will read it
        "corpus_fingerprint": info.corpus_fingerprint,
        "learning_transitions": learner.agent.num_timesteps,
        "learning_tokens": tokens,
        "learning_flops": tokens * _flops_per_token(learner, train),
        "learning_seconds": learner.seconds,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(provenance))
    return plain


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm export, or python -m acodm_env export")
