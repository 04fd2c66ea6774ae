"""What goes wrong with runs in real life: divergence, misfits, kills, comparisons that do not compare."""

import json

import pytest

from acodm_env.experiments import cli
from acodm_env.policy.load import load_policy

SIZES = ["--batch_size", "6", "--sequence_length", "32", "--quiet"]
LEARN = ["--episodes", "2", "--episode_steps", "6", "--steps_per_action", "2", "--evaluate_every", "1", *SIZES]
AGENT = ["--agent", '{"learning_starts": 1, "batch_size": 2, "hidden": [8]}']
TARGET = ["--target", "tiny", "--steps", "6", "--evaluations", "3", *SIZES]


def acodm(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


def transfer(corpus, out, *arguments):
    return acodm("transfer", "--corpus", corpus, *TARGET, "--out", out, *arguments)


def read(path):
    return json.loads((path / "result.json").read_text())


def test_policy_learned_with_a_lag_is_exported_and_drives_with_it(tiny_corpus, tmp_path):
    assert acodm("train", "--corpus", tiny_corpus, "--lag", "2", "--out", tmp_path / "run", *LEARN, *AGENT) == 0
    assert acodm("export", tmp_path / "run", "--out", tmp_path / "policy") == 0
    assert load_policy(tmp_path / "policy").lag == 2
    assert transfer(tiny_corpus, tmp_path / "target", "--policy", tmp_path / "policy") == 0
    lines = (tmp_path / "target" / "stats.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["mixture_age"] == 2.0


def test_diverged_learning_ends_with_a_result(tiny_corpus, tmp_path, capsys):
    wild = ["--learning_rate", "1e30"]
    assert acodm("train", "--corpus", tiny_corpus, "--out", tmp_path, *LEARN, *AGENT, *wild) == 0
    result = read(tmp_path)
    assert result["episodes"] == 2
    assert result["best_objective_nats"] is None
    assert all(row["diverged"] and row["objective"] is None for row in result["rows"])
    assert "diverged" in capsys.readouterr().out


def test_diverged_ppo_still_counts_and_saves_its_episodes(tiny_corpus, tmp_path):
    arguments = ["--algo", "ppo", "--learning_rate", "1e30", "--agent", '{"batch_size": 2, "hidden": [8]}']
    assert acodm("train", "--corpus", tiny_corpus, "--out", tmp_path / "run", *LEARN, *arguments) == 0
    assert read(tmp_path / "run")["episodes"] >= 2
    assert acodm("export", tmp_path / "run", "--out", tmp_path / "policy") == 0


def test_diverged_target_is_shown_not_dropped(tiny_corpus, tmp_path, capsys):
    assert transfer(tiny_corpus, tmp_path, "--mixer", "uniform", "--learning_rate", "1e30") == 0
    assert read(tmp_path)["diverged"]
    assert read(tmp_path)["mean_loss_nats"] is None
    assert "diverged" in capsys.readouterr().out


def test_refused_input_does_not_claim_the_folder(tiny_corpus, tmp_path):
    assert transfer(tiny_corpus, tmp_path / "run", "--mixer", "static", "--weights", "letters=1") == 2
    assert not (tmp_path / "run").exists()
    full = "letters=1,numbers=1,verbs=2"
    assert transfer(tiny_corpus, tmp_path / "run", "--mixer", "static", "--weights", full) == 0


def test_reference_must_be_finished_and_comparable(tiny_corpus, tmp_path, capsys):
    assert transfer(tiny_corpus, tmp_path / "odm", "--mixer", "odm-released") == 0
    uniform = [tiny_corpus, tmp_path / "uniform", "--mixer", "uniform", "--reference", tmp_path / "odm"]
    assert transfer(*uniform, "--seed", "1") == 2
    assert "must have seed=1" in capsys.readouterr().err
    assert not (tmp_path / "uniform").exists()
    assert transfer(*uniform) == 0
    ratio = read(tmp_path / "uniform")["steps_to_reference_ratio"]
    assert transfer(*uniform[:-2]) == 0  # asked again without the reference: the answer stays
    assert read(tmp_path / "uniform")["steps_to_reference_ratio"] == ratio
    (tmp_path / "odm" / "result.json").unlink()
    assert transfer(*uniform) == 2
    assert "must be a finished target run" in capsys.readouterr().err


def test_killed_target_resumes_to_the_same_numbers(tiny_corpus, tmp_path, monkeypatch):
    from acodm_env.experiments.run import loop as runs

    assert transfer(tiny_corpus, tmp_path / "whole", "--mixer", "odm-released") == 0
    append = runs.append

    def interrupt(folder, checkpoints, line):
        if line.log == "stats.jsonl" and line.step == 4:
            raise KeyboardInterrupt
        append(folder, checkpoints, line)

    monkeypatch.setattr(runs, "append", interrupt)
    assert transfer(tiny_corpus, tmp_path / "cut", "--mixer", "odm-released") == 1
    monkeypatch.undo()
    assert transfer(tiny_corpus, tmp_path / "cut", "--mixer", "odm-released") == 0
    for name in ("stats.jsonl", "eval.jsonl"):
        whole, cut = (
            [json.loads(line) for line in (tmp_path / run / name).read_text().splitlines()] for run in ("whole", "cut")
        )
        for line in (*whole, *cut):
            for part in [name for name in line if name.startswith("seconds")]:
                line.pop(part)
        assert whole == cut


def test_mixture_can_be_piped_into_a_static_run(tiny_corpus, tmp_path, capsys):
    assert transfer(tiny_corpus, tmp_path / "odm", "--mixer", "odm-released") == 0
    capsys.readouterr()
    assert acodm("mixture", tmp_path / "odm", "--format", "json") == 0
    (tmp_path / "w.json").write_text(capsys.readouterr().out)
    assert transfer(tiny_corpus, tmp_path / "static", "--mixer", "static", "--weights", tmp_path / "w.json") == 0


def test_fresh_deletes_a_demo_and_nothing_else(tiny_corpus, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["GPTNeoXForCausalLM"]}')
    (model / "weights").write_text("precious")
    assert acodm("demo", "--recipe", "smoke", "--corpus", tiny_corpus, "--fresh", "--out", model) == 2
    assert "is not the record of a run" in capsys.readouterr().err
    assert (model / "weights").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--seed", "-1"], "seed=-1"),
        (["train", "--agent", '{"gamma": "x"}'], "wrong type"),
        (["train", "--agent", '{"hidden": 5}'], "hidden=5"),
        (["train", "--reward", '{"progress": "x"}'], "wrong type"),
        (["train", "--reward", '{"terms": 3}'], "wrong type"),
        (["train", "--batch_size", "1", "--steps_per_action", "1"], "batch_size=1: must be at least 6"),
        (["transfer", "--mixer", "uniform", "--decision_every", "0"], "decision_every=0"),
        (["transfer", "--mixer", "uniform", "--device", "cpu:x"], "device=cpu:x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_types_and_ranges_are_user_errors(arguments, message, tiny_corpus, tmp_path, capsys):
    sizes = ["--corpus", tiny_corpus, "--sequence_length", "32", "--out", tmp_path / "out"]
    assert acodm(arguments[0], *sizes, *arguments[1:]) == 2
    assert message in capsys.readouterr().err


def test_out_below_a_file_is_a_user_error(tiny_corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert transfer(tiny_corpus, tmp_path / "file" / "run", "--mixer", "uniform") == 2
    assert "cannot be written" in capsys.readouterr().err
