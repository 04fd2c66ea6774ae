"""A document of a corpus, and what is told of what holds none."""

from collections.abc import Callable
from dataclasses import dataclass

Dropped = Callable[[str, str], None]
"""Called with a domain and the reason why it is left out."""


@dataclass(frozen=True)
class Document:
    """A text and the domain it counts for."""

    domain: str
    text: str
