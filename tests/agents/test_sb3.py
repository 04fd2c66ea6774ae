import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv

from acodm_env.agents.algorithms import ALGORITHMS, load_class
from acodm_env.agents.export import export, parity
from acodm_env.agents.learning import Learner, Learning
from acodm_env.agents.sb3 import AgentRecipe, build_agent, env_id_of, make_agent, normalised, vectorise
from acodm_env.agents.vector import ArrayVecEnv
from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError, DataError
from acodm_env.policy.load import load_policy
from acodm_env.reward import RewardConfig
from acodm_env.surrogate.env import SurrogateEnv
from acodm_env.surrogate.vector import SurrogateVectorEnv
from acodm_env.wrapper import Lagged
from toy import ToyTrainer

FIT = sorted(name for name, algorithm in ALGORITHMS.items() if not algorithm.unfit)
UNFIT = sorted(ALGORITHMS.keys() - set(FIT))
SMALL = AgentRecipe(hidden=(16,), batch_size=8, learning_starts=4, buffer_size=200)


def toy_env(best=(0.6, 0.3, 0.1), horizon=10, **options):
    return MixtureEnv(ToyTrainer(best, horizon=horizon), reward=RewardConfig(terms={"progress": 1.0}), **options)


def learner(folder, algo="td3", episodes=4, recipe=SMALL, **options):
    return Learner(lambda: toy_env(**options), Learning(algo=algo, episodes=episodes, evaluate_every=2), recipe, folder)


def weights_of(agent):
    return {name: p.detach().clone() for name, p in agent.policy.state_dict().items()}


def test_unknown_algorithm_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'td3'"):
        make_agent("td4", vectorise(toy_env(), 0.95))


@pytest.mark.parametrize("algo", ["td3", "ddpg"])
def test_one_update_changes_the_actor_and_the_actor_loss_changes_no_critic(algo):
    """The released code steps the critic's optimiser after the actor's backward pass; its actor never learns."""
    agent = learner_agent = make_agent(algo, vectorise(toy_env(), 0.95), SMALL)
    agent.learn(8)
    before = weights_of(agent)
    critic_steps, actor_steps = [], []
    agent.critic.optimizer.register_step_post_hook(lambda *_: critic_steps.append(weights_of(learner_agent)))
    agent.actor.optimizer.register_step_post_hook(lambda *_: actor_steps.append(weights_of(learner_agent)))
    agent.train(gradient_steps=2, batch_size=8)
    after = weights_of(agent)
    actor = [name for name in after if name.startswith("actor.")]
    critic = [name for name in after if name.startswith("critic.")]
    assert any((after[name] != before[name]).any() for name in actor)
    assert actor_steps
    for changed in actor_steps:  # at an actor step the critic is as its own last step left it
        last = [seen for seen in critic_steps if all(torch.equal(seen[n], changed[n]) for n in critic)]
        assert last


def needs(algo):
    """Skip an algorithm whose optional package is not installed."""
    if ALGORITHMS[algo].extra:
        pytest.importorskip(ALGORITHMS[algo].place.partition(":")[0], reason=f"{algo} needs acodm[contrib]")


@pytest.mark.parametrize("algo", FIT)
def test_every_algorithm_learns_exports_and_reloads_exactly(algo, tmp_path):
    needs(algo)
    fields = {"fields": ["loss", "sample_share", "progress"]} if algo.startswith("equivariant") else {}
    run = learner(tmp_path, algo, **fields)
    run.learn()
    policy = run.policy({"note": "test"})
    error = export(policy, tmp_path / "policy", run.agent, run.venv)
    assert error <= 1e-5
    loaded = load_policy(tmp_path / "policy")
    assert loaded.domains == (() if algo.startswith("equivariant") else ("domain0", "domain1", "domain2"))
    assert parity(loaded, run.agent, run.venv) == error
    assert loaded.provenance["note"] == "test"
    assert len(run.rows) == 4
    assert np.isfinite(run.best_objective)


@pytest.mark.parametrize("algo", ["td3", "sac", "ppo"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(algo, tmp_path):
    whole = learner(tmp_path / "whole", algo)
    whole.learn()

    class Killed(Exception):
        pass

    def kill(row):
        seen.append(row)
        if len(seen) == 27:  # in the third episode of ten decisions
            raise Killed

    seen: list = []
    first = learner(tmp_path / "cut", algo)
    with pytest.raises(Killed):
        first.learn(kill)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 (SB3 draws from it)
    second = learner(tmp_path / "cut", algo)
    second.learn()
    expected, resumed = weights_of(whole.agent), weights_of(second.agent)
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name
    assert [row["return"] for row in whole.rows] == [row["return"] for row in second.rows]
    np.testing.assert_array_equal(whole.venv.obs_rms.mean, second.venv.obs_rms.mean)
    if algo != "ppo":
        np.testing.assert_array_equal(whole.agent.replay_buffer.observations, second.agent.replay_buffer.observations)


@pytest.mark.parametrize("algo", UNFIT)
def test_what_acodm_train_cannot_drive_learns_from_python_and_is_refused_with_a_reason(algo, tmp_path):
    needs(algo)
    with pytest.raises(ConfigError, match=f"algo={algo}: must be one of .*; {ALGORITHMS[algo].unfit[:20]}"):
        learner(tmp_path, algo)
    agent = make_agent(algo, vectorise(toy_env(), 0.95), AgentRecipe(hidden=(8,)))
    before = weights_of(agent)
    agent.learn(40)
    assert agent.num_timesteps >= 40
    assert any((weights_of(agent)[name] != value).any() for name, value in before.items())


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(ConfigError, match=r"algo=tqc: .* pip install 'acodm\[contrib\]'"):
        load_class("tqc")


SHARED = {"gamma": 0.95, "learning_rate": 0.001}
REPLAY = {"batch_size": 64, "buffer_size": 10_000, "learning_starts": 40, "gradient_steps": 2, "tau": 0.005}


@pytest.mark.parametrize(
    ("algo", "numbers"),
    [
        ("td3", REPLAY),
        ("ddpg", REPLAY),
        ("sac", REPLAY),
        ("ppo", {"batch_size": 10, "n_steps": 10}),
        ("a2c", {"n_steps": 10}),
    ],
)
def test_the_numbers_that_published_results_were_learned_with_stay(algo, numbers):
    """On a proxy (README, lab log); `n_steps` is an episode, and a minibatch divides it."""
    agent = make_agent(algo, vectorise(toy_env(), 0.95))
    assert {name: getattr(agent, name) for name in SHARED | numbers} == SHARED | numbers
    optimizer = agent.actor.optimizer if hasattr(agent, "actor") else agent.policy.optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["weight_decay"] == 0.01
    layers = [tuple(p.shape) for name, p in agent.policy.named_parameters() if "weight" in name]
    assert (64, 64) in layers
    if algo in ("td3", "ddpg"):
        assert [module.strength for module in agent.actor.modules() if hasattr(module, "strength")] == [0.1]
        np.testing.assert_array_equal(agent.action_noise._sigma, np.full(3, 0.2))
        assert agent.replay_buffer.handle_timeout_termination is False


@pytest.mark.parametrize("algo", ["td3", "acodm-td3", "sac", "ppo", "a2c"])
def test_several_environments_learn_together(algo):
    """Whole episodes of all of them per rollout; a minibatch may hold transitions of each."""
    several = [
        DummyVecEnv([toy_env, toy_env, toy_env]),
        ArrayVecEnv(SurrogateVectorEnv(3, episode_steps=10)),
    ]
    for env in several:
        agent = make_agent(algo, vectorise(env, 0.95), SMALL, env_id="acodm/ProxyPretrain-v0")
        agent.learn(60)
        assert agent.num_timesteps == 60
        assert agent.n_envs == 3
        if algo in ("ppo", "a2c"):
            assert agent.n_steps == 10
        if algo == "ppo":
            assert agent.batch_size == 6  # the largest divisor of 3 · 10 up to 8


def test_hyperparameters_are_those_of_the_environment_that_is_learned_on():
    surrogate, proxy = "acodm/Surrogate-v0", "acodm/ProxyPretrain-v0"
    assert env_id_of(gym.make(surrogate)) == surrogate
    assert env_id_of(vectorise(gym.make(surrogate, disable_env_checker=True), 0.9)) == surrogate
    assert env_id_of(SurrogateEnv()) == surrogate  # made without a registry
    assert env_id_of(SurrogateEnv(lag=1)) == surrogate
    assert env_id_of(ArrayVecEnv(SurrogateVectorEnv(2))) == surrogate
    assert env_id_of(toy_env()) == proxy
    assert env_id_of(MixtureEnv(Lagged(ToyTrainer((0.5, 0.5)), 1))) == proxy


def test_normalisation_is_what_the_settings_say():
    for value, expected in ((True, (True, True)), (False, (False, False)), ({"norm_obs": False}, (False, True))):
        venv = normalised(toy_env(), {"normalize": value, "gamma": 0.9})
        assert (venv.norm_obs, venv.norm_reward, venv.gamma) == (*expected, 0.9)
    raw = venv.reset()
    np.testing.assert_array_equal(raw, venv.get_original_obs())
    with pytest.raises(ConfigError, match="normalize=yes"):
        normalised(toy_env(), {"normalize": "yes"})
    with pytest.raises(ConfigError, match="norm_action"):
        normalised(toy_env(), {"normalize": {"norm_action": True}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_type": "ornstein-uhlenbeck", "noise_std": 0.1}, "noise_type=ornstein-uhlenbeck: must be normal"),
        ({"learning_rate": "cos_1"}, "learning_rate=cos_1: must be a positive number, or lin_"),
        ({"policy": "acodm_env.agents.penalty.Nothing"}, "policy=acodm_env.agents.penalty.Nothing"),
        ({"policy": "no_such_module.Policy"}, "policy=no_such_module.Policy"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_agent("td3", vectorise(toy_env(), 0.9), settings)


def test_a_learning_rate_may_fall_to_zero():
    agent = build_agent("td3", vectorise(toy_env(), 0.9), {"learning_rate": "lin_0.01"})
    assert [agent.lr_schedule(remaining) for remaining in (1.0, 0.25, 0.0)] == [0.01, 0.0025, 0.0]


def test_edited_checkpoint_is_refused(tmp_path):
    run = learner(tmp_path)
    run.learn()
    networks = run.checkpoint("last") / "networks.pt"
    networks.write_bytes(networks.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="checksum"):
        learner(tmp_path).load("last")


def test_replay_stays_finite_when_the_language_model_diverges(tmp_path):
    def make():
        return MixtureEnv(ToyTrainer((0.5, 0.5), horizon=10, diverge_at=7))

    run = Learner(make, Learning(episodes=3, evaluate_every=0), SMALL, tmp_path)
    run.learn()
    buffer = run.agent.replay_buffer
    assert np.isfinite(buffer.rewards[: buffer.size()]).all()
    assert np.isfinite(buffer.observations[: buffer.size()]).all()
    assert all(torch.isfinite(p).all() for p in weights_of(run.agent).values())


def distance_after_learning(folder, **options):
    """Largest error of the mean mixture of a TD3 policy learned on the toy, and its last saturation."""
    best = (0.6, 0.3, 0.1)
    recipe = AgentRecipe(hidden=(32, 32), learning_starts=100, gradient_steps=1, gamma=0.5, **options)
    run = Learner(
        lambda: toy_env(best, horizon=20, fields=["progress", "sample_share"]),
        Learning(episodes=75, evaluate_every=0),
        recipe,
        folder,
    )
    run.learn()
    policy = run.policy({})
    env = toy_env(best, horizon=20, fields=["progress", "sample_share"])
    observation, _ = env.reset(seed=0)
    mixtures = []
    for _ in range(20):
        observation, *_, info = env.step(policy.act(observation))
        mixtures.append(info["weights"])
    return float(np.abs(np.mean(mixtures, axis=0) - best).max()), run.rows[-1]["saturation"]


def test_td3_finds_the_known_best_mixture(tmp_path):
    """Rewards z-scored over domains leave no signal (the released code); here the best mixture must be found."""
    error, _ = distance_after_learning(tmp_path)
    start = np.abs(np.full(3, 1 / 3) - (0.6, 0.3, 0.1)).max()
    assert error < 0.08 < start


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_logit_penalty_keeps_td3_out_of_the_corners(strength, tmp_path):
    """Prints the table of the lab log: `pytest -m slow -s -k logit_penalty tests/agents/test_sb3.py`."""
    error, saturation = distance_after_learning(tmp_path, logit_penalty=strength)
    print(f"penalty {strength:.2f}: error {error:.3f}, saturated {saturation:.0%}")  # noqa: T201
    assert (error < 0.15) == (strength > 0)
