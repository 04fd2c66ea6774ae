"""Pre-emption: SIGTERM asks a run to save itself and to end well, within the step that it is in."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Preempted(Exception):
    """The run was asked to end before its horizon, and can go on from where it is."""

    def __init__(self, where: str, checkpoint: Path | None = None):
        """Say so.

        Args:
            where: the run was, in words.
            checkpoint: the one that the same command goes on from, if it is known.
        """
        self.checkpoint = checkpoint
        saved = f"saved in {checkpoint}" if checkpoint else "nothing was to be saved yet"
        super().__init__(f"ended by SIGTERM {where}; {saved}; the same command goes on from there")


@contextmanager
def catch_sigterm() -> Iterator[Callable[[], bool]]:
    """Let SIGTERM set a mark instead of ending the process; yields what tells whether it is set.

    In another thread than the main one, where Python allows no handlers, the mark is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def never() -> bool:
    """For runs that nobody asks to end."""
    return False
