"""Every mixer of the registry: drives a run, restores exactly, costs little, is listed."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from general_policy import general

from acodm_env.agents import baselines
from acodm_env.agents.baselines import make_mixer, mixer_names, register_mixer
from acodm_env.agents.baselines.static import Uniform
from acodm_env.errors import ConfigError
from acodm_env.files import read_state, write_state
from acodm_env.pretrain.config import LMConfig
from acodm_env.pretrain.trainer import LMTrainer
from acodm_env.step_stats import StepStats
from acodm_env.trainer import RunResult, drive
from acodm_env.watching import held_out_curve, watched_steps
from log_lines import step_line
from toy import ToyTrainer

ROOT = Path(__file__).parents[3]
HORIZON = 120


@pytest.fixture(scope="module", autouse=True)
def policies(tmp_path_factory):
    """Where policies "come with the package" here: one that was never trained."""
    folder = tmp_path_factory.mktemp("policies")
    general(probe_sequences=None).save(folder / "generalist")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("acodm_env.policy.load.POLICIES", folder)
        yield folder


class FullToy(ToyTrainer):
    """The toy, with everything that a mixer may ask for."""

    provides = ToyTrainer.provides | {"excess", "loss_weights"}

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.info = replace(self.info, sizes_tokens=(100_000,) * self.info.num_domains)  # enough for any epoch cap

    def step(self, weights, loss_weights=None):
        stats = super().step(weights, loss_weights)
        return replace(stats, excess_losses=np.where(stats.counts > 0, 0.1 * stats.losses, np.nan))

    def evaluate(self, split):
        return np.full(len(self.info.targets), self.objective) + 0.1 * np.arange(len(self.info.targets))


def options_of(name, folder):
    """What the mixers want that say nothing without options."""
    if name == "static":
        return {"weights": [0.2, 0.3, 0.5]}
    if name == "schedule":
        domains = [{"domain0": a, "domain1": 0.3, "domain2": 0.7 - a} for a in (0.1, 0.6)]
        return {"points": [{"at": 0.0, "weights": domains[0]}, {"at": 0.5, "weights": domains[1]}]}
    if name in ("replay", "mean-of"):
        record = {"config": {"domains": ["domain0", "domain1", "domain2"]}, "versions": {}}
        (folder / "config.json").write_text(json.dumps(record))
        mixtures = [[0.2 + 0.1 * (i % 3), 0.3, 0.5 - 0.1 * (i % 3)] for i in range(9)]
        lines = [step_line(step, requested=mixture).record() for step, mixture in enumerate(mixtures, start=1)]
        (folder / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"run": str(folder)}
    if name == "policy":
        return {"policy": "generalist"}
    return {"max_epochs": 100.0} if name in ("unimax", "log-linear") else {}  # the toy's domains are small


def prepared(name, info, folder):
    """A mixer whose preparatory runs, if any, showed made-up but sensible losses."""
    mixer = make_mixer(name, **options_of(name, folder))
    rng, results = np.random.default_rng(1), {}
    for request in mixer.preparation(info):
        given = request.options.get("weights")
        mixture = (
            np.array(list(given.values())) if isinstance(given, dict) else rng.dirichlet(np.ones(info.num_domains))
        )
        final = 3.0 + 1 / (0.5 + mixture[: len(info.targets)])
        results[request.name] = RunResult(
            mixture=mixture,
            initial_losses=np.full(len(info.targets), 5.0),
            final_losses=final,
            **held_out_curve(request, {step: final + 1 / step for step in watched_steps(request)}, final),
        )
    if results:
        mixer.prepare(results)
    return mixer


@pytest.mark.parametrize("name", mixer_names())
def test_every_mixer_drives_a_trainer(name, tmp_path):
    trainer = FullToy((0.5, 0.3, 0.2), horizon=HORIZON, decision_every=2)
    mixer = prepared(name, trainer.info, tmp_path)
    assert mixer.name == name
    trainer.reset(np.random.default_rng(0))
    mixer.start(trainer.info)
    history = list(drive(trainer, mixer, HORIZON))
    assert len(history) == HORIZON
    for stats in history:
        assert stats.requested.sum() == pytest.approx(1.0)
        assert (stats.requested >= 0).all()
    moved = np.ptp([stats.effective for stats in history], axis=0).max()
    if not mixer.dynamic:
        assert moved == 0


@pytest.mark.parametrize("name", mixer_names())
def test_every_mixer_goes_on_exactly_from_its_state(name, tmp_path):
    """Saved in the middle, through a file, into a fresh mixer."""

    def run(stop):
        trainer = FullToy((0.5, 0.3, 0.2), horizon=HORIZON, decision_every=2)
        trainer.reset(np.random.default_rng(0))
        mixer = prepared(name, trainer.info, tmp_path)
        mixer.start(trainer.info)
        seen = []
        for stats in drive(trainer, mixer, stop or HORIZON):
            seen.append(np.array([mixer.weights(), *([w] if (w := mixer.loss_weights()) is not None else [])]))
            assert stats.step == len(seen)
        if stop:
            write_state(tmp_path / "state.safetensors", mixer.state_dict())
            mixer = prepared(name, trainer.info, tmp_path)
            mixer.start(trainer.info)
            mixer.load_state_dict(read_state(tmp_path / "state.safetensors"))
            for _ in drive(trainer, mixer, HORIZON - stop):
                seen.append(np.array([mixer.weights(), *([w] if (w := mixer.loss_weights()) is not None else [])]))
        return seen

    whole, resumed = run(0), run(54)
    assert len(whole) == len(resumed) == HORIZON
    for one, other in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", mixer_names())
def test_two_mixers_in_one_process_do_not_influence_each_other(name, tmp_path):
    def mixtures(beside):
        trainers = [FullToy((0.5, 0.3, 0.2), horizon=HORIZON, decision_every=2) for _ in range(1 + beside)]
        mixers = [prepared(name, trainer.info, tmp_path) for trainer in trainers]
        for seed, (trainer, mixer) in enumerate(zip(trainers, mixers, strict=True)):
            trainer.reset(np.random.default_rng(seed))
            mixer.start(trainer.info)
        runs = [drive(trainer, mixer, 40) for trainer, mixer in zip(trainers, mixers, strict=True)]
        return [steps[0].requested for steps in zip(*runs, strict=True)]

    np.testing.assert_array_equal(mixtures(0), mixtures(1))


class Grams:
    """Gradients whose Gram matrix is there already: forming it belongs to the probe."""

    def __init__(self, num_domains):
        half = np.random.default_rng(0).normal(size=(num_domains, 2 * num_domains))
        self.matrix = half @ half.T, np.ones(num_domains)

    def __add__(self, other):
        return self

    def gram(self):
        return self.matrix[0].copy(), self.matrix[1].copy()


def test_an_update_costs_at_most_a_hundredth_of_a_tiny_step(tiny_store, tmp_path, capsys):
    """K = 22, a run of 300 steps: mean seconds of `weights` + `update`, over a plain step of `tiny` at 16 × 128.

    `pytest -s -k hundredth tests/agents/baselines/test_registry.py` prints the table.
    """
    trainer = LMTrainer(LMConfig(model="tiny", batch_size=16, sequence_length=128, device="cpu"), tiny_store)
    trainer.reset(np.random.default_rng(0))
    uniform, seconds = np.full(3, 1 / 3), []
    for _ in range(12):
        started = time.perf_counter()
        trainer.step(uniform)
        seconds.append(time.perf_counter() - started)
    step = median(seconds[2:])
    ratios = {name: _update_seconds(name, tmp_path) / step for name in mixer_names() if name not in PLAYED}
    with capsys.disabled():
        lines = [f"{name:24} {ratio:.5f}" for name, ratio in sorted(ratios.items(), key=lambda item: -item[1])]
        if "-s" in sys.argv:
            print("\n".join(["", f"tiny step {step:.4f} s", *lines]))  # noqa: T201
    assert max(ratios.values()) <= 0.01, ratios


PLAYED = ("static", "schedule", "replay", "mean-of")
"""Given mixtures: their files name three domains."""


def _update_seconds(name, folder):
    toy = FullToy(tuple(np.full(22, 1 / 22)), horizon=300, decision_every=5)
    mixer = prepared(name, toy.info, folder)
    toy.reset(np.random.default_rng(0))
    mixer.start(toy.info)
    gradients, rng, best = Grams(22), np.random.default_rng(0), np.inf
    for _ in range(2):
        mixer.start(toy.info)
        toy.reset(np.random.default_rng(0))
        spent = 0.0
        for index in range(300):
            started = time.perf_counter()
            weights = mixer.weights()
            spent += time.perf_counter() - started
            stats: StepStats = toy.step(weights)
            noisy = stats.losses * (1 + 0.01 * rng.normal(size=22)) * (index + 5.0) ** -0.1
            stats = replace(stats, losses=noisy, gradients=gradients, eval_losses=noisy)
            started = time.perf_counter()
            mixer.update(stats)
            spent += time.perf_counter() - started
        best = min(best, spent / 300)
    return best


def test_every_name_of_the_issue_is_there():
    names = {"uniform", "proportional", "static", "schedule", "replay", "mean-of", "temperature", "unimax", "odm-paper"}
    names |= {"odm-released", "odm-paper-rescaled", "odm-released-rescaled", "exp3", "exp3-classical", "softmax-loss"}
    names |= {"doremi", "sheared-llama", "skill-it", "aioli", "doge", "eg-interaction", "pike", "ado", "regmix"}
    names |= {"target-share", "marginal-value", "pilot", "generalist", "policy"}
    assert names | {"mixing-law", "power-law", "log-linear"} <= set(mixer_names())


def test_every_name_is_in_the_docs():
    text = (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")
    assert [name for name in mixer_names() if f"`{name}`" not in text] == []


def test_unknown_mixer_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"mixer='odm-relased'.*did you mean 'odm-released'"):
        make_mixer("odm-relased")


def test_unknown_option_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"mixer=uniform, smoothing=0\.5: "):
        make_mixer("uniform", smoothing=0.5)


def test_a_registered_mixer_is_made_by_name(monkeypatch):
    monkeypatch.setattr(baselines, "_registered", {})
    register_mixer("mine", Uniform)
    assert isinstance(make_mixer("mine"), Uniform)
    assert make_mixer("mine").name == "mine"
    assert Uniform.name == "uniform"
    for taken in ("mine", "doremi"):
        with pytest.raises(ConfigError, match=rf"{taken}.*already registered"):
            register_mixer(taken, Uniform)


def test_importing_the_baselines_imports_neither_torch_nor_sb3():
    code = (
        "import sys, acodm_env.agents.baselines\n"
        "print([m for m in ('torch', 'stable_baselines3', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
