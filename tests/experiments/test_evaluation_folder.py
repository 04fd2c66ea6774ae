"""Where results lie: names, reuse, what stays and what goes, and folders that hold no model."""

import json

import pytest
from fake_evaluation import choice_scores, text_scores

from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.evaluation.scores import AT, Metric, TaskScores
from acodm_env.experiments.evaluation.store import Results, Stored, result_name
from acodm_env.experiments.evaluation.subjects import find_subjects
from acodm_env.experiments.evaluation.table import remarks
from acodm_env.files import read_json, write_json


def identity(task="mmlu", model="m", **changes):
    return {"task": task, "model_sha256": model, "tokenizer_sha256": "t", "limit": None, "num_fewshot": 0, **changes}


def test_what_is_saved_is_read_back(tmp_path):
    scores = choice_scores([1.0, 0.0, 0.0, 0.0])
    assert Results(tmp_path).save(scores, identity(), {"device": "cpu"}) == "mmlu"
    results = Results(tmp_path)
    found = results.load("mmlu")
    assert (found.scores, found.whole) == (scores, True)
    assert found.scores.metrics[0].verdict == AT
    record = read_json(tmp_path / "evaluation.json")
    assert record["model"] == {"sha256": "m", "tokenizer_sha256": "t"}
    assert Metric(**record["results"][0]) == scores.metrics[0]
    assert record["tasks"]["mmlu"]["device"] == "cpu"
    assert record["tasks"]["mmlu"]["num_items"] == 4
    assert "python" in record["tasks"]["mmlu"]["versions"]
    assert len((tmp_path / "evaluation" / "mmlu.jsonl").read_text().splitlines()) == 4


def test_names_tell_trials_and_shots():
    assert result_name(identity()) == "mmlu"
    assert result_name(identity(num_fewshot=5)) == "mmlu-5-shot"
    assert result_name(identity(num_fewshot=5, limit=10)) == "mmlu-5-shot-limit10"
    assert result_name(identity("a/b c")) == "a_b_c"


def test_a_trial_does_not_replace_the_whole_and_the_same_replaces_itself(tmp_path):
    results = Results(tmp_path)
    results.save(choice_scores([1.0] * 8), identity(), {})
    results.save(choice_scores([1.0] * 2), identity(limit=2), {})
    assert results.save(choice_scores([1.0] * 8), identity(context=8), {}) == "mmlu-2"  # other settings, same name
    results.save(choice_scores([0.0] * 8), identity(), {})
    again = Results(tmp_path)
    assert again.names() == ["mmlu", "mmlu-limit2", "mmlu-2"]
    assert again.load("mmlu").scores.metrics[0].value == 0
    assert [row["task"] for row in again.record["results"]] == ["mmlu-limit2", "mmlu-2", "mmlu"]
    assert again.find(identity(limit=2)) == "mmlu-limit2"
    assert again.find(identity(limit=3)) is None
    assert again.has_task("mmlu")
    assert not again.has_task("humaneval")


def test_results_of_other_weights_go(tmp_path):
    results = Results(tmp_path)
    results.save(choice_scores([1.0]), identity(), {})
    results.save(text_scores({"web": [1.0]}), identity("perplexity", "other"), {})
    assert results.names() == ["perplexity"]
    assert {row["task"] for row in results.record["results"]} == {"perplexity"}


def test_results_of_another_tokenizer_go(tmp_path):
    results = Results(tmp_path)
    results.save(choice_scores([1.0]), identity(), {})
    results.save(text_scores({"web": [1.0]}), identity("perplexity", tokenizer_sha256="other"), {})
    assert results.names() == ["perplexity"]
    assert results.record["model"]["tokenizer_sha256"] == "other"


def test_names_tell_what_is_not_usual(tmp_path):
    usual = {"context": 32, "stride": 16, "precision": "fp32", "corpus_fingerprint": "f" * 64}
    same = identity("perplexity", **usual)
    assert result_name(same, usual) == "perplexity"
    assert result_name(identity("perplexity", **usual | {"context": 16, "stride": 8}), usual) == (
        "perplexity-context16-stride8"
    )
    other = same | {"corpus_fingerprint": "71d0dadf" * 8, "precision": "bf16", "limit": 3}
    assert result_name(other, usual) == "perplexity-corpus-71d0dadf-bf16-limit3"
    results = Results(tmp_path)
    assert results.save(text_scores({"web": [1.0]}), other, {}) == "perplexity-limit3"  # by an older version
    assert results.save(text_scores({"web": [2.0]}), other, {}, usual) == "perplexity-limit3"  # once, not twice


def test_remarks_count_in_words():
    facts = {"num_truncated": 1, "num_items": 1, "prompt_tokens": 1}
    for name, changes, parts in (
        ("pass@1", facts, ("1 of 1 prompt is longer than the 1 token that the context leaves beside a completion",)),
        ("acc", facts | {"prompt_tokens": 32}, ("longer than the context of 32 tokens and lost its beginning",)),
        ("acc", facts | {"num_truncated": 1200, "num_items": 14042}, ("1,200 of 14,042 prompts are longer than",)),
    ):
        scores = choice_scores([1.0], "humaneval", name, **changes)
        stored = Stored(name="h", identity=identity("humaneval", context=32), scores=scores, whole=True)
        text = "\n".join(remarks(stored))
        for part in parts:
            assert part in text
    text = "\n".join(
        remarks(
            Stored(
                name="p",
                identity=identity("perplexity", context=1, stride=1),
                scores=text_scores({"web": [1.0]}),
                whole=True,
            )
        )
    )
    assert "windows of 1 token that" in text
    assert "the corpus is unknown, 1 domain (web)." in text


def test_edited_items_are_not_used(tmp_path):
    Results(tmp_path).save(choice_scores([1.0, 0.0]), identity(), {})
    (tmp_path / "evaluation" / "mmlu.jsonl").write_text("{}\n")
    results = Results(tmp_path)
    assert results.find(identity()) is None
    assert not results.load("mmlu").whole
    assert results.load("mmlu").scores.items == []


def test_what_is_not_finite_is_null(tmp_path):
    metric = Metric(task="x", name="loss", value=float("nan"), high=float("inf"))
    scores = TaskScores(task="x", metrics=[metric], items=[{"id": "a", "group": "", "loss": float("nan")}])
    Results(tmp_path).save(scores, identity("x"), {})
    found = Results(tmp_path).load("x").scores
    assert (found.metrics[0].value, found.metrics[0].high, found.items[0]["loss"]) == (None, None, None)


@pytest.mark.parametrize("text", ['{"format": 1', '{"format": 0}', "[]", '{"format": 1, "results": [{}], "tasks": {}}'])
def test_a_file_that_is_not_whole_is_named(text, tmp_path):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(DataError, match=r"evaluation\.json"):
        Results(tmp_path)


# --- what is evaluated -------------------------------------------------------------------------------------


def fake_run(path, model=True, **config):
    settings = {"mixer": "uniform", "target": "tiny", "name": "uniform", **config}
    settings = {name: value for name, value in settings.items() if value is not None}
    write_json(path / "config.json", {"config": settings, "versions": {}})
    if model:
        write_json(path / "model" / "config.json", {"model_type": "gpt_neox"})
    return path


def test_runs_and_model_folders_and_their_names(tmp_path):
    runs = [fake_run(tmp_path / name, name=mixer) for name, mixer in (("a", "uniform"), ("b", "odm"), ("c", "uniform"))]
    write_json(tmp_path / "plain" / "config.json", {"model_type": "gpt_neox"})
    found = find_subjects([str(path) for path in (*runs, tmp_path / "plain")])
    assert [subject.name for subject in found] == ["uniform (a)", "odm", "uniform (c)", "plain"]
    assert [subject.model for subject in found] == [*(run / "model" for run in runs), tmp_path / "plain"]
    assert (found[0].config["mixer"], found[3].config) == ("uniform", {})


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda path: None, "there is no such folder"),
        (lambda path: path.mkdir(), "it has no config.json: it is empty"),
        (lambda path: write_json(path / "policy.json", {}), "it is a policy; train a model under it"),
        (lambda path: write_json(path / "plan.json", {}), "it is a whole benchmark: name its runs"),
        (lambda path: write_json(path / "corpus.json", {}), "it is a corpus: name the models, and give it by --corpus"),
        (lambda path: path.write_text(""), "it is a file"),
        (
            lambda path: fake_run(path / "odm"),
            "it is a folder of runs or models: name one in it.*run/odm",
        ),
        (lambda path: None, "a run of acodm transfer or cotrain"),
        (lambda path: write_json(path / "model" / "config.json", {}), "give .*run/model"),
        (lambda path: fake_run(path, model=False), "the run has not ended; give its command again"),
        (lambda path: fake_run(path, model=False, target=None, objective=[1]), "a benchmark's runs keep none"),
        (lambda path: write_json(path / "config.json", {"config": {"algo": "td3"}, "versions": {}}), "another command"),
    ],
)
def test_a_folder_without_a_model_says_why(made, message, tmp_path):
    made(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        find_subjects([str(tmp_path / "run")])


@pytest.mark.parametrize(("diverged", "message"), [(True, "on-nonfinite skip"), (False, "writes it from the last")])
def test_an_ended_run_without_a_model_says_why(diverged, message, tmp_path):
    write_json(fake_run(tmp_path / "run", model=False) / "result.json", {"diverged": diverged})
    with pytest.raises(ConfigError, match=message):
        find_subjects([str(tmp_path / "run")])


def test_a_folder_twice_or_none_is_refused(tmp_path):
    run = fake_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="must not be named twice"):
        find_subjects([str(run), str(run / ".." / "run")])
    with pytest.raises(ConfigError, match="must name a run"):
        find_subjects([])


def test_the_file_is_json_for_others(tmp_path):
    Results(tmp_path).save(text_scores({"web": [1.0, 2.0]}), identity("perplexity"), {})
    record = json.loads((tmp_path / "evaluation.json").read_text())
    row = record["results"][0]
    assert {"task", "name", "value", "stderr", "num_items", "chance", "verdict"} <= row.keys()
