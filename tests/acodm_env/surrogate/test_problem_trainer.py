"""Random mixing problems as a trainer and as environments: the same numbers as the learner that differentiates."""

import time
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.env_checker import check_env

import acodm_env  # noqa: F401 (registers the environments)
from acodm_env.agents.apg import best_static, play, static_objective, uniform
from acodm_env.errors import ConfigError
from acodm_env.objective import value
from acodm_env.observation import Observer
from acodm_env.surrogate.env import SurrogateEnv
from acodm_env.surrogate.problem_trainer import ProblemTrainer
from acodm_env.surrogate.problems import ProblemFamily, losses
from acodm_env.surrogate.vector import SurrogateVectorEnv
from acodm_env.view import GENERAL_FIELDS, PER_ROW, PER_RUN

FAMILY = ProblemFamily(num_domains=(3, 7))
DECISIONS = 12


def drawn(batch=32, family=FAMILY, seed=0):
    return family.draw(np.random.default_rng(seed), batch)


def mixtures(problems, decisions=DECISIONS):
    """(D, B, K) arbitrary, 0 where nothing can be trained on."""
    raw = np.random.default_rng(1).dirichlet(np.full(7, 0.5), (decisions, problems.batch)) + 1e-3
    raw = raw * problems.trainable
    return raw / raw.sum(-1, keepdims=True)


def seen(view, xp):
    """The fields as the actor that is learned by differentiation reads them, one column each."""
    formulas = {name: row[3] for name, row in {**PER_ROW, **PER_RUN}.items()} | {"progress": lambda v, _: v.progress}
    return np.concatenate([np.asarray(formulas[name](view, xp)) for name in GENERAL_FIELDS], -1)


@pytest.mark.parametrize("steps", [1, 3], ids=lambda steps: f"{steps} steps a decision")
def test_losses_are_those_of_the_differentiable_run(steps):
    """Whatever the number of steps a decision takes: the recent share is renewed to the same value."""
    problems, chosen = drawn(), mixtures(drawn())
    played = play(
        problems.tensors(), lambda _, number: torch.tensor(chosen[number], dtype=torch.float32), DECISIONS, 1.0
    )
    runs = ProblemTrainer(problems, horizon=DECISIONS * steps, decision_every=steps, batch=(32,), noise=0.0)
    for mixture in chosen:
        for _ in range(steps):
            runs.step(mixture)
    ended = value(runs.evaluate("test"), runs.target_weights, runs.perplexity)
    np.testing.assert_allclose(ended, played.objective, atol=2e-5)
    assert np.abs(ended - value(runs.static_losses(), runs.target_weights, runs.perplexity)).max() > 0.05


def test_the_observation_is_what_the_differentiable_actor_sees():
    problems, chosen, views = drawn(), mixtures(drawn()), []

    def decide(view, number):
        views.append(seen(view, torch))
        return torch.tensor(chosen[number], dtype=torch.float32)

    course = play(problems.tensors(), decide, DECISIONS, 0.0).mixtures.numpy()
    runs = ProblemTrainer(problems, horizon=DECISIONS, batch=(32,), noise=0.0)
    runs.measure = frozenset({"losses", "validation"})
    observer = Observer(runs.info, GENERAL_FIELDS, batch=(32,))
    observations = [observer.start(runs.info, runs.mask, runs.problem)]
    for mixture in course[:-1]:
        observer.decided(mixture)
        window = replace(runs.step(mixture), eval_losses=runs.evaluate("validation", 28))
        observations.append(observer.observe(window))
    for one, other in zip(observations, views, strict=True):
        clipped = np.clip(other, observer.low, observer.high)  # an observation stays within its bounds
        np.testing.assert_allclose(one, clipped, atol=1e-4)
        assert np.mean(clipped != other) < 0.01


def test_noise_is_a_lasting_offset_and_half_of_it_anew():
    family = ProblemFamily(num_domains=(4, 4), noise=(0.8, 0.8))
    runs = ProblemTrainer(family, batch=(4000,), horizon=4)
    runs.step(runs.mask / 4)
    shown = np.stack([runs.evaluate("validation", 28) for _ in range(2)])
    assert (np.isnan(shown[0]) == (runs.problems.measured == 0)).all()
    errors = (shown - runs.evaluate("validation")) / runs.problems.noise
    assert np.nanstd(errors) == pytest.approx(np.sqrt(1.25), rel=0.05)
    assert np.nanstd(errors[0] - errors[1]) == pytest.approx(np.sqrt(0.5), rel=0.05)
    training = ProblemTrainer(family, batch=(4000,), horizon=4, decision_every=2)
    quiet = training.again()
    windows = [[run.step(training.mask / 4).losses for _ in range(2)] for run in (training, quiet)]
    errors = (np.mean(windows[0], 0) - np.mean(windows[1], 0)) / training.problems.noise
    plain = training.problems.measured == 0
    assert np.nanstd(errors[plain]) == pytest.approx(np.sqrt(1.25), rel=0.05)  # of a decision, however many its steps
    assert (
        np.nanmax(np.abs(errors[~plain])) < 1e-6
    )  # the gap to a measurement has the measurement's noise, as in `play`


# --- environments ------------------------------------------------------------------------------------------

SETTINGS = {"problems": {"num_domains": [3, 5]}, "episode_steps": 6, "noise": 0.0}
OVER = {"terms": {"final": 1.0}, "final_over_uniform": True}


def test_single_environment_passes_the_checker_and_repeats_itself():
    env = gym.make("acodm/Surrogate-v0", **SETTINGS, disable_env_checker=True)
    check_env(env.unwrapped, warn=True)
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 5)).astype(np.float32)
    runs = []
    for _ in range(2):
        rows = [env.reset(seed=3)[0]] + [env.step(action)[0] for action in actions]
        runs.append(np.stack(rows))
    np.testing.assert_array_equal(*runs)
    assert [field.name for field in env.unwrapped.observer.fields] == [*GENERAL_FIELDS, "mask"]


@pytest.mark.parametrize("reward", ["progress", "final", OVER], ids=str)
def test_the_vector_environment_plays_as_the_single_one(reward):
    """One environment each, from the same state of the generator."""
    one = SurrogateEnv(**SETTINGS, reward=reward)
    many = SurrogateVectorEnv(1, dtype="float64", **SETTINGS, reward=reward)
    for seed in range(4):
        first, info = one.reset(seed=seed)
        rows, infos = many.reset(seed=seed)
        np.testing.assert_allclose(rows[0], first, atol=1e-6)
        for action in np.random.default_rng(seed).uniform(-1, 1, (6, 5)).astype(np.float32):
            observation, gained, _, ended, info = one.step(action)
            rows, gains, _, ends, infos = many.step(action[None])
            np.testing.assert_allclose(rows[0], observation, atol=1e-6)
            np.testing.assert_allclose(infos["weights"][0], info["weights"], atol=1e-12)
            assert gains[0] == pytest.approx(gained, abs=1e-9)
            assert infos["objective"][0] == pytest.approx(info["objective"], abs=1e-9)
        assert ended
        assert ends[0]


def test_the_mixture_in_force_is_a_running_average_over_what_can_be_trained_on():
    envs = SurrogateVectorEnv(64, **SETTINGS, reward=OVER)
    envs.reset(seed=0)
    trainable = envs.runs.problem["trainable"]
    assert (trainable.sum(-1) < envs.runs.mask.sum(-1)).any()
    actions = np.zeros((2, 64, 5), dtype=np.float32)
    actions[0, :, 0] = 1
    first = envs.step(actions[0])[-1]["weights"]
    second = envs.step(actions[1])[-1]["weights"]
    even = trainable / trainable.sum(-1, keepdims=True)
    np.testing.assert_allclose(second, first * 2 / 3 + even / 3, atol=1e-6)  # h = 1/(n + 2) at decision n = 1
    assert (first[trainable == 0] == 0).all()


@pytest.mark.parametrize("reward", [OVER, {"terms": {"progress": 1.0}, "progress_over_uniform": True}], ids=str)
def test_the_return_is_the_gain_over_uniform_in_nats(reward):
    envs = SurrogateVectorEnv(256, problems={}, episode_steps=8, reward=reward)
    envs.reset(seed=0)
    idle, total = np.zeros((256, 24), dtype=np.float32), np.zeros(256)
    for _ in range(8):
        total += envs.step(idle)[1]
    np.testing.assert_allclose(total, 0, atol=1e-4)  # uniform gains nothing on uniform
    envs.step(idle)
    problems, total = envs.runs.problems.tensors(), np.zeros(256)
    best, reached = best_static(problems, 60)
    mass = (best.numpy() * 50 + 1) / (50 + envs.runs.problem["trainable"].sum(-1, keepdims=True))
    logits = np.log(np.maximum(mass, 1e-3))
    action = np.clip((logits - logits.max(-1, keepdims=True)) / 5 + 1, -1, 1).astype(np.float32)
    for _ in range(8):
        total += envs.step(action)[1]
    gain = static_objective(problems, uniform(problems)) - reached
    assert np.mean(total) > 0.8 * float(gain.mean())


def test_thousands_of_problems_are_drawn_in_a_second():
    runs = ProblemTrainer(ProblemFamily(), batch=(4096,), dtype=np.float32)
    times = []
    for seed in range(2):
        started = time.process_time()
        runs.reset(np.random.default_rng(seed))
        times.append(time.process_time() - started)
    assert min(times) < 1.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"problems": {"num_domain": [3, 4]}}, "did you mean 'num_domains'"),
        ({"problems": {}, "family": {}}, "family, problems"),
        ({"problems": {}, "noise_domain": True}, "noise_domain=True"),
        ({"problems": {"num_domains": [1, 4]}}, "num_domains=\\(1, 4\\)"),
        ({"problems": {}, "reward": "interaction"}, "needs gram"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    for make in (SurrogateEnv, SurrogateVectorEnv):
        with pytest.raises(ConfigError, match=message):
            make(**settings)


def test_resumes_in_the_middle():
    env = SurrogateEnv(**(SETTINGS | {"noise": 1.0}), reward=OVER)
    env.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 5)).astype(np.float32)
    for action in actions[:3]:
        env.step(action)
    other = SurrogateEnv(**(SETTINGS | {"noise": 1.0}), reward=OVER)
    other.load_state_dict(env.state_dict())
    for action in actions[3:]:
        one, two = env.step(action), other.step(action)
        np.testing.assert_array_equal(one[0], two[0])
        assert one[1] == two[1]


def test_leverage_is_the_slope_of_a_domains_own_loss():
    """Without blur, at uniform amounts: by a small step in the data of one domain, before anything repeats."""
    family = ProblemFamily(num_domains=(5, 5), counted=(1, 1), counted_spread=0, ample=1, recency=(0, 0))
    problems = replace(family.draw(np.random.default_rng(0), 32), overfit=np.zeros((32, 5)))
    even = problems.trainable
    recent = even / even.sum(-1, keepdims=True)
    for domain in range(5):
        step = 1e-4 * (np.arange(5) == domain)
        less, more = (losses(problems, even * np.exp(sign * step), recent, 1.0, np)[0] for sign in (-1, 1))
        slope = ((less - more) / 2e-4)[:, domain]
        worth = (problems.transfer @ even[..., None])[..., 0] + problems.start  # what x is there, over x̄
        scale = (problems.even / worth)[:, domain] ** (1 + problems.exponents[:, domain])
        np.testing.assert_allclose(slope * even[:, domain], problems.leverage[:, domain] * scale, rtol=1e-3, atol=1e-6)
