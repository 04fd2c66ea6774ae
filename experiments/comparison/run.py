"""One target run as its folder records it, in whatever state it is: nothing here fails on what is missing or broken."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.errors import DataError
from acodm_env.files import read_json, sha256
from acodm_env.run_log import EvaluationLine, StepLine, array, read_log
from acodm_env.step_stats import Array

COSTS = ("training", "measurement", "preparation", "learning")
UNITS = ("tokens", "flops", "seconds")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One target run: a mixer, a learning-rate schedule, a seed."""

    mixer: str
    schedule: str
    seed: int
    folder: Path
    command: str = ""
    """What the user types to run it, or to go on with it."""
    status: str
    """"finished", "diverged", "failed" (crashed, or its files are not what it wrote), "unfinished" or "missing"."""
    message: str = ""
    """Why it failed or is not there, in words; "" where there is nothing to say."""
    result: dict[str, Any] | None = None
    """Its `result.json`; None unless finished or diverged."""
    config: dict[str, Any] = field(default_factory=dict)
    """Its settings; {} where they cannot be read."""
    steps: Array
    """(E,) optimiser steps at its evaluations."""
    losses: Array
    """(E, M) test losses, nats; NaN where not finite."""

    @property
    def ended(self) -> bool:
        """Whether it has a result, be it that it diverged."""
        return self.result is not None

    def perplexity(self, objective: Array) -> Array:
        """(E,) mean test perplexity Σ_j o_j·exp(L_j) over the targets of positive weight o_j; NaN where one is."""
        used = objective > 0
        with np.errstate(over="ignore"):  # infinite above 709 nats
            perplexity: Array = np.exp(self.losses[:, used]) @ objective[used]
        return perplexity

    def mean_loss(self, objective: Array) -> Array:
        """(E,) mean test loss Σ_j o_j·L_j over the targets of positive weight, nats."""
        used = objective > 0
        loss: Array = self.losses[:, used] @ objective[used]
        return loss

    def steps_taken(self) -> list[StepLine]:
        """The lines of its `stats.jsonl`, read now.

        Raises:
            DataError: one is damaged; says which.
        """
        return read_log(self.folder, StepLine)


def read_run(folder: Path, *, mixer: str, schedule: str, seed: int, command: str, targets: Sequence[str]) -> Run:
    """A run's folder, whatever state it is in."""
    record = read_record(folder, [])
    status, message, result, damaged = "missing", "", None, ""
    try:
        steps, losses = _curve(folder, len(targets))
    except DataError as error:
        (steps, losses), damaged = (np.empty(0), np.empty((0, len(targets)))), str(error)
    if damaged:
        status, message = "failed", damaged
    elif (folder / "result.json").exists():
        result, message = _result(folder)
        status = "failed" if result is None else "finished"
        if result is not None and (result["diverged"] or result["mean_loss_nats"] is None):
            status, message = "diverged", f"at step {steps[-1]:.0f}" if len(steps) else ""
        if result is not None and (not len(steps) or result["domain_loss_nats"].keys() != {*targets}):
            status, message, result = "failed", "its evaluations are not those of its result; run it again", None
    elif (folder / "failed.json").exists():
        status, message = "failed", read_failure(folder)
    elif (folder / "config.json").exists():
        status = "unfinished"
        message = f"evaluated up to step {steps[-1]:.0f}" if len(steps) else "not evaluated yet"
    return Run(
        mixer=mixer,
        schedule=schedule,
        seed=seed,
        folder=folder,
        command=command,
        status=status,
        message=message,
        result=result,
        config=record.get("config", {}),
        steps=steps,
        losses=losses,
    )


def _result(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """`result.json`, or None and why it is not to be trusted."""
    try:
        result = read_json(folder / "result.json")
        for name, checksum in result.get("files", {}).items():
            if not (folder / name).exists() or sha256(folder / name) != checksum:
                return None, f"{name} was edited or cut short since the run finished; run it again"
        losses = {name: None if loss is None else float(loss) for name, loss in result["domain_loss_nats"].items()}
        known = {name: result[name] for name in ("mean_loss_nats", "mean_perplexity")}
        bad = [name for name, value in (known | losses).items() if not (value is None or np.isfinite(value))]
        diverged = bool(result["diverged"])
        float(result["seconds_per_step"])
        if cost := result.get("cost"):
            all(float(cost[kind][unit]) >= 0 for kind in COSTS for unit in UNITS)
    except (DataError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        return None, f"result.json is not whole ({type(error).__name__}: {error}); run it again"
    if bad:
        return None, f"result.json has numbers that are not finite ({', '.join(bad)}); run it again"
    finite = [loss for loss in losses.values() if loss is not None]
    worst = None if diverged or not finite else max(finite)  # of equal weights, as plain runs have them
    perplexity = known["mean_perplexity"]
    objective = known["mean_loss_nats"]  # of results that do not say it: benchmarks had no other objective
    if result.get("metric") == "perplexity":
        objective = None if perplexity is None else float(np.log(perplexity))
    return {"worst_domain_loss_nats": worst, "objective_nats": objective, **result}, ""


def read_failure(folder: Path) -> str:
    """Why the cell in `folder` failed, as its `failed.json` says."""
    try:
        record = read_json(folder / "failed.json")
        return f"{record['error']} (log: {folder / record['log']})" if record.get("log") else str(record["error"])
    except (DataError, OSError, KeyError, TypeError, AttributeError):
        return "failed.json is not whole; run it again"


def _curve(folder: Path, num_targets: int) -> tuple[Array, Array]:
    """Steps (E,) and test losses (E, M) of the evaluations, up to one of other targets.

    Raises:
        DataError: a line is damaged; says which.
    """
    own = list(takewhile(lambda line: len(line.losses) == num_targets, read_log(folder, EvaluationLine)))
    losses = array([line.losses for line in own]).reshape(len(own), num_targets)
    return np.array([line.step for line in own], dtype=np.float64), losses


def read_record(folder: Path, problems: list[str]) -> dict[str, Any]:
    """`config.json` of a run or a benchmark; {} and a problem if it cannot be read."""
    try:
        record = read_json(folder / "config.json")
        if isinstance(record, dict) and isinstance(record.get("config"), dict):
            return record
        problems.append(f"{folder / 'config.json'}: is not the record of a run")
    except (DataError, OSError) as error:
        problems.append(str(error))
    return {}
