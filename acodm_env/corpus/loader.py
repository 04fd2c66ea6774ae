"""`Loader`: batches under a mixture, one process's rows of them, built ahead of their use if asked.

With `prefetch` = N a background thread builds N batches ahead, so that a slow disk works while the model trains. A
mixture then takes effect N batches after it was given, never later, as `wrapper.Lagged` plays it: the first N batches
are composed uniformly. Without prefetching there is no thread, and the very next batch follows the mixture.
"""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from acodm_env.corpus.sampler import Batch, MixtureSampler
from acodm_env.errors import ConfigError, DataError
from acodm_env.mixture import check_weights
from acodm_env.step_stats import Array


class Loader:
    """Hands out one process's rows of a sampler's batches. From now on nobody else draws from that sampler."""

    def __init__(self, sampler: MixtureSampler, *, rank: int = 0, world: int = 1, prefetch: int = 0):
        """Take the sampler; nothing is read before the first draw.

        Args:
            sampler: of the batches of all processes, at the same place in each of them.
            rank: this process, 0 … world − 1; it gets the rows rank, rank + world, …
            world: processes.
            prefetch: batches built ahead.

        Raises:
            ConfigError: a number out of range.
        """
        if world < 1 or not 0 <= rank < world:
            raise ConfigError(f"rank={rank}: must be in 0 … world − 1, with world={world} of at least 1")
        if prefetch < 0:
            raise ConfigError(f"prefetch={prefetch}: must be 0 or more batches")
        self.sampler, self.prefetch = sampler, prefetch
        self._rows = slice(rank, None, world)
        self._given = 0  # mixtures so far
        self._state = sampler.state_dict()  # as of the batch handed out last, while a thread is ahead of it
        self._thread: ThreadPoolExecutor | None = None
        self._batches: deque[Future[tuple[Batch, dict[str, Any]]]] = deque()  # being built, one for each of:
        self._waiting = self._primed()

    def _primed(self) -> deque[tuple[Array, int]]:
        """Mixtures and their numbers as at the beginning of a run: uniform ones that nobody decided."""
        num_domains = len(self.sampler.sizes)
        return deque((np.full(num_domains, 1 / num_domains), -1) for _ in range(self.prefetch))

    def draw(self, weights: Array) -> Batch:
        """This process's rows of the batch composed by the mixture that was given `prefetch` draws ago.

        Args:
            weights: mixture (K,).

        Raises:
            ConfigError: the weights are no mixture.
            Exception: what went wrong in the background; from then on every draw raises it.
        """
        given = np.array(weights, dtype=np.float64)  # a copy: the caller may change its array
        check_weights(given, len(self.sampler.sizes))
        if not self.prefetch:
            batch, decision = self.sampler.draw(given, rows=self._rows), self._given
        else:
            self._begin()
            for future in self._batches:
                if future.done():
                    future.result()  # raises what the thread met with
            batch, state = self._batches[0].result()
            self._build(given)  # from here on nothing fails: a draw is had, or leaves everything as it was
            self._waiting.append((given, self._given))
            self._batches.popleft()
            decision, self._state = self._waiting.popleft()[1], state
        self._given += 1
        return replace(batch, decision=decision)

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="acodm-loader")
            for weights, _ in self._waiting:
                self._build(weights)

    def _build(self, weights: Array) -> None:
        assert self._thread is not None
        self._batches.append(self._thread.submit(self._draw_ahead, weights))

    def _draw_ahead(self, weights: Array) -> tuple[Batch, dict[str, Any]]:
        """In the thread: a batch, and the sampler's state after it."""
        return self.sampler.draw(weights, rows=self._rows), self.sampler.state_dict()

    @property
    def pending(self) -> Array:
        """Mixtures given but not yet trained on (prefetch, K), oldest first."""
        return np.array([weights for weights, _ in self._waiting]).reshape(-1, len(self.sampler.sizes))

    def close(self) -> None:
        """End the thread; what it built ahead is built again by the next draw."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
            self._batches.clear()
            self.sampler.load_state_dict(self._state)

    def state_dict(self) -> dict[str, Any]:
        """The sampler as of the batch handed out last, and the mixtures that wait."""
        return {
            "sampler": self._state if self._thread is not None else self.sampler.state_dict(),
            "given": self._given,
            "pending": self.pending,
            "decisions": [decision for _, decision in self._waiting],
        }

    def load_state_dict(self, state: Mapping[str, Any], adapt: bool = False) -> None:
        """Go on exactly from `state_dict`'s value.

        Args:
            state: what `state_dict` gave.
            adapt: let the domains differ (`MixtureSampler.load_state_dict`) or `prefetch`; then the mixtures that
                waited are forgotten, and the next `prefetch` batches are uniform ones, as at the beginning.

        Raises:
            DataError: the domains or `prefetch` differ and `adapt` was not given, or a domain's content differs.
        """
        self.close()
        changed = len(state["decisions"]) != self.prefetch
        if changed and not adapt:
            raise DataError(
                f"prefetch={self.prefetch}: must be {len(state['decisions'])}, as when the checkpoint was made; use "
                f"that again, or go on with another by --adapt"
            )
        self.sampler.load_state_dict(state["sampler"], adapt)
        changed = changed or list(state["sampler"]["domains"]) != list(self.sampler.store.domains)
        self._given = int(state["given"])
        pending = zip(np.array(state["pending"], dtype=np.float64), state["decisions"], strict=True)
        self._waiting = self._primed() if changed else deque((weights, int(decision)) for weights, decision in pending)
