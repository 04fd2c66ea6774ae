"""Per-group weight gradients of a linear layer, projected to a few numbers: SᵀGR/r with random signs S and R.

They keep inner products in expectation, need r² floats per group instead of |W|, and are what processes exchange.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Sketcher:
    """One layer's projected slices, as the gradient of a tensor that has no other use.

    Nothing but tensors goes in and out of the backward pass, so that `torch.compile` traces it, and their shapes do
    not depend on how a batch is composed, so that it traces it once.
    """

    def __init__(self, module: nn.Module, size: int, num_groups: int, generator: torch.Generator):
        self.module, self.num_groups, self.size = module, num_groups, size
        self.transposed = not isinstance(module, nn.Linear)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        self.device = weight.device
        widths = weight.shape[::-1] if self.transposed else weight.shape  # (out, in)
        self.signs_out, self.signs_in = (self._signs(int(width), generator) for width in widths)
        self.slices = torch.zeros(num_groups, size, size, device=self.device, requires_grad=True)
        self.membership = torch.empty(0)  # (groups, B) one where a row belongs to a group
        self.recording = False

    def _signs(self, width: int, generator: torch.Generator) -> torch.Tensor:
        """±1 (width, r), exact in half precision; the scale 1/r is applied to the slices."""
        signs = torch.randint(0, 2, (width, self.size), generator=generator).mul_(2).sub_(1)
        return signs.to(self.device, torch.float32)

    def begin(self, rows: tuple[int, ...], groups: NDArray[np.int64]) -> None:
        """Record the coming pass of a batch whose rows belong to `groups` (B,)."""
        index = torch.from_numpy(groups)
        self.membership = functional.one_hot(index, self.num_groups).T.to(self.device, torch.float32).contiguous()
        self.recording = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output; its backward pass leaves the sketches in `slices.grad`."""
        apply: Any = _SketchedLinear.apply
        weight, bias = self.module.weight, self.module.bias
        tensors = (self.slices, self.membership, self.signs_out, self.signs_in)
        sketched: torch.Tensor = apply(x, weight, bias, *tensors, self.transposed)
        return sketched


class _SketchedLinear(torch.autograd.Function):
    """A linear layer; the gradient of its `slices` is the per-group weight gradient, projected on both sides."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        slices: torch.Tensor,
        membership: torch.Tensor,
        signs_out: torch.Tensor,
        signs_in: torch.Tensor,
        transposed: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, membership, signs_out, signs_in)
        ctx.transposed, ctx.has_bias = transposed, bias is not None
        return functional.linear(x, weight.T if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, membership, signs_out, signs_in = ctx.saved_tensors
        as_used = weight.to(grad.dtype)  # autocast may have computed in half precision
        grad_x = grad @ (as_used.T if ctx.transposed else as_used) if ctx.needs_input_grad[0] else None
        g = grad.reshape(-1, grad.shape[-1])  # (N, out)
        rows = x.reshape(-1, x.shape[-1]).to(grad.dtype)  # (N, in)
        grad_weight = (rows.T @ g if ctx.transposed else g.T @ rows).to(weight.dtype)
        grad_bias = g.sum(0).to(weight.dtype) if ctx.has_bias else None
        num_rows, size = membership.shape[1], signs_in.shape[1]
        left = (g @ signs_out.to(g)).float().view(num_rows, -1, size)  # (B, T, r)
        right = (rows @ signs_in.to(g)).float().view(num_rows, -1, size)  # (B, T, r)
        products = torch.bmm(left.transpose(1, 2), right).view(num_rows, -1)  # (B, r·r)
        sketches = (membership @ products).view(-1, size, size) / size  # (groups, r, r)
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, grad_bias, sketches, *[None] * 4
