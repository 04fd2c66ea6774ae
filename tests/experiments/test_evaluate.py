"""The command: what it measures, what it does not do again, what it refuses first, and what it says."""

import io
import json
import shutil
from pathlib import Path

import pytest
from fake_evaluation import Measuring
from tqdm import tqdm

from acodm_env.experiments import cli
from acodm_env.files import read_json, write_json

TRANSFER = ["--target", "tiny", "--steps", "4", "--batch_size", "6", "--sequence_length", "32", "--evaluations", "2"]
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "eval"


def acodm(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture
def measuring(monkeypatch):
    """Loading, perplexity and harness replaced by what counts its calls."""
    fake = Measuring()
    own = ("check_tasks", "run_tasks", "harness_version", "data_checksums")
    modules = {"loading": ("load_model",), "perplexity": ("score_perplexity",), "harness.run": own}
    for module, names in modules.items():
        for name in names:
            monkeypatch.setattr(f"acodm_env.experiments.evaluation.{module}.{name}", getattr(fake, name))
    return fake


@pytest.fixture
def runs(tiny_store, tmp_path):
    """Folders of three runs, a, bb and ccc, with weights that differ."""
    for name in ("a", "bb", "ccc"):
        config = {"mixer": f"mixer-{name}", "target": "tiny", "corpus": str(tiny_store.path)}
        config |= {"domains": list(tiny_store.domains), "corpus_fingerprint": tiny_store.fingerprint}
        write_json(tmp_path / name / "config.json", {"config": config, "versions": {}})
        write_json(tmp_path / name / "model" / "config.json", {"model_type": "gpt_neox"})
        (tmp_path / name / "model" / "model.safetensors").write_text(name)
        shutil.copy(tiny_store.path / "tokenizer.json", tmp_path / name / "model")
    return tmp_path


def results(folder):
    return read_json(folder / "evaluation.json")


# --- measuring, once ---------------------------------------------------------------------------------------


def test_all_tasks_of_a_run_are_measured_saved_and_printed(measuring, runs, capsys):
    assert acodm("evaluate", runs / "a", "--tasks", "perplexity,mmlu", "--quiet") == 0
    out = capsys.readouterr().out
    for part in ("unweighted mean", "letters", "bits/byte", "mmlu", "0.2500", "≈ chance", "beating it shows nothing"):
        assert part in out
    assert "windows of 32 tokens that move on by 16" in out
    record = results(runs / "a")
    assert list(record["tasks"]) == ["perplexity", "mmlu"]
    identity = record["tasks"]["perplexity"]["identity"]
    assert (identity["stride"], identity["context"], identity["precision"], identity["split"]) == (
        16,
        32,
        "fp32",
        "test",
    )
    assert record["tasks"]["mmlu"]["identity"]["num_fewshot"] == 0
    assert record["tasks"]["mmlu"]["harness_version"] == "0.4.13"
    assert measuring.calls == ["check mmlu", "load a", "perplexity a", "mmlu a"]


def test_what_is_there_is_not_measured_again_unless_asked(measuring, runs, capsys):
    once = ["evaluate", runs / "a", "--tasks", "perplexity,mmlu"]
    assert acodm(*once) == 0
    before = capsys.readouterr()
    measuring.calls.clear()
    assert acodm(*once) == 0
    after = capsys.readouterr()
    assert measuring.calls == ["load a"]  # the model may have changed
    assert after.out == before.out
    assert "as measured before; --fresh measures again" in after.err
    assert acodm(*once, "--num-fewshot", "5", "--batch-size", "4") == 0
    assert measuring.calls[1:] == ["load a", "check mmlu", "mmlu a"]
    assert list(results(runs / "a")["tasks"]) == ["perplexity", "mmlu", "mmlu-5-shot"]
    measuring.calls.clear()
    assert acodm(*once, "--fresh") == 0
    assert measuring.calls == ["check mmlu", "load a", "perplexity a", "mmlu a"]
    (runs / "a" / "model" / "model.safetensors").write_text("trained on")
    measuring.calls.clear()
    assert acodm("evaluate", runs / "a") == 0
    assert measuring.calls == ["load a", "perplexity a"]
    assert list(results(runs / "a")["tasks"]) == ["perplexity"]  # the others were of other weights


def test_an_interruption_keeps_the_tasks_before_it(measuring, runs, capsys):
    measuring.fail_on = "humaneval"
    asked = ["evaluate", runs / "a", "--tasks", "mmlu,humaneval", "--allow-code-execution"]
    assert acodm(*asked) == 1
    assert f"To go on: acodm evaluate {runs / 'a'}" in capsys.readouterr().err
    assert list(results(runs / "a")["tasks"]) == ["mmlu"]
    measuring.fail_on = ""
    measuring.calls.clear()
    assert acodm(*asked) == 0
    assert measuring.calls == ["check humaneval", "load a", "humaneval a"]


def test_checksums_of_local_data_are_part_of_the_identity(measuring, runs):
    data = runs / "data"
    data.mkdir()
    (data / "mmlu_test.jsonl.gz").write_text("one")
    asked = ["evaluate", runs / "a", "--tasks", "mmlu", "--data", data, "--quiet"]
    assert acodm(*asked) == acodm(*asked) == 0
    (data / "mmlu_test.jsonl.gz").write_text("other")
    assert acodm(*asked) == 0
    assert measuring.calls.count("mmlu a") == 2


def test_out_takes_the_results_of_one_model(measuring, runs, tiny_corpus):
    model = runs / "a" / "model"
    assert acodm("evaluate", model, "--corpus", tiny_corpus, "--domains", "verbs", "--out", runs / "o", "--quiet") == 0
    assert not (model / "evaluation.json").exists()
    assert {row["group"] for row in results(runs / "o")["results"]} == {"", "verbs"}


def test_a_trial_is_named_one(measuring, runs, capsys):
    assert acodm("evaluate", runs / "a", "--limit", "3", "--quiet") == 0
    assert "perplexity-limit3: a trial on the first 3 documents of each domain" in capsys.readouterr().out
    assert acodm("evaluate", runs / "a", "--limit", "1", "--tasks", "mmlu,perplexity", "--quiet") == 0
    out = capsys.readouterr().out
    assert "mmlu-limit1: a trial on the first item of each part" in out
    assert "perplexity-limit1: a trial on the first document of each domain" in out


def test_what_is_not_usual_is_in_the_name(measuring, runs, tiny_store, tiny_corpus):
    asked = [
        [],
        ["--context", "32", "--stride", "16"],  # as usual
        ["--context", "16"],
        ["--context", "16", "--stride", "16"],
        ["--precision", "bf16"],
        ["--domains", "verbs"],
        ["--corpus", tiny_corpus],  # its own
    ]
    for flags in asked:
        assert acodm("evaluate", runs / "a", "--quiet", *flags) == 0
    part = tiny_store.subset(["verbs"]).fingerprint[:8]
    names = ["context16", "context16-stride16", "bf16", f"corpus-{part}"]
    assert list(results(runs / "a")["tasks"]) == ["perplexity", *(f"perplexity-{name}" for name in names)]
    assert acodm("evaluate", runs / "a" / "model", "--corpus", tiny_corpus, "--quiet") == 0
    named = f"perplexity-corpus-{tiny_store.fingerprint[:8]}"  # a model's folder has no corpus of its own
    assert list(results(runs / "a" / "model")["tasks"]) == [named]


def test_corpus_and_domains_are_told(measuring, runs, tiny_store, capsys):
    assert acodm("evaluate", runs / "a", "--quiet") == 0
    domains = tiny_store.domains
    told = f"the corpus is {tiny_store.fingerprint[:12]}, {len(domains)} domains ({', '.join(domains)})."
    assert told in capsys.readouterr().out
    assert acodm("evaluate", runs / "a", "--quiet", "--domains", "verbs") == 0
    assert ", 1 domain (verbs)." in capsys.readouterr().out


def test_shots_are_for_tasks_that_have_them(measuring, runs, capsys):
    asked = ["evaluate", runs / "a", "--tasks", "mmlu,humaneval", "--allow-code-execution", "--num-fewshot", "5"]
    assert acodm(*asked) == 0
    assert "humaneval: without solved examples, as published" in capsys.readouterr().err
    assert list(results(runs / "a")["tasks"]) == ["mmlu-5-shot", "humaneval"]


def test_a_bar_ends_with_its_task(measuring, monkeypatch):
    from acodm_env.experiments.evaluation import job as evaluation_job
    from acodm_env.experiments.evaluation.config import EvaluateConfig

    made = []

    class Bar(tqdm):
        def close(self):
            self.closed = True
            super().close()

    def progress(total, label, *, quiet, unit):
        made.append(Bar(total=total, desc=label, unit=unit, file=io.StringIO()))
        return made[-1]

    monkeypatch.setattr(evaluation_job, "progress", progress)
    with evaluation_job._bars(EvaluateConfig(runs=["a"]), "a") as advance:
        advance("mmlu", 1, 2)
        assert not hasattr(made[0], "closed")
        advance("mmlu", 2, 2)
        advance("arc", 1, 2)
        assert [hasattr(bar, "closed") for bar in made] == [True, False]
        assert made[0].n == 2


# --- comparing ---------------------------------------------------------------------------------------------


def test_compare_says_better_worse_and_not_a_comparison(measuring, runs, capsys):
    asked = ["evaluate", runs / "a", runs / "bb", runs / "ccc", "--tasks", "perplexity,mmlu", "--compare"]
    assert acodm(*asked, "--out", runs / "c", "--quiet") == 0
    out = capsys.readouterr().out
    assert "differences to mixer-a, on equal items" in out
    found = read_json(runs / "c" / "comparison.json")["differences"]
    verdicts = {(one["run"], one["metric"], one["group"]): one["verdict"] for one in found}
    assert verdicts["mixer-bb", "loss", ""] == "worse"
    assert verdicts["mixer-ccc", "acc", ""] == "both at chance: not a comparison"
    assert not (runs / "c" / "evaluation.json").exists()
    assert acodm(*asked, "--reference", "mixer-bb", "--quiet") == 0
    assert "differences to mixer-bb" in capsys.readouterr().out


def test_compare_refuses_unequal_corpora(measuring, runs, tiny_store, capsys):
    config = read_json(runs / "bb" / "config.json")
    part = tiny_store.subset(["verbs"])
    config["config"] |= {"domains": ["verbs"], "corpus_fingerprint": part.fingerprint}
    write_json(runs / "bb" / "config.json", config)
    assert acodm("evaluate", runs / "a", runs / "bb", "--compare", "--quiet") == 2
    error = capsys.readouterr().err
    assert "with corpus_fingerprint=" in error
    assert "evaluate both with the same --corpus" in error
    assert measuring.calls == ["load a", "load bb"]  # nothing was measured in vain


# --- refused before a forward pass -------------------------------------------------------------------------

REFUSED = [
    ([], "must name a run or a model's folder"),
    (["nowhere"], "there is no such folder"),
    (["a", "--tasks", "mmul"], "did you mean 'mmlu'"),
    (["a", "--tasks", ","], "must name at least one"),
    (["a", "--context", "64"], "context=64: must be at most 32"),
    (["a", "--stride", "33"], "stride=33: must be between 1 and context=32 tokens"),
    (["a", "--stride", "0"], "stride=0: must be at least 1"),
    (["a", "--limit", "0"], "limit=0: must be at least 1"),
    (["a", "--num-fewshot", "-1"], "num_fewshot=-1: must be 0 or more"),
    (["a", "--batch-size", "many"], "batch_size=many: must be auto"),
    (["a", "--tasks", "humaneval", "--num-fewshot", "3"], "num_fewshot=3: must be 0 for humaneval"),
    (["a", "--num-fewshot", "3"], "num_fewshot=3: must be 0 for perplexity"),
    (["--runs", "a,bb"], "runs=a,bb: must be one folder each; commas do not separate them; acodm evaluate a bb"),
    (["a", "--batch-size", "0"], "batch_size=0: must be auto"),
    (["a", "--compare"], "must have at least two models; there is 1"),
    (["a", "bb", "--out", "x"], "must be for one model, or for a comparison"),
    (["a", "--reference", "x"], "must go with --compare"),
    (["a", "bb", "--compare", "--reference", "mixer-b"], "did you mean 'mixer-bb'"),
    (["a/model"], "corpus=None: must be given for the perplexity"),
    (["a", "--corpus", "nowhere"], "no corpus.json"),
    (["a", "--domains", "verb"], "did you mean 'verbs'"),
    (["a", "bb", "--tasks", "perplexity", "--limt", "3"], "did you mean --limit"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_bad_input_is_refused_before_anything_is_measured(arguments, message, measuring, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert acodm("evaluate", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not [call for call in measuring.calls if not call.startswith(("load", "check"))]
    assert not (runs / "a" / "evaluation.json").exists()


def test_a_run_without_its_corpus_or_with_another_is_told(measuring, runs, capsys):
    config = read_json(runs / "a" / "config.json")
    write_json(runs / "a" / "config.json", config | {"config": config["config"] | {"corpus_fingerprint": "0" * 64}})
    assert acodm("evaluate", runs / "a") == 2
    assert "must be what run" in capsys.readouterr().err
    write_json(runs / "a" / "config.json", config | {"config": config["config"] | {"corpus": str(runs / "gone")}})
    assert acodm("evaluate", runs / "a") == 2
    assert "name where it is now by --corpus" in capsys.readouterr().err


def test_a_run_with_another_tokenizer_is_refused_on_its_own_corpus_alone(
    measuring, runs, tiny_store, tiny_corpus, tmp_path, capsys
):
    file = runs / "a" / "model" / "tokenizer.json"
    content = read_json(file)
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[5:7]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    write_json(file, content)
    for flags in ([], ["--corpus", tiny_corpus], ["--domains", "verbs"]):
        assert acodm("evaluate", runs / "a", "--quiet", *flags) == 2
        error = capsys.readouterr().err
        assert "tokenizer.json: must be the tokenizer of the corpus that run" in error
    assert not [call for call in measuring.calls if not call.startswith("load")]
    measuring.reencoded = True
    assert acodm("evaluate", runs / "a", "--quiet", "--corpus", tiny_corpus, "--domains", "verbs") == 0
    assert "its texts were encoded again with the model's tokenizer" in capsys.readouterr().out
    assert acodm("evaluate", runs / "a" / "model", "--quiet", "--corpus", tiny_corpus) == 0
    assert acodm("evaluate", runs / "a", "--tasks", "mmlu", "--quiet") == 0


def test_one_evaluation_at_a_time_in_a_folder(measuring, runs, capsys):
    from acodm_env.lock import claimed

    with claimed(runs / "a", at=runs / "a" / "evaluation"):
        assert acodm("evaluate", runs / "a", "--quiet") == 2
    assert "must not be in use" in capsys.readouterr().err


def test_help_has_units_and_extras(capsys):
    assert acodm("evaluate", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "acodm evaluate RUN|MODEL-FOLDER [… --compare]" in text
    for part in ("Tokens that the model sees at most", "acodm[eval]", "mmlu_test.jsonl.gz", "Rows per forward pass"):
        assert part in text


def test_switches_and_folders_in_any_order():
    from acodm_env.experiments.evaluation.config import EvaluateConfig

    flags = cli._flags(EvaluateConfig, ["--tasks", "humaneval", "--allow-code-execution", "a", "--compare", "b"])
    assert flags[0] == '--runs=["a", "b"]'
    assert {"--allow_code_execution=true", "--compare=true"} <= {*flags}


# --- with a real model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    for mixer in ("uniform", "proportional"):
        code = acodm("transfer", "--mixer", mixer, "--corpus", tiny_corpus, *TRANSFER, "--quiet", "--out", out / mixer)
        assert code == 0
    return out


def test_perplexity_of_real_runs_and_their_difference(trained, capsys):
    asked = ["evaluate", trained / "uniform", trained / "proportional", "--compare", "--quiet"]
    assert acodm(*asked) == 0
    assert "differences to uniform" in capsys.readouterr().out
    one, other = (results(trained / name)["results"] for name in ("uniform", "proportional"))
    assert one[0]["group"] == ""
    assert one[0]["value"] != other[0]["value"]
    logged = json.loads((trained / "uniform" / "eval.jsonl").read_text().splitlines()[-1])["losses"]
    assert one[0]["value"] == pytest.approx(sum(logged) / len(logged), rel=0.05)  # other windows, the same text


def test_a_model_that_was_cut_short_is_refused(trained, tmp_path, capsys):
    shutil.copytree(trained / "uniform", tmp_path / "cut")
    file = tmp_path / "cut" / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert acodm("evaluate", tmp_path / "cut", "--quiet") == 2
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # of lm-eval, datasets and what they import
@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: MMLU's files")
def test_mmlu_of_a_real_run_from_local_files(trained, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    asked = ["evaluate", trained / "uniform", "--tasks", "mmlu_anatomy", "--limit", "4", "--data", DATA, "--quiet"]
    assert acodm(*asked) == 0
    assert "mmlu_anatomy-limit4" in capsys.readouterr().out
    entry = results(trained / "uniform")["tasks"]["mmlu_anatomy-limit4"]
    assert entry["num_items"] == 4
    assert {"mmlu_dev.jsonl.gz", "mmlu_test.jsonl.gz"} == entry["identity"]["data"].keys()
