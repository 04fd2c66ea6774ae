"""A store is written whole or not at all, from the files that are there now, in disjoint splits."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from acodm_env.corpus import pocket
from acodm_env.corpus.prepare import Preparation, prepare
from acodm_env.corpus.sources import Source
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


def test_progress_counts_every_document_and_leaves_standard_output_alone(tmp_path, capfd):
    source = given(tmp_path / "a.jsonl", rows())
    prepare(Preparation(source=source, tokenizer="train:260"), tmp_path / "store", quiet=False)
    out, err = capfd.readouterr()
    num_chars = sum(len(row["text"]) for row in rows())
    assert out == ""
    assert f"{num_chars}/{num_chars}" in err


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
    assert record["files"] == []
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


def test_disk_full_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("acodm_env.corpus.prepare.sha256", full)
    with pytest.raises(DataError, match="disk full"):
        prepared(tmp_path, rows())
    assert left(tmp_path) == ["a.jsonl"]


SLOW = """
import sys, time
from acodm_env.corpus import prepare
prepare.train_tokenizer = lambda *_: time.sleep(60)
prepare.prepare(prepare.Preparation(source=prepare.Source(name=sys.argv[1], domain_field="domain")), sys.argv[2])
"""


@pytest.mark.timeout(60)
def test_a_killed_run_leaves_no_store_and_the_next_one_clears_up(tmp_path):
    source, out = given(tmp_path / "a.jsonl", rows()), tmp_path / "store"
    theirs = tmp_path / ".store.abcdefgh"
    theirs.mkdir()
    (theirs / "mine.txt").write_text("keep")
    runs = [subprocess.Popen([sys.executable, "-c", SLOW, source.name, str(out)]) for _ in range(2)]
    try:
        while len(folders := set(tmp_path.glob(".store.*")) - {theirs}) < 2:
            assert all(run.poll() is None for run in runs)
            time.sleep(0.05)
        time.sleep(0.2)  # until the younger has locked its folder
        runs[0].send_signal(signal.SIGKILL)
        runs[0].wait()
        assert not out.exists()
        prepare(Preparation(source=source, tokenizer="train:260"), out)
        assert len([folder for folder in folders if folder.exists()]) == 1  # the live run's
    finally:
        for run in runs:
            run.kill()
            run.wait()
    prepare(Preparation(source=source, tokenizer="train:260"), tmp_path / "store")
    assert (theirs / "mine.txt").exists()
