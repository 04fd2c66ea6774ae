"""Downstream tasks through EleutherAI's lm-eval: checked first, then asked one by one, each with its chance level.

The harness asks (prompts, shots, stop strings, which answer is the likeliest); what is made of the answers is ours:
intervals, chance levels and a record per item. `limit` is the harness's: so many items of each subtask. Nothing that it
draws or seeds is left behind in the global generators.
"""

import importlib.metadata
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from acodm_env.errors import ConfigError
from acodm_env.experiments.evaluation.harness import humaneval
from acodm_env.experiments.evaluation.harness import task_names as harness_tasks
from acodm_env.experiments.evaluation.harness.local_data import PUBLISHED, file_checksums, read_humaneval
from acodm_env.experiments.evaluation.harness.samples import summarised
from acodm_env.experiments.evaluation.scores import TaskScores

if TYPE_CHECKING:
    import torch

    from acodm_env.experiments.evaluation.loading import LoadedModel

OnProgress = Callable[[str, int, int], None]
"""Called with the task, items or prompts done, and those in all."""
_SEED = 1234  # the harness's own for few-shot examples


def harness_version() -> str | None:
    """Version of the installed lm-eval; None if there is none."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_tasks(
    names: Sequence[str], data: Path | None, *, allow_code_execution: bool, num_fewshot: int | None = None
) -> None:
    """Refuse, before a model is loaded, whatever can be refused.

    Args:
        names: tasks besides perplexity.
        data: folder of local files for mmlu and humaneval; None: the hub, or its cache.
        allow_code_execution: whether the user allows generated code to run.
        num_fewshot: examples shown before a question; None: the task's own number.

    Raises:
        ConfigError: an unknown task (with suggestions), lm-eval is not installed, code execution is not allowed.
        DataError: data that are neither local nor reachable, or a damaged file (file and line are named).
    """
    for name in names:
        harness_tasks.require_harness(name)
        if name == "humaneval" and not allow_code_execution:
            raise humaneval.refusal()
        if not harness_tasks.is_local(name, data):
            harness_tasks.check_hub_task(name)
        elif name == "humaneval" and data is not None:
            read_humaneval(data)
        elif data is not None:
            _check_local_mmlu(name, data, num_fewshot)


def _check_local_mmlu(name: str, data: Path, num_fewshot: int | None) -> None:
    """Questions of each subject, and enough examples."""
    dev = harness_tasks.mmlu_of(data).dev
    fewest = min(len(dev[subject]) for subject in harness_tasks.local_subjects(name, data))
    if num_fewshot is not None and not 0 <= num_fewshot <= fewest:
        raise ConfigError(
            f"num_fewshot={num_fewshot}: must be 0 to {fewest} for {name}; its dev file has no more questions of each "
            f"subject; use 0 or 5, as published results do"
        )


def data_checksums(name: str, data: Path | None) -> dict[str, str]:
    """What a task's questions come from: sha256 by file name, or "hub" by data set.

    Raises:
        DataError: a local file is missing.
    """
    if data is not None and harness_tasks.is_local(name, data):
        return file_checksums(data, name)
    return dict.fromkeys(sorted(harness_tasks.datasets_of(name)), "hub")


def run_tasks(
    loaded: "LoadedModel",
    names: Sequence[str],
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int | None,
    data: Path | None,
    allow_code_execution: bool,
    on_note: Callable[[str], None],
    on_progress: OnProgress = lambda task, done, total: None,
) -> Iterator[TaskScores]:
    """Score a model on tasks, one at a time, so that each can be saved before the next.

    Args:
        loaded: the model.
        names: tasks besides perplexity.
        num_fewshot: examples shown before a question; None: the task's own number. Tasks that fix theirs keep it.
        limit: items of each subtask, from the first; None: all.
        batch_size: rows per forward pass; None: as many as the memory holds.
        data: see `check_tasks`.
        allow_code_execution: see `check_tasks`.
        on_note: told what a reader of the numbers must know, in a sentence.
        on_progress: told how far a task is, after every batch.

    Returns:
        An iterator; the checks are done when this returns, the work as it is read.

    Raises:
        ConfigError: see `check_tasks`; a limit below 1.
        DataError: see `check_tasks`.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: must be at least 1 item; leave it out for all")
    check_tasks(names, data, allow_code_execution=allow_code_execution, num_fewshot=num_fewshot)
    run = partial(_run_task, loaded, num_fewshot=num_fewshot, limit=limit, batch_size=batch_size, data=data)
    return (run(name, on_note=on_note, on_progress=on_progress) for name in names)


def _run_task(
    loaded: "LoadedModel",
    name: str,
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int | None,
    data: Path | None,
    on_note: Callable[[str], None],
    on_progress: OnProgress,
) -> TaskScores:
    from acodm_env.experiments.evaluation.harness.model import HarnessModel, cut

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="acodm-harness-") as scratch, _quiet(), _seeded(loaded.device):
        model = HarnessModel(loaded, batch_size=batch_size, on_rows=partial(on_progress, name))
        tasks = harness_tasks.load_tasks(name, data, Path(scratch))
        results = _evaluate(model, tasks, num_fewshot, limit)
    samples = [sample for found in results["samples"].values() for sample in found]
    facts: dict[str, Any] = {
        "num_fewshot": _shots(results),
        "limit": limit,
        "num_truncated": cut(model, samples),
        "context": loaded.context,
        "prompt_tokens": loaded.context - model.longest_completion,
        "dataset": data_checksums(name, data),
        "max_gen_toks": model.longest_completion or None,
        "harness_version": harness_version(),
    }
    if name == "humaneval":
        metrics, items, more = humaneval.scored(samples, partial(on_progress, "humaneval programs"))
    else:
        metrics, items = summarised(name, results, loaded.path)
        more = {}
    facts |= more | _counts(name, data) | {"num_items": len(items)}
    _tell(name, facts, on_note)
    facts["seconds"] = round(time.monotonic() - started, 3)
    return TaskScores(task=name, metrics=metrics, items=items, facts=facts)


def _evaluate(model: Any, tasks: dict[str, Any], num_fewshot: int | None, limit: int | None) -> dict[str, Any]:
    """`simple_evaluate` less what it does besides: seeding global generators, and seconds of asking for the system."""
    from lm_eval.evaluator import evaluate

    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot") if hasattr(task, "get_config") else None
        if own != 0:  # a task that fixes 0 keeps it, as in the harness
            wanted = (own or 0) if num_fewshot is None else num_fewshot
            _check_examples(task, wanted)
            task.set_config(key="num_fewshot", value=wanted)
        task.set_fewshot_seed(seed=_SEED)
    results: dict[str, Any] = evaluate(lm=model, task_dict=tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    return results


def _check_examples(task: Any, wanted: int) -> None:
    examples = getattr(getattr(task, "sampler", None), "df", None)
    if examples is not None and wanted > len(examples):
        raise ConfigError(
            f"num_fewshot={wanted}: must be at most {len(examples)} for {task.task_name}; there are no more examples; "
            f"use fewer"
        )


def _shots(results: dict[str, Any]) -> int | dict[str, int] | None:
    """Examples shown before each question: one number, or one a subtask where they differ."""
    shots = {leaf: results["n-shot"].get(leaf) for leaf in results["samples"]}
    return next(iter(shots.values())) if len(set(shots.values())) == 1 else shots


def _counts(name: str, data: Path | None) -> dict[str, Any]:
    """How much of the published questions the local files hold."""
    if data is None or not harness_tasks.is_local(name, data):
        return {}
    counts = (read_humaneval(data) if name == "humaneval" else harness_tasks.mmlu_of(data)).counts
    return {"data": counts, "complete": counts == PUBLISHED["humaneval" if name == "humaneval" else "mmlu"]}


def _tell(name: str, facts: dict[str, Any], on_note: Callable[[str], None]) -> None:
    """Say what must be known to read the numbers."""
    if facts["num_truncated"]:
        room, context = facts["prompt_tokens"], facts["context"]
        limit = (
            f"exceed the context of {context:,} tokens"
            if room == context
            else f"are longer than the {room:,} tokens that the context of {context:,} leaves beside a completion"
        )
        on_note(
            f"{name}: {facts['num_truncated']:,} of {facts['num_items']:,} prompts {limit}; their beginnings were cut, "
            f"as the harness does"
        )
    if not facts.get("complete", True):
        words = ", ".join(f"{number:,} {what}" for what, number in facts["data"].items())
        on_note(f"{name}: the local files hold {words}, which is not the published number")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no log lines of the harness and of datasets: progress is told by callbacks.

    Nor the tokenizer's warning of long prompts, which are counted and cut.
    """
    import lm_eval.api.task
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("lm_eval")
    level, shown = logger.level, not are_progress_bars_disabled()
    tokenizers = logging.getLogger("transformers.tokenization_utils_base")
    logger.setLevel(logging.ERROR)
    tokenizers.addFilter(_is_not_on_length)
    disable_progress_bars()
    with ExitStack() as stack:
        bar = getattr(lm_eval.api.task, "tqdm", None)
        if bar is not None:  # its bar over prompts has no switch
            stack.enter_context(patch.object(lm_eval.api.task, "tqdm", partial(bar, disable=True)))
        try:
            yield
        finally:
            logger.setLevel(level)
            tokenizers.removeFilter(_is_not_on_length)
            if shown:
                enable_progress_bars()


def _is_not_on_length(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Token indices sequence length is longer")


@contextmanager
def _seeded(device: "torch.device") -> Iterator[None]:
    """The global generators set inside the block and put back after it: some tasks shuffle their choices with them."""
    import numpy as np
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        states = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            random.seed(0)
            np.random.seed(_SEED)  # noqa: NPY002
            torch.manual_seed(_SEED)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
