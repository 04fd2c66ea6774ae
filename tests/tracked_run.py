"""A toy run that is tracked, killed, stopped and resumed, and what a service must show of it."""

import os
import signal
from functools import partial

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.experiments.run.loop import Saving, run_mixer
from acodm_env.experiments.run.preemption import Preempted
from acodm_env.experiments.run.tracking import evaluation_values, step_values, tracked
from toy import ToyTrainer

BEST = (0.6, 0.3, 0.1)
DOMAINS = ["domain0", "domain1", "web (en)"]


class Crash(Exception):
    """What ends a run, though not its process."""


def run(path, track, *, stop=lambda: False, adapt=False, **changes):
    config = {"domains": DOMAINS, "mixer": "odm-released", "seed": 0, "name": "odm", "nested": {"a": [1]}, "no": None}
    folder = RunFolder(path, config | changes, adapt=adapt)
    with tracked(folder, track):
        run_mixer(
            folder,
            ToyTrainer(BEST),
            make_mixer("odm-released"),
            seed=0,
            evaluations=5,
            saving=Saving(every=3, stop=stop, adapt=adapt),
        )
    return folder


def lines_of(path):
    file = path / "stats.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def stopped(path, track, step, **changes):
    """SIGTERM after `step` steps: saved there."""
    with pytest.raises(Preempted):
        run(path, track, stop=lambda: lines_of(path) >= step, **changes)


def killed(path, track, step, **changes):
    """An error after `step` steps: services end well; the run goes on from the checkpoint before, every third step."""

    def stop():
        if lines_of(path) >= step:
            raise Crash

    with pytest.raises(Crash):
        run(path, track, stop=stop, **changes)


def sigkilled(path, track, step):
    """SIGKILL after `step` steps, of this process: whatever a service has not received by then is lost."""

    def stop():
        if lines_of(path) >= step:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    run(path, track, stop=stop)


def expected(folder):
    """By key, the (step, value) pairs that the logs hold."""
    found = {}
    for lines, shown in (
        (folder.steps, partial(step_values, domains=DOMAINS)),
        (folder.evaluations, evaluation_values),
    ):
        for line in lines:
            for key, value in shown(line).items():
                found.setdefault(key, []).append((line.step, value))
    return found


def assert_shows(shown, folder, *, timing=True):
    """`shown` is by key a list of (step, value); services keep float32 or float64."""
    wanted = expected(folder)
    assert shown.keys() == wanted.keys()
    for key, pairs in wanted.items():
        assert [step for step, _ in shown[key]] == [step for step, _ in pairs], key
        if timing or not key.startswith("seconds/"):
            np.testing.assert_allclose([value for _, value in shown[key]], [value for _, value in pairs], rtol=1e-6)
