"""A store is written whole or not at all, from the files that are there now, in disjoint splits."""

import errno
import json
import os

import pytest

from acodm_env.corpus.preparation import pocket
from acodm_env.corpus.preparation.prepare import Preparation, prepare
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.tokenizer import END_OF_DOCUMENT
from acodm_env.corpus.tokens import SPLITS
from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments import prepare as command


def rows(count=60, word="text", domains="ab"):
    return [{"text": f"{word} {i}", "domain": domains[i % len(domains)]} for i in range(count)]


def given(path, records):
    """A source of JSON lines at `path`."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Source(name=str(path), domain_field="domain")


def prepared(tmp_path, records, **settings):
    """The store of `records`, in tmp_path / "store"."""
    source = given(tmp_path / "a.jsonl", records)
    return prepare(Preparation(source=source, **({"tokenizer": "train:260"} | settings)), tmp_path / "store")


def left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_the_same_preparation_opens_the_store_even_when_files_were_touched(tmp_path):
    store = prepared(tmp_path, rows())
    os.utime(tmp_path / "a.jsonl", (1, 1))
    before = (tmp_path / "store" / "corpus.json").stat().st_mtime_ns
    again = prepare(
        Preparation(source=Source(**store.record["preparation"]["source"]), tokenizer="train:260"), store.path
    )
    assert again.fingerprint == store.fingerprint
    assert (tmp_path / "store" / "corpus.json").stat().st_mtime_ns == before


def test_changed_source_files_are_refused_by_name(tmp_path):
    prepared(tmp_path, rows())
    with pytest.raises(DataError, match=r"a\.jsonl has changed since.*another --out"):
        prepared(tmp_path, [{**row, "text": row["text"].upper()} for row in rows()])  # as many bytes as before


def test_added_and_removed_source_files_are_refused_by_name(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    given(folder / "a.jsonl", rows())
    preparation = Preparation(source=Source(name=str(folder), domain_field="domain"), tokenizer="train:260")
    prepare(preparation, tmp_path / "store")
    given(folder / "b.jsonl", rows(word="more"))
    with pytest.raises(DataError, match=r"b\.jsonl was added"):
        prepare(preparation, tmp_path / "store")
    (folder / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl is gone"):
        prepare(preparation, tmp_path / "store")


def test_other_settings_are_refused_by_name(tmp_path):
    prepared(tmp_path, rows())
    with pytest.raises(DataError, match="prepared with tokenizer=train:260; choose another --out"):
        prepared(tmp_path, rows(), tokenizer="train:270")


def test_a_damaged_store_says_what_to_delete(tmp_path):
    store = prepared(tmp_path, rows())
    (store.path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"not whole.*delete the folder .*store first"):
        prepared(tmp_path, rows())


def test_progress_counts_the_bytes_read_and_leaves_standard_output_alone(tmp_path, capfd):
    source = given(tmp_path / "a.jsonl", rows())
    prepare(Preparation(source=source, tokenizer="train:260"), tmp_path / "store", quiet=False)
    out, err = capfd.readouterr()
    assert out == ""
    assert "reading: 100%" in err
    assert "tokenising: 100%" in err
    assert "2.09k/2.09k" in err  # the bytes of a.jsonl
    assert " tokens/s]" in err


def test_a_special_token_spelled_out_is_no_document_end(tmp_path):
    store = prepared(tmp_path, rows(word=f"one{END_OF_DOCUMENT}two"))
    for split in SPLITS:
        for index, domain in enumerate(store.domains):
            ends = (store.tokens(domain, split) == store.end_of_document).sum()
            assert ends == store.num_documents(split)[index]


def test_blank_texts_are_skipped(tmp_path):
    blank = [{"text": text, "domain": "a"} for text in ("", " \n\t ", "\u2003")]
    assert prepared(tmp_path, blank + rows()).num_documents("train") == (27, 27)


def test_a_domain_of_blank_texts_only_is_named(tmp_path):
    blank = [{"text": " ", "domain": "void"}] * 5
    with pytest.raises(DataError, match=r"domain=void: must hold text; all its 5 documents in source="):
        prepared(tmp_path, rows() + blank)


def test_overlap_with_the_source_counts_all_and_shows_one(tmp_path):
    validation = given(tmp_path / "v.jsonl", rows(7))
    with pytest.raises(DataError, match=r"v\.jsonl: .*7 documents stand in both, for instance a: 'text 0'"):
        prepared(tmp_path, rows(), validation=validation)
    assert left(tmp_path) == ["a.jsonl", "v.jsonl"]


def test_overlap_of_validation_and_test_counts_all_and_shows_one(tmp_path):
    validation, test = (given(tmp_path / f"{name}.jsonl", rows(word="held")) for name in "vt")
    with pytest.raises(DataError, match=r"v\.jsonl: .*t\.jsonl; 60 documents stand in both, for instance a: 'held 0'"):
        prepared(tmp_path, rows(), validation=validation, test=test)


def test_a_domain_missing_in_the_users_own_file_is_not_blamed_on_shares(tmp_path):
    validation = given(tmp_path / "v.jsonl", rows(8, "held", "a"))
    with pytest.raises(DataError, match=r"domain=b: .*validation=.*v\.jsonl too;.*leave out --validation") as caught:
        prepared(tmp_path, rows(), validation=validation)
    assert "--splits" not in str(caught.value)


def test_a_domain_only_in_the_users_own_file_is_named(tmp_path):
    test = given(tmp_path / "t.jsonl", rows(9, "held", ("news", "wiki", "newz")))
    with pytest.raises(
        DataError, match=r"domain=newz: .*only test=.*t\.jsonl holds them; is 'news' of the source meant"
    ):
        prepared(tmp_path, rows(domains=("news", "wiki")), test=test)


def test_own_files_are_the_splits(tmp_path):
    validation, test = (given(tmp_path / f"{name}.jsonl", rows(10, name)) for name in "vt")
    store = prepared(tmp_path, rows(), validation=validation, test=test, splits=(1.0, 0.0, 0.0))
    assert [store.num_documents(split) for split in SPLITS] == [(30, 30), (5, 5), (5, 5)]


@pytest.mark.parametrize("splits", [(1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (float("nan"), 0.5, 0.5), (0.0, 0.5, 0.5)])
def test_shares_that_leave_a_split_empty_are_refused(splits):
    with pytest.raises(ConfigError, match="splits="):
        Preparation(source=Source(name="pocket"), splits=splits)


def test_a_domain_too_small_for_every_split_is_named(tmp_path):
    with pytest.raises(DataError, match=r"domain=lonely: .*validation.*lonely \(1\).*--splits"):
        prepared(tmp_path, [*rows(), {"text": "alone", "domain": "lonely"}])


def test_dropped_pocket_domains_are_recorded_warned_of_and_printed(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(pocket, "DOMAINS", ("arithmetic", "licences"))
    monkeypatch.setattr(pocket, "DOMAIN_CHARS", 60_000)
    monkeypatch.setattr(pocket, "_read", lambda paths: iter(["short"]))
    command.run(command.PrepareConfig(source="pocket", out=str(tmp_path / "store"), tokenizer="train:260", quiet=True))
    reason = "only 5 characters in 1 documents in this Python installation"
    record = json.loads((tmp_path / "store" / "corpus.json").read_text())
    assert record["dropped"] == [{"name": "licences", "reason": reason}]
    assert json.loads((tmp_path / "store" / "files.json").read_text()) == []
    assert "files" not in record
    assert f"left out: licences ({reason})" in capsys.readouterr().out
    assert [entry.getMessage() for entry in caplog.records] == [f"pocket: domain 'licences' is left out: {reason}"]


def test_an_out_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="holds something else"):
        prepared(tmp_path, rows())
    assert left(tmp_path / "store") == ["mine.txt"]


def test_an_out_folder_below_a_file_is_refused(tmp_path):
    source = given(tmp_path / "a.jsonl", rows())
    with pytest.raises(DataError, match="is a file"):
        prepare(Preparation(source=source), tmp_path / "a.jsonl" / "store")


def test_a_link_is_followed_and_a_mount_point_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "real")
    store = prepared(tmp_path, rows())
    assert store.path == tmp_path / "real"
    assert (tmp_path / "store").is_symlink()
    assert prepared(tmp_path, rows()).fingerprint == store.fingerprint
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    source = given(tmp_path / "a.jsonl", rows())
    with pytest.raises(DataError, match=r"disk: must not be a mount point; .*name a folder inside it, .*disk/NAME"):
        prepare(Preparation(source=source), tmp_path / "disk")
    assert left(tmp_path) == ["a.jsonl", "disk", "real", "store"]


@pytest.mark.parametrize("name", ["tokenizers/mine", "~/mine"])
def test_a_tokenizer_in_a_folder_is_one_of_the_files(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path / "tokenizers"))
    monkeypatch.chdir(tmp_path)
    first = prepared(tmp_path, rows())
    folder = tmp_path / "tokenizers" / "mine"
    folder.mkdir(parents=True)
    first.path.rename(tmp_path / "first")
    file = folder / "tokenizer.json"
    file.write_bytes((tmp_path / "first" / "tokenizer.json").read_bytes())
    prepared(tmp_path, rows(), tokenizer=name)
    file.write_text(file.read_text().replace("\n", " \n"))
    with pytest.raises(DataError, match=r"mine/tokenizer\.json has changed since"):
        prepared(tmp_path, rows(), tokenizer=name)


def test_a_store_that_lists_its_files_in_corpus_json_is_opened_as_well(tmp_path):
    store = prepared(tmp_path, rows())
    record = json.loads((store.path / "corpus.json").read_text())
    record["files"] = json.loads((store.path / "files.json").read_text())
    (store.path / "files.json").unlink()
    (store.path / "corpus.json").write_text(json.dumps(record))
    assert prepared(tmp_path, rows()).fingerprint == store.fingerprint
    with pytest.raises(DataError, match=r"a\.jsonl has changed"):
        prepared(tmp_path, rows(61))


def test_disk_full_before_the_first_commit_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("acodm_env.corpus.preparation.prepare.sha256", full)
    with pytest.raises(DataError, match="disk full"):
        prepared(tmp_path, rows())
    assert left(tmp_path) == ["a.jsonl"]


def test_workers_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match="workers=0: must be at least 1 process"):
        prepare("pocket", tmp_path / "store", workers=0)


@pytest.mark.parametrize("size", [0, 6])
def test_shards_must_hold_whole_tokens(size):
    with pytest.raises(ConfigError, match=f"shard_bytes={size}: must be a multiple of 4"):
        Preparation(source=Source(name="pocket"), shard_bytes=size)


def test_a_recipe_gives_what_is_not_given(tmp_path):
    config = command.PrepareConfig(recipe="slimpajama", out="o").preparation()
    assert config.source == Source(name="cerebras/SlimPajama-627B", domain_field="meta.redpajama_set_name")
    assert config.validation == Source(
        name="cerebras/SlimPajama-627B@validation", domain_field="meta.redpajama_set_name"
    )
    own = command.PrepareConfig(recipe="slimpajama", source="mine/", domain_field="set", out="o").preparation()
    assert own.source == Source(name="mine/", domain_field="set")
    assert own.validation is None
    pile = command.PrepareConfig(recipe="pile", source="pile/", test="t.jsonl", out="o").preparation()
    assert pile.test == Source(name="t.jsonl", domain_field="meta.pile_set_name")
    assert pile.validation is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "plie", "source": "a"}, "recipe='plie': must be one of pile, slimpajama; did you mean 'pile'"),
        ({"recipe": "pile"}, "source=None: must name files"),
        ({"source": "a", "splits": "0.9,0.1"}, "splits=0.9,0.1: must be three numbers"),
        ({"source": "a", "shard_mib": 0}, "shard_mib=0: must be at least 1 MiB"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        command.PrepareConfig(out="o", **settings).preparation()


def test_verify_reads_every_byte(tmp_path, capsys):
    store = prepared(tmp_path, rows())
    command.run(command.PrepareConfig(out=str(store.path), verify=True))
    assert "whole; every checksum agrees" in capsys.readouterr().out
