"""One run in which the agent learns: who acts when, what is learned, what is refused, and exact resume in mid-run."""

import numpy as np
import pytest
import torch

from acodm_env.agents.cotraining import Cotrainer, Cotraining
from acodm_env.agents.export import parity
from acodm_env.agents.sb3 import AgentRecipe
from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError
from acodm_env.files import read_state, write_state
from acodm_env.reward import RewardConfig
from acodm_env.surrogate.env import SurrogateEnv
from toy import ToyTrainer

SMALL = AgentRecipe(hidden=(16,), batch_size=8, buffer_size=200)
BEST = (0.6, 0.3, 0.1)


def toy_env(horizon=24, diverge_at=0, terms=None, fields=None):
    trainer = ToyTrainer(BEST, horizon=horizon, decision_every=2, diverge_at=diverge_at)
    return MixtureEnv(trainer, reward=RewardConfig(terms=terms or {"interaction": 1.0, "progress": 1.0}), fields=fields)


def cotrainer(env=None, **settings):
    settings = {"start_decisions": 4, "pretrain_steps": 5} | settings
    return Cotrainer(env or toy_env(), Cotraining(**settings), SMALL)


def decide(run):
    return run.decide() | {"weights": run.env._weights.tolist(), "objective": run.env._objective}


def finish(run):
    rows = []
    while not run.ended:
        rows.append(decide(run))
    return rows


def tensors(run):
    return {name: p.detach().clone() for name, p in run.agent.policy.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("algo", ["td3", "ddpg", "sac", "tqc", "crossq", "acodm-td3", "acodm-ddpg", "equivariant-td3"])
def test_killed_in_the_middle_it_goes_on_bit_for_bit(algo, tmp_path):
    """Before, at and after the hand-over from the teacher; other draws in between change nothing."""
    if algo in ("tqc", "crossq"):
        pytest.importorskip("sb3_contrib")

    def make():
        fields = ("loss", "sample_share", "interaction", "progress") if algo == "equivariant-td3" else None
        return cotrainer(toy_env(fields=fields), algo=algo, teacher="odm-released", seed=3)

    whole = make()
    whole.start()
    states, rows = {}, []
    while not whole.ended:
        if whole.decisions in (2, 4, 7):
            write_state(tmp_path / f"{whole.decisions}", whole.state_dict())
            states[whole.decisions] = len(rows)
        rows.append(decide(whole))
    assert len(rows) == 12
    assert [row["taught"] for row in rows] == [1.0] * 4 + [0.0] * 8
    assert "imitation_loss" in rows[3]
    assert all("critic_loss" in row for row in rows[4:-1])
    for decision, before in states.items():
        torch.manual_seed(99)
        np.random.seed(99)  # noqa: NPY002 (SB3 draws from it)
        second = make()
        second.load_state_dict(read_state(tmp_path / f"{decision}"))
        assert second.decisions == decision
        assert finish(second) == rows[before:]
        assert same(tensors(second), tensors(whole))
        assert second.total_reward == whole.total_reward
        np.testing.assert_array_equal(second.agent.replay_buffer.observations, whole.agent.replay_buffer.observations)
        np.testing.assert_array_equal(second.venv.obs_rms.mean, whole.venv.obs_rms.mean)


def test_state_holds_pending_mixtures_and_a_randomised_surrogate():
    """A lag, padding, noise and a surface drawn by the episode's generator are all where they were."""

    def make():
        return SurrogateEnv(episode_steps=8, lag=2, noise=1.0, family={})

    whole, second = make(), make()
    whole.reset(seed=5)
    action = np.linspace(-1, 1, whole.action_space.shape[0], dtype=np.float32)
    for _ in range(3):
        whole.step(action)
    second.load_state_dict(whole.state_dict())
    for _ in range(5):
        one, other = whole.step(-action), second.step(-action)
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:4] == other[1:4]
        for name, value in one[4].items():
            np.testing.assert_array_equal(value, other[4][name])
    np.testing.assert_array_equal(whole.reset()[0], second.reset()[0])  # the episode after it, too
    np.testing.assert_array_equal(whole.step(action)[0], second.step(action)[0])


def test_state_needs_an_episode():
    with pytest.raises(ConfigError, match="call reset\\(\\) first"):
        toy_env().state_dict()


def test_uniform_start_without_noise_is_uniform_and_the_run_is_not_started_anew():
    run = cotrainer(start_decisions=12, noise=0.0)
    run.start()
    rows = finish(run)
    np.testing.assert_allclose([row["weights"] for row in rows], 1 / 3, atol=1e-12)
    trainer = run.env.trainer
    assert trainer.steps_done == 24  # SB3 reset the environment after the last decision, which must not undo the run
    assert trainer.objective == rows[-1]["objective"] < 5.0
    assert not any("critic_loss" in row for row in rows)


def test_noise_makes_the_teachers_mixtures_differ():
    run = cotrainer(start_decisions=12)
    run.start()
    weights = np.array([row["weights"] for row in finish(run)])
    assert weights.std(0).min() > 0.01
    np.testing.assert_allclose(weights.mean(0), 1 / 3, atol=0.1)


def test_it_learns_the_best_mixture_within_the_run():
    """200 decisions of a toy whose progress is largest at (0.6, 0.3, 0.1): exploration noise included."""
    run = Cotrainer(
        toy_env(horizon=400, terms={"progress": 1.0}, fields=["progress"]),
        Cotraining(start_decisions=40, pretrain_steps=50, seed=1),
        AgentRecipe(hidden=(32,), gamma=0.0, logit_penalty=0.01, learning_rate=3e-3, gradient_steps=8),
    )
    run.start()
    weights = np.array([row["weights"] for row in finish(run)])
    first, last = (np.square(part - BEST).sum(1).mean() for part in (weights[:40], weights[-40:]))
    assert last < 0.5 * first


def test_exported_policy_is_the_agent():
    run = cotrainer()
    run.start()
    finish(run)
    policy = run.policy({})
    assert (policy.horizon, policy.decision_every) == (24, 2)
    assert parity(policy, run.agent, run.venv) < 1e-5


def test_diverged_target_ends_the_run_with_a_finite_replay():
    run = cotrainer(toy_env(diverge_at=11))
    run.start()
    rows = finish(run)
    assert len(rows) == 6
    assert run.env.trainer.steps_done == 11
    assert np.isfinite(run.agent.replay_buffer.rewards).all()
    assert np.isfinite(run.agent.replay_buffer.next_observations).all()


@pytest.mark.parametrize(
    ("settings", "env", "message"),
    [
        ({"algo": "ppo"}, {}, "algo=ppo: must be off-policy, such as td3"),
        ({"algo": "a2c"}, {}, "algo=a2c: must be off-policy"),
        ({"algo": "ars"}, {}, "algo=ars: must be one of"),
        ({"algo": "tdd3"}, {}, "did you mean 'td3'"),
        ({"teacher": "unifrom"}, {}, "did you mean 'uniform'"),
        ({"teacher": "regmix"}, {}, "teacher=regmix: needs"),
        ({"start_decisions": -1}, {}, "start_decisions=-1: must be at least 0"),
        ({"noise": float("nan")}, {}, "noise=nan: must be at least 0"),
        ({}, {"terms": {"final": 1.0}}, "reward=final: must be interaction"),
    ],
)
def test_what_cannot_learn_within_a_run_is_refused_by_name(settings, env, message):
    with pytest.raises(ConfigError, match=message):
        cotrainer(toy_env(**env), **settings)


def test_reward_must_not_need_a_uniform_run_beside():
    reward = RewardConfig(terms={"progress": 1.0}, progress_over_uniform=True)
    with pytest.raises(ConfigError, match="progress_over_uniform=True: must be false; it takes a uniform run"):
        cotrainer(MixtureEnv(ToyTrainer(BEST), reward=reward))


def test_learning_once_an_episode_is_refused():
    recipe = AgentRecipe(settings={"train_freq": (1, "episode")})
    with pytest.raises(ConfigError, match="train_freq=episode: must be a number of decisions"):
        Cotrainer(toy_env(), Cotraining(), recipe)


@pytest.mark.parametrize(("frequency", "gradient_steps", "updates"), [(3, -1, [6, 9]), (3, 2, [6, 9]), (1, 0, [])])
def test_train_freq_and_gradient_steps_are_the_algorithms(frequency, gradient_steps, updates):
    recipe = AgentRecipe(hidden=(8,), settings={"train_freq": frequency, "gradient_steps": gradient_steps})
    run = Cotrainer(toy_env(), Cotraining(start_decisions=4, pretrain_steps=0), recipe)
    run.start()
    rows = finish(run)
    assert [index + 1 for index, row in enumerate(rows) if "critic_loss" in row] == updates
    assert run.agent._n_updates == (len(updates) * (frequency if gradient_steps < 0 else gradient_steps))
