"""Stores that are whole, cut short, edited, or not disjoint."""

import pickle
import shutil

import numpy as np
import pytest

from acodm_env.corpus.tokens import TokenStore, fingerprint, token_dtype
from acodm_env.errors import ConfigError, DataError
from acodm_env.files import read_json, sha256, write_json


@pytest.fixture
def copy(tiny_corpus, tmp_path):
    return shutil.copytree(tiny_corpus, tmp_path / "store")


def test_windows_are_the_flat_tokens(tiny_store):
    flat = tiny_store.tokens("letters", "train")
    index = tiny_store.domains.index("letters")
    rows = tiny_store.sequences("train", index, np.array([0, 2]), 32)
    assert rows.dtype == np.int64
    assert (rows == np.stack([flat[:32], flat[64:96]])).all()
    assert tiny_store.num_sequences("train", 32)[index] == len(flat) // 32 >= 40
    assert min(tiny_store.num_sequences("validation", 32) + tiny_store.num_sequences("test", 32)) >= 8


def test_documents_end_with_the_end_of_document_token(tiny_store):
    flat = tiny_store.tokens("verbs", "test")
    assert flat[-1] == tiny_store.end_of_document
    assert (flat == tiny_store.end_of_document).sum() == tiny_store.num_documents("test")[2]


def test_pickles_as_its_path(tiny_store):
    again = pickle.loads(pickle.dumps(tiny_store))
    assert again.fingerprint == tiny_store.fingerprint
    assert (again.tokens("verbs", "train") == tiny_store.tokens("verbs", "train")).all()


def test_dtype_follows_the_vocabulary():
    assert [token_dtype(size).name for size in (65536, 65537)] == ["uint16", "uint32"]


def test_a_domain_smaller_than_one_sequence_is_named(tiny_store):
    size = min(tiny_store.sizes_tokens("test"))
    with pytest.raises(DataError, match=rf"one sequence of {size + 1} tokens in the test split; it holds {size}"):
        tiny_store.num_sequences("test", size + 1)


def test_no_store(tmp_path):
    with pytest.raises(DataError, match=r"no corpus\.json"):
        TokenStore.open(tmp_path)


def test_cut_short(copy):
    file = next((copy / "train").glob("*.bin"))
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match=f"{file.name}.*cut short"):
        TokenStore.open(copy)


def test_edited_even_after_it_was_opened(copy):
    TokenStore.open(copy)
    file = next((copy / "validation").glob("*.bin"))
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file.name}.*edited"):
        TokenStore.open(copy)


def test_renamed_domain_breaks_the_fingerprint(copy):
    record = read_json(copy / "corpus.json")
    record["domains"][0]["name"] = "other"
    write_json(copy / "corpus.json", record)
    with pytest.raises(DataError, match="fingerprint"):
        TokenStore.open(copy)


def test_shared_documents_are_refused(copy):
    record = read_json(copy / "corpus.json")
    splits = record["domains"][0]["splits"]
    train, held = (copy / splits[name]["documents_file"] for name in ("train", "validation"))
    held.write_bytes(train.read_bytes()[: held.stat().st_size])
    splits["validation"]["documents_sha256"] = sha256(held)
    write_json(copy / "corpus.json", record | {"fingerprint": fingerprint(record)})
    with pytest.raises(DataError, match=r"validation also stand in train.*letters"):
        TokenStore.open(copy)


def test_a_subset_holds_its_domains_in_the_order_asked_for(tiny_store):
    chosen = ("verbs", "letters")
    part = tiny_store.subset(chosen)
    assert part.domains == chosen
    whole = [tiny_store.domains.index(name) for name in chosen]
    for split in ("train", "validation", "test"):
        assert part.sizes_tokens(split) == tuple(tiny_store.sizes_tokens(split)[index] for index in whole)
        for index, original in enumerate(whole):
            rows = part.sequences(split, index, np.array([0, 1]), 32)
            assert (rows == tiny_store.sequences(split, original, np.array([0, 1]), 32)).all()
    assert (part.tokens("verbs", "train") == tiny_store.tokens("verbs", "train")).all()
    assert tiny_store.domains != chosen  # the store itself is as it was
    with pytest.raises(ConfigError, match="domain='numbers'"):
        part.tokens("numbers", "train")


def test_a_subset_has_a_fingerprint_of_its_own(tiny_store):
    prints = [
        tiny_store.subset(names).fingerprint for names in (("verbs", "letters"), ("letters", "verbs"), ("verbs",))
    ]
    assert len({*prints, tiny_store.fingerprint}) == 4
    assert tiny_store.subset(("verbs", "letters")).fingerprint == prints[0]
    assert tiny_store.subset(tiny_store.domains).fingerprint == tiny_store.fingerprint


def test_a_subset_pickles_and_can_be_divided_again(tiny_store):
    part = tiny_store.subset(("verbs", "letters"))
    again = pickle.loads(pickle.dumps(part))
    assert (again.domains, again.fingerprint) == (part.domains, part.fingerprint)
    assert (again.tokens("letters", "test") == tiny_store.tokens("letters", "test")).all()
    assert part.subset(("letters",)).fingerprint == tiny_store.subset(("letters",)).fingerprint


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "domains=: must name at least one domain"),
        (("verbs", "verbs"), "domains=verbs,verbs: must name at least one domain, each once"),
        (("verbs", "number"), "domain='number': .*did you mean 'numbers'"),
    ],
)
def test_a_bad_subset_is_refused(tiny_store, names, message):
    with pytest.raises(ConfigError, match=message):
        tiny_store.subset(names)
