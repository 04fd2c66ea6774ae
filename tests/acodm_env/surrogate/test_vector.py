import time
import warnings
from statistics import median

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from acodm_env.errors import ConfigError
from acodm_env.experiments.console import say
from acodm_env.surrogate.env import SurrogateEnv
from acodm_env.surrogate.trainer import SurrogateTrainer
from acodm_env.surrogate.vector import SurrogateVectorEnv

ID = "acodm/Surrogate-v0"
"""Entries of `info` that both environments have."""


def actions(num_steps, num_envs=5, num_domains=17, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (num_steps, num_envs, num_domains)).astype(np.float32)


# --- equal to the scalar environment -----------------------------------------------------------------------

GRADIENTS = ["loss", "delta_loss", "gradient_norm", "interaction", "target_loss", "delta_target_loss", "mask"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fields": GRADIENTS, "reward": "interaction"},
        {"lag": 2},
        {"lag": 3, "fields": ["pending", *GRADIENTS], "reward": {"interaction": 1.0, "alignment": -0.5, "final": 0.1}},
        {"steps_per_action": 3, "fields": GRADIENTS},
        {"reward": {"final": 1.0, "alignment": 0.3}, "interaction": {"smoothing": 0.2, "importance_weighted": True}},
        {"reward": {"terms": {"progress": 1.0}, "objective": {"arxiv": 2.0, "github": 1.0}}},
        {"reward": {"terms": {"progress": 1.0}, "progress_over_uniform": True}, "steps_per_action": 2},
        {"noise_domain": True, "repetition": False, "forgetting": False},
        {"action": {"scale": 1.0, "floor": 0.3, "prior": [float(n) for n in range(1, 18)]}},
    ],
    ids=str,
)
def test_a_batch_is_that_many_scalar_environments(settings):
    """Five of them, float64, noise off: observation before rounding, reward, end and info within 1e-12."""
    num_domains = 18 if "noise_domain" in settings else 17
    settings = {"episode_steps": 20, "noise": 0.0} | settings
    vector = SurrogateVectorEnv(num_envs=5, dtype="float64", **settings)
    scalars = [SurrogateEnv(**settings) for _ in range(5)]
    assert vector.single_observation_space == scalars[0].observation_space
    assert vector.single_action_space == scalars[0].action_space
    observations, infos = vector.reset(seed=0)
    for row, env in enumerate(scalars):
        observation, info = env.reset(seed=row)
        np.testing.assert_array_equal(observations[row], observation)
        assert infos.keys() == info.keys()
        for name in info:
            np.testing.assert_allclose(infos[name][row], info[name], rtol=0, atol=1e-12, err_msg=name)
    for step_actions in actions(-(-20 // settings.get("steps_per_action", 1)), num_domains=num_domains):
        observations, rewards, terminated, truncated, infos = vector.step(step_actions)
        for row, env in enumerate(scalars):
            observation, reward, ended, cut, info = env.step(step_actions[row])
            np.testing.assert_allclose(observations[row], observation, rtol=2e-7, atol=1e-9)  # a float32's last place
            for field in env.observer.fields:
                one, other = field.compute(vector.observer)[row], field.compute(env.observer)
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-12, err_msg=field.name)
            assert rewards[row] == pytest.approx(reward, rel=0, abs=1e-12)
            assert (terminated[row], truncated[row]) == (ended, cut)
            for name in info:
                np.testing.assert_allclose(infos[name][row], info[name], rtol=0, atol=1e-12, err_msg=name)
    assert truncated.all()


@pytest.mark.parametrize("family", [{}, {"num_domains": [3, 9]}], ids=str)
def test_rows_of_a_family_are_runs_on_their_own_surfaces(family):
    vector = SurrogateVectorEnv(num_envs=6, dtype="float64", family=family, noise=0.0, episode_steps=8)
    vector.reset(seed=2)
    runs = [SurrogateTrainer(surface, horizon=8, noise=0.0) for surface in vector.runs.surfaces]
    for run in runs:
        run.reset(np.random.default_rng(0))
    size = vector.single_action_space.shape[0]
    for step_actions in actions(8, 6, size):
        _, rewards, _, _, infos = vector.step(step_actions)
        for row, run in enumerate(runs):
            real = len(run.info.domains)
            before = run.evaluate("test") @ run.info.objective_weights
            run.step(infos["weights"][row, :real])
            objective = run.evaluate("test") @ run.info.objective_weights
            assert infos["objective"][row] == pytest.approx(objective, rel=0, abs=1e-12)
            assert rewards[row] == pytest.approx(before - objective, rel=0, abs=1e-12)
            np.testing.assert_array_equal(infos["weights"][row, real:], 0.0)
            assert infos["weights"][row].sum() == pytest.approx(1)


def test_float32_is_close_to_float64():
    moves, ends = actions(40), []
    for dtype in ("float32", "float64"):
        env = SurrogateVectorEnv(num_envs=5, dtype=dtype)
        env.reset(seed=0)
        for step_actions in moves:
            observation, *_, info = env.step(step_actions)
        assert observation.dtype == np.float32
        ends.append(info["objective"])
    assert ends[0].dtype == np.float32
    np.testing.assert_allclose(ends[0], ends[1], atol=2e-5)


# --- reward over a uniform run -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"family": {}}, {"family": {"num_domains": [3, 8]}}], ids=str)
def test_progress_over_uniform_adds_up_to_uniforms_end_minus_the_policys(settings):
    reward = {"terms": {"progress": 1.0}, "progress_over_uniform": True}
    env = SurrogateVectorEnv(num_envs=5, dtype="float64", reward=reward, episode_steps=12, **settings)
    size = env.single_action_space.shape[0]

    def play(moves):
        env.reset(seed=4)
        total = np.zeros(5)
        for step_actions in moves:
            _, rewards, _, truncated, info = env.step(step_actions)
            total += rewards
        assert truncated.all()
        return total, info["objective"]

    total, uniform = play(np.zeros((12, 5, size), dtype=np.float32))
    np.testing.assert_allclose(total, 0.0, atol=1e-12)
    total, reached = play(actions(12, 5, size))
    np.testing.assert_allclose(total, uniform - reached, rtol=0, atol=1e-12)
    assert np.abs(total).min() > 1e-4


# --- Gymnasium's contract ----------------------------------------------------------------------------------


def test_make_vec_and_its_spaces():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make_vec(ID, num_envs=7, vectorization_mode="vector_entry_point", episode_steps=3)
        assert isinstance(env.unwrapped, SurrogateVectorEnv)
        assert env.num_envs == 7
        assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
        observation, _ = env.reset(seed=0)
        assert env.observation_space.contains(observation)
        for _ in range(8):
            observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            assert env.observation_space.contains(observation)
            assert reward.shape == terminated.shape == truncated.shape == (7,)
            assert terminated.dtype == truncated.dtype == bool
        env.close()


def test_the_step_after_the_end_resets_as_gymnasiums_own_vector_environment_does():
    settings = {"episode_steps": 3, "noise": 0.0}
    ours = gym.make_vec(ID, num_envs=2, vectorization_mode="vector_entry_point", dtype="float64", **settings)
    theirs = gym.make_vec(ID, num_envs=2, vectorization_mode="sync", **settings)
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    np.testing.assert_array_equal(ours.reset(seed=0)[0], theirs.reset(seed=0)[0])
    ends = []
    for step_actions in actions(9, 2):
        one, other = ours.step(step_actions), theirs.step(step_actions)
        np.testing.assert_allclose(one[0], other[0], rtol=2e-7, atol=1e-9)
        np.testing.assert_allclose(one[1], other[1], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(one[3], other[3])
        ends.append(bool(one[3].all()))
    assert ends == [False, False, True, False, False, False, True, False, False]


def test_the_resetting_step_ignores_the_actions_and_rewards_nothing():
    env = SurrogateVectorEnv(num_envs=3, episode_steps=2)
    first, _ = env.reset(seed=0)
    for _ in range(2):
        env.step(actions(1, 3)[0])
    observation, reward, terminated, truncated, info = env.step(np.ones((3, 17), dtype=np.float32))
    np.testing.assert_array_equal(observation, first)
    np.testing.assert_array_equal(reward, 0.0)
    assert not terminated.any()
    assert not truncated.any()
    np.testing.assert_array_equal(info["step"], 0.0)
    np.testing.assert_allclose(info["weights"], 1 / 17, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"family": {}}], ids=str)
def test_the_resetting_step_starts_other_episodes(settings):
    env = SurrogateVectorEnv(num_envs=3, episode_steps=2, fields=["loss", "target_loss"], **settings)
    env.reset(seed=0)
    same = actions(1, 3)[0]
    first, _, reset, other = (env.step(same)[0] for _ in range(4))
    assert (reset[:, :17] == reset[0, 0]).all()  # ln V
    assert (first[:, :17] != other[:, :17]).mean() > 0.9


def test_wrappers_of_gymnasium_work():
    env = RecordEpisodeStatistics(SurrogateVectorEnv(num_envs=4, episode_steps=5))
    env.reset(seed=0)
    for _ in range(5):
        *_, info = env.step(np.zeros((4, 17), dtype=np.float32))
    np.testing.assert_array_equal(info["episode"]["l"], 5)
    initial = SurrogateEnv().trainer.info.initial_loss_nats
    np.testing.assert_allclose(info["episode"]["r"], initial - info["objective"], rtol=1e-4)


def test_arrays_belong_to_the_caller():
    """Writing into what a step returned changes nothing that comes later."""
    one, other = (SurrogateVectorEnv(num_envs=3, reward={"interaction": 1.0, "progress": 1.0}) for _ in range(2))
    one.reset(seed=0)
    other.reset(seed=0)
    for step_actions in actions(5, 3):
        observation, reward, terminated, truncated, _ = one.step(step_actions)
        expected = other.step(step_actions)
        np.testing.assert_array_equal(observation, expected[0])
        np.testing.assert_array_equal(reward, expected[1])
        observation[:], reward[:], terminated[:], truncated[:] = 0, 0, True, True
        assert not expected[2].any()
    assert not one.step(actions(1, 3)[0])[2].any()


@pytest.mark.parametrize("settings", [{}, {"family": {"num_domains": [3, 17]}}], ids=str)
def test_a_seed_repeats_the_episodes_bit_for_bit_and_without_one_they_go_on(settings):
    def play(env, seed):
        trace = [env.reset(seed=seed)[0]]
        for step_actions in actions(6):
            observation, reward, *_ = env.step(step_actions)
            trace += [observation, reward]
        return trace

    settings = {"num_envs": 5, "episode_steps": 6, "fields": ["loss", "epochs"]} | settings
    env = SurrogateVectorEnv(**settings)
    first, again, other = play(env, 1), play(env, 1), play(env, None)
    fresh = play(SurrogateVectorEnv(**settings), 1)
    for one, two, three in zip(first, again, fresh, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    assert any((one != two).any() for one, two in zip(first, other, strict=True))
    assert (first[-2][0] != first[-2][1]).any()  # episodes are not copies of one another


def test_noise_differs_between_rows():
    env = SurrogateVectorEnv(num_envs=2000, episode_steps=4, fields=["loss"])
    env.reset(seed=0)
    still = np.zeros((2000, 17), dtype=np.float32)
    env.step(still)
    observation, *_ = env.step(still)
    sequences = env.trainer.info.batch_size / 17
    np.testing.assert_allclose(observation.std(0), 0.3 / np.sqrt(sequences), rtol=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "dtype=float16: must be float32 or float64"),
        ({"num_envs": 0}, "num_envs=0: must be at least 1"),
        ({"bounds": {"max_epochs": 1.0}}, "only the scalar environment projects"),
        ({"episode_step": 3}, "did you mean 'episode_steps'"),
        ({"surface": "regmix"}, "surface=regmix: must be one of regmix-1m"),
        ({"fields": ["epoch"]}, "did you mean 'epochs'"),
        ({"fields": ["layer_change"]}, "needs layers"),
        ({"noise": float("inf")}, "noise=inf"),
        ({"lag": -2}, "lag=-2"),
        ({"reward": {"terms": {"progress": 1.0}, "objective": {"books": 1.0}}}, "objective='books'"),
        ({"family": {"lengths": [2.0, 1.0]}}, "lengths"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        SurrogateVectorEnv(**settings)


def test_a_list_of_seeds_and_a_step_before_reset_are_refused():
    env = SurrogateVectorEnv(num_envs=2)
    with pytest.raises(ConfigError, match="call reset"):
        env.step(np.zeros((2, 17), dtype=np.float32))
    with pytest.raises(ConfigError, match="must be one number"):
        env.reset(seed=[1, 2])


# --- speed -------------------------------------------------------------------------------------------------


def rate(env, num_steps):
    """(env steps per second of wall time, of this process's CPU time), over whole episodes."""
    moves = env.action_space.sample()
    started, spent = time.perf_counter(), time.process_time()
    for _ in range(num_steps):
        env.step(moves)
    done = num_steps * env.num_envs
    return done / (time.perf_counter() - started), done / (time.process_time() - spent)


@pytest.mark.slow
def test_speed_of_4096_environments(capsys):
    """K = 17, default fields, float32: a million env steps a second, 20 times as many as of scalar environments.

    Both are played in turn, five times, so that other work on the machine slows both; medians. On a busy machine wall
    time says nothing about this code, so the bar is on the CPU time of this process, which uses one core.
    """
    vector = gym.make_vec(ID, num_envs=4096, vectorization_mode="vector_entry_point")
    scalar = gym.make_vec(ID, num_envs=64, vectorization_mode="sync")
    vector.reset(seed=0)
    scalar.reset(seed=0)
    rate(vector, 41)
    pairs = [(rate(vector, 123), rate(scalar, 41)) for _ in range(5)]
    wall, cpu = (median(fast[index] for fast, _ in pairs) for index in (0, 1))
    times = median(fast[0] / slow[0] for fast, slow in pairs)
    with capsys.disabled():
        say(f"\nN = 4096: {wall:,.0f} env steps/s of wall time, {cpu:,.0f} of CPU time; {times:.0f}× a SyncVectorEnv")
    assert cpu >= 1_000_000
    assert times >= 20
