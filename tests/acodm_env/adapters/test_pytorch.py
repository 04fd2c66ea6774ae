"""`MixtureDataset` through torch's DataLoader and through Accelerate: when weights take effect, and resume."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from acodm_env.adapters.pytorch import MixtureDataset
from acodm_env.corpus.sampler import MixtureSampler
from acodm_env.errors import ConfigError, DataError

LENGTH = 32


def make_dataset(store, **changes):
    return MixtureDataset(store, **({"batch_size": 6, "sequence_length": LENGTH, "seed": 3} | changes))


def loader_of(dataset, wrapped):
    loader = DataLoader(dataset, batch_size=None)
    if not wrapped:
        return loader
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(loader)


@pytest.mark.parametrize(("prefetch", "wrapped", "lag"), [(0, False, 0), (2, False, 2), (0, True, 1), (2, True, 3)])
def test_weights_take_effect_as_many_batches_late_as_documented(tiny_store, prefetch, wrapped, lag):
    """One-hot weights are visible in the batch that they compose."""
    dataset = make_dataset(tiny_store, prefetch=prefetch)
    got = []
    for step, batch in enumerate(itertools.islice(loader_of(dataset, wrapped), 12)):
        got.append(set(batch["domains"].tolist()))
        dataset.set_weights(np.eye(3)[(step + 1) % 3])  # for batch step + 1
    for step in range(lag + 1, 12):
        assert got[step] == {(step - lag) % 3}


def test_batches_are_the_samplers(tiny_store):
    dataset = make_dataset(tiny_store, weights={"verbs": 1, "letters": 2, "numbers": 1})
    sampler = MixtureSampler(tiny_store, "train", 6, LENGTH, seed=3)
    for batch in itertools.islice(loader_of(dataset, wrapped=False), 5):
        expected = sampler.draw(np.array([0.5, 0.25, 0.25]))
        assert (batch["input_ids"].numpy() == expected.tokens).all()
        assert (batch["labels"][:, 1:] == batch["input_ids"][:, 1:]).all()
        assert (batch["labels"][:, 0] == -100).all()
        assert batch["domains"].tolist() == expected.domains.tolist()


def test_processes_share_one_batch(tiny_store):
    whole = next(iter(make_dataset(tiny_store)))["input_ids"]
    for rank in range(2):
        assert torch.equal(next(iter(make_dataset(tiny_store, rank=rank, world=2)))["input_ids"], whole[rank::2])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_is_exact(tiny_store, prefetch):
    weights = np.random.default_rng(0).dirichlet(np.ones(3), size=12)

    def draw(dataset, steps):
        batches, iterator = [], iter(loader_of(dataset, wrapped=False))
        for step in steps:
            dataset.set_weights(weights[step])
            batches.append(next(iterator)["input_ids"])
        return batches

    whole, first, second = (make_dataset(tiny_store, prefetch=prefetch, seed=seed) for seed in (3, 3, 9))
    expected = draw(whole, range(12))
    draw(first, range(5))
    second.load_state_dict(first.state_dict())
    assert (second.weights == weights[4] / weights[4].sum()).all()
    assert all(map(torch.equal, draw(second, range(5, 12)), expected[5:]))
    assert all(map(torch.equal, draw(first, range(5, 12)), expected[5:]))


def test_resumed_weights_are_those_that_were_set_to_the_bit(tiny_store):
    for seed in range(50):  # normalised again, some of them change
        dataset, again = (
            make_dataset(tiny_store, weights=np.random.default_rng(seed).random(3)),
            make_dataset(tiny_store),
        )
        again.load_state_dict(dataset.state_dict())
        assert (again.weights == dataset.weights).all()
        assert (next(iter(again))["input_ids"] == next(iter(dataset))["input_ids"]).all()


def test_other_domains_need_the_flag(tiny_store):
    state = make_dataset(tiny_store).state_dict()
    fewer = make_dataset(tiny_store.subset(["verbs", "letters"]))
    with pytest.raises(DataError, match="removed: numbers"):
        fewer.load_state_dict(state)
    fewer.load_state_dict(state, adapt=True)
    assert fewer.weights.tolist() == [0.5, 0.5]


def test_workers_are_refused_with_the_remedy(tiny_store):
    with pytest.raises(ConfigError, match=r"num_workers: must be 0; .* prefetch=2"):
        next(iter(DataLoader(make_dataset(tiny_store), batch_size=None, num_workers=1)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"letters": 1.0, "numbers": 1.0}, "weights: must name every domain; missing verbs"),
        ({"letters": 1.0, "numbers": 1.0, "verb": 1.0}, "did you mean 'verbs'"),
        ([0.5, 0.5], "must hold 3 numbers"),
        ([0.5, 0.5, -0.1], "must be non-negative"),
        ([0.5, float("nan"), 0.1], "must be finite"),
    ],
)
def test_wrong_weights_are_refused_and_the_old_ones_stay(tiny_store, weights, message):
    dataset = make_dataset(tiny_store, weights=[2, 1, 1])
    with pytest.raises(ConfigError, match=message):
        dataset.set_weights(weights)
    assert dataset.weights.tolist() == [0.5, 0.25, 0.25]
