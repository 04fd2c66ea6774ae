"""Projected per-domain gradients: of micro-batches, compiled, unbiased, and by hand."""

import numpy as np
import pytest
import torch
from gradient_reference import assert_near, draw_batch, make_model, probed_step, token_losses
from torch import nn

from acodm_env.pretrain.gradients import GradientProbe
from acodm_env.pretrain.models import probed_layers


@pytest.fixture
def setup():
    model = make_model("gpt-neox")
    layers = probed_layers(model, depths=(0.0, 1.0))
    return model, layers


@pytest.mark.parametrize("kind", ["gpt-neox", "gpt-2"])
def test_the_sketch_of_micro_batches_is_the_sketch_of_the_batch(kind):
    model = make_model(kind)
    layers = probed_layers(model, depths=(0.0, 1.0))
    tokens, domains = draw_batch(3)
    token_losses(model, tokens).mean().backward()
    ordinary = layers[0][1].weight.grad.clone()
    probe = GradientProbe(layers, 3, sketch_size=5)
    probe.attach()
    model.zero_grad()
    whole = probed_step(model, probe, [(tokens, domains)], np.zeros(3))
    model.zero_grad()
    parts = [(tokens[:10], domains[:10]), (tokens[10:], domains[10:])]
    assert_near(probed_step(model, probe, parts, np.zeros(3)).sums, whole.sums, 1e-5)
    assert_near(layers[0][1].weight.grad, ordinary, 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_is_traced_once_whatever_the_batch_holds(setup, checkpointing):
    """The same sketches as without compilation, no graph break, and no new trace for another composition."""
    model, layers = setup
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    probe = GradientProbe(layers, 3, sketch_size=5)
    probe.attach()
    batches = [draw_batch(3, seed=seed) for seed in range(3)]
    expected = [probed_step(model, probe, [batch], np.zeros(3)).sums.clone() for batch in batches]
    ordinary = layers[0][1].weight.grad.clone()
    model.zero_grad()
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        traced.append(len(graph.graph.nodes))
        return graph.forward

    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        for batch, sums in zip(batches, expected, strict=True):
            assert_near(probed_step(compiled, probe, [batch], np.zeros(3)).sums, sums, 1e-5)
    assert len(traced) == 1
    assert_near(layers[0][1].weight.grad, ordinary, 1e-5)


def test_sketch_is_unbiased_and_small(setup):
    model, layers = setup
    tokens, domains = draw_batch(3, batch_size=8)
    exact = GradientProbe(layers, 3)
    exact.attach()
    gram, noise = probed_step(model, exact, [(tokens, domains)], np.zeros(3)).gram()
    expected, squared_norms = gram[:2, :2], (np.diag(gram) + noise)[:2]
    exact.detach()
    ordinary = layers[0][1].weight.grad.clone()
    grams = []
    for seed in range(150):
        probe = GradientProbe(layers, 3, sketch_size=8, seed=seed)
        probe.attach()
        model.zero_grad()
        gradients = probed_step(model, probe, [(tokens, domains)], np.zeros(3))
        assert gradients.sums.shape == (3, 2, 2 * 8 * 8)
        assert torch.allclose(layers[0][1].weight.grad, ordinary, atol=1e-7)
        grams.append(gradients.gram()[0][:2, :2])
        probe.detach()
    standard_error = np.std(grams, 0) / np.sqrt(len(grams))
    assert (np.abs(np.mean(grams, 0) - expected) <= 4 * standard_error).all()
    assert (standard_error <= 0.1 * squared_norms.max()).all()


def test_sketch_is_a_projection_of_the_exact_sums():
    """Equal seeds project alike: the sketch of a rank-one gradient a bᵀ is (Sᵀa)(bᵀR)/r."""
    layer = nn.Linear(6, 5, bias=False)
    x, g = torch.arange(6.0).expand(2, 6), torch.arange(5.0)
    probe = GradientProbe([("layer", layer)], 1, sketch_size=3, seed=7)
    probe.attach()
    probe.begin(np.arange(2))
    (layer(x) @ g).sum().backward()
    sums = probe.collect(np.ones((1, 2)), normaliser=1).sums
    generator = torch.Generator().manual_seed(7)
    left = torch.randint(0, 2, (5, 3), generator=generator) * 2.0 - 1
    right = torch.randint(0, 2, (6, 3), generator=generator) * 2.0 - 1
    np.testing.assert_allclose(sums[0, 0].view(3, 3), torch.outer(left.T @ g, right.T @ x[0]) / 3, rtol=1e-6)
    assert torch.equal(sums[0, 0], sums[0, 1])
