"""A mixing problem on text: the domains to train on, the targets that count, and how what they lose is averaged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError, DataError
from acodm_env.objective import check_metric, describe, normalised, parse_targets


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a run trains on and what it is judged by."""

    store: TokenStore
    """The domains to train on."""
    heldout: TokenStore
    """Where the targets are looked up: the whole corpus."""
    targets: Mapping[str, float]
    """Weights of the targets, summing to 1; {}: every domain that is trained on, all alike."""
    metric: str = "loss"
    """What the objective averages: "loss" or "perplexity"."""

    def require_choice(self) -> None:
        """Refuse a problem without a mixture to choose.

        Raises:
            ConfigError: it has a single domain.
        """
        if len(self.store.domains) < 2:
            raise ConfigError(
                f"domains={self.store.domains[0]}: must be two or more; with one there is no mixture to choose; take a "
                f"corpus with more of them, or leave --domains out"
            )

    @property
    def lm_settings(self) -> dict[str, Any]:
        """What `LMTrainer` takes beside configuration and store."""
        return {"objective": self.targets or None, "metric": self.metric, "heldout_store": self.judged}

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the targets, summing to 1, whether they were named or not."""
        names = self.store.domains
        return dict(self.targets) or dict.fromkeys(names, 1 / len(names))

    @property
    def judged(self) -> TokenStore:
        """The targets' texts."""
        return self.heldout.subset(list(self.targets)) if self.targets else self.store

    @property
    def unjudged(self) -> tuple[str, ...]:
        """Targets of the corpus, texts that nothing is trained on, that the objective leaves out."""
        left = [name for name in self.heldout.domains if name not in self.heldout.trainable]
        return tuple(name for name in left if name not in self.targets)

    def identity(self) -> dict[str, Any]:
        """Names and weights of the targets, metric and texts, as a run records them; {} of the usual objective."""
        if not self.targets and self.metric == "loss":
            return {}
        return self.full_identity()

    def full_identity(self) -> dict[str, Any]:
        """The same of any objective."""
        return {
            "targets": list(self.weights),
            "objective": list(self.weights.values()),
            "metric": self.metric,
            "heldout_fingerprint": self.judged.fingerprint,
        }

    def describe(self) -> str:
        """The objective in words."""
        return describe(self.metric, self.targets)

    def num_heldout(self, sequence_length: int, wanted: int) -> dict[str, dict[str, int]]:
        """Held-out sequences by target and split, at most `wanted`."""
        judged = self.judged
        counts = {split: judged.num_sequences(split, sequence_length) for split in ("validation", "test")}
        return {
            name: {split: min(numbers[index], wanted) for split, numbers in counts.items()}
            for index, name in enumerate(judged.domains)
        }


def choose_problem(
    whole: TokenStore,
    *,
    sequence_length: int,
    domains: str | Sequence[str] | None = None,
    targets: str | Mapping[str, float] | None = None,
    objective: str = "loss",
    cut: str | Mapping[str, int] | None = None,
) -> Problem:
    """The problem that settings describe.

    Args:
        whole: the corpus.
        sequence_length: tokens per sequence.
        domains: names to train on, separated by commas if text; None: all that hold text to train on.
        targets: "prose=2,licences=1" or a mapping; None: the domains to train on, all alike. A target that nothing is
            trained on is evaluated only.
        objective: what is averaged, "loss" or "perplexity".
        cut: "prose=160": sequences to which the training text of domains is cut.

    Raises:
        ConfigError: an unknown name, with a suggestion; weights that are negative or all 0; a cut that cannot be.
        DataError: nothing is left to train on, or a target without held-out text.
    """
    metric = check_metric(objective)
    weights = parse_targets(targets)
    if targets is not None and not weights:
        raise ConfigError(f"targets={targets}: must name a target, such as prose or prose=2,licences=1")
    names = [name.strip() for name in domains.split(",")] if isinstance(domains, str) else domains
    store = whole.trained() if names is None else whole.subset(list(names))
    if cut:
        store = store.cut(parse_cut(cut), sequence_length)
    known = dict(zip(*normalised(weights, whole.domains), strict=True)) if weights else {}
    chosen = {name: known[name] for name in whole.domains if name in known}  # one objective, one order
    problem = Problem(store=store, heldout=whole, targets=chosen, metric=metric)
    _check_held_out(problem.judged, sequence_length)
    return problem


def _check_held_out(judged: TokenStore, sequence_length: int) -> None:
    for split in ("validation", "test"):
        sizes = zip(judged.domains, judged.sizes_tokens(split), strict=True)
        for name in (name for name, size in sizes if size < sequence_length):
            raise DataError(
                f"targets.{name}: must have held-out text; its {split} split holds less than one sequence of "
                f"{sequence_length} tokens; leave it out of the targets, or prepare the corpus again with more of it "
                f"held out (--splits)"
            )


def parse_cut(text: str | Mapping[str, int]) -> dict[str, int]:
    """Sequences by domain of "prose=160,licences=40".

    Raises:
        ConfigError: no name, a name twice, or no whole number of at least 1.
    """
    if not isinstance(text, str):
        return dict(text)
    numbers: dict[str, int] = {}
    for part in filter(str.strip, text.split(",")):
        name, _, given = (piece.strip() for piece in part.partition("="))
        if not name or name in numbers or not given.isdecimal() or int(given) < 1:
            raise ConfigError(f"cut={text}: '{part.strip()}' must be domain=sequences, each domain once, at least 1")
        numbers[name] = int(given)
    return numbers
