"""What target runs are told."""

from dataclasses import dataclass

from acodm_env.corpus.problem import parse_cut
from acodm_env.errors import ConfigError
from acodm_env.experiments.run.tracking import trackers
from acodm_env.objective import check_metric, parse_targets

ASIDE = (
    "quiet", "out", "reference", "gate", "resume", "adapt", "keep", "checkpoint_every", "on_nonfinite", "track",
)  # fmt: skip
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


@dataclass(frozen=True, kw_only=True)
class TransferConfig(TargetConfig):
    """Pre-train a target language model under an exported policy (--policy) or a baseline (--mixer)."""

    policy: str | None = None
    """Folder of an exported policy, or generalist: the shipped one, for any corpus and targets."""
    mixer: str | None = None
    """Name of a baseline, instead of a policy: uniform, proportional, static, odm-paper, odm-released, exp3,
    exp3-classical, ...; `acodm benchmark --list` names them."""
    weights: str | None = None
    """Mixture for --mixer static: "name=0.5,other=0.5", or the JSON that `acodm mixture` prints."""
    decision_every: int | None = None
    """Steps between decisions of a policy; default: as learned, scaled by the ratio of horizons."""
    reference: str | None = None
    """Folder of a finished run, against whose best objective the steps are counted."""
    prefetch: int | None = None
    """Batches that a background thread builds ahead; mixtures take effect as many steps late. Default: the lag that the
    policy learned with, else 0."""
    adapt: bool = False
    """Go on from the checkpoint although mixer, weights, corpus or other settings are others; what a domain that stays
    has drawn is neither repeated nor skipped."""
    out: str = "runs/transfer"
    """Folder of the run; the same command again resumes it."""
    gate: bool = True
    """Judge the policy first, as `acodm gate` does, and refuse one that fails, or that was learned for another
    objective; --no-gate goes on all the same."""
    certificate: str | None = None
    """Folder of a certificate by `acodm gate --proxy`, whose verdict is applied: the policy, half of it, or uniform."""
    certify: bool = False
    """Make the certificate first, in --certificate or beside --out; the same command goes on with it."""
    proxy: str = "tiny"
    """Of --certify: the model on which the policy is tried."""
    proxy_steps: int = 400
    """Of --certify: optimiser steps of each of its runs; domains are cut so that they are passed over as often."""
    proxy_seeds: int = 2
    """Of --certify: seeds, none of them this run's."""

    def __post_init__(self) -> None:
        if (self.policy is None) == (self.mixer is None):
            raise ConfigError("policy, mixer: give exactly one of them, --policy DIR or --mixer NAME")
        if self.weights is not None and self.mixer != "static":
            raise ConfigError(f"weights={self.weights}: only --mixer static takes weights")
        if self.policy is None and (self.certify or self.certificate):
            raise ConfigError("certificate, certify: must come with --policy; a baseline needs none")
        super().__post_init__()
