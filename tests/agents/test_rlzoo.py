"""RL-Zoo itself on the surrogate with the shipped hyper-parameters: nothing of ours in between but the environment."""

import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import yaml

import acodm_env  # noqa: F401 (registers the environments)
from acodm_env.agents.hyperparameters import FOLDER, SURROGATE


def random_returns(episodes):
    """Returns of the same evaluation under random actions, with the environment's default arguments, as RL-Zoo's."""
    env = gym.make(SURROGATE)
    env.action_space.seed(0)
    returns = []
    for seed in range(episodes):
        env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, done = total + reward, terminated or truncated
        returns.append(total)
    return np.array(returns)


def test_rl_zoo_learns_on_the_surrogate_from_our_file(tmp_path):
    pytest.importorskip("rl_zoo3", reason="rl_zoo3 is not installed; pip install 'acodm[rlzoo]'")
    file = FOLDER / "td3.yml"
    command = [sys.executable, "-m", "rl_zoo3.train", "--algo", "td3", "--env", SURROGATE]
    command += ["--gym-packages", "acodm_env", "--conf-file", str(file), "-n", "5000", "-f", str(tmp_path)]
    command += ["--eval-freq", "5000", "--eval-episodes", "3", "--seed", "0", "--num-threads", "1", "--device", "cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (evaluations,) = tmp_path.rglob("evaluations.npz")
    returns = np.load(evaluations)["results"][-1]
    at_random = random_returns(20)
    # 0.0055 nats is what uniform sampling is ahead of random actions; twice that is not luck
    assert returns.mean() > at_random.mean() + 0.011, (returns, at_random.mean())
    (recorded,) = tmp_path.rglob("config.yml")
    used = dict(yaml.unsafe_load(recorded.read_text()))
    assert used["learning_rate"] == yaml.safe_load(file.read_text())[SURROGATE]["learning_rate"]
