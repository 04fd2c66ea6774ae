"""Torch state as numpy arrays and JSON values, which `files.write_state` writes without pickling, and back.

A state is whole: what several processes hold parts of is put together for it, array by array on process 0, and handed
out again in the same way. So a checkpoint fits any number of processes, and no process but 0 holds more than one array
of it at a time.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from acodm_env.errors import DataError
from acodm_env.pretrain.distributed import Ranks
from acodm_env.pretrain.parallel import whole
from acodm_env.step_stats import Array


def to_numpy(value: Any, *, keep: bool = True) -> Any:
    """Copy every tensor of a nested state into a numpy array.

    Args:
        value: the same on all processes, but for tensors of which each holds a part.
        keep: False takes part in putting tensors together, and leaves the copies to others.
    """
    if isinstance(value, torch.Tensor):
        joined = whole(value.detach())
        return joined.cpu().numpy().copy() if keep else None
    if isinstance(value, Mapping):
        return {str(key): to_numpy(child, keep=keep) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [to_numpy(child, keep=keep) for child in value]
    return value


def to_torch(value: Any) -> Any:
    """Copy every numpy array of a nested state into a tensor."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, Mapping):
        return {key: to_torch(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [to_torch(child) for child in value]
    return value


def hand_out(array: Array | None, like: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Process 0's array as a tensor on `like`'s device; if it has `like`'s shape, divided as that is."""
    tensor = torch.from_numpy(ranks.broadcast_array(array).copy()).to(like.device)
    divided: Any = like
    if not hasattr(like, "device_mesh") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, divided.device_mesh, divided.placements, src_data_rank=None)


@torch.no_grad()
def load_model(model: torch.nn.Module, state: Mapping[str, Any], ranks: Ranks) -> None:
    """Fill `model`, on all processes, with process 0's arrays.

    Raises:
        DataError: they are another model's.
    """
    own = model.state_dict()
    if ranks.rank == 0:
        theirs = {name: tuple(array.shape) for name, array in state.items()}
        ours = {name: tuple(tensor.shape) for name, tensor in own.items()}
        if theirs != ours:
            name = min(name for name in theirs | ours if theirs.get(name) != ours.get(name))
            raise DataError(
                f"checkpoint: '{name}' has shape {theirs.get(name)}, the model's has {ours.get(name)}; it is another "
                f"model's; use the one that it was made with"
            )
    for name, tensor in own.items():
        tensor.copy_(hand_out(state.get(name), tensor, ranks))


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], ranks: Ranks) -> None:
    """Put process 0's state, as `Optimizer.state_dict` numbers it, into the optimiser of all processes."""
    outline = None
    if ranks.rank == 0:
        groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
        outline = {"groups": groups, "state": {key: sorted(entry) for key, entry in state["state"].items()}}
    outline = ranks.broadcast_value(outline)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.state.clear()
    for key, names in outline["state"].items():
        parameter = parameters[int(key)]
        arrays = state["state"][key] if ranks.rank == 0 else {}
        optimizer.state[parameter] = {name: hand_out(arrays.get(name), parameter, ranks) for name in names}
    for group, saved in zip(optimizer.param_groups, outline["groups"], strict=True):
        group.update(saved)


def int_keys(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser numbers its parameters; JSON made the numbers strings."""
    return {**state, "state": {int(key): value for key, value in state["state"].items()}}
