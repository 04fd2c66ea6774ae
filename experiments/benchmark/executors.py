"""Where the cells of a benchmark run: processes on this machine, each on cores of its own, or a Ray cluster."""

import os
import signal
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from acodm_env.errors import ConfigError
from acodm_env.experiments.benchmark.jobs import fail, guarded

ENGINES = ("local", "ray")


class Engine(Protocol):
    """Runs cells, several at a time."""

    def idle(self) -> int:
        """How many more cells it takes now."""

    def submit(self, index: int) -> None:
        """Start a cell."""

    def wait(self, seconds: float) -> list[tuple[int, str | None]]:
        """Cells that ended within `seconds`, with the message of those that failed."""

    def steps(self) -> int:
        """Optimiser steps done by the cells that are running, as far as it is known."""

    def close(self) -> None:
        """Stop everything at once; what a cell saved is whole."""


class LocalEngine:
    """Processes pinned to disjoint cores; one that dies takes its cell with it, and no other."""

    def __init__(self, out: Path, jobs: int):
        cores = _cores()
        if not 1 <= jobs <= len(cores):
            raise ConfigError(f"jobs={jobs}: must be 1 to {len(cores)}, the cores that this process may use")
        share = len(cores) // jobs
        self._workers = [_Worker(out, cores[i * share : (i + 1) * share]) for i in range(jobs)]

    def idle(self) -> int:
        """Workers without a cell."""
        return sum(worker.index is None for worker in self._workers)

    def submit(self, index: int) -> None:
        """Give the cell to a worker without one."""
        next(worker for worker in self._workers if worker.index is None).start(index)

    def wait(self, seconds: float) -> list[tuple[int, str | None]]:
        """Cells that ended, or whose worker died."""
        busy = {worker.connection: worker for worker in self._workers if worker.index is not None}
        ended = []
        for connection in wait(list(busy), timeout=seconds):
            worker = busy[connection]  # type: ignore[index]
            assert worker.index is not None
            ended.append((worker.index, worker.answer()))
            worker.index = None
        return ended

    def steps(self) -> int:
        """Steps done by the cells that are running."""
        return sum(worker.counter.value for worker in self._workers if worker.index is not None)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.stop()


class _Worker:
    """One process, started anew when it died."""

    def __init__(self, out: Path, cores: Sequence[int]):
        self._out, self._cores = out, cores
        self._context = get_context("spawn")
        self.counter: Any = self._context.Value("l", 0)
        self.index: int | None = None
        self._spawn()

    def _spawn(self) -> None:
        self.connection, theirs = self._context.Pipe()
        arguments = (self._out, theirs, self._cores, self.counter)
        self.process = self._context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def start(self, index: int) -> None:
        self.index, self.counter.value = index, 0
        self.connection.send(index)

    def answer(self) -> str | None:
        """What the process said of its cell; a message if it died instead."""
        try:
            said: str | None = self.connection.recv()
            return said
        except (EOFError, ConnectionResetError):
            self.process.join()
            assert self.index is not None
            message = fail(self._out, self.index, f"its process died ({_death(self.process.exitcode)})")
            self.stop()
            self._spawn()
            return message

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


def _death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return name + (": out of memory?" if name == "SIGKILL" else "")


def _serve(out: Path, connection: Connection, cores: Sequence[int], counter: Any) -> None:
    """Body of a worker: cells by number until the pipe closes; its own output goes into the cell's log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    import torch

    torch.set_num_threads(len(cores))

    def on_step(_: object) -> None:
        counter.value += 1

    while True:
        try:
            index = connection.recv()
        except EOFError:
            return
        connection.send(guarded(out, index, on_step, redirect=True))


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class RayEngine:
    """Tasks on a running Ray cluster whose nodes have this package and share the benchmark's folder."""

    def __init__(self, out: Path, threads: int):
        """Connect to the cluster of RAY_ADDRESS, or to the one on this machine.

        Raises:
            ConfigError: Ray is not installed, or no cluster runs.
        """
        try:
            import ray
        except ImportError as error:
            raise ConfigError("engine=ray: Ray is not installed; pip install 'acodm[ray]'") from error
        try:
            ray.init(address="auto", log_to_driver=False, logging_level="error")
        except ConnectionError as error:
            raise ConfigError(
                "engine=ray: no Ray cluster answers; start one with `ray start --head`, or set RAY_ADDRESS"
            ) from error
        self._ray, self._out = ray, out.absolute()
        self._task = ray.remote(num_cpus=threads, max_retries=0)(_ray_cell)
        self._threads = threads
        self._running: dict[Any, int] = {}

    def idle(self) -> int:
        """Free slots: as many cells as the cluster's CPUs hold, so that they are started in order."""
        total = int(self._ray.cluster_resources().get("CPU", 0)) // self._threads
        return max(total, 1) - len(self._running)

    def submit(self, index: int) -> None:
        """Start the cell on some node."""
        self._running[self._task.remote(str(self._out), index, self._threads)] = index

    def wait(self, seconds: float) -> list[tuple[int, str | None]]:
        """Cells that ended, or whose worker died."""
        if not self._running:
            time.sleep(seconds)
            return []
        done, _ = self._ray.wait(list(self._running), timeout=seconds)
        return [(index, self._answer(task, index)) for task in done for index in [self._running.pop(task)]]

    def _answer(self, task: Any, index: int) -> str | None:
        try:
            said: str | None = self._ray.get(task)
            return said
        except self._ray.exceptions.RayError as error:
            return fail(self._out, index, f"its worker died ({type(error).__name__}: {str(error).splitlines()[0]})")

    def steps(self) -> int:
        """Not known: tasks report when they end."""
        return 0

    def close(self) -> None:
        """Cancel what runs and disconnect; the cluster stays."""
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._ray.shutdown()


def _ray_cell(out: str, index: int, threads: int) -> str | None:
    import torch

    torch.set_num_threads(threads)
    return guarded(Path(out), index)


def make_engine(name: str, out: Path, jobs: int) -> Engine:
    """The engine `name`; on Ray a cell takes as many CPUs as a local one would have cores."""
    if name == "local":
        return LocalEngine(out, jobs)
    return RayEngine(out, threads=max(1, len(_cores()) // jobs))
