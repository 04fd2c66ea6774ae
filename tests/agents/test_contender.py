"""Learning on the surrogate: quickly in the default run, in earnest with `-m slow`."""

import numpy as np
import pytest

from acodm_env.agents.surrogate_learner import Contender, learn
from acodm_env.errors import ConfigError
from acodm_env.policy.mixer import PolicyMixer
from acodm_env.surrogate.oracle import best_schedule, final_objective
from acodm_env.surrogate.surface import Surface
from acodm_env.surrogate.trainer import SurrogateTrainer
from acodm_env.trainer import drive

OVER_UNIFORM = {"terms": {"progress": 1.0}, "progress_over_uniform": True}
ENV = {"reward": OVER_UNIFORM, "episode_steps": 20}
SURFACE = Surface.load("regmix-1m")


def final_loss(policy):
    runs = SurrogateTrainer(SURFACE, horizon=20)
    runs.reset(np.random.default_rng(0))
    mixer = PolicyMixer(policy)
    mixer.start(runs.info)
    for _ in drive(runs, mixer, 20):
        pass
    return float(runs.evaluate("test").mean())


def scale():
    runs = SurrogateTrainer(SURFACE, horizon=20, noise=0)
    return float(final_objective(runs, np.full(17, 1 / 17))), float(best_schedule(runs, 200).objective)


def recovered(policy):
    uniform, best = scale()
    return (uniform - final_loss(policy)) / (uniform - best)


def test_ppo_learns_in_seconds():
    learned = learn(Contender(algo="ppo", timesteps=0.06), ENV, seed=0)
    assert recovered(learned.policy) > 0.3
    assert abs(recovered(learned.untrained)) < 0.1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ppo_recovers_most_of_the_regret_in_two_minutes():
    """`pytest -m slow -s -k two_minutes tests/agents/test_contender.py` prints share and seconds."""
    learned = learn(Contender(algo="ppo"), ENV, seed=0)
    share = recovered(learned.policy)
    print(f"PPO: {share:.3f} of the regret in {learned.seconds:.0f} s")  # noqa: T201
    assert share > 0.85


def test_the_same_seed_learns_the_same_policy_and_another_one_another():
    prints = [learn(Contender(algo="td3", timesteps=0.03), ENV, seed=seed).policy.fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_a_teacher_that_does_not_adapt_works_on_arrays():
    teacher = {"teacher": "static", "teacher_decisions": 80}
    options = {"teacher_options": {"weights": dict.fromkeys(SURFACE.domains, 1.0) | {"github": 5.0}}}
    quiet = {"settings": {"n_envs": 4}, "learning_starts": 10}
    learned = learn(Contender(algo="td3", timesteps=0.01, agent=quiet, **teacher, **options), ENV, seed=0)
    assert learned.policy.domains == SURFACE.domains


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"timesteps": 0.0}, "timesteps=0.0"), ({"timesteps": -1.0}, "timesteps=-1.0")],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Contender(algo="ppo", **settings)
