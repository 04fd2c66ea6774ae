"""`acodm train --surrogate`: the same command, log, resume and export on array episodes of a surrogate."""

import json

import pytest

from acodm_env.errors import ConfigError
from acodm_env.experiments import cli
from acodm_env.experiments.policy.config import TrainConfig
from acodm_env.experiments.policy.train import make_learner
from acodm_env.policy.load import load_policy

SHORT = '{"surface": "regmix-1m", "episode_steps": 5}'
AGENT = ["--agent", '{"hidden": [8], "batch_size": 8, "learning_starts": 4}']


def acodm(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.mark.parametrize(("algo", "envs"), [("td3", 1), ("td3", 4), ("ppo", 4), ("acodm-td3", 2)])
def test_learns_resumes_and_exports(algo, envs, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", "--algo", algo, "--surrogate", SHORT, "--envs", envs, "--quiet", "--out", run, *AGENT]
    command += ["--episodes", 8, "--evaluate-every", 4]
    assert acodm(*command) == 0
    printed = capsys.readouterr().out
    result = json.loads((run / "result.json").read_text())
    assert (result["episodes"], result["transitions"]) == (8, 40)
    assert (result["optimiser_steps"], result["tokens"]) == (0, 0)  # no language model was trained
    assert 4 < result["best_objective_nats"] < 6
    assert all(abs(row["return"]) < 0.5 for row in result["rows"])  # nats gained on uniform sampling, not lost in all
    assert f"{result['rows'][-1]['objective']:.4f}" in printed
    assert acodm(*command, "--resume") == 0
    assert json.loads((run / "result.json").read_text())["rows"] == result["rows"]
    assert acodm("export", "--run", run, "--out", tmp_path / "policy", "--quiet") == 0
    policy = load_policy(tmp_path / "policy")
    assert (len(policy.domains), policy.horizon) == (17, 5)


def test_a_teacher_by_name(tmp_path, capsys):
    command = [
        "train",
        "--surrogate",
        SHORT,
        "--envs",
        1,
        "--episodes",
        2,
        "--quiet",
        "--out",
        tmp_path / "run",
        *AGENT,
    ]
    assert acodm(*command, "--teacher", "uniform", "--teacher-decisions", 10) == 0
    assert "warm-up: teacher uniform, decisions 10, " in capsys.readouterr().out
    warm_up = json.loads((tmp_path / "run" / "result.json").read_text())["warm_up"]
    assert warm_up["actor_loss_after"] < warm_up["actor_loss_before"]


def test_defaults_are_the_hyper_parameters_of_the_algorithm(tmp_path):
    file = tmp_path / "own.yml"
    file.write_text("acodm/Surrogate-v0: {n_timesteps: 1000, n_envs: 3, env_kwargs: {lag: 2, episode_steps: 10}}\n")
    config = TrainConfig(surrogate="regmix-1m", conf_file=str(file))
    assert (config.episodes, config.num_envs, config.evaluate_every) == (100, 3, 50)
    assert config.env_kwargs() == {"lag": 2, "episode_steps": 10, "surface": "regmix-1m"}
    config = TrainConfig(surrogate='{"lag": 0, "steps_per_action": 2}', conf_file=str(file), envs=1)
    assert (config.episodes, config.num_envs) == (200, 1)  # 1000 / (10 / 2)
    assert config.env_kwargs() == {"lag": 0, "episode_steps": 10, "steps_per_action": 2}
    proxy = TrainConfig()
    assert (proxy.episodes, proxy.num_envs, proxy.evaluate_every) == (10, 1, 5)
    assert proxy.env_kwargs()["episode_steps"] == 200


def test_what_begins_with_a_policy_decides_as_often_as_that():
    begun = TrainConfig(surrogate="problems", algo="equivariant-td3")
    assert begun.env_kwargs()["steps_per_action"] == 4
    begun = TrainConfig(surrogate="problems", algo="equivariant-td3", init="generalist")
    assert begun.env_kwargs()["steps_per_action"] == 1
    assert begun.env_kwargs()["fields"][-1] == "mask"


def test_surfaces_drawn_anew_in_every_episode(tmp_path):
    """The single environment, which is evaluated on, has no uniform run beside them."""
    settings = {"family": {"num_domains": [3, 4]}, "episode_steps": 4}
    config = TrainConfig(
        surrogate=json.dumps(settings), algo="equivariant-td3", envs=2, episodes=4, evaluate_every=2,
        agent={"hidden": [8], "batch_size": 4, "learning_starts": 2}, out=str(tmp_path / "run"),
    )  # fmt: skip
    learner = make_learner(config)
    learner.learn()
    assert learner.venv.get_attr("reward_config")[0].progress_over_uniform
    assert not learner.env.reward_config.progress_over_uniform
    assert [row["episode"] for row in learner.rows] == [1, 2, 3, 4]
    assert learner.best_objective is not None
    assert learner.rows[1]["eval_steps"] == 16 * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"surrogate": "regmix-1m", "corpus": "mine"}, "corpus=mine: must be left out with --surrogate"),
        ({"surrogate": "regmix-1m", "reward": "final"}, r'reward=final: .* --surrogate \'{"surface": "regmix-1m", …}'),
        ({"surrogate": "{bad"}, "valid JSON"),
        ({"envs": 4}, "envs=4: must be left out on a proxy"),
        ({"surrogate": "regmix-1m", "envs": 0}, "envs=0: must be at least 1"),
        ({"teacher_decisions": 0}, "teacher_decisions=0: must be at least 1"),
        ({"episodes": 0}, "episodes=0: must be at least 1"),
        ({"algo": "ars"}, "algo=ars: must be one of .* make_agent"),
        ({"surrogate": "regmix-1m", "conf_file": "nowhere.yml"}, "conf_file=nowhere.yml"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_bad_surrogates_are_one_line(tmp_path, capsys):
    for surrogate, message in (
        ("regmix-2m", "regmix-2m"),
        ('{"episode_stepz": 4}', "did you mean 'episode_steps'"),
        ('{"bounds": {"max_epochs": 4}}', "bounds"),
    ):
        assert acodm("train", "--surrogate", surrogate, "--envs", 2, "--out", tmp_path / "run") == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert not (tmp_path / "run").exists()
