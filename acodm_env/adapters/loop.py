"""`MixedData`: a mixer and its batches beside anybody's training loop.

    draw() ─▶ Batch ─▶ your forward and backward pass ─▶ report(losses of the rows) ─▶ the mixer learns ─▶ draw() ─▶ …

Losses per domain are all that such a loop can be asked for; a mixer that needs more is refused before the first batch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np

from acodm_env.corpus.affinity import Affinity
from acodm_env.corpus.loader import Loader
from acodm_env.corpus.sampler import Batch, MixtureSampler
from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError, DataError
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Mixer, RunInfo, Trainer, require

PROVIDES = frozenset({"losses"})


def _alone(values: Array) -> Array:
    return values


class MixedData:
    """Training batches under a mixer, which learns from the losses that are reported."""

    def __init__(
        self,
        store: TokenStore,
        mixer: Mixer,
        *,
        batch_size: int,
        sequence_length: int,
        horizon: int,
        seed: int = 0,
        decision_every: int = 1,
        prefetch: int = 0,
        rank: int = 0,
        world: int = 1,
        add_up: Callable[[Array], Array] = _alone,
    ):
        """Check that the mixer fits, and start it.

        Args:
            store: the domains to train on.
            mixer: what proposes the mixtures; the same one in every process.
            batch_size: sequences per optimiser step, of all processes together.
            sequence_length: tokens per sequence, of which all but the first are predicted.
            horizon: optimiser steps of the whole run.
            seed: of the order of the data.
            decision_every: optimiser steps between two decisions of a policy.
            prefetch: batches built ahead; a mixture takes effect so many steps late.
            rank: this process; it gets the rows rank, rank + world, … of every batch.
            world: processes.
            add_up: sums an array (n,) over the processes; all of them call it at the same points.

        Raises:
            ConfigError: the mixer needs what such a loop cannot measure, or a number is out of range.
            PolicyError: the mixer is a policy that does not fit the corpus.
        """
        self.provides = self.measure = PROVIDES
        require(cast(Trainer, self), mixer.needs, f"mixer={mixer.name}")
        for name, value in (("horizon", horizon), ("decision_every", decision_every)):
            if value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1 optimiser step")
        if world > 1 and add_up is _alone:
            raise ConfigError(f"world={world}: needs add_up, which sums an array over the processes")
        sampler = MixtureSampler(store, "train", batch_size, sequence_length, seed)
        self.loader = Loader(sampler, rank=rank, world=world, prefetch=prefetch)
        self.info = RunInfo(
            domains=store.domains,
            targets=store.domains,
            sizes_tokens=store.sizes_tokens("train"),
            batch_size=batch_size,
            sequence_length=sequence_length,
            horizon=horizon,
            decision_every=decision_every,
            initial_loss_nats=math.log(store.vocab_size),
            lag=prefetch,
            corpus_fingerprint=store.fingerprint,
            seed=seed,
            affinity=Affinity(store, store, sequence_length),
        )
        if mixer.preparation(self.info):
            raise ConfigError(
                f"mixer={mixer.name}: needs runs that are made before this one; run it by `acodm benchmark`, and give "
                f"the mixture that it found to `static`"
            )
        self.mixer = mixer
        self._rank, self._add_up = rank, add_up
        self._steps = 0
        self._batch: Batch | None = None
        mixer.start(self.info)

    def draw(self) -> Batch:
        """This process's rows of the next batch, composed by the mixer's mixture."""
        mine = self.mixer.weights() if self._rank == 0 else np.zeros(self.info.num_domains)
        self._batch = self.loader.draw(self._add_up(mine))  # process 0 decides
        self._steps += 1
        return self._batch

    def report(self, row_losses: Any) -> StepStats:
        """Let the mixer learn from the batch drawn last.

        Args:
            row_losses: mean loss in nats of every row of this process's batch (B,), in order; array or tensor.

        Raises:
            ConfigError: another number of losses.
        """
        if self._batch is None:
            raise RuntimeError("report() needs a batch: call draw() first, and report each batch once")
        batch, num_domains = self._batch, self.info.num_domains
        if hasattr(row_losses, "detach"):
            row_losses = row_losses.detach().double().cpu().numpy()
        rows = np.asarray(row_losses, dtype=np.float64)  # (B,)
        if rows.shape != batch.domains.shape:
            raise ConfigError(
                f"row_losses: must hold one mean loss for each of the batch's {len(batch.domains)} rows; got shape "
                f"{rows.shape}"
            )
        sums = self._add_up(np.bincount(batch.domains, rows, num_domains).astype(np.float64))  # (K,)
        stats = self._stats(batch, sums)
        self._batch = None
        self.mixer.update(stats)
        return stats

    def _stats(self, batch: Batch, sums: Array) -> StepStats:
        counts = batch.counts.astype(np.float64)  # (K,)
        loss = float(sums.sum() / counts.sum())
        age = self._steps - 1 - batch.decision if batch.decision >= 0 else self.info.lag
        return StepStats(
            step=self._steps,
            tokens=self._steps * self.info.batch_size * self.info.sequence_length,
            requested=batch.weights,
            counts=counts,
            realised=counts / counts.sum(),
            loss_tokens=counts * (self.info.sequence_length - 1),
            losses=np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0),
            epochs=batch.drawn / self.loader.sampler.sizes,
            drawn=batch.drawn.astype(np.float64),
            mixture_age=float(age),
            pending=self.loader.pending if self.info.lag else None,
            decision=batch.decision,
            loss=loss,
            diverged=not math.isfinite(loss),
        )

    def state_dict(self) -> dict[str, Any]:
        """Position in the data and the mixer; the same on all processes.

        Raises:
            RuntimeError: called between `draw` and `report`: that batch would be lost.
        """
        if self._batch is not None:
            raise RuntimeError("state_dict() needs the losses of the batch drawn last: call report() first")
        return {
            "steps": self._steps,
            "mixer_name": self.mixer.name,
            "loader": self.loader.state_dict(),
            "mixer": self.mixer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], adapt: bool = False) -> None:
        """Go on exactly from `state_dict`'s value.

        Args:
            state: what `state_dict` gave.
            adapt: let domains, mixer or `prefetch` differ; a mixer of other domains or another name starts anew.

        Raises:
            DataError: they differ and `adapt` was not given, or a domain's content differs.
        """
        same_mixer = state["mixer_name"] == self.mixer.name
        if not (same_mixer or adapt):
            raise DataError(
                f"mixer={self.mixer.name}: must be {state['mixer_name']}, as when the checkpoint was made; use that "
                f"again, or go on with another by --adapt"
            )
        same_domains = list(state["loader"]["sampler"]["domains"]) == list(self.info.domains)
        self.loader.load_state_dict(state["loader"], adapt)
        self._steps, self._batch = int(state["steps"]), None
        if same_mixer and same_domains:
            self.mixer.load_state_dict(state["mixer"])
