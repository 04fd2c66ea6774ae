"""Mixtures that follow a loss directly: the training loss, or what a held-out loss still lacks to a target."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError, unknown
from acodm_env.mixture import softmax
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Mixer, RunInfo, RunRequest, RunResult

from .options import positive
from .targets import domain_values, is_plain


class SoftmaxLoss(Mixer):
    """w = softmax(L/T) over the last training losses: the two-line rule that everyone thinks of first.

    It aims at no target: with the objective's weights in it a single target would get everything, which is
    `target-share` with share 1.

    Before its first draw a domain counts with the loss of a model that knows nothing, ln(vocabulary). A domain that was
    not drawn, or whose loss is not finite, and every domain of a diverged step, keeps its last loss.
    """

    name = "softmax-loss"
    needs = frozenset({"losses"})

    def __init__(self, temperature: float = 1.0, smoothing: float = 0.0):
        """Take the options.

        Args:
            temperature: T in nats.
            smoothing: s in L ← s·L + (1−s)·(loss of this step), in [0, 1).
        """
        if not (math.isfinite(temperature) and temperature > 0):
            raise ConfigError(f"temperature={temperature}: must be a positive number of nats")
        if not 0 <= smoothing < 1:
            raise ConfigError(f"smoothing={smoothing}: must be in [0, 1)")
        self.temperature, self.smoothing = temperature, smoothing

    def start(self, info: RunInfo) -> None:
        """Begin with equal losses, so uniformly."""
        super().start(info)
        self._losses = np.full(info.num_domains, info.initial_loss_nats)  # (K,)

    def weights(self) -> Array:
        """softmax(L/T) (K,)."""
        return softmax(self._losses / self.temperature)

    def update(self, stats: StepStats) -> None:
        """Take in the losses of the domains that were drawn."""
        if stats.diverged:
            return
        seen = (stats.counts > 0) & np.isfinite(stats.losses)  # (K,)
        smoothed = self.smoothing * self._losses[seen] + (1 - self.smoothing) * stats.losses[seen]
        self._losses[seen] = smoothed

    def state_dict(self) -> dict[str, Any]:
        """The losses."""
        return {"losses": self._losses.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self._losses = np.array(state["losses"], dtype=np.float64)


class ShearedLlama(Mixer):
    """Dynamic batch loading (section 2.2): domains that lag most behind a target loss get more data.

    After each evaluation w ← (1−c)·softmax(log w + η·(L_i − target_i)) + c/K, with η = 1 and c = 1e-4: the rule of the
    released code. The paper's own, w ∝ w·exp(max(L_i − target_i, 0)), is `clip=True` with a `floor` near 0.

    Targets: the paper predicts them by a scaling law over a finished model family. There is none for a model trained
    from scratch, so without `target_losses` a reference run over the whole horizon under the uniform mixture is asked
    for, and paid for; its final losses are the targets. Where a smaller model makes that run its losses are higher all
    over: a common shift cancels in the softmax unless `clip` is set.

    Where the objective is not the mean loss what a domain lacks counts K·∂objective/∂L_i times at its last held-out
    loss, K·ω_i for mean losses; the paper has no weights.

    Further deviations: w starts uniform, not at the source model's mixture; it is updated at every decision (released
    runs: 120 times, every 400 of 48,000 steps of continued pre-training), and the tilts add up, so η weighs more the
    more often a run decides. A held-out loss that is not finite keeps its last value, or the target's before there is
    one; a diverged step changes nothing.
    """

    name = "sheared-llama"
    paper = "arXiv 2310.06694"
    needs = frozenset({"validation"})

    def __init__(
        self,
        learning_rate: float = 1.0,
        floor: float = 1e-4,
        target_losses: Mapping[str, float] | None = None,
        clip: bool = False,
    ):
        """Take the options.

        Args:
            learning_rate: η, per nat.
            floor: c in (0, 1], the share spread evenly; not 0, from which no domain comes back.
            target_losses: {domain: nats}, for every domain; None: those of a reference run.
            clip: count a loss below its target as equal to it.
        """
        if not 0 < floor <= 1:
            raise ConfigError(f"floor={floor}: must be in (0, 1]; at 0 a domain that is left out never comes back")
        self.learning_rate, self.floor, self.clip = positive("learning_rate", learning_rate), floor, clip
        self._given = None
        if target_losses is not None:
            self._given = {name: _nats(name, loss) for name, loss in target_losses.items()}
        self._reference: Array | None = None  # (M,)

    def preparation(self, info: RunInfo) -> Sequence[RunRequest]:
        """A reference run, unless the targets are given."""
        self._positions(info)
        if self._given is not None:
            return ()
        return (RunRequest(name="reference", mixer="uniform", steps=info.horizon),)

    def prepare(self, results: Mapping[str, RunResult]) -> None:
        """Take the reference run's final losses as targets.

        Raises:
            ConfigError: that run diverged.
        """
        if self._given is not None:
            return
        final = np.array(results["reference"].final_losses, dtype=np.float64)  # (M,)
        if not np.isfinite(final).all():
            raise ConfigError(
                f"mixer={self.name}: its reference run must end with finite losses, got {final.tolist()}; it diverged; "
                f"lower the learning rate, or give target_losses"
            )
        self._reference = final

    def start(self, info: RunInfo) -> None:
        """Begin uniformly.

        Raises:
            ConfigError: no targets yet, or they are not for these domains.
        """
        super().start(info)
        self._position = self._positions(info)
        self._targets = self._target_losses(info)  # (K,)
        self._losses = self._targets.copy()
        self._weights = np.full(info.num_domains, 1 / info.num_domains)

    def _positions(self, info: RunInfo) -> list[int]:
        """Where each domain stands among the held-out targets."""
        if sorted(info.targets) != sorted(info.domains):
            odd = sorted(set(info.targets) ^ set(info.domains))
            raise ConfigError(
                f"mixer={self.name}: must have the training domains as its held-out targets, and no others; not both: "
                f"{', '.join(odd)}; leave the objective at its default, or choose another mixer"
            )
        return [info.targets.index(name) for name in info.domains]

    def _target_losses(self, info: RunInfo) -> Array:
        if self._given is not None:
            for name in self._given:
                if name not in info.domains:
                    unknown("target_losses.<domain>", name, info.domains)
            missing = [name for name in info.domains if name not in self._given]
            if missing:
                raise ConfigError(f"target_losses: must name every domain; missing {', '.join(missing)}")
            return np.array([self._given[name] for name in info.domains], dtype=np.float64)
        if self._reference is None:
            raise ConfigError(
                f"mixer={self.name}: needs its preparatory runs first; run it through `acodm benchmark`, or give "
                f"target_losses"
            )
        targets: Array = self._reference[self._position]
        return targets

    def weights(self) -> Array:
        """The mixture (K,) for the next step."""
        return self._weights.copy()

    def update(self, stats: StepStats) -> None:
        """Tilt the mixture towards the domains that lack most, where there was an evaluation."""
        if stats.eval_losses is None or stats.diverged:
            return
        measured = stats.eval_losses[self._position]  # (K,)
        self._losses = np.where(np.isfinite(measured), measured, self._losses)
        lacking = self._losses - self._targets
        if self.clip:
            lacking = np.maximum(lacking, 0.0)
        if not is_plain(self.info):
            lacking = domain_values(self.info, self._losses) * lacking
        tilted = softmax(np.log(self._weights) + self.learning_rate * lacking)
        mixture = (1 - self.floor) * tilted + self.floor / len(tilted)
        self._weights = mixture / mixture.sum()

    def state_dict(self) -> dict[str, Any]:
        """The mixture and the losses that it last used."""
        return {"weights": self._weights.copy(), "losses": self._losses.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self._weights = np.array(state["weights"], dtype=np.float64)
        self._losses = np.array(state["losses"], dtype=np.float64)


def _nats(name: str, value: object) -> float:
    try:
        loss = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        loss = math.nan
    if not math.isfinite(loss):
        raise ConfigError(f"target_losses.{name}={value}: must be a finite number of nats")
    return loss
