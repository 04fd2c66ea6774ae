import json
from dataclasses import replace

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.run import results
from acodm_env.experiments.run.folder import RunFolder, open_run
from acodm_env.experiments.run.loop import run_mixer
from acodm_env.experiments.run.mixture import interleave_call
from toy import ToyTrainer


def finished(path, best=(0.6, 0.3, 0.1), name="uniform", horizon=20):
    trainer = ToyTrainer(best, horizon=horizon)
    folder = RunFolder(path, {"domains": list(trainer.info.domains), "mixer": name})
    run_mixer(folder, trainer, make_mixer(name), seed=0, evaluations=10)
    return folder


def test_first_crossing_is_log_linear_between_evaluations():
    steps, perplexity = np.array([0.0, 10.0, 20.0]), np.array([400.0, 100.0, 25.0])
    assert results.first_crossing(steps, perplexity, 50.0) == pytest.approx(15.0)  # halfway in the logarithm
    assert results.first_crossing(steps, perplexity, 100.0) == pytest.approx(10.0)
    assert results.first_crossing(steps, perplexity, 500.0) == 0.0
    assert results.first_crossing(steps, perplexity, 20.0) is None


def test_the_reference_has_ratio_one_and_a_slower_run_null_or_more(tmp_path):
    reference = finished(tmp_path / "a", best=(1 / 3, 1 / 3, 1 / 3))  # falls by 0.1 a step
    slower = finished(tmp_path / "b", best=(1.0, 0.0, 0.0))  # falls by 0.0333 a step
    result = results.mixer_result(reference, reference)
    assert result["steps_to_reference_ratio"] == 1.0
    assert result["mean_loss_nats"] == pytest.approx(3.0)
    assert result["mean_perplexity"] == pytest.approx(np.exp(3.0))
    assert result["domain_loss_nats"].keys() == {"domain0", "domain1", "domain2"}
    assert results.mixer_result(slower, reference)["steps_to_reference_ratio"] is None
    assert results.mixer_result(reference, slower)["steps_to_reference_ratio"] == pytest.approx(1 / 3)


def test_mean_perplexity_is_the_mean_of_exponentials():
    assert results.mean_perplexity(np.log([[2.0, 8.0]])) == pytest.approx(5.0)


def test_picture_shows_every_run(tmp_path):
    runs = {name: finished(tmp_path / name, name=name) for name in ("uniform", "odm-released")}
    results.draw(runs, tmp_path / "report.png", "toy")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.png").stat().st_size > 20_000


def test_interrupted_run_resumes_to_the_same_lines(tmp_path):
    whole = finished(tmp_path / "whole", name="odm-released")

    class Killed(Exception):
        pass

    def kill(stats):
        if stats.step == 13:
            raise Killed

    config = {"domains": ["domain0", "domain1", "domain2"], "mixer": "odm-released"}
    cut = RunFolder(tmp_path / "cut", config)
    with pytest.raises(Killed):
        run_mixer(cut, ToyTrainer((0.6, 0.3, 0.1)), make_mixer("odm-released"), seed=0, evaluations=10, on_step=kill)
    again = RunFolder(tmp_path / "cut", config)
    run_mixer(again, ToyTrainer((0.6, 0.3, 0.1)), make_mixer("odm-released"), seed=0, evaluations=10)
    untimed = {"seconds": 0.0}  # time is recorded, never compared
    assert [replace(line, **untimed) for line in again.evaluations] == [
        replace(line, **untimed) for line in whole.evaluations
    ]
    untimed |= {"seconds_by_part": {}}
    assert [replace(line, **untimed) for line in again.steps] == [replace(line, **untimed) for line in whole.steps]


def test_folder_of_another_run_is_refused(tmp_path):
    finished(tmp_path / "run")
    with pytest.raises(DataError, match=r"another run \(mixer='uniform' there, 'exp3' now\)"):
        RunFolder(tmp_path / "run", {"domains": ["domain0", "domain1", "domain2"], "mixer": "exp3"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="already holds other files"):
        RunFolder(tmp_path / "other", {})
    with pytest.raises(ConfigError, match=r"no config\.json"):
        open_run(tmp_path / "other")


def test_config_records_versions_before_the_first_step(tmp_path):
    RunFolder(tmp_path / "run", {"a": 1})
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"] == {"a": 1}
    assert "torch" in record["versions"]


def test_time_averaged_mixture_and_interleave_probabilities_sum_to_one(tmp_path):
    folder = finished(tmp_path / "run")
    mixtures = results.time_averaged(folder)
    assert mixtures["time_averaged"]["domain1"] == pytest.approx(1 / 3)
    call = interleave_call(mixtures["final"], seed=3)
    scope = {}
    source = call.replace("datasets.interleave_datasets", "dict").replace("(\n    [", "(\n    names=[")
    exec(f"result = {source}", {"by_domain": {f"domain{i}": i for i in range(3)}}, scope)
    assert sum(scope["result"]["probabilities"]) == 1.0
    assert scope["result"]["seed"] == 3
