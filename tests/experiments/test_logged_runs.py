"""`acodm fit-surrogate --from-run`: a surface from logs of its own making, and logs that are not what they must be."""

import json
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.errors import AcodmError, ConfigError
from acodm_env.experiments import cli
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.experiments.run.loop import run_mixer
from acodm_env.experiments.surrogate.logged_runs import Logs, split
from acodm_env.files import write_json
from acodm_env.laws import PowerLaw
from acodm_env.surrogate.surface import Surface
from acodm_env.surrogate.trainer import SurrogateTrainer

HELPS = np.array([[1.0, 4.0, 0.5], [0.5, 2.0, 2.0]])  # e^a_ij (M, K)


def fit(*arguments):
    """Run the command in this process; returns the exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit-surrogate", *map(str, arguments)])
    return stop.value.code


class Logged(SurrogateTrainer):
    """Has a learning rate and always losses, as the language model's logs do."""

    def step(self, weights, loss_weights=None):
        self.measure = frozenset({"losses"})
        return replace(super().step(weights, loss_weights), lr=0.1)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Folders of 13 finished surrogate runs: nine static mixtures, one of them twice, and uniform three times."""
    root = tmp_path_factory.mktemp("logged")
    surface = Surface(
        domains=("a", "b", "c"),
        targets=("a", "b"),
        law=PowerLaw(np.log(HELPS), np.log([2.0, 1.0]), np.log([0.5, 1.0]), np.array([1.0, 2.0])),
        sizes_tokens=(5000.0, 1e6, 1e6),
        run_tokens=3200.0,
        sequence_length=10,
        initial_loss_nats=6.0,
        forgetting=(0.5, 0.5, 0.5),
        noise_nats=0.2,
    )
    mixtures = np.random.default_rng(5).dirichlet(np.ones(3), 9)
    config = {"domains": ["a", "b", "c"], "targets": ["a", "b"], "steps": 20, "batch_size": 16, "sequence_length": 10}
    drivers = {f"s{i}": {"weights": dict(zip("abc", row, strict=True))} for i, row in enumerate(mixtures)}
    for name, seed in [*((name, 0) for name in drivers), ("s8", 1), *(("uniform", seed) for seed in range(3))]:
        mixer = make_mixer("uniform") if name == "uniform" else make_mixer("static", **drivers[name])
        folder = RunFolder(root / name / f"seed{seed}", {**config, "mixer": name, "seed": seed})
        trainer = Logged(surface, horizon=20)
        run_mixer(folder, trainer, mixer, seed=seed, evaluations=5)
        write_json(folder.path / "result.json", {})
    return root


def test_a_surface_from_logs(logged, tmp_path, capsys):
    out = tmp_path / "surface.json"
    assert fit("--from-run", logged, "--out", out, "--quiet") == 0
    surface = Surface.load(out)
    assert surface.run_tokens == 3200.0
    assert surface.initial_loss_nats == pytest.approx(6.0)
    assert surface.sizes_tokens == pytest.approx((5000.0, 1e6, 1e6), rel=1e-3)
    assert surface.noise_nats == pytest.approx(0.2, rel=0.3)  # 20 steps: the fall shows
    verdict = surface.provenance["calibration"]
    assert surface.provenance["held_out"] == "every fifth mixer: s4"
    assert (verdict["fitted_runs"], verdict["held_out_runs"]) == (12, 1)
    assert verdict["error_nats"]["surface"] < 0.05 < verdict["error_nats"]["uniform"]
    assert "/" not in surface.provenance["command"]
    printed = capsys.readouterr().out
    assert f"{verdict['error_at_end_nats']['surface']:.4f}" in printed
    assert "held out: every fifth mixer: s4 (1 runs; 12 fitted)" in printed


def test_runs_may_be_held_out_by_name(logged, tmp_path, capsys):
    out = tmp_path / "surface.json"
    fitted = [logged / f"s{i}" for i in range(2, 9)] + [logged / "uniform"]
    assert fit("--from-run", *fitted, "--held-out", logged / "s0", logged / "s1", "--out", out, "--quiet") == 0
    verdict = Surface.load(out).provenance["calibration"]
    assert (verdict["fitted_runs"], verdict["held_out_runs"]) == (11, 2)
    assert fit("--from-run", logged, "--held-out", logged / "s0", "--out", out, "--quiet") == 2
    assert "is one of --from-run too" in capsys.readouterr().err


def test_few_mixers_are_split_by_run(logged):
    courses = Logs([str(logged / "s8"), *(str(logged / f"s{i}") for i in range(3))]).courses
    fitted, held_out, words = split(courses)
    assert words == "every fifth run"
    assert [course.name for course in held_out] == [courses[4].name]
    assert len(fitted) == 4


def test_the_mean_of_a_mixer_is_held_out_with_it(logged):
    course = Logs([str(logged / "s0")]).courses[0]
    names = ("a", "b", "c", "d", "e", "mean-of:e", "uniform", "mean-of:a")
    fitted, held_out, words = split([replace(course, name=name, mixer=name) for name in names])
    assert [one.mixer for one in held_out] == ["e", "mean-of:e"]
    assert [one.mixer for one in fitted] == ["a", "b", "c", "d", "uniform", "mean-of:a"]
    assert words == "every fifth mixer: e"


def copy_of(run, path, edit):
    path.mkdir(parents=True)
    for name in ("config.json", "stats.jsonl", "eval.jsonl", "result.json"):
        (path / name).write_text((run / name).read_text())
    edit(path)
    return path


def change_schedule(path):
    record = json.loads((path / "config.json").read_text())
    record["config"]["steps"] = 40
    (path / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change_schedule, "must have steps=20 as the first run has; it has 40"),
        (lambda path: (path / "eval.jsonl").write_text("{"), "must hold a whole line"),
        (
            lambda path: (path / "stats.jsonl").write_text('{"step": 1, "diverged": false}\n'),
            "line 1: must be a whole line",
        ),
    ],
)
def test_bad_logs_are_refused(logged, tmp_path, edit, message):
    odd = copy_of(logged / "s0" / "seed0", tmp_path / "odd", edit)
    with pytest.raises(AcodmError, match=message):
        Logs([str(logged / "s1"), str(odd)])


def test_unfinished_runs_are_left_out(logged, tmp_path, capsys):
    odd = copy_of(logged / "s0" / "seed0", tmp_path / "odd", lambda path: (path / "result.json").unlink())
    assert len(Logs([str(logged / "s1"), str(odd)]).courses) == 1
    assert "left out 1 runs" in capsys.readouterr().err


def test_loss_weights_count_as_data(logged, tmp_path):
    def reweigh(path):
        lines = [json.loads(line) for line in (path / "stats.jsonl").read_text().splitlines()]
        for line in lines:
            line |= {"realised": [0.5, 0.25, 0.25], "loss_weights": [1, 2, 0]}
        (path / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    odd = copy_of(logged / "s0" / "seed0", tmp_path / "odd", reweigh)
    assert Logs([str(odd)]).courses[0].weights[3].tolist() == [0.5, 0.5, 0.0]


def test_the_initial_loss_must_come_from_somewhere(logged, tmp_path):
    def forget(path):
        (path / "eval.jsonl").write_text("\n".join((path / "eval.jsonl").read_text().splitlines()[1:]) + "\n")

    logs = Logs([str(copy_of(logged / "s0" / "seed0", tmp_path / "odd", forget))])
    with pytest.raises(ConfigError, match="initial_loss=None: must be given"):
        logs.setting(None, None)
    assert logs.setting(5.0, {"b": 7.0}).initial_loss_nats == 5.0
    assert logs.setting(5.0, {"b": 7.0}).sizes_tokens[1] == 7.0
