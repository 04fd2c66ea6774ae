"""`acodm overhead`: what deciding about the data costs, beyond a plain run with a fixed mixture.

Every round times one window of steps, one decision long, of each variant, in an order drawn anew, and divides by the
mean of the round's two plain windows: so a slow drift of the machine cancels, and the ratio of the two plain windows,
which two equal trainers run (A/A), shows what noise remains.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError
from acodm_env.experiments.console import listing, progress, say, text_table
from acodm_env.experiments.overhead.throughput import (
    VARIANTS,
    Variant,
    Window,
    generated_store,
    make_variant,
    peak_memories,
)
from acodm_env.experiments.run.accounting import describe, utilisation
from acodm_env.experiments.run.folder import versions
from acodm_env.files import write_json
from acodm_env.pretrain.config import resolve_device
from acodm_env.pretrain.models import flops_per_token
from acodm_env.step_stats import Array

WARMUP_ROUNDS = 2
TARGETS = {"cpu": 0.02, "cuda": 0.004}
"""Most wall-clock time beyond the plain run, as a share of it: on a CPU at `small`, on CUDA at `pythia-160m` and up."""
LABELS = {
    "plain": "fixed mixture (plain)",
    "probed": "policy, exact probe",
    "sketched": "policy, sketched probe",
    "k_backward": "fixed mixture, K backward passes",
}
PARTS = {
    "sampling_over_plain": "data: mixture → batch, per step",
    "probe_over_plain": "probe: sums collected, per step",
    "decision_per_step_over_plain": "decision: windows, Gram, observation, policy, per step",
    "decision_over_plain": "the same, per decision",
    "gram_over_plain": "of which the Gram matrix, per decision",
}


@dataclass(frozen=True, kw_only=True)
class OverheadConfig:
    """Measure what a policy with its probe costs beyond a fixed mixture: throughput, MFU, memory, side by side."""

    model: str = "small"
    """Preset (tiny, small, pythia-14m … pythia-1b), a config.json, or a hub name."""
    corpus: str | None = None
    """Folder of a token store; default: generated text."""
    num_domains: int = 8
    """K, domains of the generated text."""
    batch_size: int = 32
    """Sequences per step."""
    sequence_length: int = 128
    """Tokens per sequence."""
    decision_every: int = 4
    """Optimiser steps per decision; a policy decides less often the longer the target's run is."""
    sketch_size: int = 64
    """Side r of the sketched probe's random projection."""
    precision: str = "auto"
    """auto (bf16 where a CUDA device has it), fp32 or bf16."""
    compile: bool = False
    """Compile the model with torch.compile."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    rounds: int = 40
    """Interleaved rounds; each times every variant once."""
    memory: bool = True
    """Measure peak memory too, each variant's in a process of its own."""
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
        lowest = {"num_domains": 2, "batch_size": 1, "sequence_length": 2, "decision_every": 1, "rounds": 1}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads={self.threads}: must be at least 1, or left out")

    def lm_settings(self) -> dict[str, Any]:
        """What all variants' `LMConfig` shares."""
        names = ("model", "batch_size", "sequence_length", "decision_every", "precision", "device")
        switched = {name: True for name in ("compile", "gradient_checkpointing") if getattr(self, name)}
        steps = (WARMUP_ROUNDS + self.rounds) * self.decision_every
        return {name: getattr(self, name) for name in names} | switched | {"horizon": steps}


def run(config: OverheadConfig) -> None:
    """Measure, print the tables, and write `overhead.json`."""
    resolve_device(config.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(config, _store(config, Path(folder)))
    finally:
        torch.set_num_threads(threads)
    path = Path(config.out) / "overhead.json"
    write_json(path, result | {"versions": versions()})
    say(table(result))
    say(f"result: {path}")


def _store(config: OverheadConfig, folder: Path) -> TokenStore:
    if config.corpus is not None:
        return TokenStore.open(config.corpus)
    return generated_store(folder, config.num_domains, config.sequence_length, config.seed)


def measure(config: OverheadConfig, store: TokenStore) -> dict[str, Any]:
    """Everything that `overhead.json` holds but the versions."""
    shared = (config.lm_settings(), str(store.path), config.sketch_size, config.seed)
    memory = peak_memories(VARIANTS, torch.get_num_threads(), *shared) if config.memory else {}
    kinds = {name: name for name in VARIANTS} | {"plain_again": "plain"}
    variants = {name: make_variant(kind, shared[0], store, *shared[2:]) for name, kind in kinds.items()}
    windows = time_windows(config, variants)
    trainer = variants["plain"].trainer
    about = {
        "model": config.model,
        "parameters": sum(parameter.numel() for parameter in trainer.bare_model.parameters()),
        "flops_per_token": flops_per_token(trainer.bare_model, config.sequence_length),
        "vocab_size": store.vocab_size,
        "num_domains": len(store.domains),
        "threads": torch.get_num_threads(),
        **describe(trainer.device, trainer.bf16),
        **{name: getattr(config, name) for name in ("batch_size", "sequence_length", "decision_every", "sketch_size")},
        **{name: getattr(config, name) for name in ("compile", "gradient_checkpointing", "rounds", "seed")},
    }
    return about | summarise(about, windows) | {"peak_memory_bytes": memory}


def time_windows(config: OverheadConfig, variants: dict[str, Variant]) -> dict[str, list[Window]]:
    """A window per variant and round."""
    windows: dict[str, list[Window]] = {name: [] for name in variants}
    rng = np.random.default_rng(config.seed)
    with progress(WARMUP_ROUNDS + config.rounds, "overhead", quiet=config.quiet, unit="round") as bar:
        for number in range(WARMUP_ROUNDS + config.rounds):
            for name in rng.permutation(list(variants)).tolist():
                window = variants[name].window()
                if number >= WARMUP_ROUNDS:
                    windows[name].append(window)
            bar.update()
    return windows


def summarise(about: dict[str, Any], windows: dict[str, list[Window]]) -> dict[str, Any]:
    """Medians over rounds, with quartiles: ratios to the round's plain windows, tokens per second, MFU.

    Args:
        about: `decision_every`, `batch_size`, `sequence_length`, `flops_per_token`, `device_name` and `precision`.
        windows: those of every variant, and of "plain_again", by round.
    """
    steps = about["decision_every"]
    plain = _mean_plain(windows, "seconds")
    ratios = _ratios(windows, "seconds", "") | _ratios(windows, "cpu_seconds", "_cpu") | _shares(windows, plain, steps)
    tokens = about["batch_size"] * about["sequence_length"] * steps
    speeds = {name: tokens / (plain if name == "plain" else _taken(windows[name], "seconds")) for name in VARIANTS}
    medians = {name: float(np.median(values)) for name, values in speeds.items()}
    used = {
        name: utilisation(speed * about["flops_per_token"], about["device_name"], about["precision"])
        for name, speed in medians.items()
    }
    return {
        **{name: float(np.median(values)) for name, values in ratios.items()},
        "beyond_plain_frac": float(np.median(ratios["probed_over_plain"])) - 1,
        "plain_step_seconds": float(np.median(plain)) / steps,
        "tokens_per_second": medians,
        "mfu": {name: mfu for name, (mfu, _) in used.items()},
        "mfu_unknown": used["plain"][1] or None,
        "quartiles": {name: _quartiles(values) for name, values in ratios.items()},
        "tokens_per_second_quartiles": {name: _quartiles(values) for name, values in speeds.items()},
    }


def _ratios(windows: dict[str, list[Window]], clock: str, suffix: str) -> dict[str, Array]:
    """Every variant's time over the plain one's (rounds,), and the plain one's over itself."""
    plain = _mean_plain(windows, clock)
    again = _taken(windows["plain"], clock) / _taken(windows["plain_again"], clock)
    others = (name for name in VARIANTS if name != "plain")
    return {f"a_over_a{suffix}": again} | {
        f"{name}_over_plain{suffix}": _taken(windows[name], clock) / plain for name in others
    }


def _shares(windows: dict[str, list[Window]], plain: Array, steps: int) -> dict[str, Array]:
    """What the policy's run spends its time on, over a plain step's (rounds,): per step or per decision."""
    shares = {
        "sampling_over_plain": ("data", steps),
        "probe_over_plain": ("probe", steps),
        "decision_per_step_over_plain": ("decision", steps),
        "decision_over_plain": ("decision", 1),
        "gram_over_plain": ("gram", 1),
    }
    probed = windows["probed"]
    return {
        name: np.array([window.parts.get(part, 0.0) for window in probed]) / per / (plain / steps)
        for name, (part, per) in shares.items()
        if any(part in window.parts for window in probed)
    }


def _mean_plain(windows: dict[str, list[Window]], clock: str) -> Array:
    mean: Array = (_taken(windows["plain"], clock) + _taken(windows["plain_again"], clock)) / 2
    return mean


def _taken(windows: list[Window], clock: str) -> Array:
    return np.array([getattr(window, clock) for window in windows])


def _quartiles(values: Array) -> list[float]:
    found: list[float] = np.quantile(values, (0.25, 0.75)).tolist()
    return found


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    unknown = result["mfu_unknown"]
    switched = [name.replace("_", " ") for name in ("compile", "gradient_checkpointing") if result[name]]
    head = (
        f"{result['model']} ({result['parameters'] / 1e6:.1f} M parameters), K={result['num_domains']}, "
        f"{result['batch_size']} × {result['sequence_length']} tokens a step, a decision every "
        f"{result['decision_every']} steps,\n{result['device_name']}, {', '.join([result['precision'], *switched])}, "
        f"{result['threads']} threads: {result['plain_step_seconds'] * 1e3:.1f} ms a plain step; "
        f"medians of {result['rounds']} rounds (quartiles)"
    )
    header = ("", "tokens/s", "time over plain", "CPU time over plain", "MFU", "peak memory")
    labels = LABELS | {"probed": "policy, the default probe (sketched)"} if result["compile"] else LABELS
    rows = [(label, *_cells(result, name)) for name, label in labels.items()]
    noise = (_interval(result, "a_over_a"), _interval(result, "a_over_a_cpu"))
    rows.insert(1, ("another one like it (A/A: the noise)", "", *noise, "", ""))
    parts = [(f"  {label}", _interval(result, name, percent=True)) for name, label in PARTS.items() if name in result]
    low, high = (bound - 1 for bound in result["quartiles"]["probed_over_plain"])
    most = TARGETS["cpu" if result["device_name"] == "cpu" else "cuda"]
    lines = [
        *(head, "", text_table(header, rows), ""),
        *([f"MFU: {unknown}"] if unknown else []),
        f"{labels['probed']}, as shares of a plain step:",
        *([listing(parts)] if parts else []),
        f"wall clock beyond the plain run: {result['beyond_plain_frac']:+.1%} ({low:+.1%} to {high:+.1%}); "
        f"target at most {most:.1%}",
    ]
    return "\n".join(lines)


def _cells(result: dict[str, Any], name: str) -> tuple[str, ...]:
    low, high = result["tokens_per_second_quartiles"][name]
    mfu, memory, plain = result["mfu"][name], *(result["peak_memory_bytes"].get(key) for key in (name, "plain"))
    beyond = "" if name == "plain" or not plain or memory is None else f" ({memory / plain - 1:+.1%})"
    return (
        f"{result['tokens_per_second'][name]:,.0f} ({low:,.0f}–{high:,.0f})",
        *("1" if name == "plain" else _interval(result, f"{name}_over_plain{kind}") for kind in ("", "_cpu")),
        "-" if mfu is None else f"{mfu:.1%}",
        "-" if memory is None else f"{memory / 2**20:,.0f} MiB{beyond}",
    )


def _interval(result: dict[str, Any], name: str, percent: bool = False) -> str:
    form = ".2%" if percent else ".3f"
    low, high = result["quartiles"][name]
    return f"{result[name]:{form}} ({low:{form}}–{high:{form}})"


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm overhead, or python -m acodm_env overhead")
