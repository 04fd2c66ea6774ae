"""An interrupted preparation goes on and ends with the bytes of an uninterrupted one."""

import errno
import gzip
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from acodm_env.corpus.preparation import prepare as preparing
from acodm_env.corpus.preparation import settings, sources
from acodm_env.corpus.preparation import staging as workplace
from acodm_env.corpus.preparation.prepare import prepare
from acodm_env.corpus.preparation.settings import Inputs, Preparation
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.shards import ShardWriter
from acodm_env.errors import DataError
from acodm_env.experiments.console import say
from acodm_env.lock import claimed

WORDS = [f"{first}{second}" for first in ("re", "un", "de", "pre") for second in ("do", "light", "form", "view", "set")]


def rows(count, seed):
    rng = random.Random(seed)
    for number in range(count):
        text = f"{seed} {number} " + " ".join(rng.choices(WORDS, k=rng.randrange(5, 60)))
        yield {"text": text, "meta": {"set": "abc"[min(rng.randrange(4), 2)]}}


def lines(count, seed):
    return "".join(json.dumps(row) + "\n" for row in rows(count, seed)).encode()


def make_source(folder, count):
    """Four files of every kind of reader, and a validation file; a preparation of them."""
    import datasets
    import zstandard

    (folder / "data").mkdir()
    (folder / "data" / "a.jsonl").write_bytes(lines(count, 1))
    (folder / "data" / "b.jsonl.zst").write_bytes(zstandard.compress(lines(count, 2)))
    (folder / "data" / "c.jsonl.gz").write_bytes(gzip.compress(lines(count, 3), mtime=0))
    datasets.Dataset.from_list(list(rows(count, 4))).to_parquet(folder / "data" / "d.parquet")
    (folder / "v.jsonl").write_bytes(lines(count // 2, 5) + lines(3, 1))  # three that stand in a.jsonl too
    return Preparation(
        source=Source(name=str(folder / "data"), domain_field="meta.set"),
        validation=Source(name=str(folder / "v.jsonl"), domain_field="meta.set"),
        tokenizer="train:300",
        shard_bytes=8_192,
    )


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hasty(monkeypatch):
    """Commit after every batch, of few documents; share out by hash, as for sources above 256 MB."""
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(workplace, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(preparing, "_BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(settings, "BALANCED_BYTES", 0)


class Killed(BaseException):
    """What nothing catches."""


def interrupt(monkeypatch, number, error):
    """Raise `error` in the middle of the append of that number."""
    original, calls = ShardWriter.append, []

    def append(self, domain, split, hashes, tokens):
        calls.append(1)
        if len(calls) == number:
            original(self, domain, split, hashes, tokens[: len(tokens) // 4 * 2])  # half of it reached the disk
            raise error
        original(self, domain, split, hashes, tokens)

    monkeypatch.setattr(ShardWriter, "append", append)


def killed(monkeypatch, number, preparation, out):
    """Prepare until the append of that number."""
    with monkeypatch.context() as patch:
        interrupt(patch, number, Killed())
        with pytest.raises(Killed):
            prepare(preparation, out)


@pytest.mark.parametrize("by_hash", [True, False])
def test_interrupted_anywhere_the_store_is_the_same(tmp_path, hasty, monkeypatch, by_hash):
    preparation = make_source(tmp_path, 60)
    if not by_hash:
        monkeypatch.setattr(settings, "BALANCED_BYTES", 1 << 30)
        (tmp_path / "v.jsonl").write_bytes(lines(30, 5))  # what stands in both is refused of small sources
    whole = content(prepare(preparation, tmp_path / "whole").path)
    assert sum(name.startswith("train/") and name.endswith(".bin") for name in whole) > 3  # several shards
    for number in (1, 2, 9, 20, 33):
        killed(monkeypatch, number, preparation, tmp_path / "store")
        if number > 4:
            assert (tmp_path / ".store.partial" / "journal.json").exists()
    assert not (tmp_path / "store").exists()
    assert content(prepare(preparation, tmp_path / "store").path) == whole
    assert not (tmp_path / ".store.partial").exists()


def test_what_was_committed_is_not_encoded_again(tmp_path, hasty, monkeypatch):
    preparation = make_source(tmp_path, 60)
    killed(monkeypatch, 40, preparation, tmp_path / "store")
    journal = json.loads((tmp_path / ".store.partial" / "journal.json").read_text())
    committed = sum(output["documents"] for output in journal["written"]["outputs"])
    assert committed > 60
    appended = []
    original = ShardWriter.append
    monkeypatch.setattr(ShardWriter, "append", lambda self, *what: (appended.extend(what[2]), original(self, *what)))
    store = prepare(preparation, tmp_path / "store")
    assert committed + len(appended) == sum(
        sum(store.num_documents(split)) for split in ("train", "validation", "test")
    )


def test_disk_full_keeps_what_was_committed(tmp_path, hasty, monkeypatch):
    preparation = make_source(tmp_path, 60)
    whole = content(prepare(preparation, tmp_path / "whole").path)
    with monkeypatch.context() as patch:
        interrupt(patch, 20, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(DataError, match=r"disk full.* documents stay committed in .*\.store\.partial; free some"):
            prepare(preparation, tmp_path / "store")
    assert content(prepare(preparation, tmp_path / "store").path) == whole


def test_a_run_that_fails_before_it_goes_on_loses_nothing(tmp_path, hasty, monkeypatch):
    preparation = make_source(tmp_path, 60)
    whole = content(prepare(preparation, tmp_path / "whole").path)
    killed(monkeypatch, 40, preparation, tmp_path / "store")
    committed = content(tmp_path / ".store.partial")
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="nothing is there"):
        prepare(preparation, tmp_path / "store")
    (tmp_path / "elsewhere").rename(tmp_path / "data")
    assert content(tmp_path / ".store.partial") == committed
    with monkeypatch.context() as patch:
        patch.setattr(Inputs, "all_files", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prepare(preparation, tmp_path / "store")
    assert content(tmp_path / ".store.partial") == committed
    assert content(prepare(preparation, tmp_path / "store").path) == whole


def test_committed_work_is_not_thrown_away_for_another_preparation(tmp_path, hasty, monkeypatch):
    preparation = make_source(tmp_path, 60)
    whole = content(prepare(preparation, tmp_path / "whole").path)
    killed(monkeypatch, 20, preparation, tmp_path / "store")
    committed = content(tmp_path / ".store.partial")
    other = Preparation(**{**vars(preparation), "shard_bytes": 4_096})
    refused = r"{}.*documents are committed in .*\.store\.partial; .*or delete .*\.store\.partial to begin afresh"
    with pytest.raises(DataError, match=refused.format("it was begun with shard_bytes=8192; ")):
        prepare(other, tmp_path / "store")
    original = (tmp_path / "data" / "a.jsonl").read_bytes()
    (tmp_path / "data" / "a.jsonl").write_bytes(lines(61, 1))
    with pytest.raises(DataError, match=refused.format(r"a\.jsonl has changed since it was begun; ")):
        prepare(preparation, tmp_path / "store")
    (tmp_path / "data" / "a.jsonl").write_bytes(original)
    (tmp_path / "data" / "e.jsonl").write_bytes(lines(5, 9))
    with pytest.raises(DataError, match=refused.format(r"e\.jsonl was added")):
        prepare(preparation, tmp_path / "store")
    (tmp_path / "data" / "e.jsonl").unlink()
    assert content(tmp_path / ".store.partial") == committed
    assert content(prepare(preparation, tmp_path / "store").path) == whole


def test_with_no_document_committed_another_preparation_begins_afresh(tmp_path, hasty, monkeypatch):
    preparation = make_source(tmp_path, 60)
    killed(monkeypatch, 20, preparation, tmp_path / "store")
    file = tmp_path / ".store.partial" / "journal.json"
    journal = json.loads(file.read_text())
    file.write_text(json.dumps({name: journal[name] for name in journal if name not in ("written", "position")}))
    other = Preparation(**{**vars(preparation), "shard_bytes": 4_096})
    store = prepare(other, tmp_path / "store")
    assert content(prepare(other, tmp_path / "whole").path) == content(store.path)


def test_an_unreadable_journal_is_left_to_the_user(tmp_path, hasty, monkeypatch):
    preparation = make_source(tmp_path, 60)
    killed(monkeypatch, 20, preparation, tmp_path / "store")
    (tmp_path / ".store.partial" / "journal.json").write_text("{")
    committed = content(tmp_path / ".store.partial")
    with pytest.raises(DataError, match=r"journal\.json: not valid JSON .*delete .*\.store\.partial to begin afresh"):
        prepare(preparation, tmp_path / "store")
    assert content(tmp_path / ".store.partial") == committed


def test_a_store_that_appears_before_the_lock_is_had_is_opened_or_refused(tmp_path, hasty, monkeypatch):
    preparation = make_source(tmp_path, 60)
    other = Preparation(**{**vars(preparation), "shard_bytes": 4_096})
    check, written = preparing._check_out, []

    def overtaken(out):
        check(out)
        monkeypatch.setattr(preparing, "_check_out", check)
        written.append(content(prepare(preparation, out).path))
        monkeypatch.setattr(preparing, "_check_out", overtaken)

    monkeypatch.setattr(preparing, "_check_out", overtaken)
    assert content(prepare(preparation, tmp_path / "a").path) == written[0]
    with pytest.raises(DataError, match="it was prepared with shard_bytes=8192"):
        prepare(other, tmp_path / "b")
    assert content(tmp_path / "b") == written[1]
    assert not list(tmp_path.glob(".*.partial"))


def test_the_partial_folder_is_removed_once_while_it_is_claimed(tmp_path, hasty, monkeypatch):
    """A second time it might be another process's."""
    remove, removed = shutil.rmtree, []

    def watched(folder, **options):
        if folder == tmp_path / ".store.partial":
            with pytest.raises(DataError, match="must not be in use"):
                claimed(tmp_path / "store", at=folder).__enter__()
            removed.append(folder)
        remove(folder, **options)

    monkeypatch.setattr(workplace.shutil, "rmtree", watched)
    prepare(make_source(tmp_path, 60), tmp_path / "store")
    assert len(removed) == 1


def test_the_journal_does_not_grow_with_the_number_of_files(tmp_path, hasty, monkeypatch):
    preparation = make_source(tmp_path, 60)
    killed(monkeypatch, 20, preparation, tmp_path / "store")
    partial = tmp_path / ".store.partial"
    files = json.loads((partial / "store" / "files.json").read_text())
    assert [Path(state["path"]).name for state in files] == [
        "a.jsonl",
        "b.jsonl.zst",
        "c.jsonl.gz",
        "d.parquet",
        "v.jsonl",
    ]
    before = (partial / "store" / "files.json").stat().st_mtime_ns
    assert "b.jsonl.zst" not in (partial / "journal.json").read_text()
    store = prepare(preparation, tmp_path / "store")
    assert "b.jsonl.zst" not in (store.path / "corpus.json").read_text()
    assert (store.path / "files.json").stat().st_mtime_ns == before


def test_source_files_are_listed_once(tmp_path, hasty, monkeypatch):
    preparation = make_source(tmp_path, 60)
    listed, original = [], sources.files_of
    for module in (sources, settings):
        monkeypatch.setattr(module, "files_of", lambda name: (listed.append(Path(name).name), original(name))[1])
    prepare(preparation, tmp_path / "store")
    assert listed == ["data", "v.jsonl"]


def test_a_partial_folder_that_lost_bytes_is_refused(tmp_path, hasty, monkeypatch):
    preparation = make_source(tmp_path, 60)
    killed(monkeypatch, 40, preparation, tmp_path / "store")
    shard = next((tmp_path / ".store.partial" / "store" / "train").glob("*-00000.bin"))
    shard.write_bytes(shard.read_bytes()[:10])
    with pytest.raises(
        DataError, match=r"bytes that were committed; it does not.*delete the folder .*\.store\.partial"
    ):
        prepare(preparation, tmp_path / "store")


def test_a_run_killed_after_the_store_appeared_leaves_nothing_behind(tmp_path, hasty):
    preparation = make_source(tmp_path, 60)
    prepare(preparation, tmp_path / "store")
    (tmp_path / ".store.partial").mkdir()
    (tmp_path / ".store.partial" / "journal.json").write_text("{}")
    prepare(preparation, tmp_path / "store")
    assert not (tmp_path / ".store.partial").exists()


PREPARE = """
import pathlib, pickle, sys
from acodm_env.corpus.preparation import prepare, settings, staging
staging.COMMIT_SECONDS, settings.BALANCED_BYTES, prepare.WORKERS_BYTES = 0.02, 0, 0
prepare._BATCH_CHARS = 4_000
if __name__ == "__main__":
    folder, out = pathlib.Path(sys.argv[1]), sys.argv[2]
    fields = {"domain_field": "meta.set"}
    prepare.prepare(
        prepare.Preparation(
            source=prepare.Source(name=str(folder / "data"), **fields),
            validation=prepare.Source(name=str(folder / "v.jsonl"), **fields),
            tokenizer="train:300",
            shard_bytes=int(sys.argv[3]),
        ),
        out,
        workers=2,
    )
"""


def started(tmp_path, out, shard_bytes):
    return subprocess.Popen([sys.executable, "-c", PREPARE, str(tmp_path), str(out), str(shard_bytes)])


def children(pid):
    """Processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_killed_run_takes_its_workers_along_and_a_live_one_is_not_disturbed(tmp_path, monkeypatch):
    preparation = make_source(tmp_path, 700)
    run = started(tmp_path, tmp_path / "store", preparation.shard_bytes)
    journal = tmp_path / ".store.partial" / "journal.json"
    wait_for(lambda: journal.exists() and '"documents"' in journal.read_text())
    with pytest.raises(DataError, match=rf"must not be in use; process {run.pid} on .* writes there since .* -c"):
        prepare(preparation, tmp_path / "store")
    workers = children(run.pid)
    assert len(workers) == 2
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() and alive(worker) for worker in workers))
    assert not (tmp_path / "store").exists()
    assert started(tmp_path, tmp_path / "store", preparation.shard_bytes).wait() == 0
    monkeypatch.setattr(settings, "BALANCED_BYTES", 0)
    assert content(prepare(preparation, tmp_path / "one-process", workers=1).path) == content(tmp_path / "store")


def alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_twenty_random_points_the_store_is_the_same(tmp_path):
    preparation = make_source(tmp_path, 4_000)
    start = time.monotonic()
    assert started(tmp_path, tmp_path / "whole", preparation.shard_bytes).wait() == 0
    seconds = time.monotonic() - start
    whole, rng, kills = content(tmp_path / "whole"), random.Random(0), 0
    for number in range(20):
        out = tmp_path / f"store-{number}"
        while True:
            run = started(tmp_path, out, preparation.shard_bytes)
            try:
                assert run.wait(timeout=rng.uniform(0.1, 1.0) * seconds) == 0
                break
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                run.wait()
                kills += 1
        assert content(out) == whole
        assert not (tmp_path / f".store-{number}.partial").exists()
    assert kills >= 20
    say(f"\n{kills} kills of 20 preparations of {seconds:.1f} s: every store equal")
