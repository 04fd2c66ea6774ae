"""HumanEval: the programs that a model wrote, run in the sandbox against their tests (Chen et al. 2021, pass@1)."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from acodm_env.errors import ConfigError
from acodm_env.experiments.evaluation.chance import accuracy
from acodm_env.experiments.evaluation.scores import Metric

HARNESS_MAX_GEN_TOKS = 1024
"""Tokens that the harness lets a completion have; ours are at most half of the context."""
_MOST_WORKERS = 8


def refusal() -> ConfigError:
    """The error for HumanEval without leave to execute code: says what would happen, and which flag allows it."""
    return ConfigError(
        "allow_code_execution=False: must be True for humaneval; it runs programs that the model wrote, each in a "
        "process of its own with limits on time, memory and files, without network where the system can take it away, "
        "in an empty folder; add --allow-code-execution, in a container if the model is not yours, or leave humaneval "
        "out"
    )


def program(prompt: str, completion: str, tests: str) -> str:
    """What is executed: exactly what the harness and code_eval build, `tests` being the problem's and the call."""
    return prompt + completion + "\n" + tests


def scored(
    samples: Sequence[dict[str, Any]], on_progress: Callable[[int, int], None]
) -> tuple[list[Metric], list[dict[str, Any]], dict[str, Any]]:
    """Run every completion and score it.

    Args:
        samples: the harness's, with prompt ("doc"), completion ("resps") and tests ("target").
        on_progress: told programs done, and in all.

    Returns:
        The metric pass@1, an item per problem, and facts about the sandbox.
    """
    from acodm_env.experiments.evaluation.sandbox.execute import Limits, protections, run_programs

    limits = Limits()
    completions = [str(sample["resps"][0][0]) for sample in samples]
    programs = [
        program(sample["doc"]["prompt"], completion, str(sample["target"]))
        for sample, completion in zip(samples, completions, strict=True)
    ]
    done = 0

    def on_done(*_: object) -> None:
        nonlocal done
        done += 1
        on_progress(done, len(programs))

    outcomes = run_programs(programs, limits, _workers(), on_done)
    items = [
        {
            "id": sample["doc"]["task_id"],
            "group": "",
            "pass@1": float(outcome.passed),
            "reason": outcome.reason,
            "completion": completion,
        }
        for sample, completion, outcome in zip(samples, completions, outcomes, strict=True)
    ]
    metric = accuracy([item["pass@1"] for item in items], task="humaneval", name="pass@1", chance=0.0)
    facts = {
        "sandbox": protections(),
        "sandbox_seconds": limits.seconds,
        "sandbox_memory_bytes": limits.memory_bytes,
        "harness_max_gen_toks": HARNESS_MAX_GEN_TOKS,
    }
    return [metric], items, facts


def _workers() -> int:
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
