"""Mixing methods to compare with, by name: `make_mixer("odm-released")`. Neither torch nor SB3 is imported.

A method of your own joins them by `register_mixer`, or, so that every process of a benchmark knows it, by an entry
point of the group "acodm.mixers" (docs/how-to/add-a-mixer.md).
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from acodm_env.errors import ConfigError, unknown
from acodm_env.trainer import Mixer

ENTRY_POINTS = "acodm.mixers"
"""Group of the entry points by which other packages add mixers."""

_BUILT_IN = {
    "uniform": "static:Uniform",
    "proportional": "static:Proportional",
    "temperature": "static:Temperature",
    "unimax": "static:UniMax",
    "target-share": "targets:TargetShare",
    "static": "static:Static",
    "schedule": "recorded:Schedule",
    "replay": "recorded:Replay",
    "mean-of": "recorded:MeanOf",
    "odm-paper": "bandits:OdmPaper",
    "odm-released": "bandits:OdmReleased",
    "odm-paper-rescaled": "bandits:OdmPaperRescaled",
    "odm-released-rescaled": "bandits:OdmReleasedRescaled",
    "exp3": "bandits:Exp3",
    "exp3-classical": "bandits:Exp3Classical",
    "softmax-loss": "losses:SoftmaxLoss",
    "sheared-llama": "losses:ShearedLlama",
    "doremi": "doremi:Doremi",
    "doremi-proxy": "doremi:DoremiProxy",
    "skill-it": "skills:SkillIt",
    "aioli": "skills:Aioli",
    "doge": "gradient:Doge",
    "doge-proxy": "gradient:DogeProxy",
    "doge-online": "gradient:DogeOnline",
    "eg-interaction": "gradient:EgInteraction",
    "pike": "gradient:Pike",
    "ado": "scaling:Ado",
    "regmix": "regression:RegMix",
    "mixing-law": "regression:MixingLawMixer",
    "power-law": "regression:PowerLawMixer",
    "log-linear": "regression:LogLinear",
    "marginal-value": "marginal:MarginalValue",
    "policy": "policies:NamedPolicy",
    "generalist": "policies:Generalist",
    "pilot": "policies:Pilot",
}
"""Name: module and class; a module is imported when one of its mixers is asked for."""

_registered: dict[str, Callable[..., Mixer]] = {}


def mixer_names() -> tuple[str, ...]:
    """Names that `make_mixer` knows."""
    return (*_BUILT_IN, *_registered, *(name for name in _installed() if name not in _BUILT_IN | _registered))


def _installed() -> Mapping[str, Any]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def mixer_factory(name: str) -> Callable[..., Mixer]:
    """What makes the mixer `name`.

    Raises:
        ConfigError: an unknown name, with a suggestion; or an entry point that cannot be imported.
    """
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        factory: Callable[..., Mixer] = getattr(import_module(f".{module}", __name__), attribute)
        return factory
    if name in _registered:
        return _registered[name]
    installed = _installed()
    if name not in installed:
        unknown("mixer", name, mixer_names())
    try:
        loaded: Callable[..., Mixer] = installed[name].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"mixer={name}: its entry point {installed[name].value} does not load ({error})") from error
    return loaded


def make_mixer(name: str, **options: Any) -> Mixer:
    """A fresh mixer.

    Args:
        name: one of `mixer_names()`.
        options: keyword arguments of that mixer.

    Raises:
        ConfigError: an unknown name, with a suggestion; or options that the mixer does not take.
    """
    factory = mixer_factory(name)
    try:
        mixer = factory(**options)
    except TypeError as error:
        given = "".join(f", {key}={value}" for key, value in options.items())
        raise ConfigError(f"mixer={name}{given}: {error}; see its docstring for its options") from error
    mixer.name = name
    return mixer


def register_mixer(name: str, factory: Callable[..., Mixer]) -> None:
    """Make a mixer of your own known by name, in this process.

    Raises:
        ConfigError: the name is taken.
    """
    if name in mixer_names():
        raise ConfigError(f"mixer={name}: is already registered; choose another name")
    _registered[name] = factory
