import subprocess
import sys

import numpy as np
import pytest

from acodm_env.agents import baselines
from acodm_env.agents.baselines import make_mixer, mixer_names, register_mixer
from acodm_env.agents.baselines.static import Uniform
from acodm_env.errors import ConfigError
from acodm_env.trainer import drive
from toy import ToyTrainer


@pytest.mark.parametrize("name", mixer_names())
def test_every_mixer_drives_a_trainer(name):
    options = {"weights": [0.2, 0.3, 0.5]} if name == "static" else {}
    trainer, mixer = ToyTrainer((0.5, 0.3, 0.2)), make_mixer(name, **options)
    assert mixer.name == name
    trainer.reset(np.random.default_rng(0))
    mixer.start(trainer.info)
    history = list(drive(trainer, mixer, 20))
    assert len(history) == 20
    for stats in history:
        assert stats.requested.sum() == pytest.approx(1.0)
        assert (stats.requested >= 0).all()


def test_the_issues_names_are_there():
    names = {"uniform", "proportional", "static", "odm-paper", "odm-released", "exp3", "exp3-classical"}
    assert names <= set(mixer_names())


def test_unknown_mixer_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"mixer='odm-relased'.*did you mean 'odm-released'"):
        make_mixer("odm-relased")


def test_unknown_option_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"mixer=uniform, smoothing=0\.5: "):
        make_mixer("uniform", smoothing=0.5)


def test_a_registered_mixer_is_made_by_name(monkeypatch):
    monkeypatch.setattr(baselines, "_FACTORIES", dict(baselines._FACTORIES))
    register_mixer("mine", Uniform)
    assert isinstance(make_mixer("mine"), Uniform)
    assert make_mixer("mine").name == "mine"
    assert Uniform.name == "uniform"
    with pytest.raises(ConfigError, match=r"mine.*already registered"):
        register_mixer("mine", Uniform)


def test_importing_the_baselines_imports_neither_torch_nor_sb3():
    code = (
        "import sys, acodm_env.agents.baselines\n"
        "print([m for m in ('torch', 'stable_baselines3', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
