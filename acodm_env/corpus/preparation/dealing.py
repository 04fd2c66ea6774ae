"""How documents are dealt out to train, validation and test, so that the splits are exchangeable.

Under one model, validation and test must have the same loss but for chance: whoever reads one of them would else
steer by what is not so of the other. In small domains two things spoil that: near-copies (licences), of which one
split gets many, and long documents, which fill a split alone. So a domain's documents are laid in an order in which
those alike lie side by side, by length, near-copies together, else as they stand in the source; and from that order
the held-out splits take neighbours, at even distances. Documents too long to be matched go to train.
"""

import re
from array import array
from collections.abc import Mapping, Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from acodm_env.corpus.document import Document

LARGE_PART = 0.25
"""A document that would fill more than this part of a held-out split's share goes to train."""
MOST_HELD_OUT = 0.5
"""Of the documents short enough to be held out at most this part is, where the shares do not ask for more."""
MOST_AT_ONCE = 8
"""Neighbours that are held out together at most."""
_SHORT = 16  # shorter lines, of white space, brackets or numbers, say nothing about near-copies
_PIECE_ENDS = re.compile(r"[\n.]")


def sketch(text: str) -> int:
    """Smallest checksum (32 bits) of a text's lines and sentences; near-copies mostly have the same.

    Two texts agree with a probability equal to the share of their lines that they have in common (min-wise hashing,
    Broder 1997, with one hash).
    """
    pieces = {piece for piece in map(str.strip, _PIECE_ENDS.split(text)) if len(piece) >= _SHORT}
    return min((_checksum(piece) for piece in pieces), default=_checksum(text))


def _checksum(text: str) -> int:
    return crc32(text.encode(errors="surrogatepass"))


class Dealer:
    """Takes note of every document of a source, then says which split each goes into.

    A repeated document counts as one, of the length of all its copies together: they all go into one split.
    """

    def __init__(self) -> None:
        self._index: dict[int, int] = {}  # by hash
        self._lengths, self._sketches, self._domains = array("Q"), array("I"), array("I")
        self._numbers: dict[str, int] = {}  # by domain

    def __len__(self) -> int:
        """Different documents noted."""
        return len(self._index)

    def note(self, digest: int, document: Document) -> None:
        """Take note of a document.

        Args:
            digest: its hash.
            document: its text is not kept.
        """
        index = self._index.setdefault(digest, len(self._index))
        if index < len(self._lengths):
            self._lengths[index] += len(document.text)
            return
        self._lengths.append(len(document.text))
        self._sketches.append(sketch(document.text))
        self._domains.append(self._numbers.setdefault(document.domain, len(self._numbers)))

    def deal(self, shares: Mapping[str, float]) -> dict[int, str]:
        """The split of every document, by hash.

        Args:
            shares: of the splits, in characters; they sum to 1.
        """
        lengths, sketches = np.array(self._lengths, dtype=np.int64), np.array(self._sketches, dtype=np.int64)
        domains = np.array(self._domains, dtype=np.int64)
        names = list(shares)
        splits = np.zeros(len(lengths), dtype=np.int64)
        for number in range(len(self._numbers)):
            members = np.flatnonzero(domains == number)
            dealt = deal_domain(lengths[members], sketches[members], shares)
            splits[members] = [names.index(split) for split in dealt]
        return {digest: names[split] for digest, split in zip(self._index, splits.tolist(), strict=True)}


def deal_domain(lengths: NDArray[np.int64], sketches: NDArray[np.int64], shares: Mapping[str, float]) -> list[str]:
    """The split of each document of one domain.

    Args:
        lengths: in characters (n,), above 0, in the order of the source.
        sketches: equal ones for near-copies (n,).
        shares: of the splits, in characters; they sum to 1.
    """
    held_out = {split: share for split, share in shares.items() if split != "train"}
    splits = ["train"] * len(lengths)
    if not held_out:
        return splits
    short = np.ones(len(lengths), dtype=np.bool_)
    if "train" in shares:
        short = lengths <= _limit(lengths, min(held_out.values()))
    wanted = sum(held_out.values())
    part = min(wanted * int(lengths.sum()) / int(lengths[short].sum()), max(wanted, MOST_HELD_OUT))
    order = [index for index in _side_by_side(lengths, sketches) if short[index]]
    done = dict.fromkeys(held_out, 0.0)
    for block in _held_out_blocks([int(lengths[index]) for index in order], part, _block_size(held_out)):
        _deal_block([order[place] for place in block], lengths, held_out, done, splits)
    return splits


def _limit(lengths: NDArray[np.int64], share: float) -> float:
    """The longest document that may be held out; never so short that less than half of the documents may."""
    return float(max(LARGE_PART * share * lengths.sum(), np.median(lengths)))


def _side_by_side(lengths: NDArray[np.int64], sketches: NDArray[np.int64]) -> list[int]:
    """Indices of the documents (n,), those alike side by side: long ones first, by the octave."""
    _, first, family = np.unique(sketches, return_index=True, return_inverse=True)
    octaves = np.floor(np.log2(lengths)).astype(np.int64)
    order: list[int] = np.lexsort((np.arange(len(lengths)), first[family], -octaves)).tolist()
    return order


def _block_size(held_out: Mapping[str, float]) -> int:
    """Neighbours to hold out together, so that each held-out split gets its share of them."""
    return min(MOST_AT_ONCE, round(sum(held_out.values()) / min(held_out.values())))


def _held_out_blocks(lengths: Sequence[int], part: float, size: int) -> list[range]:
    """Places of the documents to be held out, in blocks of `size`, at even distances in characters."""
    blocks, place, passed, taken = [], 0, 0, 0
    while place < len(lengths):
        block = range(place, min(place + size, len(lengths)))
        length = sum(lengths[index] for index in block)
        if part * (passed + length) - taken >= length / 2:
            blocks.append(block)
            passed, taken, place = passed + length, taken + length, block.stop
        else:
            passed, place = passed + lengths[place], place + 1
    return blocks


def _deal_block(
    block: list[int],
    lengths: NDArray[np.int64],
    held_out: Mapping[str, float],
    done: dict[str, float],
    splits: list[str],
) -> None:
    """Give each document of a block, the longest first, to the split that is furthest behind; no two to the same
    before each has had its turn."""
    waiting = dict(held_out)
    for index in sorted(block, key=lambda member: -int(lengths[member])):
        total = sum(done.values()) + int(lengths[index])
        share = sum(held_out.values())
        behind = {split: held_out[split] / share * total - done[split] for split in waiting}
        split = max(behind, key=behind.__getitem__)
        splits[index] = split
        done[split] += int(lengths[index])
        if len(block) == len(held_out):
            del waiting[split]
