"""Rows of a process, batches built ahead, and exact resume of both."""

import threading
import time

import numpy as np
import pytest

from acodm_env.corpus.loader import Loader
from acodm_env.corpus.sampler import MixtureSampler
from acodm_env.errors import ConfigError, DataError
from acodm_env.files import read_state, write_state

BATCH, LENGTH = 6, 32


def make_sampler(store, seed=3):
    return MixtureSampler(store, "train", BATCH, LENGTH, seed)


def mixtures(num, num_domains=3, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(num_domains), size=num)


def assert_same(one, other):
    assert (one.tokens == other.tokens).all()
    assert (one.domains == other.domains).all()
    assert (one.nth == other.nth).all()
    assert (one.drawn == other.drawn).all()
    assert (one.weights == other.weights).all()
    assert one.decision == other.decision


class SlowStore:
    """A store on a slow disk."""

    def __init__(self, store, seconds):
        self.inner, self.seconds = store, seconds

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def sequences(self, *args):
        time.sleep(self.seconds)
        return self.inner.sequences(*args)


class BrokenStore(SlowStore):
    """A store of which one batch cannot be read."""

    def sequences(self, *args):
        if self.seconds == 0:
            raise OSError("disk gone")
        self.seconds -= 1
        return self.inner.sequences(*args)


def test_without_prefetching_it_is_the_sampler(tiny_store):
    loader, sampler = Loader(make_sampler(tiny_store)), make_sampler(tiny_store)
    for step, weights in enumerate(mixtures(10)):
        batch = loader.draw(weights)
        assert_same(batch, sampler.draw(weights))
        assert (batch.weights == weights).all()
        assert batch.decision == step
        assert loader.pending.shape == (0, 3)


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_a_mixture_takes_effect_exactly_prefetch_batches_later(tiny_store, prefetch):
    """As if the mixtures had been delayed by hand, beginning with uniform ones."""
    given = mixtures(12)
    delayed = np.concatenate([np.full((prefetch, 3), 1 / 3), given])
    loader, sampler = Loader(make_sampler(tiny_store), prefetch=prefetch), make_sampler(tiny_store)
    for step, weights in enumerate(given):
        batch, expected = loader.draw(weights), sampler.draw(delayed[step])
        assert (batch.tokens == expected.tokens).all()
        assert (batch.weights == delayed[step]).all()
        assert batch.decision == (step - prefetch if step >= prefetch else -1)
        assert (batch.drawn == expected.drawn).all()
        assert (loader.pending == delayed[step + 1 : step + 1 + prefetch]).all()
    loader.close()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_batches_are_parts_of_the_single_processs(tiny_store, world, prefetch):
    single = Loader(make_sampler(tiny_store), prefetch=prefetch)
    ranks = [Loader(make_sampler(tiny_store), rank=rank, world=world, prefetch=prefetch) for rank in range(world)]
    for weights in mixtures(15):
        whole = single.draw(weights)
        for rank, loader in enumerate(ranks):
            assert_same(loader.draw(weights), whole.rows(slice(rank, None, world)))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("done", [0, 2, 9])
def test_resume_is_exact(tiny_store, tmp_path, prefetch, done):
    """What was built ahead is no part of the state, and building it again changes nothing."""
    given = mixtures(25)
    whole, first = (Loader(make_sampler(tiny_store), prefetch=prefetch) for _ in range(2))
    expected = [whole.draw(weights) for weights in given]
    for weights in given[:done]:
        first.draw(weights)
    time.sleep(0.01)  # the thread has run ahead by now
    write_state(tmp_path / "state.safetensors", first.state_dict())
    state = read_state(tmp_path / "state.safetensors")
    second = Loader(make_sampler(tiny_store, seed=99), prefetch=prefetch)
    for weights in given[:3]:
        second.draw(weights)  # and what it did before does not matter
    second.load_state_dict(state)
    for loader in (first, second):
        if loader is first:
            loader.close()  # goes on as well
        for step in range(done, 25):
            assert_same(loader.draw(given[step]), expected[step])


def test_saving_does_not_change_the_course(tiny_store):
    given = mixtures(10)
    one, other = (Loader(make_sampler(tiny_store), prefetch=2) for _ in range(2))
    for weights in given:
        one.state_dict()
        assert_same(one.draw(weights), other.draw(weights))


def test_changed_domains_and_prefetch_need_the_flag_and_start_with_uniform_batches(tiny_store):
    before = Loader(make_sampler(tiny_store), prefetch=2)
    for weights in mixtures(4):
        before.draw(weights)
    state = before.state_dict()
    with pytest.raises(DataError, match=r"prefetch=1: must be 2, .* --adapt"):
        Loader(make_sampler(tiny_store), prefetch=1).load_state_dict(state)
    fewer = tiny_store.subset(["verbs", "letters"])
    with pytest.raises(DataError, match="removed: numbers"):
        Loader(make_sampler(fewer), prefetch=2).load_state_dict(state)
    for store, prefetch in ((tiny_store, 1), (fewer, 2)):
        after = Loader(make_sampler(store), prefetch=prefetch)
        after.load_state_dict(state, adapt=True)
        num_domains = len(store.domains)
        decisions = []
        for weights in mixtures(3, num_domains):
            batch = after.draw(weights)
            decisions.append(batch.decision)
            if batch.decision < 0:
                assert (batch.weights == 1 / num_domains).all()
        assert decisions == [*[-1] * prefetch, *range(4, 7 - prefetch)]
        before_them = [state["sampler"]["cursors"][tiny_store.domains.index(name)] for name in store.domains]
        assert batch.drawn.sum() == sum(before_them) + 3 * BATCH


def test_a_slow_disk_no_longer_adds_to_the_step(tiny_store):
    """Reading and training take 20 ms each: one after the other 40 ms a step, at the same time 20."""
    seconds = {}
    for prefetch in (0, 2):
        loader = Loader(MixtureSampler(SlowStore(tiny_store, 0.02), "train", BATCH, LENGTH, 0), prefetch=prefetch)
        only_one = np.array([1.0, 0.0, 0.0])  # one read a batch, but for the uniform ones
        for _ in range(prefetch + 2):
            loader.draw(only_one)
        start = time.perf_counter()
        for _ in range(12):
            loader.draw(only_one)
            time.sleep(0.02)
        seconds[prefetch] = time.perf_counter() - start
        loader.close()
    assert seconds[2] < 0.75 * seconds[0]


def test_the_threads_trouble_is_raised_by_a_draw_and_by_every_one_after(tiny_store):
    loader = Loader(MixtureSampler(BrokenStore(tiny_store, 7), "train", 3, LENGTH, 0), prefetch=2)
    outcomes = []
    for _ in range(6):
        try:
            loader.draw(np.full(3, 1 / 3))
            outcomes.append("batch")
        except OSError as error:
            outcomes.append(str(error))
    first = outcomes.index("disk gone")
    assert first <= 2  # the third batch cannot be read; that is found out up to two draws before
    assert set(outcomes[first:]) == {"disk gone"}
    state = loader.state_dict()  # of the batches that were had, with as many mixtures waiting as ever
    loader.close()
    had, third = outcomes.count("batch"), np.full(3, 1 / 3)
    assert state["decisions"] == [-1, -1, 0, 1, 2][had : had + 2]
    whole, again = (Loader(MixtureSampler(tiny_store, "train", 3, LENGTH, 0), prefetch=2) for _ in range(2))
    expected = [whole.draw(third) for _ in range(6)]
    again.load_state_dict(state)
    for batch in expected[had:]:
        assert_same(again.draw(third), batch)


def test_a_wrong_mixture_is_refused_at_once_and_forgotten(tiny_store):
    loader, other = (Loader(make_sampler(tiny_store), prefetch=2) for _ in range(2))
    for weights in ([0.5, np.nan, 0.5], [1.0, 1.0], [-1.0, 1.0, 1.0]):
        with pytest.raises(ConfigError, match="weights="):
            loader.draw(np.array(weights))
    for weights in mixtures(5):
        assert_same(loader.draw(weights), other.draw(weights))


def test_the_callers_array_is_his_own(tiny_store):
    loader, other = (Loader(make_sampler(tiny_store), prefetch=1) for _ in range(2))
    weights = np.array([0.2, 0.3, 0.5])
    for _ in range(5):
        mine = weights.copy()
        batch = loader.draw(mine)
        mine[:] = 0.0
        assert_same(batch, other.draw(weights))


def test_close_ends_the_thread(tiny_store):
    loader = Loader(make_sampler(tiny_store), prefetch=2)
    loader.draw(np.full(3, 1 / 3))
    assert any(thread.name.startswith("acodm-loader") for thread in threading.enumerate())
    loader.close()
    assert not any(thread.name.startswith("acodm-loader") for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 2, "world": 2}, r"rank=2: must be in 0 … world − 1, with world=2"),
        ({"rank": -1}, "rank=-1"),
        ({"rank": 0, "world": 0}, "world=0"),
        ({"prefetch": -1}, "prefetch=-1: must be 0 or more batches"),
    ],
)
def test_bad_settings_are_refused(tiny_store, settings, message):
    with pytest.raises(ConfigError, match=message):
        Loader(make_sampler(tiny_store), **settings)
