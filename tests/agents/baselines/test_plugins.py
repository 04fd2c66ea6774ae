"""Mixers of other people: the how-to page runs as it stands, entry points are found, taken names refused."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from acodm_env.agents import baselines
from acodm_env.agents.baselines import make_mixer, mixer_factory, mixer_names, register_mixer
from acodm_env.agents.baselines.static import Uniform
from acodm_env.errors import ConfigError
from acodm_env.trainer import Mixer, drive
from toy import ToyTrainer

DOCS = Path(__file__).parents[3] / "docs"
PAGE = DOCS / "how-to/add-a-mixer.md"
MODULE = """
from acodm_env.agents.baselines.static import Static

class Tilted(Static):
    def __init__(self, first=0.8):
        super().__init__([first, 1 - first])

number = 3
"""


def blocks(language):
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE.name} has no {language} block"
    return found


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(baselines, "_registered", {})


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package of somebody else's, with three entry points, as pip would leave it."""
    (tmp_path / "somebodys_mixers.py").write_text(MODULE)
    metadata = tmp_path / "somebodys_mixers-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-mixers\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[acodm.mixers]\n"
        "tilted = somebodys_mixers:Tilted\n"
        "gone = somebodys_mixers:Gone\n"
        "missing = no_such_module:Tilted\n"
        "uniform = somebodys_mixers:Tilted\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


# --- (i) the page ------------------------------------------------------------------------------------------


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = ToyTrainer((0.5, 0.3, 0.2), horizon=20)
    scope = {"trainer": trainer}
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), scope)
    assert "loss-proportional" in mixer_names()
    history = scope["history"]
    assert history[0].requested == pytest.approx([1 / 3] * 3)
    assert history[-1].requested == pytest.approx(np.array([1.0, 2.0, 3.0]) / 6, abs=1e-2)
    assert len(history) == 20
    assert scope["second"].weights().sum() == pytest.approx(1.0)


def test_the_pages_mixer_is_short_and_bears_what_it_says():
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    scope = {}
    exec(code, scope)
    mixer, trainer = scope["LossProportional"](), ToyTrainer((0.5, 0.3, 0.2), diverge_at=5)
    trainer.reset(np.random.default_rng(0))
    mixer.start(trainer.info)
    steps = list(drive(trainer, mixer, 20))
    assert len(steps) == 5
    assert steps[-1].diverged
    assert mixer.weights() == pytest.approx(steps[-1].requested)


def test_the_pages_entry_point_is_the_group_that_is_read():
    import tomllib

    groups = tomllib.loads(blocks("toml")[0])["project"]["entry-points"]
    assert groups == {baselines.ENTRY_POINTS: {"loss-proportional": "my_package.mixers:LossProportional"}}


def test_the_page_names_every_member_of_a_mixer():
    page = PAGE.read_text(encoding="utf-8")
    members = [name for name in vars(Mixer) if not name.startswith("_") and name not in ("name", "paper")]
    assert "preparation" in members
    assert [name for name in members if f"`{name}" not in page and f"def {name}(" not in page] == []


# --- (ii) entry points -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_an_installed_mixer_is_found_by_name_with_its_options():
    assert "tilted" in mixer_names()
    mixer = make_mixer("tilted", first=0.7)
    mixer.start(ToyTrainer((0.5, 0.5)).info)
    assert mixer.name == "tilted"
    assert mixer.weights() == pytest.approx([0.7, 0.3])
    with pytest.raises(ConfigError, match=r"mixer=tilted, last=0\.1"):
        make_mixer("tilted", last=0.1)
    with pytest.raises(ConfigError, match=r"mixer='tiltet'.*did you mean 'tilted'"):
        make_mixer("tiltet")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("name", "value"), [("gone", "somebodys_mixers:Gone"), ("missing", "no_such_module:Tilted")])
def test_an_entry_point_that_does_not_load_is_named(name, value):
    assert name in mixer_names()
    with pytest.raises(ConfigError, match=f"mixer={name}: its entry point {value} does not load"):
        make_mixer(name)


@pytest.mark.usefixtures("installed")
def test_a_built_in_mixer_cannot_be_replaced():
    assert mixer_factory("uniform") is Uniform
    assert mixer_names().count("uniform") == 1


def test_without_the_package_the_name_is_unknown():
    assert "tilted" not in mixer_names()
    with pytest.raises(ConfigError, match="mixer='tilted': must be one of"):
        make_mixer("tilted")


# --- (iii) names -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["uniform", "regmix", "tilted", "mine"])
def test_a_taken_name_is_refused(name):
    register_mixer("mine", Uniform)
    with pytest.raises(ConfigError, match=f"mixer={name}: is already registered; choose another name"):
        register_mixer(name, Uniform)


# --- the table of all mixers -------------------------------------------------------------------------------


def rows():
    """Cells of the first table of docs/baselines.md, by mixer."""
    text = (DOCS / "baselines.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `.*\|$", text, re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.strip("`"): rest for name, *rest in cells}


def test_the_table_has_every_mixer_once():
    assert list(rows()) == list(mixer_names())


@pytest.mark.parametrize("name", mixer_names())
def test_a_row_says_what_the_class_says(name):
    """Its paper, what it needs of the run, and whether it asks for runs before."""
    factory, (paper, needs, before, _) = mixer_factory(name), rows()[name]
    assert paper == (factory.paper.removesuffix(" (ablation)") or "–")
    assert needs == (", ".join(sorted(factory.needs)) or "–")
    assert (before == "–") == (factory.preparation is Mixer.preparation)
