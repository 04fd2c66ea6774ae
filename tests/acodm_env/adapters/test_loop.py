"""`MixedData`: what the mixer is told, and that it is asked and told at the right time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from acodm_env.adapters.loop import MixedData
from acodm_env.agents.baselines import make_mixer
from acodm_env.corpus.affinity import Affinity
from acodm_env.corpus.loader import Loader
from acodm_env.corpus.sampler import MixtureSampler
from acodm_env.errors import ConfigError, DataError
from acodm_env.files import read_state, write_state
from acodm_env.trainer import Mixer

SETTINGS = {"batch_size": 6, "sequence_length": 32, "horizon": 20, "seed": 3}


class ByLoss(Mixer):
    """In proportion to the last losses."""

    name = "by-loss"
    needs = frozenset({"losses"})

    def start(self, info):
        super().start(info)
        self.losses, self.seen = np.arange(1.0, info.num_domains + 1), []

    def weights(self):
        return self.losses / self.losses.sum()

    def update(self, stats):
        self.seen.append(stats)
        drawn = np.isfinite(stats.losses)
        self.losses[drawn] = stats.losses[drawn]

    def state_dict(self):
        return {"losses": self.losses.copy()}

    def load_state_dict(self, state):
        self.losses = np.array(state["losses"])


def losses_of(batch):
    """Made-up losses (B,) of the rows."""
    return 1.0 + batch.domains + 0.01 * (batch.tokens.sum(1) % 100)


def test_statistics_of_a_step_by_hand(tiny_store):
    data = MixedData(tiny_store, make_mixer("static", weights=[0.5, 0.5, 0.0]), **SETTINGS)
    data.draw()
    data.report(np.zeros(6))
    batch = data.draw()
    stats = data.report(torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 60.0], requires_grad=True))
    assert (stats.step, stats.tokens, stats.decision, stats.mixture_age) == (2, 2 * 6 * 32, 1, 0.0)
    assert stats.counts.tolist() == [3, 3, 0]
    assert stats.losses[:2].tolist() == [2.0, 30.0]
    assert np.isnan(stats.losses[2])
    assert stats.loss == 16.0
    assert stats.loss_tokens.tolist() == [93, 93, 0]
    assert stats.requested.tolist() == [0.5, 0.5, 0.0]
    assert stats.drawn.tolist() == [6, 6, 0] == batch.drawn.tolist()
    assert stats.epochs.tolist() == (stats.drawn / tiny_store.num_sequences("train", 32)).tolist()
    assert not stats.diverged
    data.draw()
    assert data.report(np.array([1.0, np.nan, 1.0, 1.0, 1.0, 1.0])).diverged


@pytest.mark.parametrize("prefetch", [0, 2])
def test_what_was_reported_composes_the_next_batch_or_prefetch_later(tiny_store, prefetch):
    data = MixedData(tiny_store, ByLoss(), prefetch=prefetch, **SETTINGS)
    given, requested = [], []
    for _ in range(10):
        given.append(data.mixer.weights())
        stats = data.report(losses_of(data.draw()))
        requested.append(stats.requested)
        assert stats.mixture_age == prefetch == data.info.lag
        assert (stats.pending is None) == (prefetch == 0)
    expected = [*[np.full(3, 1 / 3)] * prefetch, *given][:10]
    assert np.array_equal(requested, expected)
    assert not np.array_equal(given[0], given[-1])
    data.loader.close()


def test_the_age_is_that_of_the_mixture_that_composed_the_batch(tiny_store):
    """Whatever the run was told of its lag."""
    data = MixedData(tiny_store, ByLoss(), **SETTINGS)
    data.loader = Loader(data.loader.sampler, prefetch=2)
    seen = [data.report(losses_of(data.draw())) for _ in range(5)]
    assert [stats.decision for stats in seen] == [-1, -1, 0, 1, 2]
    assert [stats.mixture_age for stats in seen[2:]] == [2.0, 2.0, 2.0]
    data.loader.close()


def test_a_state_between_draw_and_report_would_lose_a_batch(tiny_store):
    data = MixedData(tiny_store, ByLoss(), **SETTINGS)
    before = data.state_dict()
    batch = data.draw()
    with pytest.raises(RuntimeError, match=r"state_dict\(\) needs the losses .* call report\(\) first"):
        data.state_dict()
    data.report(losses_of(batch))
    assert data.state_dict()["steps"] == before["steps"] + 1


class Meeting:
    """Sums over processes, played by threads."""

    def __init__(self, world):
        self.values, self.barrier = [None] * world, threading.Barrier(world, timeout=10)

    def add_up(self, rank, values):
        self.values[rank] = values
        self.barrier.wait()
        total = sum(self.values)
        self.barrier.wait()
        return total


@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_add_up_are_one_and_the_first_decides(tiny_store, world):
    meeting = Meeting(world)

    def run(rank):
        add_up = partial(meeting.add_up, rank)
        data = MixedData(tiny_store, ByLoss(), rank=rank, world=world, add_up=add_up, **SETTINGS)
        if rank:
            data.mixer.weights = None  # is never asked
        return [data.report(losses_of(data.draw())) for _ in range(8)]

    with ThreadPoolExecutor(world) as pool:
        ranks = list(pool.map(run, range(world)))
    alone = MixedData(tiny_store, ByLoss(), **SETTINGS)
    for step in range(8):
        expected = alone.report(losses_of(alone.draw()))
        for stats in ranks:
            assert stats[step].counts.tolist() == expected.counts.tolist()
            assert (stats[step].losses == ranks[0][step].losses)[expected.counts > 0].all()
            np.testing.assert_allclose(stats[step].losses, expected.losses, rtol=1e-12)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_is_exact(tiny_store, tmp_path, prefetch):
    whole, first = (MixedData(tiny_store, ByLoss(), prefetch=prefetch, **SETTINGS) for _ in range(2))
    seen = [whole.report(losses_of(whole.draw())) for _ in range(12)]
    for _ in range(5):
        first.report(losses_of(first.draw()))
    write_state(tmp_path / "state.safetensors", first.state_dict())
    second = MixedData(tiny_store, ByLoss(), prefetch=prefetch, **(SETTINGS | {"seed": 8}))
    second.load_state_dict(read_state(tmp_path / "state.safetensors"))
    for expected in seen[5:]:
        stats = second.report(losses_of(second.draw()))
        assert stats.step == expected.step
        assert (stats.requested == expected.requested).all()
        assert stats.loss == expected.loss
        assert stats.decision == expected.decision


def test_resume_with_other_domains_or_another_mixer(tiny_store):
    before = MixedData(tiny_store, ByLoss(), **SETTINGS)
    for _ in range(5):
        before.report(losses_of(before.draw()))
    state = before.state_dict()
    other_mixer = MixedData(tiny_store, make_mixer("uniform"), **SETTINGS)
    with pytest.raises(DataError, match=r"mixer=uniform: must be by-loss, .* --adapt"):
        other_mixer.load_state_dict(state)
    other_mixer.load_state_dict(state, adapt=True)
    fewer = MixedData(tiny_store.subset(["verbs", "letters"]), ByLoss(), **SETTINGS)
    with pytest.raises(DataError, match="removed: numbers"):
        fewer.load_state_dict(state)
    fewer.load_state_dict(state, adapt=True)
    assert fewer.mixer.losses.tolist() == [1.0, 2.0]  # anew
    fewer.report(losses_of(fewer.draw()))
    assert fewer.mixer.seen[-1].step == 6
    assert fewer.mixer.seen[-1].drawn.sum() == before.loader.sampler.drawn[[0, 2]].sum() + 6


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ("eg-interaction", "mixer=eg-interaction: needs gram; MixedData provides only losses"),
        ("sheared-llama", "mixer=sheared-llama: needs validation; MixedData provides only losses"),
        ("regmix", "mixer=regmix: needs runs that are made before this one"),
    ],
)
def test_a_mixer_that_needs_more_is_refused_by_name(tiny_store, mixer, message):
    with pytest.raises(ConfigError, match=message):
        MixedData(tiny_store, make_mixer(mixer), **SETTINGS)


def test_bad_input_is_refused(tiny_store):
    uniform = make_mixer("uniform")
    for change, message in (
        ({"horizon": 0}, "horizon=0: must be at least 1"),
        ({"decision_every": 0}, "decision_every=0"),
        ({"world": 2}, "world=2: needs add_up"),
        ({"prefetch": -1}, "prefetch=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            MixedData(tiny_store, uniform, **(SETTINGS | change))
    data = MixedData(tiny_store, uniform, **SETTINGS)
    with pytest.raises(RuntimeError, match=r"call draw\(\) first"):
        data.report(np.zeros(6))
    data.draw()
    with pytest.raises(ConfigError, match=r"row_losses: must hold one mean loss .* 6 rows; got .*5"):
        data.report(np.zeros(5))


def test_draws_are_the_samplers(tiny_store):
    data, sampler = (
        MixedData(tiny_store, make_mixer("uniform"), **SETTINGS),
        MixtureSampler(tiny_store, "train", 6, 32, 3),
    )
    for _ in range(5):
        assert (data.draw().tokens == sampler.draw(np.full(3, 1 / 3)).tokens).all()


def test_what_the_text_tells_before_the_run_is_there(tiny_store):
    """Affinities and leverages, for a policy that reads them, are those of any other run on the corpus."""
    given = MixedData(tiny_store, make_mixer("uniform"), **SETTINGS).info.affinity
    known = Affinity(tiny_store, tiny_store, 32)
    np.testing.assert_allclose(given.leverage(), known.leverage())
    np.testing.assert_allclose(given.matrix(), known.matrix())
