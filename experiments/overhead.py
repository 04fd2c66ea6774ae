"""`acodm overhead`: what the gradient probe, a decision and the sampling cost, as shares of a plain training step.

Every round times each variant once, in an order drawn anew, and divides by the mean of the round's two plain steps: so
a slow drift of the machine cancels, and the ratio of the two plain steps (A/A) shows what noise remains. The rival,
K backward passes, runs the batch as one micro-batch per domain: the cheapest way to get K gradients without the probe.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from acodm_env.corpus.prepare import Preparation, prepare
from acodm_env.corpus.sampler import Batch, MixtureSampler
from acodm_env.corpus.sources import Source
from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError
from acodm_env.experiments.console import listing, progress, say
from acodm_env.experiments.runs import versions
from acodm_env.files import write_json
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.observation import DEFAULT_FIELDS, Observer
from acodm_env.policy import Policy
from acodm_env.pretrain.config import resolve_device
from acodm_env.pretrain.gradients import DomainGradients, GradientProbe, order_rows
from acodm_env.pretrain.models import build_model, probed_layers
from acodm_env.trainer import RunInfo

MODEL = "pythia-31m"  # 6 layers × 256
VOCAB_SIZE = 2048
WARMUP_ROUNDS = 2
REPEATS = 10  # decisions and draws per timing: one alone is too short to time
LABELS = {
    "a_over_a": "plain step again (A/A: the noise)",
    "probed_over_plain": "with the exact probe",
    "sketched_over_plain": "with the sketched probe",
    "k_backward_over_plain": "K backward passes instead",
    "gram_over_plain": "Gram matrix, per decision",
    "decision_over_plain": "policy, per decision",
    "sampling_over_plain": "sampling, per step",
}


@dataclass(frozen=True, kw_only=True)
class OverheadConfig:
    """Measure what the gradient probe, a decision and sampling cost, relative to a plain training step."""

    rounds: int = 40
    """Interleaved rounds; each times every variant once."""
    num_domains: int = 8
    """K, training domains (generated text)."""
    batch_size: int = 16
    """Sequences per step."""
    sequence_length: int = 128
    """Tokens per sequence."""
    sketch_size: int = 64
    """Side r of the sketched probe's random projection."""
    threads: int | None = None
    """CPU threads of torch; default: torch's own choice."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of model, data and order."""
    out: str = "runs/overhead"
    """Folder of the result."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("num_domains", 2), ("batch_size", 1), ("sequence_length", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads={self.threads}: must be at least 1, or left out")


def run(config: OverheadConfig) -> None:
    """Measure, print the table, and write `overhead.json`."""
    device = resolve_device(config.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(config, generated_store(config, Path(folder)), device)
            seconds = measure(config, bench)
        result = summarise(config, seconds) | bench.description() | {"versions": versions()}
    finally:
        torch.set_num_threads(threads)
    path = Path(config.out) / "overhead.json"
    write_json(path, result)
    say(table(result))
    say(f"result: {path}")


def generated_store(config: OverheadConfig, folder: Path) -> TokenStore:
    """A token store of K domains of random words, at least 64 sequences each in train."""
    rng = np.random.default_rng(config.seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size=rng.integers(2, 8))) for _ in range(4000)]
    num_documents = max(20, config.sequence_length)  # of 100 words, at least one token each
    with (folder / "data.jsonl").open("w") as file:
        for domain in range(config.num_domains):
            for _ in range(num_documents):
                text = " ".join(rng.choice(words, size=100))
                file.write(json.dumps({"text": text, "domain": f"domain-{domain:03d}"}) + "\n")
    source = Source(name=str(folder / "data.jsonl"), domain_field="domain")
    preparation = Preparation(source=source, splits=(0.8, 0.1, 0.1), tokenizer=f"train:{VOCAB_SIZE}")
    return prepare(preparation, folder / "store")


def random_policy(info: RunInfo, seed: int, hidden: int = 64) -> Policy:
    """A policy of the usual size (two hidden layers, all default fields) with random weights."""
    rng = np.random.default_rng(seed)
    layout = Observer(info, DEFAULT_FIELDS).layout
    widths = (sum(size for _, size in layout), hidden, hidden, info.num_domains)
    layers = tuple(
        (rng.normal(size=(out, inside)).astype(np.float32), np.zeros(out, dtype=np.float32), activation)
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
    )


class Bench:
    """One model that takes full training steps in different ways."""

    def __init__(self, config: OverheadConfig, store: TokenStore, device: torch.device):
        self.config, self.device = config, device
        self.model = build_model(MODEL, VOCAB_SIZE, config.sequence_length, config.seed).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        layers = probed_layers(self.model)
        self.layer_names = [name for name, _ in layers]
        self.weights = [module.weight for _, module in layers]
        self.exact = GradientProbe(layers, config.num_domains)
        self.sketched = GradientProbe(layers, config.num_domains, sketch_size=config.sketch_size, seed=config.seed)
        self.sampler = MixtureSampler(store, "train", config.batch_size, config.sequence_length, seed=config.seed)
        self.uniform = np.full(config.num_domains, 1 / config.num_domains)
        self.gradients: DomainGradients | None = None
        self.policy = random_policy(self._info(store), config.seed)
        self.observation = np.zeros(len(self.policy.mean), dtype=np.float32)

    def _info(self, store: TokenStore) -> RunInfo:
        return RunInfo(
            domains=store.domains,
            targets=store.domains,
            sizes_tokens=store.sizes_tokens("train"),
            batch_size=self.config.batch_size,
            sequence_length=self.config.sequence_length,
            horizon=200,
            initial_loss_nats=float(np.log(VOCAB_SIZE)),
            num_layers=3,
        )

    def description(self) -> dict[str, Any]:
        """Model, device and threads, for the record."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "device": name,
            "threads": torch.get_num_threads(),
            "model": {
                "preset": MODEL,
                "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
                "vocab_size": VOCAB_SIZE,
                "probed_layers": self.layer_names,
                "probed_parameters": sum(weight.numel() for weight in self.weights),
            },
        }

    def next_batch(self) -> None:
        """Draw the batch of the coming round, rows ordered by group for all variants."""
        drawn = self.sampler.drawn
        batch: Batch = self.sampler.draw(self.uniform)
        order, self.groups = order_rows(batch.domains, drawn)
        self.counts = batch.counts.tolist()
        self.tokens = torch.from_numpy(batch.tokens[order]).to(self.device)  # (B, T)

    def _loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Sum of token losses over the whole batch's number of tokens."""
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits  # (B, T-1, V)
        total = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        return total / self.tokens[:, 1:].numel()

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def plain(self) -> None:
        """Forward, backward, clip, AdamW."""
        self._loss(self.tokens).backward()
        self._update()

    def probed(self, probe: GradientProbe) -> None:
        """The same step with a probe attached, its sums collected."""
        probe.begin(self.groups)
        self._loss(self.tokens).backward()
        num_predicted = self.tokens.shape[1] - 1
        gradients = probe.collect(self.groups * num_predicted, normaliser=self.groups.sum() * num_predicted)
        self._update()
        if probe is self.exact:
            self.gradients = gradients

    def k_backward(self) -> None:
        """The same step as one micro-batch per domain, keeping each one's gradient of the probed weights."""
        kept = []
        for rows in torch.split(self.tokens, self.counts):
            if len(rows):
                self._loss(rows).backward()
                kept.append([weight.grad for weight in self.weights])
                for weight in self.weights:
                    weight.grad = None
        for weight, gradients in zip(self.weights, zip(*kept, strict=True), strict=True):
            weight.grad = torch.stack(gradients).sum(0)
        self._update()

    def gram(self) -> None:
        """The Gram matrix of the whole gradients collected last."""
        assert self.gradients is not None
        self.gradients.gram()

    def decide(self) -> None:
        """Policy decisions: normalise, dense layers, action map, projection."""
        for _ in range(REPEATS):
            weights = self.policy.action.weights(self.policy.act(self.observation))
            self.policy.bounds.project(weights)

    def sample(self) -> None:
        """Batches drawn."""
        for _ in range(REPEATS):
            self.sampler.draw(self.uniform)

    def seconds(self, action: Callable[[], None]) -> float:
        """Wall-clock time of `action`, the device's queue included."""
        self._synchronise()
        start = time.perf_counter()
        action()
        self._synchronise()
        return time.perf_counter() - start

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds_probed(self, probe: GradientProbe) -> float:
        """Time of a probed step; attaching happens once a run and is not counted."""
        probe.attach()
        seconds = self.seconds(lambda: self.probed(probe))
        probe.detach()
        return seconds


def measure(config: OverheadConfig, bench: Bench) -> dict[str, list[float]]:
    """Seconds per variant and round."""
    steps: dict[str, Callable[[], float]] = {
        "plain_a": lambda: bench.seconds(bench.plain),
        "plain_b": lambda: bench.seconds(bench.plain),
        "probed": lambda: bench.seconds_probed(bench.exact),
        "sketched": lambda: bench.seconds_probed(bench.sketched),
        "k_backward": lambda: bench.seconds(bench.k_backward),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*steps, "gram", "decision", "sampling")}
    rng = np.random.default_rng(config.seed)
    with progress(WARMUP_ROUNDS + config.rounds, "overhead", quiet=config.quiet, unit="round") as bar:
        for number in range(WARMUP_ROUNDS + config.rounds):
            bench.next_batch()
            taken = {name: steps[name]() for name in rng.permutation(list(steps)).tolist()}
            taken["gram"] = bench.seconds(bench.gram)
            taken["decision"] = bench.seconds(bench.decide) / REPEATS
            taken["sampling"] = bench.seconds(bench.sample) / REPEATS
            if number >= WARMUP_ROUNDS:
                for name, value in taken.items():
                    seconds[name].append(value)
            bar.update()
    return seconds


def summarise(config: OverheadConfig, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians over rounds of the ratios to the round's plain steps, with quartiles."""
    times = {name: np.array(values) for name, values in seconds.items()}  # (rounds,)
    plain = (times["plain_a"] + times["plain_b"]) / 2
    ratios = {"a_over_a": times["plain_a"] / times["plain_b"]}
    ratios |= {f"{name}_over_plain": times[name] / plain for name in times if not name.startswith("plain")}
    return {
        "num_domains": config.num_domains,
        **{name: float(np.median(values)) for name, values in ratios.items()},
        "quartiles": {name: np.quantile(values, (0.25, 0.75)).tolist() for name, values in ratios.items()},
        "rounds": config.rounds,
        "plain_step_seconds": float(np.median(plain)),
        "batch_size": config.batch_size,
        "sequence_length": config.sequence_length,
        "sketch_size": config.sketch_size,
        "seed": config.seed,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    model = result["model"]
    head = (
        f"{model['preset']}, {model['parameters'] / 1e6:.1f} M parameters, {len(model['probed_layers'])} probed, "
        f"K={result['num_domains']}, {result['batch_size']} × {result['sequence_length']} tokens,\n"
        f"{result['device']}, {result['threads']} threads: {result['plain_step_seconds'] * 1e3:.1f} ms a plain step;\n"
        f"time over a plain step's, median of {result['rounds']} rounds (quartiles):"
    )
    rows = []
    for name, label in LABELS.items():
        low, high = result["quartiles"][name]
        digits = 3 if result[name] >= 0.1 else 5
        rows.append((f"  {label}", f"{result[name]:.{digits}f}  ({low:.{digits}f}–{high:.{digits}f})"))
    return "\n".join([head, listing(rows)])
