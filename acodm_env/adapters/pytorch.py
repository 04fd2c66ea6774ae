"""`MixtureDataset`: batches under weights that may change at any time, for torch's DataLoader.

When a new mixture takes effect, in batches: `DataLoader(dataset, batch_size=None)` 0; with `prefetch` N (a background
thread of ours) N; through `accelerator.prepare(loader)`, for one process alone, one more, because Accelerate holds one
batch back. DataLoader's own workers hold more, each with its own copy of the dataset: they are refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from acodm_env.corpus.loader import Loader
from acodm_env.corpus.sampler import Batch, MixtureSampler
from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError, unknown
from acodm_env.mixture import check_weights
from acodm_env.step_stats import Array


def model_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """What transformers' causal language models take: input_ids and labels (B, T); they shift the labels themselves.

    The first label of a row, which nothing predicts, is −100 ("ignored"): the Trainer counts labels to normalise the
    loss, for some models this one too, and the loss would be (T−1)/T of what it should be.
    """
    tokens = torch.from_numpy(batch.tokens)
    labels = tokens.clone()
    labels[:, 0] = -100
    return {"input_ids": tokens, "labels": labels}


class MixtureDataset(IterableDataset[dict[str, torch.Tensor]]):
    """Whole batches {input_ids (B, T), labels (B, T), domains (B,)}, without end; give DataLoader batch_size=None."""

    def __init__(
        self,
        store: TokenStore,
        batch_size: int,
        sequence_length: int,
        seed: int = 0,
        *,
        weights: Mapping[str, float] | Sequence[float] | Array | None = None,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 0,
    ):
        """Start at the beginning of every domain.

        Args:
            store: the corpus; its train split is drawn from.
            batch_size: sequences per batch, of all processes together.
            sequence_length: tokens per sequence.
            seed: of the order of the data.
            weights: the first mixture, as for `set_weights`; None is uniform.
            rank: this process; it gets the rows rank, rank + world, … of every batch.
            world: processes.
            prefetch: batches built ahead; a mixture takes effect so many batches late.

        Raises:
            ConfigError: weights that are no mixture, or a number out of range.
            DataError: a domain holds fewer tokens than one sequence.
        """
        super().__init__()
        self.domains = store.domains
        sampler = MixtureSampler(store, "train", batch_size, sequence_length, seed)
        self._loader = Loader(sampler, rank=rank, world=world, prefetch=prefetch)
        self.set_weights(np.ones(len(self.domains)) if weights is None else weights)

    def set_weights(self, weights: Mapping[str, float] | Sequence[float] | Array) -> None:
        """Compose the batches from the next one on (or `prefetch` later) by other weights.

        Args:
            weights: (K,) in the domains' order or {domain: weight}; normalised to sum 1.

        Raises:
            ConfigError: a domain is unknown or missing, or a weight negative or not finite.
        """
        if isinstance(weights, Mapping):
            for name in weights:
                if name not in self.domains:
                    unknown("weights.<domain>", name, self.domains)
            missing = [name for name in self.domains if name not in weights]
            if missing:
                raise ConfigError(f"weights: must name every domain; missing {', '.join(missing)} (0 leaves one out)")
            weights = [weights[name] for name in self.domains]
        self.weights: Array = check_weights(weights, len(self.domains))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from where the dataset stands; two iterators share its position.

        Raises:
            ConfigError: in a worker process of a DataLoader.
        """
        if get_worker_info() is not None:
            raise ConfigError(
                "num_workers: must be 0; a worker draws from a copy of this dataset, ahead of the mixture; to read "
                "ahead give the dataset prefetch=2"
            )
        while True:
            batch = self._loader.draw(self.weights)
            yield model_inputs(batch) | {"domains": torch.from_numpy(batch.domains)}

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, as of the batch handed out last, and the weights."""
        return {"loader": self._loader.state_dict(), "weights": self.weights.copy()}

    def load_state_dict(self, state: Mapping[str, Any], adapt: bool = False) -> None:
        """Go on exactly from `state_dict`'s value; `adapt` as for `Loader.load_state_dict`, which keeps the weights
        that are set where the domains differ.

        Raises:
            DataError: the domains or `prefetch` differ and `adapt` was not given, or a domain's content differs.
        """
        self._loader.load_state_dict(state["loader"], adapt)
        if list(state["loader"]["sampler"]["domains"]) == list(self.domains):
            self.weights = np.array(state["weights"], dtype=np.float64)  # as they were: normalised again, bits change
