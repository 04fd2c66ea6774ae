"""PPO and TD3 for any number of domains on random mixing problems: symmetries, likelihoods, export, learning."""

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize

from acodm_env.agents.equivariant_ppo import EquivariantPPO
from acodm_env.agents.export import export, to_policy
from acodm_env.agents.initial import begin_with, environment_for, frozen_actor, hidden_of
from acodm_env.agents.noise import PersistentNoise
from acodm_env.agents.sb3 import make_agent, normalised
from acodm_env.agents.surrogate_learner import Contender, learn
from acodm_env.agents.vector import ArrayVecEnv
from acodm_env.errors import ConfigError, PolicyError
from acodm_env.policy.equivariant import split_mask
from acodm_env.policy.load import load_policy
from acodm_env.surrogate.env import SurrogateEnv
from acodm_env.surrogate.vector import SurrogateVectorEnv

ENV = {
    "problems": {"num_domains": [3, 6]},
    "episode_steps": 6,
    "reward": {"terms": {"final": 1.0}, "final_over_uniform": True},
}
SMALL = {"net_arch": [16]}


def arrays(num_envs=16, **settings):
    return ArrayVecEnv(SurrogateVectorEnv(num_envs, **(ENV | settings)))


def ppo(num_envs=16, seed=0, policy_kwargs=None, **settings):
    venv = VecNormalize(arrays(num_envs, **settings), norm_obs=False, gamma=1.0)
    kwargs = SMALL | (policy_kwargs or {})
    agent = EquivariantPPO("MlpPolicy", venv, n_steps=6, batch_size=16, n_epochs=1, policy_kwargs=kwargs, seed=seed)
    with torch.no_grad():  # a fresh actor is uniform
        agent.policy.actor.head.layers[-1].weight.mul_(100)
    return agent


def observations(agent, steps=2):
    venv, rng = agent.get_env(), np.random.default_rng(0)
    venv.seed(0)
    seen = [venv.reset()]
    for _ in range(steps):
        seen.append(venv.step(rng.uniform(-1, 1, (venv.num_envs, 6)).astype(np.float32))[0])
    return torch.as_tensor(np.concatenate(seen))


def test_only_what_an_action_can_change_is_likely_or_not():
    agent = ppo(64)
    seen = observations(agent)
    choices = agent.policy.view.choices(seen)
    trainable = agent.policy.view.column(seen, "trainable") > 0
    assert torch.equal(choices, trainable)
    assert not choices.all()
    actions = torch.randn(len(seen), 6)
    moved = torch.where(choices, actions, actions + 5)
    values, likelihood, entropy = agent.policy.evaluate_actions(seen, actions)
    _, other, _ = agent.policy.evaluate_actions(seen, moved)
    torch.testing.assert_close(likelihood, other)
    logits, _ = agent.policy._logits(seen)
    normal = torch.distributions.Normal(logits, agent.policy.log_std.exp())
    torch.testing.assert_close(likelihood, (normal.log_prob(actions) * choices).sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, (normal.entropy() * choices).sum(1), rtol=1e-4, atol=1e-4)
    assert values.shape == (len(seen), 1)


def test_without_units_the_critic_is_one_number():
    agent = ppo(16, policy_kwargs={"critic_arch": []}, copies=4)
    before = agent.policy.predict_values(observations(agent))
    assert (before == 0).all()
    agent.learn(96)
    after = agent.policy.predict_values(observations(agent))
    assert after.unique().numel() == 1
    assert after[0] != 0


def test_the_actor_of_td3_can_learn_slower_than_its_critic():
    agent = make_agent_td3(actor_rate=0.25, learning_rate=0.004)
    agent.set_logger(configure(None, []))
    agent._update_learning_rate([agent.actor.optimizer, agent.critic.optimizer])
    rates = [group["lr"] for part in (agent.actor, agent.critic) for group in part.optimizer.param_groups]
    assert rates == [0.001, 0.004]
    with pytest.raises(ConfigError, match="actor_rate=-1: must be 0 or more"):
        make_agent_td3(actor_rate=-1)


def test_td3_learns_after_whole_episodes():
    agent = make_agent_td3(train_freq=[1, "episode"])
    assert agent.train_freq.frequency == 6


def test_advantages_are_relative_to_runs_on_the_same_problem():
    agent = ppo(16, copies=4)
    buffer = agent.rollout_buffer
    assert buffer.copies == 4
    rng = np.random.default_rng(0)
    buffer.rewards[-1] = np.repeat([0.0, 10.0, 20.0, 30.0], 4) + rng.normal(size=16)
    buffer.compute_returns_and_advantage(torch.zeros(16), np.ones(16))
    groups = buffer.advantages.reshape(6, 4, 4)
    np.testing.assert_allclose(groups.mean(-1), 0, atol=1e-5)
    assert (groups.std(-1) > 0.5).all()
    assert (groups.std(-1) < 1.1).all()


@pytest.mark.parametrize("algo", ["equivariant-ppo", "equivariant-td3"])
def test_exported_policies_fit_other_numbers_of_domains(algo, tmp_path):
    settings = {"n_steps": 40, "policy_kwargs": dict(SMALL)}
    if algo == "equivariant-td3":
        settings |= {"gradient_steps": 2, "batch_size": 16, "buffer_size": 960}
    contender = Contender(algo=algo, agent={"settings": settings | {"n_envs": 16, "n_timesteps": 200}})
    learned = learn(contender, ENV, seed=0)
    loaded = load_policy(learned.policy.save(tmp_path / "policy"))
    assert loaded.probe_sequences == 28
    wide = SurrogateVectorEnv(4, **(ENV | {"problems": {"num_domains": [11, 11]}}), fields=None)
    observation, _ = wide.reset(seed=0)
    action = loaded.act(*split_mask(observation, wide.observer.layout))
    assert action.shape == (4, 11)
    assert np.isfinite(action).all()


def test_ppo_is_exported_exactly(tmp_path):
    agent = ppo()
    agent.learn(96)
    policy = to_policy(agent, agent.get_env(), SurrogateEnv(**ENV), {})
    assert export(policy, tmp_path / "policy", agent, agent.get_env()) <= 1e-5


def make_agent_td3(**settings):
    from acodm_env.agents.hyperparameters import AgentRecipe

    recipe = AgentRecipe(
        settings={"policy_kwargs": SMALL, "n_envs": 16, "buffer_size": 960, "batch_size": 16} | settings
    )
    return make_agent(
        "equivariant-td3", normalised(arrays(), {"normalize": {"norm_obs": False, "norm_reward": True}}), recipe
    )


def test_noise_lasts_within_an_episode_and_is_drawn_anew_in_the_next():
    np.random.seed(0)  # noqa: NPY002 (SB3's own generator)
    noise = PersistentNoise(np.array([0.5, 1.0]), 0.9, 4000)
    first, second = noise(), noise()
    assert first.std(0) == pytest.approx([0.5, 1.0], rel=0.1)
    assert second.std(0) == pytest.approx([0.5, 1.0], rel=0.1)
    assert np.corrcoef(first[:, 0], second[:, 0])[0, 1] == pytest.approx(0.9, abs=0.03)
    noise.reset(range(2000))
    third = noise()
    assert abs(np.corrcoef(second[:2000, 0], third[:2000, 0])[0, 1]) < 0.1
    assert np.corrcoef(second[2000:, 0], third[2000:, 0])[0, 1] == pytest.approx(0.9, abs=0.03)


# --- beginning with a policy -------------------------------------------------------------------------------


def exported(seed=3):
    agent = ppo(seed=seed)
    return to_policy(agent, agent.get_env(), SurrogateEnv(**ENV), {})


@pytest.mark.parametrize("algo", ["equivariant-ppo", "equivariant-td3"])
def test_an_untrained_agent_is_the_policy_that_it_begins_with(algo):
    policy = exported()
    agent = ppo(policy_kwargs={"net_arch": hidden_of(policy)}) if algo == "equivariant-ppo" else make_agent_td3()
    before = [parameter.clone() for parameter in agent.policy.critic.parameters()]
    begin_with(agent, policy)
    seen = observations(agent).numpy()
    expected = policy.act(*split_mask(seen, agent.policy.view.layout))
    assert expected.std() > 0.02
    np.testing.assert_allclose(agent.predict(seen, deterministic=True)[0], expected, atol=1e-5)
    with frozen_actor(agent):
        agent.learn(16 * 40)
    np.testing.assert_allclose(agent.predict(seen, deterministic=True)[0], expected, atol=1e-5)
    moved = [not torch.equal(one, other) for one, other in zip(before, agent.policy.critic.parameters(), strict=True)]
    assert any(moved)


def test_a_policy_that_does_not_fit_is_refused():
    policy = exported()
    with pytest.raises(ConfigError, match="net_arch"):
        begin_with(ppo(policy_kwargs={"net_arch": [8]}), policy)
    with pytest.raises(PolicyError, match="in this order"):
        begin_with(ppo(fields=["domain_loss", "progress", "mask"]), policy)
    with pytest.raises(ConfigError, match="action="):
        begin_with(ppo(action={"scale": 2.0}), policy)
    with pytest.raises(ConfigError, match="bound to domains"):
        begin_with(make_agent("ppo", normalised(arrays(), {})), policy)
    assert environment_for(policy)["action"] == {"scale": 5.0, "floor": 0.02, "rate": 0.0}
