import subprocess
import sys

import pytest
import yaml

from acodm_env.agents.hyperparameters import SURROGATE, read_settings, settings_for
from acodm_env.agents.tuning import SPACE, Choice, present, suggested
from acodm_env.errors import ConfigError
from acodm_env.experiments import cli
from acodm_env.experiments.policy.tune import TuneConfig, tune

optuna = pytest.importorskip("optuna", reason="Optuna is not installed; pip install 'acodm[tune]'")

TINY = ["--surrogate", '{"surface": "regmix-1m", "episode_steps": 4}', "--decisions", "8", "--seeds", "1", "--quiet"]


def acodm(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


def trials(file, algo):
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    return optuna.load_study(storage=storage, study_name=algo).trials


def test_three_trials_resume_and_the_best_settings_train(tmp_path, capsys):
    study, out = tmp_path / "study.journal", tmp_path / "best.yml"
    command = ["tune", "--algo", "td3", *TINY, "--study", study, "--out", out]
    assert acodm(*command, "--trials", 2) == 0
    assert acodm(*command, "--trials", 3) == 0  # goes on
    done = trials(study, "td3")
    assert [trial.number for trial in done] == [0, 1, 2]
    values = [trial.value for trial in done]
    assert all(4 < value < 6 for value in values)  # nats
    assert all(trial.user_attrs["objectives"] == [trial.value] for trial in done)
    shipped = {
        name: value for name, value in present(settings_for("td3", SURROGATE)).items() if SPACE[name].holds(value)
    }
    assert done[0].params.items() >= shipped.items()  # the first trial is what is shipped
    assert done[1].params != done[2].params  # a resumed search draws anew
    capsys.readouterr()
    assert acodm(*command, "--trials", 3) == 0  # nothing is left to do
    printed = capsys.readouterr().out
    assert len(trials(study, "td3")) == 3
    assert f"objective                     {min(values):.4f} nats, median of 1 seeds" in printed
    assert out.read_text() in printed
    best = min(done, key=lambda trial: trial.value)
    settings = read_settings("td3", SURROGATE, out)
    assert settings["learning_rate"] == pytest.approx(best.params["learning_rate"], rel=0.01)
    assert settings["policy_kwargs"]["net_arch"] == [
        int(units) for units in best.params["policy_kwargs.net_arch"].split("x")
    ]
    assert (settings["n_timesteps"], settings["env_kwargs"]["episode_steps"]) == (8, 4)
    train = ["train", "--surrogate", "regmix-1m", "--conf-file", out, "--envs", 1, "--quiet", "--out", tmp_path / "run"]
    assert acodm(*train) == 0
    assert "episodes             2" in capsys.readouterr().out  # n_timesteps / episode_steps


def test_two_processes_share_a_study(tmp_path):
    study = tmp_path / "study.journal"
    command = [sys.executable, "-m", "acodm_env", "tune", "--algo", "a2c", *TINY]
    command += ["--study", str(study), "--trials", "4"]
    both = [subprocess.Popen([*command, "--seed", "0"]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    done = trials(study, "a2c")
    assert 4 <= len([trial for trial in done if trial.value is not None]) <= 5  # each may end one more
    assert [trial.number for trial in done] == list(range(len(done)))


def test_jobs_end_exactly_at_the_number_of_trials(tmp_path):
    config = TuneConfig(
        algo="ppo", surrogate='{"episode_steps": 4}', decisions=8, seeds=1, trials=3, jobs=2,
        study=str(tmp_path / "study.journal"), quiet=True,
    )  # fmt: skip
    assert tune(config)["finished trials"] == 3
    assert len(trials(config.study, "ppo")) == 3


def test_an_algorithm_is_searched_in_what_its_file_has():
    td3, a2c = (present(settings_for(algo, SURROGATE)) for algo in ("td3", "a2c"))
    assert {"tau", "noise_std", "policy_kwargs.logit_penalty"} <= td3.keys() - a2c.keys()
    assert a2c.keys() == {
        "learning_rate", "gamma", "policy_kwargs.net_arch", "policy_kwargs.optimizer_kwargs.weight_decay",
    }  # fmt: skip
    for name, value in td3.items():
        if isinstance(SPACE[name], Choice):
            assert SPACE[name].holds(value), name  # else it could not be the first trial


def test_suggestions_replace_their_own_setting_and_are_short_numbers():
    base = settings_for("td3", SURROGATE)
    values = present(base) | {"tau": 0.0123456, "policy_kwargs.net_arch": "128x128", "policy_kwargs.logit_penalty": 0.2}
    settings = suggested(base, optuna.trial.FixedTrial(values))
    assert settings["tau"] == 0.0123
    assert settings["policy_kwargs"] == base["policy_kwargs"] | {"net_arch": [128, 128], "logit_penalty": 0.2}
    assert {name for name in settings if settings[name] != base[name]} <= {"tau", "policy_kwargs", "learning_rate"}
    assert base == settings_for("td3", SURROGATE)  # nothing is changed in place


def test_learning_that_breaks_down_is_given_up_and_the_search_goes_on(tmp_path, monkeypatch):
    from acodm_env.agents import tuning

    answers = iter([ValueError("the parameter loc has invalid values"), 4.7, 4.6])

    def learned(*_, **__):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(tuning, "learned_objective", learned)
    config = TuneConfig(surrogate='{"episode_steps": 4}', seeds=1, trials=3, study=str(tmp_path / "s"), quiet=True)
    best = tune(config)
    assert (best["finished trials"], best["objective"]) == (2, "4.6000 nats, median of 1 seeds")
    assert best["objective of the first trial"] == "-"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algo", "td4"], "did you mean 'td3'"),
        (["--trials", "0"], "trials=0: must be at least 1"),
        (["--jobs", "0"], "jobs=0: must be at least 1"),
        (["--seeds", "0"], "seeds=0: must be at least 1"),
        (["--decisions", "0"], "decisions=0: must be at least 1"),
        (["--trials", "many"], "trials"),
        (["--surrogate", "{bad"], "valid JSON"),
        (["--surrogate", "regmix-2m"], "regmix-2m"),
        (["--surrogate", '{"episode_stepz": 4}'], "did you mean 'episode_steps'"),
        (["--conf-file", "nowhere.yml"], "conf_file=nowhere.yml: must be a YAML file"),
        (["--trails", "3"], "did you mean --trials"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, message, tmp_path, capsys):
    study = tmp_path / "study.journal"
    assert acodm("tune", "--quiet", "--study", study, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not study.exists()


def test_a_file_that_is_no_study_and_a_study_of_something_else_are_refused(tmp_path, capsys):
    foreign = tmp_path / "notes.txt"
    foreign.write_text("not a journal\n")
    assert acodm("tune", *TINY, "--study", foreign) == 2
    assert "is no journal of a study" in capsys.readouterr().err
    assert foreign.read_text() == "not a journal\n"
    assert acodm("tune", *TINY, "--study", tmp_path) == 2
    assert "must be a file" in capsys.readouterr().err
    study = tmp_path / "study.journal"
    assert acodm("tune", *TINY, "--study", study, "--trials", 1) == 0
    assert acodm("tune", *TINY, "--study", study, "--trials", 2, "--seeds", 2) == 2
    assert "were made with seeds=1, now it is 2" in capsys.readouterr().err


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'acodm\[tune\]'"):
        tune(TuneConfig(study=str(tmp_path / "study.journal")))


def test_shipped_settings_are_within_the_ranges_that_are_searched():
    """So that a search begins with them. ent_coef 0 has no logarithm."""
    for algo in ("td3", "ddpg", "sac", "ppo", "a2c", "acodm-td3", "equivariant-td3"):
        values = present(settings_for(algo, SURROGATE))
        outside = {name for name, value in values.items() if not SPACE[name].holds(value)}
        assert outside <= {"ent_coef", "batch_size"}, algo


def test_the_written_file_is_rl_zoos_own_format(tmp_path, capsys):
    out = tmp_path / "best.yml"
    assert acodm("tune", "--algo", "ppo", *TINY, "--trials", 1, "--study", tmp_path / "s", "--out", out) == 0
    section = yaml.safe_load(out.read_text())[SURROGATE]
    assert section["policy_kwargs"].startswith("dict(net_arch=")
    assert section["env_kwargs"]["surface"] == "regmix-1m"
    assert isinstance(section["learning_rate"], float)
