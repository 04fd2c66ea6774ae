import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.td3.policies import TD3Policy
from torch import nn

from acodm_env.agents.acodm import AcodmDDPG, AcodmTD3, paper, paper_learning_rate
from acodm_env.agents.checkpoint import load_checkpoint, save_checkpoint
from acodm_env.agents.heads import head_rewards
from acodm_env.agents.learning import Learner, Learning
from acodm_env.agents.sb3 import AgentRecipe, make_agent, vectorise
from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError
from acodm_env.reward import RewardConfig
from toy import ToyTrainer

BOTH = pytest.mark.parametrize("kind", [AcodmTD3, AcodmDDPG])
NETWORKS = {"net_arch": [16]}
BEST = (0.6, 0.3, 0.1)


def toy_env(reward="interaction", horizon=10, **options):
    return MixtureEnv(ToyTrainer(BEST, horizon=horizon), reward=RewardConfig(terms={reward: 1.0}), **options)


def toy_agent(kind=AcodmTD3, *, venv=None, num_envs=1, steps=40, **kwargs):
    """An agent of small networks that has learned for a few updates."""
    venv = venv or DummyVecEnv([toy_env] * num_envs)
    settings = {"policy_kwargs": dict(NETWORKS), "batch_size": 16, "buffer_size": 400, "learning_starts": 10}
    return kind("MlpPolicy", venv, device="cpu", seed=0, **(settings | kwargs)).learn(steps)


def weights_of(agent):
    return {name: p.detach().clone() for name, p in agent.policy.state_dict().items()}


class Fixed(gym.Env):
    """Domain rewards (1, −2, 0.5) whatever is done, plus a global term; episodes of five steps."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    domain_rewards = np.array([1.0, -2.0, 0.5])

    def __init__(self, rest=0.0, drop=()):
        self.rest, self.drop = rest, drop

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_number = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.step_number += 1
        weights = np.exp(action) / np.exp(action).sum()
        info = {"weights": weights, "domain_rewards": self.domain_rewards}
        info = {name: value for name, value in info.items() if name not in self.drop}
        reward = float(weights @ self.domain_rewards) + self.rest
        return np.zeros(2, np.float32), reward, False, self.step_number == 5, info


def test_head_rewards_by_hand():
    infos = [
        {"weights": np.array([0.5, 0.5]), "domain_rewards": np.array([2.0, -1.0])},  # Σ α r = 0.5
        {"weights": np.array([0.25, 0.75]), "domain_rewards": np.zeros(2)},  # a divergence: −10
    ]
    rewards = head_rewards(np.array([0.9, -10.0]), infos)  # 0.4 and −10 belong to no domain
    np.testing.assert_allclose(rewards, [[1.0 + 0.2, -0.5 + 0.2], [-2.5, -7.5]])


@pytest.mark.parametrize("name", ["weights", "domain_rewards"])
def test_an_info_without_domain_rewards_is_refused(name):
    with pytest.raises(ConfigError, match=rf"info\['{name}'\].*no MixtureEnv.*use td3 or ddpg"):
        toy_agent(venv=DummyVecEnv([lambda: Fixed(drop=(name,))]), steps=1)


@BOTH
def test_one_update_changes_the_actor_and_the_actor_loss_changes_no_critic(kind):
    """The released code steps the critic's optimiser after the actor's backward pass; its actor never learns."""
    agent = toy_agent(kind)
    before, critic_steps, actor_steps = weights_of(agent), [], []
    agent.critic.optimizer.register_step_post_hook(lambda *_: critic_steps.append(weights_of(agent)))
    agent.actor.optimizer.register_step_post_hook(lambda *_: actor_steps.append(weights_of(agent)))
    agent.train(gradient_steps=2, batch_size=8)
    after = weights_of(agent)
    assert any((after[name] != before[name]).any() for name in after if name.startswith("actor."))
    critic = [name for name in after if name.startswith("critic.")]
    assert len(actor_steps) == (1 if kind is AcodmTD3 else 2)
    for changed in actor_steps:  # at an actor step the critic is as its own last step left it
        assert any(all(torch.equal(seen[n], changed[n]) for n in critic) for seen in critic_steps)
    assert all(torch.equal(critic_steps[-1][n], after[n]) for n in critic)


@BOTH
def test_the_actor_climbs_the_sum_of_the_heads_of_the_first_critic(kind):
    agent = toy_agent(kind)
    batch = agent.replay_buffer.sample(16)
    with torch.no_grad():
        heads = agent.critic(batch.observations, agent.actor(batch.observations))[0].numpy()
    assert heads.shape == (16, 3)
    assert agent._update_actor(batch) == pytest.approx(-heads.sum(axis=1).mean(), rel=1e-5)


@BOTH
@pytest.mark.parametrize("reward", ["interaction", "progress"])
@pytest.mark.parametrize("clip", [None, 10.0, 0.5])
def test_the_heads_targets_sum_to_the_scalar_target(kind, reward, clip):
    """Against SB3's own formula on SB3's own samples of the scalar reward; 0.5 clips, None does not normalise."""
    venv = DummyVecEnv([lambda: toy_env(reward)] * 2)
    venv = venv if clip is None else VecNormalize(venv, gamma=0.9, clip_reward=clip)
    agent = toy_agent(kind, venv=venv, gamma=0.9)
    agent.target_policy_noise = 0.0
    normaliser, buffer = agent._vec_normalize_env, agent.replay_buffer
    np.random.seed(3)  # noqa: NPY002 (SB3 draws from it)
    batch = buffer.sample(64, env=normaliser)
    np.random.seed(3)  # noqa: NPY002
    scalar = ReplayBuffer._get_samples(buffer, np.random.randint(0, buffer.size(), size=64), env=normaliser)  # noqa: NPY002
    torch.testing.assert_close(batch.observations, scalar.observations, rtol=0, atol=0)
    assert batch.rewards.shape == (64, 3)
    assert scalar.rewards.abs().max() > 1e-3
    if clip is not None:
        assert (scalar.rewards.abs() == clip).any() == (clip == 0.5 and reward == "progress")
    torch.testing.assert_close(batch.rewards.sum(dim=1, keepdim=True), scalar.rewards, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        actions = agent.actor_target(scalar.next_observations)
        critics = torch.stack(agent.critic_target(scalar.next_observations, actions))
        values = critics.sum(dim=2).min(dim=0).values[:, None]
        expected = scalar.rewards + (1 - scalar.dones) * 0.9 * values
    torch.testing.assert_close(agent.head_targets(batch).sum(dim=1, keepdim=True), expected, rtol=1e-5, atol=1e-5)


def test_all_heads_bootstrap_from_the_critic_with_the_smaller_sum():
    agent = toy_agent(gamma=0.5, target_policy_noise=0.0)
    batch = agent.replay_buffer.sample(2)._replace(rewards=torch.zeros(2, 3), dones=torch.zeros(2, 1))
    first = torch.tensor([[9.0, 0.0, 0.0], [1.0, 1.0, 1.0]])  # sums 9 and 3
    second = torch.tensor([[1.0, 1.0, 1.0], [0.0, 4.0, 0.0]])  # sums 3 and 4
    agent.critic_target = lambda observations, actions: (first, second)
    torch.testing.assert_close(agent.head_targets(batch), torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]))
    done = batch._replace(dones=torch.ones(2, 1))
    torch.testing.assert_close(agent.head_targets(done), torch.zeros(2, 3))


@BOTH
@pytest.mark.parametrize("rest", [0.0, 0.7])
def test_without_discount_head_i_is_the_reward_of_domain_i(kind, rest):
    """Head i → α_i·r_i, and with a term of no domain α_i·(r_i + g)."""
    agent = toy_agent(
        kind, venv=DummyVecEnv([lambda: Fixed(rest)]), gamma=0.0, steps=500, learning_starts=200, batch_size=64,
        learning_rate=1e-2, buffer_size=1000, action_noise=None, policy_kwargs={"net_arch": [32]}, gradient_steps=1,
    )  # fmt: skip
    actions = np.random.default_rng(0).uniform(-1, 1, (200, 3)).astype(np.float32)
    weights = np.exp(actions) / np.exp(actions).sum(axis=1, keepdims=True)
    with torch.no_grad():
        heads = agent.critic.q1_forward(torch.zeros(200, 2), torch.as_tensor(actions)).numpy()
    error = np.abs(heads - weights * (Fixed.domain_rewards + rest)).mean(axis=0)
    assert error.max() < 0.05
    assert np.abs(weights * Fixed.domain_rewards).mean(axis=0).min() > 0.15  # what an idle head would be off by


def distance_after_learning(name):
    env = toy_env("progress", horizon=20, fields=["progress", "sample_share"])
    recipe = AgentRecipe(hidden=(32, 32), learning_starts=100, gradient_steps=1, gamma=0.5)
    agent = make_agent(name, vectorise(env, 0.5), recipe).learn(800)
    agent.env.training = False
    observation, done, mixtures = agent.env.reset(), False, []
    while not done:
        observation, _, (done,), (info,) = agent.env.step(agent.predict(observation, deterministic=True)[0])
        mixtures.append(info["weights"])
    return float(np.abs(np.mean(mixtures, axis=0) - BEST).max())


def test_it_finds_the_known_best_mixture():
    """`progress` belongs to no domain: what the heads learn of it comes from the shared-out remainder alone."""
    assert distance_after_learning("acodm-td3") < 0.1 < np.abs(np.full(3, 1 / 3) - BEST).max()


def test_it_turns_to_the_domain_with_the_best_reward():
    """J(α) = Σ α_i r_i with r = (1, −2, 0.5) is largest where the first domain's weight is."""
    agent = toy_agent(
        AcodmDDPG, venv=DummyVecEnv([Fixed]), gamma=0.5, steps=400, learning_starts=100, batch_size=32,
        learning_rate=3e-3, policy_kwargs={"net_arch": [32]},
    )  # fmt: skip
    action = agent.predict(np.zeros((1, 2), np.float32), deterministic=True)[0][0]
    weights = np.exp(action) / np.exp(action).sum()
    assert weights @ Fixed.domain_rewards > 0.5  # uniform: −1/6; the best action (1, −1, ≥ 0.5): 0.72
    assert weights.argmin() == 1


@BOTH
@pytest.mark.parametrize("layer_norm", [False, True])
def test_saved_and_loaded_it_predicts_the_same(kind, layer_norm, tmp_path):
    agent = toy_agent(kind, num_envs=2, policy_kwargs=NETWORKS | {"layer_norm": layer_norm})
    agent.save(tmp_path / "agent")
    venv = DummyVecEnv([toy_env] * 2)
    loaded = kind.load(tmp_path / "agent", env=venv, device="cpu")
    observations = np.array([venv.observation_space.sample() for _ in range(50)])
    np.testing.assert_array_equal(agent.predict(observations)[0], loaded.predict(observations)[0])
    inputs = torch.as_tensor(observations), torch.zeros(50, 3)
    for one, other in zip(agent.critic(*inputs), loaded.critic(*inputs), strict=True):
        assert one.shape == (50, 3)
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(loaded.critic.q_networks) == (2 if kind is AcodmTD3 else 1)
    loaded.learn(20)  # and goes on learning
    agent.policy.save(str(tmp_path / "policy"))
    policy = type(agent.policy).load(str(tmp_path / "policy"), device="cpu")
    np.testing.assert_array_equal(agent.predict(observations)[0], policy.predict(observations)[0])


def test_ddpg_is_td3_without_its_tricks():
    agent = toy_agent(AcodmDDPG)
    assert (agent.policy_delay, agent.target_noise_clip, len(agent.critic.q_networks)) == (1, 0.0, 1)


def test_callbacks_see_every_decision():
    class Count(BaseCallback):
        def _on_step(self):
            assert self.locals["infos"][0]["domain_rewards"].shape == (3,)
            return True

    count = Count()
    toy_agent(num_envs=3, steps=0).learn(30, callback=count)
    assert count.n_calls == 10


def test_the_replay_buffer_wraps_around_with_its_head_rewards():
    agent = toy_agent(buffer_size=20, num_envs=2, steps=50)  # 10 rows of 2
    buffer = agent.replay_buffer
    assert (buffer.full, buffer.pos) == (True, 5)
    np.testing.assert_allclose(buffer.head_rewards.sum(axis=2), buffer.rewards, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_steps": 3}, "n_steps=3: must be 1"),
        ({"replay_buffer_class": ReplayBuffer}, "replay_buffer_class=ReplayBuffer: must derive from HeadReplayBuffer"),
        (
            {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
            "optimize_memory_usage=True: must be False",
        ),
    ],
)
@BOTH
def test_what_the_heads_cannot_do_is_refused(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        toy_agent(kind, **settings)


def test_a_policy_with_scalar_critics_is_refused():
    with pytest.raises(ConfigError, match="policy=TD3Policy: must be 'MlpPolicy' or derive from MultiHeadPolicy"):
        AcodmTD3(TD3Policy, DummyVecEnv([toy_env]))


def learner(folder, algo, episodes=3):
    recipe = AgentRecipe(gamma=0.9, hidden=(16,), batch_size=8, learning_starts=4, buffer_size=25)  # it wraps
    return Learner(
        lambda: toy_env("progress"), Learning(algo=algo, episodes=episodes, evaluate_every=0), recipe, folder
    )


@pytest.mark.parametrize("algo", ["acodm-td3", "acodm-ddpg"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(algo, tmp_path):
    whole = learner(tmp_path / "whole", algo)
    whole.learn()
    seen = []

    def kill(row):
        seen.append(row)
        if len(seen) == 27:  # in the third episode of ten decisions
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner(tmp_path / "cut", algo).learn(kill)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 (SB3 draws from it)
    resumed = learner(tmp_path / "cut", algo)
    resumed.learn()
    expected, found = weights_of(whole.agent), weights_of(resumed.agent)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    ours, theirs = whole.agent.replay_buffer, resumed.agent.replay_buffer
    assert np.abs(ours.head_rewards).min() > 0
    np.testing.assert_array_equal(ours.head_rewards, theirs.head_rewards)


def test_a_checkpoint_keeps_that_random_decisions_are_over(tmp_path):
    agent = make_agent("acodm-td3", vectorise(toy_env(), 0.95), AgentRecipe(hidden=(8,)))
    agent.learn(10)
    agent.learning_starts = 0  # as a warm-up by a teacher leaves it
    save_checkpoint(tmp_path / "last", agent, agent.env, {})
    other = make_agent("acodm-td3", vectorise(toy_env(), 0.95), AgentRecipe(hidden=(8,)))
    load_checkpoint(tmp_path / "last", other, other.env)
    assert other.learning_starts == 0


def test_the_logit_penalty_works_on_both_networks():
    """Through `make_agent`, which puts it in front of the tanh: it alone moves an actor whose critic is flat."""
    for layer_norm in (False, True):
        agent = toy_agent(policy_kwargs=NETWORKS | {"layer_norm": layer_norm})
        assert isinstance(agent.actor.mu, nn.Sequential)
        assert isinstance(agent.actor.mu[-1], nn.Tanh)
        assert any(isinstance(module, nn.LayerNorm) for module in agent.actor.mu) == layer_norm
    agent = make_agent("acodm-td3", vectorise(toy_env(), 0.95), AgentRecipe(hidden=(8,), logit_penalty=0.5))
    agent.learn(45)
    for network in agent.critic.q_networks:
        network[-1].weight.data.zero_()
    batch = agent.replay_buffer.sample(8, env=agent._vec_normalize_env)
    agent.actor.zero_grad()
    logits = agent.actor.mu[:-2](batch.observations)
    (logits.square().sum() / len(logits) * 0.5 / 2).backward()
    expected = agent.actor.mu[0].weight.grad.clone()
    agent.actor.zero_grad()
    agent._update_actor(batch)
    torch.testing.assert_close(agent.actor.mu[0].weight.grad, expected, rtol=1e-4, atol=1e-7)


class PaperState(Fixed):
    """The paper's state at K = 22: samples, loss and its change per domain, the step, 9 layer norms and changes."""

    observation_space = gym.spaces.Box(-1, 1, (3 * 22 + 1 + 2 * 9,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (22,), np.float32)


def test_the_paper_preset_has_the_papers_size_and_schedule():
    agent = AcodmDDPG("MlpPolicy", DummyVecEnv([PaperState]), device="cpu", **paper())
    actor, critic = (sum(p.numel() for p in network.parameters()) for network in (agent.actor, agent.critic))
    hidden = 4 * (1024 * 1024 + 1024) + 5 * 2 * 1024 + (1024 * 22 + 22)  # between layers, LayerNorms, output
    assert actor == 85 * 1024 + 1024 + hidden
    assert critic == (85 + 22) * 1024 + 1024 + hidden
    assert 2 * (actor + critic) == 17_322_072  # published: 17.3 million with targets
    assert [type(module).__name__ for module in agent.actor.mu[:3]] == ["Linear", "LayerNorm", "ReLU"]
    assert [type(module).__name__ for module in agent.critic.q_networks[0][-2:]] == ["ReLU", "Linear"]
    assert (agent.gamma, agent.tau, agent.buffer_size, agent.batch_size) == (0.95, 0.001, 10_000, 32)
    assert agent.actor.optimizer.defaults["weight_decay"] == agent.critic.optimizer.defaults["weight_decay"] == 0.1
    assert [paper_learning_rate(left) for left in (1.0, 0.5, 0.0)] == pytest.approx([0.01, 0.0055, 0.001])
    assert "n_critics" not in paper()["policy_kwargs"]  # SB3's DDPG writes into what it is given


def test_it_is_a_td3_to_whoever_asks():
    assert issubclass(AcodmDDPG, TD3)
