"""Text on disk as token stores, and batches drawn from them under a mixture."""

from acodm_env.corpus.open import open_corpus
from acodm_env.corpus.sampler import MixtureSampler
from acodm_env.corpus.tokens import TokenStore

__all__ = ["MixtureSampler", "TokenStore", "open_corpus"]
