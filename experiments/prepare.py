"""`acodm prepare`: tokenise a corpus into a token store."""

from dataclasses import dataclass

from acodm_env.corpus.prepare import Preparation, prepare
from acodm_env.corpus.sources import Source
from acodm_env.corpus.tokens import SPLITS, TokenStore
from acodm_env.errors import ConfigError
from acodm_env.experiments.console import say


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Tokenise a corpus once into a memory-mapped token store with disjoint splits."""

    source: str
    """ "pocket", a file or folder of .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .arrow, a folder with one sub-folder
    per domain, or a hub dataset."""
    out: str
    """Folder of the token store."""
    validation: str | None = None
    """Files of the validation split; default: a share of the source."""
    test: str | None = None
    """Files of the test split; default: a share of the source."""
    splits: str = "0.9,0.05,0.05"
    """Shares (of characters) of train, validation and test; of those that are not given as files."""
    tokenizer: str = "train:2048"
    """train:N (byte-level BPE with N entries), a tokenizer.json, or a hub name."""
    domain_field: str | None = None
    """Dotted field that names a record's domain, e.g. meta.pile_set_name."""
    text_field: str = "text"
    """Dotted field of a record's text."""
    seed: int = 0
    """Not used: splits and tokenizer are deterministic; accepted because every command takes it."""
    quiet: bool = False
    """No progress bar and no table."""

    def preparation(self) -> Preparation:
        """The preparation that these settings describe."""
        try:
            shares = tuple(float(share) for share in self.splits.split(","))
        except ValueError as error:
            raise ConfigError(f"splits={self.splits}: must be three numbers, e.g. 0.9,0.05,0.05") from error
        if len(shares) != 3:
            raise ConfigError(f"splits={self.splits}: must be three numbers, e.g. 0.9,0.05,0.05")
        return Preparation(
            source=self._source(self.source),
            validation=self._source(self.validation) if self.validation else None,
            test=self._source(self.test) if self.test else None,
            splits=shares,
            tokenizer=self.tokenizer,
        )

    def _source(self, name: str) -> Source:
        return Source(name=name, domain_field=self.domain_field, text_field=self.text_field)


def run(config: PrepareConfig) -> None:
    """Prepare, and print what was written."""
    store = prepare(config.preparation(), config.out, quiet=config.quiet)
    if not config.quiet:
        say(table(store))
    for domain in store.record.get("dropped", []):
        say(f"left out: {domain['name']} ({domain['reason']})")
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
