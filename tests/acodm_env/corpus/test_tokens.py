"""Stores that are whole, cut short, edited, or not disjoint."""

import hashlib
import os
import pickle
import shutil

import numpy as np
import pytest

from acodm_env.corpus import integrity, shards, tokens
from acodm_env.corpus.preparation.prepare import Preparation, prepare
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.tokens import TokenStore, fingerprint, token_dtype
from acodm_env.errors import ConfigError, DataError
from acodm_env.files import read_json, sha256, write_json


@pytest.fixture
def copy(tiny_corpus, tmp_path):
    return shutil.copytree(tiny_corpus, tmp_path / "store")


@pytest.fixture
def sharded(tiny_corpus, tmp_path):
    """The tiny corpus in shards of 1,000 tokens, and as it is."""
    whole = TokenStore.open(tiny_corpus)
    record = whole.record["preparation"]
    source = Source(**record["source"])
    preparation = Preparation(source=source, splits=tuple(record["splits"]), tokenizer="train:300", shard_bytes=2_000)
    return prepare(preparation, tmp_path / "sharded"), whole


def test_shards_are_cut_exactly_and_join_to_the_stream(sharded):
    store, whole = sharded
    for index, domain in enumerate(store.domains):
        for split in ("train", "validation", "test"):
            shards = store.record["domains"][index]["splits"][split]["shards"]
            assert {shard["tokens"] for shard in shards[:-1]} <= {1_000}
            assert 0 < shards[-1]["tokens"] <= 1_000
            assert (store.tokens(domain, split) == whole.tokens(domain, split)).all()
            assert not store.tokens(domain, split).flags.writeable
    assert len(store.record["domains"][0]["splits"]["train"]["shards"]) > 5


@pytest.mark.parametrize("length", [1, 32, 64, 300, 1_000])
def test_sequences_of_many_shards_are_those_of_each_in_turn(sharded, length):
    store, whole = sharded
    for index, domain in enumerate(store.domains):
        flat = whole.tokens(domain, "train")
        shards = [flat[start : start + 1_000] for start in range(0, len(flat), 1_000)]
        slow = [shard[i : i + length] for shard in shards for i in range(0, len(shard) - length + 1, length)]
        assert store.num_sequences("train", length)[index] == len(slow)
        indices = np.random.default_rng(0).integers(len(slow), size=40)
        rows = store.sequences("train", index, indices, length)
        assert rows.dtype == np.int64
        assert (rows == np.stack([slow[i] for i in indices])).all()
        assert store.sequences("train", index, indices[:0], length).shape == (0, length)
        with pytest.raises(IndexError):
            store.sequences("train", index, np.array([0, len(slow)]), length)


def test_a_sequence_longer_than_every_shard_is_refused(sharded):
    with pytest.raises(DataError, match=r"one sequence of 1001 tokens in the train split; it holds 1000"):
        sharded[0].num_sequences("train", 1_001)


def test_a_domains_digest_is_that_of_its_train_tokens_and_the_tokenizer(sharded):
    store, whole = sharded
    digests = [whole.domain_digest(name) for name in whole.domains]
    assert len(set(digests)) == 3
    assert whole.subset(("verbs",)).domain_digest("verbs") == digests[2]
    assert store.domain_digest("verbs") != digests[2]  # other shards hold other sequences
    sums = "\0".join(
        [
            whole.record["tokenizer"]["sha256"],
            whole.record["domains"][0]["splits"]["train"]["shards"][0]["sha256"],
        ]
    )
    assert digests[0] == hashlib.sha256(sums.encode()).hexdigest()
    with pytest.raises(ConfigError, match=r"domain='verb'.*did you mean 'verbs'"):
        whole.domain_digest("verb")


def test_a_missing_shard_is_named_with_its_domain(copy):
    file = next((copy / "train").glob("*letters*.bin"))
    file.unlink()
    with pytest.raises(DataError, match=rf"{file.name}: must exist.*domain 'letters', train is missing; copy it from"):
        TokenStore.open(copy)


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_of_a_large_store_opening_compares_the_edges_and_verifying_all(copy, monkeypatch):
    monkeypatch.setattr(tokens, "WHOLE_BYTES", 0)
    monkeypatch.setattr("acodm_env.corpus.shards.edges_sha256.__defaults__", (8,))
    record = read_json(copy / "corpus.json")
    for entry in record["domains"]:
        for split in entry["splits"].values():
            for shard in split["shards"]:
                shard["edges_sha256"] = shards.edges_sha256(copy / shard["file"])
    write_json(copy / "corpus.json", record)
    TokenStore.open(copy).verify()
    file = copy / record["domains"][1]["splits"]["train"]["shards"][0]["file"]
    middle = file.stat().st_size // 2
    flip(file, middle)
    store = TokenStore.open(copy)
    with pytest.raises(DataError, match=rf"{file.name}: must have SHA-256.*domain 'numbers', train was edited"):
        store.verify()
    flip(file, middle)
    flip(file, -1)
    with pytest.raises(DataError, match=rf"{file.name}: must have SHA-256"):
        TokenStore.open(copy)


def test_the_edges_of_a_short_file_are_all_of_it(tmp_path):
    for size in (0, 5, 8, 11, 16, 40):
        content = bytes(range(size))
        (tmp_path / "file").write_bytes(content)
        assert shards.edges_sha256(tmp_path / "file", 8) == hashlib.sha256(content[:8] + content[8:][-8:]).hexdigest()


def test_an_older_format_is_refused(copy):
    record = read_json(copy / "corpus.json")
    write_json(copy / "corpus.json", record | {"format_version": 1})
    with pytest.raises(DataError, match=r"must be of format version 2; .*prepare it again"):
        TokenStore.open(copy)


def test_a_shard_struck_from_the_record_is_noticed(copy):
    record = read_json(copy / "corpus.json")
    record["domains"][0]["splits"]["train"]["shards"].pop()
    write_json(copy / "corpus.json", record)
    with pytest.raises(DataError, match=r"shards of domain 'letters', train do not hold"):
        TokenStore.open(copy)


def test_shared_documents_are_counted_in_slices(monkeypatch, tmp_path):
    monkeypatch.setattr(integrity, "_SLICE", 3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        hashes = {
            ("train", 0): rng.integers(40, size=7).astype(np.uint64),
            ("train", 1): rng.integers(40, size=1).astype(np.uint64),
            ("validation", 0): rng.integers(40, size=10).astype(np.uint64),
            ("validation", 1): rng.integers(40, size=4).astype(np.uint64),
            ("test", 0): np.empty(0, dtype=np.uint64),
            ("test", 1): np.array([100], dtype=np.uint64),
        }
        train = np.concatenate([hashes["train", 0], hashes["train", 1]])
        shared = [int(np.isin(hashes["validation", index], train).sum()) for index in (0, 1)]
        by_domain = ", ".join(f"{name} \\({number}\\)" for name, number in zip("ab", shared, strict=True) if number)
        assert sum(shared) > 0
        message = f"; {sum(shared)} documents of validation also stand in train, by domain: {by_domain};"
        with pytest.raises(DataError, match=message):
            integrity.check_disjoint(tmp_path, ("a", "b"), lambda split, index, own=hashes: own[split, index])


def test_more_shards_than_a_process_may_hold_open(tiny_store, tmp_path):
    import resource

    source = Source(**tiny_store.record["preparation"]["source"])
    settings = {"splits": (0.8, 0.1, 0.1), "tokenizer": "train:300", "shard_bytes": 64}
    store = prepare(Preparation(source=source, **settings), tmp_path / "many")
    counts = [len(entry["splits"]["train"]["shards"]) for entry in store.record["domains"]]
    assert sum(counts) > 4 * tokens.MAX_MAPS
    tokens._mapped.cache_clear()
    lowest = os.dup(0)
    os.close(lowest)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + tokens.MAX_MAPS + 16, hard))
    try:
        again = TokenStore.open(store.path)
        again.verify()
        for index, domain in enumerate(store.domains):
            indices = np.random.default_rng(0).permutation(again.num_sequences("train", 32)[index])
            rows = again.sequences("train", index, indices, 32)
            flat = tiny_store.tokens(domain, "train")
            assert (rows == flat[: len(indices) * 32].reshape(-1, 32)[indices]).all()
            assert (again.tokens(domain, "train") == flat).all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert tokens._mapped.cache_info().currsize == tokens.MAX_MAPS


def test_a_store_that_replaces_another_at_its_path_is_read_anew(tiny_store, tmp_path):
    shutil.copytree(tiny_store.path, tmp_path / "store")
    before = TokenStore.open(tmp_path / "store").tokens("verbs", "train")[:50].copy()
    shutil.rmtree(tmp_path / "store")
    source = Source(**tiny_store.record["preparation"]["source"])
    after = prepare(Preparation(source=source, splits=(0.7, 0.2, 0.1), tokenizer="train:280"), tmp_path / "store")
    assert (after.tokens("verbs", "train")[:50] != before).any()
    file = after.path / after.record["domains"][2]["splits"]["train"]["shards"][0]["file"]
    assert (after.tokens("verbs", "train") == np.fromfile(file, dtype=after.dtype)).all()


def test_an_edited_tokenizer_is_refused_however_large_the_store(copy, monkeypatch):
    monkeypatch.setattr(tokens, "WHOLE_BYTES", 0)
    flip(copy / "tokenizer.json", 1_000)
    with pytest.raises(DataError, match=r"tokenizer\.json: must have SHA-256.*the tokenizer was edited"):
        TokenStore.open(copy)


def test_sequences_are_the_flat_tokens(tiny_store):
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
