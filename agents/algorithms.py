"""Which learning algorithms there are, by name: nothing heavy is imported before one is asked for.

A name is also that of the algorithm's file of hyper-parameters, `hyperparams/<name>.yml`. An algorithm of your own is
one line in `ALGORITHMS` and one such file.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from acodm_env.errors import ConfigError, unknown


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Where an algorithm's class lies, and what it cannot do here."""

    place: str
    """"module:Class" of a subclass of Stable-Baselines3's `BaseAlgorithm`."""
    extra: str = ""
    """Extra of this package that installs the module; empty: it is always there."""
    unfit: str = ""
    """Why `acodm train` refuses it, where it does; `make_agent` takes it all the same."""


def _contrib(name: str, unfit: str = "") -> Algorithm:
    return Algorithm(place=f"sb3_contrib:{name}", extra="contrib", unfit=unfit)


ALGORITHMS = {
    "td3": Algorithm(place="stable_baselines3:TD3"),
    "ddpg": Algorithm(place="stable_baselines3:DDPG"),
    "sac": Algorithm(place="stable_baselines3:SAC"),
    "ppo": Algorithm(place="stable_baselines3:PPO"),
    "a2c": Algorithm(place="stable_baselines3:A2C"),
    "trpo": _contrib("TRPO"),
    "tqc": _contrib("TQC"),
    "crossq": _contrib("CrossQ"),
    "ars": _contrib("ARS", "it scores whole episodes of shifted networks and has no learning step between decisions"),
    "ppo_lstm": _contrib("RecurrentPPO", "a policy that remembers (LSTM) is not part of the policy format"),
    "acodm-td3": Algorithm(place="acodm_env.agents.acodm:AcodmTD3"),
    "acodm-ddpg": Algorithm(place="acodm_env.agents.acodm:AcodmDDPG"),
    "equivariant-td3": Algorithm(place="acodm_env.agents.equivariant:EquivariantTD3"),
    "equivariant-ppo": Algorithm(place="acodm_env.agents.equivariant_ppo:EquivariantPPO"),
}
"""Every algorithm for continuous actions of Stable-Baselines3 and sb3-contrib, and ours. `ppo_lstm` is RL-Zoo's name
of RecurrentPPO. DQN, QR-DQN and MaskablePPO choose among discrete actions; a mixture is not one of them."""


DIFFERENTIATING = {"apg": "acodm_env.agents.apg:learn"}
"""Algorithms that need the derivative of what they learn on, and so work on random problems alone: no SB3 agents."""


def load_class(name: str) -> Any:
    """The class of the algorithm `name`.

    Raises:
        ConfigError: unknown, with a suggestion; or its package is not installed, with the extra that brings it.
    """
    if name not in ALGORITHMS:
        unknown("algo", name, ALGORITHMS)
    algorithm = ALGORITHMS[name]
    module, _, attribute = algorithm.place.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if not algorithm.extra:
            raise
        raise ConfigError(
            f"algo={name}: must be installed; {error.name} is missing; pip install 'acodm[{algorithm.extra}]'"
        ) from error


def require_fit(name: str) -> None:
    """Refuse an algorithm that `acodm train` cannot drive or export.

    Raises:
        ConfigError: unknown, or unfit and why.
    """
    if name in DIFFERENTIATING:
        return
    if name not in ALGORITHMS:
        unknown("algo", name, {**ALGORITHMS, **DIFFERENTIATING})
    if unfit := ALGORITHMS[name].unfit:
        fit = ", ".join(sorted(other for other, algorithm in ALGORITHMS.items() if not algorithm.unfit))
        raise ConfigError(
            f"algo={name}: must be one of {fit}; {unfit}; learn with it from Python: "
            f"make_agent('{name}', …).learn(…), or with RL-Zoo"
        )
