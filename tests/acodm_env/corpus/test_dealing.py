"""Documents are dealt out so that validation and test are alike, whatever their lengths and however alike they are."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from acodm_env.corpus.document import Document
from acodm_env.corpus.preparation.dealing import Dealer, deal_domain, sketch
from acodm_env.corpus.preparation.prepare import Preparation, prepare
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.preparation.splits import assign, document_hash
from acodm_env.errors import DataError

SHARES = {"train": 0.9, "validation": 0.05, "test": 0.05}
WORDS = [f"{first}{second}" for first in ("re", "un", "de", "pre") for second in ("do", "light", "form", "view", "set")]


def copies(family, count):
    """Near-copies: twelve lines in common, one of their own."""
    rng = random.Random(family)
    common = [" ".join(rng.choices(WORDS, k=9)) for _ in range(12)]
    return ["\n".join([f"Copyright {number} of {family}, all rights reserved", *common]) for number in range(count)]


def dealt(texts, shares=SHARES):
    """The split of each text, all of one domain."""
    dealer = Dealer()
    for text in texts:
        dealer.note(document_hash(text), Document("a", text))
    splits = dealer.deal(shares)
    return [splits[document_hash(text)] for text in texts]


def chars(texts, splits):
    counts = Counter()
    for text, split in zip(texts, splits, strict=True):
        counts[split] += len(text)
    return counts


def test_near_copies_have_one_sketch_and_others_have_their_own():
    sketches = [[sketch(text) for text in copies(family, 20)] for family in ("first", "second", "third")]
    usual = [Counter(own).most_common(1)[0] for own in sketches]
    assert min(count for _, count in usual) >= 16
    assert len({value for value, _ in usual}) == 3
    assert sketch("short\nones\n") != sketch("short\none\n")  # nothing but short lines: the whole text counts
    assert sketch("\ud800") >= 0


def test_every_split_gets_its_share_of_each_family():
    families = {family: copies(family, 40) for family in ("first", "second", "third", "fourth")}
    texts = [text for family in families.values() for text in family]
    random.Random(0).shuffle(texts)
    splits = dict(zip(texts, dealt(texts), strict=True))
    for family in families.values():
        counts = Counter(splits[text] for text in family)
        assert counts["validation"] in (1, 2, 3)
        assert counts["test"] in (1, 2, 3)
        assert abs(counts["validation"] - counts["test"]) <= 1


def test_lengths_are_dealt_out_alike():
    rng = random.Random(1)
    texts = [f"{number} " + "x" * int(10 ** rng.uniform(1, 3.5)) for number in range(800)]
    splits = dealt(texts)
    held = {
        name: sorted(len(text) for text, split in zip(texts, splits, strict=True) if split == name) for name in SHARES
    }
    assert len(held["validation"]) == len(held["test"])
    ratios = np.array(held["validation"]) / np.array(held["test"])  # the nth longest of one over that of the other
    assert 0.5 < ratios.min() <= ratios.max() < 2
    assert np.median(ratios) == pytest.approx(1, abs=0.2)
    total = chars(texts, splits)
    assert total["validation"] / total.total() == pytest.approx(0.05, abs=0.005)
    assert total["test"] / total.total() == pytest.approx(0.05, abs=0.005)


def test_a_document_that_would_fill_a_quarter_of_a_held_out_split_goes_to_train():
    lengths = [1_000] * 100 + [3_000, 9_000, 50_000]
    share = 0.05 * sum(lengths)
    assert 1_000 < share / 4 < 3_000
    texts = [f"{number:04d}" + "x" * (length - 4) for number, length in enumerate(lengths)]
    splits = dealt(texts)
    assert splits[100:] == ["train"] * 3
    total = chars(texts, splits)
    assert total["validation"] == total["test"] == pytest.approx(share, abs=500)  # they get it from the others


def test_short_documents_are_not_all_held_out_where_nearly_all_text_is_in_long_ones():
    texts = [f"{number:03d}" + "x" * 17 for number in range(40)] + ["y" * 100_000, "z" * 100_000]
    counts = Counter(dealt(texts))
    assert counts == {"train": 22, "validation": 10, "test": 10}


def test_of_documents_of_one_length_none_is_too_long():
    assert Counter(dealt([f"number {i:02d}" for i in range(30)])) == {"train": 26, "validation": 2, "test": 2}


def test_neighbours_of_the_source_are_held_out_together():
    splits = deal_domain(np.full(40, 100), np.arange(40), SHARES)
    assert [place for place, split in enumerate(splits) if split != "train"] == [8, 9, 28, 29]


def test_unequal_shares_are_kept():
    splits = deal_domain(np.full(1_000, 100), np.arange(1_000), {"train": 0.9, "validation": 0.08, "test": 0.02})
    counts = Counter(splits)
    assert counts["validation"] == pytest.approx(80, abs=4)
    assert counts["test"] == pytest.approx(20, abs=4)
    assert Counter(deal_domain(np.full(100, 9), np.arange(100), {"train": 0.9, "test": 0.1})) == {
        "train": 90,
        "test": 10,
    }
    assert set(deal_domain(np.full(9, 9), np.arange(9), {"train": 1.0})) == {"train"}
    halves = Counter(deal_domain(np.array([500, 9, 9, 9]), np.arange(4), {"validation": 0.5, "test": 0.5}))
    assert halves == {"validation": 2, "test": 2}


def test_a_repeated_document_counts_with_all_its_copies_and_stays_in_one_split():
    often = "the same long line over and over"
    texts = [often] * 100 + [f"{number:03d} is a line of its own, and no other" for number in range(200)]
    splits = dealt(texts)
    assert set(splits[:100]) == {"train"}
    assert {"validation", "test"} <= set(splits[100:])


def make_source(path):
    rng = random.Random(2)
    texts = [text for family in range(12) for text in copies(family, 9)]
    texts += [f"{number} " + " ".join(rng.choices(WORDS, k=rng.randrange(5, 900))) for number in range(60)]
    rng.shuffle(texts)
    records = [{"text": text, "domain": "ab"[number % 2]} for number, text in enumerate(texts + texts[:7])]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Source(name=str(path), domain_field="domain")


def test_the_same_source_gives_the_same_splits_disjoint_by_text(tmp_path):
    preparation = Preparation(source=make_source(tmp_path / "a.jsonl"), tokenizer="train:260")
    first, second = (prepare(preparation, tmp_path / name) for name in "xy")
    assert first.fingerprint == second.fingerprint
    assigned = [(item.digest, item.split) for item in assign(preparation.inputs())]
    assert len(assigned) == 12 * 9 + 60 + 7
    assert len({digest for digest, _ in assigned}) == len(set(assigned)) == 12 * 9 + 60


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path):
    source = make_source(tmp_path / "a.jsonl")
    assignment = assign(Preparation(source=source).inputs())
    plan = assignment._plan

    def changed():
        planned = plan()
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write(json.dumps({"text": "written meanwhile", "domain": "a"}) + "\n")
        return planned

    assignment._plan = changed
    with pytest.raises(DataError, match=r"source=.*a\.jsonl: must not change while it is read"):
        list(assignment)
