"""`Ranks`: the processes that train one model together, and all that they tell each other beside its gradients.

Numbers that every process measured on its own rows are summed; what process 0 decided is told to the others. The
second kind goes over a group of its own on the host, so that waiting for a decision never waits for a device. With one
process nothing is sent at all.
"""

import atexit
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from acodm_env.errors import AcodmError
from acodm_env.step_stats import Array

if TYPE_CHECKING:
    from accelerate import Accelerator

_PATIENCE = timedelta(days=7)  # process 0 may decide, evaluate and save for as long as it likes
_LOST = ("by peer", "gloo", "Broken pipe", "NCCL", "Timed out", "remote process")


class LostRank(AcodmError):
    """Another process of the run ended before this one."""


class Ranks:
    """This process's place among those of a run."""

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | None = None):
        """Join the others.

        Args:
            rank: of this process, 0 … world − 1.
            world: number of processes; with several, `torch.distributed` is initialised.
            device: where tensors live that are summed.
        """
        self.rank, self.world, self.device = rank, world, device or torch.device("cpu")
        self.exchanged = 0
        """Bytes handed to the others, or taken from them, so far."""
        self._host = distributed.new_group(backend="gloo", timeout=_PATIENCE) if world > 1 else None
        if world > 1:
            atexit.register(_leave)

    @classmethod
    def of(cls, accelerator: "Accelerator | None") -> "Ranks":
        """The processes of an Accelerator; alone without one."""
        if accelerator is None:
            return cls()
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.device)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world > 1:
            self.exchanged += tensor.nbytes
            distributed.all_reduce(tensor)
        return tensor

    def sum(self, values: Array) -> Array:
        """Sum of float64 numbers over all processes."""
        if self.world == 1:
            return values
        total: Array = self.sum_(torch.from_numpy(values.copy()).to(self.device)).cpu().numpy()
        return total

    def broadcast_value(self, value: Any = None) -> Any:
        """Process 0's nested value on all of them: JSON, NaN and infinity, small numpy arrays."""
        if self.world == 1:
            return value
        text = json.dumps(value, default=_plain).encode() if self.rank == 0 else b""
        size = torch.tensor([len(text)])
        self._send(size)
        payload = torch.frombuffer(bytearray(text), dtype=torch.uint8) if self.rank == 0 else _bytes(int(size))
        self._send(payload)
        return json.loads(payload.numpy().tobytes(), object_hook=_arrays)

    def broadcast_array(self, array: NDArray[Any] | None = None) -> NDArray[Any]:
        """Process 0's array, on all of them."""
        if self.world == 1:
            assert array is not None
            return array
        about = self.broadcast_value(None if array is None else {"shape": array.shape, "kind": array.dtype.str})
        copy = np.array(array, order="C") if self.rank == 0 else np.empty(about["shape"], dtype=about["kind"])
        if copy.nbytes:
            self._send(torch.from_numpy(copy.reshape(-1).view(np.uint8)))
        return copy

    def _send(self, tensor: torch.Tensor) -> None:
        self.exchanged += tensor.nbytes
        distributed.broadcast(tensor, src=0, group=self._host)

    @contextmanager
    def contact(self, doing: str) -> Iterator[None]:
        """Say it plainly where an error inside the block is only the echo of another process's end.

        Raises:
            LostRank: it is.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if self.world == 1 or not (isinstance(error, distributed.DistError) or any(x in text for x in _LOST)):
                raise
            known = re.search(r"Connection \w+ by peer|Broken pipe|Timed out", text)
            cause = known[0] if known else f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"
            raise LostRank(
                f"rank {self.rank} of {self.world}: another process of the run ended ({doing}: {cause}); its own "
                f"message or the launcher's summary says why; the same command goes on from the last checkpoint"
            ) from error


def _leave() -> None:
    """End the connections' threads before the process does: it may abort otherwise, though all its work is done."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"__array__": value.tolist(), "kind": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be told to another process")


def _arrays(value: dict[str, Any]) -> Any:
    if "__array__" not in value:
        return value
    return np.array(value["__array__"], dtype=value["kind"]).reshape(value["shape"])


def _bytes(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)
