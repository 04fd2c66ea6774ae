"""Named full configurations, as functions that return them."""

from dataclasses import replace

from acodm_env.experiments.train import TrainConfig
from acodm_env.experiments.transfer import TransferConfig


def demo_train(corpus: str, out: str, seed: int) -> TrainConfig:
    """The demo's learning: ten short runs of the tiny proxy, 50 decisions each."""
    return TrainConfig(
        corpus=corpus,
        episodes=10,
        episode_steps=200,
        steps_per_action=4,
        action_scale=1.0,
        evaluate_every=5,
        out=out,
        seed=seed,
    )


def demo_target(corpus: str, out: str, seed: int) -> TransferConfig:
    """The demo's target: eight times the proxy's non-embedding parameters, and a longer run."""
    return TransferConfig(
        mixer="uniform",
        corpus=corpus,
        target="small",
        steps=250,
        batch_size=16,
        evaluations=50,
        out=out,
        seed=seed,
    )


def smoke_train(corpus: str, out: str, seed: int) -> TrainConfig:
    """Seconds instead of minutes: checks that everything runs, teaches nothing."""
    return replace(
        demo_train(corpus, out, seed),
        episodes=2,
        episode_steps=12,
        steps_per_action=3,
        batch_size=6,
        sequence_length=32,
        evaluate_every=1,
        agent={"learning_starts": 2, "batch_size": 4, "hidden": [16]},
    )


def smoke_target(corpus: str, out: str, seed: int) -> TransferConfig:
    """The target that goes with `smoke_train`."""
    return replace(
        demo_target(corpus, out, seed),
        target="tiny",
        steps=12,
        batch_size=6,
        sequence_length=32,
        evaluations=6,
    )


RECIPES = {"demo": (demo_train, demo_target), "smoke": (smoke_train, smoke_target)}
"""Recipes of `acodm demo`: how to learn, and how to train the target."""
