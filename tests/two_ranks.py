"""What every process of a launched test run does, and the same for one process to compare with.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/two_ranks.py TASK SETTINGS.json

A rank writes what it saw to `rank<N>.safetensors` in the settings' folder.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import AcodmError
from acodm_env.files import read_state, write_state
from acodm_env.pretrain.config import LMConfig
from acodm_env.pretrain.leader import leading
from acodm_env.pretrain.trainer import LMTrainer, target_accelerator
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Mixer, Trainer, drive

SETTINGS: dict[str, Any] = {
    "batch_size": 12,
    "sequence_length": 32,
    "horizon": 8,
    "decision_every": 2,
    "eval_sequences": 5,
    "device": "cpu",
    "sketch_size": 16,
    "warmup_frac": 0.4,
}
MEASURED = frozenset({"losses", "gram", "layers", "loss_weights"})
STEPS, SAVED_AT = 6, 3
FACTORS = (None, np.array([2.0, 0.5, 1.25]))


def schedule(step: int) -> Array:
    """Mixture of three domains at a step."""
    mixture: Array = np.random.default_rng(step).dirichlet(np.ones(3))
    return mixture


class Recording(LMTrainer):
    """Keeps the rows that this process trained on."""

    def reset(self, rng: np.random.Generator) -> None:
        super().reset(rng)
        self.rows: list[np.ndarray] = []

    def _micro_batch(self, record: Any, batch: Any, *rest: Any) -> None:
        self.rows.append(batch.tokens.copy())
        super()._micro_batch(record, batch, *rest)


class Reading(Mixer):
    """In closed loop: what it saw of losses and gradients decides."""

    needs = frozenset({"losses", "gram"})

    def start(self, info: Any) -> None:
        super().start(info)
        self.logits = np.zeros(info.num_domains)

    def weights(self) -> Array:
        soft = np.exp(self.logits)
        mixture: Array = soft / soft.sum()
        return mixture

    def update(self, stats: StepStats) -> None:
        assert stats.gradients is not None
        gram = np.nan_to_num(stats.gradients.gram()[0])
        seen = np.nan_to_num(stats.losses, nan=5.0)
        self.logits = 0.5 * self.logits + (seen - seen.mean()) + 0.1 * np.tanh(gram.sum(1))


def play(trainer: Trainer, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Train under the schedule; every number that a step shows."""
    trainer.measure = MEASURED
    trainer.reset(np.random.default_rng(0 if state is None else 99))
    if state is not None:
        trainer.load_state_dict(state)
    seen: dict[str, list[Any]] = {}
    saved = None
    for step in range(trainer.steps_done, STEPS):
        stats = trainer.step(schedule(step), FACTORS[step % 2])
        assert stats.gradients is not None
        gram, noise = stats.gradients.gram()
        layers = stats.layer_changes if stats.layer_changes is not None else np.zeros(3)
        for name in ("loss", "grad_norm", "losses", "counts", "drawn", "lr", "requested"):
            seen.setdefault(name, []).append(getattr(stats, name))
        for name, value in (("gram", gram), ("noise", noise), ("layers", layers)):
            seen.setdefault(name, []).append(value)
        if stats.step == SAVED_AT:
            saved = trainer.state_dict()
    record: dict[str, Any] = {name: np.array(values) for name, values in seen.items()}
    evaluated = {split: trainer.evaluate(split) for split in ("validation", "test")}
    return record | evaluated | {"saved": saved or {}, "final": trainer.state_dict()}


def closed_loop(trainer: Trainer) -> Array:
    """(steps, K) mixtures that a mixer asked for."""
    mixer = Reading()
    trainer.reset(np.random.default_rng(0))
    mixer.start(trainer.info)
    return np.array([stats.requested for stats in drive(trainer, mixer, 8)])


def trainer_of(store: TokenStore, accelerator: Any = None, **settings: Any) -> Recording:
    """A trainer of tiny steps."""
    return Recording(LMConfig(**SETTINGS | settings), store, accelerator)


def check(folder: Path, settings: dict[str, Any], accelerator: Any) -> None:
    """Everything that two processes should do as one does."""
    store = TokenStore.open(settings["corpus"])
    found: dict[str, Any] = {}
    for name, options in settings["runs"].items():
        trainer = trainer_of(store, accelerator, **options)
        with leading(trainer) as led:
            if led is not None:
                found[name] = play(led)
        found[f"{name}-rows"] = np.stack(trainer.rows)
        with leading(trainer) as led:
            if led is not None:
                found[f"{name}-resumed"] = play(led, found[name]["saved"])
                found[f"{name}-from-one"] = play(led, read_state(folder / "one.safetensors"))
                found[f"{name}-closed"] = closed_loop(led)
    many = trainer_of(
        TokenStore.open(settings["many"]), accelerator, model="pythia-14m", batch_size=44, sketch_size=None
    )
    with leading(many) as led:
        if led is not None:
            led.measure = frozenset({"losses", "gram"})
            led.reset(np.random.default_rng(0))
            sent = many.ranks.exchanged
            led.step(np.full(22, 1 / 22))
            found["bytes"] = many.ranks.exchanged - sent
    write_state(folder / f"rank{accelerator.process_index}.safetensors", found)


def fail(folder: Path, settings: dict[str, Any], accelerator: Any) -> None:
    """One process fails in the middle of a run."""
    trainer = trainer_of(TokenStore.open(settings["corpus"]), accelerator)
    rank, own = trainer.ranks.rank, trainer._micro_batch

    def failing(*arguments: Any) -> None:
        if trainer.steps_done == 2 and rank == settings["rank"]:
            if settings["how"] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if settings["how"] == "raise":
                raise ValueError("a deliberate failure")
            if settings["how"] == "preempt":
                os.kill(os.getpid(), signal.SIGTERM)
        own(*arguments)

    trainer._micro_batch = failing  # type: ignore[method-assign]
    with leading(trainer) as led:
        if led is not None:
            led.reset(np.random.default_rng(0))
            for step in range(STEPS):
                if settings["how"] == "decide" and step == 2:
                    raise ValueError("a deliberate failure of the mixer")
                led.step(schedule(step))


def launch(task: str, folder: Path, *, timeout: float = 200, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run `task` on two processes."""
    (folder / "settings.json").write_text(json.dumps(settings))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, __file__, task, str(folder / "settings.json")],
        # The folder of tests is no place to import from: it has one called acodm_env.
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def main(task: str, path: str) -> None:
    """Entry point of a rank."""
    torch.set_num_threads(1)
    accelerator = target_accelerator("cpu")
    settings = json.loads(Path(path).read_text())
    try:
        {"check": check, "fail": fail}[task](Path(path).parent, settings, accelerator)
    except AcodmError as error:
        sys.exit(f"acodm: {error}")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
