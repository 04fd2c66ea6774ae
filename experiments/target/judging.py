"""What a target run is judged by: its objective on both splits, on how many sequences, and how it is told."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.corpus.exchangeable import split_differences
from acodm_env.corpus.problem import Problem
from acodm_env.experiments.console import listing, note, say
from acodm_env.experiments.run.results import judged
from acodm_env.objective import describe
from acodm_env.trainer import Trainer

if TYPE_CHECKING:
    from acodm_env.experiments.target.config import TargetConfig

JUDGED = (
    *("targets", "objective", "metric", "objective_nats", "validation_objective_nats", "validation_loss_nats"),
    *("heldout_sequences", "split_differences"),
)
"""Fields of `judge`."""


def say_held_out(config: "TargetConfig", problem: Problem) -> None:
    """Say which targets have fewer held-out sequences than are asked for, and which are left out."""
    if config.quiet:
        return
    for split in ("validation", "test"):
        held = {name: n[split] for name, n in held_out_of(config, problem).items() if n[split] < config.eval_sequences}
        few = ", ".join(f"{name} {number}" for name, number in held.items())
        if few:
            note(f"eval_sequences={config.eval_sequences}: the {split} split holds fewer of {few}")
    if problem.unjudged:
        note(f"{', '.join(problem.unjudged)}: texts that nothing is trained on, not evaluated; --targets names them")


def held_out_of(config: "TargetConfig", problem: Problem) -> dict[str, dict[str, int]]:
    """Held-out sequences that the run is evaluated on, by target and split."""
    return problem.num_heldout(config.sequence_length, config.eval_sequences)


def judge(config: "TargetConfig", problem: Problem, trainer: Trainer, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The objective of a run that has just ended, on both splits, and how far those are apart.

    Args:
        config: of the run.
        problem: likewise.
        trainer: with the trained model.
        fields: `mixer_result` of the run.
    """
    info, test = trainer.info, fields["domain_loss_nats"]
    validation = None if fields["diverged"] else trainer.evaluate("validation")
    apart: list[str] = []
    if validation is not None:
        known = [math.nan if test[name] is None else test[name] for name in info.targets]
        apart = split_differences(info.targets, validation.tolist(), known)
    for sentence in apart:
        note(sentence)
    weights = {"targets": list(info.targets), "objective": info.objective_weights.tolist()}
    splits = {"heldout_sequences": held_out_of(config, problem), "split_differences": apart}
    return weights | judged(info, test, validation) | splits


def tell(out: str, result: Mapping[str, Any]) -> None:
    """Print a result and where it lies.

    Args:
        out: folder of the run.
        result: its `result.json`.
    """
    untold = ("config", "domain_loss_nats", "gate", "policy", "learning", "accounting", "cost", "certificate", *JUDGED)
    told = ("objective_nats", "validation_objective_nats")
    about = [(name, value) for name, value in result.items() if name not in untold or name in told]
    weights = dict(zip(result.get("targets", ()), result.get("objective", ()), strict=True))
    if weights:
        about.insert(1, ("objective", describe(result["metric"], {} if _alike(weights) else weights)))
    say(listing(about))
    validation = result.get("validation_loss_nats", {})
    losses = ((name, loss, validation.get(name)) for name, loss in result["domain_loss_nats"].items())
    say(listing((f"  {name}", _nats(loss, other)) for name, loss, other in losses))
    left = [f"{name}/" for name in ("policy", "model") if (Path(out) / name).exists()]
    say(f"run: {out} ({', '.join(('result.json', 'stats.jsonl', 'eval.jsonl', *left))})")


def _alike(weights: Mapping[str, float]) -> bool:
    return len(weights) > 1 and max(weights.values()) - min(weights.values()) < 1e-9


def _nats(test: float | None, validation: float | None) -> str:
    if test is None:
        return "diverged"
    return f"{test:.4f} nats" + ("" if validation is None else f", validation {validation:.4f}")
