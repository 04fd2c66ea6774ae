"""The folder of hyper-parameters: complete, read as RL-Zoo reads it but without `eval`, changed by recipes."""

from importlib.util import find_spec

import pytest
import torch
import yaml

from acodm_env.agents.algorithms import ALGORITHMS
from acodm_env.agents.hyperparameters import (
    FOLDER,
    NESTED,
    PROXY,
    SURROGATE,
    AgentRecipe,
    read_settings,
    settings_for,
    write_settings,
)
from acodm_env.agents.zoo_format import parse, resolve, written
from acodm_env.errors import ConfigError

INSTALLED = sorted(
    name for name, algorithm in ALGORITHMS.items() if not algorithm.extra or find_spec("sb3_contrib") is not None
)


def test_there_is_a_file_for_every_algorithm_and_no_other():
    assert {file.stem for file in FOLDER.glob("*.yml")} == set(ALGORITHMS)


@pytest.mark.parametrize("env_id", [PROXY, SURROGATE])
@pytest.mark.parametrize("algo", INSTALLED)
def test_every_section_holds_what_its_algorithm_takes(algo, env_id):
    settings = settings_for(algo, env_id)  # refuses what the constructor does not have
    assert settings["n_timesteps"] > 0
    for name in NESTED:
        resolve(settings.get(name))


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_nested_settings_are_what_rl_zoo_would_evaluate(algo):
    """It calls eval with torch as `th` and torch.nn as `nn`."""
    for section in yaml.safe_load((FOLDER / f"{algo}.yml").read_text()).values():
        for name in NESTED:
            if isinstance(text := section.get(name), str):
                expected = eval(text, {"th": torch, "nn": torch.nn})
                assert resolve(parse(text)) == expected
                assert parse(written(parse(text))) == parse(text)


def test_expressions():
    text = "dict(net_arch=dict(pi=[64, 64], qf=(32,)), activation_fn=nn.Tanh, n=None, x=-1e-3, name='a')"
    assert resolve(parse(text)) == {
        "net_arch": {"pi": [64, 64], "qf": [32]},
        "activation_fn": torch.nn.Tanh,
        "n": None,
        "x": -0.001,
        "name": "a",
    }
    assert resolve(parse("{'optimizer_class': th.optim.AdamW}")) == {"optimizer_class": torch.optim.AdamW}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "dict(a=open('x'))",
        "dict(**{'a': 1})",
        "dict([('a', 1)])",
        "dict(a=nn.NoSuchLayer)",
        "dict(a=nn.functional)",
        "dict(a=th.load)",
        "dict(a=nn)",
        "dict(a=",
        "dict(a=[x for x in (1, 2)])",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ConfigError, match="must be"):
        resolve(parse(text))


def test_a_recipe_changes_what_it_names_and_nothing_else():
    before = settings_for("td3", PROXY)
    recipe = AgentRecipe(gamma=0.5, hidden=(8, 4), weight_decay=0.2, logit_penalty=0.3, action_noise=0.4, tau=0.1)
    after = settings_for("td3", PROXY, recipe)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"gamma", "policy_kwargs", "noise_std", "tau"}
    assert (after["gamma"], after["noise_std"], after["tau"]) == (0.5, 0.4, 0.1)
    assert after["policy_kwargs"] == before["policy_kwargs"] | {
        "net_arch": [8, 4],
        "optimizer_kwargs": {"weight_decay": 0.2},
        "logit_penalty": 0.3,
    }
    assert settings_for("td3", PROXY, AgentRecipe()) == before


def test_an_algorithm_leaves_aside_what_it_does_not_have():
    recipe = AgentRecipe(buffer_size=5, tau=0.1, action_noise=0.4, logit_penalty=0.3, batch_size=7)
    for algo in ("ppo", "a2c"):
        changed = {
            name: value for name, value in settings_for(algo, PROXY, recipe).items()
            if value != settings_for(algo, PROXY)[name]
        }  # fmt: skip
        assert changed == ({"batch_size": 7} if algo == "ppo" else {})
    assert "noise_std" not in settings_for("sac", PROXY, recipe)


def test_other_settings_by_the_names_of_the_algorithm():
    recipe = AgentRecipe(settings={"ent_coef": 0.1, "policy_kwargs": "dict(net_arch=[4])"})
    settings = settings_for("ppo", PROXY, recipe)
    assert settings["ent_coef"] == 0.1
    assert settings["policy_kwargs"] == {"net_arch": [4]}
    with pytest.raises(ConfigError, match=r"ppo.<setting>='ent_coeff': .*did you mean 'ent_coef'"):
        settings_for("ppo", PROXY, AgentRecipe(settings={"ent_coeff": 0.1}))
    with pytest.raises(ConfigError, match="policy_delay"):  # TD3's; DDPG is a TD3 that sets it
        settings_for("sac", PROXY, AgentRecipe(settings={"policy_delay": 3}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gamma": 1.1}, r"gamma=1.1: must be in \[0, 1\]"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be positive"),
        ({"tau": -1.0}, "tau=-1.0: must be positive"),
        ({"hidden": 64}, "hidden=64: must be a list of layer sizes"),
        ({"settings": 3}, "settings=3: must be a mapping"),
    ],
)
def test_a_recipe_refuses_what_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        AgentRecipe(**values)


def test_what_is_written_is_read_again(tmp_path):
    settings = settings_for("td3", SURROGATE, AgentRecipe(learning_rate=1e-05, hidden=(32,)))
    write_settings(tmp_path / "new.yml", SURROGATE, settings)
    assert read_settings("td3", SURROGATE, tmp_path / "new.yml") == settings
    plain = yaml.safe_load((tmp_path / "new.yml").read_text())[SURROGATE]
    assert isinstance(plain["learning_rate"], float)  # YAML takes 1e-05 for a string
    assert plain["policy_kwargs"].startswith("dict(net_arch=[32], ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "must be a YAML file of hyper-parameters"),
        ("a: [", "must be a YAML file of hyper-parameters"),
        ("- 1", "must have a section 'acodm/Surrogate-v0:' of settings; it has list"),
        ("CartPole-v1: {n_timesteps: 1}", r"it has \['CartPole-v1'\]"),
        ("acodm/Surrogate-v0: {n_timesteps: 1, frame_stack: 4}", "td3.<setting>='frame_stack'"),
        ("acodm/Surrogate-v0: {policy_kwargs: 'open(1)'}", "settings=open"),
    ],
)
def test_a_file_of_your_own_is_checked(text, message, tmp_path):
    file = tmp_path / "own.yml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        settings_for("td3", SURROGATE, file=file)
