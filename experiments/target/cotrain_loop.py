"""The loop of a co-trained run: where it begins, what is logged, when it is saved.

As in `runs`, a step is logged, then evaluated if it is time; it is saved at decisions, or wherever SIGTERM came.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.experiments.console import note, progress
from acodm_env.experiments.run.checkpoints import Checkpoints
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.experiments.run.loop import append, find, log_evaluation, nonfinite, say_resumed, stats_record, world_of
from acodm_env.experiments.run.preemption import Preempted
from acodm_env.experiments.target.recorded import Asked, Recorded
from acodm_env.step_stats import StepStats

if TYPE_CHECKING:
    from acodm_env.agents.cotraining import Cotrainer


def run_cotrainer(
    folder: RunFolder,
    learner: "Cotrainer",
    target: Recorded,
    checkpoints: Checkpoints,
    *,
    evaluations: int,
    save_every: int | None,
    quiet: bool,
) -> None:
    """Take the decisions that are left, from the newest whole checkpoint if there is one.

    Args:
        folder: of the run.
        learner: agent and environment, not yet started.
        target: what the environment trains.
        checkpoints: of the run.
        evaluations: on the test split, evenly spaced, at the start and at the end.
        save_every: optimiser steps between checkpoints, which are taken at the decision that follows; None is a tenth.
        quiet: no progress bar.

    Raises:
        DataError: no checkpoint is whole, or it is another run's; no space is left, and which checkpoint stays.
        Preempted: it was asked to end; the run is saved.
    """
    horizon = target.info.horizon
    save_every = save_every or max(1, horizon // 10)
    _begin(folder, learner, target, checkpoints)

    def save() -> Path:
        folder.sync()
        return checkpoints.write(target.steps_done, learner.state_dict(), folder.config, world_of(target))

    with progress(horizon, str(folder.config["name"]), quiet=quiet) as bar:
        target.on_step = _logger(folder, learner, target, checkpoints, max(1, horizon // evaluations), bar)
        target.restart_clock()
        while not learner.ended:
            before = target.steps_done // save_every
            try:
                shown = learner.decide()
            except Asked:
                raise Preempted(f"after step {target.steps_done} of {horizon}", save()) from None
            bar.set_postfix_str(f"reward {shown['reward']:+.2f}", refresh=False)
            ended: bool = learner.ended
            if (ended and not learner.diverged) or (not ended and target.steps_done // save_every > before):
                with target.aside():
                    save()


def _begin(folder: RunFolder, learner: "Cotrainer", target: Recorded, checkpoints: Checkpoints) -> None:
    """Start the run, or put everything where the newest whole checkpoint has it."""
    found, _ = find(folder, checkpoints, target.info.horizon)
    if found is None:
        learner.start()
    else:
        learner.load_state_dict(found.state)
        say_resumed(found, target)
    folder.rewind(target.steps_done)
    if not folder.lines("eval.jsonl"):
        log_evaluation(folder, checkpoints, target, 0)


def _logger(
    folder: RunFolder,
    learner: "Cotrainer",
    target: Recorded,
    checkpoints: Checkpoints,
    evaluate_every: int,
    bar: Any,
) -> Callable[[StepStats, float, float], None]:
    """What is done after every optimiser step: a line with what the decision before showed, an evaluation, progress."""

    def on_step(stats: StepStats, seconds: float, deciding: float) -> None:
        record = stats_record(stats, seconds + deciding) | {"seconds_decision": deciding} | learner.shown
        append(folder, checkpoints, "stats.jsonl", record | target.hand.diagnostics())
        if stats.skipped or stats.diverged:
            note(nonfinite(stats, target.info.domains, checkpoints))
        if stats.step == target.info.horizon or stats.diverged or stats.step % evaluate_every == 0:
            log_evaluation(folder, checkpoints, target, stats.step)
        bar.update(stats.step - bar.n)

    return on_step
