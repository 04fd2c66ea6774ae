"""`acodm gate`, and the gate before `acodm transfer`: exit codes, the named checks, and what stays on record."""

import json
import math

import numpy as np
import pytest

from acodm_env.agents.gate_rollouts import imagined_run
from acodm_env.experiments import cli
from acodm_env.experiments.target.config import TransferConfig
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.policy.dense import Policy
from acodm_env.policy.load import load_policy

DOMAINS = ("letters", "numbers", "verbs")
FIELDS = (("loss", 3), ("progress", 1))
TARGET = ["--target", "tiny", "--steps", "4", "--batch_size", "6", "--sequence_length", "32", "--evaluations", "2"]
SATURATED = (20.0, -20.0, -20.0)


def acodm(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


def save(path, bias=(0.3, 0.0, -0.3), fields=FIELDS, domains=DOMAINS):
    """A policy that tends to a fixed action, and tilts it a little with what it sees."""
    width = sum(size for _, size in fields)
    weight = np.full((len(domains), width), 0.05, dtype=np.float32)
    policy = Policy(
        domains=domains,
        fields=fields,
        mean=np.zeros(width),
        scale=np.ones(width),
        clip=10.0,
        layers=((weight, np.array(bias, dtype=np.float32), "tanh"),),
        action=ActionMap(),
        bounds=Bounds(),
        interaction=InteractionConfig(),
        decision_every=2,
        horizon=4,
    )
    return policy.save(path)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    layers = (("loss", 3), ("layer_norm", 3), ("progress", 1))
    return {
        "good": save(folder / "good"),
        "layers": save(folder / "layers", fields=layers),
        "saturated": save(folder / "saturated", SATURATED),
        "broken": save(folder / "broken", (math.nan, 0.0, 0.0)),
        "foreign": save(folder / "foreign", domains=("letters", "numbers", "poems")),
    }


@pytest.mark.parametrize(
    ("name", "code", "failed"),
    [("good", 0, []), ("layers", 0, []), ("saturated", 1, ["boundary"]), ("broken", 1, ["finite"])],
)
def test_exit_code_and_names_of_failed_checks(name, code, failed, policies, tmp_path, capsys):
    file = tmp_path / "gate.json"
    assert acodm("gate", "--policy", policies[name], "--json", file) == code
    out = capsys.readouterr().out
    written = json.loads(file.read_text())
    said = f"passed; {len(written['not_checked'])} of 8 checks were not made: fits (no corpus was given); surrogate "
    assert out.splitlines()[-1].startswith(f"gate: failed: {', '.join(failed)}" if failed else f"gate: {said}")
    assert (written["failed"], written["passed"]) == (failed, not failed)
    assert {"fits", "surrogate value", "support"} <= set(written["not_checked"])
    assert written["fingerprint"] == load_policy(policies[name]).fingerprint
    for check in written["checks"]:
        assert check["name"] in out
        assert check["explanation"]


def test_layer_fields_are_the_reason_why_no_surrogate_fits(policies, capsys):
    assert acodm("gate", "--policy", policies["layers"]) == 0
    assert "no surrogate fits: it reads layer_norm, which no surrogate has" in capsys.readouterr().out


def test_thresholds_are_settings(policies, capsys):
    assert acodm("gate", "--policy", policies["saturated"], "--boundary", "1") == 0
    assert acodm("gate", "--policy", policies["good"], "--entropy", "0.9999", "--quiet") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "gate: failed: entropy"


def test_corpus_decides_whether_it_fits(policies, tiny_corpus, capsys):
    assert acodm("gate", "--policy", policies["good"], "--corpus", tiny_corpus) == 0
    assert "it can drive a run with these 3 domains" in capsys.readouterr().out
    assert acodm("gate", "--policy", policies["foreign"], "--corpus", tiny_corpus) == 1
    out = capsys.readouterr().out
    assert "only in the policy: ['poems']; only in the corpus: ['verbs']" in out
    assert out.splitlines()[-1] == "gate: failed: fits"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "nowhere"], "policy=nowhere: must be generalist, or the folder of an exported policy"),
        (["--policy", "generalst"], "did you mean 'generalist'?"),
        (["--targets", "letters=-1"], "targets.letters=-1: must be a finite weight of at least 0"),
        (["--objective", "letters=1"], "targets and weights go to --targets"),
        (["--objective", "perplexty"], "did you mean 'perplexity'?"),
        (["--proxy", "tiny"], "proxy=tiny: must come with --corpus"),
        (["--proxy", "tiny", "--corpus", "x", "--seeds", "1"], "seeds=1: must be 2 to 100 for a certificate"),
        (["--surface", "regmix-2m"], "surface=regmix-2m: must be one of regmix-1m or a JSON file"),
        (["--corpus", "nowhere"], "must be the folder of a token store"),
        (["--seeds", "0"], "seeds=0: must be at least 1"),
        (["--entropy", "2"], "entropy=2.0: must be a share"),
        (["--json", "a", "--out", "b"], "mean the same"),
        (["--entropyy", "0.1"], "did you mean --entropy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, policies, capsys):
    assert acodm("gate", "--policy", policies["good"], *arguments) == 2
    assert message in capsys.readouterr().err


# --- before a target run ------------------------------------------------------------------------------------


def transfer(corpus, policy, out, *arguments):
    return acodm("transfer", "--corpus", corpus, "--policy", policy, "--out", out, *TARGET, *arguments)


def read(out):
    return json.loads((out / "result.json").read_text())


def test_transfer_asks_first_and_keeps_the_answer(policies, tiny_corpus, tmp_path, capsys):
    out = tmp_path / "run"
    assert transfer(tiny_corpus, policies["good"], out) == 0
    said = capsys.readouterr().err
    assert (
        "gate: passed; 2 of 8 checks were not made: surrogate value, support (no surrogate fits: it is bound to its 3 "
        in said
    )
    gate = read(out)["gate"]
    assert (gate["passed"], gate["failed"]) == (True, [])
    assert gate["not_checked"] == ["surrogate value", "support"]
    assert "gate" not in json.loads((out / "config.json").read_text())["config"]
    assert transfer(tiny_corpus, policies["good"], out, "--no-gate") == 0  # the same run
    assert read(out)["gate"] == gate


def test_transfer_refuses_and_no_gate_goes_on(policies, tiny_corpus, tmp_path, capsys):
    out = tmp_path / "run"
    assert transfer(tiny_corpus, policies["saturated"], out) == 2
    error = capsys.readouterr().err
    assert "fails the offline gate: boundary (1.0000, must be ≤ 0.95)" in error
    assert "--no-gate" in error
    assert not out.exists()
    assert transfer(tiny_corpus, policies["saturated"], out, "--no-gate", "--quiet") == 0
    assert read(out)["gate"] is None
    assert "gate" not in capsys.readouterr().err
    assert transfer(tiny_corpus, policies["saturated"], out) == 0  # finished: nothing is left to refuse


def test_transfer_names_other_domains_before_it_asks(policies, tiny_corpus, tmp_path, capsys):
    assert transfer(tiny_corpus, policies["foreign"], tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "only in the policy: ['poems']" in error
    assert "--no-gate" not in error


def test_a_baseline_is_not_asked(tiny_corpus, tmp_path, capsys):
    assert acodm("transfer", "--corpus", tiny_corpus, "--mixer", "uniform", "--out", tmp_path / "run", *TARGET) == 0
    assert read(tmp_path / "run")["gate"] is None
    assert "gate:" not in capsys.readouterr().err


@pytest.mark.parametrize("off", [["--no-gate"], ["--no_gate"], ["--gate", "false"], ["--gate=false"]])
def test_every_spelling_of_no(off):
    config = cli._parse("transfer", TransferConfig, ["--mixer", "uniform", *off, "--quiet"])
    assert (config.gate, config.quiet) == (False, True)
    assert cli._parse("transfer", TransferConfig, ["--mixer", "uniform"]).gate


def test_a_mistake_beside_it_is_named(capsys):
    assert acodm("transfer", "--no-gate", "--stepps", "3") == 2
    assert "did you mean --steps" in capsys.readouterr().err
    assert acodm("transfer", "--mixer", "uniform", "--no-gate", "--steps", "many") == 2
    assert "steps" in capsys.readouterr().err.partition("no such setting")[0]


def test_imagined_run_has_the_shape_of_the_policy(policies):
    policy = load_policy(policies["layers"])
    run = imagined_run(policy, DOMAINS, 5.0)
    assert (run.num_layers, run.num_domains, run.horizon) == (3, 3, 4)
    policy.check_fits(run)
