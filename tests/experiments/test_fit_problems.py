"""`acodm fit-surrogate --problems`: parameters from logs of known problems, and logs that do not belong together."""

import json
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.errors import AcodmError
from acodm_env.experiments import cli
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.experiments.run.loop import Saving, run_mixer
from acodm_env.experiments.surrogate.logged_problems import ProblemLogs
from acodm_env.surrogate.calibrated import Calibrated
from acodm_env.surrogate.problem_trainer import ProblemTrainer
from acodm_env.surrogate.problems import INITIAL_NATS

NAMES, STEPS = ("a", "b", "c"), 20
PER_DOMAIN = ("requested", "realised", "counts", "loss_tokens", "losses", "epochs", "drawn")


def fit(*arguments):
    """Run the command in this process; returns the exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit-surrogate", *map(str, arguments)])
    return stop.value.code


class Logged(ProblemTrainer):
    """Names what it trains on as the run does, and has fewer domains than the surface where the run has."""

    def __init__(self, surface, domains, sizes):
        self.kept = [surface.domains.index(name) for name in domains]
        trainable = np.isin(np.arange(3), self.kept).astype(float)
        super().__init__(surface.problems(trainable[None], sizes[None]), horizon=STEPS, noise=0)
        self.names = tuple(domains)

    def _describe(self):
        info = super()._describe()
        return info if not hasattr(self, "names") else replace(info, domains=self.names, targets=NAMES, objective=())

    def step(self, weights, loss_weights=None):
        full = np.zeros(3)
        full[self.kept] = weights
        shown, self.info = self.info, replace(self.info, domains=NAMES)
        stats = super().step(full)
        self.info = shown
        part = {name: getattr(stats, name)[self.kept] for name in PER_DOMAIN}
        return replace(stats, **part, lr=0.1)


SURFACE = Calibrated(
    domains=NAMES,
    initial_loss_nats=INITIAL_NATS,
    measured=np.ones(3, dtype=bool),
    exponents=np.array([0.3, 0.5, 0.6]),
    gains=np.array([1.2, 1.2, 0.4]),
    floors=np.array([3.0, 2.0, 4.0]),
    start=np.array([0.003, 0.03, 0.01]),
    transfer=np.array([[1.0, 0.2, 0.0], [0.0, 1.0, 0.0], [0.3, 0.0, 1.0]]),
    recency=np.array([0.1, 0.3, 0.2]),
    repetition=10.0,
    overfit=0.8,
    overfit_power=1.5,
    favour=0.2,
    memory=0.3,
    fall=0.3,
)


def log_run(path, mixer, cut=None, domains=NAMES, seed=0):
    """A finished run's folder, as a benchmark writes it."""
    sizes = np.array([0.6 if cut is None or name not in cut else cut[name] / (STEPS * 16) for name in NAMES])
    config = {"corpus": "toy", "domains": list(domains), "targets": list(NAMES), "model": "tiny", "steps": STEPS}
    config |= {"corpus_fingerprint": f"{domains}{cut}", "batch_size": 16, "sequence_length": 128, "mixer": mixer.name}
    folder = RunFolder(path, {**config, "seed": seed, **({"cut": cut} if cut else {})})
    run_mixer(folder, Logged(SURFACE, domains, sizes), mixer, seed=seed, evaluations=5, saving=Saving(every=1000))
    (path / "result.json").write_text("{}")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Three tasks: the whole corpus, one domain cut, and one not trained on; static and moving mixtures."""
    root = tmp_path_factory.mktemp("suite")
    rng = np.random.default_rng(3)
    tasks = {"whole": (None, NAMES), "scarce": ({"b": 12}, NAMES), "narrow": (None, NAMES[:2])}
    for task, (cut, domains) in tasks.items():
        for index in range(9 if task != "narrow" else 4):
            weights = dict(zip(domains, rng.dirichlet(np.ones(len(domains))).tolist(), strict=True))
            mixer = make_mixer("static", weights=weights)
            mixer.name = f"s{index}"
            log_run(root / task / "cells" / f"s{index}", mixer, cut, domains)
        log_run(root / task / "cells" / "odm", make_mixer("odm-released"), cut, domains)
    return root


def test_logged_problems_are_fitted_and_held_out_runs_predicted(suite, tmp_path, capsys):
    out = tmp_path / "problem.json"
    assert fit("--problems", suite, "--out", out) == 0
    written = json.loads(out.read_text())
    report = written["calibration"]
    assert report["rmse_nats"]["surface"]["end"] < 0.1 < 2 * 0.1 < report["rmse_nats"]["mean_of_runs"]["end"]
    assert report["spearman"]["target"] > 0.9
    assert [part["held_out_runs"] + part["fitted_runs"] for part in report["parts"]] == [25, 25, 25]
    assert sum(part["held_out_runs"] for part in report["parts"]) == 25
    assert {group["group"] for group in report["residuals"] if group["by"] == "problem"} == {
        "whole", "b cut to 12", "without c",
    }  # fmt: skip
    assert written["family"]["repetition"]["range"] == [6.0, 25.0]
    assert "/" not in written["provenance"]["command"]
    surface = Calibrated.load(out)
    assert surface.slopes == pytest.approx(SURFACE.slopes, abs=0.06)
    printed = capsys.readouterr().out
    assert "held out: each third of 25 runs in turn" in printed
    assert f"{report['rmse_nats']['surface']['end']:.4f}" in printed


def test_runs_may_be_held_out_by_name(suite, tmp_path, capsys):
    out = tmp_path / "problem.json"
    assert fit("--problems", suite, "--held-out", suite / "narrow", "--out", out, "--quiet") == 0
    report = json.loads(out.read_text())["calibration"]
    assert [(part["fitted_runs"], part["held_out_runs"]) for part in report["parts"]] == [(20, 5)]
    assert "held out: 5 runs of --held-out" in capsys.readouterr().out
    assert fit("--problems", suite / "whole", "--held-out", suite / "narrow", "--out", out) == 2
    assert "must be the folder of some of the 10 runs of --problems" in capsys.readouterr().err
    assert fit("--problems", suite / "whole", "--out", out, "--quiet") == 2
    assert "must leave at least 10 to fit" in capsys.readouterr().err


def test_sizes_and_what_cannot_be_trained_on_come_from_the_logs(suite):
    logs = ProblemLogs([str(suite)])
    assert logs.initial == pytest.approx(INITIAL_NATS, abs=0.1)
    records = {record.name.removeprefix(str(suite)): record for record in logs.records}
    assert records["/scarce/cells/s0"].sizes == pytest.approx([0.6, 12 / (STEPS * 16), 0.6], rel=1e-3)
    assert records["/narrow/cells/s0"].trainable.tolist() == [1, 1, 0]
    assert records["/narrow/cells/s0"].sizes[2] == records["/narrow/cells/s0"].drawn[:, 2].max() == 0
    assert records["/whole/cells/s0"].drawn[-1].sum() == pytest.approx(1)
    assert not records["/whole/cells/s0"].moves


def edited(run, path, **changes):
    """A copy of a run with other settings."""
    path.mkdir(parents=True)
    for name in ("config.json", "stats.jsonl", "eval.jsonl", "result.json"):
        (path / name).write_text((run / name).read_text())
    record = json.loads((path / "config.json").read_text())
    record["config"] |= changes
    (path / "config.json").write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "another"}, "must have corpus='toy' as the first run has; it has 'another'; fit them apart"),
        ({"steps": 40}, "must have steps=20"),
        ({"model": "small"}, "must have model='tiny'"),
        ({"corpus_fingerprint": "0" * 64}, "it is of 000000000000…: the corpus was prepared anew"),
        ({"domains": ["a", "b"]}, "lack what a fit needs"),
        ({"cut": {"d": 3}}, "cut of domain='d'"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(suite, tmp_path, changes, message):
    odd = edited(suite / "whole/cells/s0", tmp_path / "odd", **changes)
    with pytest.raises(AcodmError, match=message):
        ProblemLogs([str(suite / "whole"), str(odd)])


def test_copies_count_once(suite, tmp_path, capsys):
    edited(suite / "whole/cells/s0", tmp_path / "copy")
    assert len(ProblemLogs([str(suite / "whole"), str(tmp_path)]).records) == 10
    assert "left out 1 copies of other runs" in capsys.readouterr().err


def test_damaged_runs_are_refused(suite, tmp_path, capsys):
    odd = edited(suite / "whole/cells/s0", tmp_path / "odd")
    assert fit("--problems", odd, "--out", tmp_path / "p.json") == 2
    assert "runs=1: must be at least 10 to fit" in capsys.readouterr().err
    lines = (odd / "eval.jsonl").read_text().splitlines()
    (odd / "eval.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(AcodmError, match="must be evaluated after its last step, 20; it was after 16"):
        ProblemLogs([str(odd)])
    (odd / "eval.jsonl").write_text(lines[0][:20])
    with pytest.raises(AcodmError, match="must hold a whole line"):
        ProblemLogs([str(odd)])
    (odd / "eval.jsonl").unlink()
    with pytest.raises(AcodmError, match=r"must have eval\.jsonl, its held-out losses"):
        ProblemLogs([str(odd)])
    with pytest.raises(AcodmError, match="must hold at least one finished"):
        ProblemLogs([str(tmp_path)])


def test_one_source_of_runs(tmp_path, capsys):
    assert fit("--problems", tmp_path, "--from-run", tmp_path) == 2
    assert "give exactly one of them" in capsys.readouterr().err
    assert fit("--problems", tmp_path, "--sizes", "a=3") == 2
    assert "the logs of --problems say it" in capsys.readouterr().err
