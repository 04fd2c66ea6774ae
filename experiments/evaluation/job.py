"""One model's evaluation: its corpus, what is still to be measured, and the measuring, saved task by task."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.config import split_names
from acodm_env.corpus import TokenStore, open_corpus
from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.console import note, progress
from acodm_env.experiments.evaluation.scores import TaskScores
from acodm_env.experiments.evaluation.store import FILE, ITEMS, Results, Stored
from acodm_env.experiments.evaluation.subjects import Subject
from acodm_env.lock import claimed

if TYPE_CHECKING:
    from acodm_env.experiments.evaluation.config import EvaluateConfig
    from acodm_env.experiments.evaluation.loading import LoadedModel

SPLIT = "test"


@dataclass(kw_only=True)
class Job:
    """One model, and what is to be done with it."""

    subject: Subject
    results: Results
    store: TokenStore | None
    """For the perplexity; None where that is not asked for."""
    usual: dict[str, Any] = field(default_factory=dict)
    """Settings as they are unless asked for; others become part of a result's name."""
    identities: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By task: all that decides its numbers."""
    pending: list[str] = field(default_factory=list)
    """Tasks without a result yet."""
    loaded: "LoadedModel | None" = None
    """Kept from the examination if there is no other model."""


def make_job(config: "EvaluateConfig", subject: Subject) -> Job:
    """Where a model's results go, what is there already, and its corpus."""
    alone = config.out is not None and not config.compare
    folder = Path(str(config.out)) if alone else subject.folder
    if alone and folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder}: must be a folder; there is a file of this name")
    store = _store(config, subject) if "perplexity" in config.task_names else None
    return Job(subject=subject, results=Results(folder), store=store)


def _store(config: "EvaluateConfig", subject: Subject) -> TokenStore:
    """The corpus to score.

    Raises:
        ConfigError: none is known.
        DataError: the run's is not there, or no longer what the run was trained on.
    """
    asked = None if config.domains is None else split_names(config.domains)
    if config.corpus is not None:
        store = open_corpus(config.corpus, config.quiet)
        return store if asked is None else store.subset(asked)
    recorded = subject.config.get("corpus")
    if recorded is None:
        raise ConfigError(
            f"corpus=None: must be given for the perplexity of {subject.folder}, which is no run; --corpus FOLDER, "
            f"made by `acodm prepare`"
        )
    try:
        store = open_corpus(str(recorded), config.quiet)
    except DataError as error:
        raise DataError(
            f"{error}; it is the corpus of run {subject.folder}; name where it is now by --corpus"
        ) from error
    trained = store.subset(subject.config["domains"])
    expected = str(subject.config.get("corpus_fingerprint", trained.fingerprint))
    if trained.fingerprint != expected:
        raise DataError(
            f"corpus={recorded}: must be what run {subject.folder} was trained on (fingerprint {expected[:12]}…); it "
            f"is another now ({trained.fingerprint[:12]}…); name the corpus to score by --corpus, or prepare that again"
        )
    return trained if asked is None else store.subset(asked)


def examine(config: "EvaluateConfig", job: Job, *, keep: bool) -> None:
    """Load a model, which shows whether it is whole and fits; find what is still to be measured.

    Raises:
        ConfigError, DataError: the model, its tokenizer or a setting does not fit.
    """
    from acodm_env.experiments.evaluation.perplexity import check_perplexity

    loaded = _load(config, job.subject)
    if job.store is not None:
        check_perplexity(loaded, job.store, split=SPLIT, stride=config.stride, batch_size=config.rows)
        _check_tokenizer(config, job, loaded, job.store)
    job.usual = {
        "context": _longest_context(loaded),
        "stride": _usual_stride(loaded),
        "precision": "fp32",
        "corpus_fingerprint": job.subject.config.get("corpus_fingerprint"),
    }
    for task in config.task_names:
        identity = _identity(config, job, loaded, task)
        job.identities[task] = identity
        if config.fresh or job.results.find(identity) is None:
            job.pending.append(task)
    job.loaded = loaded if keep else None


def _load(config: "EvaluateConfig", subject: Subject) -> "LoadedModel":
    from acodm_env.experiments.evaluation.loading import load_model

    return load_model(subject.model, device=config.device, precision=config.precision, context=config.context)


def _check_tokenizer(config: "EvaluateConfig", job: Job, loaded: "LoadedModel", store: TokenStore) -> None:
    """A run's model reads its own corpus as it is stored.

    Raises:
        DataError: it has another tokenizer, so it is not the one that it was trained with.
    """
    from acodm_env.experiments.evaluation.documents import Reader

    trained_on = job.subject.config.get("corpus_fingerprint")
    if not job.subject.config or (config.corpus is not None and store.fingerprint != trained_on):
        return  # another corpus may have another tokenizer: its texts are encoded again, which is said
    file = loaded.path / "tokenizer.json"
    if Reader.of(store, file, int(loaded.tokenizer.eos_token_id)).tokenizer_file is not None:
        raise DataError(
            f"{file}: must be the tokenizer of the corpus that run {job.subject.folder} was trained on; it is another "
            f"one, so the model reads ids that it never learnt; copy {store.path / 'tokenizer.json'} back over it"
        )


def _longest_context(loaded: "LoadedModel") -> int:
    """What the model's context is where none is asked for, in tokens."""
    from acodm_env.experiments.evaluation.loading import UNBOUNDED_CONTEXT

    config: Any = loaded.model.config
    config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    return next((size for name in names if isinstance(size := getattr(config, name, None), int)), UNBOUNDED_CONTEXT)


def _usual_stride(loaded: "LoadedModel") -> int:
    return max(1, loaded.context // 2)


def _identity(config: "EvaluateConfig", job: Job, loaded: "LoadedModel", task: str) -> dict[str, Any]:
    """All that decides a task's numbers, but for the device."""
    from acodm_env.experiments.evaluation.harness.run import data_checksums, harness_version

    common = {
        "task": task,
        "model_sha256": loaded.sha256,
        "tokenizer_sha256": loaded.tokenizer_sha256,
        "precision": "bf16" if loaded.bf16 else "fp32",
        "context": loaded.context,
        "limit": config.limit,
    }
    if task == "perplexity":
        assert job.store is not None
        stride = config.stride or _usual_stride(loaded)
        return common | {"split": SPLIT, "stride": stride, "corpus_fingerprint": job.store.fingerprint}
    data = None if config.data is None else data_checksums(task, Path(config.data))
    shots = 0 if task == "humaneval" else config.num_fewshot
    if shots is None and (task == "mmlu" or (data is not None and task.startswith("mmlu_"))):
        shots = 0  # what these tasks have of their own: the same question, however it is asked
    return common | {"num_fewshot": shots, "data": data, "harness_version": harness_version()}


def measure(config: "EvaluateConfig", job: Job, data: Path | None) -> None:
    """Do what is pending, saving each task as it ends."""
    from acodm_env.experiments.evaluation.harness.run import run_tasks

    with claimed(job.results.folder, at=job.results.folder / ITEMS):
        job.results = Results(job.results.folder)  # another evaluation may have ended meanwhile
        loaded = job.loaded or _load(config, job.subject)
        job.loaded = None
        if "perplexity" in job.pending:
            assert job.store is not None
            scores = _perplexity(config, job, loaded, job.store)
            _keep(config, job, loaded, scores)
        others = [name for name in job.pending if name != "perplexity"]
        if others:
            with _bars(config, job.subject.name) as advance:
                for scores in run_tasks(
                    loaded,
                    others,
                    num_fewshot=config.num_fewshot,
                    limit=config.limit,
                    batch_size=config.rows,
                    data=data,
                    allow_code_execution=config.allow_code_execution,
                    on_note=lambda text: None,  # all that has to be known is said below the table, now and later
                    on_progress=advance,
                ):
                    _keep(config, job, loaded, scores)
    if not config.quiet:
        note(f"results: {job.results.folder / FILE}")


def _perplexity(config: "EvaluateConfig", job: Job, loaded: "LoadedModel", store: TokenStore) -> TaskScores:
    from acodm_env.experiments.evaluation.perplexity import score_perplexity

    with _bar(config, job.subject.name, store) as advance:
        return score_perplexity(
            loaded,
            store,
            split=SPLIT,
            context=loaded.context,
            stride=job.identities["perplexity"]["stride"],
            batch_size=config.rows,
            limit=config.limit,
            on_tokens=advance,
        )


@contextmanager
def _bar(config: "EvaluateConfig", name: str, store: TokenStore) -> Iterator[Any]:
    """A bar of scored tokens; where texts are encoded again their number is about right."""
    from acodm_env.experiments.evaluation.documents import num_stored_tokens

    total = num_stored_tokens(store, SPLIT, config.limit)
    with progress(total, f"{name}: perplexity", quiet=config.quiet, unit="token") as bar:
        yield bar.update


@contextmanager
def _bars(config: "EvaluateConfig", name: str) -> Iterator[Any]:
    """A bar per task, and one for the programs of humaneval; each ends with its task."""
    with ExitStack() as stack:
        bars: dict[str, Any] = {}

        def advance(task: str, done: int, total: int) -> None:
            if task not in bars:
                bars[task] = stack.enter_context(progress(total, f"{name}: {task}", quiet=config.quiet, unit="item"))
            bars[task].update(done - bars[task].n)
            if done >= total:
                bars[task].close()

        yield advance


def _keep(config: "EvaluateConfig", job: Job, loaded: "LoadedModel", scores: TaskScores) -> None:
    identity = job.identities.get(scores.task) or _identity(config, job, loaded, scores.task)
    job.identities[scores.task] = identity
    about: Mapping[str, Any] = {
        "device": str(loaded.device),
        "batch_size": config.batch_size,
        "num_parameters": loaded.num_parameters,
        "harness_version": scores.facts.get("harness_version", identity.get("harness_version")),
    }
    job.results.save(scores, identity, about, job.usual)


def outcome(job: Job, asked: Sequence[str]) -> list[Stored]:
    """The results in the order asked for."""
    names = [job.results.find(job.identities[task]) for task in asked]
    return [job.results.load(name) for name in names if name is not None]
