import json
import re
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

from acodm_env.errors import ConfigError, DataError
from acodm_env.surrogate.env import SurrogateEnv
from acodm_env.surrogate.surface import Surface
from acodm_env.surrogate.trainer import SurrogateTrainer

ID = "acodm/Surrogate-v0"
SHIPPED = Surface.load("regmix-1m")
MADE = {"num_domains": [3, 6]}


def play(env, actions, seed=0):
    """(observation, reward, info) of every step, the reset's first."""
    observation, info = env.reset(seed=seed)
    trace = [(observation, 0.0, info)]
    for action in actions:
        observation, reward, _, truncated, info = env.step(action)
        trace.append((observation, reward, info))
    assert truncated
    return trace


def actions(number=40, num_domains=17, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (number, num_domains)).astype(np.float32)


# --- contract ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lag": 2},
        {"steps_per_action": 3},
        {"reward": {"interaction": 1.0, "final": 0.5}, "fields": ["gradient_norm", "interaction", "target_loss"]},
        {"noise_domain": True},
        {"family": {}},
        {"family": MADE},
    ],
    ids=str,
)
def test_both_checkers_pass_with_warnings_as_errors(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check(SurrogateEnv(**settings), skip_render_check=True)
        sb3_check(SurrogateEnv(**settings))
        env = gym.make(ID, **settings)
        env.reset(seed=0)
        env.step(env.action_space.sample())


def test_default_fields_leave_out_the_training_losses_that_the_law_does_not_define():
    """M = 13 of K = 17: held-out losses instead."""
    env = SurrogateEnv()
    assert env.observer.layout == (
        ("target_loss", 13),
        ("delta_target_loss", 13),
        ("sample_share", 17),
        ("epochs", 17),
        ("progress", 1),
    )
    assert [name for name, _ in SurrogateEnv(family=MADE).observer.layout] == [
        *("loss", "delta_loss", "sample_share", "epochs", "progress", "mask")
    ]
    assert SurrogateEnv(family={}).observer.layout == (*env.observer.layout, ("mask", 17))
    assert SurrogateEnv(lag=2).observer.layout[-1] == ("pending", 34)


def test_an_episode_by_hand(tmp_path, small):
    """Two steps on one domain, without forgetting: u = 1e-4 + (1−t)·u₀ + 4·t·w."""
    surface = small(forgetting=(0.0,) * 3).save(tmp_path / "small.json")
    env = SurrogateEnv(surface=str(surface), episode_steps=2, noise=0.0, action={"scale": 1.0, "floor": 0.0})
    observation, info = env.reset(seed=0)
    np.testing.assert_allclose(observation, [6, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0], atol=1e-6)
    assert info["objective"] == pytest.approx(6.0)
    action = np.array([1.0, -1.0, -1.0], dtype=np.float32)
    weights = np.exp([1.0, -1, -1]) / np.exp([1.0, -1, -1]).sum()
    observation, reward, terminated, truncated, info = env.step(action)
    useful = 1e-4 + 0.5 * np.array([0.1599, 0.2499]) + 0.5 * np.array([[4, 1, 0.5], [0.5, 2, 1]]) @ weights
    held_out = np.array([1 + 2 / np.sqrt(useful[0]), 2 + 1 / useful[1]])
    expected = [*held_out, *(held_out - 6), *weights, *(500 * weights / 1e9), 0.5]
    np.testing.assert_allclose(observation, expected, rtol=1e-5, atol=1e-7)
    assert reward == pytest.approx(6 - held_out.mean())
    assert (terminated, truncated) == (False, False)
    np.testing.assert_allclose(info["weights"], weights, rtol=1e-6)
    *_, truncated, info = env.step(action)
    assert truncated
    assert info["objective"] == pytest.approx(held_out_at_the_end(weights).mean())


def held_out_at_the_end(weights):
    useful = 1e-4 + np.array([[4, 1, 0.5], [0.5, 2, 1]]) @ weights
    return np.array([1 + 2 / np.sqrt(useful[0]), 2 + 1 / useful[1]])


def test_rewards_add_up_to_the_drop_of_the_objective():
    trace = play(SurrogateEnv(), actions())
    total = sum(reward for _, reward, _ in trace)
    assert total == pytest.approx(trace[0][2]["objective"] - trace[-1][2]["objective"])
    assert total > 3


def test_observations_stay_in_bounds_and_info_has_the_same_finite_keys():
    env = SurrogateEnv(reward={"interaction": 1.0, "progress": 1.0}, lag=1)
    trace = play(env, actions())
    for observation, reward, info in trace:
        assert env.observation_space.contains(observation)
        assert isinstance(reward, float)
        assert info.keys() == trace[0][2].keys()
        assert all(np.isfinite(value).all() for value in info.values())
        assert all(type(value) is float or value.dtype == np.float64 for value in info.values())
        assert info["clipped_frac"] == 0.0


@pytest.mark.parametrize("settings", [{}, {"family": MADE}], ids=str)
def test_a_seed_repeats_the_episode_bit_for_bit_and_without_one_it_goes_on(settings):
    env = SurrogateEnv(fields=["loss", "target_loss"], **settings)
    moves = actions(num_domains=env.action_space.shape[0])
    first, again, other = play(env, moves, 3), play(env, moves, 3), play(env, moves, None)
    fresh = play(SurrogateEnv(fields=["loss", "target_loss"], **settings), moves, 3)
    for (one, r1, _), (two, r2, _), (three, r3, _) in zip(first, again, fresh, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
        assert r1 == r2 == r3
    assert any((one != two).any() for (one, *_), (two, *_) in zip(first, other, strict=True))


def test_noise_is_in_the_training_losses_alone():
    moves = actions()
    noisy, clean = (play(SurrogateEnv(fields=["loss", "target_loss"], noise=noise), moves) for noise in (1.0, 0.0))
    for (one, *_), (two, *_) in zip(noisy[1:], clean[1:], strict=True):
        assert (one[:17] != two[:17]).any()
        np.testing.assert_array_equal(one[17:], two[17:])
        assert np.abs(one[:17] - two[:17]).max() < 0.3  # of one sequence; there are dozens at least


def test_interaction_reward_moves_and_is_the_sum_over_domains():
    trace = play(SurrogateEnv(reward="interaction", lag=0), actions())
    rewards = np.array([reward for _, reward, _ in trace[2:]])
    assert (np.abs(rewards) > 0.005).all()
    for _, reward, info in trace[1:]:
        assert reward == pytest.approx(info["weights"] @ info["domain_rewards"])


def test_progress_over_uniform_is_zero_for_the_uniform_mixture():
    reward = {"terms": {"progress": 1.0}, "progress_over_uniform": True}
    env = SurrogateEnv(reward=reward)
    still = np.zeros((40, 17), dtype=np.float32)
    np.testing.assert_allclose([reward for _, reward, _ in play(env, still)], 0.0, atol=1e-12)
    tilted = play(env, actions())
    uniform = play(SurrogateEnv(), still)[-1][2]["objective"]
    assert sum(reward for _, reward, _ in tilted) == pytest.approx(uniform - tilted[-1][2]["objective"])


PAGE = (Path(__file__).parents[3] / "docs" / "surrogate.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
def test_the_code_of_the_page_prints_what_the_page_says(block, capsys):
    exec(block, {})
    assert capsys.readouterr().out.split() == re.search(r"^print\(.*\)  # (.+)$", block, flags=re.MULTILINE)[1].split()


# --- switches ----------------------------------------------------------------------------------------------


def test_switches_reach_the_surface():
    env = SurrogateEnv(repetition=False, forgetting=False)
    assert env.trainer.surfaces[0].forgetting == (0.0,) * 17
    assert min(env.trainer.surfaces[0].sizes_tokens) == 1e6 * SHIPPED.run_tokens
    assert SurrogateEnv(noise_domain=True).trainer.info.domains[-1] == "noise"
    assert SurrogateEnv(episode_steps=7, steps_per_action=2).trainer.info.horizon == 7


def test_without_repetition_an_episode_of_one_action_ends_at_the_law():
    env = SurrogateEnv(repetition=False, episode_steps=9)
    trace = play(env, np.tile(actions(1), (9, 1)))
    expected = SHIPPED.law.predict(trace[-1][2]["weights"][None])[0]
    assert trace[-1][2]["objective"] == pytest.approx(expected.mean(), abs=1e-6)
    np.testing.assert_allclose(trace[-1][0][:13], expected, rtol=1e-6)


def test_decisions_of_several_steps_end_at_the_horizon():
    env = SurrogateEnv(episode_steps=10, steps_per_action=4)
    assert [info["step"] for *_, info in play(env, actions(3))] == [0, 4, 8, 10]


def test_a_family_draws_another_surface_every_episode():
    env = SurrogateEnv(family=MADE)
    env.reset(seed=0)
    masks = set()
    for _ in range(12):
        observation, _ = env.reset()
        mask = observation[-6:]
        masks.add(tuple(mask))
        real = int(mask.sum())
        observation, _, _, _, info = env.step(np.ones(6, dtype=np.float32))
        np.testing.assert_allclose(info["weights"], mask / real, rtol=1e-6)
        assert isinstance(env.trainer, SurrogateTrainer)
        assert len(env.trainer.surfaces[0].domains) == real
    assert len(masks) == 4  # 3, 4, 5 and 6 domains


# --- registration and settings -----------------------------------------------------------------------------


def test_spec_goes_through_json_with_its_keyword_arguments():
    settings = {"episode_steps": 5, "reward": {"progress": 2.0}, "family": MADE, "action": {"floor": 0.1}}
    spec = gym.make(ID, **settings).spec
    again = gym.make(gym.envs.registration.EnvSpec.from_json(spec.to_json()))
    assert json.loads(spec.to_json())["kwargs"] == settings
    assert again.unwrapped.trainer.info.horizon == 5
    moves = actions(5, 6)
    for (one, r1, _), (two, r2, _) in zip(play(gym.make(ID, **settings), moves), play(again, moves), strict=True):
        np.testing.assert_array_equal(one, two)
        assert r1 == r2


def test_render_modes(small, tmp_path):
    path = small().save(tmp_path / "small.json")
    env = gym.make(ID, surface=str(path), episode_steps=3, render_mode="ansi")
    play(env, actions(3, 3))
    assert "step 3/3" in env.render()
    env = gym.make(ID, surface=str(path), episode_steps=3, render_mode="rgb_array")
    play(env, actions(3, 3))
    assert env.render().shape == (400, 800, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"surfaces": "regmix-1m"}, "did you mean 'surface'"),
        ({"surface": "regmix-60m"}, "surface=regmix-60m: must be one of regmix-1m"),
        ({"fields": ["target_los"]}, "did you mean 'target_loss'"),
        ({"reward": "progres"}, "did you mean 'progress'"),
        ({"reward": {"terms": {"progress": 1}, "objective": {"arxive": 1}}}, "did you mean 'arxiv'"),
        ({"fields": ["layer_norm"]}, "needs layers"),
        ({"episode_steps": 0}, "episode_steps=0: must be at least 1"),
        ({"steps_per_action": 0}, "steps_per_action=0"),
        ({"noise": -0.5}, "noise=-0.5"),
        ({"lag": -1}, "lag=-1"),
        ({"action": {"floor": 1.0}}, "floor=1.0"),
        ({"action": {"flor": 0.1}}, "did you mean 'floor'"),
        ({"bounds": {"minimum": [0.9, 0.9]}}, "must hold 17 numbers"),
        ({"interaction": {"smoothing": 1.0}}, "smoothing=1.0"),
        ({"family": {"num_domain": [3, 4]}}, "did you mean 'num_domains'"),
        ({"family": {"num_domains": 3}}, "wrong type"),
        ({"family": {}, "noise_domain": True}, "noise_domain=True: is for one surface"),
        ({"family": {}, "reward": {"terms": {"progress": 1}, "progress_over_uniform": True}}, "make_vec"),
        ({"render_mode": "human"}, "render_mode=human"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        SurrogateEnv(**settings)


def test_a_damaged_surface_is_refused(tmp_path):
    (tmp_path / "mine.json").write_text('{"format_version": 1}')
    with pytest.raises(DataError, match=r"mine\.json: is no surface"):
        gym.make(ID, surface=str(tmp_path / "mine.json"))
