"""One language model trained in several ways, side by side: what `acodm overhead` times.

Every variant is a real `LMTrainer` with a mixer, all on the same corpus, from the same seed, in one process; a round
runs a window of optimiser steps, one decision long, of each. What a variant needs of memory is measured in a process of
its own.
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from acodm_env.agents.baselines import make_mixer
from acodm_env.corpus.preparation.prepare import Preparation, prepare
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.tokens import TokenStore
from acodm_env.experiments.run.accounting import peak_memory_bytes
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.observation import DEFAULT_FIELDS, Observer
from acodm_env.policy.dense import Policy
from acodm_env.policy.mixer import PolicyMixer
from acodm_env.pretrain.config import LMConfig
from acodm_env.pretrain.models import probed_layers
from acodm_env.pretrain.trainer import LMTrainer
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Mixer, RunInfo, require

VOCAB_SIZE = 2048
HIDDEN = 64  # units of the policy's two hidden layers, the usual size
VARIANTS = ("plain", "probed", "sketched", "k_backward")
"""A fixed mixture; a policy with the exact probe; one with the sketched probe; a fixed mixture, a pass per domain."""


@dataclass
class Window:
    """Wall-clock seconds of one window of steps, and what they were spent on."""

    seconds: float = 0.0
    """All of it."""
    cpu_seconds: float = 0.0
    """CPU time of the process, all threads: what other processes on the machine do hardly changes it."""
    parts: dict[str, float] = field(default_factory=dict)
    """data, train and probe, as the trainer tells them apart; decision; and gram, which is a part of the decision."""

    def add(self, part: str, seconds: float) -> None:
        """Count `seconds` towards a part."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds


class Variant:
    """A trainer and its mixer, run a window at a time."""

    def __init__(self, trainer: LMTrainer, mixer: Mixer, seed: int):
        self.trainer, self.mixer = trainer, mixer
        trainer.reset(np.random.default_rng(seed))
        mixer.start(trainer.info)
        require(trainer, mixer.needs, mixer.name)

    def window(self) -> Window:
        """One decision's worth of steps, the device's queue included."""
        spent = Window()
        self._synchronise()
        begin, begin_cpu = time.perf_counter(), time.process_time()
        for _ in range(self.trainer.info.decision_every):
            stats = self.step()
            for part, seconds in stats.seconds.items():
                spent.add(part, seconds)
            updating = time.perf_counter()
            self.mixer.update(stats)
            spent.add("decision", time.perf_counter() - updating)
        self._synchronise()
        spent.seconds, spent.cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
        if stats.gradients is not None:
            begin = time.perf_counter()
            stats.gradients.gram()
            spent.add("gram", time.perf_counter() - begin)
        return spent

    def step(self) -> StepStats:
        """One optimiser step under the mixer."""
        return self.trainer.step(self.mixer.weights(), self.mixer.loss_weights())

    def _synchronise(self) -> None:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)


class PerDomain(Variant):
    """The rival: the batch as one micro-batch per domain, the cheapest way to K gradients without the probe."""

    def __init__(self, trainer: LMTrainer, mixer: Mixer, seed: int):
        super().__init__(trainer, mixer, seed)
        self.weights: list[Any] = [
            module.weight for _, module in probed_layers(trainer.bare_model, trainer.config.probe_depths)
        ]

    def step(self) -> StepStats:
        """Forward and backward per domain, its gradients kept, then clip and AdamW on their sum."""
        trainer = self.trainer
        batch = trainer.sampler.draw(self.mixer.weights())
        tokens = torch.from_numpy(batch.tokens).to(trainer.device)  # (B, T)
        trainer.optimizer.zero_grad(set_to_none=True)
        kept = []
        total = torch.zeros((), device=trainer.device)
        for rows in torch.split(tokens, batch.counts.tolist()):
            if len(rows):
                loss = self._loss(rows, tokens[:, 1:].numel())
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
                kept.append([weight.grad for weight in self.weights])
                for weight in self.weights:
                    weight.grad = None
        for weight, gradients in zip(self.weights, zip(*kept, strict=True), strict=True):
            weight.grad = torch.stack(gradients).sum(0)
        norm = float(torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.config.clip_norm))
        trainer.optimizer.step()
        return bare_stats(batch.counts.astype(np.float64), float(total), norm)

    def _loss(self, rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Sum of the rows' token losses over the whole batch's number of tokens."""
        with torch.autocast(self.trainer.device.type, torch.bfloat16, enabled=self.trainer.bf16):
            logits = self.trainer.model(input_ids=rows[:, :-1], use_cache=False).logits  # (b, T-1, V)
        losses = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
        return losses / num_tokens


def bare_stats(counts: Array, loss: float, norm: float) -> StepStats:
    """Statistics that a fixed mixture does not look at."""
    unknown = np.full(len(counts), np.nan)
    return StepStats(
        step=0, tokens=0, requested=counts, realised=counts, counts=counts, loss_tokens=counts, losses=unknown,
        epochs=unknown, drawn=counts, loss=loss, grad_norm=norm,
    )  # fmt: skip


def make_variant(name: str, settings: dict[str, Any], store: TokenStore, sketch_size: int, seed: int) -> Variant:
    """A variant by its name in `VARIANTS`.

    Args:
        name: which.
        settings: of `LMConfig`, all variants' the same.
        store: the corpus.
        sketch_size: side of the sketched probe's projection.
        seed: of model and data.
    """
    config = LMConfig(**settings, sketch_size=sketch_size if name == "sketched" else None)
    trainer = LMTrainer(config, store)
    if name in ("plain", "k_backward"):
        return (Variant if name == "plain" else PerDomain)(trainer, make_mixer("uniform"), seed)
    return Variant(trainer, PolicyMixer(random_policy(trainer.info, seed)), seed)


def random_policy(info: RunInfo, seed: int) -> Policy:
    """A policy of the usual size (two hidden layers, all default fields) with random weights."""
    rng = np.random.default_rng(seed)
    layout = Observer(info, DEFAULT_FIELDS).layout
    widths = (sum(size for _, size in layout), HIDDEN, HIDDEN, info.num_domains)
    layers = tuple(
        ((rng.normal(size=(out, inside)) / np.sqrt(inside)).astype(np.float32), np.zeros(out, np.float32), activation)
        for inside, out, activation in zip(widths[:-1], widths[1:], ("relu", "relu", "tanh"), strict=True)
    )
    return Policy(
        domains=info.domains,
        fields=layout,
        mean=np.zeros(widths[0]),
        scale=np.ones(widths[0]),
        clip=10.0,
        layers=layers,
        action=ActionMap(),
        bounds=Bounds(),
        interaction=InteractionConfig(),
        decision_every=info.decision_every,
        horizon=info.horizon,
        gradients=info.gradients,
    )


def generated_store(folder: Path, num_domains: int, sequence_length: int, seed: int) -> TokenStore:
    """A token store of K domains of random words, at least 64 sequences each in train."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size=rng.integers(2, 8))) for _ in range(4000)]
    num_documents = max(20, sequence_length)  # of 100 words, at least one token each
    with (folder / "data.jsonl").open("w") as file:
        for domain in range(num_domains):
            for _ in range(num_documents):
                text = " ".join(rng.choice(words, size=100))
                file.write(json.dumps({"text": text, "domain": f"domain-{domain:03d}"}) + "\n")
    source = Source(name=str(folder / "data.jsonl"), domain_field="domain")
    preparation = Preparation(source=source, splits=(0.8, 0.1, 0.1), tokenizer=f"train:{VOCAB_SIZE}")
    return prepare(preparation, folder / "store", quiet=True)


def peak_memories(names: Sequence[str], threads: int, *arguments: Any) -> dict[str, int | None]:
    """Peak memory in bytes of each variant, each in a process of its own, one after the other.

    Args:
        names: of the variants.
        threads: of torch.
        arguments: what `make_variant` takes after the name, the store as its folder.
    """
    found = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[name] = pool.submit(_peak_memory, name, threads, *arguments).result()
    return found


def _peak_memory(
    name: str, threads: int, settings: dict[str, Any], store: str, sketch_size: int, seed: int
) -> int | None:
    torch.set_num_threads(threads)
    variant = make_variant(name, settings, TokenStore.open(store), sketch_size, seed)
    for _ in range(2):
        variant.window()
    return peak_memory_bytes(variant.trainer.device)
