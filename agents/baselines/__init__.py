"""Mixing methods to compare with, by name: `make_mixer("odm-released")`. Neither torch nor SB3 is imported."""

from collections.abc import Callable
from typing import Any

from acodm_env.errors import ConfigError, unknown
from acodm_env.trainer import Mixer

from .bandits import Exp3, Exp3Classical, OdmPaper, OdmReleased
from .static import Proportional, Static, Uniform

_FACTORIES: dict[str, Callable[..., Mixer]] = {
    "uniform": Uniform,
    "proportional": Proportional,
    "static": Static,
    "odm-paper": OdmPaper,
    "odm-released": OdmReleased,
    "exp3": Exp3,
    "exp3-classical": Exp3Classical,
}


def mixer_names() -> tuple[str, ...]:
    """Names that `make_mixer` knows."""
    return tuple(_FACTORIES)


def make_mixer(name: str, **options: Any) -> Mixer:
    """A fresh mixer.

    Args:
        name: one of `mixer_names()`.
        options: keyword arguments of that mixer.

    Raises:
        ConfigError: an unknown name, with a suggestion; or options that the mixer does not take.
    """
    if name not in _FACTORIES:
        unknown("mixer", name, _FACTORIES)
    try:
        mixer = _FACTORIES[name](**options)
    except TypeError as error:
        given = "".join(f", {key}={value}" for key, value in options.items())
        raise ConfigError(f"mixer={name}{given}: {error}; see its docstring for its options") from error
    mixer.name = name
    return mixer


def register_mixer(name: str, factory: Callable[..., Mixer]) -> None:
    """Make a mixer of your own known by name.

    Raises:
        ConfigError: the name is taken.
    """
    if name in _FACTORIES:
        raise ConfigError(f"mixer={name}: is already registered; choose another name")
    _FACTORIES[name] = factory
