"""Benchmark folders without a benchmark: deterministic numbers in the layout that `acodm benchmark` leaves."""

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.files import sha256, write_json

DOMAINS = ("python", "prose", "arithmetic")
MIXERS = ("uniform", "odm-released", "mean-of:odm-released")
BATCH, LENGTH = 4, 32
VERSIONS = {"python": "3.12.0", "acodm": "0.1.0", "torch": "2.8.0"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fake_benchmark(
    path: Path,
    mixers: Sequence[str] = MIXERS,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    schedules: Sequence[str] = ("cosine",),
    steps: int = 40,
    domains: Sequence[str] = DOMAINS,
    *,
    targets: Sequence[str] | None = None,
    objective: Sequence[float] | None = None,
    metric: str | None = None,
    reference: str = "odm-released",
    gains: Mapping[str, float] | None = None,
    noise: float = 0.01,
    evaluations: int = 8,
    flops_per_token: float = 6e6,
    preparation_tokens: Mapping[str, int] | None = None,
    missing: Collection[str] = (),
    unfinished: Collection[str] = (),
    failed: Collection[str] = (),
    diverged: Collection[str] = (),
    corrupted: Collection[str] = (),
) -> Path:
    """Write a benchmark's folder; returns `path`.

    Args:
        path: its folder.
        mixers: rows of the table, in order.
        seeds, schedules, steps, domains: of the plan.
        targets: held-out sets; the domains unless given.
        objective: their weights; all equal unless given.
        metric: what is averaged, where the user chose it.
        reference: `plan.json`'s.
        gains: nats by which a mixer ends below the first one; 0.05 more for each further mixer unless given.
        noise: standard deviation of a run's final loss about its seed's, nats.
        evaluations: after step 0.
        flops_per_token: of training; 0 leaves FLOPs out, as a trainer that does not know them.
        preparation_tokens: by mixer; its preparation is one cell a seed.
        missing, unfinished, failed, diverged, corrupted: names of target cells, such as "cosine/uniform/seed0".
    """
    targets = tuple(targets or domains)
    settings = {
        "corpus": "pocket",
        "corpus_fingerprint": "f" * 64,
        "model": "tiny",
        "proxy": "tiny",
        "steps": steps,
        "batch_size": BATCH,
        "sequence_length": LENGTH,
        "learning_rate": 2e-3,
        "decision_every": 1,
        "eval_sequences": 8,
        "evaluations": evaluations,
        "domains": [*domains],
        "targets": [*targets],
        "objective": [*objective] if objective else [1 / len(targets)] * len(targets),
        **({"metric": metric} if metric else {}),
    }
    write_json(path / "config.json", {"config": settings, "versions": VERSIONS, "git_commit": COMMIT})
    prepared = preparation_tokens or {}
    cells = plan_cells(mixers, seeds, schedules, prepared)
    plan = {"reference": reference, "schedules": [*schedules], "seeds": [*seeds], "mixers": [*mixers]}
    write_json(path / "plan.json", {**plan, "command": "acodm benchmark --out OUT", "cells": cells})
    for cell in cells:
        folder = path / cell["folder"]
        if cell["kind"] == "preparation":
            write_json(folder / "result.json", {"mixer": cell["mixer"], "seed": cell["seed"], "results": {}})
            continue
        if cell["name"] in missing:
            continue
        gain = gains.get(cell["mixer"], 0.0) if gains else 0.05 * mixers.index(cell["mixer"])
        config = {**settings, **{name: cell[name] for name in ("mixer", "schedule", "seed")}}
        short = cell["name"] in (*unfinished, *failed)
        write_run(folder, config, gain=gain, noise=noise, until=steps // 2 if short else steps)
        if cell["name"] in failed:
            write_json(folder / "failed.json", {"error": "MemoryError: out of memory", "log": "cell.log"})
        if short:
            continue
        cost = fake_cost(steps, flops_per_token, prepared.get(cell["mixer"], 0))
        finish_run(folder, config, cost, diverged=cell["name"] in diverged)
        if cell["name"] in corrupted:
            text = (folder / "eval.jsonl").read_text()
            (folder / "eval.jsonl").write_text(text[: len(text) // 2])
    return path


def plan_cells(
    mixers: Sequence[str], seeds: Sequence[int], schedules: Sequence[str], prepared: Collection[str] = ()
) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = []

    def add(kind: str, name: str, mixer: str, schedule: str, seed: int, needs: list[int]) -> None:
        described = {"kind": kind, "name": name, "mixer": mixer, "schedule": schedule, "seed": seed, "needs": needs}
        folder = f"cells/{name.replace(':', '-')}"
        command = f"acodm benchmark --out OUT --cell {len(cells)}"
        cells.append({"index": len(cells), **described, "folder": folder, "steps": 40, "command": command})

    for mixer in prepared:
        for seed in seeds:
            add("preparation", f"preparation/{mixer}/seed{seed}", mixer, "cosine", seed, [])
    for schedule in schedules:
        for mixer in mixers:
            for seed in seeds:
                needs = [
                    cell["index"]
                    for cell in cells
                    if cell["seed"] == seed
                    and (
                        (cell["kind"] == "preparation" and cell["mixer"] == mixer)
                        or (cell["mixer"] == mixer.removeprefix("mean-of:") != mixer and cell["schedule"] == schedule)
                    )
                ]
                add("target", f"{schedule}/{mixer}/seed{seed}", mixer, schedule, seed, needs)
    return cells


def write_run(folder: Path, config: Mapping[str, Any], *, gain: float, noise: float, until: int) -> None:
    """Logs of a run: losses fall from 5 nats to about 3 − gain, a little more where the seed is lucky."""
    targets, domains, steps = config["targets"], config["domains"], config["steps"]
    seed = int(config["seed"])
    shared = np.random.default_rng(seed).normal(0, 0.05)
    own = np.random.default_rng([seed, zlib.crc32(config["mixer"].encode())]).normal(0, noise) if noise else 0.0
    final = 3.0 + 0.2 * np.arange(len(targets)) - gain + shared + own  # (M,)

    def losses(step: int) -> list[float]:
        left = (np.exp(-4 * step / steps) - np.exp(-4)) / (1 - np.exp(-4))
        return (final + (5.0 - final) * left).tolist()

    write_json(folder / "config.json", {"config": dict(config), "versions": VERSIONS, "git_commit": COMMIT})
    every = max(1, steps // config["evaluations"])
    evaluated = [step for step in range(until + 1) if step % every == 0 or step == steps]
    write_lines(
        folder / "eval.jsonl", [{"step": step, "losses": losses(step), "targets": targets} for step in evaluated]
    )
    dynamic = config["mixer"] == "odm-released"
    write_lines(folder / "stats.jsonl", [stats_line(step, steps, domains, dynamic) for step in range(1, until + 1)])


def stats_line(step: int, steps: int, domains: Sequence[str], dynamic: bool) -> dict[str, Any]:
    weights = np.ones(len(domains))
    weights[0] += step / steps if dynamic else 0.0
    mixture = (weights / weights.sum()).tolist()
    loss = 3.0 + 2.0 * float(np.exp(-4 * step / steps))
    return {
        "step": step,
        "tokens": step * BATCH * LENGTH,
        "requested": mixture,
        "realised": mixture,
        "losses": [loss if i or step > 1 else None for i in range(len(domains))],  # the first is not drawn at first
        "loss_weights": None,
        "eval_losses": None,
        "epochs": [step / steps] * len(domains),
        "loss": loss,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "mixture_age": 0.0,
        "diverged": False,
        "seconds": 0.1,
        **({"exploration": 1 / step} if dynamic else {}),
    }


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def fake_cost(steps: int, flops_per_token: float, preparation_tokens: int) -> dict[str, dict[str, float]]:
    tokens = steps * BATCH * LENGTH
    none = {"tokens": 0, "flops": 0.0, "seconds": 0.0}
    return {
        "training": {"tokens": tokens, "flops": tokens * flops_per_token, "seconds": 0.1 * steps},
        "measurement": none,
        "preparation": {
            "tokens": preparation_tokens,
            "flops": preparation_tokens * flops_per_token,
            "seconds": float(preparation_tokens > 0),
        },
        "learning": none,
    }


def finish_run(folder: Path, config: Mapping[str, Any], cost: Mapping[str, Any], *, diverged: bool = False) -> None:
    """Write `result.json` from the logs; a diverged run's last step is made to say so."""
    stats = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    evals = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    if diverged:
        stats[-1] |= {"diverged": True, "loss": None}
        evals[-1]["losses"] = [None] * len(config["targets"])
        write_lines(folder / "stats.jsonl", stats)
        write_lines(folder / "eval.jsonl", evals)
    final, weights = np.array(evals[-1]["losses"], dtype=np.float64), np.array(config["objective"])

    def value(number: Any) -> float | None:
        return None if diverged else float(number)

    result = {
        **{name: config[name] for name in ("mixer", "schedule", "seed", "targets", "objective", "domains")},
        "diverged": diverged,
        "mean_loss_nats": value(final @ weights),
        "mean_perplexity": value(np.exp(final) @ weights),
        "worst_domain_loss_nats": value(final[weights > 0].max()),
        "domain_loss_nats": {name: value(loss) for name, loss in zip(config["targets"], final, strict=True)},
        "final_exploration": stats[-1].get("exploration"),
        **({"metric": config["metric"]} if "metric" in config else {}),
        "seconds_per_step": 0.1,
        "cost": cost,
        "files": {name: sha256(folder / name) for name in ("config.json", "stats.jsonl", "eval.jsonl")},
    }
    write_json(folder / "result.json", result)


def fake_transfer(path: Path, mixer: str = "uniform", seed: int = 0, *, gain: float = 0.0, **changes: Any) -> Path:
    """Write the folder of a finished run of `acodm transfer`; `changes` are settings."""
    config = {
        "policy": None,
        "mixer": mixer,
        "weights": None,
        "corpus": "pocket",
        "target": "tiny",
        "steps": 40,
        "batch_size": BATCH,
        "sequence_length": LENGTH,
        "learning_rate": 2e-3,
        "schedule": "cosine",
        "decision_every": None,
        "evaluations": 8,
        "eval_sequences": 8,
        "device": "auto",
        "precision": "auto",
        "seed": seed,
        "domains": [*DOMAINS],
        "corpus_fingerprint": "f" * 64,
        "name": mixer,
        **changes,
    }
    targets = [*(changes.get("targets") or DOMAINS)]
    full = {**config, "targets": targets, "objective": [1 / len(targets)] * len(targets)}
    write_run(path, full, gain=gain, noise=0.01, until=config["steps"])
    finish_run(path, full, fake_cost(config["steps"], 1e6, 0))
    known = ("mixer", "mean_loss_nats", "mean_perplexity", "domain_loss_nats", "seconds_per_step", "diverged", "cost")
    result = json.loads((path / "result.json").read_text())
    kept = {name: result[name] for name in (*known, "final_exploration")}
    plain = {key: value for key, value in config.items() if key != "targets"}
    command = f"acodm transfer --mixer {mixer} --out {path}"
    write_json(path / "config.json", {"config": plain, "command": command, "versions": VERSIONS, "git_commit": COMMIT})
    write_json(path / "result.json", {**kept, "steps_to_reference_ratio": None, "config": plain})
    return path
