"""`leading`: one process decides for all of them.

Mixers, policies, agents, environments and run folders live on process 0 and know of no other: what they do to the
trainer there is told to the others, which do the same to theirs. ::

    with leading(trainer) as led:
        if led is None:  # another process than 0: it has served, and the run is over
            return
        …                # any loop over a `Trainer`
"""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from acodm_env.mixture import check_weights
from acodm_env.pretrain.distributed import LostRank
from acodm_env.step_stats import Array, StepStats
from acodm_env.wrapper import TrainerWrapper

if TYPE_CHECKING:
    from acodm_env.pretrain.trainer import LMTrainer

UNITS = 1_000_000
"""Parts of which a mixture consists that is told to other processes."""


def to_units(weights: object, num_domains: int) -> NDArray[np.int64]:
    """A mixture as whole millionths (K,) summing to `UNITS`: largest remainder, ties by index.

    What differs by rounding between machines or numbers of processes is the same mixture after that.

    Raises:
        ConfigError: the weights are no mixture.
    """
    wanted = check_weights(weights, num_domains) * UNITS
    units = np.floor(wanted).astype(np.int64)
    order = np.argsort(-(wanted - units), kind="stable")
    units[order[: UNITS - int(units.sum())]] += 1
    return units


class Led(TrainerWrapper):
    """Process 0's trainer: what is asked of it is done by all processes."""

    inner: "LMTrainer"

    def __init__(self, inner: "LMTrainer"):
        """Take process 0's trainer."""
        super().__init__(inner)
        self._ranks = inner.ranks
        self.listening = True
        """Whether the other processes wait for a command, and not for a part of one."""

    @contextmanager
    def _all(self, command: str, **arguments: Any) -> Iterator[None]:
        """Have the other processes do in the meantime what is done in the block."""
        self.listening = False
        with self._ranks.contact(f"step {self.steps_done}, {command}"):
            self._ranks.broadcast_value({"command": command, "measure": sorted(self.measure), **arguments})
            yield
        self.listening = True

    def reset(self, rng: np.random.Generator) -> None:
        """Start a new run on all processes, from the same generator."""
        with self._all("reset", rng=rng.bit_generator.state):
            self.inner.reset(rng)

    def step(self, weights: Array, loss_weights: Array | None = None) -> StepStats:
        """One optimiser step under the mixture, rounded to millionths (with one process too)."""
        units = to_units(weights, self.info.num_domains)
        factors = None if loss_weights is None else np.asarray(loss_weights, dtype=np.float64)
        with self._all("step", units=units.tolist(), factors=None if factors is None else factors.tolist()):
            return self.inner.step(units / UNITS, factors)

    def evaluate(self, split: str, sequences: int | None = None) -> Array:
        """Mean held-out losses in nats (M,), a part of the sequences on each process."""
        with self._all("evaluate", split=split, sequences=sequences):
            return self.inner.evaluate(split, sequences)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, gathered from all processes."""
        with self._all("state_dict"):
            return self.inner.state_dict()

    def model_state(self) -> dict[str, Any]:
        """The model alone, gathered from all processes."""
        with self._all("model_state"):
            return self.inner.model_state()

    def load_state_dict(self, state: Mapping[str, Any], adapt: bool = False) -> None:
        """Go on from a state that any number of processes made (`LMTrainer.load_state_dict`)."""
        with self._all("load_state_dict", adapt=adapt):
            self.inner.load_state_dict(state, adapt)

    def dismiss(self) -> None:
        """End the other processes' service."""
        if self.listening:
            self.listening = False
            self._ranks.broadcast_value({"command": "end"})


@contextmanager
def leading(trainer: "LMTrainer") -> Iterator[Led | None]:
    """Lead all processes of the run from process 0, on which the block gets a `Trainer`.

    Elsewhere it serves until process 0 leaves the block, and gets None. An exception ends its own process, with its
    reason; whoever launched the processes ends the others, and the connection that breaks ends those that wait.

    Raises:
        LostRank: another process ended too early.
    """
    if trainer.ranks.rank > 0:
        with _ignore_sigterm():
            _serve(trainer)
        yield None
        return
    led = Led(trainer)
    try:
        yield led
    except BaseException:
        with suppress(RuntimeError):  # the error on its way out says more than that the others are out of reach too
            led.dismiss()
        raise
    with trainer.ranks.contact("at the end of the run"):
        led.dismiss()


def _serve(trainer: "LMTrainer") -> None:
    """Do what process 0 says, until it says no more."""
    ranks = trainer.ranks
    while True:
        with ranks.contact(f"step {trainer.steps_done}"):
            order = ranks.broadcast_value()
            command = order["command"]
            if command == "end":
                return
            trainer.measure = frozenset(order["measure"])
            if command == "reset":
                trainer.reset(_generator(order["rng"]))
            elif command == "step":
                factors = None if order["factors"] is None else np.array(order["factors"], dtype=np.float64)
                trainer.step(np.array(order["units"]) / UNITS, factors)
            elif command == "evaluate":
                trainer.evaluate(order["split"], order["sequences"])
            elif command == "state_dict":
                trainer.state_dict()
            elif command == "model_state":
                trainer.model_state()
            elif command == "load_state_dict":
                trainer.load_state_dict({}, order["adapt"])
            else:
                raise LostRank(f"rank {ranks.rank}: command '{command}' is unknown; run the same version everywhere")


def _generator(state: Mapping[str, Any]) -> np.random.Generator:
    bits: np.random.BitGenerator = getattr(np.random, state["bit_generator"])()
    bits.state = state
    return np.random.Generator(bits)


@contextmanager
def _ignore_sigterm() -> Iterator[None]:
    """Pre-emption signals every process, but process 0 alone answers it, and needs the others for its checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
