"""Text on disk as token stores, and batches drawn from them under a mixture."""

from acodm_env.corpus.sampler import MixtureSampler
from acodm_env.corpus.tokens import TokenStore

__all__ = ["MixtureSampler", "TokenStore", "open_corpus"]


def open_corpus(corpus: str, quiet: bool = False) -> TokenStore:
    """Open "pocket" (harvested on first use, with a progress bar unless `quiet`, then cached) or a token store.

    Raises:
        DataError: the folder is no token store, was cut short or edited.
    """
    if corpus == "pocket":
        from acodm_env.corpus.pocket import pocket_store

        return TokenStore.open(pocket_store(progress=not quiet))
    return TokenStore.open(corpus)
