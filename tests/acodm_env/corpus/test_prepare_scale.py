"""Slow: memory, speed and opening time at scale, on generated text; every figure is printed (`-s`).

    pytest -m slow -s tests/acodm_env/corpus/test_prepare_scale.py

ACODM_SCALE_GIB sets how much text is generated for the memory (default 2), on the disk of `--basetemp`.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from acodm_env.corpus.preparation import prepare as preparing
from acodm_env.corpus.preparation.prepare import prepare
from acodm_env.corpus.preparation.settings import Preparation
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.shards import SHARD_BYTES, SPLITS, ShardWriter
from acodm_env.corpus.tokenizer import load_tokenizer
from acodm_env.corpus.tokens import FORMAT_VERSION, TokenStore, fingerprint
from acodm_env.experiments.console import say
from acodm_env.files import sha256, write_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]

DOMAINS = ("web", "code", "books")


def texts(num_bytes: int, seed: int = 0):
    """Documents of 200 to 8,000 characters of random words, frequent ones far more often than rare ones."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(rng.choice(letters, size=rng.integers(1, 10))) for _ in range(30_000)]
    ranks = np.minimum(rng.zipf(1.2, size=1_500_000) - 1, len(words) - 1)
    block = " ".join(words[rank] for rank in ranks)
    done = number = 0
    while done < num_bytes:
        start, size = int(rng.integers(len(block) - 8_000)), int(rng.integers(200, 8_000))
        text = f"{number} {block[start : start + size]}"
        yield text
        number += 1
        done += len(text)


def write_source(file: Path, num_bytes: int) -> Source:
    with file.open("w") as out:
        for number, text in enumerate(texts(num_bytes)):
            out.write(f'{{"text": "{text}", "meta": {{"set": "{DOMAINS[number % 3]}"}}}}\n')
    return Source(name=str(file), domain_field="meta.set")


def resident_bytes(root: int) -> int:
    """Resident memory of a process and all below it; what two of them share counts twice."""
    parents, sizes = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            sizes[int(entry.name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    family = {root}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(sizes.get(member, 0) for member in family)


def watch(process: subprocess.Popen) -> int:
    """The largest `resident_bytes` of a process until it ends, looked at ten times a second."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.1)
    return peak


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_memory_of_all_processes_stays_below_two_gib(tmp_path):
    size = int(float(os.environ.get("ACODM_SCALE_GIB", "2")) * 2**30)
    source = write_source(tmp_path / "text.jsonl", size)
    command = [sys.executable, "-m", "acodm_env.experiments", "prepare", "--source", source.name]
    command += ["--domain_field", "meta.set", "--out", str(tmp_path / "store"), "--quiet", "true"]
    start = time.monotonic()
    process = subprocess.Popen(command)
    peak = watch(process)
    seconds = time.monotonic() - start
    assert process.returncode == 0
    tokens = sum(sum(TokenStore.open(tmp_path / "store").sizes_tokens(split)) for split in SPLITS)
    workers = preparing._default_workers()
    say(f"\n{Path(source.name).stat().st_size / 2**30:.2f} GiB of text, {workers} workers: peak resident memory")
    say(f"{peak / 2**20:,.0f} MiB, {tokens:,} tokens in {seconds:,.0f} s ({tokens / seconds:,.0f} tokens/s)")
    shutil.rmtree(tmp_path)
    assert peak <= 2 * 2**30


def cpu_seconds() -> float:
    """Processor time of this process and of the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def test_throughput_is_near_that_of_batch_encoding(tmp_path):
    source = write_source(tmp_path / "text.jsonl", 48_000_000)
    small = write_source(tmp_path / "small.jsonl", 3_000_000)
    tokenizer = prepare(Preparation(source=small), tmp_path / "small").path / "tokenizer.json"
    plain, batch = load_tokenizer(str(tokenizer)), list(texts(48_000_000))
    ratios, cpu_ratios = [], []
    for round_ in range(5):
        start, cpu_start = time.perf_counter(), cpu_seconds()
        for first in range(0, len(batch), 512):
            plain.encode_batch_fast(batch[first : first + 512], add_special_tokens=False)
        middle, cpu_middle = time.perf_counter(), cpu_seconds()
        prepare(Preparation(source=source, tokenizer=str(tokenizer)), tmp_path / f"store-{round_}")
        end, cpu_end = time.perf_counter(), cpu_seconds()
        ratios.append((middle - start) / (end - middle))
        cpu_ratios.append((cpu_middle - cpu_start) / (cpu_end - cpu_middle))
        say(f"\nencode_batch_fast {48 / (middle - start):.2f} MB/s, prepare {48 / (end - middle):.2f} MB/s")
    say(f"prepare / encode_batch_fast: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    say(f"the same in processor time, which others on the machine hardly change: {statistics.median(cpu_ratios):.2f}")
    assert statistics.median(ratios) >= 0.8


def write_store(folder: Path, tiny_store: TokenStore, num_tokens: int) -> None:
    """A store of `num_tokens` train tokens in two domains, random once and then repeated."""
    folder.mkdir()
    shutil.copy(tiny_store.path / "tokenizer.json", folder)
    writer = ShardWriter(folder, tiny_store.dtype, SHARD_BYTES)
    block = np.random.default_rng(0).integers(tiny_store.vocab_size, size=1 << 24).astype(tiny_store.dtype).tobytes()
    number = 0
    for domain in ("a", "b"):
        for split, size in (("train", num_tokens // 2), ("validation", 1 << 20), ("test", 1 << 20)):
            rest = size * tiny_store.dtype.itemsize
            while rest:
                writer.append(domain, split, [number], block[: min(rest, len(block))])
                rest -= min(rest, len(block))
                number += 1
    record = {**tiny_store.record, "domains": writer.finish(), "format_version": FORMAT_VERSION}
    record["tokenizer"] = {**record["tokenizer"], "sha256": sha256(folder / "tokenizer.json")}
    write_json(folder / "corpus.json", record | {"fingerprint": fingerprint(record)})


def test_a_store_of_a_billion_tokens_opens_at_once(tmp_path, tiny_store):
    write_store(tmp_path / "large", tiny_store, 1_100_000_000)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        store = TokenStore.open(tmp_path / "large")
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    store.verify()
    whole = time.perf_counter() - start
    index = np.random.default_rng(0).integers(store.num_sequences("train", 1024)[0], size=32)
    store.sequences("train", 0, index, 1024)
    reads = []
    for _ in range(200):
        start = time.perf_counter()
        store.sequences("train", 0, index, 1024)
        reads.append(time.perf_counter() - start)
    shards = sum(len(entry["splits"][split]["shards"]) for entry in store.record["domains"] for split in SPLITS)
    tokens = sum(store.sizes_tokens("train"))
    say(f"\n{tokens:,} train tokens in {shards} shards: first opening {seconds[0] * 1e3:.1f} ms,")
    say(f"later ones {statistics.median(seconds[1:]) * 1e3:.1f} ms, verifying all {whole:.1f} s;")
    say(f"32 x 1,024 tokens read in {statistics.median(reads) * 1e6:.0f} us")
    shutil.rmtree(tmp_path)
    assert seconds[0] < 1
