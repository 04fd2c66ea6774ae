"""Torch state as numpy arrays and JSON values, which `files.write_state` writes without pickling, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def to_numpy(value: Any) -> Any:
    """Copy every tensor of a nested state into a numpy array."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy().copy()
    if isinstance(value, Mapping):
        return {str(key): to_numpy(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [to_numpy(child) for child in value]
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


def int_keys(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser numbers its parameters; JSON made the numbers strings."""
    return {**state, "state": {int(key): value for key, value in state["state"].items()}}
