"""What was counted while documents went by, and the refusals that need the counts."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from acodm_env.corpus.document import Document
from acodm_env.corpus.shards import SPLITS
from acodm_env.errors import DataError

MOST_DOMAINS = 1_000
"""Of each source; what is kept for each would else outgrow the memory, and a mixture of more makes no sense."""
_COUNTS = ("texts", "blank", "splits", "left_out")


@dataclass
class Census:
    """What was counted while the documents went by, and the errors that need the counts."""

    names: dict[str, str]
    """What the user gave, by "source", "validation", "test", "targets"."""
    texts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Documents by (given as, domain)."""
    blank: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Documents without text, likewise."""
    splits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Documents by (domain, split)."""
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Documents of a source that stand in an earlier one and were therefore left out, by (earlier, source)."""
    shared: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    """Hashes of the documents that stand in two sources."""
    examples: dict[tuple[str, str], Document] = field(default_factory=dict)

    def count(self, given_as: str, document: Document) -> bool:
        """Count a document; whether it holds text."""
        holds_text = bool(document.text.strip())
        counter, key = self.texts if holds_text else self.blank, (given_as, document.domain)
        if key not in counter:
            self._check_new(*key)
        counter[key] += 1
        return holds_text

    def _check_new(self, given_as: str, newest: str) -> None:
        self._check_clash(given_as, newest)
        before = {domain for name, domain in (*self.texts, *self.blank) if name == given_as}
        if len(before | {newest}) > MOST_DOMAINS:
            raise DataError(
                f"{given_as}={self.names[given_as]}: must hold at most {MOST_DOMAINS:,} domains; it holds more, the "
                f"last one is '{newest:.60}'; is --domain-field the right field? name another one, or put the files "
                f"into a folder for each domain"
            )

    def _check_clash(self, given_as: str, newest: str) -> None:
        """No name may be that of a domain to train on and of a target."""
        seen = {name for name, domain in (*self.texts, *self.blank) if domain == newest}
        if other := [name for name in seen if (name == "targets") != (given_as == "targets")]:
            theirs = other[0] if given_as == "targets" else given_as
            raise DataError(
                f"domain={newest}: must be a domain to train on or a target, not both; "
                f"targets={self.names['targets']} and {theirs}={self.names[theirs]} both hold it; give it another "
                f"name in one of the two, or leave it out there (the domains of the source are evaluated anyway)"
            )

    def state(self) -> dict[str, Any]:
        """The counts as JSON; what is in `shared` is not kept."""
        return {name: [[*key, number] for key, number in getattr(self, name).items()] for name in _COUNTS}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on counting from `state`'s value."""
        for name in _COUNTS:
            getattr(self, name).update({(first, second): number for first, second, number in state[name]})

    def overlap(self, first: str, second: str, digest: int, document: Document) -> None:
        """Note a document of source `second` that stands in `first` too."""
        self.shared.setdefault((first, second), set()).add(digest)
        self.examples.setdefault((first, second), document)

    def check(self) -> None:
        """Raise the error that the counts call for, if any."""
        self._check_overlaps()
        self._check_blank()
        known = self._domains("source")
        if not known:
            raise DataError(f"source={self.names['source']}: must hold at least one document; it holds none; check it")
        for split in ("validation", "test"):
            if split in self.names:
                self._check_own(split, known)
        self._check_targets()
        for split in SPLITS:
            self._check_left_out(split, known)
            if missing := [domain for domain in known if not self.splits[domain, split]]:
                held = ", ".join(f"{domain} ({self.texts['source', domain]})" for domain in missing)
                raise DataError(
                    f"domain={missing[0]}: must have documents in {split}; too few documents to be shared out, by "
                    f"domain: {held}; give {split} a larger share with --splits, add documents, or leave the domain out"
                )

    def _domains(self, given_as: str) -> list[str]:
        return sorted(domain for name, domain in self.texts if name == given_as)

    def _check_overlaps(self) -> None:
        for (first, second), digests in self.shared.items():
            example = self.examples[first, second]
            raise DataError(
                f"{first}={self.names[first]}: must share no document with {second}={self.names[second]}; "
                f"{len(digests):,} {'document stands' if len(digests) == 1 else 'documents stand'} in both, for "
                f"instance {example.domain}: {example.text[:60]!r}; remove them from one of the two"
            )

    def _check_blank(self) -> None:
        for (given_as, domain), number in self.blank.items():
            if not self.texts[given_as, domain]:
                raise DataError(
                    f"domain={domain}: must hold text; all its {number:,} documents in "
                    f"{given_as}={self.names[given_as]} are empty or white space; check the text field (--text-field) "
                    f"or leave the domain out"
                )

    def _check_left_out(self, split: str, known: list[str]) -> None:
        """Documents of a domain that all stand in an earlier split cannot fill this one."""
        given_as = split if split in self.names else "source"
        filled = [split] if split in self.names else [name for name in SPLITS if name not in self.names]
        for domain in known:
            if not any(self.splits[domain, name] for name in filled):
                earlier = [first for first, late in self.left_out if late == given_as]
                raise DataError(
                    f"domain={domain}: must have documents in {split} that stand in no other split; all its "
                    f"{self.texts[given_as, domain]:,} in {given_as}={self.names[given_as]} stand in "
                    f"{' or '.join(f'{name}={self.names[name]}' for name in earlier)} too and were left out; add "
                    f"others, or leave the domain out"
                )

    def _check_targets(self) -> None:
        """Every target must have text in both held-out splits."""
        for domain in self._domains("targets"):
            if missing := [split for split in SPLITS[1:] if not self.splits[domain, split]]:
                number, given = self.texts["targets", domain], f"targets={self.names['targets']}"
                earlier = sorted(first for first, late in self.left_out if late == "targets")
                raise DataError(
                    f"domain={domain}: must have held-out documents in validation and test, since it is a target; it "
                    f"has none in {' and '.join(missing)}, {given} holds {number:,}"
                    + (f", less those that stand in {' or '.join(earlier)} too" if earlier else "")
                    + "; add documents, or leave the target out"
                )

    def _check_own(self, split: str, known: list[str]) -> None:
        """The user's own file for a split and the source must hold the same domains."""
        theirs = self._domains(split)
        file, source = f"{split}={self.names[split]}", f"source={self.names['source']}"
        if missing := [domain for domain in known if domain not in theirs]:
            raise DataError(
                f"domain={', '.join(missing)}: must have documents in {file} too; only {source} holds them; add "
                f"documents to that file, drop the domain from the source, or leave out --{split} so that a share of "
                f"the source is taken"
            )
        if extra := [domain for domain in theirs if domain not in known]:
            near = get_close_matches(extra[0], known, n=1, cutoff=0.5)
            raise DataError(
                f"domain={', '.join(extra)}: must have documents in {source} too, to train on; only {file} holds them; "
                + (f"is '{near[0]}' of the source meant? else " if near else "")
                + "add documents to the source or drop the domain from that file"
            )
