"""`acodm evaluate`: perplexity by domain, MMLU, HumanEval and every task of lm-eval, of runs and of other models.

Everything that can be refused is refused before the first forward pass. Each task is saved as it ends; what a folder
holds of the same model under the same settings is not done again.
"""

from collections.abc import Sequence
from pathlib import Path

from acodm_env.errors import unknown
from acodm_env.experiments.console import note, say
from acodm_env.experiments.evaluation.compare import check_settings, compare_all, write_comparison
from acodm_env.experiments.evaluation.config import EvaluateConfig
from acodm_env.experiments.evaluation.job import Job, examine, make_job, measure, outcome
from acodm_env.experiments.evaluation.store import Stored
from acodm_env.experiments.evaluation.subjects import Subject, find_subjects
from acodm_env.experiments.evaluation.table import comparison_text, scores_text


def run(config: EvaluateConfig) -> None:
    """Measure what is missing, print all of it, compare."""
    found = evaluate(config)
    say(scores_text(found))
    if not config.compare:
        return
    compared = compare_all(found, config.reference, config.seed)
    say(comparison_text(compared))
    if config.out is not None:
        file = write_comparison(Path(config.out), compared, config.seed)
        note(f"comparison: {file}")


def evaluate(config: EvaluateConfig) -> dict[str, list[Stored]]:
    """Every model's results of the tasks that are asked for, by the model's name, measured now or before.

    Raises:
        ConfigError, DataError: something does not fit; no model has been run then.
    """
    from acodm_env.experiments.evaluation.harness import run as harness

    subjects = find_subjects(config.runs)
    _check_reference(config, subjects)
    data = None if config.data is None else Path(config.data)
    jobs = [make_job(config, subject) for subject in subjects]
    asked = [name for name in config.task_names if name != "perplexity"]
    new = [name for name in asked if config.fresh or not all(job.results.has_task(name) for job in jobs)]

    def check(names: Sequence[str]) -> None:
        if names:
            allowed = config.allow_code_execution
            harness.check_tasks(names, data, allow_code_execution=allowed, num_fewshot=config.num_fewshot)

    check(new)
    for job in jobs:
        examine(config, job, keep=len(jobs) == 1)
    if config.compare:
        _check_comparable(config, jobs)
    check([name for name in asked if name not in new and any(name in job.pending for job in jobs)])  # of other settings
    if config.num_fewshot and "humaneval" in config.task_names and not config.quiet:
        note(f"humaneval: without solved examples, as published; --num-fewshot {config.num_fewshot} is for the others")
    for job in jobs:
        if len(job.pending) < len(config.task_names) and not config.quiet:
            before = ", ".join(name for name in config.task_names if name not in job.pending)
            note(f"{job.subject.name}: {before}: as measured before; --fresh measures again")
        if job.pending:
            measure(config, job, data)
    return {job.subject.name: outcome(job, config.task_names) for job in jobs}


def _check_reference(config: EvaluateConfig, subjects: Sequence[Subject]) -> None:
    names = [subject.name for subject in subjects]
    if config.reference is not None and config.reference not in names:
        unknown("reference", config.reference, names)


def _check_comparable(config: EvaluateConfig, jobs: Sequence[Job]) -> None:
    """Refuse results that will not compare, before hours go into measuring them."""
    first = next((job for job in jobs if job.subject.name == config.reference), jobs[0])
    for job in jobs:
        for task in config.task_names:
            check_settings((job.subject.name, job.identities[task]), (first.subject.name, first.identities[task]))


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm evaluate, or python -m acodm_env evaluate")
