"""What all target runs do before and after they train, whoever decides the mixture."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from acodm_env.corpus import TokenStore, open_corpus
from acodm_env.corpus.problem import Problem, choose_problem, parse_cut
from acodm_env.errors import AcodmError, ConfigError
from acodm_env.experiments.console import note
from acodm_env.experiments.run.folder import RunFolder, check_folder, differences, recorded_config
from acodm_env.experiments.target.config import ASIDE, PROBLEM, TargetConfig

if TYPE_CHECKING:
    from acodm_env.pretrain.trainer import LMTrainer


def open_store(config: TargetConfig) -> TokenStore:
    """The corpus; of several processes only the first shows progress."""
    return open_corpus(config.corpus, config.quiet or int(os.environ.get("RANK", "0")) > 0)


def problem_of(config: TargetConfig, whole: TokenStore) -> Problem:
    """What the run trains on, and what it is judged by.

    Raises:
        ConfigError, DataError: names, weights or texts are not there (`choose_problem`).
    """
    return choose_problem(
        whole,
        sequence_length=config.sequence_length,
        domains=config.domains,
        targets=config.targets,
        objective=config.objective,
        cut=config.cut,
    )


def identity_of(config: TargetConfig, problem: Problem) -> dict[str, Any]:
    """What makes a run this run, but for who drives it; of the problem only what is not usual."""
    identity = {name: value for name, value in asdict(config).items() if name not in (*ASIDE, *PROBLEM)}
    cut = {"cut": parse_cut(config.cut)} if config.cut else {}
    described = {"domains": list(problem.store.domains), "corpus_fingerprint": problem.store.fingerprint}
    return identity | described | cut | problem.identity()


def target_trainer(config: TargetConfig, problem: Problem, *, decision_every: int, prefetch: int) -> "LMTrainer":
    """The target on Accelerate.

    Args:
        config: of the run.
        problem: its data and its objective.
        decision_every: optimiser steps between decisions.
        prefetch: batches built ahead.
    """
    from acodm_env.pretrain.config import LMConfig
    from acodm_env.pretrain.trainer import LMTrainer, target_accelerator

    settings = LMConfig(
        model=config.target,
        horizon=config.steps,
        decision_every=decision_every,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        learning_rate=config.learning_rate,
        schedule=config.schedule,
        eval_sequences=config.eval_sequences,
        device=config.device,
        precision=config.precision,
        accumulation=config.accumulation,
        prefetch=prefetch,
        gradient_checkpointing=config.gradient_checkpointing,
        compile=config.compile,
        parallel=config.parallel,
        on_nonfinite=config.on_nonfinite,
    )
    return LMTrainer(settings, problem.store, target_accelerator(config.device), **problem.lm_settings)


def check_out(config: TargetConfig, identity: Mapping[str, Any], *, adapt: bool = False) -> None:
    """Refuse a folder that is not this run's, before anything is written.

    Raises:
        ConfigError: it holds a run, and none may be resumed.
        DataError: it holds something else.
    """
    if check_folder(config.out, identity, adapt=adapt) and not config.resume:
        raise ConfigError(f"out={config.out}: must be new with --no-resume; it holds a run; choose another folder")


def finished(config: TargetConfig, folder: RunFolder) -> dict[str, Any] | None:
    """The result of a run that has nothing left to do."""
    result = folder.result
    if result is None or differences(recorded_config(folder.path), folder.config):
        return None
    if result["diverged"] and config.on_nonfinite == "skip":
        note("the run had diverged: it goes on from its last checkpoint, without steps that are not finite")
        (folder.path / "result.json").unlink()
        return None
    return result


def lacks_model(folder: RunFolder, result: Mapping[str, Any]) -> bool:
    """Whether the trained model of a finished run is gone or cut short; its last checkpoint holds the same."""
    from acodm_env.experiments.evaluation.loading import weight_files

    if result["diverged"]:
        return False
    try:
        weight_files(folder.path / "model")
    except AcodmError:
        note("the run is finished, but its model/ is not there or not whole: it is written from the last checkpoint")
        return True
    return False
