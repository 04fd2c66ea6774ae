"""The user's objective in `acodm transfer`, `cotrain` and `train`: what is recorded, compared, and refused."""

import json

import numpy as np
import pytest
from general_policy import general

from acodm_env.experiments import cli
from acodm_env.experiments.run import results
from acodm_env.experiments.run.accounting import measuring_frac
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.experiments.target.config import TransferConfig
from acodm_env.experiments.target.transfer import choose_mixer
from acodm_env.policy.load import load_policy
from acodm_env.policy.mixer import PolicyMixer
from acodm_env.run_log import EvaluationLine
from acodm_env.trainer import RunInfo
from log_lines import step_line

SIZES = ["--batch_size", 6, "--sequence_length", 32]
TARGET = ["--target", "tiny", "--steps", 4, "--evaluations", 2, *SIZES]
UNIFORM = ["transfer", "--mixer", "uniform"]


def acodm(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


def read(out):
    return json.loads((out / "result.json").read_text())


def test_a_run_is_judged_by_its_objective_on_both_splits(tiny_corpus, tmp_path, capsys):
    aim = ["--targets", "verbs=3,letters=1", "--objective", "perplexity", "--domains", "letters,numbers"]
    assert acodm(*UNIFORM, "--corpus", tiny_corpus, *TARGET, *aim, "--out", tmp_path) == 0
    said, result = capsys.readouterr(), read(tmp_path)
    for split, key in (("domain_loss_nats", "objective_nats"), ("validation_loss_nats", "validation_objective_nats")):
        losses = result[split]
        assert losses.keys() == {"letters", "verbs"}
        assert result[key] == pytest.approx(np.log(0.25 * np.exp(losses["letters"]) + 0.75 * np.exp(losses["verbs"])))
    assert (result["targets"], result["objective"], result["metric"]) == (
        ["letters", "verbs"],
        [0.25, 0.75],
        "perplexity",
    )
    assert np.log(result["mean_perplexity"]) == pytest.approx(result["objective_nats"])
    config = result["config"]
    assert config["domains"] == ["letters", "numbers"]
    assert (config["targets"], config["objective"]) == (["letters", "verbs"], [0.25, 0.75])
    held = result["heldout_sequences"]["verbs"]
    assert 0 < held["test"] < 64
    assert (
        f"eval_sequences=64: the test split holds fewer of letters {result['heldout_sequences']['letters']['test']}"
        in (said.err)
    )
    assert "objective" in said.out
    assert "log mean perplexity of letters, verbs ×3" in said.out
    assert f"validation {result['validation_loss_nats']['verbs']:.4f}" in said.out
    again = [*UNIFORM, "--corpus", tiny_corpus, *TARGET, "--out", tmp_path, "--domains", "letters,numbers"]
    assert acodm(*again, "--targets", "letters=2,verbs=6", "--objective", "perplexity") == 0  # the same objective
    assert read(tmp_path) == result
    assert acodm(*again, "--targets", "letters=2,verbs=6") == 2
    assert "already holds another run (metric='perplexity' there, 'loss' now)" in capsys.readouterr().err


def test_the_usual_objective_leaves_a_run_as_it_was(tiny_corpus, tmp_path):
    assert acodm(*UNIFORM, "--corpus", tiny_corpus, *TARGET, "--out", tmp_path, "--quiet") == 0
    result = read(tmp_path)
    assert not {"objective", "targets", "metric", "cut", "certificate"} & result["config"].keys()
    assert result["objective_nats"] == pytest.approx(result["mean_loss_nats"])
    assert result["objective_nats"] == pytest.approx(np.mean(list(result["domain_loss_nats"].values())))


def test_domains_that_are_left_out_are_not_evaluated(tiny_corpus, tmp_path):
    some = ["--domains", "verbs,letters", "--quiet"]
    assert acodm(*UNIFORM, "--corpus", tiny_corpus, *TARGET, *some, "--out", tmp_path) == 0
    assert [*read(tmp_path)["domain_loss_nats"]] == ["verbs", "letters"]
    assert read(tmp_path)["targets"] == ["verbs", "letters"]


def test_a_cut_is_recorded_and_another_is_another_run(tiny_corpus, tmp_path, capsys):
    command = [*UNIFORM, "--corpus", tiny_corpus, *TARGET, "--out", tmp_path, "--quiet"]
    assert acodm(*command, "--cut", "verbs=3") == 0
    assert read(tmp_path)["config"]["cut"] == {"verbs": 3}
    last = json.loads((tmp_path / "stats.jsonl").read_text().splitlines()[-1])
    assert last["epochs"][2] == pytest.approx(8 / 3)  # 4 × 6 / 3 sequences of three
    assert acodm(*command) == 2
    assert "already holds another run" in capsys.readouterr().err


def test_splits_that_differ_are_named(tiny_corpus, tmp_path, monkeypatch, capsys):
    from acodm_env.pretrain.trainer import LMTrainer

    original = LMTrainer.evaluate
    monkeypatch.setattr(
        LMTrainer, "evaluate", lambda self, split, n=None: original(self, split, n) - [0.5 * (split == "test"), 0, 0]
    )
    assert acodm(*UNIFORM, "--corpus", tiny_corpus, *TARGET, "--out", tmp_path, "--quiet") == 0
    (sentence,) = read(tmp_path)["split_differences"]
    assert "domain 'letters': validation (" in sentence
    assert sentence in capsys.readouterr().err


def test_steps_are_counted_on_the_objective_and_only_against_the_same_one(tiny_corpus, tmp_path, capsys):
    shared = ["--corpus", tiny_corpus, *TARGET, "--quiet"]
    assert acodm(*UNIFORM, *shared, "--targets", "verbs", "--out", tmp_path / "uniform") == 0
    assert acodm(*UNIFORM, *shared, "--out", tmp_path / "plain") == 0
    against = [*UNIFORM, *shared, "--reference", tmp_path / "uniform", "--out", tmp_path / "run"]
    assert acodm(*against, "--targets", "verbs") == 0
    assert read(tmp_path / "run")["steps_to_reference_ratio"] == 1.0
    assert acodm(*against[:-1], tmp_path / "other", "--targets", "letters") == 2
    assert "must have targets=['letters'] as this run has; it has ['verbs']" in capsys.readouterr().err
    assert acodm(*against[:-3], tmp_path / "plain", "--out", tmp_path / "other", "--targets", "verbs") == 2
    assert "must have targets=['verbs']" in capsys.readouterr().err


def logged(path, losses, **objective):
    """A run with test losses (M,) at steps 0, 10, 20."""
    folder = RunFolder(path, {"domains": ["a", "b"], "mixer": path.name, **objective})
    for step, row in zip((0, 10, 20), losses, strict=True):
        folder.append(EvaluationLine(step=step, losses=row, targets=["a", "b"]))
    folder.append(step_line(20))
    return folder


def test_steps_to_the_references_best_objective_by_hand(tmp_path):
    """Of target b alone the run falls 6, 4, 2 and reaches 3 at step 15; of a it never reaches the reference."""
    aim = {"targets": ["a", "b"], "objective": [0.0, 1.0], "metric": "loss"}
    reference = logged(tmp_path / "reference", [(6, 6), (2, 4), (1, 3)], **aim)
    run = logged(tmp_path / "run", [(6, 6), (5, 4), (5, 2)], **aim)
    assert results.mixer_result(run, reference)["steps_to_reference_ratio"] == pytest.approx(0.75)
    plain = [
        logged(tmp_path / name, losses)
        for name, losses in (("x", [(6, 6), (2, 4), (1, 3)]), ("y", [(6, 6), (5, 4), (5, 2)]))
    ]
    assert results.mixer_result(plain[1], plain[0])["steps_to_reference_ratio"] is None
    both = {"targets": ["a", "b"], "objective": [0.5, 0.5], "metric": "perplexity"}
    found = results.mixer_result(logged(tmp_path / "both", [(6, 6), (5, 4), (5, 2)], **both), None)
    assert found["mean_loss_nats"] == 3.5
    assert found["mean_perplexity"] == pytest.approx((np.exp(5) + np.exp(2)) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "verbz"], "did you mean 'verbs'?"),
        (["--targets", "verbs=0"], "must hold a positive weight"),
        (["--targets", "verbs=-1"], "targets.verbs=-1: must be a finite weight"),
        (["--objective", "ppl"], "objective='ppl': must be one of loss, perplexity"),
        (["--cut", "verbs=x"], "must be domain=sequences"),
    ],
    ids=" ".join,
)
def test_bad_objectives_are_refused_before_anything_is_written(arguments, message, tiny_corpus, tmp_path, capsys):
    out = tmp_path / "run"
    for command in (UNIFORM, ["cotrain"], ["train"]):
        sizes = SIZES if command == ["train"] else TARGET
        assert acodm(*command, "--corpus", tiny_corpus, *sizes, *arguments, "--out", out) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()


# --- a policy for any problem --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    wide = {"num_rows": [3, 24], "decisions": [2, 40]}
    return {
        "wide": general(support=wide, horizon=2, decision_every=1).save(folder / "wide"),
        "narrow": general(support=wide | {"num_rows": [4, 24]}, horizon=2, decision_every=1).save(folder / "narrow"),
    }


def test_it_drives_any_target_and_its_measuring_is_told_before_and_counted_after(
    policies, tiny_corpus, tmp_path, capsys
):
    aim = ["--targets", "verbs", "--domains", "letters,numbers", "--no-gate"]
    run = ["transfer", "--policy", policies["wide"], "--corpus", tiny_corpus, *TARGET, *aim, "--out", tmp_path]
    assert acodm(*run) == 0
    said, result = capsys.readouterr(), read(tmp_path)
    # Two decisions, the second of them after two steps: 8 sequences, a third of a step's FLOPs each, of 24 in all.
    assert "measuring: 11.1% of the run" in said.out
    assert result["accounting"]["measurement_tokens"] == 8 * 32
    assert result["accounting"]["measurement_frac"] == pytest.approx(1 / 9)
    assert result["accounting"]["measurement_flops"] == pytest.approx(result["accounting"]["flops"] / 9)
    assert result["in_force"] == "policy"
    requested = [json.loads(line)["requested"] for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert np.ptp(requested, axis=1).max() > 1e-3


def test_outside_of_its_support_a_rule_drives_and_the_result_says_which(policies, tiny_corpus, tmp_path, capsys):
    aim = ["--targets", "verbs", "--no-gate"]
    run = ["transfer", "--policy", policies["narrow"], "--corpus", tiny_corpus, *TARGET, *aim, "--out", tmp_path]
    assert acodm(*run) == 0
    said = capsys.readouterr().err
    assert said.count("3 domains and targets, it is meant for 4 to 24; target-share 1 drives instead") == 1
    result = read(tmp_path)
    assert result["in_force"] == "target-share 1"
    assert result["accounting"]["measurement_tokens"] == 0
    last = json.loads((tmp_path / "stats.jsonl").read_text().splitlines()[-1])
    assert (last["requested"], last["fixed_rule"]) == ([0.0, 0.0, 1.0], 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domains", "verbs"], "leaves nothing to choose; a mixture takes two or more"),
        (["--policy", "generalst"], "did you mean 'generalist'?"),
    ],
    ids=" ".join,
)
def test_what_no_policy_can_do_is_refused(arguments, message, policies, tiny_corpus, tmp_path, capsys):
    run = ["transfer", "--policy", policies["wide"], "--corpus", tiny_corpus, *TARGET, "--out", tmp_path / "run"]
    assert acodm(*run, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_measuring_by_hand():
    info = RunInfo(
        domains=("a", "b", "c"),
        targets=("a", "b", "c"),
        sizes_tokens=(1, 1, 1),
        batch_size=16,
        sequence_length=128,
        horizon=400,
        decision_every=20,
        initial_loss_nats=9.0,
        eval_tokens=3 * 64 * 128,
    )
    policy = general(horizon=20, decision_every=1)
    mixer = PolicyMixer(policy)
    mixer.start(info)
    # 8 sequences for three targets are too few: training losses serve, and nothing is measured.
    assert measuring_frac(mixer, info) == 0.0
    mixer.probe_sequences = 24
    assert measuring_frac(mixer, info) == pytest.approx(19 * 24 / 3 / 6400)
    whole = general(horizon=20, decision_every=1, probe_sequences=None)
    mixer = PolicyMixer(whole)
    mixer.start(info)
    assert measuring_frac(mixer, info) == pytest.approx(20 * 192 / 3 / 6400)


# --- policies that were learned for one objective -----------------------------------------------------------


def test_a_policy_for_another_objective_says_what_it_was_learned_for(tiny_corpus, tmp_path, capsys):
    learn = ["--episodes", 2, "--episode_steps", 4, "--steps_per_action", 2, "--evaluate_every", 1, "--quiet"]
    agent = ["--agent", '{"learning_starts": 2, "batch_size": 4, "hidden": [16]}', "--reward", "final"]
    aim = ["--targets", "verbs", "--fields", "loss,progress"]
    made = ["train", "--corpus", tiny_corpus, *SIZES, *learn, *agent, *aim, "--out", tmp_path / "learned"]
    assert acodm(*made) == 0
    learned = read(tmp_path / "learned")
    assert learned["objective"] == "loss of verbs"
    assert (learned["config"]["targets"], learned["config"]["eval_sequences"]) == ("verbs", 64)
    assert not {"cut", "domains", "objective"} & learned["config"].keys()
    assert acodm("export", "--run", tmp_path / "learned", "--out", tmp_path / "policy", "--quiet") == 0
    assert load_policy(tmp_path / "policy").provenance["config"]["targets"] == "verbs"
    assert "loss of verbs" in (tmp_path / "policy" / "README.md").read_text()
    capsys.readouterr()
    run = ["transfer", "--policy", tmp_path / "policy", "--corpus", tiny_corpus, *TARGET, "--quiet"]
    assert acodm(*run, "--targets", "letters", "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "it was learned for the loss of verbs, this run's objective is the loss of letters" in error
    assert not (tmp_path / "run").exists()
    assert acodm("gate", "--policy", tmp_path / "policy", "--corpus", tiny_corpus, "--sequence_length", 32) == 1
    assert (
        "it was learned for the loss of verbs, this run's objective is the mean loss over all"
        in capsys.readouterr().out
    )
    assert acodm(*run, "--targets", "letters", "--out", tmp_path / "run", "--no-gate") == 0


def test_cotrain_plays_for_its_targets(tiny_corpus, tmp_path):
    tiny_agent = '{"learning_starts": 1, "batch_size": 2, "hidden": [8]}'
    aim = ["--targets", "verbs", "--reward", "progress", "--fields", "loss,progress", "--agent", tiny_agent]
    run = ["cotrain", "--corpus", tiny_corpus, *TARGET, *aim, "--start_decisions", 1, "--pretrain_steps", 1, "--quiet"]
    assert acodm(*run, "--out", tmp_path) == 0
    result = read(tmp_path)
    assert result["domain_loss_nats"].keys() == {"verbs"}
    assert result["objective_nats"] == result["domain_loss_nats"]["verbs"]
    held = result["heldout_sequences"]["verbs"]["validation"]
    assert result["accounting"]["measurement_tokens"] == 4 * held * 32
    assert load_policy(tmp_path / "policy").provenance["config"]["targets"] == ["verbs"]


def test_a_name_opens_what_is_shipped(monkeypatch, tmp_path):
    """The command opens by name what the package ships under it."""
    from acodm_env.policy import load as module

    general(support={"num_rows": [3, 24]}).save(tmp_path / "generalist")
    monkeypatch.setattr(module, "POLICIES", tmp_path)
    mixer = choose_mixer(TransferConfig(policy="generalist"))
    assert mixer.policy.support == {"num_rows": [3, 24]}
    assert PolicyMixer("generalist").policy.fingerprint == mixer.policy.fingerprint
