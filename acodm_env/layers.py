"""The layers of an exported actor in numpy: dense ones, layer normalisations, activations."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acodm_env.errors import PolicyError

LAYER_NORM_EPSILON = 1e-5
"""Added to the variance in a layer normalisation; torch's default."""
Layers = tuple[tuple[NDArray[np.float32], NDArray[np.float32], str], ...]
"""(weight (out, in), bias (out,), activation) of every dense layer. A layer with a weight (out,) normalises its inputs
to mean 0 and variance 1 first, and multiplies each by its weight (layer normalisation)."""
ACTIVATIONS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "tanh": np.tanh,
    "identity": lambda x: x,
    "clip": lambda x: np.clip(x, -1.0, 1.0),
}


def forward(layers: Layers, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outputs (…, O) of inputs (…, I)."""
    for weight, bias, activation in layers:
        hidden = ACTIVATIONS[activation](_affine(hidden, weight, bias))
    return hidden


def _affine(hidden: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32]) -> NDArray[np.float32]:
    """A dense layer, or a layer normalisation, before its activation."""
    if weight.ndim == 2:
        return hidden @ weight.T + bias
    centred = hidden - hidden.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    normalised: NDArray[np.float32] = centred / np.sqrt(variance + LAYER_NORM_EPSILON) * weight + bias
    return normalised


def fresh(layers: Layers, rng: np.random.Generator) -> Layers:
    """Layers of the same shapes with fresh numbers.

    Weights and biases are U(−1/√n, 1/√n) for n inputs, torch's default for dense layers, with which SB3's TD3, DDPG
    and SAC begin; layer normalisations begin as the identity.
    """
    drawn: list[tuple[NDArray[np.float32], NDArray[np.float32], str]] = []
    for weight, bias, activation in layers:
        if weight.ndim == 1:
            drawn.append((np.ones_like(weight), np.zeros_like(bias), activation))
            continue
        bound = 1 / np.sqrt(weight.shape[1])
        one, other = (rng.uniform(-bound, bound, size=array.shape).astype(np.float32) for array in (weight, bias))
        drawn.append((one, other, activation))
    return tuple(drawn)


def as_tensors(layers: Layers) -> dict[str, NDArray[Any]]:
    """Named arrays, as a policy's file holds them."""
    tensors: dict[str, NDArray[Any]] = {}
    for index, (weight, bias, _) in enumerate(layers):
        tensors[f"layers.{index}.weight"] = np.ascontiguousarray(weight)
        tensors[f"layers.{index}.bias"] = np.ascontiguousarray(bias)
    return tensors


def from_tensors(tensors: Mapping[str, NDArray[Any]], activations: Sequence[str]) -> Layers:
    """What `as_tensors` took apart."""
    return tuple(
        (tensors[f"layers.{index}.weight"], tensors[f"layers.{index}.bias"], activation)
        for index, activation in enumerate(activations)
    )


def check_layers(layers: Layers, width: int, path: Path) -> int:
    """Number of outputs, after checking that every layer takes what the one before it gives.

    Raises:
        PolicyError: one does not, or its activation is unknown.
    """
    for weight, bias, activation in layers:
        fits = weight.shape in ((len(bias), width), (len(bias),)) and (weight.ndim == 2 or len(bias) == width)
        if activation not in ACTIVATIONS or not fits:
            raise PolicyError(f"{path}: layer {weight.shape} does not follow {width} inputs; export it again")
        width = len(bias)
    return width
