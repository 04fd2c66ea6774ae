"""A model and its optimiser as one run needs them: compiled or not, on one process, copied (DDP) or divided (FSDP2).

Accelerate prepares model and optimiser of a target run, never the loader, which would fetch batches ahead of the
mixture, nor the scheduler, which would advance once per process. FSDP2 is applied here, by `fully_shard`, on CPU and
CUDA alike, because an Accelerator silently makes it DDP on a CPU.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from acodm_env.errors import ConfigError, unknown
from acodm_env.pretrain.config import LMConfig, resolve_device
from acodm_env.pretrain.models import blocks

if TYPE_CHECKING:
    from accelerate import Accelerator

_SHARED = ("MULTI_CPU", "MULTI_GPU", "FSDP", "NO")


@dataclass(frozen=True, kw_only=True, eq=False)
class Wrapping:
    """What trains: the model as it is called, and the module inside it."""

    model: nn.Module
    """Called in training steps."""
    bare: nn.Module
    """The transformers model itself, with its own parameter names; called in evaluations."""
    optimizer: torch.optim.Optimizer
    parameters: tuple[nn.Parameter, ...]
    """In the bare model's order; each a part (`DTensor`) under FSDP2."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around one forward and backward pass; processes with a copy each average their gradients after the last."""
        no_sync = None if last else getattr(self.model, "no_sync", None)
        return nullcontext() if no_sync is None else no_sync()

    def clip(self, largest: float) -> torch.Tensor:
        """Clip the gradient to an L2 norm; returns the norm before that, a scalar on the device."""
        return whole(nn.utils.clip_grad_norm_(self.parameters, largest))


def wrap(model: nn.Module, config: LMConfig, accelerator: "Accelerator | None", device: torch.device) -> Wrapping:
    """Put a fresh model to work.

    Args:
        model: on the CPU.
        config: of the run.
        accelerator: of a target run; None is plain torch.
        device: where to train.

    Raises:
        ConfigError: what is asked for cannot be had here.
    """
    if config.gradient_checkpointing:
        _checkpoint_blocks(model)
    divided = is_divided(config, accelerator)
    if divided:
        return _divided(model, config, device)
    model.to(device).train()
    called: nn.Module = torch.compile(model, backend=_backend(config, device)) if config.compile else model  # type: ignore[assignment]
    optimizer: torch.optim.Optimizer = _optimizer(model, config)
    if accelerator is not None:
        accelerator.free_memory()
        called, optimizer = accelerator.prepare(called, optimizer)
    return Wrapping(model=called, bare=model, optimizer=optimizer, parameters=tuple(model.parameters()))


def is_divided(config: LMConfig, accelerator: "Accelerator | None") -> bool:
    """Whether every process holds a part of the model only (FSDP2).

    Raises:
        ConfigError: the launcher and the configuration disagree.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    if config.parallel == "auto":
        return launched and accelerator is not None and distributed.is_initialized()
    if config.parallel == "fsdp" and not (accelerator is not None and distributed.is_initialized()):
        raise ConfigError(
            "parallel=fsdp: needs processes to divide the model among; start the run by torchrun or accelerate launch"
        )
    if config.parallel == "ddp" and launched:
        raise ConfigError("parallel=ddp: the launcher was told to use FSDP; launch without --use_fsdp, or take auto")
    return config.parallel == "fsdp"


def _divided(model: nn.Module, config: LMConfig, device: torch.device) -> Wrapping:
    """FSDP2: every block a unit, then the rest; its gradients are averaged, as DDP's are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.train()
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in blocks(model):
        if config.compile:
            block.compile(backend=_backend(config, device))
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # moves what is left to the mesh's device
    optimizer = _optimizer(model, config)
    return Wrapping(model=model, bare=model, optimizer=optimizer, parameters=tuple(model.parameters()))


def _checkpoint_blocks(model: nn.Module) -> None:
    # Renamed in the course of transformers 5.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    try:
        getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    except (AttributeError, ValueError) as error:
        raise ConfigError(
            f"gradient_checkpointing=True: {type(model).__name__} does not support it ({error})"
        ) from error


def _backend(config: LMConfig, device: torch.device) -> str:
    """The compiler's backend, where it can work."""
    known = torch._dynamo.list_backends(exclude_tags=())
    if config.compile_backend not in known:
        unknown("compile_backend", config.compile_backend, known)
    compilers = (os.environ.get("CXX", ""), "g++", "clang++")
    if config.compile_backend == "inductor" and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise ConfigError("compile=True: needs a C++ compiler on a CPU; install g++, or leave compile at False")
    return config.compile_backend


def compiled(function: Callable[..., torch.Tensor], config: LMConfig, device: torch.device) -> Callable[..., Any]:
    """`function`, compiled if the run is."""
    return torch.compile(function, backend=_backend(config, device)) if config.compile else function


def _optimizer(model: nn.Module, config: LMConfig) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that processes hold parts of, put together on each of them; any other as it is."""
    put_together: Any = getattr(tensor, "full_tensor", None)
    joined: torch.Tensor = tensor if put_together is None else put_together()
    return joined


def target_accelerator(device: str) -> "Accelerator":
    """The process's Accelerator for a target run on `device`; autocast is ours, so it adds no precision of its own.

    Raises:
        ConfigError: a device by number, or an engine of the launcher that this package does not drive.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    if resolve_device(device).index is not None:
        raise ConfigError(f"device={device}: a target run takes the first visible device; set CUDA_VISIBLE_DEVICES")
    cpu = resolve_device(device).type == "cpu"
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no second copy of the gradient
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[buckets])
    if (engine := str(accelerator.distributed_type).rpartition(".")[2]) not in _SHARED:
        raise ConfigError(f"distributed_type={engine}: must be one of {', '.join(_SHARED)}; launch with another engine")
    return accelerator
