"""Perplexity: windows and numbers by hand, every token once, equal to the slow way, whatever the batch."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from evaluated import ByContext, ByPosition, Given, loaded, save_folder

from acodm_env.corpus.preparation.prepare import Preparation, prepare
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.tokenizer import load_tokenizer
from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.evaluation.bootstrap import Resampled
from acodm_env.experiments.evaluation.loading import load_model
from acodm_env.experiments.evaluation.perplexity import METRICS, check_perplexity, score_perplexity

A, B, C, D, E = 70, 71, 72, 73, 74  # ids of single letters or so; any would do


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_store):
    return save_folder(tmp_path_factory.mktemp("model") / "tiny", tiny_store)


def metric(scores, name, group=""):
    [found] = [metric for metric in scores.metrics if (metric.name, metric.group) == (name, group)]
    return found


def slowly(model, tokens, end, context, stride):
    """Nats of every token (N,), each by a forward pass of its own over the inputs that its window shows it."""
    inputs, nats = [end, *tokens], []
    for index, token in enumerate(tokens):
        window = 0 if index < context else (index - context) // stride + 1
        seen = torch.tensor([inputs[window * stride : index + 1]])
        assert seen.shape[1] <= context
        with torch.no_grad():
            nats.append(-model(input_ids=seen).logits[0, -1].double().log_softmax(-1)[token].item())
    return np.array(nats)


def test_windows_and_numbers_by_hand(tiny_store):
    """Seven tokens in two documents, windows of four inputs every two targets."""
    end, size = tiny_store.end_of_document, tiny_store.vocab_size
    model = ByPosition(size, end)
    store = Given(tiny_store, {"web": [A, B, C, end, D, E, end]})
    scores = score_perplexity(loaded(model, store, context=4), store)
    assert model.seen == [[[end, A, B, C]], [[B, C, end, D], [end, D, E, end]]]  # the last input is padding
    # At place t of a window the end token has probability t / (t + V - 1), any other one 1 / (t + V - 1).
    first = math.log(size) + math.log(size + 1) + math.log(size + 2) + math.log((size + 3) / 4)
    second = math.log(size + 2) + math.log(size + 3) + math.log((size + 2) / 3)
    assert [item["nats"] for item in scores.items] == pytest.approx([first, second], rel=1e-6)
    assert [item["tokens"] for item in scores.items] == [4, 3]
    assert [item["id"] for item in scores.items] == ["web/0", "web/1"]
    assert {item["group"] for item in scores.items} == {"web"}
    assert metric(scores, "loss", "web").value == pytest.approx((first + second) / 7, rel=1e-6)
    assert metric(scores, "perplexity", "web").value == pytest.approx(math.exp((first + second) / 7), rel=1e-6)
    num_bytes = sum(item["bytes"] for item in scores.items)
    assert metric(scores, "bits_per_byte", "web").value == pytest.approx((first + second) / math.log(2) / num_bytes)
    assert (scores.facts["context"], scores.facts["stride"], scores.facts["num_tokens"]) == (4, 2, 7)


def test_bits_per_byte_by_hand(tiny_store):
    """All ids equally likely: log2 V bits for each of five bytes (é has two) and for the end, over five bytes."""
    ids = load_tokenizer(str(tiny_store.path)).encode("qéZ#").ids
    assert len(ids) == 5  # a token per byte: none of these were merged
    store = Given(tiny_store, {"web": [*ids, tiny_store.end_of_document]})
    model = ByPosition(tiny_store.vocab_size, end=tiny_store.end_of_document)
    scores = score_perplexity(loaded(model, store, context=1), store)  # at the first place nothing is preferred
    assert scores.items[0]["bytes"] == 5
    assert metric(scores, "bits_per_byte", "web").value == pytest.approx(6 * math.log2(tiny_store.vocab_size) / 5)
    assert metric(scores, "loss", "web").value == pytest.approx(math.log(tiny_store.vocab_size))


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(
    ("context", "stride"), [(8, 8), (8, 4), (8, 1), (7, 3), (5, 5), (1, 1), (13, 12), (64, 32), (200, 100)]
)
def test_every_token_once_and_equal_to_the_slow_way(tiny_store, context, stride, keeps):
    """Documents shorter and longer than a window; streams shorter than one, and of whole ones exactly."""
    end, rng = tiny_store.end_of_document, np.random.default_rng(0)
    streams = {
        name: [token for size in sizes for token in [*rng.integers(1, tiny_store.vocab_size, size).tolist(), end]]
        for name, sizes in {"short": [1, 0, 3], "long": [30, 2, 0, 55, 7], "whole": [15, 15]}.items()
    }
    store, model, told = Given(tiny_store, streams), ByContext(tiny_store.vocab_size, keeps), []
    scores = score_perplexity(
        loaded(model, store, context=200), store, context=context, stride=stride, on_tokens=told.append
    )
    for name, stream in streams.items():
        nats = slowly(model, stream, end, context, stride)
        ends = np.flatnonzero(np.array(stream) == end) + 1
        expected = [part.sum() for part in np.split(nats, ends[:-1])]
        items = [item for item in scores.items if item["group"] == name]
        assert [item["nats"] for item in items] == pytest.approx(expected, rel=1e-5)
        assert [item["tokens"] for item in items] == np.diff([0, *ends]).tolist()
        assert metric(scores, "loss", name).value == pytest.approx(nats.mean(), rel=1e-5)
    assert sum(told) == scores.facts["num_tokens"] == sum(map(len, streams.values()))


@pytest.mark.parametrize("stride", [16, 8, 1])
def test_a_real_model_equals_the_slow_way(folder, tiny_store, stride):
    model = load_model(folder, device="cpu")
    scores = score_perplexity(model, tiny_store, context=16, stride=stride, limit=2)
    for domain in tiny_store.domains:
        stream = tiny_store.tokens(domain, "test").tolist()
        cut = [index for index, token in enumerate(stream) if token == tiny_store.end_of_document][1] + 1
        nats = slowly(model.model, stream[:cut], tiny_store.end_of_document, 16, stride)
        assert metric(scores, "loss", domain).value == pytest.approx(nats.mean(), abs=1e-5)


def test_no_batch_changes_the_numbers(folder, tiny_store):
    model = load_model(folder, device="cpu")
    expected = score_perplexity(model, tiny_store)
    for batch_size in (1, 3, 1000):
        found = score_perplexity(model, tiny_store, batch_size=batch_size)
        for one, other in zip(expected.metrics, found.metrics, strict=True):
            assert (one.name, one.group, one.num_items) == (other.name, other.group, other.num_items)
            assert other.value == pytest.approx(one.value, rel=1e-5)
            assert (other.low, other.high) == pytest.approx((one.low, one.high), rel=1e-5)
    again = score_perplexity(model, tiny_store)
    assert again.metrics == expected.metrics
    assert again.items == expected.items


def test_metrics_and_facts_of_the_tiny_corpus(folder, tiny_store):
    model = load_model(folder, device="cpu")
    scores = score_perplexity(model, tiny_store)
    assert [(metric.name, metric.group) for metric in scores.metrics] == [
        (name, group) for group in ("", *tiny_store.domains) for name in METRICS
    ]
    losses = [metric(scores, "loss", domain).value for domain in tiny_store.domains]
    assert metric(scores, "loss").value == pytest.approx(np.mean(losses))
    assert metric(scores, "perplexity").value == pytest.approx(np.exp(losses).mean())
    bits = [metric(scores, "bits_per_byte", domain).value for domain in tiny_store.domains]
    assert metric(scores, "bits_per_byte").value == pytest.approx(np.mean(bits))
    for found in scores.metrics:
        assert found.low < found.value < found.high
        assert found.stderr > 0
        assert not found.higher_is_better
        assert found.chance is found.verdict is None
    for domain, documents in zip(tiny_store.domains, tiny_store.num_documents("test"), strict=True):
        loss, perplexity = metric(scores, "loss", domain), metric(scores, "perplexity", domain)
        assert loss.num_items == documents
        assert (perplexity.low, perplexity.high) == pytest.approx((math.exp(loss.low), math.exp(loss.high)))
    assert metric(scores, "loss").num_items == sum(tiny_store.num_documents("test")) == len(scores.items)
    facts = scores.facts
    assert (facts["split"], facts["context"], facts["stride"], facts["limit"]) == ("test", 32, 16, None)
    assert facts["num_tokens"] == sum(tiny_store.sizes_tokens("test"))
    assert (facts["num_documents"], facts["reencoded"]) == (len(scores.items), False)
    assert facts["corpus_fingerprint"] == tiny_store.fingerprint
    assert facts["tokens_per_second"] > facts["num_tokens"] / facts["seconds"]  # most inputs are read twice


def test_intervals_are_the_bootstraps_over_documents(folder, tiny_store):
    scores = score_perplexity(load_model(folder, device="cpu"), tiny_store)
    tables = [
        np.array([[item["nats"], item["tokens"], item["bytes"]] for item in scores.items if item["group"] == domain])
        for domain in tiny_store.domains
    ]
    found = Resampled(tables).estimate(METRICS["loss"][0])
    assert found.method == "bootstrap"
    mean = metric(scores, "loss")
    assert (mean.low, mean.high, mean.stderr) == pytest.approx((found.low, found.high, found.stderr))


def test_limit_split_and_context(folder, tiny_store):
    model = load_model(folder, device="cpu", context=24)
    scores = score_perplexity(model, tiny_store, limit=3, split="validation")
    assert len(scores.items) == 9
    assert (scores.facts["limit"], scores.facts["context"], scores.facts["stride"]) == (3, 24, 12)
    whole = score_perplexity(model, tiny_store, split="validation")
    kept = [item for item in whole.items if int(item["id"].split("/")[1]) < 3]
    assert [item["nats"] for item in scores.items] == pytest.approx([item["nats"] for item in kept], rel=1e-5)
    one = score_perplexity(model, tiny_store, limit=1)
    assert metric(one, "loss").value is not None
    assert metric(one, "loss").low is metric(one, "loss").stderr is None  # one document has no interval


def test_other_tokenizers_compare_in_bits_per_byte(tiny_store, tiny_corpus, tmp_path):
    """A model with its own tokenizer scores the same as on a corpus that was prepared with that tokenizer."""
    source = Source(name=str(tiny_corpus.parent / "data.jsonl"), domain_field="domain")
    prepare(Preparation(source=source, splits=(0.8, 0.1, 0.1), tokenizer="train:270"), tmp_path / "other")
    other = TokenStore.open(tmp_path / "other")
    model = load_model(save_folder(tmp_path / "model", other), device="cpu")
    again, own = score_perplexity(model, tiny_store), score_perplexity(model, other)
    assert again.facts["reencoded"]
    assert not own.facts["reencoded"]
    assert again.facts["tokenizer_fingerprint"] == own.facts["tokenizer_fingerprint"]
    assert again.items == own.items
    assert again.metrics == own.metrics


def test_memory_that_runs_out_halves_the_batch(tiny_store):
    class Small(ByContext):
        def forward(self, input_ids, use_cache=None, logits_to_keep=0):
            if len(input_ids) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(input_ids, use_cache, logits_to_keep)

    roomy, small = (loaded(kind(tiny_store.vocab_size), tiny_store, 16) for kind in (ByContext, Small))
    found, expected = score_perplexity(small, tiny_store), score_perplexity(roomy, tiny_store)
    assert found.items == expected.items
    assert found.facts["num_tokens"] == expected.facts["num_tokens"]
    with pytest.raises(ConfigError, match="batch_size=4: must fit into the memory of cpu"):
        score_perplexity(small, tiny_store, batch_size=4)


def test_memory_for_one_window_is_needed(tiny_store):
    model = ByContext(tiny_store.vocab_size)

    def forward(input_ids, use_cache=None, logits_to_keep=0):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.forward = forward
    with pytest.raises(ConfigError, match="context=16: must fit into the memory"):
        score_perplexity(loaded(model, tiny_store, 16), tiny_store)


def test_bf16_is_near(folder, tiny_store):
    exact, rough = (load_model(folder, device="cpu", precision=precision) for precision in ("fp32", "bf16"))
    assert (exact.bf16, rough.bf16) == (False, True)
    losses = [metric(score_perplexity(model, tiny_store), "loss").value for model in (exact, rough)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 33}, r"context=33: must be between 1 and 32 tokens, the most that the model in .* takes"),
        ({"context": 0}, "context=0"),
        ({"stride": 33}, r"stride=33: must be between 1 and context=32"),
        ({"stride": 0}, "stride=0"),
        ({"context": 8, "stride": 9}, "stride=9: must be between 1 and context=8"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1 window"),
        ({"limit": 0}, "limit=0"),
        ({"split": "tests"}, "did you mean 'test'"),
    ],
)
def test_bad_settings_are_refused_before_the_model_runs(folder, tiny_store, settings, message):
    model = load_model(folder, device="cpu")

    def forward(input_ids, use_cache=None, logits_to_keep=0):
        raise AssertionError("the model ran")

    model.model.forward = forward
    for refusing in (score_perplexity, check_perplexity):
        with pytest.raises(ConfigError, match=message):
            refusing(model, tiny_store, **settings)
    check_perplexity(model, tiny_store)


def test_a_domain_without_documents_is_refused(tiny_store):
    store = Given(tiny_store, {"full": [A], "empty": []})
    with pytest.raises(DataError, match="domain=empty: must hold a document in the test split"):
        score_perplexity(loaded(ByContext(tiny_store.vocab_size), store, 8), store)


def test_a_broken_model_is_refused(tiny_store):
    model = ByContext(tiny_store.vocab_size)
    model.table[:] = math.nan
    with pytest.raises(DataError, match=r"domain=letters: its losses must be finite.*diverged"):
        score_perplexity(loaded(model, tiny_store, 8), tiny_store)


def test_items_and_facts_are_json(folder, tiny_store):
    import json

    scores = score_perplexity(load_model(folder, device="cpu"), tiny_store, limit=1)
    json.dumps([scores.items, scores.facts], allow_nan=False)
    for found in scores.metrics:
        json.dumps({field.name: getattr(found, field.name) for field in fields(found)}, allow_nan=False)
