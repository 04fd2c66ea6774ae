"""Formats that read alike, and inputs that are refused by name."""

import errno
import gzip
import io
import json
from pathlib import Path

import pytest
import zstandard

from acodm_env.corpus.preparation.prepare import Preparation, prepare
from acodm_env.corpus.preparation.sources import Source
from acodm_env.errors import DataError


def rows(count=60):
    return [{"text": f"text {i} of {i % 2}", "meta": {"set": "ab"[i % 2]}} for i in range(count)]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write(path, records):
    import datasets

    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines(records)))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(lines(records)))
    elif path.suffix == ".jsonl":
        path.write_bytes(lines(records))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    else:
        from datasets.arrow_writer import ArrowWriter

        with ArrowWriter(path=str(path)) as writer:
            for record in records:
                writer.write(record)
            writer.finalize()
    return path


def read(path, **fields):
    return list(Source(name=str(path), **({"domain_field": "meta.set"} | fields)).open())


def test_every_format_gives_the_same_store(tmp_path):
    prints = set()
    for ending in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow"):
        source = Source(name=str(write(tmp_path / f"data.{ending}", rows())), domain_field="meta.set")
        store = prepare(Preparation(source=source, tokenizer="train:260"), tmp_path / f"store-{ending}")
        prints.add(store.fingerprint)
    assert len(prints) == 1


def test_one_folder_per_domain(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.jsonl", rows(2))
    assert [document.domain for document in read(tmp_path, domain_field=None)] == ["x", "x", "y", "y"]


def test_missing_domain_field_shows_the_record_and_suggests(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(2))
    with pytest.raises(DataError, match=r'"text": "text 0 of 0".*did you mean \'meta.set\''):
        read(path, domain_field="meta.sett")
    with pytest.raises(DataError, match=r"domain_field=None: must name"):
        read(path, domain_field=None)


def test_empty_domain_name(tmp_path):
    path = write(tmp_path / "a.jsonl", [*rows(2), {"text": "t", "meta": {"set": ""}}])
    with pytest.raises(DataError, match="record 3"):
        read(path)


def test_missing_text_field(tmp_path):
    with pytest.raises(DataError, match="text_field=body"):
        read(write(tmp_path / "a.jsonl", rows(2)), text_field="body")


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_malformed_json_names_file_and_line(tmp_path, ending):
    content = lines(rows(3)) + b'{"text": "x"\n' + lines(rows(1))
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[ending]
    path = tmp_path / f"a.{ending}"
    path.write_bytes(pack(content))
    with pytest.raises(DataError, match=rf"a\.{ending}, line 4"):
        read(path)


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_compression_names_the_file(tmp_path, ending, damage):
    path = write(tmp_path / f"a.jsonl.{ending}", rows(500))
    path.write_bytes(path.read_bytes()[:-40] if damage == "cut" else b"no compression at all")
    with pytest.raises(DataError, match=rf"a\.jsonl\.{ending}: .*cannot be decompressed"):
        read(path)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_failing_disk_is_not_blamed_on_compression(tmp_path, monkeypatch, ending):
    class Failing(io.BytesIO):
        def read(self, *size):
            raise OSError(errno.EIO, "Input/output error")

        readline = read

    path = write(tmp_path / f"a.{ending}", rows(2))
    whole, opened = Path.open, []
    monkeypatch.setattr(
        Path, "open", lambda *args: opened.append(1) or (Failing() if len(opened) > 1 else whole(*args))
    )
    with pytest.raises(DataError, match=rf"a\.{ending}: must be readable; .*Input/output error") as caught:
        read(path)
    assert "compress" not in str(caught.value)


def test_empty_file_no_files_no_path(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match="the file is empty"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"\.parquet"):
        read(tmp_path / "other")
    with pytest.raises(DataError, match="nothing is there"):
        read(tmp_path / "absent.jsonl")


def test_hub_name_offline_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE.*download the data elsewhere"):
        list(Source(name="owner/name").open())


def test_a_file_without_records_is_named(tmp_path):
    write(tmp_path / "a.jsonl", rows(2))
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"b\.jsonl: must hold records; it holds none"):
        read(tmp_path)


def test_half_a_surrogate_pair_names_file_and_line(tmp_path):
    write(tmp_path / "a.jsonl", [*rows(2), {"text": "\ud800", "meta": {"set": "a"}}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 3.*surrogates"):
        read(tmp_path)


def test_an_empty_domain_folder_is_named(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    write(tmp_path / "x" / "a.jsonl", rows(2))
    with pytest.raises(DataError, match=r"domain=y: must hold files ending in"):
        read(tmp_path, domain_field=None)
