import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from acodm_env.agents.baselines import make_mixer
from acodm_env.errors import ConfigError
from toy import ToyTrainer

INFO = replace(
    ToyTrainer((0.5, 0.5)).info,
    domains=("python", "prose", "maths"),
    targets=("python", "prose", "maths"),
    sizes_tokens=(600, 300, 100),
)
MIXTURE = {"python": 0.5, "prose": 0.2, "maths": 0.3}


def weights_of(name, **options):
    mixer = make_mixer(name, **options)
    mixer.start(INFO)
    return mixer.weights().tolist()


def test_uniform():
    assert weights_of("uniform") == pytest.approx([1 / 3] * 3)


def test_proportional_to_tokens():
    assert weights_of("proportional") == pytest.approx([0.6, 0.3, 0.1])


@pytest.mark.parametrize(
    "given",
    [
        {"maths": 3, "python": 5, "prose": 2},
        [5, 2, 3],
        np.array([0.5, 0.2, 0.3]),
        "prose=0.2,python=0.5,maths=0.3",
        " python = 5, prose=2 ,maths=3e0, ",
    ],
)
def test_static_weights_in_every_form_are_normalised_and_ordered(given):
    assert weights_of("static", weights=given) == pytest.approx([0.5, 0.2, 0.3])


@pytest.mark.parametrize(
    "content",
    [
        MIXTURE,
        {"time_averaged": MIXTURE, "final": {"python": 1.0, "prose": 0.0, "maths": 0.0}},
        {"time_averaged": {"domains": MIXTURE}},
        {"domains": MIXTURE},
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".yaml", ""])
def test_static_weights_from_a_file(tmp_path, content, suffix):
    path = tmp_path / f"mixture{suffix}"
    path.write_text(yaml.safe_dump(content) if suffix == ".yaml" else json.dumps(content))
    assert weights_of("static", weights=str(path)) == pytest.approx([0.5, 0.2, 0.3])


def test_json_with_an_exponent_and_no_point_is_a_number(tmp_path):
    path = tmp_path / "mixture"  # read as YAML, which takes 1e-05 for a string
    path.write_text('{"python": 1, "prose": 1e-05, "maths": 0}')
    assert weights_of("static", weights=str(path)) == pytest.approx([1 / 1.00001, 1e-5 / 1.00001, 0])


def test_text_longer_than_a_file_name(tmp_path):
    names = tuple(f"a_domain_with_a_long_name_{i}" for i in range(22))
    mixer = make_mixer("static", weights=",".join(f"{name}={i + 1}" for i, name in enumerate(names)))
    mixer.start(replace(INFO, domains=names, targets=names, sizes_tokens=(1,) * 22))
    assert mixer.weights() == pytest.approx(np.arange(1, 23) / 253)


def test_zero_weight_leaves_a_domain_out():
    assert weights_of("static", weights="python=1,prose=0,maths=0") == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("pyton=0.5,prose=0.2,maths=0.3", "pyton.*did you mean 'python'"),
        ("python=0.5,prose=0.5", "missing maths"),
        ({"python": 0.5, "prose": 0.2, "maths": 0.3, "law": 0.1}, "law"),
        ("python=0.5,prose=nan,maths=0.5", "prose=nan"),
        ("python=0.5,prose=-0.1,maths=0.5", "prose=-0.1"),
        ("python=0.5,prose=inf,maths=0.5", "prose=inf"),
        ("python=0.5,prose=many,maths=0.5", "prose=many"),
        ("python=0.5,prose,maths=0.5", "'prose' must be name=weight"),
        ("python=0.5,python=0.2,maths=0.3", "'python=0.2'.*each domain once"),
        ({"python": 0.5, "prose": None, "maths": 0.5}, "prose=None"),
        ({"python": 0.0, "prose": 0.0, "maths": 0.0}, "positive sum"),
        ([0.5, 0.5], "must hold 3 numbers"),
        ([0.5, np.nan, 0.5], "finite"),
        ([0.5, -0.5, 1.0], "non-negative"),
        (None, "needs weights"),
        ("", "JSON or YAML file"),
        ("no-such-file.json", "no-such-file.json"),
    ],
)
def test_bad_weights_are_refused_by_name(given, message):
    with pytest.raises(ConfigError, match=message):
        weights_of("static", weights=given)


@pytest.mark.parametrize("content", ["{", "[1, 2, 3]", "python", '{"python": 1,}'])
def test_bad_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "mixture.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"mixture\.json"):
        weights_of("static", weights=str(path))


def test_a_binary_file_is_refused_by_name(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_bytes(b"\xff\xfe\x00python")
    with pytest.raises(ConfigError, match=r"mixture\.yaml"):
        weights_of("static", weights=str(path))


@pytest.mark.parametrize("name", ["uniform", "temperature", "unimax"])
def test_the_callers_copy_is_its_own(name):
    mixer = make_mixer(name, **({"budget_tokens": 100} if name == "unimax" else {}))
    mixer.start(INFO)
    mixer.weights()[:] = 0.0
    assert mixer.weights().sum() == pytest.approx(1.0)
    assert mixer.dynamic is False


# --- temperature -------------------------------------------------------------------------------------------


def sized(name, sizes, **options):
    """Weights of a mixer over domains of `sizes` tokens; the run itself takes 64·5·20 = 6,400."""
    names = tuple(f"domain{i}" for i in range(len(sizes)))
    mixer = make_mixer(name, **options)
    mixer.start(replace(INFO, domains=names, targets=names, sizes_tokens=tuple(sizes)))
    return mixer.weights().tolist()


def test_temperature_by_hand():
    assert sized("temperature", [900, 100], tau=2) == pytest.approx([0.75, 0.25])  # √900 : √100
    assert sized("temperature", [600, 300, 100], tau=1) == pytest.approx([0.6, 0.3, 0.1])
    assert sized("temperature", [900, 100], tau=1e9) == pytest.approx([0.5, 0.5])
    assert sized("temperature", [1000, 1]) == pytest.approx([1000**0.3 / (1000**0.3 + 1), 1 / (1000**0.3 + 1)])


def test_temperature_survives_extremes():
    assert sized("temperature", [10**12, 10**11], tau=0.001) == [1.0, 0.0]
    assert sized("temperature", [1000, 0], tau=2) == [1.0, 0.0]


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperature_is_refused(tau):
    with pytest.raises(ConfigError, match="tau="):
        make_mixer("temperature", tau=tau)


# --- UniMax ------------------------------------------------------------------------------------------------


def test_unimax_golden():
    tokens = {"swe": 179955884499, "fas": 184595788282, "ekk": 42541080893, "isl": 10027573389, "fao": 549707867}
    weights = dict(zip(tokens, sized("unimax", tokens.values(), max_epochs=4, budget_tokens=250e9), strict=True))
    third = 0.276921166635
    expected = {"fao": 0.008795325872, "isl": 0.160441174224, "ekk": third, "swe": third, "fas": third}
    assert weights == pytest.approx(expected, abs=1e-12)


def test_unimax_takes_the_runs_own_budget():
    # 6,400 tokens: 100·4 = 400 for the smallest, then (6,400 − 400)/2 = 3,000 for each of the others
    assert sized("unimax", [9000, 100, 8000]) == pytest.approx([3000 / 6400, 400 / 6400, 3000 / 6400])
    assert sized("unimax", [9000, 100, 8000], max_epochs=1) == pytest.approx([3150 / 6400, 100 / 6400, 3150 / 6400])


def test_unimax_with_plenty_is_uniform_and_with_no_slack_proportional():
    assert sized("unimax", [10**6, 10**7, 10**8]) == pytest.approx([1 / 3] * 3)
    assert sized("unimax", [60, 30, 10], max_epochs=2, budget_tokens=200) == pytest.approx([0.6, 0.3, 0.1])


def test_unimax_refuses_a_budget_that_cannot_be_spent_and_its_advice_works():
    with pytest.raises(ConfigError, match=r"max_epochs=4: must be at least 6\.400; .*6400 tokens, 2400 more than 1000"):
        sized("unimax", [600, 300, 100])
    assert sized("unimax", [600, 300, 100], max_epochs=6.4) == pytest.approx([0.6, 0.3, 0.1])


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"max_epochs": float("nan")}, {"budget_tokens": -1.0}])
def test_bad_options_of_unimax_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_mixer("unimax", **options)


def test_unimax_leaves_out_a_domain_without_tokens():
    assert sized("unimax", [0, 6400, 6400]) == pytest.approx([0.0, 0.5, 0.5])
