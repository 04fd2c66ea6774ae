import json

import numpy as np
import pytest

from acodm_env.errors import ConfigError
from acodm_env.experiments.overhead import command as overhead
from acodm_env.experiments.overhead import throughput
from acodm_env.experiments.overhead.command import OverheadConfig
from acodm_env.experiments.overhead.throughput import Window

SIZES = {"model": "tiny", "batch_size": 6, "sequence_length": 16, "num_domains": 3, "decision_every": 2, "rounds": 1}
SETTINGS = {
    "model": "tiny",
    "batch_size": 6,
    "sequence_length": 32,
    "decision_every": 2,
    "horizon": 20,
    "device": "cpu",
}


def variant(name, store, **changes):
    return throughput.make_variant(name, SETTINGS | changes, store, sketch_size=8, seed=0)


def test_k_backward_passes_make_the_plain_step(tiny_store):
    plain, rival = (variant(name, tiny_store) for name in ("plain", "k_backward"))
    for _ in range(2):  # both at the peak learning rate, for the rival has no schedule
        one, other = plain.step(), rival.step()
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)


def test_a_window_is_one_decision_and_tells_its_seconds_apart(tiny_store):
    probed = variant("probed", tiny_store)
    before = probed.mixer.weights().copy()
    window = probed.window()
    assert probed.trainer.steps_done == 2
    assert not np.array_equal(probed.mixer.weights(), before)
    assert {"data", "train", "probe", "decision", "gram"} <= window.parts.keys()
    inside = sum(seconds for part, seconds in window.parts.items() if part != "gram")
    assert 0.5 * window.seconds < inside <= window.seconds
    assert variant("sketched", tiny_store).window().parts["gram"] > 0
    assert "gram" not in variant("plain", tiny_store).window().parts


def test_summary_by_hand():
    about = {
        "decision_every": 2, "batch_size": 4, "sequence_length": 10, "flops_per_token": 989.4e12 / 80,
        "device_name": "NVIDIA H200", "precision": "bf16",
    }  # fmt: skip
    windows = {
        "plain": [Window(0.9, 1.0), Window(2.2, 1.0)],
        "plain_again": [Window(1.1, 1.0), Window(1.8, 1.0)],  # plain windows of 1 s and 2 s
        "probed": [Window(1.1, 1.02, {"data": 0.1, "decision": 0.2, "gram": 0.1}) for _ in range(2)],
        "sketched": [Window(1.0, 1.0), Window(2.0, 1.0)],
        "k_backward": [Window(3.0, 4.0), Window(8.0, 4.0)],
    }
    found = overhead.summarise(about, windows)
    assert found["a_over_a"] == pytest.approx((0.9 / 1.1 + 2.2 / 1.8) / 2)
    assert found["probed_over_plain"] == pytest.approx((1.1 + 0.55) / 2)
    assert found["beyond_plain_frac"] == pytest.approx((1.1 + 0.55) / 2 - 1)
    assert found["k_backward_over_plain"] == pytest.approx(3.5)
    assert found["quartiles"]["k_backward_over_plain"] == pytest.approx([3.25, 3.75])
    assert found["probed_over_plain_cpu"] == pytest.approx(1.02)
    assert found["k_backward_over_plain_cpu"] == pytest.approx(4.0)
    assert found["sampling_over_plain"] == pytest.approx((0.1 + 0.05) / 2)  # per step over a plain step
    assert found["decision_per_step_over_plain"] == pytest.approx((0.2 + 0.1) / 2)
    assert found["decision_over_plain"] == pytest.approx(0.3)  # 0.2 s against plain steps of 0.5 s and 1 s
    assert found["gram_over_plain"] == pytest.approx(0.15)
    assert found["plain_step_seconds"] == pytest.approx(0.75)
    assert found["tokens_per_second"]["plain"] == pytest.approx(60.0)  # 80 tokens in 1 s and in 2 s
    assert found["mfu"]["plain"] == pytest.approx(0.75)
    assert found["mfu"]["k_backward"] == pytest.approx((1 / 3 + 1 / 8) / 2)


def test_command_prints_every_variant_and_keeps_the_stable_names(tmp_path, capsys):
    overhead.run(OverheadConfig(**SIZES, memory=False, threads=1, out=str(tmp_path), quiet=True))
    result = json.loads((tmp_path / "overhead.json").read_text())
    names = ("a_over_a", "probed_over_plain", "sketched_over_plain", "k_backward_over_plain", "gram_over_plain")
    assert all(result[name] > 0 for name in (*names, "decision_over_plain", "sampling_over_plain", "probe_over_plain"))
    assert result["beyond_plain_frac"] == pytest.approx(result["probed_over_plain"] - 1)
    assert result["mfu"] == dict.fromkeys(throughput.VARIANTS)
    out = capsys.readouterr().out
    assert all(label in out for label in overhead.LABELS.values())
    assert "MFU: no peak is known for a CPU" in out
    assert "target at most 2.0%" in out


@pytest.mark.slow
def test_peak_memory_is_each_variants_own(tiny_store):
    settings = SETTINGS | {"model": "pythia-14m"}
    found = throughput.peak_memories(["plain", "probed"], 1, settings, str(tiny_store.path), 8, 0)
    # 6 groups × 3 layers × 128 × 512 float32, twice while a window is summed up
    assert 100 * 2**20 < found["plain"] < found["probed"] < found["plain"] + 200 * 2**20


def test_bad_sizes_are_refused():
    with pytest.raises(ConfigError, match="num_domains=1: must be at least 2"):
        OverheadConfig(num_domains=1)
    with pytest.raises(ConfigError, match="decision_every=0"):
        OverheadConfig(decision_every=0)
    with pytest.raises(ConfigError, match="threads=0"):
        OverheadConfig(threads=0)
