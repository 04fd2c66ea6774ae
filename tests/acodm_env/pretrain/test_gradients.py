"""One backward pass against as many as there are domains, and the Gram matrix against numbers worked out by hand."""

import pickle
import random
from dataclasses import FrozenInstanceError
from functools import partial

import numpy as np
import pytest
import torch
from gradient_reference import (
    LENGTH,
    assert_near,
    draw_batch,
    halves_of,
    make_model,
    probed_step,
    separate_passes,
    token_losses,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from acodm_env.errors import ConfigError
from acodm_env.pretrain.gradients import DomainGradients, GradientProbe, order_rows
from acodm_env.pretrain.models import probed_layers


@pytest.fixture
def setup():
    model = make_model("gpt-neox")
    layers = probed_layers(model, depths=(0.0, 1.0))
    return model, layers


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("num_domains", [2, 7, 22])
@pytest.mark.parametrize("kind", ["gpt-neox", "gpt-2"])
def test_one_pass_equals_separate_passes(kind, num_domains, interleaved):
    model = make_model(kind)
    layers = probed_layers(model, depths=(0.0, 1.0))
    assert isinstance(layers[0][1], nn.Linear if kind == "gpt-neox" else Conv1D)
    tokens, domains = draw_batch(num_domains, interleaved=interleaved)
    previous = np.arange(num_domains)
    expected = separate_passes(model, layers, tokens, domains, halves_of(domains, previous), num_domains)
    token_losses(model, tokens).mean().backward()
    ordinary = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    probe = GradientProbe(layers, num_domains)
    probe.attach()
    gradients = probed_step(model, probe, [(tokens, domains)], previous)

    assert gradients.sums.shape == expected.shape
    assert gradients.sums.dtype == torch.float32
    assert_near(gradients.sums, expected, 1e-5)
    absent = ~np.isin(np.arange(num_domains), domains)
    assert not gradients.sums[torch.from_numpy(absent)].any()
    for parameter, grad in zip(model.parameters(), ordinary, strict=True):
        assert_near(parameter.grad, grad, 1e-5)
    for _, module in layers:
        position = next(i for i, parameter in enumerate(model.parameters()) if parameter is module.weight)
        assert_near(module.weight.grad, ordinary[position], 1e-6)
    np.testing.assert_array_equal(gradients.tokens.sum(1), np.bincount(domains, minlength=num_domains) * (LENGTH - 1))


@pytest.mark.parametrize("layer_class", [nn.Linear, Conv1D])
def test_a_layer_by_hand(layer_class):
    """Rows x = 1, 2, 3, 4 with output gradients 1: domain 0 has rows 1 | 2, domain 1 rows 3 | 4."""
    layer = layer_class(1, 1)
    model = nn.Sequential(layer)
    probe = GradientProbe([("0", layer)], 2)
    probe.attach()
    probe.begin(np.arange(4))
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]], requires_grad=True)
    model(x).mean().backward()
    gradients = probe.collect(np.ones((2, 2)), normaliser=4)
    assert gradients.sums.tolist() == [[[1.0], [2.0]], [[3.0], [4.0]]]
    assert layer.weight.grad.item() == 2.5
    assert layer.bias.grad.item() == 1.0
    assert torch.equal(x.grad, layer.weight.detach().expand(4, 1) / 4)
    gram, noise = gradients.gram()
    np.testing.assert_allclose(gram, [[1 * 2, 1.5 * 3.5], [1.5 * 3.5, 3 * 4]])
    np.testing.assert_allclose(noise, [1.5**2 - 2, 3.5**2 - 12])


def test_order_rows_by_hand():
    order, groups = order_rows(np.array([1, 0, 1, 1, 0]), np.array([1, 0, 2, 3, 1]))
    # domain 0, none drawn before: row 1 is half 0, row 4 half 1; domain 1, one drawn: rows 0, 2, 3 are halves 1, 0, 1
    assert order.tolist() == [1, 4, 2, 0, 3]
    assert groups.tolist() == [0, 1, 2, 3, 3]


def test_without_halves(setup):
    model, layers = setup
    tokens, domains = draw_batch(4)
    expected = separate_passes(model, layers, tokens, domains, np.zeros(len(domains)), 4)
    probe = GradientProbe(layers, 4, halves=False)
    probe.attach()
    gradients = probed_step(model, probe, [(tokens, domains)], np.zeros(4))
    assert gradients.sums.shape == (4, 1, expected.shape[2])
    assert_near(gradients.sums[:, 0], expected[:, 0], 1e-5)
    gram, noise = gradients.gram()
    means = expected[:3, 0].double().numpy() / gradients.tokens[:3]
    np.testing.assert_allclose(gram[:3, :3], means @ means.T, rtol=1e-4, atol=1e-9)
    assert np.isnan(gram[3]).all()
    np.testing.assert_allclose(noise[:3], 0.0, atol=1e-15)


def test_micro_batches_add_up(setup):
    model, layers = setup
    tokens, domains = draw_batch(3)
    previous = np.zeros(3)
    expected = separate_passes(model, layers, tokens, domains, halves_of(domains, previous), 3)
    token_losses(model, tokens).mean().backward()
    ordinary = layers[0][1].weight.grad.clone()
    model.zero_grad()
    probe = GradientProbe(layers, 3)
    probe.attach()
    gradients = probed_step(model, probe, [(tokens[:10], domains[:10]), (tokens[10:], domains[10:])], previous)
    assert_near(gradients.sums, expected, 1e-5)
    assert_near(layers[0][1].weight.grad, ordinary, 1e-5)


def test_windows_add_up(setup):
    model, layers = setup
    probe = GradientProbe(layers, 2)
    probe.attach()
    first = probed_step(model, probe, [draw_batch(2, seed=1)], np.zeros(2))
    kept = first.sums.clone()
    second = probed_step(model, probe, [draw_batch(2, seed=2)], np.zeros(2))
    both = first + second
    assert torch.equal(first.sums, kept)  # a later step does not write into an earlier result
    assert torch.equal(both.sums, first.sums + second.sums)
    np.testing.assert_array_equal(both.tokens, first.tokens + second.tokens)


def test_memory_is_used_again_only_when_nobody_holds_it(setup):
    model, layers = setup
    probe = GradientProbe(layers, 2)
    probe.attach()
    first = probed_step(model, probe, [draw_batch(2, seed=1)], np.zeros(2))
    address, row = first.sums.data_ptr(), first.sums[1, 0]
    assert address % 64 == 0
    kept = row.clone()
    del first
    second = probed_step(model, probe, [draw_batch(2, seed=2)], np.zeros(2))
    assert second.sums.data_ptr() != address  # `row` looks into the first result
    assert torch.equal(row, kept)
    copy = pickle.loads(pickle.dumps(second))
    assert torch.equal((copy + second).sums, 2 * second.sums)
    del row
    assert probed_step(model, probe, [draw_batch(2, seed=3)], np.zeros(2)).sums.data_ptr() == address


def checkpointed(forward, reentrant):
    return lambda *args, **kwargs: checkpoint(partial(forward, **kwargs), *args, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(setup, reentrant):
    model, layers = setup
    tokens, domains = draw_batch(3)
    expected = separate_passes(model, layers, tokens, domains, halves_of(domains, np.zeros(3)), 3)
    for block in model.gpt_neox.layers:
        block.forward = checkpointed(block.forward, reentrant)
    probe = GradientProbe(layers, 3)
    probe.attach()
    assert_near(probed_step(model, probe, [(tokens, domains)], np.zeros(3)).sums, expected, 1e-5)


@pytest.mark.parametrize("kind", ["gpt-neox", "gpt-2"])
def test_bf16_autocast_is_close_and_accumulates_in_float32(kind):
    model = make_model(kind)
    layers = probed_layers(model, depths=(0.0, 1.0))
    tokens, domains = draw_batch(3)
    expected = separate_passes(model, layers, tokens, domains, halves_of(domains, np.zeros(3)), 3)
    for sketch_size in (None, 4):
        probe = GradientProbe(layers, 3, sketch_size=sketch_size)
        probe.attach()
        with torch.autocast("cpu", torch.bfloat16):
            gradients = probed_step(model, probe, [(tokens, domains)], np.zeros(3))
        assert gradients.sums.dtype == layers[0][1].weight.grad.dtype == torch.float32
        probe.detach()
        if sketch_size is None:
            assert_near(gradients.sums, expected, 0.03)


def test_preconditioning_by_hand():
    """After one Adam step with gradient 2, v̂ = 4 and P^½ = 1/√(2 + ε), whatever β₂."""
    layer = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0, betas=(0.9, 0.95), eps=0.25)
    probe = GradientProbe([("layer", layer)], 1)
    probe.attach()

    def collect():
        optimizer.zero_grad()
        probe.begin(np.arange(2))
        layer(torch.tensor([[1.0], [3.0]])).mean().backward()
        return probe.collect(np.ones((1, 2)), normaliser=2, precondition=optimizer).sums.flatten().tolist()

    assert collect() == [1.0, 3.0]  # no second moment yet
    assert layer.weight.grad.item() == 2.0
    optimizer.step()
    assert collect() == pytest.approx([1 / 1.5, 3 / 1.5], rel=1e-6)


def test_preconditioning_needs_whole_gradients_and_adam(setup):
    model, layers = setup
    adam = torch.optim.Adam(model.parameters())
    probe = GradientProbe(layers, 2, sketch_size=2)
    probe.attach()
    probed_step(model, probe, [draw_batch(2)], np.zeros(2))
    with pytest.raises(ConfigError, match="leave sketch_size at None"):
        probed_step(model, probe, [draw_batch(2)], np.zeros(2), precondition=adam)
    probe.detach()
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    momentum.step()
    whole = GradientProbe(layers, 2)
    whole.attach()
    with pytest.raises(ConfigError, match="SGD has no second moment"):
        probed_step(model, whole, [draw_batch(2)], np.zeros(2), precondition=momentum)


def test_attaching_leaves_the_model_alone(setup):
    model, layers = setup
    tokens, _ = draw_batch(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ordinary = token_losses(model, tokens)
    probe = GradientProbe(layers, 2)
    probe.attach()
    probe.attach()
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert torch.equal(token_losses(model, tokens), ordinary)  # not recording
    token_losses(model, tokens).mean().backward()
    with pytest.raises(RuntimeError, match=r"begin\(\)"):
        probe.collect(np.ones((2, 2)), normaliser=1)
    probe.detach()
    assert all("forward" not in vars(module) for _, module in layers)
    probe.detach()


def test_detaching_restores_another_packages_forward():
    layer = nn.Linear(2, 2)
    theirs = lambda x: x  # noqa: E731
    layer.forward = theirs
    probe = GradientProbe([("layer", layer)], 1)
    probe.attach()
    assert layer.forward is not theirs
    probe.detach()
    assert layer.forward is theirs


def test_evaluation_is_not_recorded(setup):
    model, layers = setup
    probe = GradientProbe(layers, 2)
    probe.attach()
    probe.begin(np.arange(4))
    with torch.no_grad():
        token_losses(model, draw_batch(2)[0])
    with pytest.raises(RuntimeError, match=r"begin\(\)"):
        probe.collect(np.ones((2, 2)), normaliser=1)


def test_global_generators_are_left_alone(setup):
    model, layers = setup
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    probe = GradientProbe(layers, 2, sketch_size=4)
    probe.attach()
    probed_step(model, probe, [draw_batch(2)], np.zeros(2))
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert states[2] == random.getstate()


def test_what_cannot_be_probed_is_named():
    with pytest.raises(ConfigError, match=r"layers=norm: must be nn.Linear or Conv1D; it is LayerNorm"):
        GradientProbe([("norm", nn.LayerNorm(2))], 2)
    with pytest.raises(ConfigError, match="at least one layer"):
        GradientProbe([], 2)
    with pytest.raises(ConfigError, match="sketch_size=0"):
        GradientProbe([("layer", nn.Linear(2, 2))], 2, sketch_size=0)


def test_domain_gradients_are_frozen():
    with pytest.raises(FrozenInstanceError):
        DomainGradients(torch.zeros(1, 2, 1), np.ones((1, 2))).tokens = np.zeros((1, 2))
