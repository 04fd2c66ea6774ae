"""Mixers from outside the package, installed as an entry point would install them; and a tiny benchmark."""

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Mixer, RunInfo, RunRequest, RunResult

NAMES = {"crash": "Crash", "die": "Die", "two-stage": "TwoStage", "wander": "Wander"}


class Wander(Mixer):
    """Moves a little at every step."""

    needs = frozenset({"losses"})

    def __init__(self, pace: float = 0.1):
        self.pace = pace

    def start(self, info: RunInfo) -> None:
        super().start(info)
        self.logits = np.zeros(info.num_domains)

    def weights(self) -> Array:
        soft: Array = np.exp(self.logits - self.logits.max())
        return soft / soft.sum()

    def update(self, stats: StepStats) -> None:
        self.logits[stats.step % len(self.logits)] += self.pace

    def state_dict(self) -> dict[str, Any]:
        return {"logits": self.logits.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.logits = np.array(state["logits"])


class Crash(Wander):
    """Fails in the middle of a run."""

    def update(self, stats: StepStats) -> None:
        if stats.step == 3:
            raise RuntimeError("a deliberate failure")


class Die(Wander):
    """Takes its process with it."""

    def update(self, stats: StepStats) -> None:
        if stats.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


class TwoStage(Wander):
    """Asks for two runs, and plays the mixture of the first."""

    def preparation(self, info: RunInfo) -> Sequence[RunRequest]:
        return [
            RunRequest(name="first", mixer="wander", options={"pace": 0.5}, steps=4, keep_model=True),
            RunRequest(name="second", mixer="uniform", steps=3),
        ]

    def prepare(self, results: Mapping[str, RunResult]) -> None:
        assert np.isfinite(results["second"].final_losses).all()
        self.found = results["first"].mixture

    def weights(self) -> Array:
        return self.found.copy()


def install(folder: Path) -> Path:
    """Make `folder` a place where these mixers are installed: put it on the path."""
    (folder / "plugin_mixers.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    record = folder / "plugin_mixers-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-mixers\nVersion: 1.0\n")
    lines = [f"{name} = plugin_mixers:{kind}" for name, kind in NAMES.items()]
    (record / "entry_points.txt").write_text("\n".join(["[acodm.mixers]", *lines]) + "\n")
    return folder


def tiny(corpus: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a benchmark whose cells take a fraction of a second."""
    settings = {
        "corpus": str(corpus),
        "out": str(out),
        "model": "tiny",
        "steps": 6,
        "batch_size": 6,
        "sequence_length": 32,
        "evaluations": 3,
        "eval_sequences": 2,
        "decision_every": 2,
        "schedules": "cosine",
        "seeds": "2",
        "quiet": True,
    }
    return settings | changes


def flags(settings: Mapping[str, Any]) -> list[str]:
    """The same as arguments of `acodm benchmark`."""
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()]
