"""The analytic policy gradient: what it is judged against, and that it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from acodm_env.agents import apg
from acodm_env.errors import ConfigError
from acodm_env.mixture import Controller
from acodm_env.observation import Observer
from acodm_env.policy.load import load_policy
from acodm_env.surrogate.problem_trainer import ProblemTrainer
from acodm_env.surrogate.problems import ProblemFamily

FAMILY = ProblemFamily(num_domains=(2, 3), decisions=(4, 6))
CONFIG = apg.ApgConfig(iterations=3, rows=24, hidden=8, pool=1)


def draw(batch=6, num_domains=2, seed=0, **changes):
    return replace(FAMILY, **changes).draw(np.random.default_rng(seed), batch, num_domains).tensors()


def test_best_static_is_that_of_a_grid():
    problems = draw(untrained=0.0, excluded=0.0)
    shares = torch.linspace(0, 1, 401)
    grid = torch.stack([apg.static_objective(problems, torch.stack([s, 1 - s]).expand(6, 2)) for s in shares])
    mixture, objective = apg.best_static(problems)
    torch.testing.assert_close(objective, grid.min(0).values, atol=2e-3, rtol=0)
    torch.testing.assert_close(objective, apg.static_objective(problems, mixture))
    assert (objective <= apg.static_objective(problems, apg.uniform(problems))).all()


def test_regret_is_0_for_the_best_static_mixture_and_1_for_uniform():
    problems = draw(batch=40, seed=1)
    _, best = apg.best_static(problems)
    even = apg.static_objective(problems, apg.uniform(problems))
    known = even - best > apg.LEAST_GAIN
    assert known.sum() > 10
    torch.testing.assert_close(apg.regrets(problems, even, best)[known], torch.ones(int(known.sum())))
    torch.testing.assert_close(apg.regrets(problems, best, best)[known], torch.zeros(int(known.sum())))


def test_a_constant_policy_is_a_static_mixture():
    problems = draw(num_domains=3)
    mixture = torch.tensor([0.5, 0.3, 0.2]) * problems.trainable
    mixture = mixture / mixture.sum(-1, keepdim=True)
    played = apg.play(problems, lambda view, number: mixture, 6, 0.0)
    torch.testing.assert_close(played.mixtures[-1], mixture)
    steady = replace(problems, memory=torch.ones_like(problems.memory))  # the recent share is there at once
    again = apg.play(steady, lambda view, number: mixture, 6, 0.0)
    torch.testing.assert_close(again.objective, apg.static_objective(problems, mixture), atol=1e-4, rtol=0)


def test_the_mixture_in_force_is_a_running_average():
    problems = draw()
    corners = [torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9]), torch.tensor([0.5, 0.5])]
    course = apg.play(problems, lambda view, number: corners[number].expand(6, 2), 3, 0.0).mixtures[:, 0, 0]
    np.testing.assert_allclose(
        course, [0.9, 0.9 * 2 / 3 + 0.1 / 3, (0.9 * 2 / 3 + 0.1 / 3) * 3 / 4 + 0.5 / 4], rtol=1e-5
    )


def test_the_same_seed_learns_the_same_actor():
    one, other = (apg.learn(FAMILY, CONFIG).actor.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_learning_lowers_regret():
    learned = apg.learn(FAMILY, replace(CONFIG, iterations=80, rows=128, hidden=16, pool=2, learning_rate=1e-2))
    problems = draw(batch=64, num_domains=3, seed=9)
    even = apg.static_objective(problems, apg.uniform(problems))
    _, best = apg.best_static(problems)
    with torch.no_grad():
        played = apg.play(problems, apg.deciding(learned.actor), 5, 0.0)
    assert float((even - played.objective).mean()) > 0.2 * float((even - best).mean())


def test_an_untrained_actor_is_uniform_and_survives_its_file(tmp_path):
    actor = apg.ViewActor(CONFIG, seed=0)
    problems = draw(num_domains=3)
    played = apg.play(problems, apg.deciding(actor), 4, 0.0)
    torch.testing.assert_close(played.mixtures[-1], apg.uniform(problems))
    policy = actor.policy(20, 28, {"a": 1})
    assert load_policy(policy.save(tmp_path / "p")).fingerprint == policy.fingerprint


@pytest.mark.parametrize("settings", [{"iterations": 0}, {"fields": ("loss",)}])
def test_bad_settings(settings):
    with pytest.raises(ConfigError):
        apg.ApgConfig(**settings)


def test_what_was_learned_is_what_is_exported():
    """The file's policy, seen through an observer and a controller, decides as the actor does in `play`."""
    family = replace(FAMILY, num_domains=(3, 3), noise=(0.0, 0.0))
    runs = ProblemTrainer(family, batch=(8,), horizon=5, noise=0.0)
    runs.reset(np.random.default_rng(3))
    actor = apg.ViewActor(CONFIG, seed=0)
    with torch.no_grad():  # an untrained actor is uniform, and would hide every fault
        actor.network.head.layers[-1].weight.normal_(0, 2.0, generator=torch.Generator().manual_seed(0))
        played = apg.play(runs.problems.tensors(), apg.deciding(actor), 5, 0.0).mixtures.numpy()  # (D, B, K)
    policy = actor.policy(5, 28, {})
    observer = Observer(runs.info, apg.GENERAL_FIELDS, batch=(8,))
    observation, controller = observer.start(runs.info, runs.mask, runs.problem), Controller(policy.action)
    for expected in played:
        mixture = controller.take(policy.act(observation).astype(np.float64), observer.choices())
        np.testing.assert_allclose(mixture, expected, atol=2e-3)
        observer.decided(mixture)
        stats = replace(runs.step(mixture), eval_losses=runs.evaluate("validation", 28))
        observation = observer.observe(stats)
    assert np.ptp(played, axis=0).max() > 0.05
