"""What an agent or an exported policy sees: one table of fields, from which space and vector both come.

The same `Observer` serves the environment and the target run, so training and serving cannot drift. Every field
is defined before a domain's first draw, comparable across model sizes, and within its declared bounds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acodm_env.errors import unknown
from acodm_env.interaction import InteractionConfig, InteractionTracker
from acodm_env.trainer import Array, RunInfo, StepStats


@dataclass(frozen=True, kw_only=True)
class Field:
    """One named part of the observation."""

    name: str
    meaning: str
    size: Callable[[RunInfo], int]
    low: Callable[[RunInfo], float]
    high: Callable[[RunInfo], float]
    needs: frozenset[str]
    compute: Callable[["Observer"], Array]


def _field(
    name: str,
    meaning: str,
    size: Callable[[RunInfo], int],
    low: float | Callable[[RunInfo], float],
    high: float | Callable[[RunInfo], float],
    needs: str,
    compute: Callable[["Observer"], Array],
) -> Field:
    return Field(
        name=name,
        meaning=meaning,
        size=size,
        low=low if callable(low) else lambda _: low,
        high=high if callable(high) else lambda _: high,
        needs=frozenset(needs.split()),
        compute=compute,
    )


def _domains(info: RunInfo) -> int:
    return info.num_domains


def _layers(info: RunInfo) -> int:
    return info.num_layers


def _one(info: RunInfo) -> int:
    return 1


FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        _field(
            "loss",
            "last training loss, nats; ln V before the first draw",
            _domains,
            0.0,
            lambda info: 2 * info.initial_loss_nats,
            "losses",
            lambda o: o.losses,
        ),
        _field(
            "delta_loss",
            "its change since the previous decision, nats",
            _domains,
            lambda info: -info.initial_loss_nats,
            lambda info: info.initial_loss_nats,
            "losses",
            lambda o: o.losses - o.previous_losses,
        ),
        _field(
            "sample_share",
            "share of all sequences drawn so far",
            _domains,
            0.0,
            1.0,
            "",
            lambda o: o.drawn / max(float(o.drawn.sum()), 1.0),
        ),
        _field(
            "epochs",
            "passes e over the domain, as e/(1+e)",
            _domains,
            0.0,
            1.0,
            "",
            lambda o: o.epochs / (1 + o.epochs),
        ),
        _field(
            "gradient_norm",
            "ln of the gradient norm over its running mean",
            _domains,
            -4.0,
            4.0,
            "gram",
            lambda o: o.tracker.log_norm,
        ),
        _field(
            "interaction",
            "smoothed r_i = Σ_{j≠i} H_ij / s",
            _domains,
            lambda info: -2.0 * info.num_domains,
            lambda info: 2.0 * info.num_domains,
            "gram",
            lambda o: o.tracker.interaction,
        ),
        _field(
            "layer_norm",
            "RMS of layer weights at fixed depths",
            _layers,
            0.0,
            1.0,
            "layers",
            lambda o: o.layer_norms,
        ),
        _field(
            "layer_change",
            "their relative change since the previous decision",
            _layers,
            0.0,
            1.0,
            "layers",
            lambda o: o.layer_changes,
        ),
        _field("progress", "step / horizon", _one, 0.0, 1.0, "", lambda o: np.array([o.step / o.info.horizon])),
        _field(
            "pending",
            "mixtures decided but not yet in effect, oldest first",
            lambda info: info.lag * info.num_domains,
            0.0,
            1.0,
            "",
            lambda o: o.pending.ravel(),
        ),
    )
}

DEFAULT_FIELDS: tuple[str, ...] = tuple(name for name in FIELDS if name != "pending")


def resolve_fields(names: Sequence[str] | None, info: RunInfo) -> tuple[Field, ...]:
    """Fields by name; None is the default set, with `pending` where mixtures take effect late.

    Raises:
        ConfigError: an unknown name, with a suggestion.
    """
    if names is None:
        names = (*DEFAULT_FIELDS, "pending") if info.lag else DEFAULT_FIELDS
    for name in names:
        if name not in FIELDS:
            unknown("fields", name, FIELDS)
    return tuple(FIELDS[name] for name in names)


class Observer:
    """Builds the observation from `StepStats`, and remembers what the Δ fields need."""

    def __init__(
        self,
        info: RunInfo,
        fields: Sequence[str] | None = None,
        interaction: InteractionConfig | None = None,
    ):
        self.info: RunInfo = info
        self.step: int
        self.losses: Array
        self.previous_losses: Array
        self.drawn: Array
        self.epochs: Array
        self.tracker: InteractionTracker
        self.layer_norms: Array
        self.layer_changes: Array
        self.pending: Array
        self.fields = resolve_fields(fields, info)
        self.needs: frozenset[str] = frozenset().union(*(field.needs for field in self.fields))
        self.low = self._spread(lambda field: field.low(info))  # (D,)
        self.high = self._spread(lambda field: field.high(info))  # (D,)
        self._interaction = interaction or InteractionConfig()
        self.start(info)

    def start(self, info: RunInfo) -> NDArray[np.float32]:
        """Forget everything and return the observation before the first step (D,)."""
        num_domains = info.num_domains
        self.info = info
        self.step = 0
        self.losses = np.full(num_domains, info.initial_loss_nats)
        self.previous_losses = self.losses.copy()
        self.drawn = np.zeros(num_domains)
        self.epochs = np.zeros(num_domains)
        self.layer_norms = np.array(info.initial_layer_norms or [0.0] * info.num_layers)
        self.layer_changes = np.zeros(info.num_layers)
        self.pending = np.full((info.lag, num_domains), 1 / num_domains)
        self.tracker = InteractionTracker(num_domains, self._interaction)
        self.clipped_frac = 0.0
        return self._vector()

    def observe(self, window: StepStats) -> NDArray[np.float32]:
        """Take in the window since the last decision and return the observation (D,)."""
        self.step = window.step
        self.previous_losses = self.losses
        self.losses = np.where(np.isfinite(window.losses), window.losses, self.losses)
        self.drawn, self.epochs = window.drawn, window.epochs
        if window.layer_norms is not None and window.layer_changes is not None:
            self.layer_norms, self.layer_changes = window.layer_norms, window.layer_changes
        if window.pending is not None:
            self.pending = window.pending
        self.tracker.update(window)
        return self._vector()

    def _vector(self) -> NDArray[np.float32]:
        parts = [field.compute(self) for field in self.fields]
        raw = np.concatenate(parts) if parts else np.zeros(0)  # (D,)
        raw = np.nan_to_num(raw, nan=0.0)
        clipped = np.clip(raw, self.low, self.high)
        self.clipped_frac = float(np.mean(clipped != raw)) if len(raw) else 0.0
        return clipped.astype(np.float32)

    def _spread(self, value: Callable[[Field], float]) -> NDArray[np.float32]:
        sizes = [field.size(self.info) for field in self.fields]
        return np.repeat([value(field) for field in self.fields], sizes).astype(np.float32)

    @property
    def layout(self) -> tuple[tuple[str, int], ...]:
        """(name, size) of every field, in order: part of an exported policy's contract."""
        return tuple((field.name, field.size(self.info)) for field in self.fields)

    _STATE = (
        "step",
        "losses",
        "previous_losses",
        "drawn",
        "epochs",
        "layer_norms",
        "layer_changes",
        "pending",
    )

    def state_dict(self) -> dict[str, Any]:
        """Everything remembered."""
        return {name: getattr(self, name) for name in self._STATE} | {
            "clipped_frac": self.clipped_frac,
            "tracker": self.tracker.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        for name in self._STATE:
            value = state[name]
            setattr(self, name, int(value) if name == "step" else np.array(value, dtype=np.float64))
        self.clipped_frac = float(state["clipped_frac"])
        self.tracker.load_state_dict(state["tracker"])
