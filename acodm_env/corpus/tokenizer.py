"""Byte-level BPE: trained on a bounded, even sample of the corpus, or taken from a file or the hub."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from acodm_env.corpus.sources import Document
from acodm_env.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_DOCUMENT = "<|endofdocument|>"
SAMPLE_CHARACTERS = 1_000_000
"""Per domain, for training: equal parts, so that a small domain is not spelled byte by byte."""


def train_tokenizer(setting: str, documents: Iterable[Document], quiet: bool = True) -> tuple["Tokenizer", int]:
    """Train a byte-level BPE on `documents`.

    Args:
        setting: "train:N" with N entries, at least 257 (all bytes and the end-of-document token).
        documents: training documents; at most about `SAMPLE_CHARACTERS` of each domain are used, evenly taken.
        quiet: no progress bar.

    Returns:
        The tokenizer, and the number of characters seen.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    size = _size(setting)
    samples: dict[str, _Sample] = {}
    total = 0
    for document in documents:
        samples.setdefault(document.domain, _Sample()).add(document.text)
        total += len(document.text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=not quiet,
    )
    tokenizer.train_from_iterator((text for name in sorted(samples) for text in samples[name].texts), trainer)
    return tokenizer, total


def _size(setting: str) -> int:
    number = setting.removeprefix("train:")
    if not number.isdigit() or int(number) < 257:
        raise ConfigError(f"tokenizer={setting}: must be train:N with N of at least 257 (every byte needs an entry)")
    return int(number)


class _Sample:
    """Every n-th text, n doubling whenever the sample outgrows its budget."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._stride, self._count, self._size = 1, 0, 0

    def add(self, text: str) -> None:
        """Take the text, or pass it over."""
        if self._count % self._stride == 0:
            self.texts.append(text)
            self._size += len(text)
            if self._size > SAMPLE_CHARACTERS and len(self.texts) > 1:
                self.texts = self.texts[::2]
                self._stride *= 2
                self._size = sum(map(len, self.texts))
        self._count += 1


def load_tokenizer(name: str) -> "Tokenizer":
    """A tokenizer from a `tokenizer.json` or the hub.

    Raises:
        DataError: a damaged file.
        ConfigError: neither a file nor reachable on the hub.
    """
    from tokenizers import Tokenizer

    if Path(name).is_file():
        try:
            return Tokenizer.from_file(name)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"tokenizer={name}: is no tokenizer.json ({error})") from error
    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # a missing network shows as any of a dozen exceptions
        raise ConfigError(
            f"tokenizer={name}: is no file, and cannot be fetched from the hub ({type(error).__name__}); without "
            f"network, download its tokenizer.json elsewhere and give the path, or train one with train:2048"
        ) from error
