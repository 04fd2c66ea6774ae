"""The suite's problems: those of the file, those made for any corpus, and what is refused."""

from types import SimpleNamespace

import pytest

from acodm_env.errors import ConfigError
from acodm_env.experiments.benchmark.suite.rows import learned, pair, rules, tilted
from acodm_env.experiments.benchmark.suite.tasks import Task, listed, made_for, slug, suite_file, tasks_of
from acodm_env.objective import check_metric


def test_the_file_describes_its_tasks():
    file = suite_file("mixing")
    for entry in file["corpora"]:
        tasks = listed(file, "corpus", SimpleNamespace(domains=tuple(reversed(entry["domains"]))))
        assert [task.name for task in tasks] == [*entry["tasks"]]
        for task in tasks:
            check_metric(task.objective)
            assert {*task.cut} <= {*task.targets}
    assert listed(file, "corpus", SimpleNamespace(domains=("a", "b"))) == []
    pocket = listed(file, "pocket", SimpleNamespace(domains=tuple(file["corpora"][0]["domains"])))
    assert len(pocket) >= 10
    assert [task.name for task in pocket if task.horizon == 4] == ["pocket-prose-long"]
    assert [task.name for task in pocket if not task.is_targeted] == ["pocket-mean-loss", "pocket-mean-perplexity"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"targets": {"aa": 1}}, "did you mean 'a'"),
        ({"grid": ["twise"]}, "did you mean 'twice'"),
        ({"cuts": {"a": 3}}, "did you mean 'cut'"),
    ],
)
def test_a_faulty_file_is_refused(task, message):
    file = {"corpora": [{"domains": ["a", "b"], "tasks": {"one": task}}]}
    with pytest.raises(ConfigError, match=message):
        listed(file, "corpus", SimpleNamespace(domains=("a", "b")))


def test_any_corpus_has_tasks(tiny_corpus, tiny_store, capsys):
    held = dict(zip(tiny_store.domains, tiny_store.num_sequences("train", 32), strict=True))
    largest = max(held, key=held.get)
    assert 160 < held[largest] < 640
    tasks = tasks_of("mixing", str(tiny_corpus), None, 32)
    assert [(task.name, dict(task.cut)) for task in tasks] == [
        (f"store-{largest}", {}),
        (f"store-{largest}-160", {largest: 160}),
        (f"store-{largest}-40", {largest: 40}),
        ("store-mean-loss", {}),
        ("store-mean-perplexity", {}),
    ]
    assert f"{largest} has {held[largest]} sequences, so there is no task with 640 of them" in capsys.readouterr().err
    chosen = tasks_of("mixing", str(tiny_corpus), "store-mean-loss", 32)
    assert [task.name for task in chosen] == ["store-mean-loss"]


def test_what_is_no_suite_task_or_corpus_is_refused(tiny_corpus, tiny_store, monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'mixing'"):
        suite_file("mixin")
    with pytest.raises(ConfigError, match="did you mean 'store-mean-loss'"):
        tasks_of("mixing", str(tiny_corpus), "store-mean-los", 32)
    monkeypatch.setattr("acodm_env.corpus.open_corpus", lambda corpus, quiet: tiny_store.subset(["verbs"]))
    with pytest.raises(ConfigError, match="at least two domains to mix; it holds 1"):
        tasks_of("mixing", "one", None, 32)


def test_names_of_tasks_are_fit_for_folders(tiny_store):
    tasks = made_for("corpora/My Texts", tiny_store, 512)
    assert [task.name for task in tasks if task.cut] == []
    assert tasks[0].name.startswith("my-texts-")
    assert slug("Gutenberg (PG-19)") == "gutenberg-pg-19"


def test_static_mixtures_of_the_grid():
    assert tilted(("a", "b", "c"), {"b": 0.5}) == {"a": 0.25, "b": 0.5, "c": 0.25}
    entry = pair(("a", "b", "c", "d"), {"half-a": 4.0, "half-b": 3.0, "half-c": 3.5, "half-d": 5.0})
    assert entry.name == "pair-b-c"
    assert entry.options["weights"] == pytest.approx({"a": 0.2, "b": 0.3, "c": 0.3, "d": 0.2})
    assert [entry.name for entry in rules()][:4] == ["uniform", "proportional", "odm-released", "odm-released-rescaled"]
    assert [entry.options["share"] for entry in rules() if entry.mixer == "target-share"] == [0.3, 0.5, 0.7, 1.0]


@pytest.mark.parametrize("policy", ["share-0.5=somewhere", "a/b=somewhere", "mine-untrained=somewhere", "nowhere"])
def test_a_policy_needs_a_name_of_its_own_and_a_folder(policy):
    with pytest.raises(ConfigError, match="policy="):
        learned(policy)


def test_a_task_without_targets_is_not_targeted():
    assert not Task(name="t", corpus="c", objective="perplexity").is_targeted
