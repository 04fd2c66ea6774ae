import shlex

import pytest

from acodm_env.experiments.cli import _parse
from acodm_env.experiments.run.command import command_line
from acodm_env.experiments.target.config import TransferConfig

CASES = [
    ({"mixer": "uniform"}, "acodm transfer --mixer uniform"),
    ({"policy": "a b", "gate": False, "steps": 20}, "acodm transfer --policy 'a b' --steps 20 --no-gate"),
    ({"mixer": "static", "weights": "a=0.5,b=0.5"}, "acodm transfer --mixer static --weights a=0.5,b=0.5"),
]


@pytest.mark.parametrize(("settings", "line"), CASES)
def test_a_configuration_as_its_command(settings, line):
    found = command_line("transfer", TransferConfig(**settings))
    assert sorted(found.split(" --")) == sorted(line.split(" --"))


@pytest.mark.parametrize(("settings", "line"), CASES)
def test_the_command_is_the_configuration_again(settings, line):
    config = TransferConfig(**settings)
    words = shlex.split(command_line("transfer", config))[2:]
    assert _parse("transfer", TransferConfig, words) == config
