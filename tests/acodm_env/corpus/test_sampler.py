"""Composition, epochs and exact resume."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acodm_env.corpus.sampler import MixtureSampler, heldout
from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import DataError
from acodm_env.mixture import Composer
from acodm_env.pretrain.config import LMConfig
from acodm_env.pretrain.trainer import LMTrainer


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 8, 22]), st.integers(1, 40), st.integers(0, 2**31))
def test_constant_weights_err_below_one_sequence_and_two_over_any_window(num_domains, batch_size, seed):
    weights = np.random.default_rng(seed).dirichlet(np.full(num_domains, 0.5))
    composer = Composer(num_domains)
    counts = np.array([composer.compose(weights, batch_size) for _ in range(80)])
    assert (counts >= 0).all()
    assert (counts.sum(1) == batch_size).all()
    errors = np.cumsum(counts, 0) - np.outer(np.arange(1, 81), weights * batch_size)
    assert np.abs(errors).max() < 1 + 1e-6
    windows = errors[:, None] - errors[None]
    assert np.abs(windows).max() <= 2 + 1e-6


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 3, 8]), st.integers(0, 2**31))
def test_changing_weights_and_masks_keep_counts_whole(num_domains, seed):
    rng = np.random.default_rng(seed)
    composer = Composer(num_domains)
    for _ in range(50):
        masked = rng.random(num_domains) < 0.2
        masked[rng.integers(num_domains)] = False
        counts = composer.compose(rng.dirichlet(np.ones(num_domains)), 16, masked)
        assert (counts >= 0).all()
        assert counts.sum() == 16
        assert (counts[masked] == 0).all()


def test_ties_go_by_index_and_the_carry_follows():
    composer = Composer(3)
    thirds = np.full(3, 1 / 3)
    assert [composer.compose(thirds, 2).tolist() for _ in range(3)] == [[1, 1, 0], [1, 0, 1], [0, 1, 1]]


def test_a_mask_zeroes_the_carry():
    composer = Composer(2)
    composer.compose(np.array([0.25, 0.75]), 2)
    composer.compose(np.array([0.5, 0.5]), 2, np.array([True, False]))
    assert composer.carry.tolist() == [0.0, 0.0]


def test_no_sequence_twice_before_the_epoch_ends_and_a_new_order_after(tiny_store):
    size = tiny_store.num_sequences("train", 32)[0]
    sampler = MixtureSampler(tiny_store, "train", 7, 32, seed=3)
    only_first = np.array([1.0, 0.0, 0.0])
    rows = np.concatenate([sampler.draw(only_first).tokens for _ in range(2 * size // 7 + 1)])
    expected = tiny_store.sequences("train", 0, np.arange(size), 32)
    first, second = rows[:size], rows[size : 2 * size]
    for epoch in (first, second):
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, expected))
    assert (first != second).any()
    assert sampler.drawn.tolist() == [len(rows), 0, 0]
    assert sampler.epochs[0] == len(rows) / size


def test_resume_is_exact_whatever_the_new_seed(tiny_store):
    weights = np.array([0.2, 0.3, 0.5])
    whole = MixtureSampler(tiny_store, "train", 16, 32, seed=5)
    for _ in range(9):
        whole.draw(weights)
    resumed = MixtureSampler(tiny_store, "train", 16, 32, seed=99)
    resumed.load_state_dict(whole.state_dict())
    for _ in range(30):
        a, b = whole.draw(weights), resumed.draw(weights)
        assert (a.tokens == b.tokens).all()
        assert (a.domains == b.domains).all()


def test_the_draws_are_those_of_every_published_run(tiny_store):
    """The order, spelt out: numpy's permutation of each epoch, seeded by run, domain and epoch."""
    sampler = MixtureSampler(tiny_store, "train", 16, 32, seed=5)
    weights = np.array([0.2, 0.3, 0.5])
    composer, cursors = Composer(3), [0, 0, 0]
    for step in range(12):
        batch = sampler.draw(weights)
        counts = composer.compose(weights, 16)
        rows, nth = [], []
        for domain, count in enumerate(counts):
            for _ in range(count):
                epoch, position = divmod(cursors[domain], int(sampler.sizes[domain]))
                place = np.random.default_rng([5, domain, epoch]).permutation(sampler.sizes[domain])[position]
                rows.append(tiny_store.sequences("train", domain, np.array([place]), 32)[0])
                nth.append(cursors[domain])
                cursors[domain] += 1
        assert (batch.tokens == np.array(rows)).all()
        assert batch.nth.tolist() == nth
        assert batch.drawn.tolist() == cursors
        assert batch.counts.tolist() == counts.tolist()
        assert batch.weights.tolist() == weights.tolist()
        assert batch.decision == step


def test_a_draw_that_fails_leaves_the_sampler_where_it_was(tiny_store, monkeypatch):
    weights = np.array([0.2, 0.3, 0.5])
    sampler, other = (MixtureSampler(tiny_store, "train", 7, 32, seed=4) for _ in range(2))
    sampler.draw(weights)
    other.draw(weights)

    def fail(split, domain, *args):
        if domain == 1:
            raise KeyboardInterrupt
        return other.store.__class__.sequences(tiny_store, split, domain, *args)

    with monkeypatch.context() as patched:
        patched.setattr(tiny_store, "sequences", fail)
        with pytest.raises(KeyboardInterrupt):
            sampler.draw(weights)
    assert (sampler.draw(weights).tokens == other.draw(weights).tokens).all()


def test_rows_of_a_batch_by_hand(tiny_store):
    batch = MixtureSampler(tiny_store, "train", 4, 32, seed=0).draw(np.array([0.5, 0.25, 0.25]))
    part = batch.rows(slice(1, 3))
    assert (part.tokens == batch.tokens[1:3]).all()
    assert (part.domains.tolist(), part.nth.tolist()) == ([0, 1], [1, 0])
    assert (part.counts.tolist(), part.drawn.tolist()) == ([2, 1, 1], [2, 1, 1])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_share_one_batch_and_no_sequence_comes_twice_in_an_epoch(tiny_store, world):
    rng = np.random.default_rng(1)
    single = MixtureSampler(tiny_store, "train", 8, 32, seed=4)
    ranks = [MixtureSampler(tiny_store, "train", 8, 32, seed=4) for _ in range(world)]
    seen = [[] for _ in range(3)]
    while single.epochs.max() < 2:
        weights = rng.dirichlet(np.ones(3))
        whole = single.draw(weights)
        parts = [sampler.draw(weights, rows=slice(rank, None, world)) for rank, sampler in enumerate(ranks)]
        together = np.empty_like(whole.tokens)
        for rank, part in enumerate(parts):
            together[rank::world] = part.tokens
            assert (part.domains == whole.domains[rank::world]).all()
            assert (part.nth == whole.nth[rank::world]).all()
            assert (part.counts == whole.counts).all()
            assert (part.drawn == whole.drawn).all()
            for domain, nth, tokens in zip(part.domains, part.nth, part.tokens, strict=True):
                seen[domain].append((int(nth), bytes(tokens)))
        assert (together == whole.tokens).all()
    for domain, drawn in enumerate(seen):
        size = int(single.sizes[domain])
        for start in range(0, len(drawn) - size + 1, size):
            epoch = sorted(drawn)[start : start + size]
            assert [nth for nth, _ in epoch] == list(range(start, start + size))
            assert len({tokens for _, tokens in epoch}) == size
    assert all(sampler.state_dict()["cursors"] == single.state_dict()["cursors"] for sampler in ranks)


def test_a_run_can_change_its_world_size(tiny_store):
    weights = np.array([0.2, 0.3, 0.5])
    whole, before = (MixtureSampler(tiny_store, "train", 6, 32, seed=4) for _ in range(2))
    for _ in range(5):
        whole.draw(weights)
        before.draw(weights, rows=slice(0, None, 2))
    after = MixtureSampler(tiny_store, "train", 6, 32, seed=0)
    after.load_state_dict(before.state_dict())
    assert (after.draw(weights, rows=slice(1, None, 3)).tokens == whole.draw(weights).tokens[1::3]).all()


@pytest.mark.parametrize("then", ["verbs letters", "numbers verbs letters", "verbs numbers letters"])
@pytest.mark.parametrize("first", ["letters numbers verbs", "letters verbs"])
def test_domains_that_stay_neither_repeat_nor_skip_a_sequence(tiny_store, first, then):
    """Removed, added and reordered in mid-epoch: what was drawn before and after makes up one whole epoch."""
    drawn = {name: [] for name in tiny_store.domains}

    def draw(sampler):
        names = sampler.store.domains
        batch = sampler.draw(np.full(len(names), 1 / len(names)))
        for domain, tokens in zip(batch.domains, batch.tokens, strict=True):
            drawn[names[domain]].append(bytes(tokens))

    before = MixtureSampler(tiny_store.subset(first.split()), "train", 6, 32, seed=2)
    after = MixtureSampler(tiny_store.subset(then.split()), "train", 6, 32, seed=77)
    for _ in range(7):
        draw(before)
    after.load_state_dict(before.state_dict(), adapt=True)
    assert after.drawn.tolist() == [len(drawn[name]) for name in then.split()]
    while after.epochs.min() < 1:
        draw(after)
    for domain, name in enumerate(then.split()):
        size = int(after.sizes[domain])
        everything = tiny_store.sequences("train", tiny_store.domains.index(name), np.arange(size), 32)
        assert sorted(drawn[name][:size]) == sorted(map(bytes, everything))


def test_an_added_domain_never_takes_a_stream_that_was_used(tiny_store):
    """A domain that goes and comes back is a new one; its order is not the one of any domain before."""
    sampler = MixtureSampler(tiny_store, "train", 6, 32, seed=2)
    streams = [sampler.state_dict()["streams"]]
    for domains in (["letters", "numbers"], ["letters", "verbs"], ["numbers", "letters", "verbs"]):
        following = MixtureSampler(tiny_store.subset(domains), "train", 6, 32, seed=2)
        following.load_state_dict(sampler.state_dict(), adapt=True)
        sampler = following
        streams.append(sampler.state_dict()["streams"])
    assert streams == [[0, 1, 2], [0, 1], [0, 3], [4, 0, 3]]


def test_what_a_domain_is_owed_stays(tiny_store):
    sampler = MixtureSampler(tiny_store, "train", 3, 32, seed=2)
    sampler.draw(np.array([0.5, 0.3, 0.2]))
    carry = sampler.state_dict()["composer"]["carry"]
    adapted = MixtureSampler(tiny_store.subset(["verbs", "letters"]), "train", 3, 32, seed=2)
    adapted.load_state_dict(sampler.state_dict(), adapt=True)
    assert adapted.state_dict()["composer"]["carry"].tolist() == carry[[2, 0]].tolist()
    counts = np.array([adapted.draw(np.array([0.5, 0.5])).counts for _ in range(9)])
    assert (counts.sum(1) == 3).all()


def test_other_domains_are_refused_by_name_and_changed_content_even_with_the_flag(tiny_store):
    state = MixtureSampler(tiny_store, "train", 4, 32, seed=0).state_dict()
    for domains, detail in (
        (["letters", "verbs"], "removed: numbers"),
        (["verbs", "letters", "numbers"], "they were reordered"),
    ):
        with pytest.raises(DataError, match=rf"domains={','.join(domains)}: must be letters,.*{detail}; .* --adapt"):
            MixtureSampler(tiny_store.subset(domains), "train", 4, 32, seed=0).load_state_dict(state)
    smaller = MixtureSampler(tiny_store.subset(["letters"]), "train", 4, 32, seed=0).state_dict()
    with pytest.raises(DataError, match="added: numbers, verbs"):
        MixtureSampler(tiny_store, "train", 4, 32, seed=0).load_state_dict(smaller)
    digests = [state["digests"][0], "0" * 64, state["digests"][2]]
    for changed in (state | {"digests": digests}, state | {"sizes": [state["sizes"][0], 7, state["sizes"][2]]}):
        for adapt in (False, True):
            with pytest.raises(DataError, match=r"domain=numbers: must hold what it held .* another name"):
                MixtureSampler(tiny_store, "train", 4, 32, seed=0).load_state_dict(changed, adapt)


def test_state_of_another_sequence_length_is_refused(tiny_store):
    state = MixtureSampler(tiny_store, "train", 4, 32, seed=0).state_dict()
    with pytest.raises(DataError, match="another sequence length"):
        MixtureSampler(tiny_store, "train", 4, 16, seed=0).load_state_dict(state)


def sparse_store(folder, sequences, length, shard_tokens=1 << 27):
    """A store of zeros that takes no room on the disk: `sequences` of `length` tokens per domain."""
    domains = []
    for domain, count in enumerate(sequences):
        splits = {}
        for split in ("train", "validation", "test"):
            left, shards = count * length if split == "train" else 100 * length, []
            while left > 0:
                tokens, name = min(left, shard_tokens), f"{split}-{domain}-{len(shards)}.bin"
                with (folder / name).open("wb") as file:
                    file.truncate(2 * tokens)
                shards.append({"tokens": tokens, "file": name, "sha256": name})
                left -= tokens
            tokens = sum(shard["tokens"] for shard in shards)
            splits[split] = {"tokens": tokens, "shards": shards, "documents": 1, "documents_sha256": ""}
        domains.append({"name": f"domain-{domain}", "splits": splits})
    tokenizer = {"sha256": "", "vocab_size": 4096, "end_of_document": 0}
    return TokenStore(folder, {"tokenizer": tokenizer, "domains": domains, "fingerprint": "", "dtype": "uint16"})


def median_seconds(sampler, steps=200):
    weights = np.random.default_rng(0).dirichlet(np.ones(len(sampler.sizes)), size=steps)
    seconds = []
    for row in weights:
        start = time.perf_counter()
        sampler.draw(row)
        seconds.append(time.perf_counter() - start)
    return np.median(seconds)


@pytest.mark.slow
def test_a_draw_takes_no_longer_from_a_billion_sequences_and_one_percent_of_a_small_step(tmp_path):
    """1.28e11 tokens in 954 shards, and the same domains with 1e4 sequences each."""
    folders = [tmp_path / "large", tmp_path / "little"]
    for folder in folders:
        folder.mkdir()
    large = sparse_store(folders[0], [10**9, *[10**6] * 7], 128)
    assert sum(large.sizes_tokens("train")) > 1e11
    little = sparse_store(folders[1], [10**4] * 8, 128)
    seconds = [median_seconds(MixtureSampler(store, "train", 16, 128, seed=0)) for store in (large, little)]
    trainer = LMTrainer(LMConfig(model="small", batch_size=16, sequence_length=128), large)
    trainer.reset(np.random.default_rng(0))
    steps = []
    for _ in range(12):
        start = time.perf_counter()
        trainer.step(np.full(8, 1 / 8))
        steps.append(time.perf_counter() - start)
    assert seconds[0] < 4 * seconds[1]
    assert seconds[0] < 0.01 * np.median(steps)


def test_heldout_is_fixed_distinct_and_short_where_the_domain_is(tiny_store):
    tokens, domains = heldout(tiny_store, "test", 32, 4, seed=0)
    assert np.bincount(domains).tolist() == [4, 4, 4]
    assert len(set(map(bytes, tokens))) == 12
    assert (heldout(tiny_store, "test", 32, 4, seed=0)[0] == tokens).all()
    all_of_them = heldout(tiny_store, "test", 32, 10**6, seed=0)[1]
    assert np.bincount(all_of_them).tolist() == list(tiny_store.num_sequences("test", 32))
