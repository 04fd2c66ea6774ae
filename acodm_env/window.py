"""A window of steps, between two decisions of a policy, as a state: so that a run may be saved inside one.

Sums of gradients live where the model does and are of its trainer's kind, which is known again at the next step only.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from acodm_env.trainer import Array, StepStats


class SavedGradients:
    """The gradient sums of an interrupted window, until those of its next step are added to them."""

    def __init__(self, state: Mapping[str, Any]):
        """Keep what `state_dict` of the trainer's kind of sums gave."""
        self._state = dict(state)

    def __add__(self, other: Any) -> Any:
        """The window's sum, where and how `other` has its own."""
        return other.restored(self._state) + other

    def gram(self) -> tuple[Array, Array]:
        """Not before the next step: a window is never saved at its end."""
        raise ValueError("gradient sums of a saved window have no Gram matrix before its next step")

    def state_dict(self) -> dict[str, Any]:
        """What it was made from."""
        return self._state


def window_state(window: StepStats | None) -> dict[str, Any] | None:
    """A window as numpy arrays and JSON values; but for the seconds that it took, which are no part of what happened.

    Raises:
        ValueError: its gradients are of a kind that cannot be saved.
    """
    if window is None:
        return None
    state = {each.name: getattr(window, each.name) for each in fields(window)} | {"seconds": {}}
    if window.gradients is not None:
        if not hasattr(window.gradients, "state_dict"):
            raise ValueError(f"{type(window.gradients).__name__}: cannot be saved between two decisions, only at one")
        state["gradients"] = window.gradients.state_dict()
    return state


def load_window(state: Mapping[str, Any] | None) -> StepStats | None:
    """The window whose `window_state` was saved."""
    if state is None:
        return None
    values: dict[str, Any] = {
        name: np.asarray(value) if isinstance(value, list) else value for name, value in state.items()
    }
    if values["gradients"] is not None:
        values["gradients"] = SavedGradients(values["gradients"])
    return StepStats(**values)
