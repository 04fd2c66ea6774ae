"""What a target run is told, whoever decides its mixture, and what all of them do before and after it."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from acodm_env.corpus import TokenStore, open_corpus
from acodm_env.corpus.problem import Problem, choose_problem, parse_cut
from acodm_env.errors import AcodmError, ConfigError
from acodm_env.experiments.console import note
from acodm_env.experiments.run_folder import RunFolder, check_folder, differences, recorded_config
from acodm_env.experiments.tracking import trackers
from acodm_env.objective import check_metric, parse_targets

if TYPE_CHECKING:
    from acodm_env.pretrain.trainer import LMTrainer

ASIDE = (
    *("quiet", "out", "reference", "gate", "resume", "adapt", "keep", "checkpoint_every", "on_nonfinite"),
    "track",
)
"""Settings that may differ from one start of a run to the next: they leave its numbers alone."""
PROBLEM = ("objective", "targets", "cut")
"""Settings that a run records as what they mean (`identity_of`)."""


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Settings of the target, its processes and its folder."""

    corpus: str = "pocket"
    """Folder of a token store, or "pocket"."""
    domains: str | None = None
    """The domains of the corpus to train on, separated by commas; default: all."""
    objective: str = "loss"
    """What is averaged over the targets: loss, or perplexity (its logarithm)."""
    targets: str | None = None
    """Held-out targets with their weights, such as "prose=2,licences=1": domains, or texts of the corpus that nothing
    is trained on; default: all domains that are trained on, alike."""
    cut: str | None = None
    """Sequences to which the training text of domains is cut, such as "prose=160"."""
    target: str = "small"
    """Model: preset (tiny, small, pythia-14m … pythia-1b), a config.json, or a hub name."""
    steps: int = 300
    """Optimiser steps."""
    batch_size: int = 32
    """Sequences per step, of all processes and micro-batches together."""
    sequence_length: int = 128
    """Tokens per sequence."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    schedule: str = "cosine"
    """Learning-rate schedule after the warm-up: cosine or constant."""
    evaluations: int = 20
    """Evaluations on the test split during the run."""
    eval_sequences: int = 64
    """Held-out sequences per target and split; all of them where there are fewer."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """auto (bf16 where a CUDA device has it), fp32 or bf16."""
    accumulation: int = 1
    """Micro-batches per step: the same gradient in as many times less memory."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the model."""
    parallel: str = "auto"
    """How several processes share the model: ddp (a copy each), fsdp (a part each), auto (as launched)."""
    on_nonfinite: str = "stop"
    """When a loss or gradient is not finite: stop the run, or skip the step's update and go on."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; default: a tenth of the run."""
    keep: int = 2
    """Checkpoints that stay."""
    resume: bool = True
    """Go on from the newest whole checkpoint in --out; --no-resume refuses a folder that holds a run."""
    seed: int = 0
    """Seed of model initialisation and data order: the same for every mixer to be compared."""
    decision_every: int | None = None
    """Steps between decisions."""
    prefetch: int | None = None
    """Batches that a background thread builds ahead."""
    out: str = "runs/target"
    """Folder of the run; the same command again resumes it."""
    track: str = "auto"
    """Where the run is shown besides its folder: tensorboard, wandb, trackio, mlflow, several separated by commas; auto
    (TensorBoard where it is installed) or none."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        trackers(self.track)  # a package that is not installed is told before anything is done
        check_metric(self.objective)
        parse_targets(self.targets)
        parse_cut(self.cut or "")
        least_of = {"steps": 1, "evaluations": 1, "seed": 0, "decision_every": 1, "checkpoint_every": 1, "keep": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value}: must be at least {least}")


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
    from acodm_env.evaluation.loading import weight_files

    if result["diverged"]:
        return False
    try:
        weight_files(folder.path / "model")
    except AcodmError:
        note("the run is finished, but its model/ is not there or not whole: it is written from the last checkpoint")
        return True
    return False
