"""`Cut`: a domain's train split as if it held fewer sequences, evenly spaced; for experiments with scarce data."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from acodm_env.errors import ConfigError


class Cut(NamedTuple):
    """What is left of a domain's train split."""

    sequences: int
    """Sequences that are left, at least 1."""
    sequence_length: int
    """Tokens of each."""

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Cut | None":
        """The cut of a domain as corpus.json lists it; None of a whole one."""
        return cls(**entry["cut"]) if "cut" in entry else None

    def places(self, indices: NDArray[np.int64], whole: int) -> NDArray[np.int64]:
        """Where sequences stand among all `whole` of the domain.

        Args:
            indices: among those that are left (n,).
            whole: sequences of the domain before it was cut.

        Raises:
            IndexError: there is no such sequence.
        """
        if len(indices) and (indices.min() < -self.sequences or indices.max() >= self.sequences):
            raise IndexError(f"the domain was cut to {self.sequences} sequences")
        places: NDArray[np.int64] = (indices % self.sequences) * whole // self.sequences
        return places

    def check_length(self, domain: str, sequence_length: int) -> None:
        """Refuse sequences of another length than the domain was cut for.

        Raises:
            ConfigError: they are.
        """
        if sequence_length != self.sequence_length:
            raise ConfigError(
                f"sequence_length={sequence_length}: must be {self.sequence_length} tokens, for which the train split "
                f"of domain '{domain}' was cut; cut it again for {sequence_length}"
            )


def check_cut(domain: str, sequences: int, held: int) -> None:
    """Refuse a number of sequences that a domain cannot be cut to.

    Args:
        domain: its name.
        sequences: how many are to be left.
        held: how many it holds now.

    Raises:
        ConfigError: fewer than one, or more than it holds.
    """
    if sequences < 1:
        raise ConfigError(f"cut={domain}={sequences}: must be at least 1 sequence; to do without it, use a subset")
    if sequences > held:
        raise ConfigError(
            f"cut={domain}={sequences}: must be at most {held}, the sequences that its train split holds; leave it "
            f"whole, or give fewer"
        )
