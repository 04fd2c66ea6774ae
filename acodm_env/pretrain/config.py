"""Settings of one pre-training run, its learning-rate schedule and its device."""

import math
from dataclasses import dataclass

import torch

from acodm_env.errors import ConfigError, unknown

SCHEDULES = ("cosine", "constant")
PRECISIONS = ("auto", "fp32", "bf16")
PARALLEL = ("auto", "ddp", "fsdp")
NONFINITE = ("stop", "skip")


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """Model, data shape and optimisation of one pre-training run."""

    model: str = "tiny"
    """Preset (tiny, small, pythia-14m … pythia-1b), a config.json, or a hub name."""
    horizon: int = 200
    """Optimiser steps."""
    decision_every: int = 5
    """Optimiser steps between two decisions."""
    batch_size: int = 16
    """Sequences per step, of all processes and micro-batches together."""
    sequence_length: int = 128
    """Tokens per sequence."""
    accumulation: int = 1
    """Micro-batches per step: the same gradient in as many times less memory."""
    prefetch: int = 0
    """Batches that a background thread builds ahead; a mixture takes effect as many steps late."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW."""
    schedule: str = "cosine"
    """"cosine" to `min_lr_frac`, or "constant" after the warm-up."""
    warmup_frac: float = 0.05
    """Share of the horizon with a linearly rising learning rate."""
    min_lr_frac: float = 0.1
    """Final learning rate over the peak."""
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    """On matrices only."""
    clip_norm: float = 1.0
    """Largest L2 norm of the gradient."""
    eval_sequences: int = 8
    """Held-out sequences per domain and split."""
    probe_depths: tuple[float, ...] | None = None
    """Relative depths of the probed MLP outputs; None is up to three in the deep half."""
    sketch_size: int | None = None
    """Side of the random projection of each probed gradient; None keeps them whole on one uncompiled process."""
    precondition: bool = False
    """Measure gradients as Adam sees them, ⟨P^½ g_i, P^½ g_j⟩."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    precision: str = "auto"
    """"auto" (bf16 autocast on a CUDA device that has it), "fp32" or "bf16"."""
    gradient_checkpointing: bool = False
    """Compute the blocks' activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the model, by `torch.compile`."""
    compile_backend: str = "inductor"
    """Backend of `torch.compile`; "inductor" needs a C++ compiler on a CPU."""
    parallel: str = "auto"
    """How several processes share the model: "ddp" (a copy each), "fsdp" (a part each), "auto": as launched."""
    on_nonfinite: str = "stop"
    """When a loss or gradient is not finite: "stop" the run, or "skip" the step's update."""

    def __post_init__(self) -> None:
        for name in ("horizon", "decision_every", "batch_size", "eval_sequences", "accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.prefetch < 0:
            raise ConfigError(f"prefetch={self.prefetch}: must be 0 or more batches")
        if self.sequence_length < 2:
            raise ConfigError(f"sequence_length={self.sequence_length}: must be at least 2 tokens")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive")
        choices = (
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("parallel", PARALLEL),
            ("on_nonfinite", NONFINITE),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                unknown(name, getattr(self, name), allowed)
        if self.precondition and self.sketch_size is not None:
            raise ConfigError("precondition=True: needs whole gradients; leave sketch_size at None")
        if self.precondition and self.compile:
            raise ConfigError(
                "precondition=True: needs whole gradients, whose recording would be compiled anew for every batch; "
                "leave compile at False"
            )

    def local_batch(self, world: int) -> int:
        """Sequences per micro-batch of one process of `world`.

        Raises:
            ConfigError: the batch cannot be divided.
        """
        parts = world * self.accumulation
        if self.batch_size % parts:
            raise ConfigError(
                f"batch_size={self.batch_size}: must be divisible by {parts}, {world} processes × accumulation="
                f"{self.accumulation}; it is the whole batch's size; take {max(1, self.batch_size // parts) * parts}"
            )
        return self.batch_size // parts

    def lr_at(self, step: int) -> float:
        """Learning rate of the optimiser step `step` (from 0)."""
        warmup = max(1, round(self.warmup_frac * self.horizon))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = min(1.0, (step - warmup) / max(1, self.horizon - warmup))
        share = self.min_lr_frac + (1 - self.min_lr_frac) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * share


def resolve_device(name: str) -> torch.device:
    """The torch device of "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name}: must be auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name}: no CUDA device is visible here; use device=cpu or auto")
    return device
