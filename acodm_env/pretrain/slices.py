"""Whole per-group weight gradients of a linear layer, from the backward pass that computes their sum.

The weight's gradient is Σ_tokens g_out xᵀ: with rows ordered by group, the groups' gradients are slices of it.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from acodm_env.errors import ConfigError


class Recorder:
    """Where one layer's whole slices go during a backward pass."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.transposed = not isinstance(module, nn.Linear)  # Conv1D keeps its weight as (in, out)
        self.weight: torch.Tensor = module.weight  # type: ignore[assignment]
        self.rows: tuple[int, ...] = ()  # per group; empty while not recording
        self.slices: torch.Tensor | None = None  # (groups, *weight.shape), a view into the probe's buffer
        self.filled = False

    def begin(self, rows: tuple[int, ...], groups: NDArray[np.int64]) -> None:
        """Record the coming pass of a batch with so many rows per group."""
        self.rows = rows

    @property
    def recording(self) -> bool:
        """Whether a backward pass is to leave slices behind."""
        return bool(self.rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, recorded."""
        apply: Any = _ProbedLinear.apply
        probed: torch.Tensor = apply(x, self.module.weight, self.module.bias, self)
        return probed

    def record(self, g: torch.Tensor, x: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
        """Add one pass's slices to the buffer; return the weight's gradient, shaped as the weight.

        Args:
            g: gradient of the output (N, out), rows ordered by group.
            x: input (N, in).
            rows: sequences per group.
        """
        assert self.slices is not None
        out = torch.empty_like(self.slices) if self.filled else self.slices
        left, right = (x, g) if self.transposed else (g, x)
        gradient = _group_products(left, right, rows, out).sum(0)
        if self.filled:
            self.slices += out
        self.filled = True
        return gradient


def _group_products(a: torch.Tensor, b: torch.Tensor, rows: tuple[int, ...], out: torch.Tensor) -> torch.Tensor:
    """aᵀ b over every group's tokens into `out` (groups, a, b), float32; a group without rows is zero.

    A half-precision product is rounded once per group; the groups are summed in float32.
    """
    tokens_per_row = len(a) // max(sum(rows), 1)
    start = 0
    for group, count in enumerate(rows):
        stop = start + count * tokens_per_row
        if count == 0:
            out[group].zero_()
        elif a.dtype == torch.float32:
            torch.mm(a[start:stop].T, b[start:stop], out=out[group])
        else:
            out[group] = a[start:stop].T @ b[start:stop]
        start = stop
    return out


class _ProbedLinear(torch.autograd.Function):
    """A linear layer whose backward pass also records the per-group weight gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, recorder: Recorder
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recorder, ctx.rows, ctx.has_bias = recorder, recorder.rows, bias is not None
        return functional.linear(x, weight.T if recorder.transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        as_used = weight.to(grad.dtype)  # autocast may have computed in half precision
        grad_x = grad @ (as_used.T if ctx.recorder.transposed else as_used) if ctx.needs_input_grad[0] else None
        g = grad.reshape(-1, grad.shape[-1])  # (N, out)
        rows = x.reshape(-1, x.shape[-1]).to(grad.dtype)  # (N, in)
        grad_weight = ctx.recorder.record(g, rows, ctx.rows).to(weight.dtype)
        grad_bias = g.sum(0).to(weight.dtype) if ctx.has_bias else None
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, grad_bias, None


def root_preconditioner(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> torch.Tensor | float:
    """P^½ of Adam for one weight; 1 before its first step."""
    state = optimizer.state.get(weight)
    if not state:
        return 1.0
    if "exp_avg_sq" not in state:
        raise ConfigError(f"precondition=True: needs Adam or AdamW; {type(optimizer).__name__} has no second moment")
    group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
    second_moment = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    root: torch.Tensor = (second_moment.sqrt() + group["eps"]).rsqrt()
    return root
