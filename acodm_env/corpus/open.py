"""A corpus by its name or folder."""

import hashlib
import json
import logging
import os
import platform
import shutil
from pathlib import Path

from acodm_env.corpus.tokens import FORMAT_VERSION, TokenStore
from acodm_env.errors import DataError
from acodm_env.files import disk_errors

_log = logging.getLogger(__name__)


def open_corpus(corpus: str, quiet: bool = False) -> TokenStore:
    """Open "pocket" (harvested on first use, with a progress bar unless `quiet`, then cached) or a token store.

    Raises:
        DataError: the folder is no token store, was cut short or edited.
    """
    return TokenStore.open(pocket_store(progress=not quiet) if corpus == "pocket" else corpus)


def pocket_store(vocab_size: int = 2048, progress: bool = True) -> Path:
    """The folder of the pocket corpus' token store, built on first use and then cached.

    Args:
        vocab_size: size of the byte-level BPE vocabulary trained on it.
        progress: show bars while it is built.

    Raises:
        ConfigError: a vocabulary smaller than the 256 bytes and the end-of-document token.
        DataError: the cache cannot be written.
    """
    from filelock import FileLock

    from acodm_env.corpus.preparation.prepare import prepare

    cache = Path(os.environ.get("ACODM_CACHE", "~/.cache/acodm")).expanduser().absolute()
    path = cache / f"pocket-{_key(vocab_size)}"
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            try:
                return TokenStore.open(path).path
            except DataError as error:
                if path.exists():
                    _log.warning("building the pocket corpus again: %s", error)
            shutil.rmtree(path, ignore_errors=True)  # what is there is not whole
            prepare("pocket", path, tokenizer=f"train:{vocab_size}", quiet=not progress)
    return path


def _key(vocab_size: int) -> str:
    from acodm_env.corpus.preparation.installation import core_distributions
    from acodm_env.corpus.preparation.pocket import DOCUMENT_CHARS, DOMAIN_CHARS, VERSION

    packages = sorted(f"{item.name}=={item.version}" for item in core_distributions())
    parts = [VERSION, FORMAT_VERSION, DOMAIN_CHARS, DOCUMENT_CHARS, vocab_size, platform.python_version(), packages]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
