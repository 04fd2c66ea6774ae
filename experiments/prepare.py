"""`acodm prepare`: tokenise a corpus into a token store."""

from dataclasses import dataclass
from pathlib import Path

from acodm_env.corpus.preparation.prepare import Preparation, prepare
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.tokens import SPLITS, TokenStore
from acodm_env.errors import ConfigError, unknown
from acodm_env.experiments.console import say

_SLIMPAJAMA = "cerebras/SlimPajama-627B"
RECIPES: dict[str, dict[str, str]] = {
    "slimpajama": {
        "source": _SLIMPAJAMA,
        "validation": f"{_SLIMPAJAMA}@validation",
        "test": f"{_SLIMPAJAMA}@test",
        "domain_field": "meta.redpajama_set_name",
    },
    "pile": {"domain_field": "meta.pile_set_name"},
}
"""Settings of well-known corpora. `source`, `validation` and `test` go together: with a source of one's own, none of
the three is taken from a recipe."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Tokenise a corpus once into a memory-mapped token store with disjoint splits; an interrupted run goes on."""

    source: str | None = None
    """ "pocket", a file or folder of .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .arrow, a folder with one sub-folder
    per domain, or a hub dataset: owner/name, owner/name:configuration, either with @split (default: @train)."""
    out: str
    """Folder of the token store."""
    recipe: str | None = None
    """slimpajama or pile: the fields (and the hub names) of that corpus; other settings given here come first."""
    validation: str | None = None
    """Files, or hub dataset, of the validation split; default: a share of the source."""
    test: str | None = None
    """Files, or hub dataset, of the test split; default: a share of the source."""
    targets: str | None = None
    """Files, or hub dataset, of domains to be evaluated and never trained on: half validation, half test."""
    splits: str = "0.9,0.05,0.05"
    """Shares of train, validation and test (characters; above 256 MB and from the hub: documents); of those that are
    not given as files."""
    tokenizer: str = "train:2048"
    """train:N (byte-level BPE with N entries), a tokenizer.json, or a hub name."""
    domain_field: str | None = None
    """Dotted field that names a record's domain, e.g. meta.pile_set_name; default: the sub-folder."""
    text_field: str = "text"
    """Dotted field of a record's text."""
    workers: int | None = None
    """Processes that tokenise; default: one per core, at most 24. The result does not depend on it."""
    shard_mib: int = 256
    """Largest size of a file of token ids, in MiB."""
    verify: bool = False
    """Prepare nothing: read every byte of the store in --out and compare it with its checksums."""
    seed: int = 0
    """Not used: splits and tokenizer are deterministic; accepted because every command takes it."""
    quiet: bool = False
    """No progress bar and no table."""

    def __post_init__(self) -> None:
        if self.shard_mib < 1:
            raise ConfigError(f"shard_mib={self.shard_mib}: must be at least 1 MiB")

    def preparation(self) -> Preparation:
        """The preparation that these settings describe."""
        recipe = self._recipe()
        source = self.source or recipe.get("source")
        if source is None:
            raise ConfigError('source=None: must name files, a hub dataset or "pocket"; give --source')
        own = {} if self.source else recipe
        validation, test = (given or own.get(name) for name, given in self._held_out().items())
        return Preparation(
            source=self._source(source),
            validation=self._source(validation) if validation else None,
            test=self._source(test) if test else None,
            targets=self._source(self.targets) if self.targets else None,
            splits=self._shares(),
            tokenizer=self.tokenizer,
            shard_bytes=self.shard_mib << 20,
        )

    def _recipe(self) -> dict[str, str]:
        if self.recipe is not None and self.recipe not in RECIPES:
            unknown("recipe", self.recipe, RECIPES)
        return RECIPES[self.recipe] if self.recipe else {}

    def _held_out(self) -> dict[str, str | None]:
        return {"validation": self.validation, "test": self.test}

    def _shares(self) -> tuple[float, float, float]:
        try:
            train, validation, test = (float(share) for share in self.splits.split(","))
        except ValueError as error:
            raise ConfigError(f"splits={self.splits}: must be three numbers, e.g. 0.9,0.05,0.05") from error
        return train, validation, test

    def _source(self, name: str) -> Source:
        field = self.domain_field or self._recipe().get("domain_field")
        return Source(name=name, domain_field=field, text_field=self.text_field)


def run(config: PrepareConfig) -> None:
    """Prepare, and print what was written; or verify."""
    if config.verify:
        store = TokenStore.open(config.out)
        store.verify()
        say(f"{config.out}: whole; every checksum agrees and the splits share no document")
        return
    store = prepare(config.preparation(), Path(config.out), workers=config.workers, quiet=config.quiet)
    if not config.quiet:
        say(table(store))
    if targets := [domain for domain in store.domains if domain not in store.trainable]:
        say(f"targets, evaluated only: {', '.join(targets)}")
    for domain in store.record["dropped"]:
        say(f"left out: {domain['name']} ({domain['reason']})")
    for entry in store.record["left_out"]:
        say(f"left out: {entry['documents']:,} documents of {entry['from']} that stand in {entry['since_in']} too")
    say(f"token store: {config.out} (fingerprint {store.fingerprint[:16]})")


def table(store: TokenStore) -> str:
    """Tokens and documents per domain and split."""
    lines = [f"{'domain':<24}" + "".join(f"{split + ' tokens':>20}{'documents':>11}" for split in SPLITS)]
    for domain in store.record["domains"]:
        cells = "".join(
            f"{domain['splits'][split]['tokens']:>20,}{domain['splits'][split]['documents']:>11,}" for split in SPLITS
        )
        lines.append(f"{domain['name']:<24}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm prepare, or python -m acodm_env prepare")
