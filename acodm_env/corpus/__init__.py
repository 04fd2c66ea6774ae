"""Text on disk as token stores, and batches drawn from them under a mixture."""

from acodm_env.corpus.sampler import MixtureSampler
from acodm_env.corpus.tokens import TokenStore

__all__ = ["MixtureSampler", "TokenStore", "open_corpus"]


def open_corpus(corpus: str) -> TokenStore:
    """Open "pocket" (harvested on first use, then cached) or the folder of a token store.

    Raises:
        DataError: the folder is no token store, was cut short or edited.
    """
    if corpus == "pocket":
        from acodm_env.corpus.pocket import pocket_store

        return TokenStore.open(pocket_store())
    return TokenStore.open(corpus)
