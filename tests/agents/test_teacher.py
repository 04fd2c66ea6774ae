import logging

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from acodm_env.agents.acodm import AcodmDDPG, AcodmTD3
from acodm_env.agents.baselines import make_mixer
from acodm_env.agents.learning import Learner, Learning
from acodm_env.agents.sb3 import AgentRecipe
from acodm_env.agents.teacher import warm_up
from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError
from acodm_env.mixture import ActionMap
from acodm_env.reward import RewardConfig
from acodm_env.trainer import Mixer, RunRequest
from toy import ToyTrainer

TILTED = {"weights": [0.6, 0.3, 0.1]}
QUICK = {"decisions": 40, "actor_steps": 150, "critic_steps": 20}


def toy_env(reward="progress", horizon=10, decision_every=1, **options):
    trainer = ToyTrainer((0.6, 0.3, 0.1), horizon=horizon, decision_every=decision_every)
    return MixtureEnv(trainer, reward=RewardConfig(terms={reward: 1.0}), **options)


def toy_agent(kind=TD3, num_envs=2, normalise=True, **options):
    venv = DummyVecEnv([lambda: toy_env(**options)] * num_envs)
    venv = VecNormalize(venv, gamma=0.9) if normalise else venv
    return kind(
        "MlpPolicy", venv, device="cpu", seed=0, buffer_size=200, batch_size=32, policy_kwargs={"net_arch": [32]}
    )


def weights_of(network):
    return [p.detach().clone() for p in network.parameters()]


class Recording(Mixer):
    """Turns by one domain per decision, and notes what it is shown."""

    name = "recording"
    needs = frozenset({"losses", "validation"})

    def __init__(self):
        self.seen, self.starts, self.turn = [], 0, 0

    def __deepcopy__(self, memo):
        return self  # the test looks at the one that it made

    def start(self, info):
        super().start(info)
        self.starts, self.turn = self.starts + 1, 0

    def weights(self):
        return np.roll([0.5, 0.3, 0.2], self.turn)

    def update(self, stats):
        self.turn += 1
        self.seen.append(stats)


def test_the_buffer_holds_the_teachers_transitions():
    """Replayed by hand on the same environments: observation, action, reward, next observation, end."""
    agent = toy_agent(AcodmTD3, num_envs=2)
    agent.env.seed(7)
    warm_up(agent, "static", options=TILTED, decisions=24, actor_steps=0, critic_steps=0, noise=0.0)
    buffer = agent.replay_buffer
    assert (buffer.pos, buffer.full) == (12, False)
    action, error = ActionMap().action(np.array(TILTED["weights"]))
    assert error < 1e-12
    np.testing.assert_array_equal(buffer.actions[:12], np.broadcast_to(action.astype(np.float32), (12, 2, 3)))
    for index in range(2):
        env = toy_env()
        observation, _ = env.reset(seed=7 + index)
        for row in range(12):
            np.testing.assert_array_equal(buffer.observations[row, index], observation)
            observation, reward, terminated, truncated, info = env.step(action.astype(np.float32))
            np.testing.assert_allclose(buffer.next_observations[row, index], observation, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(info["weights"], TILTED["weights"], atol=1e-6)
            np.testing.assert_allclose(buffer.rewards[row, index], reward, rtol=1e-6)
            np.testing.assert_allclose(buffer.head_rewards[row, index], reward * info["weights"], rtol=1e-5)
            assert buffer.dones[row, index] == (terminated or truncated) == (row == 9)
            if truncated:
                observation, _ = env.reset()


def test_noise_is_played_and_stored_but_not_imitated():
    agent = toy_agent()
    played = []
    original = agent.env.step_async
    agent.env.step_async = lambda actions: (played.append(actions), original(actions))
    warm_up(agent, "uniform", noise=0.3, decisions=40, actor_steps=400, critic_steps=0)
    stored = agent.replay_buffer.actions[:20]
    np.testing.assert_array_equal(stored, np.array(played))
    assert 0.2 < stored.std() < 0.4
    observations = agent.replay_buffer.observations[:20, 0]
    actions = agent.predict(agent.env.normalize_obs(observations))[0]
    assert np.abs(actions).max() < 0.05  # uniform is the zero action


@pytest.mark.parametrize("kind", [TD3, DDPG, AcodmTD3, AcodmDDPG, SAC])
@pytest.mark.parametrize("normalise", [True, False])
def test_actor_and_critic_are_pretrained(kind, normalise):
    agent = toy_agent(kind, normalise=normalise)
    critic = weights_of(agent.critic)
    report = warm_up(agent, "static", options=TILTED, **QUICK)
    assert report.teacher == "static"
    assert report.decisions == agent.replay_buffer.size() * 2 == 40
    assert report.actor_loss_after < 0.05 * report.actor_loss_before
    assert np.isfinite([report.critic_loss_before, report.critic_loss_after]).all()
    assert any((now != then).any() for now, then in zip(agent.critic.parameters(), critic, strict=True))
    agent.env.seed(0)
    action = agent.predict(agent.env.reset(), deterministic=True)[0][0]
    np.testing.assert_allclose(ActionMap().weights(action), TILTED["weights"], atol=0.05)
    agent.learn(20)  # and goes on, without random decisions
    assert agent.learning_starts == 0


@pytest.mark.parametrize("kind", [TD3, AcodmTD3, SAC])
def test_the_critics_pretraining_leaves_the_actor_alone(kind):
    """Weight decay and moments included; and the algorithm's own update bootstraps from moving targets."""
    kwargs = {"optimizer_class": torch.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.5}}
    venv = DummyVecEnv([toy_env])
    agent = kind("MlpPolicy", venv, device="cpu", buffer_size=100, seed=0, policy_kwargs={"net_arch": [8]} | kwargs)
    actor, target = weights_of(agent.actor), weights_of(agent.critic_target)
    warm_up(agent, "uniform", decisions=20, actor_steps=0, critic_steps=30)
    assert all(torch.equal(now, then) for now, then in zip(agent.actor.parameters(), actor, strict=True))
    assert all(p.requires_grad for p in agent.actor.parameters())
    assert not agent.actor.optimizer.state_dict()["state"]
    assert any((now != then).any() for now, then in zip(agent.critic_target.parameters(), target, strict=True))


def test_the_critic_learns_the_teachers_return():
    """Rewards of the toy are 0.1·(1 − ‖w − best‖²): the teacher, who is the best, earns 0.1 a decision for ever."""
    agent = toy_agent(AcodmDDPG, normalise=False, num_envs=1, fields=["progress"])
    agent.gamma, agent.tau = 0.5, 0.05
    report = warm_up(agent, "static", options=TILTED, decisions=50, actor_steps=300, critic_steps=800, noise=0.05)
    assert report.critic_loss_after < 0.2 * report.critic_loss_before
    observations = torch.linspace(0.0, 0.5, 6)[:, None]
    with torch.no_grad():
        value = agent.critic.q1_forward(observations, agent.actor(observations)).sum(dim=1)
    np.testing.assert_allclose(value, 0.1 / (1 - 0.5), atol=0.03)


def test_target_actor_is_the_imitated_one():
    agent = toy_agent()
    warm_up(agent, "uniform", decisions=10, actor_steps=20, critic_steps=0)
    for one, other in zip(agent.actor.parameters(), agent.actor_target.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_the_action_map_cannot_express_is_reported(caplog):
    """The floor of 0.1 gives every domain 1/30 at least; the teacher wants one at 0.002."""
    agent = toy_agent()
    wanted = np.array([0.9, 0.098, 0.002])
    with caplog.at_level(logging.INFO):
        report = warm_up(agent, "static", options={"weights": list(wanted)}, **QUICK)
    expected = ActionMap().action(wanted / wanted.sum())[1]
    assert report.inversion_error == pytest.approx(expected)
    assert report.mean_inversion_error == pytest.approx(expected)
    assert expected > 0.03
    assert f"inversion_error={report.inversion_error}" in caplog.text


def test_a_learning_teacher_sees_every_decision_and_starts_anew_each_episode():
    teacher = Recording()
    agent = toy_agent(num_envs=1, horizon=20, decision_every=4)  # five decisions an episode
    report = warm_up(agent, teacher, decisions=12, actor_steps=0, critic_steps=0, noise=0.0)
    assert report.teacher == "recording"
    assert teacher.starts == 3
    assert [stats.step for stats in teacher.seen] == [4, 8, 12, 16] * 2 + [4, 8]  # an episode's last changes nothing
    assert all(stats.gradients is None for stats in teacher.seen)
    assert all(stats.eval_losses.shape == (3,) for stats in teacher.seen)
    shown = [np.roll([0.5, 0.3, 0.2], turn) for turn in (0, 1, 2, 3, 0, 1, 2, 3, 0, 1)]
    np.testing.assert_allclose([stats.requested for stats in teacher.seen], shown, atol=1e-6)
    actions = agent.replay_buffer.actions[:6, 0]
    mixtures = [ActionMap().weights(action) for action in actions]
    np.testing.assert_allclose(mixtures[4], np.roll([0.5, 0.3, 0.2], 4), atol=1e-6)


@pytest.mark.parametrize("name", ["odm-paper-rescaled", "exp3", "softmax-loss", "ado", "unimax"])
def test_mixers_that_the_environment_suffices_teach(name):
    agent = toy_agent(num_envs=2)
    report = warm_up(agent, name, decisions=30, actor_steps=50, critic_steps=2)
    assert report.teacher == name
    assert report.actor_loss_after < report.actor_loss_before


def test_the_same_seed_gives_the_same_warm_up():
    def once():
        agent = toy_agent(AcodmTD3)
        agent.env.seed(1)
        return warm_up(agent, "odm-released", **QUICK), weights_of(agent.policy)

    (one, first), (other, second) = once(), once()
    assert one == other
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_after_a_warm_up_learning_resumes_bit_for_bit(tmp_path):
    """The resumed run has no teacher: replay, networks and the end of random decisions come from the checkpoint."""

    def learner(name, *, taught):
        recipe = AgentRecipe(gamma=0.9, hidden=(16,), batch_size=8, learning_starts=1000)
        run = Learner(toy_env, Learning(algo="acodm-td3", episodes=3, evaluate_every=0), recipe, tmp_path / name)
        if taught:
            warm_up(run.agent, "odm-released", **QUICK)
        return run

    def kill(row):
        seen.append(row)
        if len(seen) == 17:
            raise KeyboardInterrupt

    whole, seen = learner("whole", taught=True), []
    whole.learn()
    with pytest.raises(KeyboardInterrupt):
        learner("cut", taught=True).learn(kill)
    resumed = learner("cut", taught=False)
    resumed.learn()
    ours, theirs = weights_of(whole.agent.policy), weights_of(resumed.agent.policy)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert resumed.agent.num_timesteps == 30
    assert resumed.agent.replay_buffer.size() == 70
    np.testing.assert_array_equal(whole.agent.replay_buffer.head_rewards, resumed.agent.replay_buffer.head_rewards)


class Prepared(Recording):
    name = "prepared"

    def preparation(self, info):
        return [RunRequest(name="probe", mixer="uniform", steps=10)]


class Choosy(Recording):
    name = "choosy"

    def due(self, step):
        return step == 3


@pytest.mark.parametrize(
    ("teacher", "env", "message"),
    [
        ("odm-relesed", {}, "mixer='odm-relesed'.*did you mean 'odm-released'"),
        ("eg-interaction", {}, "teacher=eg-interaction: needs gram; this environment .* only .*losses, validation"),
        ("odm-released", {"fields": ["progress"]}, "teacher=odm-released: needs losses; .* add 'loss' to the env"),
        ("sheared-llama", {"reward": "interaction"}, "teacher=sheared-llama: needs validation"),
        (Prepared(), {}, r"teacher=prepared: needs runs made beforehand \(probe\); .* teacher=static"),
        (Choosy(), {"decision_every": 2}, "teacher=choosy: evaluates at .* decision_every=2 must be 1"),
    ],
)
def test_a_teacher_that_cannot_teach_here_is_refused(teacher, env, message):
    with pytest.raises(ConfigError, match=message):
        warm_up(toy_agent(**env), teacher, **QUICK)


@pytest.mark.parametrize("change", [{"decisions": 0}, {"actor_steps": -1}, {"noise": -0.1}, {"learning_rate": 0.0}])
def test_numbers_out_of_range_are_refused(change):
    (name,) = change
    with pytest.raises(ConfigError, match=f"{name}=.*must be"):
        warm_up(toy_agent(), "uniform", **(QUICK | change))


def test_an_agent_without_a_replay_buffer_is_refused():
    with pytest.raises(ConfigError, match="algo=PPO: must be off-policy"):
        warm_up(PPO("MlpPolicy", DummyVecEnv([toy_env]), device="cpu", n_steps=4, batch_size=4), "uniform", **QUICK)


class Forgetful(gym.Wrapper):
    """An environment of which only trainer and action map can be asked, as one stepped in arrays would be."""

    def get_wrapper_attr(self, name):
        if name == "_history":
            raise AttributeError(name)
        return super().get_wrapper_attr(name)


def test_without_kept_statistics_only_a_fixed_mixture_teaches():
    agent = TD3("MlpPolicy", DummyVecEnv([lambda: Forgetful(toy_env())]), device="cpu", buffer_size=100)
    with pytest.raises(ConfigError, match=r"env=DummyVecEnv: keeps no statistics.*a teacher with a fixed mixture"):
        warm_up(agent, make_mixer("odm-released"), **QUICK)
    assert warm_up(agent, "uniform", **QUICK).decisions == 40
