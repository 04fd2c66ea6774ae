"""The single-file TD3 of the documentation: short, on its own, and it learns."""

import importlib.util
from pathlib import Path

import torch

FILE = Path(__file__).parents[1] / "docs" / "how-to" / "td3_loop.py"


def test_the_loop_is_one_short_file_that_beats_a_random_policy():
    source = FILE.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60
    assert "stable_baselines3" not in source
    spec = importlib.util.spec_from_file_location("td3_loop", FILE)
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    with torch.random.fork_rng(devices=[]):
        gains = loop.learn(24)
    at_random = torch.tensor(gains[: loop.RANDOM]).mean()
    assert at_random < 0  # random mixtures are worse than the uniform one
    assert gains[-1] > at_random + 0.01  # nats; their standard error is a tenth of that
    assert gains[-1] > 0
