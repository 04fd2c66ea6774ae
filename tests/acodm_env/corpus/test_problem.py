"""What settings mean: domains to train on, targets and their weights, cuts; and everything that cannot be."""

from dataclasses import replace

import pytest

from acodm_env.corpus.problem import Problem, choose_problem, parse_cut
from acodm_env.errors import ConfigError, DataError

LENGTH = 32


def choose(store, **settings):
    return choose_problem(store, sequence_length=LENGTH, **settings)


def test_by_default_all_domains_count_alike(tiny_store):
    problem = choose(tiny_store)
    assert problem.store is tiny_store
    assert (problem.targets, problem.identity()) == ({}, {})
    assert problem.describe() == "mean loss over all domains"
    assert problem.lm_settings == {"objective": None, "metric": "loss", "heldout_store": tiny_store}
    assert problem.weights == dict.fromkeys(("letters", "numbers", "verbs"), 1 / 3)
    some = choose(tiny_store, domains="verbs,letters")
    assert some.lm_settings["heldout_store"].domains == some.judged.domains == ("verbs", "letters")


def test_one_objective_has_one_identity_however_it_is_written(tiny_store):
    first = choose(tiny_store, targets="verbs=2, letters=6,numbers=0")
    assert dict(first.targets) == {"letters": 0.75, "numbers": 0.0, "verbs": 0.25}
    second = choose(tiny_store, targets={"letters": 3, "verbs": 1, "numbers": 0})
    assert first.identity() == second.identity()
    assert first.identity()["metric"] == "loss"
    assert first.describe() == "mean loss of letters ×3, verbs"
    perplexity = choose(tiny_store, objective="perplexity")
    assert perplexity.identity()["objective"] == [1 / 3] * 3
    assert perplexity.describe() == "log mean perplexity over all domains"


def test_a_target_that_is_not_trained_on_is_looked_up_in_the_whole_corpus(tiny_store):
    problem = choose(tiny_store, domains="letters,numbers", targets="verbs")
    assert problem.store.domains == ("letters", "numbers")
    assert problem.judged.domains == ("verbs",)
    counts = problem.num_heldout(LENGTH, 1000)["verbs"]
    assert counts["validation"] == tiny_store.num_sequences("validation", LENGTH)[2]
    assert problem.num_heldout(LENGTH, 3) == {"verbs": {"validation": 3, "test": 3}}


def test_a_cut_is_of_what_is_trained_on_alone(tiny_store):
    problem = choose(tiny_store, cut="letters=5")
    assert problem.store.num_sequences("train", LENGTH)[0] == 5
    assert problem.heldout.num_sequences("train", LENGTH)[0] > 5
    assert problem.store.fingerprint != tiny_store.fingerprint
    with pytest.raises(ConfigError, match="domain='verbs': must be one of letters, numbers"):
        choose(tiny_store, domains="letters,numbers", cut="verbs=5")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"targets": "leters"}, ConfigError, "did you mean 'letters'?"),
        ({"targets": "letters=0,verbs=0"}, ConfigError, "must hold a positive weight; all are 0"),
        ({"targets": "letters=-1"}, ConfigError, "targets.letters=-1: must be a finite weight of at least 0"),
        ({"targets": "letters,letters"}, ConfigError, "each target once"),
        ({"targets": ","}, ConfigError, "must name a target"),
        ({"objective": "perplexty"}, ConfigError, "did you mean 'perplexity'?"),
        ({"objective": "letters=1"}, ConfigError, "targets and weights go to --targets"),
        ({"domains": "letters,verb"}, ConfigError, "did you mean 'verbs'?"),
        ({"cut": "letters=0"}, ConfigError, "must be domain=sequences"),
        ({"cut": "letters=100000"}, ConfigError, "must be at most"),
        ({"cut": "letters"}, ConfigError, "must be domain=sequences"),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(tiny_store, settings, error, message):
    with pytest.raises(error, match=message):
        choose(tiny_store, **settings)


def without(store, domain, *splits):
    """The store as if a domain held nothing in some splits."""
    entries = []
    for entry in store.record["domains"]:
        parts = dict(entry["splits"])
        if entry["name"] == domain:
            parts |= {split: parts[split] | {"tokens": 0, "shards": [], "documents": 0} for split in splits}
        entries.append({**entry, "splits": parts})
    return type(store)(store.path, {**store.record, "domains": entries})


def test_a_target_without_held_out_text_is_refused(tiny_store):
    for split in ("validation", "test"):
        bare = without(tiny_store, "verbs", split)
        message = f"targets.verbs: must have held-out text; its {split} split holds less than one sequence of 32 tokens"
        with pytest.raises(DataError, match=message):
            choose(bare, targets="verbs")
        assert choose(bare, domains="letters,numbers").judged.domains == ("letters", "numbers")


def test_texts_that_nothing_is_trained_on(tiny_store):
    store = without(tiny_store, "verbs", "train")
    problem = choose(store)
    assert problem.store.domains == ("letters", "numbers")
    assert problem.unjudged == ("verbs",)
    assert choose(store, targets="verbs,letters").unjudged == ()


def test_a_target_trained_nowhere_and_nothing_else_to_train_on(tiny_store):
    store = without(tiny_store, "verbs", "train").subset(["verbs"])
    with pytest.raises(DataError, match="must hold a domain to train on; verbs hold held-out text only"):
        choose(store, targets="verbs")


def test_one_domain_leaves_nothing_to_choose(tiny_store):
    with pytest.raises(ConfigError, match="domains=verbs: must be two or more; with one there is no mixture to choose"):
        choose(tiny_store, domains="verbs").require_choice()
    choose(tiny_store).require_choice()


def test_parse_cut():
    assert parse_cut("prose=160, licences=40,") == {"prose": 160, "licences": 40}
    assert parse_cut("") == {}
    with pytest.raises(ConfigError, match="each domain once"):
        parse_cut("prose=1,prose=2")


def test_the_problem_is_a_value(tiny_store):
    problem = choose(tiny_store, targets="verbs")
    assert replace(problem, metric="perplexity").describe() == "log perplexity of verbs"
    assert isinstance(problem, Problem)
