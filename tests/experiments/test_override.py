"""`weights.override.json`: what it does to a mixture, when it is read, what is said of a broken one."""

import json
import os

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.errors import ConfigError
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.experiments.run.loop import run_mixer
from acodm_env.experiments.run.override import FILE, OverriddenMixer, Override, WeightOverride
from acodm_env.experiments.run.results import mixer_result
from toy import ToyTrainer

DOMAINS = ("a", "b", "c", "d")
WANTED = np.array([0.4, 0.3, 0.2, 0.1])


def apply(weights=WANTED, **override):
    override = Override(**override)
    override.check(DOMAINS)
    return override.apply(np.asarray(weights, dtype=float), DOMAINS).tolist()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"pin": {"a": 0.1}}, [0.1, 0.45, 0.3, 0.15]),  # 0.9 shared as 3 : 2 : 1
        ({"pin": {"a": 0.1, "d": 0.5}}, [0.1, 0.24, 0.16, 0.5]),  # 0.4 shared as 3 : 2
        ({"pin": {"a": 0}}, [0.0, 0.5, 1 / 3, 1 / 6]),
        ({"pin": {"a": 1}}, [1, 0, 0, 0]),
        ({"pin": {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}}, [0.25] * 4),
        ({"cap": {"a": 0.1}}, [0.1, 0.45, 0.3, 0.15]),
        ({"cap": {"a": 0.1, "b": 0.4}}, [0.1, 0.4, 1 / 3, 1 / 6]),  # b's 0.45 is above its cap only after a's is taken
        ({"cap": {"a": 0.9}}, [0.4, 0.3, 0.2, 0.1]),
        ({"pin": {"b": 0.6}, "cap": {"b": 0.1, "a": 0.1}}, [0.1, 0.6, 0.2, 0.1]),  # a pin wins; 0.3 as 2 : 1
        ({}, [0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_pins_and_caps(override, expected):
    assert apply(**override) == pytest.approx(expected)


def test_what_the_mixer_wants_nothing_of_gets_what_nobody_else_can_take():
    assert apply([1, 0, 0, 0], pin={"a": 0.4}) == pytest.approx([0.4, 0.2, 0.2, 0.2])
    assert apply([0.5, 0.5, 0, 0], cap={"a": 0.2, "b": 0.2}) == pytest.approx([0.2, 0.2, 0.3, 0.3])


@pytest.mark.parametrize("seed", range(50))
def test_any_override_makes_a_mixture_that_keeps_to_it(seed):
    rng = np.random.default_rng(seed)
    pins = dict(zip(rng.choice(DOMAINS, 2, replace=False), rng.dirichlet(np.ones(3))[:2], strict=True))
    caps = {name: rng.uniform(0.5, 1) for name in rng.choice(DOMAINS, 3, replace=False)}
    wanted = rng.dirichlet(np.full(4, 0.3))
    got = dict(zip(DOMAINS, apply(wanted, pin=pins, cap=caps), strict=True))
    assert sum(got.values()) == pytest.approx(1)
    for name, share in got.items():
        assert share == pytest.approx(pins[name]) if name in pins else share <= caps.get(name, 1) + 1e-9
    loose = [n for n in DOMAINS if n not in pins and got[n] < caps.get(n, 1) - 1e-6 and wanted[DOMAINS.index(n)] > 1e-9]
    ratios = [got[name] / wanted[DOMAINS.index(name)] for name in loose]
    np.testing.assert_allclose(ratios, ratios[:1] * len(ratios), rtol=1e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"pin": {"A": 0.1}}, "pin.<domain>='A': must be one of a, b, c, d"),
        ({"cap": {"z": 0.1}}, "cap.<domain>='z'"),
        ({"pin": {"a": 0.7, "b": 0.4}}, "must sum to at most 1; it sums to 1.1"),
        ({"pin": {"a": -0.1}}, r"pin.a=-0.1: must be a share, 0 to 1"),
        ({"pin": {"a": float("nan")}}, "pin.a=nan: must be a share"),
        ({"pin": {"a": True}}, "pin.a=True: must be a share"),
        ({"cap": {"a": "half"}}, "cap.a='half': must be a share"),
        ({"cap": dict.fromkeys(DOMAINS, 0.2)}, "must leave room for a whole mixture; they leave 0.8 of one"),
        ({"pin": dict.fromkeys(DOMAINS, 0.2)}, "they leave 0.8 of one"),
    ],
)
def test_what_no_mixture_can_be_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        apply(**override)


# --- while running ---------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def steered(tmp_path):
    clock = Clock()
    info = ToyTrainer((0.5, 0.3, 0.2)).info
    static = make_mixer("static", weights="domain0=0.5,domain1=0.3,domain2=0.2")
    mixer = OverriddenMixer(static, WeightOverride(tmp_path, info.domains, clock))
    mixer.start(info)
    mixer.clock = clock
    return mixer


def test_a_mixers_cheap_measurements_stay_cheap():
    mixer = make_mixer("uniform")
    mixer.probe_sequences = 8
    assert OverriddenMixer(mixer).probe_sequences == 8


def put(folder, text):
    file = folder / FILE
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    os.utime(file, ns=(put.count, put.count))  # a file system's clock may be coarse
    put.count += 1


put.count = 10**18


def now(steered, seconds=1.0):
    steered.clock.now += seconds
    return steered.weights().tolist()


def test_without_a_file_the_mixers_own_array_passes(steered):
    own = np.array([0.5, 0.3, 0.2])
    steered.inner.weights = lambda: own
    assert steered.weights() is steered.inner.weights()
    assert "overridden" not in steered.diagnostics()


def test_read_at_most_once_a_second_and_let_go_when_removed(steered, tmp_path, capsys):
    assert now(steered) == [0.5, 0.3, 0.2]
    put(tmp_path, {"pin": {"domain0": 0.2}})
    assert now(steered, 0.9) == [0.5, 0.3, 0.2]
    steered.step = 41
    assert now(steered, 0.2) == pytest.approx([0.2, 0.48, 0.32])
    assert steered.diagnostics()["overridden"] == 1.0
    put(tmp_path, {"cap": {"domain0": 0.4}})
    assert now(steered, 1.5) == pytest.approx([0.4, 0.36, 0.24])
    (tmp_path / FILE).unlink()
    assert now(steered, 1.5) == [0.5, 0.3, 0.2]
    records = [json.loads(line) for line in (tmp_path / "overrides.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in record.items() if k != "time"} for record in records] == [
        {"from_step": 42, "pin": {"domain0": 0.2}, "cap": {}},
        {"from_step": 42, "pin": {}, "cap": {"domain0": 0.4}},
        {"from_step": 42},
    ]
    assert all(record["time"].startswith("20") for record in records)
    assert "override from step 42: none any more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"pin": {"domain0": 0.', "not valid JSON"),
        ("[1, 2]", "must be an object"),
        ('{"pins": {}}', "did you mean 'pin'"),
        ('{"pin": 0.3}', "pin=0.3: must be an object of domains and shares"),
        ('{"pin": {"domain9": 0.3}}', "pin.<domain>='domain9'"),
        ('{"pin": {"domain0": 0.7, "domain1": 0.7}}', "must sum to at most 1"),
    ],
)
def test_a_broken_file_is_said_once_and_ignored(steered, tmp_path, capsys, text, reason):
    put(tmp_path, text)
    for _ in range(3):
        assert now(steered) == [0.5, 0.3, 0.2]
    said = capsys.readouterr().err
    assert said.count("ignored") == 1
    assert reason in said
    assert "nothing is overridden" in said
    put(tmp_path, {"pin": {"domain0": 0.2}})
    assert now(steered) == pytest.approx([0.2, 0.48, 0.32])
    put(tmp_path, text)
    assert now(steered) == pytest.approx([0.2, 0.48, 0.32])  # half-saved: what it said before stays
    assert "what it said before stays in effect" in capsys.readouterr().err


@pytest.mark.parametrize(
    "make",
    [
        lambda file: file.mkdir(),
        lambda file: file.write_text('{"pin":' * 100_000),
        lambda file: file.write_text('{"pin": {"domain0": 1' + "0" * 5000 + "}}"),
        lambda file: file.write_bytes(b"\xff\xfe"),
        lambda file: (file.write_text("{}"), file.chmod(0)),
    ],
    ids=["folder", "deeply nested", "long number", "not text", "not readable"],
)
def test_nothing_by_that_name_ends_the_run(steered, tmp_path, capsys, make, monkeypatch):
    make(tmp_path / FILE)
    if not (tmp_path / FILE).stat().st_mode & 0o777:  # root may read it all the same

        def denied(*arguments):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("acodm_env.experiments.run.override.read_json", denied)
    assert now(steered) == [0.5, 0.3, 0.2]
    assert capsys.readouterr().err.count("ignored") == 1


def test_a_log_that_cannot_be_written_keeps_nothing_from_taking_effect(steered, tmp_path, capsys):
    (tmp_path / "overrides.jsonl").symlink_to("/dev/full")
    put(tmp_path, {"pin": {"domain0": 0.2}})
    assert now(steered) == pytest.approx([0.2, 0.48, 0.32])
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "override from step 1" in said


def test_a_run_under_the_hand(tmp_path):
    folder = RunFolder(tmp_path / "run", {"mixer": "odm-released"})
    put(folder.path, {"pin": {"domain0": 0.5}, "cap": {"domain1": 0.1}})
    trainer = ToyTrainer((0.6, 0.3, 0.1))
    override = WeightOverride(folder.path, trainer.info.domains)
    run_mixer(folder, trainer, make_mixer("odm-released"), seed=0, evaluations=2, override=override)
    lines = folder.steps
    assert len(lines) == 20
    for line in lines:
        assert line.requested[0] == pytest.approx(0.5)
        assert line.requested[1] <= 0.1 + 1e-9
        assert line.diagnostics["overridden"] == 1.0
    assert mixer_result(folder, None)["overridden_steps"] == 20


def test_without_a_hand_the_file_is_nobodys(tmp_path):
    """A benchmark's cells: they must stay comparable."""
    folder = RunFolder(tmp_path / "run", {"mixer": "uniform"})
    put(folder.path, {"pin": {"domain0": 0.5}})
    run_mixer(folder, ToyTrainer((0.6, 0.3, 0.1)), make_mixer("uniform"), seed=0, evaluations=2)
    np.testing.assert_allclose([line.requested for line in folder.steps], 1 / 3)
    assert mixer_result(folder, None)["overridden_steps"] == 0
