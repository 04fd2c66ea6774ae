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

from acodm_env.errors import ConfigError
from acodm_env.pretrain.sketches import Sketcher
from acodm_env.pretrain.slices import Recorder, root_preconditioner
from acodm_env.step_stats import Array

_CHUNK = 1 << 14  # columns of the sums turned to float64 at a time: what fits into a core's cache


def order_rows(domains: NDArray[np.int64], nth: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sort a batch's rows by (domain, half): the j-th sequence ever drawn from a domain is in its half j % 2.

    Args:
        domains: domain index of every row (B,), in any order.
        nth: sequences drawn from the row's domain before it (B,), on whichever process.

    Returns:
        The permutation of rows (B,), and the group 2·domain + half of every row so sorted (B,), ascending.
    """
    group = 2 * domains + nth % 2  # (B,)
    order = np.argsort(group, kind="stable")
    return order, group[order]


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

    def state_dict(self) -> dict[str, Any]:
        """The sums as numpy arrays."""
        return {"sums": self.sums.cpu().numpy().copy(), "tokens": self.tokens.copy()}

    def restored(self, state: dict[str, Any]) -> "DomainGradients":
        """What `state_dict` gave, on this one's device."""
        return DomainGradients(torch.from_numpy(state["sums"]).to(self.sums), np.array(state["tokens"]), self.buffers)

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
        self._num_groups = num_domains * (1 + halves)
        generator = torch.Generator().manual_seed(seed)
        for name, module in layers:
            if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
                raise ConfigError(f"layers={name}: must be nn.Linear or Conv1D; it is {type(module).__name__}")
        modules = [module for _, module in layers]
        self._recorders = [Recorder(module) for module in modules] if sketch_size is None else []
        self._sketchers = (
            []
            if sketch_size is None
            else [Sketcher(module, sketch_size, self._num_groups, generator) for module in modules]
        )
        self._buffers = _Buffers()
        self._buffer: torch.Tensor | None = None  # (groups, P) while a window of whole slices is being recorded

    @property
    def _layers(self) -> Sequence[Recorder | Sketcher]:
        return self._recorders or self._sketchers

    def attach(self) -> None:
        """Swap the layers' `forward`."""
        self.detach()
        for layer in self._layers:
            layer.module.forward = _RecordingForward(layer, layer.module.forward, layer.module.__dict__.get("forward"))

    def detach(self) -> None:
        """Put the layers' own `forward` back."""
        for layer in self._layers:
            swapped = layer.module.__dict__.get("forward")
            if isinstance(swapped, _RecordingForward):
                del layer.module.forward
                if swapped.own is not None:
                    layer.module.forward = swapped.own

    def begin(self, groups: NDArray[np.int64]) -> None:
        """Record the coming forward and backward pass, of one micro-batch.

        Args:
            groups: of the rows (B,), ascending: what `order_rows` gives, or a part of it.
        """
        if self._recorders and self._buffer is None:
            self._allocate()
        groups = groups if self.halves else groups // 2
        assert (np.diff(groups) >= 0).all(), "rows must be sorted by group"
        rows = tuple(np.bincount(groups, minlength=self._num_groups).tolist())
        for layer in self._layers:
            layer.begin(rows, groups)

    def _allocate(self) -> None:
        """One buffer for all layers, which `collect` hands over."""
        sizes = [recorder.weight.numel() for recorder in self._recorders]
        self._buffer = self._buffers.take((self._num_groups, sum(sizes)), self._recorders[0].weight.device)
        for recorder, part in zip(self._recorders, torch.split(self._buffer, sizes, dim=1), strict=True):
            recorder.slices, recorder.filled = part.view(self._num_groups, *recorder.weight.shape), False

    def collect(
        self, tokens: NDArray[Any], normaliser: float, precondition: torch.optim.Optimizer | None = None
    ) -> DomainGradients:
        """Stop recording and hand over the sums of token-loss gradients since the last `collect`.

        Args:
            tokens: predicted tokens per group (K, 2), over all backward passes recorded; where processes share a
                batch, over all of theirs, and the sums are to be added up over them.
            normaliser: by what the loss divided its sum over tokens.
            precondition: an Adam whose second moment, as it is now, scales the gradients: ⟨P^½ g_i, P^½ g_j⟩ with
                P = 1/(√v̂ + ε). Call before its step; before the first one there is none, and P = 1.

        Raises:
            ConfigError: preconditioning of sketched gradients, or by something else than Adam.
        """
        if precondition is not None and self._sketchers:
            raise ConfigError("precondition=True: needs whole gradients; leave sketch_size at None")
        sums = (self._sketches() if self._sketchers else self._slices(precondition)).mul_(normaliser)
        counts = np.asarray(tokens, dtype=np.float64)
        counts = counts if self.halves else counts.sum(1, keepdims=True)
        return DomainGradients(sums.view(self.num_domains, 1 + self.halves, -1), counts, self._buffers)

    def _slices(self, precondition: torch.optim.Optimizer | None) -> torch.Tensor:
        """Whole gradients (groups, P)."""
        buffer = self._buffer
        if buffer is None or not all(recorder.filled for recorder in self._recorders):
            raise _nothing_recorded()
        for recorder in self._recorders:
            if precondition is not None:
                assert recorder.slices is not None
                recorder.slices *= root_preconditioner(precondition, recorder.weight)
            recorder.slices, recorder.rows = None, ()
        self._buffer = None
        return buffer

    def _sketches(self) -> torch.Tensor:
        """Projected gradients (groups, P)."""
        parts = []
        for sketcher in self._sketchers:
            if not sketcher.recording or sketcher.slices.grad is None:
                raise _nothing_recorded()
            parts.append(sketcher.slices.grad.flatten(1))
            sketcher.slices.grad, sketcher.recording = None, False
        return torch.cat(parts, dim=1)


def _nothing_recorded() -> RuntimeError:
    return RuntimeError("collect() needs a recorded backward pass: call begin() before the forward pass")


class _RecordingForward:
    """The `forward` of a probed layer."""

    def __init__(
        self,
        layer: Recorder | Sketcher,
        plain: Callable[..., torch.Tensor],
        own: Callable[..., torch.Tensor] | None,
    ):
        self.layer, self.plain, self.own = layer, plain, own

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.layer.recording and torch.is_grad_enabled():
            return self.layer.forward(x)
        return self.plain(x)
