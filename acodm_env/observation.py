"""What an agent or an exported policy sees: one table of fields, from which space and vector both come.

The same `Observer` serves the environment and the target run, so training and serving cannot drift. Every field
is defined before a domain's first draw, comparable across model sizes, and within its declared bounds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from acodm_env.errors import unknown
from acodm_env.interaction import InteractionConfig, InteractionTracker
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import RunInfo
from acodm_env.view import PER_ROW, PER_RUN, Formula, View
from acodm_env.view_tracker import ViewTracker


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


def _targets(info: RunInfo) -> int:
    return len(info.targets)


def _layers(info: RunInfo) -> int:
    return info.num_layers


def _one(info: RunInfo) -> int:
    return 1


def _rows(info: RunInfo) -> int:
    return len(info.rows)


def _view_field(
    name: str, meaning: str, low: float, high: float, formula: Formula, size: Callable[[RunInfo], int]
) -> Field:
    """A field of `acodm_env.view`."""
    needs = "losses validation" if name in MEASURED else ""
    return _field(name, meaning, size, low, high, needs, lambda o: formula(o.view, np))


MEASURED = ("marginal_value", "domain_loss", "domain_progress", "elasticity", "gap")
"""Fields of `acodm_env.view` that need losses."""

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
            lambda o: o.drawn / np.maximum(o.drawn.sum(-1, keepdims=True), 1.0),
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
        _field(
            "progress",
            "step / horizon",
            _one,
            0.0,
            1.0,
            "",
            lambda o: np.full((*o.batch, 1), o.step / o.info.horizon, dtype=o.losses.dtype),
        ),
        _field(
            "pending",
            "mixtures decided but not yet in effect, oldest first",
            lambda info: info.lag * info.num_domains,
            0.0,
            1.0,
            "",
            lambda o: o.pending.reshape(*o.batch, -1),
        ),
        _field(
            "target_loss",
            "last held-out loss of every target, nats; ln V before the first evaluation",
            _targets,
            0.0,
            lambda info: 2 * info.initial_loss_nats,
            "validation",
            lambda o: o.target_losses,
        ),
        _field(
            "delta_target_loss",
            "its change since the previous decision, nats",
            _targets,
            lambda info: -info.initial_loss_nats,
            lambda info: info.initial_loss_nats,
            "validation",
            lambda o: o.target_losses - o.previous_target_losses,
        ),
        _field("mask", "1 for a domain, 0 for padding", _domains, 0.0, 1.0, "", lambda o: o.mask),
        *(_view_field(name, *row, _rows) for name, row in PER_ROW.items()),
        *(_view_field(name, *row, _one) for name, row in PER_RUN.items()),
    )
}

DEFAULT_FIELDS: tuple[str, ...] = (
    *("loss", "delta_loss", "sample_share", "epochs", "gradient_norm", "interaction"),
    *("layer_norm", "layer_change", "progress"),
)


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
    """Builds the observation from `StepStats`, and remembers what the Δ fields need.

    With `batch=(N,)` all arrays have N rows, one for each of N runs that go in step; vectors are then (N, D).
    """

    def __init__(
        self,
        info: RunInfo,
        fields: Sequence[str] | None = None,
        interaction: InteractionConfig | None = None,
        *,
        batch: tuple[int, ...] = (),
        dtype: DTypeLike = np.float64,
    ):
        self.info: RunInfo = info
        self.batch: tuple[int, ...] = batch
        self._dtype = np.dtype(dtype)
        self.step: int
        self.losses: Array
        self.previous_losses: Array
        self.target_losses: Array
        self.previous_target_losses: Array
        self.drawn: Array
        self.epochs: Array
        self.mask: Array
        self._seen: ViewTracker
        self.tracker: InteractionTracker
        self.layer_norms: Array
        self.layer_changes: Array
        self.pending: Array
        self.fields = resolve_fields(fields, info)
        self.needs: frozenset[str] = frozenset().union(*(field.needs for field in self.fields))
        self.general: bool = any(field.name in PER_ROW for field in self.fields)
        self.low = self._spread(lambda field: field.low(info))  # (D,)
        self.high = self._spread(lambda field: field.high(info))  # (D,)
        self._interaction = interaction or InteractionConfig()
        self.start(info)

    def start(
        self, info: RunInfo, mask: Array | None = None, problem: Mapping[str, Array] | None = None
    ) -> NDArray[np.float32]:
        """Forget everything and return the observation before the first step (…, D).

        Args:
            info: the run.
            mask: (…, K) 1 for a domain, 0 for padding; by default as `info.padding` says.
            problem: what differs from run to run of a batch, of `View`: weights, perplexity, sizes, trainable,
                affinity, leverage.
        """
        num_domains = info.num_domains
        self.info = info
        self.step = 0
        self.losses = self._full(num_domains, info.initial_loss_nats)
        self.previous_losses = self.losses.copy()
        self.target_losses = self._full(len(info.targets), info.initial_loss_nats)
        self.previous_target_losses = self.target_losses.copy()
        self.drawn = self._full(num_domains, 0.0)
        self.epochs = self._full(num_domains, 0.0)
        self.mask = self._full(num_domains, 1.0) if mask is None else np.asarray(mask, dtype=self._dtype)
        if mask is None and info.padding:
            self.mask[..., -info.padding :] = 0.0
        self.layer_norms = np.array(info.initial_layer_norms or [0.0] * info.num_layers)
        self.layer_changes = np.zeros(info.num_layers)
        self.pending = np.full((*self.batch, info.lag, num_domains), 1 / num_domains, dtype=self._dtype)
        self.tracker = InteractionTracker(num_domains, self._interaction, self.batch)
        self._seen = ViewTracker(
            info,
            self.mask,
            problem or {},
            dtype=self._dtype,
            affinity=any(field.name in ("affinity", "leverage") for field in self.fields),
        )
        return self._vector()

    @property
    def view(self) -> View:
        """What fields of `acodm_env.view` are computed from; kept up where there are any."""
        return self._seen.view

    def choices(self) -> Array | None:
        """(…, R) 1 for what an action may choose, where that is not everything; its rows are those of the view."""
        if self.general:
            trainable: Array = self.view.trainable
            return trainable
        return self.mask if self.info.padding else None

    @property
    def num_rows(self) -> int:
        """Entries of an action: a row for every domain, and for every target that is none where fields show those."""
        return len(self.info.rows) if self.general else self.info.num_domains

    def decided(self, mixture: Array) -> None:
        """Take in the mixture (…, K) that is in force from now on."""
        if self.general:
            self._seen.decided(mixture)

    def _full(self, size: int, value: float) -> Array:
        return np.full((*self.batch, size), value, dtype=self._dtype)

    def observe(self, window: StepStats) -> NDArray[np.float32]:
        """Take in the window since the last decision and return the observation (…, D)."""
        self.step = window.step
        self.previous_losses = self.losses
        self.losses = np.where(np.isfinite(window.losses), window.losses, self.losses)
        self.previous_target_losses = self.target_losses
        if window.eval_losses is not None:
            self.target_losses = np.where(np.isfinite(window.eval_losses), window.eval_losses, self.target_losses)
        self.drawn, self.epochs = window.drawn, window.epochs
        if window.layer_norms is not None and window.layer_changes is not None:
            self.layer_norms, self.layer_changes = window.layer_norms, window.layer_changes
        if window.pending is not None:
            self.pending = window.pending
        self.tracker.update(window)
        if self.general:
            self._seen.see(window)
        return self._vector()

    def _vector(self) -> NDArray[np.float32]:
        parts = [field.compute(self) for field in self.fields]
        raw = np.concatenate(parts, axis=-1) if parts else self._full(0, 0.0)  # (…, D)
        if not np.isfinite(raw.sum()):
            raw = np.nan_to_num(raw, nan=0.0)
        clipped = np.clip(raw, self.low, self.high)
        changed = np.count_nonzero(clipped != raw, axis=-1) / max(raw.shape[-1], 1)
        self.clipped_frac: float = changed if self.batch else float(changed)
        return clipped.astype(np.float32, copy=False)

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
        "target_losses",
        "previous_target_losses",
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
            "view": self._seen.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        for name in self._STATE:
            value = state[name]
            setattr(self, name, int(value) if name == "step" else np.array(value, dtype=np.float64))
        self.clipped_frac = float(state["clipped_frac"])
        self._seen.load_state_dict(state.get("view", {}))
        self.tracker.load_state_dict(state["tracker"])
