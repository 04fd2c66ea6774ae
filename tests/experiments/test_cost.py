import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from acodm_env.agents.baselines import make_mixer
from acodm_env.experiments.run.accounting import cost, peak_flops, peak_memory_bytes, run_cost, utilisation
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.experiments.run.loop import run_mixer
from acodm_env.run_log import EvaluationLine
from log_lines import step_line
from toy import ToyTrainer

PARTS = {"data": 0.01, "train": 0.4, "probe": 0.02, "decision": 0.03}
STEP = {"seconds": 0.5, "seconds_by_part": PARTS}
LINES = [step_line(step, **STEP) for step in (1, 2)]
EVALUATIONS = [
    EvaluationLine(step=step, losses=[], targets=[], seconds=seconds) for step, seconds in ((0, 0.25), (2, 0.5))
]


def test_cost_sums_the_logs_of_a_run():
    found = cost(LINES, EVALUATIONS, flops_per_token=6e6, memory=1234)
    assert found["tokens"] == 200
    assert found["flops"] == 200 * 6e6
    seconds = {"data": 0.02, "train": 0.8, "probe": 0.04, "decision": 0.06, "validation": 0.0, "evaluation": 0.75}
    assert found["seconds"] == pytest.approx(seconds)
    assert found["tokens_per_second"] == pytest.approx(200.0)  # 200 tokens in two steps of 0.5 s
    assert found["overhead_frac"] == pytest.approx(0.12 / 0.8)
    assert found["peak_memory_bytes"] == 1234
    assert (found["mfu"], found["mfu_unknown"]) == (None, "no peak is known for a CPU")


def test_rates_are_those_of_the_lines_that_were_kept():
    """A log that begins at step 8, as it does after domains were added: 2 of 9 steps, in 1 s."""
    kept = [step_line(step, **STEP) for step in (8, 9)]
    found = cost(kept, [], flops_per_token=989.4e12 / 200, device_name="NVIDIA H200", precision="bf16")
    assert found["tokens"] == 900
    assert found["flops"] == pytest.approx(900 * 989.4e12 / 200)
    assert found["tokens_per_second"] == pytest.approx(200.0)
    assert found["mfu"] == pytest.approx(1.0)


def test_evaluations_that_a_mixer_asks_for_are_overhead(tmp_path):
    class Asking(type(make_mixer("uniform"))):
        needs = frozenset({"losses", "validation"})

        def due(self, step):
            return step % 5 == 0

    class Slow(ToyTrainer):
        def evaluate(self, split):
            time.sleep(0.02 if split == "validation" else 0)
            return super().evaluate(split)

    trainer = Slow((0.6, 0.3, 0.1))
    folder = RunFolder(tmp_path, {"domains": list(trainer.info.domains), "mixer": "asking"})
    run_mixer(folder, trainer, Asking(), seed=0, evaluations=4)
    lines = folder.steps
    assert [line.step for line in lines if "validation" in line.seconds_by_part] == [5, 10, 15, 20]
    assert all(line.seconds > line.seconds_by_part["validation"] >= 0.02 for line in lines[4::5])
    assert run_cost(folder, trainer)["seconds"]["validation"] >= 4 * 0.02
    line = step_line(seconds=0.5, seconds_by_part={**PARTS, "validation": 0.1})
    assert cost([line], [], flops_per_token=1.0)["overhead_frac"] == pytest.approx((0.06 + 0.1) / 0.4)


def test_utilisation_is_of_all_devices_together():
    h100 = {"device_name": "NVIDIA H100 80GB HBM3", "precision": "bf16"}
    found = cost(LINES, EVALUATIONS, flops_per_token=989.4e12 / 200, devices=2, **h100)
    assert found["mfu"] == pytest.approx(0.5)  # 200 tokens/s use one device's peak, and there are two
    assert found["mfu_unknown"] is None


def test_what_was_not_logged_is_null_not_zero():
    old = [step_line(seconds=0.5)]
    found = cost(old, [EvaluationLine(step=0, losses=[], targets=[])], flops_per_token=1.0)
    assert found["seconds"] == dict.fromkeys(("data", "train", "probe", "decision", "evaluation")) | {"validation": 0.0}
    assert found["overhead_frac"] is None
    assert found["tokens_per_second"] == 200.0
    partly = cost([LINES[0], *old], EVALUATIONS, flops_per_token=1.0)  # resumed by a version that logs more
    assert partly["seconds"]["train"] is None
    assert cost([], [], flops_per_token=1.0)["tokens_per_second"] is None


def test_peaks_are_the_named_devices_own():
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 PCIe") == 756.5e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == peak_flops("NVIDIA GH200 480GB")
    assert peak_flops("NVIDIA L40S") == 2 * 181.025e12
    assert peak_flops("NVIDIA A10") is None  # no A100
    assert utilisation(1e12, "Tesla T4", "bf16") == (None, "no peak is known for Tesla T4")
    assert utilisation(1e12, "NVIDIA H200", "fp32")[0] is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_peak_memory_of_a_cpu_is_the_most_that_was_resident():
    held = np.ones(64 * 2**20)  # 512 MiB
    during = peak_memory_bytes(torch.device("cpu"))
    del held
    after = peak_memory_bytes(torch.device("cpu"))
    assert during >= 512 * 2**20
    assert after == pytest.approx(during, rel=0.01)  # the kernel counts pages in lots


def finished(path):
    trainer = ToyTrainer((0.6, 0.3, 0.1))
    folder = RunFolder(path, {"domains": list(trainer.info.domains), "mixer": "uniform"})
    run_mixer(folder, trainer, make_mixer("uniform"), seed=0, evaluations=4)
    return folder, trainer


def test_cost_of_a_run_folder(tmp_path):
    folder, trainer = finished(tmp_path / "run")
    found = run_cost(folder, trainer)
    assert found["tokens"] == 20 * 50
    assert found["tokens_per_second"] > 0
    assert found["peak_memory_bytes"] is None  # a toy has no device
    assert json.loads(json.dumps(found, allow_nan=False)) == found
