"""`acodm gate --proxy`, and `acodm transfer` with its certificate: real runs of a few steps, verdicts by hand."""

import json
import signal

import numpy as np
import pytest
from general_policy import general

from acodm_env.agents.certificate import Certificate
from acodm_env.corpus.problem import choose_problem
from acodm_env.experiments import cli
from acodm_env.experiments.policy import gate
from acodm_env.experiments.policy.certify import Conditions, _as_often, _Trial
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.policy.load import load_policy

PROXY = ["--proxy", "tiny", "--steps", 8, "--batch_size", 6, "--sequence_length", 32, "--eval_sequences", 4]
AIM = ["--targets", "verbs"]
TARGET = ["--target", "tiny", "--steps", 4, "--batch_size", 6, "--sequence_length", 32, "--evaluations", 2, "--no-gate"]
ROWS = {"uniform": 2, "policy": 2, "target-share-0.3": 1, "target-share-0.5": 1, "target-share-0.7": 1}


def acodm(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """For a run of four decisions."""
    return general(horizon=4, decision_every=1).save(tmp_path_factory.mktemp("policy") / "policy")


@pytest.fixture
def offline(monkeypatch):
    """The checks that need no proxy pass."""
    monkeypatch.setattr(gate, "judge", lambda *arguments, **options: [])


@pytest.fixture(scope="module")
def certificate(policy, tiny_corpus, tmp_path_factory):
    """A certificate of real runs, interrupted once on its way."""
    out, patch = tmp_path_factory.mktemp("certificate") / "out", pytest.MonkeyPatch()
    original = RunFolder.append

    def append(self, line):
        original(self, line)
        if line.log == "stats.jsonl" and line.step == 3 and self.config.get("mixer") == "target-share-0.5":
            patch.undo()
            signal.raise_signal(signal.SIGTERM)

    command = ["gate", "--policy", policy, "--corpus", tiny_corpus, *AIM, *PROXY, "--quiet", "--out", out]
    patch.setattr(gate, "judge", lambda *arguments, **options: [])
    patch.setattr(RunFolder, "append", append)
    assert acodm(*command) == 0
    assert not (out / "certificate.json").exists()
    done = {path: path.read_bytes() for path in out.rglob("result.json")}
    again = pytest.MonkeyPatch()
    again.setattr(gate, "judge", lambda *arguments, **options: [])
    assert acodm("transfer", "--policy", policy, "--certificate", out, "--corpus", tiny_corpus, *AIM, *TARGET) == 2
    assert acodm(*command) == 0
    again.undo()
    assert len(done) == 3  # uniform on two seeds, a share on the first
    assert all(path.read_bytes() == content for path, content in done.items())
    return out


def test_it_holds_what_it_rests_on(certificate, policy, tiny_store):
    found = Certificate.load(certificate)
    assert found.policy == load_policy(policy).fingerprint
    assert found.corpus_fingerprint == tiny_store.fingerprint
    assert (found.targets, found.objective, found.metric) == (["verbs"], [1.0], "loss")
    assert len(found.seeds) == 2
    assert 0 not in found.seeds
    assert {*ROWS} <= found.evidence.keys()
    assert {len(seeds) for row, seeds in found.evidence.items() if row.startswith("target-share")} == {1, 2}
    assert len(found.evidence[found.best_rule]) == 2
    runs = sum(len(seeds) for seeds in found.evidence.values())
    assert found.cost["tokens"] == runs * 8 * 6 * 32
    assert found.cost["flops"] > 0
    first = str(found.seeds[0])
    result = json.loads((certificate / "runs" / "policy" / f"seed{first}" / "result.json").read_text())
    assert found.evidence["policy"][first] == {
        "validation": result["validation_objective_nats"],
        "test": result["objective_nats"],
    }
    assert result["in_force"] == "policy"
    assert result["objective_nats"] == result["domain_loss_nats"]["verbs"]


def test_the_same_command_says_it_again_and_another_one_is_refused(certificate, policy, tiny_corpus, offline, capsys):
    command = ["gate", "--policy", policy, "--corpus", tiny_corpus, *AIM, *PROXY, "--out", certificate]
    assert acodm(*command) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2] == Certificate.load(certificate).summary()
    assert acodm(*command, "--seed", 1) == 2
    assert "already holds another run (seeds=" in capsys.readouterr().err


@pytest.fixture
def decided(certificate, tmp_path):
    """The certificate with another verdict, whole."""

    def decide(verdict):
        from dataclasses import replace

        replace(Certificate.load(certificate), verdict=verdict).save(tmp_path / verdict)
        return tmp_path / verdict

    return decide


@pytest.mark.parametrize(("verdict", "mixer"), [("keep", "policy"), ("halve", "policy"), ("uniform", "uniform")])
def test_transfer_applies_the_verdict(verdict, mixer, decided, policy, tiny_corpus, tmp_path, capsys):
    out = tmp_path / "run"
    asked = ["--policy", policy, "--certificate", decided(verdict), "--corpus", tiny_corpus, *AIM, "--out", out]
    assert acodm("transfer", *asked, *TARGET) == 0
    assert f"certificate: {verdict} (gain on uniform in validation: " in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert (result["mixer"], result["in_force"], result["certificate"]["verdict"]) == (mixer, mixer, verdict)
    config = result["config"]
    assert (config["certificate"], config["policy"]) == (verdict, load_policy(policy).fingerprint)
    assert not {"certify", "proxy", "proxy_steps", "proxy_seeds"} & config.keys()
    requested = [json.loads(line)["requested"] for line in (out / "stats.jsonl").read_text().splitlines()]
    spread = max(max(one) - min(one) for one in requested)
    assert (spread < 1e-5) == (verdict == "uniform")
    if verdict == "halve":  # the logarithms of the first decision's weights are half of the whole policy's
        whole = ["--policy", policy, "--certificate", decided("keep"), "--corpus", tiny_corpus, *AIM]
        assert acodm("transfer", *whole, "--out", tmp_path / "whole", *TARGET) == 0
        kept = json.loads((tmp_path / "whole" / "stats.jsonl").read_text().splitlines()[0])["requested"]
        np.testing.assert_allclose(requested[0], np.sqrt(kept) / np.sqrt(kept).sum(), atol=3e-6)
    assert acodm("transfer", *asked, *TARGET, "--quiet") == 0  # finished: it is told again
    assert acodm("transfer", *asked[:2], *asked[4:], *TARGET) == 2
    assert "already holds another run (certificate=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--domains", "letters,verbs"], "must be for this corpus, corpus_fingerprint="),
        (["--targets", "verbs,letters"], "must be for this corpus, heldout_fingerprint="),
        (["--targets", "verbs", "--objective", "perplexity"], "must be for log perplexity of verbs, as this run is"),
        (["--mixer", "uniform"], "give exactly one of them"),
    ],
    ids=" ".join,
)
def test_a_certificate_for_something_else_is_refused(change, message, decided, policy, tiny_corpus, tmp_path, capsys):
    asked = ["--policy", policy, "--certificate", decided("keep"), "--corpus", tiny_corpus, *AIM]
    assert acodm("transfer", *asked, *TARGET, *change, "--out", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_baseline_needs_none(capsys):
    assert acodm("transfer", "--mixer", "uniform", "--certify") == 2
    assert "must come with --policy" in capsys.readouterr().err


def test_certify_makes_it_beside_the_run_with_as_many_passes(policy, tiny_corpus, tmp_path):
    out = tmp_path / "run"
    small = ["--proxy_steps", 4, "--eval_sequences", 2, "--quiet", "--targets", "verbs", "--certify"]
    assert acodm("transfer", "--policy", policy, "--corpus", tiny_corpus, *TARGET, *small, "--out", out) == 0
    found = Certificate.load(tmp_path / "run-certificate")
    assert found.conditions["target_tokens"] == 4 * 6 * 32
    assert json.loads((out / "result.json").read_text())["certificate"]["verdict"] == found.verdict
    assert acodm("transfer", "--policy", policy, "--corpus", tiny_corpus, *TARGET, *small, "--out", out) == 0


# --- the logic, with runs that are made up -------------------------------------------------------------------


@pytest.fixture
def trial(tiny_store, tmp_path, monkeypatch):
    """The verdict on validation objectives by row; what is not named is 5.0."""

    def judged(objectives, seeds=(1, 2), targets="verbs"):
        known = choose_problem(tiny_store, sequence_length=32, targets=targets)
        trial = _Trial(general(), known, Conditions(sequence_length=32), tmp_path, True, lambda: False)
        order = []

        def run(row, mixer, seed):
            order.append((row, seed))
            values = objectives.get(row, 5.0)
            value = values[seeds.index(seed)] if isinstance(values, list) else values
            accounting = {
                "tokens": 10,
                "flops": 3.0,
                "measurement_flops": 1.0,
                "seconds": {"train": 2.0, "probe": None},
            }
            known = {"objective_nats": 9.0, "validation_objective_nats": value, "accounting": accounting}
            trial.results.setdefault(row, {})[seed] = known

        monkeypatch.setattr(trial, "run", run)
        return trial.judge(list(seeds)), order

    return judged


def test_keep_needs_no_half(trial):
    found, order = trial({"uniform": [5.0, 5.1], "policy": [4.9, 4.9], "target-share-0.7": [4.8, 4.7]})
    assert (found.verdict, found.best_rule) == ("keep", "target-share-0.7")
    assert found.gains.keys() == {"target-share-0.7", "policy"}
    assert order == [
        *(("uniform", 1), ("uniform", 2)),
        *((f"target-share-{share}", 1) for share in ("0.3", "0.5", "0.7", "1")),
        *(("target-share-0.7", 2), ("policy", 1), ("policy", 2)),
    ]
    assert found.cost == {"tokens": 90.0, "flops": 36.0, "seconds": 18.0}


def test_halve_then_uniform(trial):
    found, order = trial({"policy": [5.2, 4.7], "policy-halved": [4.9, 4.95]})
    assert (found.verdict, order[-2:]) == ("halve", [("policy-halved", 1), ("policy-halved", 2)])
    found, _ = trial({"policy": [5.2, 4.7], "policy-halved": [4.996, 4.999]})
    assert found.verdict == "uniform"
    found, _ = trial({"policy": [None, 4.7], "policy-halved": [None, 4.9]})
    assert found.verdict == "uniform"
    assert found.gains["policy"]["mean_nats"] is None


def test_a_rule_that_diverged_is_not_the_best_and_uniform_must_not(trial):
    found, _ = trial({f"target-share-{share}": [None, None] for share in ("0.3", "0.5", "0.7")})
    assert found.best_rule == "target-share-1"
    with pytest.raises(Exception, match="uniform must not diverge"):
        trial({"uniform": [5.0, None]})


def test_where_all_domains_count_the_fixed_rule_is_by_size(trial):
    found, _ = trial({}, targets=None)
    assert found.best_rule == "proportional"
    assert found.objective == [1 / 3] * 3


def test_domains_are_cut_to_be_passed_over_as_often(tiny_store):
    problem = choose_problem(tiny_store, sequence_length=32)
    sizes = tiny_store.num_sequences("train", 32)
    shared = {"steps": 4, "batch_size": 6, "sequence_length": 32}
    cut = _as_often(problem, Conditions(**shared, target_tokens=4 * 4 * 6 * 32)).num_sequences("train", 32)
    assert cut == tuple(max(1, size // 4) for size in sizes)
    for target_tokens in (None, 100):
        assert _as_often(problem, Conditions(**shared, target_tokens=target_tokens)) is tiny_store
