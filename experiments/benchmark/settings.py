"""What all cells of a benchmark share: model, data, objective; checked before the folder is claimed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.config import split_names
from acodm_env.errors import ConfigError, unknown
from acodm_env.experiments.console import note

if TYPE_CHECKING:
    from acodm_env.corpus import TokenStore
    from acodm_env.experiments.benchmark.config import BenchmarkConfig

KEPT = (
    *("model", "steps", "batch_size", "sequence_length", "learning_rate", "decision_every", "evaluations"),
    *("eval_sequences", "device", "precision"),
)


def shared_settings(config: "BenchmarkConfig") -> dict[str, Any]:
    """What all cells share, and what a second command on the same folder must repeat.

    `objective` holds the weights of `targets`, summing to 1; `metric` is there where the user chose an objective, `cut`
    where a domain is cut.

    Raises:
        ConfigError: unknown domains or targets, weights that are no objective, a cut below one sequence.
        DataError: a target without held-out text.
    """
    from acodm_env.corpus import open_corpus
    from acodm_env.corpus.problem import choose_problem

    whole = open_corpus(config.corpus, config.quiet)
    domains = _domains(config, whole)
    cut, length = _cut(config, whole, domains), config.sequence_length
    problem = choose_problem(
        whole,
        sequence_length=length,
        domains=domains,
        targets=config.targets,
        objective=config.objective,
        cut=cut,
    )
    _say_held_out(problem.judged, config)
    return {name: getattr(config, name) for name in KEPT} | {
        "corpus": config.corpus if config.corpus == "pocket" else str(Path(config.corpus).absolute()),
        "corpus_fingerprint": problem.store.fingerprint,
        "proxy": config.proxy or config.model,
        "domains": domains,
        "targets": list(problem.weights),
        "objective": list(problem.weights.values()),
        **({"metric": problem.metric} if config.targets or problem.metric != "loss" else {}),
        **({"cut": cut} if cut else {}),
        **({"keep_models": True} if config.keep_models else {}),
    }


def _domains(config: "BenchmarkConfig", whole: "TokenStore") -> list[str]:
    """Domains to train on."""
    named = split_names(config.domains) if config.domains else list(whole.trainable)
    left_out = split_names(config.exclude)
    for name in left_out:
        if name not in whole.domains:
            unknown("exclude", name, whole.domains)
    domains = [name for name in named if name not in left_out]
    if not domains:
        raise ConfigError(f"exclude={config.exclude}: must leave a domain to train on; it leaves none")
    return domains


def _cut(config: "BenchmarkConfig", whole: "TokenStore", domains: list[str]) -> dict[str, int]:
    """The cut of each domain that has more than is to be left; of the others it is said."""
    from acodm_env.corpus.problem import parse_cut

    wanted, store = parse_cut(config.cut or ""), whole.subset(domains)
    for name in wanted:
        if name not in domains:
            unknown("cut.<domain>", name, domains)
    held = dict(zip(domains, store.num_sequences("train", config.sequence_length), strict=True)) if wanted else {}
    for name, number in wanted.items():
        if number >= held[name]:
            note(f"cut={name}={number}: {name} has {held[name]} sequences and is left whole")
    return {name: number for name, number in wanted.items() if number < held[name]}


def _say_held_out(targets: "TokenStore", config: "BenchmarkConfig") -> None:
    """Say which targets have fewer held-out sequences than the run asks for."""
    for split in () if config.quiet else ("validation", "test"):
        counts = zip(targets.domains, targets.num_sequences(split, config.sequence_length), strict=True)
        few = [f"{name} {count}" for name, count in counts if count < config.eval_sequences]
        if few:
            note(f"eval_sequences={config.eval_sequences}: the {split} split holds fewer of {', '.join(few)}")
