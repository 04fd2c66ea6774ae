"""Sources above the bound for even sharing: splits by hash, a sampled tokenizer, workers, hub data sets."""

import json
import random

import numpy as np
import pytest

from acodm_env.corpus import tokenizer
from acodm_env.corpus.preparation import counts as census
from acodm_env.corpus.preparation import prepare as preparing
from acodm_env.corpus.preparation import settings, sources, splits, streams
from acodm_env.corpus.preparation.encoder import Encoder
from acodm_env.corpus.preparation.prepare import prepare
from acodm_env.corpus.preparation.settings import Preparation
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.preparation.splits import document_hash, split_of
from acodm_env.errors import DataError
from acodm_env.experiments import prepare as command


def rows(count, word="text", domains="ab"):
    return [{"text": f"{word} number {i}", "domain": domains[i % len(domains)]} for i in range(count)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Source(name=str(path), domain_field="domain")


@pytest.fixture
def large(monkeypatch):
    """Every source counts as large."""
    monkeypatch.setattr(settings, "BALANCED_BYTES", 0)


def documents_of(store):
    """Hashes by split and domain."""
    return {
        (split, domain): store.document_hashes(split, index).tolist()
        for split in ("train", "validation", "test")
        for index, domain in enumerate(store.domains)
    }


@pytest.mark.parametrize(
    ("point", "split"), [(0.0, "train"), (0.8999, "train"), (0.9001, "validation"), (0.9501, "test"), (1.0, "test")]
)
def test_the_hash_decides_the_split(point, split):
    shares = {"train": 0.9, "validation": 0.05, "test": 0.05}
    assert split_of(min(int(point * 2**64), 2**64 - 1), shares) == split


def test_splits_follow_from_the_texts_whatever_their_order(tmp_path, large):
    records = rows(3_000)
    shuffled = random.Random(0).sample(records, len(records))
    first, second = (
        documents_of(
            prepare(
                Preparation(source=write(tmp_path / f"{i}.jsonl", part), splits=(0.8, 0.1, 0.1), tokenizer="train:260"),
                tmp_path / f"store-{i}",
            )
        )
        for i, part in enumerate((records, shuffled))
    )
    assert {key: sorted(value) for key, value in first.items()} == {key: sorted(value) for key, value in second.items()}
    assert first != second  # the order within a split is that of the source
    expected = [document_hash(row["text"]) for row in records if row["domain"] == "a"]
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
    for split in shares:
        assert first[split, "a"] == [digest for digest in expected if split_of(digest, shares) == split]
    assert 0.07 < len(first["test", "a"]) / 1_500 < 0.13


def test_what_stands_in_the_users_own_split_is_left_out_of_train_and_said(tmp_path, large, capsys):
    source, validation = write(tmp_path / "a.jsonl", rows(200)), write(tmp_path / "v.jsonl", rows(8))
    test = write(tmp_path / "t.jsonl", [*rows(2), *rows(6, "held")])
    config = command.PrepareConfig(
        source=source.name, validation=validation.name, test=test.name, domain_field="domain", out=str(tmp_path / "s")
    )
    command.run(config)
    store = preparing.TokenStore.open(tmp_path / "s")
    assert [sum(store.num_documents(split)) for split in ("train", "validation", "test")] == [192, 8, 6]
    assert store.record["left_out"] == [
        {"from": "test", "since_in": "validation", "documents": 2},
        {"from": "source", "since_in": "validation", "documents": 8},
    ]
    assert "left out: 8 documents of source that stand in validation too" in capsys.readouterr().out
    store.verify()


def test_too_many_held_out_documents_are_refused(tmp_path, large, monkeypatch):
    monkeypatch.setattr(splits, "HELD_OUT_DOCUMENTS", 5)
    source, validation = write(tmp_path / "a.jsonl", rows(60)), write(tmp_path / "v.jsonl", rows(8, "held"))
    with pytest.raises(DataError, match=r"validation=.*v\.jsonl: must hold at most 5 documents"):
        prepare(Preparation(source=source, validation=validation, tokenizer="train:260"), tmp_path / "store")
    assert not (tmp_path / ".store.partial").exists()


def test_what_is_kept_of_held_out_documents_is_eight_bytes_each(tmp_path, large):
    source, validation = write(tmp_path / "a.jsonl", rows(60)), write(tmp_path / "v.jsonl", rows(500, "held"))
    assignment = splits.assign(Preparation(source=source, validation=validation).inputs())
    assert sum(assigned.split == "validation" for assigned in assignment) == 500
    held = np.frombuffer(assignment._held_out["validation"], dtype=np.uint64)
    assert held.nbytes == 8 * 500
    assert held.tolist() == sorted(document_hash(row["text"]) for row in rows(500, "held"))  # the sorted copy is it


def test_a_field_of_too_many_values_is_no_domain(tmp_path, large, monkeypatch):
    monkeypatch.setattr(census, "MOST_DOMAINS", 3)
    source = write(tmp_path / "a.jsonl", rows(60, domains="abcd"))
    with pytest.raises(DataError, match=r"source=.*at most 3 domains; .* 'd'; is --domain-field the right field"):
        prepare(Preparation(source=source, tokenizer="train:260"), tmp_path / "store")
    prepare(
        Preparation(source=write(tmp_path / "b.jsonl", rows(300, domains="abc")), tokenizer="train:260"), tmp_path / "b"
    )


def test_too_many_documents_to_share_out_evenly_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "BALANCED_DOCUMENTS", 60)
    records = [*rows(60), *rows(60)]  # a repeated one counts once
    prepare(Preparation(source=write(tmp_path / "a.jsonl", records), tokenizer="train:260"), tmp_path / "a")
    source = write(tmp_path / "b.jsonl", rows(61))
    with pytest.raises(DataError, match=r"source=.*at most 60 documents in up to 256 MB.*join short texts"):
        prepare(Preparation(source=source, tokenizer="train:260"), tmp_path / "b")
    own = Preparation(
        source=write(tmp_path / "c.jsonl", rows(40)),
        test=write(tmp_path / "t.jsonl", rows(30, "held")),
        tokenizer="train:260",
    )
    with pytest.raises(DataError, match=r"source=.*at most 60 documents"):
        prepare(own, tmp_path / "c")


def test_a_domain_that_was_left_out_altogether_is_not_blamed_on_shares(tmp_path, large):
    mine = [*rows(300), *rows(20, "same", "z")]
    source, validation = (
        write(tmp_path / "a.jsonl", mine),
        write(tmp_path / "v.jsonl", [*rows(9, "held"), *rows(25, "same", "z")]),
    )
    with pytest.raises(
        DataError, match=r"domain=z: .*all its 20 in source=.*a\.jsonl stand in validation=.*v\.jsonl too"
    ) as caught:
        prepare(Preparation(source=source, validation=validation, tokenizer="train:260"), tmp_path / "store")
    assert "--splits" not in str(caught.value)
    test = write(tmp_path / "t.jsonl", rows(4, "held"))
    own = Preparation(source=write(tmp_path / "b.jsonl", rows(300)), test=test, tokenizer="train:260")
    validation = write(tmp_path / "w.jsonl", rows(9, "held"))
    with pytest.raises(
        DataError, match=r"domain=a: must have documents in test .*all its 2 in test=.*t\.jsonl stand in validation="
    ):
        prepare(Preparation(**{**vars(own), "validation": validation}), tmp_path / "store")


def test_a_domain_that_a_split_lacks_is_named_and_nothing_is_left(tmp_path, large):
    source = write(tmp_path / "a.jsonl", [*rows(300), {"text": "alone", "domain": "lonely"}])
    with pytest.raises(DataError, match=r"domain=lonely: must have documents in"):
        prepare(Preparation(source=source, tokenizer="train:260"), tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_compressed_files_count_fourfold(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"x" * 100)
    (tmp_path / "b.jsonl.gz").write_bytes(b"x" * 100)
    assert Preparation(source=Source(name=str(tmp_path))).inputs().text_bytes() == 500
    assert Preparation(source=Source(name="pocket")).inputs().text_bytes() is None
    assert Preparation(source=Source(name="pocket")).inputs().balanced()
    assert not Preparation(source=Source(name="owner/name")).inputs().balanced()
    mixed = Preparation(source=Source(name=str(tmp_path)), test=Source(name="owner/name"))
    assert not mixed.inputs().balanced()


def test_the_tokenizer_sees_the_beginnings_of_files_from_every_folder(tmp_path, monkeypatch):
    for folder, count in (("big", 40), ("small", 1)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            write(tmp_path / folder / f"{number:02d}.jsonl", rows(50, f"{folder} {number:02d}"))
    monkeypatch.setattr(sources, "SAMPLE_FILES", 4)
    monkeypatch.setattr(sources, "SAMPLE_READ_CHARS", 4 * 100)
    texts = [document.text for document in Source(name=str(tmp_path)).sample()]
    assert {text[:8] for text in texts if text.startswith("big")} == {"big 00 n", "big 19 n", "big 39 n"}
    assert "small 00 number 0" in texts
    assert len(texts) < 30  # of 2,050


def test_the_sample_is_of_train_only(tmp_path, large):
    source = write(tmp_path / "a.jsonl", rows(500))
    preparation = Preparation(source=source, splits=(0.5, 0.25, 0.25))
    chosen = {document_hash(document.text) for document in splits.sample(preparation.inputs())}
    expected = {document_hash(row["text"]) for row in rows(500)}
    assert chosen == {digest for digest in expected if split_of(digest, preparation.shares()) == "train"}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_in_order(tiny_store, workers):
    batches = [(number, [f"alpha beta {number}", "", "run " * number]) for number in range(20)]
    with Encoder(tiny_store.path / "tokenizer.json", workers) as encoder:
        answers = list(encoder.run(iter(batches)))
    plain = tokenizer.load_tokenizer(str(tiny_store.path / "tokenizer.json"))
    assert [number for number, _ in answers] == list(range(20))
    for number, encoded in answers:
        ids = [[*plain.encode(text).ids, tiny_store.end_of_document] for text in batches[number][1]]
        assert encoded.lengths.tolist() == [len(part) for part in ids]
        assert np.frombuffer(encoded.tokens, dtype=tiny_store.dtype).tolist() == [
            token for part in ids for token in part
        ]


def test_a_worker_that_ends_is_an_error_that_says_what_to_do(tiny_store):
    with Encoder(tiny_store.path / "tokenizer.json", 2) as encoder:
        for worker in encoder._workers:
            worker._process.kill()
        with pytest.raises(DataError, match=r"a worker process ended with status -9; .*fewer --workers"):
            list(encoder.run([(0, ["text"])]))


def test_a_long_text_is_encoded_in_parts(tiny_store, monkeypatch):
    plain = tokenizer.load_tokenizer(str(tiny_store.path / "tokenizer.json"))
    text = "alpha beta gamma\n" * 40 + "delta" * 50
    monkeypatch.setattr(tokenizer, "LONGEST_CHARS", 100)
    assert [len(part) for part in tokenizer._parts(text)] == [84, 85, 85, 85, 85, 85, 85, 85, 100, 100, 51]
    [ids] = tokenizer.encode(plain, [text], tiny_store.end_of_document)
    assert plain.decode(ids) == text


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:en@validation", ("owner/name", "en", "validation")),
    ],
)
def test_hub_names(name, parts):
    assert streams.hub_parts(name) == parts


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one data set of two splits, several files each."""
    import datasets

    datasets.disable_progress_bars()
    load = datasets.load_dataset
    for split, word, count in (("train", "text", 90), ("validation", "held", 10)):
        for number in range(3):
            part = rows(count, f"{word} {number}")
            datasets.Dataset.from_list(part).to_parquet(tmp_path / f"{split}-{number}.parquet")

    revisions = iter("abcdefgh")

    def load_hub(name, configuration, *, split, revision, streaming):
        assert (name, configuration, streaming) == ("owner/name", None, True)
        assert revision in "abcdefgh"
        files = sorted(str(path) for path in tmp_path.glob(f"{split}-*.parquet"))
        if not files:
            raise ValueError(f'Unknown split "{split}".')
        return load("parquet", data_files=files, split="train", streaming=True)

    monkeypatch.setattr(streams, "require_hub", lambda *_: None)
    monkeypatch.setattr(streams, "_revision", lambda _: next(revisions))
    monkeypatch.setattr(datasets, "load_dataset", load_hub)
    return Preparation(
        source=Source(name="owner/name", domain_field="domain"),
        validation=Source(name="owner/name@validation", domain_field="domain"),
        tokenizer="train:260",
    )


def test_a_hub_data_set_is_read_by_its_splits(tmp_path, hub):
    store = prepare(hub, tmp_path / "store", workers=1)
    assert sum(store.num_documents("validation")) == 30
    assert sum(store.num_documents("train")) + sum(store.num_documents("test")) == 270


@pytest.mark.parametrize("count", [0, 1, 89, 90, 91, 200])
def test_a_hub_stream_goes_on_from_its_position(hub, count):
    whole = list(hub.source.open())
    stream = hub.source.open()
    documents = iter(stream)
    head = [next(documents) for _ in range(count)]
    position = json.loads(json.dumps(stream.position()))
    again = hub.source.open(position)
    assert head + list(again) == whole
    assert len(whole) == 270


def test_a_hub_data_set_is_read_at_one_commit_however_often_it_is_opened(tmp_path, hub, monkeypatch):
    """Of train and validation, for the tokenizer and for the store, before an interruption and after it."""
    import datasets

    load, read = datasets.load_dataset, []

    def watched(*args, revision, **options):
        read.append(revision)
        return load(*args, revision=revision, **options)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    with monkeypatch.context() as patch:
        patch.setattr(preparing.Assignment, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        patch.setattr("acodm_env.corpus.preparation.staging.COMMIT_SECONDS", 0.0)
        patch.setattr(preparing, "_BATCH_DOCUMENTS", 16)
        with pytest.raises(KeyboardInterrupt):
            prepare(hub, tmp_path / "store", workers=1)
    store = prepare(hub, tmp_path / "store", workers=1)
    assert len(read) == 4  # tokenizer, validation, source; source again
    assert set(read) == {"a"}
    assert store.record["revisions"] == {"owner/name": "a"}


def test_a_hub_data_set_without_the_split_says_so(tmp_path, hub):
    with pytest.raises(DataError, match=r"source=owner/name@dev: must be a hub data set with a split 'dev'"):
        list(Source(name="owner/name@dev", domain_field="domain").open())


def test_a_hub_that_fails_on_the_way_keeps_what_was_committed(tmp_path, hub, monkeypatch):
    whole = prepare(hub, tmp_path / "whole", workers=1)
    monkeypatch.setattr("acodm_env.corpus.preparation.staging.COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(preparing, "_BATCH_DOCUMENTS", 16)
    original = Source._document

    def lost(self, record, folder, where):
        if where == "record 200 of owner/name" and (tmp_path / ".store.partial" / "journal.json").exists():
            raise ConnectionError("the network is gone")
        return original(self, record, folder, where)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "_document", lost)
        with pytest.raises(DataError, match=r"the network is gone; .*run the same command again to go on"):
            prepare(hub, tmp_path / "store", workers=1)
    assert (tmp_path / ".store.partial" / "journal.json").exists()
    store = prepare(hub, tmp_path / "store", workers=1)
    assert store.fingerprint == whole.fingerprint
