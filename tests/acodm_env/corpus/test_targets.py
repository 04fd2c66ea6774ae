"""Targets are domains with held-out text and none to train on."""

import json
import pickle

import numpy as np
import pytest

from acodm_env.corpus.preparation import prepare as preparing
from acodm_env.corpus.preparation import settings, splits
from acodm_env.corpus.preparation import staging as workplace
from acodm_env.corpus.preparation.prepare import Preparation, prepare
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.preparation.splits import document_hash
from acodm_env.corpus.shards import ShardWriter
from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments import doctor
from acodm_env.experiments import prepare as command
from acodm_env.files import read_json, write_json


def rows(count, word, domains):
    return [
        {"text": f"{word} number {i}: " + f"{word} {i % 7} " * (i % 5 + 1), "domain": domains[i % len(domains)]}
        for i in range(count)
    ]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Source(name=str(path), domain_field="domain")


def make(tmp_path, targets=None, **sources):
    """A preparation of two domains to train on, and of targets."""
    given = {name: write(tmp_path / f"{name}.jsonl", records) for name, records in sources.items()}
    records = rows(60, "goal", ["law", "medicine"]) if targets is None else targets
    return Preparation(
        source=write(tmp_path / "a.jsonl", rows(300, "text", ["code", "prose"])),
        targets=write(tmp_path / "t.jsonl", records),
        tokenizer="train:270",
        **given,
    )


@pytest.fixture(params=["dealt", "by hash", "source by hash"])
def size(request, monkeypatch):
    """Everything small; everything large; only the source large."""
    if request.param != "dealt":
        monkeypatch.setattr(settings.Inputs, "balanced", lambda self: False)
    if request.param == "by hash":
        monkeypatch.setattr(settings.Inputs, "few_targets", lambda self: False)
    return request.param


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_targets_have_held_out_text_and_none_to_train_on(tmp_path, size):
    store = prepare(make(tmp_path), tmp_path / "store")
    assert store.domains == ("code", "law", "medicine", "prose")
    assert store.trainable == ("code", "prose")
    assert store.sizes_tokens("train")[1:3] == store.num_documents("train")[1:3] == (0, 0)
    assert len(store.tokens("law", "train")) == len(store.document_hashes("train", 1)) == 0
    for index in (1, 2):
        held = [store.num_documents(split)[index] for split in ("validation", "test")]
        assert sum(held) == 30
        assert min(held) == 15 if size != "by hash" else min(held) > 5
    assert min(store.num_sequences("validation", 8)) > 0
    store.verify()
    TokenStore.open(store.path).verify()


def test_who_trains_takes_the_trainable_domains(tmp_path):
    store = prepare(make(tmp_path), tmp_path / "store")
    assert store.trained().domains == ("code", "prose")
    assert store.trained().fingerprint == store.subset(("code", "prose")).fingerprint
    assert store.trained().trained().fingerprint == store.trained().fingerprint
    assert min(store.trained().num_sequences("train", 8)) > 0
    with pytest.raises(DataError, match=r"domain=law: must hold text to train on; it is a target.*trained"):
        store.num_sequences("train", 8)
    with pytest.raises(DataError, match=r"must hold a domain to train on; law, medicine hold held-out text only"):
        store.subset(("law", "medicine")).trained()
    with pytest.raises(ConfigError, match="cut=law=1: must be at most 0"):
        store.cut({"law": 1}, 8)
    part = store.subset(("law", "code"))
    again = pickle.loads(pickle.dumps(part))
    assert (again.domains, again.trainable, again.fingerprint) == (("law", "code"), ("code",), part.fingerprint)


def test_the_targets_are_part_of_the_fingerprint_and_the_tokenizer_does_not_see_them(tmp_path):
    first = prepare(make(tmp_path), tmp_path / "x")
    second = prepare(make(tmp_path, rows(40, "goal", ["law"])), tmp_path / "y")
    assert first.record["tokenizer"] == second.record["tokenizer"]
    assert first.subset(("code", "prose")).fingerprint == second.subset(("code", "prose")).fingerprint
    assert first.fingerprint != second.fingerprint
    with pytest.raises(DataError, match=r"t\.jsonl has changed"):
        prepare(make(tmp_path), tmp_path / "y")
    assert prepare(make(tmp_path, rows(40, "goal", ["law"])), tmp_path / "y").fingerprint == second.fingerprint


def test_a_store_of_a_version_without_targets_is_the_same_preparation(tmp_path):
    store = prepare(
        Preparation(source=write(tmp_path / "a.jsonl", rows(90, "x", "ab")), tokenizer="train:260"), tmp_path / "s"
    )
    record = read_json(store.path / "corpus.json")
    del record["preparation"]["targets"]
    write_json(store.path / "corpus.json", record)
    assert prepare(Preparation(source=Source(**record["preparation"]["source"]), tokenizer="train:260"), store.path)


def test_shards_struck_from_the_record_do_not_make_a_target(tmp_path):
    store = prepare(make(tmp_path), tmp_path / "store")
    record = read_json(store.path / "corpus.json")
    record["domains"][0]["splits"]["train"] = {"tokens": 0, "documents": 0, "shards": []}
    write_json(store.path / "corpus.json", record)
    with pytest.raises(DataError, match="fingerprint"):
        TokenStore.open(store.path)


class Killed(BaseException):
    """What nothing catches."""


def test_interrupted_anywhere_the_store_is_the_same(tmp_path, size, monkeypatch):
    monkeypatch.setattr(workplace, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(preparing, "_BATCH_DOCUMENTS", 8)
    common = rows(4, "goal", ["law"]) if size != "dealt" else []  # refused of small sources
    preparation = make(tmp_path, validation=[*rows(20, "held", ["code", "prose"]), *common])
    if common:
        record = [{**row, "domain": "code"} for row in common]
        write(tmp_path / "validation.jsonl", [*rows(20, "held", ["code", "prose"]), *record])
    whole = content(prepare(preparation, tmp_path / "whole").path)
    original = ShardWriter.append
    for number in (3, 9, 14, 20, 30):
        calls = []

        def append(self, *what, calls=calls, number=number):
            calls.append(1)
            if len(calls) == number:
                raise Killed
            original(self, *what)

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "append", append)
            with pytest.raises(Killed):
                prepare(preparation, tmp_path / "store")
    assert content(prepare(preparation, tmp_path / "store").path) == whole


def test_a_document_of_a_target_that_stands_in_the_source_is_refused_of_small_sources(tmp_path):
    both = [{"text": f"in both {i}", "domain": "law"} for i in range(3)]
    preparation = make(tmp_path, [*rows(60, "goal", ["law"]), *both])
    write(tmp_path / "a.jsonl", [*rows(300, "text", ["code", "prose"]), *({**row, "domain": "code"} for row in both)])
    message = (
        r"targets=.*t\.jsonl: must share no document with source=.*a\.jsonl; 3 documents stand in both.*'in both 0'"
    )
    with pytest.raises(DataError, match=message):
        prepare(preparation, tmp_path / "store")


def test_of_large_sources_it_is_left_out_of_train_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings.Inputs, "balanced", lambda self: False)
    both = [{"text": f"in both {i}", "domain": "law"} for i in range(3)]
    preparation = make(tmp_path, [*rows(60, "goal", ["law"]), *both])
    write(tmp_path / "a.jsonl", [*rows(300, "text", ["code", "prose"]), *({**row, "domain": "code"} for row in both)])
    command.run(
        command.PrepareConfig(
            source=preparation.source.name,
            targets=str(tmp_path / "t.jsonl"),
            domain_field="domain",
            tokenizer="train:270",
            out=str(tmp_path / "store"),
        )
    )
    out = capsys.readouterr().out
    assert "targets, evaluated only: law\n" in out
    assert "left out: 3 documents of source that stand in targets too" in out
    store = TokenStore.open(tmp_path / "store")
    held = np.concatenate([store.document_hashes(split, 1) for split in ("validation", "test")])
    assert {document_hash(row["text"]) for row in both} <= set(held.tolist())
    store.verify()
    assert doctor.corpus(str(tmp_path / "store"))["  law"] == "target, evaluated only"


def test_a_name_may_not_be_both(tmp_path, size):
    message = r"domain=code: .*not both; targets=.*t\.jsonl and source=.*a\.jsonl both hold it"
    with pytest.raises(DataError, match=message):
        prepare(make(tmp_path, rows(60, "goal", ["law", "code"])), tmp_path / "store")
    assert not (tmp_path / "store").exists()
    with pytest.raises(DataError, match=r"domain=code: .* and validation=.*validation\.jsonl both hold it"):
        prepare(
            make(tmp_path, rows(60, "goal", ["law", "code"]), validation=rows(20, "held", ["code"])), tmp_path / "store"
        )


def test_a_target_without_held_out_text_is_named(tmp_path, size):
    alone = [*rows(60, "goal", ["law"]), {"text": "alone", "domain": "lonely"}]
    message = (
        r"domain=lonely: must have held-out documents in validation and test, since it is a target; it has none in"
    )
    with pytest.raises(DataError, match=message + r" (validation|test), targets=.*t\.jsonl holds 1; add documents"):
        prepare(make(tmp_path, alone), tmp_path / "store")
    blank = [*rows(60, "goal", ["law"]), *[{"text": " ", "domain": "void"}] * 3]
    with pytest.raises(DataError, match=r"domain=void: must hold text; all its 3 documents in targets="):
        prepare(make(tmp_path, blank), tmp_path / "store")


def test_a_target_that_stands_in_the_users_validation_altogether_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(settings.Inputs, "balanced", lambda self: False)
    held = rows(20, "held", ["code", "prose"])
    targets = [*rows(60, "goal", ["law"]), *({**row, "domain": "twice"} for row in held)]
    with pytest.raises(DataError, match=r"domain=twice: .*holds 20, less those that stand in validation too; add"):
        prepare(make(tmp_path, targets, validation=held), tmp_path / "store")


def test_targets_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(settings.Inputs, "balanced", lambda self: False)
    preparation = make(tmp_path)
    deal = splits.Dealer.deal

    def changed(self, shares):
        with (tmp_path / "t.jsonl").open("a") as file:
            file.write(json.dumps({"text": "written meanwhile", "domain": "law"}) + "\n")
        return deal(self, shares)

    monkeypatch.setattr(splits.Dealer, "deal", changed)
    with pytest.raises(DataError, match=r"targets=.*t\.jsonl: must not change while it is read"):
        prepare(preparation, tmp_path / "store")


def test_targets_that_cannot_be_read_are_refused(tmp_path):
    preparation = make(tmp_path)
    (tmp_path / "t.jsonl").unlink()
    with pytest.raises(DataError, match=r"t\.jsonl: must be an existing file or folder"):
        prepare(preparation, tmp_path / "store")
