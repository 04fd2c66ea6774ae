"""`acodm evaluate`: perplexity by domain, MMLU, HumanEval and every task of lm-eval, of runs and of other models.

Everything that can be refused is refused before the first forward pass. Each task is saved as it ends; what a folder
holds of the same model under the same settings is not done again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from acodm_env.errors import ConfigError, unknown
from acodm_env.experiments.console import note, say
from acodm_env.experiments.evaluation_compare import check_settings, compare_all, write_comparison
from acodm_env.experiments.evaluation_folder import Stored
from acodm_env.experiments.evaluation_job import Job, examine, make_job, measure, outcome
from acodm_env.experiments.evaluation_subjects import Subject, find_subjects
from acodm_env.experiments.evaluation_table import comparison_text, scores_text

WITHOUT_EXAMPLES = {"perplexity", "humaneval"}
"""Tasks that never have solved examples before what is asked."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure perplexity by domain, MMLU, HumanEval and other tasks of models, and compare models on equal items.

    Usage: acodm evaluate RUN|MODEL-FOLDER [… --compare], the folders named one after the other.
    """

    runs: list[str] = field(default_factory=list)
    """Runs of acodm transfer or cotrain, or folders of models as transformers saves them; named without a flag:
    acodm evaluate A B."""
    tasks: str = "perplexity"
    """Names separated by commas: perplexity (on the corpus's test split), mmlu, humaneval, or any task of lm-eval,
    which all but the first need: pip install 'acodm[eval]'."""
    corpus: str | None = None
    """Corpus for the perplexity: folder of a token store, or "pocket"; default: the run's own."""
    domains: str | None = None
    """The domains of the corpus to score, separated by commas; default: the run's, or with --corpus all."""
    num_fewshot: int | None = None
    """Solved examples before each question; default: the task's own number, 0 for mmlu. Not for humaneval."""
    limit: int | None = None
    """First documents per domain, and first items per task or subject, that are scored; default: all."""
    batch_size: str = "auto"
    """Rows per forward pass, or auto: as many as fit."""
    context: int | None = None
    """Tokens that the model sees at most; default: as many as it was made for."""
    stride: int | None = None
    """Tokens by which the perplexity's window moves on; default: half the context, so that a token sees at least so
    many others before it, but for those at a domain's beginning."""
    data: str | None = None
    """Folder with mmlu_dev.jsonl.gz, mmlu_test.jsonl.gz and HumanEval.jsonl.gz, instead of the hub's data sets."""
    allow_code_execution: bool = False
    """Run the programs that the model writes for humaneval, each in a process of its own with limits on time, memory
    and files."""
    compare: bool = False
    """Compare the models in pairs on equal items, by a bootstrap over them."""
    reference: str | None = None
    """Name of the model that the others are compared to, as the tables print it; default: the first."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """auto (bf16 where a CUDA device has it), fp32 or bf16."""
    out: str | None = None
    """Of one model: folder for evaluation.json and evaluation/, default the model's or run's own. With --compare:
    folder for comparison.json, default none."""
    fresh: bool = False
    """Measure again what was measured before."""
    seed: int = 0
    """Seed of the comparison's bootstrap."""
    quiet: bool = False
    """No progress bar and no remarks."""

    def __post_init__(self) -> None:
        for name in ("limit", "context", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        for name in ("num_fewshot", "seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name}={value}: must be 0 or more")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise ConfigError(f"batch_size={self.batch_size}: must be auto, or a number of rows from 1 on")
        if not self.task_names:
            raise ConfigError("tasks=: must name at least one; perplexity, mmlu, humaneval, or a task of lm-eval")
        if self.num_fewshot and not set(self.task_names) - WITHOUT_EXAMPLES:
            raise ConfigError(
                f"num_fewshot={self.num_fewshot}: must be 0 for {' and '.join(self.task_names)}; solved examples go "
                f"before questions, as mmlu's; leave it out"
            )
        for run in self.runs:
            if "," in run and not Path(run).exists():
                raise ConfigError(
                    f"runs={run}: must be one folder each; commas do not separate them; acodm evaluate "
                    f"{' '.join(run.split(','))}"
                )
        if self.compare and len(self.runs) < 2:
            raise ConfigError(f"compare=True: must have at least two models; there {_count(self.runs)} in runs")
        if self.reference is not None and not self.compare:
            raise ConfigError(f"reference={self.reference}: must go with --compare; nothing is compared without it")
        if self.out is not None and len(self.runs) > 1 and not self.compare:
            raise ConfigError(
                f"out={self.out}: must be for one model, or for a comparison (--compare); each model's results go to "
                f"its own folder"
            )

    @property
    def task_names(self) -> list[str]:
        """The tasks, each once."""
        return list(dict.fromkeys(name.strip() for name in self.tasks.split(",") if name.strip()))

    @property
    def rows(self) -> int | None:
        """Rows per forward pass; None for as many as fit."""
        return None if self.batch_size == "auto" else int(self.batch_size)


def _count(runs: Sequence[str]) -> str:
    return "is 1" if len(runs) == 1 else f"are {len(runs)}"


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
    from acodm_env.evaluation import harness

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
    from acodm_env.experiments.cli import main

    main(command="evaluate")
