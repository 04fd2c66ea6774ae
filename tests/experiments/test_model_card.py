"""The cards: the mixture that was used by hand, who decided it, scores at chance marked, names instead of paths."""

import json
import shutil

import numpy as np
import pytest
from plugin import tiny

from acodm_env.errors import ConfigError
from acodm_env.experiments import cli
from acodm_env.experiments.benchmark.config import BenchmarkConfig
from acodm_env.experiments.benchmark.jobs import run_cell
from acodm_env.experiments.benchmark.planning import make_plan
from acodm_env.experiments.publish import export_model
from acodm_env.experiments.publish.evaluation_card import evaluation_section
from acodm_env.experiments.publish.export_model import ExportModelConfig, driving_policy, read_trained
from acodm_env.experiments.publish.model_card import Trained, Weights, mixture_used, model_card
from acodm_env.experiments.publish.policy_card import bare_name, policy_card, without_paths
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.policy.dense import Policy
from acodm_env.policy.load import load_policy
from acodm_env.run_log import StepLine
from acodm_env.run_log import read_log as read_steps
from log_lines import step_line

SIZES = ["--target", "tiny", "--batch_size", "6", "--sequence_length", "32", "--evaluations", "2", "--quiet"]
WEIGHTS = Weights(architecture="GPTNeoXForCausalLM", num_parameters=1000, context=32, sha256="ab")


def transfer(corpus, out, *arguments):
    command = ["transfer", "--corpus", corpus, *SIZES, "--out", out, *arguments]
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in command])
    assert stop.value.code == 0


@pytest.fixture(scope="module")
def trained(tiny_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    transfer(tiny_corpus, out, "--mixer", "odm-released", "--steps", "6")
    return out


# --- what was used ----------------------------------------------------------------------------------------


def step(number, tokens, requested, realised, epochs=(0.0, 0.0)):
    return step_line(number, tokens=tokens, requested=requested, realised=realised, epochs=list(epochs))


def write_run(folder, domains, steps):
    folder.mkdir(exist_ok=True)
    config = {"domains": domains, "name": "x"}
    (folder / "config.json").write_text(json.dumps({"config": config, "versions": {}}))
    (folder / "stats.jsonl").write_text("".join(json.dumps(line.record()) + "\n" for line in steps))


def read_log(folder):
    """What `write_run` wrote."""
    record = json.loads((folder / "config.json").read_text())
    return Trained(path=folder, record=record, steps=read_steps(folder, StepLine), result={})


def test_mixture_by_hand(tmp_path):
    records = [step(1, 100, [0.5, 0.5], [0.6, 0.4]), step(2, 400, [0.2, 0.8], [0.2, 0.8], [1.5, 0.25])]
    write_run(tmp_path, ["a", "b"], records)
    used = mixture_used(read_log(tmp_path))
    assert used["a"].tokens == pytest.approx(0.6 * 100 + 0.2 * 300)
    assert used["a"].realised == pytest.approx(120 / 400)
    assert used["a"].requested == pytest.approx((50 + 60) / 400)
    assert (used["a"].epochs, used["b"].epochs) == (1.5, 0.25)


def test_mixture_over_a_change_of_domains(tmp_path):
    """Steps 1-2 on a, b (one more was logged and done again), 3-4 on b, c: 100 tokens each."""
    write_run(
        tmp_path / "before-step-00000002", ["a", "b"], [step(n, 100 * n, [0.5, 0.5], [1.0, 0.0]) for n in (1, 2, 3)]
    )
    after = [step(n, 100 * n, [0.5, 0.5], [0.25, 0.75], [0.1, 0.2]) for n in (3, 4)]
    write_run(tmp_path, ["b", "c"], after)
    used = mixture_used(read_log(tmp_path))
    assert {name: share.tokens for name, share in used.items()} == {"a": 200.0, "b": 50.0, "c": 150.0}
    assert {name: share.requested for name, share in used.items()} == {"a": 0.25, "b": 0.5, "c": 0.25}
    assert [used[name].epochs for name in "abc"] == [None, 0.1, 0.2]


def test_a_run_that_went_on_with_other_domains(tiny_corpus, tmp_path):
    out = tmp_path / "run"
    transfer(tiny_corpus, out, "--mixer", "uniform", "--steps", "3")
    transfer(tiny_corpus, out, "--mixer", "uniform", "--steps", "6", "--domains", "verbs,letters", "--adapt")
    used = mixture_used(read_trained(out))
    assert sum(share.tokens for share in used.values()) == pytest.approx(6 * 6 * 32)
    assert used["numbers"].tokens == pytest.approx(3 * 2 * 32)
    export_model.run(ExportModelConfig(run=str(out), out=str(tmp_path / "model"), quiet=True))
    text = (tmp_path / "model" / "README.md").read_text()
    assert "| changed at step 3 | corpus_fingerprint, domains, steps |" in text
    numbers = next(line for line in text.splitlines() if line.startswith("| numbers |"))
    assert numbers.endswith("| – | – | – |")


def test_static_weights_are_told(tiny_corpus, tmp_path):
    weights = "letters=0.5,numbers=0.25,verbs=0.25"
    transfer(tiny_corpus, tmp_path, "--mixer", "static", "--weights", weights, "--steps", "2")
    card = model_card(read_trained(tmp_path), WEIGHTS, "x")
    assert "`static` with the weights letters 0.5, numbers 0.25, verbs 0.25." in card


# --- evaluation -------------------------------------------------------------------------------------------


def metric(**settings):
    plain = {"task": "mmlu", "name": "acc", "value": 0.2512, "group": "", "num_items": 14042, "unit": "fraction"}
    return plain | {"stderr": 0.0036, "low": 0.244, "high": 0.2584, "chance": 0.25, "verdict": None} | settings


def test_scores_at_chance_are_marked(tmp_path):
    rows = [
        metric(verdict="not distinguishable from chance"),
        *(metric(group=f"s{n}", verdict="above chance") for n in range(21)),
        metric(task="humaneval", name="pass@1", value=0.0, num_items=164, chance=0.0, verdict="below chance"),
        metric(task="perplexity", name="loss", unit="nats/token", value=3.25, chance=None, stderr=None, low=None),
        metric(task="perplexity", name="perplexity", unit="perplexity", group="web", value=None, chance=None),
        {"task": 3},
        "nonsense",
    ]
    tasks = {"mmlu": {"facts": {"num_fewshot": 5, "harness_version": "0.4.13"}}, "perplexity": {}, "odd": 1}
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({"model": {"sha256": "ab"}, "results": rows, "tasks": tasks}))
    text = evaluation_section(file, "ab")
    assert "| mmlu | all | acc | 0.2512 ± 0.0036 | 0.244 … 0.2584 | 14,042 | 0.25 | ≈ chance |" in text
    assert "| humaneval | all | pass@1 | 0 ± 0.0036 | 0.244 … 0.2584 | 164 | 0 | below chance |" in text
    assert "| perplexity | unweighted mean | loss, nats/token | 3.25 | – | 14,042 | – |  |" in text
    assert "| perplexity | web | perplexity | – |" in text
    assert "s20" not in text
    assert "- mmlu: num_fewshot 5, harness_version 0.4.13" in text
    assert "not distinguishable from guessing" in text
    assert "left out" in evaluation_section(file, "another")


def test_what_makes_a_number_another_one_is_said_in_its_row(tmp_path):
    def result(**identity):
        facts = {key: identity.pop(key) for key in ("reencoded",) if key in identity}
        return {"identity": {"precision": "fp32", "context": 32, "limit": None} | identity, "facts": facts}

    tasks = {
        "perplexity": result(task="perplexity", corpus_fingerprint="c0ffee" * 4, stride=16),
        "perplexity-2": result(task="perplexity", corpus_fingerprint="beef" * 8, stride=32, reencoded=True),
        "perplexity-limit5": result(task="perplexity", corpus_fingerprint="c0ffee" * 4, stride=16, limit=5),
        "mmlu": result(task="mmlu", num_fewshot=0, data=None),
        "mmlu-2": result(task="mmlu", num_fewshot=0, data={"test.csv": "00"}, precision="bf16"),
        "hellaswag-limit9": result(task="hellaswag", limit=9),
    }
    file = tmp_path / "evaluation.json"
    rows = [metric(task=name, verdict="above chance") for name in tasks]
    file.write_text(json.dumps({"model": {"sha256": "ab"}, "results": rows, "tasks": tasks}))
    text = evaluation_section(file, "ab", "c0ffee" * 4)
    last = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip(" |") for line in text.splitlines()}
    assert last["hellaswag-limit9"] == "a trial: at most 9 items of each of its parts"
    assert "other data" not in last["perplexity"]
    assert "other data than the run's" in last["perplexity-2"]
    assert "corpus `beefbeefbeef`" in last["perplexity-2"]
    assert "stride 32" in last["perplexity-2"]
    assert "stride 16" in last["perplexity"]
    assert "texts encoded again by the model's tokenizer" in last["perplexity-2"]
    assert "a trial: at most 5 documents of every domain" in last["perplexity-limit5"]
    assert last["mmlu"] == "precision fp32; questions from the hub"
    assert last["mmlu-2"].startswith("precision bf16; questions from local files `")
    assert "- mmlu-2: context 32, num_fewshot 0, precision bf16, questions from local files" in text
    assert "A perplexity marked *other data than the run's*" in text
    alone = {"perplexity": tasks["perplexity"]}
    file.write_text(json.dumps({"model": {"sha256": "ab"}, "results": rows[:1], "tasks": alone}))
    assert "other data" not in evaluation_section(file, "ab", "c0ffee" * 4)
    assert "| other data than the run's |" in evaluation_section(file, "ab", "f00d" * 8)


def test_a_run_scored_on_another_corpus_says_so(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    entry = {"identity": {"task": "perplexity", "corpus_fingerprint": "beef" * 16}, "facts": {}}
    record = {"results": [metric(task="perplexity")], "tasks": {"perplexity": entry}}
    (run / "evaluation.json").write_text(json.dumps(record))
    assert "| other data than the run's |" in model_card(read_trained(run), WEIGHTS, "x")


@pytest.mark.parametrize("content", ["{}", "[]", '{"results": 3, "model": []}', '{"results": []}'])
def test_an_evaluation_without_results(content, tmp_path):
    (tmp_path / "evaluation.json").write_text(content)
    assert "Not evaluated" in evaluation_section(tmp_path / "evaluation.json", "ab")
    assert "Not evaluated" in evaluation_section(tmp_path / "absent.json", "ab")


# --- who decided ------------------------------------------------------------------------------------------


def policy_of(domains, seed=0, **provenance):
    rng = np.random.default_rng(seed)
    num_domains = len(domains)
    layers = [(num_domains, 4, "relu"), (4, num_domains, "tanh")]
    return Policy(
        domains=domains,
        fields=(("loss", num_domains),),
        mean=np.zeros(num_domains),
        scale=np.ones(num_domains),
        clip=5.0,
        layers=tuple(
            (rng.normal(size=(out, into)).astype(np.float32), np.zeros(out, dtype=np.float32), name)
            for into, out, name in layers
        ),
        action=ActionMap(),
        bounds=Bounds(),
        interaction=InteractionConfig(),
        decision_every=2,
        horizon=6,
        provenance=provenance,
    )


def test_a_learned_policy_is_told_with_its_provenance(tiny_corpus, tmp_path):
    config = {"algo": "td3", "proxy": "/home/someone/proxy/config.json", "corpus": "/home/someone/pile", "seed": 7}
    made = {"checkpoint": "best", "config": config, "learning_tokens": 12345, "corpus_fingerprint": "f00"}
    policy = policy_of(("letters", "numbers", "verbs"), **made)
    policy.save(tmp_path / "policy")
    policy_of(policy.domains, seed=1).save(tmp_path / "other")
    transfer(tiny_corpus, tmp_path / "run", "--policy", tmp_path / "policy", "--steps", "4", "--no-gate")
    trained = read_trained(tmp_path / "run")
    assert driving_policy(trained, None) is None
    unknown = model_card(trained, WEIGHTS, "x")
    assert "A policy that was learned beforehand." in unknown
    assert policy.fingerprint in unknown
    card = model_card(trained, WEIGHTS, "x", driving_policy(trained, str(tmp_path / "policy")))
    assert "| learned on | the proxy config.json |" in card
    assert "| corpus | pile |" in card
    assert "| tokens of learning | 12,345 |" in card
    assert "/home" not in card
    with pytest.raises(ConfigError, match=r"policy=.*must be the policy that drove the run"):
        driving_policy(trained, str(tmp_path / "other"))


def test_a_benchmarks_policies_are_told_apart(tiny_corpus, tmp_path):
    policy = policy_of(("letters", "numbers", "verbs"), checkpoint="best")
    policy.save(tmp_path / "policy")
    rows = {"mixers": "uniform", "policy": str(tmp_path / "policy"), "seeds": "1", "keep_models": True}
    plan = make_plan(BenchmarkConfig(**tiny(tiny_corpus, tmp_path / "b", **rows)), tmp_path / "b")
    cards = {}
    for cell in plan.cells:
        run_cell(tmp_path / "b", cell.index)
        trained = read_trained(tmp_path / "b" / cell.folder)
        cards[cell.mixer] = model_card(trained, WEIGHTS, "x", driving_policy(trained, None))
        if cell.mixer == "policy":
            assert driving_policy(trained, str(tmp_path / "policy")).fingerprint == policy.fingerprint
        else:
            with pytest.raises(ConfigError, match="must be the policy that drove the run"):
                driving_policy(trained, str(tmp_path / "policy"))
    assert not any(str(tmp_path) in card for card in cards.values())
    assert "A policy that was learned beforehand." in cards["policy"]
    assert policy.fingerprint in cards["policy"]
    assert "A policy with random weights, which learned nothing" in cards["policy-untrained"]
    assert policy.fingerprint not in cards["policy-untrained"]
    assert "those that `policy` decided in another run." in cards["mean-of:policy"]


def test_a_baselines_run_takes_no_policy(trained, tmp_path):
    policy_of(("letters", "numbers", "verbs")).save(tmp_path / "policy")
    with pytest.raises(ConfigError, match="odm-released, which is none"):
        driving_policy(read_trained(trained), str(tmp_path / "policy"))


def test_an_agent_that_learned_in_the_run_tells_so(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    policy_of(("letters", "numbers", "verbs"), algo="td3").save(run / "policy")
    record = json.loads((run / "result.json").read_text())
    learning = {"algo": "td3", "decisions": 9, "updates": 1200, "teacher": "uniform", "start_decisions": 3}
    (run / "result.json").write_text(json.dumps(record | {"learning": learning}))
    cotrained = read_trained(run)
    card = model_card(cotrained, WEIGHTS, "x", driving_policy(cotrained, None))
    assert "An agent (td3) that learned in this very run" in card
    assert "| teacher | uniform, for the first 3 decisions |" in card
    assert load_policy(run / "policy").fingerprint in card


def test_names_instead_of_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "pile").mkdir(parents=True)
    assert bare_name("mine/pile") == "pile"
    assert bare_name("EleutherAI/pythia-70m") == "EleutherAI/pythia-70m"
    assert bare_name("~/x/config.json") == "config.json"
    assert json.loads(bare_name('{"surface": "/home/x/s.json", "noise": 0}')) == {"surface": "s.json", "noise": 0}
    assert without_paths({"corpus": "a/b", "algo": "td3", "conf_file": None}) == {
        "corpus": "b",
        "algo": "td3",
        "conf_file": None,
    }


def test_a_policys_card():
    learned = {
        "config": {"algo": "td3", "surrogate": "/home/x/law.json"},
        "learning_tokens": 5,
        "learning_seconds": 1.26,
    }
    card = policy_card(policy_of(("a", "b|c"), **learned, versions={"numpy": "2.0"}, git_commit="abc"))
    assert "| domains | `a`, `b\\|c` |" in card
    assert "| layers | 2×4 relu → 4×2 tanh |" in card
    assert "| learned on | the surrogate law.json |" in card
    assert "| seconds of learning | 1.3 |" in card
    assert "tokens of learning" not in card  # a surrogate's are imagined
    assert "numpy 2.0, commit `abc`" in card
    assert "| provenance | not recorded |" in policy_card(policy_of(("a", "b")))


def test_a_card_beside_a_policy_does_not_disturb_it(tmp_path):
    policy = policy_of(("a", "b"))
    policy.save(tmp_path / "policy")
    (tmp_path / "policy" / "README.md").write_text(policy_card(policy))
    assert load_policy(tmp_path / "policy").fingerprint == policy.fingerprint
