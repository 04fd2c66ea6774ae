import json
import math

import pytest

from acodm_env.experiments import cli


def demo(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--recipe", "smoke", *map(str, arguments)])
    return stop.value.code


@pytest.fixture(scope="module")
def finished(tiny_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert demo("--corpus", tiny_corpus, "--out", out, "--quiet") == 0
    return out


def test_result_has_the_stable_names(finished):
    result = json.loads((finished / "result.json").read_text())
    assert result["reference"] == "odm-released"
    assert set(result["mixers"]) == {"policy", "policy-untrained", "odm-released", "odm-paper", "uniform"}
    for mixer in result["mixers"].values():
        assert math.isfinite(mixer["mean_loss_nats"])
        assert mixer["mean_perplexity"] > 1
        assert len(mixer["domain_loss_nats"]) == 3
        assert mixer["seconds_per_step"] > 0
        assert "steps_to_reference_ratio" in mixer
    assert result["mixers"]["odm-released"]["steps_to_reference_ratio"] == 1.0
    assert result["learning"]["transitions"] == 8
    assert result["learning"]["tokens"] == (2 + 2) * 12 * 6 * 32  # two episodes, two evaluations
    assert result["learning"].keys() == {"tokens", "seconds", "episodes", "transitions"}
    assert len(result["corpus_fingerprint"]) == 64
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")


def test_every_mixer_starts_from_the_same_model(finished):
    first = [
        json.loads((finished / "target" / name / "eval.jsonl").read_text().splitlines()[0])["losses"]
        for name in ("policy", "policy-untrained", "odm-released", "odm-paper", "uniform")
    ]
    assert all(losses == first[0] for losses in first)


def test_the_learned_actor_differs_from_its_untrained_control(finished):
    learned = (finished / "policy" / "policy.safetensors").read_bytes()
    untrained = (finished / "policy-untrained" / "policy.safetensors").read_bytes()
    assert learned != untrained
    contracts = [json.loads((finished / name / "policy.json").read_text()) for name in ("policy", "policy-untrained")]
    assert contracts[0]["domains"] == contracts[1]["domains"]


def test_second_run_reprints_without_training(finished, tiny_corpus, capsys):
    before = (finished / "result.json").stat().st_mtime_ns
    assert demo("--corpus", tiny_corpus, "--out", finished) == 0
    out = capsys.readouterr().out
    assert "policy-untrained" in out
    assert "learning the policy" in out
    assert any(word in out for word in ("LOSES to", "cannot be told apart from", "beats"))
    assert (finished / "result.json").stat().st_mtime_ns == before


def test_interrupted_demo_goes_on_to_the_same_result(finished, tiny_corpus, tmp_path, monkeypatch):
    from acodm_env.experiments import transfer

    run_mixer, started = transfer.run_mixer, []

    def interrupt(*arguments, **options):
        started.append(1)
        if len(started) == 3:
            raise KeyboardInterrupt
        run_mixer(*arguments, **options)

    monkeypatch.setattr(transfer, "run_mixer", interrupt)
    assert demo("--corpus", tiny_corpus, "--out", tmp_path / "demo", "--quiet") == 1
    monkeypatch.undo()
    assert demo("--corpus", tiny_corpus, "--out", tmp_path / "demo", "--quiet") == 0
    whole, cut = (json.loads((folder / "result.json").read_text()) for folder in (finished, tmp_path / "demo"))
    for result in (whole, cut):
        for mixer in result["mixers"].values():
            mixer.pop("seconds_per_step")
    assert whole["mixers"] == cut["mixers"]


def test_folder_of_something_else_is_refused(tiny_corpus, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert demo("--corpus", tiny_corpus, "--out", tmp_path, "--fresh") == 2
    assert "already holds other files" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"
