"""Byte-level BPE: trained on a bounded, even sample of the corpus, or taken from a file or the hub."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from acodm_env.corpus.document import Document
from acodm_env.errors import ConfigError, DataError
from acodm_env.hub import looks_local, require_hub

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_DOCUMENT = "<|endofdocument|>"
_ENDS = (END_OF_DOCUMENT, "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
SAMPLE_CHARACTERS = 1_000_000
"""Per domain, for training: equal parts, so that a small domain is not spelled byte by byte."""
LONGEST_CHARS = 1_000_000
"""Longer texts are encoded in parts."""


def train_tokenizer(setting: str, documents: Iterable[Document]) -> "Tokenizer":
    """Train a byte-level BPE on `documents`.

    Args:
        setting: "train:N" with N entries, at least 257 (all bytes and the end-of-document token).
        documents: training documents; at most about `SAMPLE_CHARACTERS` of each domain are used, evenly taken.

    Raises:
        ConfigError: N is missing or too small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    size = _size(setting)
    samples: dict[str, _Sample] = {}
    for document in documents:
        samples.setdefault(document.domain, _Sample()).add(document.text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for name in sorted(samples) for text in samples[name].texts), trainer)
    return tokenizer


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
    """A tokenizer from a `tokenizer.json`, a folder with one, or the hub (its local cache first).

    Raises:
        DataError: a damaged file, nothing at a path, or a hub that cannot be reached.
        ConfigError: no such tokenizer on the hub.
    """
    from tokenizers import Tokenizer

    file = tokenizer_file(name)
    if not file.is_file():
        if Path(name).expanduser().is_dir() or looks_local(name, (".json",)):
            raise DataError(
                f"tokenizer={name}: must be an existing tokenizer.json; nothing is there; check the path, or train "
                f"one with train:2048"
            )
        file = _from_hub(name)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"tokenizer={name}: must be a tokenizer.json; {error}; download it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_file(name: str) -> Path:
    """The file that a tokenizer is read from if its name is a path, of a file or of a folder with a tokenizer.json."""
    path = Path(name).expanduser()
    return path / "tokenizer.json" if path.is_dir() else path


def _from_hub(name: str) -> Path:
    import huggingface_hub

    remedy = (
        "without network, download its tokenizer.json elsewhere and give the path, or train one with train:2048 "
        "(train:N, N entries)"
    )
    try:
        cached = huggingface_hub.try_to_load_from_cache(name, "tokenizer.json")
        if isinstance(cached, str):
            return Path(cached)
        require_hub("tokenizer", name, remedy)
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
    except (OSError, ValueError) as error:  # what the hub raises are kinds of these
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"tokenizer={name}: must be train:N, a tokenizer.json or the hub name of a model that has one; {cause}; "
            f"check the name; {remedy}"
        ) from error


def end_of_document(tokenizer: "Tokenizer") -> int:
    """The id that ends a document: our own token's, or the one that the tokenizer has for this purpose.

    Raises:
        ConfigError: it has none.
    """
    for name in _ENDS:
        if (token := tokenizer.token_to_id(name)) is not None:
            return int(token)
    raise ConfigError(f"tokenizer: must have an end-of-text token ({', '.join(_ENDS)}); add one or use train:N")


def vocab_size(tokenizer: "Tokenizer") -> int:
    """The largest id plus one: ids of added tokens may leave gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def encode(tokenizer: "Tokenizer", texts: Sequence[str], end: int) -> Iterator[list[int]]:
    """Ids of each text. A special token spelled out in a text is text like any other: only we write the id `end`.

    Encoding takes many times the memory of a text, so one of more than `LONGEST_CHARS` is encoded in parts, cut at
    line ends where there are any.
    """
    tokenizer.encode_special_tokens = True
    if any(len(text) > LONGEST_CHARS for text in texts):
        for text in texts:
            yield [token for part in _parts(text) for token in next(_encode(tokenizer, [part], end))]
    else:
        yield from _encode(tokenizer, texts, end)


def _encode(tokenizer: "Tokenizer", texts: Sequence[str], end: int) -> Iterator[list[int]]:
    for text, encoding in zip(texts, tokenizer.encode_batch_fast(list(texts), add_special_tokens=False), strict=True):
        ids = encoding.ids
        yield ids if end not in ids else _encode_around(tokenizer, text, end)


def _parts(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        limit = start + LONGEST_CHARS
        cut = text.rfind("\n", start, limit) if limit < len(text) else -1
        end = cut if cut > start else limit
        yield text[start:end]
        start = end


def _encode_around(tokenizer: "Tokenizer", text: str, end: int) -> list[int]:
    """Ids of a text in which the model itself finds the end token, as Unigram does: it is cut within each."""
    spelled = tokenizer.id_to_token(end) or ""
    parts = re.split(rf"(?<={re.escape(spelled[:1])})(?={re.escape(spelled[1:])})", text)
    ids = [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False).ids]
    return [token for token in ids if token != end]
