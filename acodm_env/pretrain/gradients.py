"""All per-domain gradients of chosen linear layers from one backward pass, and their Gram matrix.

For a linear layer the weight's gradient is Σ_tokens g_out xᵀ. With the batch's rows ordered by group (domain and half),
the groups' gradients are slices of that same product, and their sum *is* the ordinary weight gradient: a custom
autograd function that computes the slices and returns their sum costs no extra multiply-adds. What it costs is memory,
a float per group and weight, which a seeded random projection reduces.

The unbiased diagonal: a domain's gradient from few samples is mostly noise, so ⟨ĝ_i, ĝ_i⟩ overestimates ‖g_i‖² by the
noise power. Each domain's sequences are therefore split into two halves a, b, and H_ii = ⟨g_iᵃ, g_iᵇ⟩ (the paper,
arXiv 2505.23878, leaves the diagonal out).
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from acodm_env.errors import ConfigError
from acodm_env.trainer import Array

_CHUNK = 1 << 14  # columns of the sums turned to float64 at a time: what fits into a core's cache


def order_rows(domains: NDArray[np.int64], previous_draws: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sort a batch's rows by (domain, half): the j-th sequence ever drawn from a domain is in its half j % 2.

    Args:
        domains: domain index of every row (B,), in any order.
        previous_draws: sequences drawn per domain (K,) before this batch.

    Returns:
        The permutation of rows (B,), and the rows per group (K, 2).
    """
    num_domains = len(previous_draws)
    order = np.argsort(domains, kind="stable")
    counts = np.bincount(domains, minlength=num_domains)  # (K,)
    nth = np.arange(len(domains)) - np.repeat(np.cumsum(counts) - counts, counts)  # (B,) rank within its domain
    by_domain = domains[order]
    group = 2 * by_domain + (nth + previous_draws.astype(np.int64)[by_domain]) % 2  # (B,)
    sizes = np.bincount(group, minlength=2 * num_domains).reshape(num_domains, 2)
    return order[np.argsort(group, kind="stable")], sizes


class _Buffers:
    """Memory of one probe's results, used again once nobody holds them: a CPU's fresh pages cost more than the slices.

    CUDA's caching allocator does the same by itself.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.float32]] = []

    def __reduce__(self) -> tuple[type["_Buffers"], tuple[()]]:
        return _Buffers, ()

    def take(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Uninitialised float32."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=torch.float32, device=device)
        size = int(np.prod(shape))
        memory = self._free.pop() if self._free else np.empty(size + 16, dtype=np.float32)
        start = -memory.ctypes.data % 64 // 4  # aligned as torch's own memory is
        lease = memory[start : start + size]  # lives as long as any tensor over it
        weakref.finalize(lease, self._free.append, memory).atexit = False
        return torch.from_numpy(lease).view(shape)


@dataclass(frozen=True, eq=False)
class DomainGradients:
    """Per-domain sums of token-loss gradients over a window; additive, unlike their Gram matrix."""

    sums: torch.Tensor
    """(K, 2, P) float32, the P weights of all probed layers (or of their sketches) in order; (K, 1, P) unhalved."""
    tokens: Array
    """Predicted tokens behind each sum (K, 2), or (K, 1)."""
    buffers: _Buffers = field(default_factory=_Buffers, repr=False)
    """Where sums of windows take their memory."""

    def __add__(self, other: "DomainGradients") -> "DomainGradients":
        """Sum of two windows."""
        out = self.buffers.take(tuple(self.sums.shape), self.sums.device)
        return DomainGradients(torch.add(self.sums, other.sums, out=out), self.tokens + other.tokens, self.buffers)

    def unweighted(self, factors: Array) -> "DomainGradients":
        """The gradients of the plain losses, where domain i's was multiplied by factors[i] (K,); 0 leaves none."""
        scale = np.divide(1.0, factors, out=np.zeros(len(factors)), where=np.asarray(factors) > 0)
        self.sums.mul_(torch.from_numpy(scale).to(self.sums)[:, None, None])
        return DomainGradients(self.sums, np.where(scale[:, None] > 0, self.tokens, 0.0), self.buffers)

    def gram(self) -> tuple[Array, Array]:
        """Gram matrix H (K, K) of the domains' mean gradients, and their noise power ‖g_i‖² − H_ii (K,).

        The diagonal is unbiased: the product of two halves. An absent domain has NaN in its row and column, a
        domain with an empty half a NaN diagonal. Unhalved, the diagonal is ‖g_i‖² and the noise 0.
        """
        products, across = self._inner_products()
        total = self.tokens.sum(1)  # (K,)
        with np.errstate(divide="ignore", invalid="ignore"):
            gram: Array = products / np.outer(total, total)
            squared_norm = np.diag(gram).copy()
            diagonal = squared_norm if across is None else across / self.tokens.prod(1)
        gram[np.diag_indices(len(total))] = diagonal
        gram[~np.isfinite(gram)] = np.nan
        return gram, squared_norm - np.diag(gram)

    def _inner_products(self) -> tuple[Array, Array | None]:
        """Of the domains' totals (K, K), and of each domain's two halves (K,); float64, a chunk at a time."""
        num_domains, num_halves, _ = self.sums.shape
        products = torch.zeros(num_domains, num_domains, dtype=torch.float64, device=self.sums.device)
        across = products.new_zeros(num_domains)
        for chunk in torch.split(self.sums, _CHUNK, dim=2):
            wide = chunk.double()  # (K, 2, chunk)
            total = wide.sum(1)
            products += total @ total.T
            across += (wide[:, 0] * wide[:, -1]).sum(1)
        return products.cpu().numpy(), across.cpu().numpy() if num_halves == 2 else None


class _Recorder:
    """Where one layer's slices go during a backward pass."""

    def __init__(self, module: nn.Module, signs: tuple[torch.Tensor, torch.Tensor] | None):
        self.module = module
        self.transposed = not isinstance(module, nn.Linear)  # Conv1D keeps its weight as (in, out)
        self.weight: torch.Tensor = module.weight  # type: ignore[assignment]
        self.signs = signs  # ±1 (out, r) and (in, r)
        self.rows: tuple[int, ...] = ()  # per group; empty while not recording
        self.slices: torch.Tensor | None = None  # (groups, *shape), a view into the probe's buffer
        self.filled = False
        self.own_forward: Callable[..., torch.Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of one group's slice."""
        if self.signs is not None:
            return self.signs[0].shape[1], self.signs[1].shape[1]
        return self.weight.shape[0], self.weight.shape[1]

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
        if self.signs is None:
            gradient = _group_products(left, right, rows, out).sum(0)
        else:
            gradient = left.T @ right
            signs_out, signs_in = (matrix.to(g) for matrix in self.signs)
            _group_products(g @ signs_out, x @ signs_in, rows, out).div_(signs_in.shape[1])
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
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, recorder: _Recorder
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


class GradientProbe:
    """Swaps the `forward` of chosen layers so that a backward pass leaves every domain's gradient behind.

    The model's parameters, state dict and hooks stay as they are; while not recording, the layers do exactly what
    they did. One step: `begin` before the forward pass (of every micro-batch), backward, `collect`.
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, nn.Module]],
        num_domains: int,
        *,
        halves: bool = True,
        sketch_size: int | None = None,
        seed: int = 0,
    ):
        """Choose what to probe.

        Args:
            layers: (name, module) pairs of `nn.Linear` or transformers' `Conv1D`.
            num_domains: K.
            halves: keep two sums per domain, for the unbiased diagonal; False halves the memory.
            sketch_size: side r of a two-sided random projection SᵀGR with ±1/√r entries, which keeps inner products
                in expectation and needs 2K·r² instead of 2K·|W| floats per layer; None keeps the gradients whole.
            seed: of the projection.

        Raises:
            ConfigError: no layer, a layer of another kind, or a sketch size below 1.
        """
        if not layers:
            raise ConfigError("layers=[]: must name at least one layer to probe")
        if sketch_size is not None and sketch_size < 1:
            raise ConfigError(f"sketch_size={sketch_size}: must be at least 1, or None for whole gradients")
        self.num_domains, self.halves, self.sketch_size = num_domains, halves, sketch_size
        generator = torch.Generator().manual_seed(seed)
        self._recorders = []
        for name, module in layers:
            if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
                raise ConfigError(f"layers={name}: must be nn.Linear or Conv1D; it is {type(module).__name__}")
            signs = None if sketch_size is None else _random_signs(module, sketch_size, generator)
            self._recorders.append(_Recorder(module, signs))
        self._buffers = _Buffers()
        self._buffer: torch.Tensor | None = None  # (groups, P) while a window is being recorded

    def attach(self) -> None:
        """Swap the layers' `forward`."""
        self.detach()
        for recorder in self._recorders:
            recorder.own_forward = recorder.module.__dict__.get("forward")
            recorder.module.forward = _RecordingForward(recorder, recorder.module.forward)

    def detach(self) -> None:
        """Put the layers' own `forward` back."""
        for recorder in self._recorders:
            if isinstance(recorder.module.__dict__.get("forward"), _RecordingForward):
                del recorder.module.forward
                if recorder.own_forward is not None:
                    recorder.module.forward = recorder.own_forward

    def begin(self, group_sizes: NDArray[np.int64]) -> None:
        """Record the coming forward and backward pass; the batch's rows must be ordered as `order_rows` says.

        Args:
            group_sizes: rows per group (K, 2).
        """
        if self._buffer is None:
            self._allocate()
        rows = tuple(np.ravel(group_sizes if self.halves else group_sizes.sum(1)).tolist())
        for recorder in self._recorders:
            recorder.rows = rows

    def _allocate(self) -> None:
        """One buffer for all layers, which `collect` hands over."""
        num_groups = self.num_domains * (1 + self.halves)
        sizes = [rows * columns for rows, columns in (recorder.shape for recorder in self._recorders)]
        self._buffer = self._buffers.take((num_groups, sum(sizes)), self._recorders[0].weight.device)
        for recorder, part in zip(self._recorders, torch.split(self._buffer, sizes, dim=1), strict=True):
            recorder.slices, recorder.filled = part.view(num_groups, *recorder.shape), False

    def collect(
        self, tokens: NDArray[Any], normaliser: float, precondition: torch.optim.Optimizer | None = None
    ) -> DomainGradients:
        """Stop recording and hand over the sums of token-loss gradients since the last `collect`.

        Args:
            tokens: predicted tokens per group (K, 2), over all backward passes recorded.
            normaliser: by what the loss divided its sum over tokens.
            precondition: an Adam whose second moment, as it is now, scales the gradients: ⟨P^½ g_i, P^½ g_j⟩ with
                P = 1/(√v̂ + ε). Call before its step; before the first one there is none, and P = 1.

        Raises:
            ConfigError: preconditioning of sketched gradients, or by something else than Adam.
        """
        if self._buffer is None or not all(recorder.filled for recorder in self._recorders):
            raise RuntimeError("collect() needs a recorded backward pass: call begin() before the forward pass")
        sums = self._buffer.mul_(normaliser)
        for recorder in self._recorders:
            if precondition is not None:
                if recorder.signs is not None:
                    raise ConfigError("precondition=True: needs whole gradients; leave sketch_size at None")
                assert recorder.slices is not None
                recorder.slices *= _root_preconditioner(precondition, recorder.weight)
            recorder.slices, recorder.rows = None, ()
        self._buffer = None
        counts = np.asarray(tokens, dtype=np.float64)
        counts = counts if self.halves else counts.sum(1, keepdims=True)
        return DomainGradients(sums.view(self.num_domains, 1 + self.halves, -1), counts, self._buffers)


class _RecordingForward:
    """The `forward` of a probed layer."""

    def __init__(self, recorder: _Recorder, plain: Callable[..., torch.Tensor]):
        self.recorder, self.plain = recorder, plain

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        recorder = self.recorder
        if not recorder.rows or not torch.is_grad_enabled():
            return self.plain(x)
        apply: Any = _ProbedLinear.apply
        probed: torch.Tensor = apply(x, recorder.module.weight, recorder.module.bias, recorder)
        return probed


def _random_signs(module: nn.Module, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """±1 matrices (out, r) and (in, r), exact in half precision; the scale 1/r is applied to the slices."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    widths = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
    left, right = (torch.randint(0, 2, (width, size), generator=generator).mul_(2).sub_(1) for width in widths)
    return left.to(weight.device, torch.float32), right.to(weight.device, torch.float32)


def _root_preconditioner(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> torch.Tensor | float:
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
