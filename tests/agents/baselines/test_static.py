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


def test_the_callers_copy_is_its_own():
    mixer = make_mixer("uniform")
    mixer.start(INFO)
    mixer.weights()[:] = 0.0
    assert mixer.weights().sum() == pytest.approx(1.0)
