"""A store whose domains are cut is as one that holds only so many sequences to train on."""

import pickle

import numpy as np
import pytest

from acodm_env.corpus.preparation.prepare import Preparation, prepare
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.sampler import MixtureSampler
from acodm_env.errors import ConfigError, DataError


@pytest.fixture
def cut(tiny_store):
    return tiny_store.cut({"numbers": 7}, 32)


def test_a_cut_keeps_sequences_evenly_spaced_over_the_domain(tiny_store, cut):
    index = tiny_store.domains.index("numbers")
    whole = tiny_store.num_sequences("train", 32)
    assert cut.num_sequences("train", 32) == (whole[0], 7, whole[2])
    kept = cut.sequences("train", index, np.arange(7), 32)
    places = [number * whole[index] // 7 for number in range(7)]
    assert len(set(np.diff(places))) <= 2
    assert (kept == tiny_store.sequences("train", index, np.array(places), 32)).all()
    assert (cut.tokens("numbers", "train") == kept.reshape(-1)).all()
    assert cut.tokens("numbers", "train").dtype == tiny_store.dtype
    assert not cut.tokens("numbers", "train").flags.writeable
    assert cut.sizes_tokens("train")[index] == 7 * 32
    with pytest.raises(IndexError):
        cut.sequences("train", index, np.array([7]), 32)


def test_a_cut_leaves_held_out_text_and_other_domains_as_they_are(tiny_store, cut):
    for split in ("validation", "test"):
        assert cut.sizes_tokens(split) == tiny_store.sizes_tokens(split)
        assert cut.num_sequences(split, 16) == tiny_store.num_sequences(split, 16)
    assert (cut.tokens("letters", "train") == tiny_store.tokens("letters", "train")).all()
    assert cut.domain_digest("letters") == tiny_store.domain_digest("letters")
    assert tiny_store.num_sequences("train", 32)[1] > 7  # the store itself is as it was
    cut.verify()


def test_every_cut_has_a_fingerprint_and_a_digest_of_its_own(tiny_store, cut):
    stores = [tiny_store, cut, tiny_store.cut({"numbers": 8}, 32), tiny_store.cut({"verbs": 7}, 32)]
    stores.append(tiny_store.cut({"numbers": 7}, 16))
    assert len({store.fingerprint for store in stores}) == 5
    assert len({store.domain_digest("numbers") for store in stores}) == 4  # one was cut elsewhere
    assert tiny_store.cut({"numbers": 7}, 32).fingerprint == cut.fingerprint
    assert tiny_store.cut({"numbers": 9}, 32).cut({"numbers": 7}, 32).fingerprint == cut.fingerprint
    assert tiny_store.cut({}, 32).fingerprint == tiny_store.fingerprint


def test_a_cut_pickles_and_can_be_divided(tiny_store, cut):
    for store in (
        cut,
        cut.subset(("verbs", "numbers")),
        tiny_store.subset(("verbs", "numbers")).cut({"numbers": 7}, 32),
    ):
        again = pickle.loads(pickle.dumps(store))
        assert (again.domains, again.fingerprint) == (store.domains, store.fingerprint)
        assert again.num_sequences("train", 32) == store.num_sequences("train", 32)
        assert again.num_sequences("train", 32)[store.domains.index("numbers")] == 7
    assert cut.subset(("letters",)).fingerprint == tiny_store.subset(("letters",)).fingerprint


def test_a_cut_of_many_shards(tiny_store, tmp_path):
    source = Source(**tiny_store.record["preparation"]["source"])
    preparation = Preparation(source=source, splits=(0.8, 0.1, 0.1), tokenizer="train:300", shard_bytes=2_000)
    store = prepare(preparation, tmp_path / "sharded")
    whole = store.num_sequences("train", 32)[0]
    kept = store.cut({"letters": 50}, 32).sequences("train", 0, np.array([49, 0, 3]), 32)
    places = np.array([49 * whole // 50, 0, 3 * whole // 50])
    assert (kept == store.sequences("train", 0, places, 32)).all()


def test_a_sampler_repeats_what_is_left(tiny_store, cut):
    sampler = MixtureSampler(cut, "train", 14, 32, seed=0)
    batch = sampler.draw(np.array([0.0, 1.0, 0.0]))
    assert sampler.epochs.tolist() == [0, 2, 0]
    rows, counts = np.unique(batch.tokens, axis=0, return_counts=True)
    assert counts.tolist() == [2] * 7
    assert {tuple(row) for row in rows} == {tuple(row) for row in cut.sequences("train", 1, np.arange(7), 32)}
    with pytest.raises(DataError, match=r"domain=numbers: must hold what it held"):
        MixtureSampler(tiny_store, "train", 14, 32, seed=0).load_state_dict(sampler.state_dict())


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ({"number": 7}, "domain='number': .*did you mean 'numbers'"),
        ({"numbers": 0}, "cut=numbers=0: must be at least 1 sequence"),
        ({"letters": 3, "numbers": 100_000}, r"cut=numbers=100000: must be at most \d+, the sequences"),
    ],
)
def test_a_bad_cut_is_refused(tiny_store, sequences, message):
    with pytest.raises(ConfigError, match=message):
        tiny_store.cut(sequences, 32)


def test_sequences_of_another_length_are_refused(cut):
    message = "sequence_length=16: must be 32 tokens, for which the train split of domain 'numbers' was cut"
    with pytest.raises(ConfigError, match=message):
        cut.num_sequences("train", 16)
    with pytest.raises(ConfigError, match=message):
        cut.sequences("train", 1, np.array([0]), 16)
