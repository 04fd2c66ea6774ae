import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from acodm_env.experiments import cli

SMOKE = ["--episodes", "2", "--episode_steps", "6", "--steps_per_action", "2", "--batch_size", "6"]
SMOKE += ["--sequence_length", "32", "--evaluate_every", "1", "--quiet"]
AGENT = ["--agent", '{"learning_starts": 1, "batch_size": 2, "hidden": [8]}']
TARGET = ["--target", "tiny", "--steps", "6", "--batch_size", "6", "--sequence_length", "32", "--evaluations", "3"]


def acodm(*arguments):
    """Run the command in this process; returns the exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def learned(tiny_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("learned") / "run"
    assert acodm("train", "--corpus", tiny_corpus, "--out", out, *SMOKE, *AGENT) == 0
    return out


@pytest.fixture(scope="module")
def policy(learned):
    out = learned.parent / "policy"
    assert acodm("export", "--run", learned, "--out", out, "--quiet") == 0
    return out


def test_train_export_transfer_mixture(tiny_corpus, policy, tmp_path, capsys):
    base = ["--corpus", tiny_corpus, *TARGET, "--quiet"]
    assert acodm("transfer", "--mixer", "odm-released", *base, "--out", tmp_path / "odm") == 0
    arguments = ["--policy", policy, *base, "--reference", tmp_path / "odm", "--out", tmp_path / "policy"]
    assert acodm("transfer", *arguments) == 0
    result = json.loads((tmp_path / "policy" / "result.json").read_text())
    fields = {"mean_loss_nats", "mean_perplexity", "domain_loss_nats", "steps_to_reference_ratio", "seconds_per_step"}
    assert fields <= result.keys()
    capsys.readouterr()
    assert acodm("mixture", "--run", tmp_path / "policy", "--format", "json", "--quiet") == 0
    mixture = json.loads(capsys.readouterr().out)
    assert sum(mixture["time_averaged"].values()) == pytest.approx(1)
    file = tmp_path / "mixture.yaml"
    assert acodm("mixture", "--run", tmp_path / "policy", "--format", "yaml", "--out", file) == 0
    assert yaml.safe_load(file.read_text()) == mixture
    static = ["transfer", "--mixer", "static", "--weights", file, *base, "--out", tmp_path / "static"]
    assert acodm(*static) == 0


def test_transfer_imports_no_rl_library(tiny_corpus, policy, tmp_path):
    code = (
        "import sys\n"
        "from acodm_env.experiments import cli\n"
        "try:\n    cli.main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "assert 'stable_baselines3' not in sys.modules\n"
    )
    arguments = ["transfer", "--policy", policy, "--corpus", tiny_corpus, *TARGET, "--quiet", "--out", tmp_path / "r"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)


def test_finished_command_reprints_and_other_settings_are_refused(tiny_corpus, learned, capsys):
    again = ["train", "--corpus", tiny_corpus, "--out", learned, *SMOKE, *AGENT]
    before = (learned / "checkpoints" / "last" / "networks.pt").read_bytes()
    assert acodm(*again, "--resume") == 0
    assert (learned / "checkpoints" / "last" / "networks.pt").read_bytes() == before
    capsys.readouterr()
    assert acodm(*again, "--algo", "sac") == 2
    assert "another run (algo='td3' there, 'sac' now)" in capsys.readouterr().err


def test_interrupted_training_says_how_to_go_on(tiny_corpus, tmp_path, monkeypatch, capsys):
    from acodm_env.agents import learning

    def interrupt(self, row):
        raise KeyboardInterrupt

    monkeypatch.setattr(learning._Episodes, "_log", interrupt)
    code = acodm("train", "--corpus", tiny_corpus, "--out", tmp_path / "run", *SMOKE, *AGENT)
    assert code == 1
    assert f"To go on: acodm train --corpus {tiny_corpus}" in capsys.readouterr().err


def test_killed_and_resumed_training_equals_uninterrupted_bit_for_bit(tiny_corpus, tmp_path, monkeypatch):
    """The real environment: language model, sampler, agent, normaliser and generators all go on exactly."""
    import torch

    from acodm_env.agents import learning

    base = ["train", "--corpus", tiny_corpus, *SMOKE, *AGENT, "--episodes", "3"]
    assert acodm(*base, "--out", tmp_path / "whole") == 0
    steps, on_step = [], learning._Episodes._on_step

    def interrupt(self):
        steps.append(1)
        if len(steps) == 5:  # in the second episode of three decisions
            raise KeyboardInterrupt
        return on_step(self)

    monkeypatch.setattr(learning._Episodes, "_on_step", interrupt)
    assert acodm(*base, "--out", tmp_path / "cut") == 1
    monkeypatch.undo()
    torch.manual_seed(1234)
    assert acodm(*base, "--out", tmp_path / "cut", "--resume") == 0
    expected, got = (
        torch.load(tmp_path / name / "checkpoints" / "last" / "networks.pt", weights_only=True)
        for name in ("whole", "cut")
    )
    assert expected["policy"].keys() == got["policy"].keys()
    for name, value in expected["policy"].items():
        assert torch.equal(value, got["policy"][name]), name
    logs = [json.loads((tmp_path / name / "result.json").read_text())["rows"] for name in ("whole", "cut")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_no_command_does_nothing_silently_when_its_module_is_run(command):
    module = importlib.import_module(f"acodm_env.experiments.{cli.COMMANDS[command][0]}")
    last = Path(str(module.__file__)).read_text(encoding="utf-8").splitlines()[-2:]
    assert last[0] == 'if __name__ == "__main__":'
    assert f'python -m acodm_env {command}"' in last[1]


@pytest.mark.parametrize(
    ("module", "said"),
    [("acodm_env", ""), ("acodm_env.experiments.transfer", "say -m acodm_env transfer")],
    ids=["the package", "the former module"],
)
def test_modules_that_are_the_command_line(module, said):
    arguments = ["transfer", "--steps", "x"] if module == "acodm_env" else ["--steps", "x"]
    ended = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "acodm: " in ended.stderr
    assert said in ended.stderr


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_lists_defaults_out_seed_and_quiet(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--out", "--seed", "--quiet", "default:"):
        assert flag in text


def test_config_file_with_override(tiny_corpus, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"corpus": str(tiny_corpus), "mixer": "uniform", "steps": 99}))
    arguments = ["--config", file, *TARGET, "--quiet", "--out", tmp_path / "run"]
    assert acodm("transfer", *arguments) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["steps"] == 6


BAD = [
    (["transfre"], "did you mean 'transfer'"),
    (["transfer", "--mixer", "unifrom"], "did you mean 'uniform'"),
    (["transfer"], "give exactly one of them"),
    (["transfer", "--mixer", "static"], "needs weights"),
    (["transfer", "--mixer", "static", "--weights", "a=x"], "weights.a=x: must be a finite weight"),
    (["transfer", "--mixer", "static", "--weights", "wrong=1"], "weights.<domain>='wrong'"),
    (["transfer", "--mixer", "uniform", "--target", "smal"], "did you mean 'small'"),
    (["transfer", "--mixer", "uniform", "--stepps", "3"], "did you mean --steps"),
    (["transfer", "--mixer", "uniform", "--steps", "many"], "steps"),
    (["transfer", "--mixer", "uniform", "--device", "tpu9"], "device=tpu9"),
    (["transfer", "--policy", "nowhere"], "policy=nowhere: must be generalist, or the folder"),
    (["train", "--algo", "td4"], "did you mean 'td3'"),
    (["train", "--fields", "los"], "did you mean 'loss'"),
    (["train", "--reward", "progres"], "did you mean 'progress'"),
    (["train", "--reward", "{bad"], "valid JSON"),
    (["train", "--agent", '{"gama": 0.9}'], "did you mean 'gamma'"),
    (["train", "--resume"], "no run in"),
    (["export", "--run", "nowhere"], "no config.json"),
    (["mixture", "--run", "nowhere"], "no config.json"),
    (["demo", "--recipe", "dem"], "did you mean 'demo'"),
    (["overhead", "--rounds", "0"], "rounds=0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, tiny_corpus, tmp_path, capsys):
    if arguments[0] in ("transfer", "train"):
        arguments = [*arguments, "--corpus", tiny_corpus, "--out", tmp_path / "out"]
    assert acodm(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "stats.jsonl").exists()


def test_overhead_writes_the_stable_names(tmp_path):
    sizes = ["--rounds", "1", "--batch_size", "8", "--sequence_length", "16", "--num_domains", "2", "--quiet"]
    assert acodm("overhead", *sizes, "--no-memory", "--out", tmp_path) == 0
    result = json.loads((tmp_path / "overhead.json").read_text())
    names = ("probed_over_plain", "k_backward_over_plain", "decision_over_plain", "sampling_over_plain", "a_over_a")
    assert all(result[name] > 0 for name in names)
    assert (result["num_domains"], result["rounds"]) == (2, 1)


def test_doctor_names_a_foreign_package_called_agents(tmp_path, monkeypatch, capsys):
    foreign = tmp_path / "agents"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert acodm("doctor") == 0
    out = capsys.readouterr().out
    assert "another package called `agents`" in out
    assert str(foreign) in out


def test_overview_and_version(capsys):
    assert acodm("--help") == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in cli.COMMANDS)
    assert acodm("--version") == 0


def test_folders_stand_before_or_after_the_flags():
    from acodm_env.experiments.report.command import ReportConfig
    from acodm_env.experiments.run.mixture import MixtureConfig

    for arguments in (["a", "b", "--csv"], ["--csv", "a", "b"], ["--out", "x.html", "a", "b", "--csv"]):
        assert cli._flags(ReportConfig, arguments)[0] == '--runs=["a", "b"]'
        assert "--csv=true" in cli._flags(ReportConfig, arguments)
    assert cli._flags(MixtureConfig, ["--quiet", "a", "--format", "json"]) == [
        *("--run", "a", "--quiet=true", "--format", "json"),
    ]
    assert cli._flags(MixtureConfig, ["--quiet", "false", "a"]) == ["--run", "a", "--quiet", "false"]
