"""What a run cost: tokens and model FLOPs of training and measuring, seconds by purpose, rates, MFU, peak memory.

Seconds are summed over the lines of `stats.jsonl` and `eval.jsonl`, so an interrupted run that was resumed counts the
steps that it kept; what was done twice is not in it. Rates are of the same lines: a run that went on with other domains
has only those since then. Runs that were logged before seconds were told apart have null where nothing was recorded.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from acodm_env.corpus import TokenStore
from acodm_env.errors import AcodmError
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.policy.mixer import PolicyMixer
from acodm_env.run_log import EvaluationLine, StepLine
from acodm_env.trainer import Mixer, RunInfo
from acodm_env.wrapper import innermost

PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("GH200", 989.4e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756.5e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("L40S", 362.05e12),
    ("L40", 181.05e12),
    ("L4", 121e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI300X", 1307.4e12),
)
"""Part of a device's name, most specific first, and its dense bf16 peak in FLOP/s with float32 accumulation.

Sources: NVIDIA's data sheets of each card (which print the sparse figure, twice this one, from Hopper on), its Ampere
GA102 and Ada whitepapers for the two GeForce cards, AMD's data sheet of the MI300X.
"""
PARTS = ("data", "train", "probe", "decision")
"""Purposes that the seconds of every step are told apart by, as `seconds_PART` in `stats.jsonl`; "validation" comes to
those after which the mixer asked for held-out losses."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, None if its name is not in the table."""
    words = f" {device_name.replace('-', ' ')} "
    return next((peak for name, peak in PEAK_FLOPS if f" {name} " in words), None)


def utilisation(
    flops_per_second: float, device_name: str, precision: str, devices: int = 1
) -> tuple[float | None, str]:
    """Model FLOPs utilisation, and why it is not known where it is None.

    Args:
        flops_per_second: model FLOPs of all devices together.
        device_name: torch's name of the device, or "cpu".
        precision: "bf16" or "fp32".
        devices: how many of them.
    """
    if device_name == "cpu":
        return None, "no peak is known for a CPU"
    if precision != "bf16":
        return None, f"the peaks are bf16's, the run's precision is {precision}"
    peak = peak_flops(device_name)
    if peak is None:
        return None, f"no peak is known for {device_name}"
    return flops_per_second / (peak * devices), ""


def peak_memory_bytes(device: Any) -> int | None:
    """The most memory that this process has held: allocated on a CUDA device, resident on a CPU; None if unknown.

    A CPU's figure has Python and its libraries in it, a few hundred MB.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")  # getrusage's maximum would be inherited from the process that started this one
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def cost(
    steps: Sequence[StepLine],
    evaluations: Sequence[EvaluationLine],
    *,
    flops_per_token: float,
    device_name: str = "cpu",
    precision: str = "fp32",
    devices: int = 1,
    memory: int | None = None,
    eval_tokens: int = 0,
) -> dict[str, Any]:
    """The field `accounting` of a run's `result.json`.

    Args:
        steps: one per optimiser step, each of as many tokens.
        evaluations: of the run.
        flops_per_token: model FLOPs of training on one token, 6N and attention (`RunInfo.flops_per_token`).
        device_name: torch's name of the device, or "cpu".
        precision: "bf16" or "fp32".
        devices: processes with a device each.
        memory: peak in bytes, of one device.
        eval_tokens: held-out tokens of a whole evaluation, which measurements are charged that do not say theirs.
    """
    tokens = steps[-1].tokens if steps else 0
    logged = tokens / steps[-1].step * len(steps) if steps else 0.0
    seconds = {part: _sum([line.seconds_by_part.get(part) for line in steps]) for part in PARTS}
    seconds["validation"] = float(sum(line.seconds_by_part.get("validation", 0.0) for line in steps))
    taken = _sum([line.seconds for line in steps])
    overhead = [value for part, value in seconds.items() if part != "train"]
    known = seconds["train"] and None not in overhead
    mfu, reason = None, "no time was logged"
    if taken:
        mfu, reason = utilisation(logged * flops_per_token / taken, device_name, precision, devices)
    measured = sum(line.measured_tokens(eval_tokens) for line in steps)
    return {
        "tokens": tokens,
        "flops": tokens * flops_per_token,
        "measurement_tokens": measured,
        "measurement_flops": measured * flops_per_token / 3,
        "measurement_frac": measured / 3 / logged if logged else None,
        "seconds": {**seconds, "evaluation": _sum([line.seconds for line in evaluations])},
        "tokens_per_second": logged / taken if taken else None,
        "overhead_frac": sum(overhead) / seconds["train"] if known else None,  # type: ignore[arg-type, operator]
        "mfu": mfu,
        "mfu_unknown": reason or None,
        "peak_memory_bytes": memory,
        "device": device_name,
        "devices": devices,
        "precision": precision,
    }


def _sum(values: Sequence[float | None]) -> float | None:
    """None unless every line has the number."""
    return float(sum(values)) if values and None not in values else None  # type: ignore[arg-type]


def measuring_frac(mixer: Mixer, info: RunInfo) -> float:
    """FLOPs of what a mixer will have measured in a run, over those of its training: forward passes, a third each.

    Args:
        mixer: started.
        info: the run.
    """
    if "validation" not in mixer.needs:
        return 0.0
    counts = mixer.probe_sequences
    each = info.eval_tokens if counts is None else sum(info.probe_counts(counts)) * info.sequence_length
    times = sum(mixer.due(step) for step in range(1, info.horizon + 1))
    return each * times / 3 / (info.horizon * info.batch_size * info.sequence_length)


def run_cost(folder: RunFolder, trainer: Any) -> dict[str, Any]:
    """The field `accounting` of the run in `folder`, by the process that has just finished it.

    Args:
        folder: the run.
        trainer: what trained it, be it behind a lag or over several processes. Where it is no language model's,
            nothing is known of device and memory.
    """
    trainer = innermost(trainer)
    device = getattr(trainer, "device", None)
    described = {} if device is None else describe(device, getattr(trainer, "bf16", False))
    return cost(
        folder.steps,
        folder.evaluations,
        flops_per_token=trainer.info.flops_per_token,
        devices=getattr(getattr(trainer, "ranks", None), "world", 1),
        memory=None if device is None else peak_memory_bytes(device),
        eval_tokens=trainer.info.eval_tokens,
        **described,
    )


def describe(device: Any, bf16: bool) -> dict[str, str]:
    """Name and precision of a torch device, as `cost` wants them."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device_name": name, "precision": "bf16" if bf16 else "fp32"}


def one_cost(tokens: float = 0, flops: float = 0.0, seconds: float = 0.0) -> dict[str, float]:
    """A part of the field `cost` of `result.json`: training, measurement, preparation or learning."""
    return {"tokens": tokens, "flops": flops, "seconds": seconds}


def total_cost(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum of parts."""
    parts = list(parts)
    return {unit: sum(part[unit] for part in parts) for unit in ("tokens", "flops", "seconds")}


def running_cost(
    folder: RunFolder, info: RunInfo, *, excess: bool = False, evaluations: int = 0
) -> dict[str, dict[str, float]]:
    """What a run cost: training, and what its mixer had measured beyond it (forward passes, a third of training each).

    Seconds are those of the steps, measurements included; the Gram matrix counts in seconds only.

    Args:
        folder: of the run.
        info: likewise.
        excess: whether a reference model was evaluated on every batch.
        evaluations: whole ones that the mixer was given besides.
    """
    lines = folder.steps
    tokens = len(lines) * info.batch_size * info.sequence_length
    measured = evaluations * info.eval_tokens + sum(line.measured_tokens(info.eval_tokens) for line in lines)
    measured += tokens if excess else 0
    return {
        "training": one_cost(tokens, tokens * info.flops_per_token, sum(line.seconds for line in lines)),
        "measurement": one_cost(measured, measured * info.flops_per_token / 3),
    }


def learning_cost(mixer: Mixer, store: TokenStore) -> dict[str, float]:
    """What learning a policy cost, as it records; an untrained one cost nothing."""
    if not isinstance(mixer, PolicyMixer) or mixer.policy.provenance.get("checkpoint") == "untrained":
        return one_cost()
    record = mixer.policy.provenance
    tokens, flops = record.get("learning_tokens", 0), record.get("learning_flops")
    if flops is None:  # of a policy that was exported before that was recorded
        flops = tokens * _proxy_flops(record.get("config", {}), store)
    return one_cost(tokens, flops, record.get("learning_seconds", 0.0))


def _proxy_flops(config: Mapping[str, Any], store: TokenStore) -> float:
    """Model FLOPs per token of the proxy that a policy was learned on; 0 where that is not known any more."""
    if config.get("surrogate") or not {"proxy", "sequence_length"} <= config.keys():
        return 0.0
    from acodm_env.pretrain.models import flops_per_token_of

    try:
        return flops_per_token_of(config["proxy"], store.vocab_size, config["sequence_length"])
    except AcodmError:  # its configuration is not here
        return 0.0
