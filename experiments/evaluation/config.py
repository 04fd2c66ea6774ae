"""What `acodm evaluate` is told."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from acodm_env.config import split_names
from acodm_env.errors import ConfigError

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
        return list(dict.fromkeys(split_names(self.tasks)))

    @property
    def rows(self) -> int | None:
        """Rows per forward pass; None for as many as fit."""
        return None if self.batch_size == "auto" else int(self.batch_size)


def _count(runs: Sequence[str]) -> str:
    return "is 1" if len(runs) == 1 else f"are {len(runs)}"
