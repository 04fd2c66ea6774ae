"""What a run shows, kept as a `View`: from its statistics to what a policy for any problem sees."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import RunInfo
from acodm_env.view import View, slope

SEEN = ("losses", "previous", "gaps", "slopes", "drawn", "mixture", "progress")
"""What of a view changes during a run."""


class ViewTracker:
    """The view of one run, or of a batch of runs that go in step: domains first, then targets that are none of them."""

    def __init__(self, info: RunInfo, mask: Array, problem: Mapping[str, Array], *, dtype: DTypeLike, affinity: bool):
        """Begin a run.

        Args:
            info: the run.
            mask: (…, K) 1 for a domain, 0 for padding.
            problem: what differs from run to run of a batch: weights, perplexity, sizes, trainable, affinity, leverage.
            dtype: of all arrays.
            affinity: whether somebody looks at affinities or leverages, which take seconds to count.
        """
        self.info, self.batch, self._dtype = info, mask.shape[:-1], dtype
        self.view: View = self._start(mask, problem, affinity)
        self._trained = self.view.losses.copy()  # (…, R) last training loss, whatever the view shows

    def _full(self, size: int, value: float) -> Array:
        return np.full((*self.batch, size), value, dtype=self._dtype)

    def _start(self, mask: Array, problem: Mapping[str, Array], affinity: bool) -> View:
        """The problem before the first step: domains first, then targets that are none of them."""
        info, rows = self.info, self.info.rows
        num_domains, num_rows = info.num_domains, len(rows)
        weights, sizes = np.zeros(num_rows), np.zeros(num_rows)
        self._targets = np.array([rows.index(name) for name in info.targets])
        weights[self._targets] = info.objective_weights
        run_tokens = info.horizon * info.batch_size * info.sequence_length
        sizes[:num_domains] = np.array(info.sizes_tokens) / run_tokens
        present = self._full(num_rows, 1.0)
        present[..., :num_domains] = mask
        trainable = np.where(np.arange(num_rows) < num_domains, present, 0.0)
        known = {
            "weights": weights,
            "perplexity": np.full(1, float(info.metric == "perplexity")),
            "sizes": np.where(present > 0, sizes, 0.0),
            "trainable": trainable,
            "affinity": np.zeros(num_rows),
            "leverage": np.zeros(num_rows),
        }
        if affinity and info.affinity is not None:
            known["affinity"][:num_domains] = info.objective_weights @ info.affinity.matrix()
            known["leverage"][:num_domains] = info.affinity.leverage()
        known |= dict(problem)
        losses = self._full(num_rows, info.initial_loss_nats)
        trainable = np.broadcast_to(known["trainable"], losses.shape)
        return View(
            **{name: np.broadcast_to(value, (*self.batch, np.shape(value)[-1])) for name, value in known.items()},
            losses=losses,
            previous=losses.copy(),
            gaps=self._full(num_rows, 0.0),
            slopes=self._full(num_rows, 0.0),
            drawn=self._full(num_rows, 0.0),
            mixture=trainable / trainable.sum(-1, keepdims=True),
            present=present,
            progress=self._full(1, 0.0),
            initial=info.initial_loss_nats,
        )

    def see(self, window: StepStats) -> None:
        """Take the window since the last decision into the view."""
        view, info = self.view, self.info
        num_domains = info.num_domains
        self._trained = self._trained.copy()
        known = np.where(np.isfinite(window.losses), window.losses, self._trained[..., :num_domains])
        drawn = np.isfinite(window.losses)
        self._trained[..., :num_domains] = known
        seen = view.losses.copy()
        seen[..., :num_domains] = np.where(drawn, known, seen[..., :num_domains])
        if window.eval_losses is not None:
            at = self._targets
            measured = np.isfinite(window.eval_losses) & (view.weights[..., at] > 0)
            seen[..., at] = np.where(measured, window.eval_losses, seen[..., at])
            gaps = np.where(measured & (view.trainable[..., at] > 0), window.eval_losses - self._trained[..., at], 0.0)
            view.gaps = self._full(seen.shape[-1], 0.0)
            view.gaps[..., at] = gaps
        earlier, now = float(view.progress.flat[0]), window.step / info.horizon
        view.slopes = slope(seen, view.losses, view.slopes, now, earlier, np)
        view.previous, view.losses = view.losses, seen
        view.drawn = view.drawn.copy()
        view.drawn[..., :num_domains] = window.drawn / (info.horizon * info.batch_size)
        view.progress = self._full(1, now)

    def decided(self, mixture: Array) -> None:
        """Take in the mixture (…, K) that is in force from now on."""
        self.view.mixture = self.view.mixture.copy()
        self.view.mixture[..., : self.info.num_domains] = mixture

    def state_dict(self) -> dict[str, Any]:
        """What the run changed."""
        return {name: np.asarray(getattr(self.view, name)) for name in SEEN} | {"trained": self._trained}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        for name, value in state.items():
            array = np.array(value, dtype=np.float64)
            if name == "trained":
                self._trained = array
            else:
                setattr(self.view, name, array)
