"""Hyper-parameters per algorithm and environment: one folder of YAML files in RL-Zoo's format.

`hyperparams/<algorithm>.yml` holds a section per environment id. `acodm train` and `make_agent` read them, and so does
RL-Zoo itself (`--conf-file`): the numbers are nowhere else. `AgentRecipe` overrides them by short names.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from acodm_env.errors import ConfigError, unknown
from acodm_env.files import atomic_file

from .algorithms import ALGORITHMS, load_class
from .zoo_format import parse, written

FOLDER = Path(__file__).parent / "hyperparams"
PROXY = "acodm/ProxyPretrain-v0"
SURROGATE = "acodm/Surrogate-v0"
PROBLEMS = "acodm/Surrogate-v0:problems"
"""Section for `acodm/Surrogate-v0` on random problems; a file without it takes the surrogate's."""

Settings = dict[str, Any]
"""RL-Zoo's settings of one algorithm on one environment, nested ones parsed."""

NESTED = ("policy_kwargs", "replay_buffer_kwargs", "normalize")
"""Settings that RL-Zoo writes as "dict(…)"."""
OURS = ("n_timesteps", "n_envs", "env_kwargs", "normalize", "noise_type", "noise_std", "from_policy")
"""Settings that are no argument of the algorithm's constructor: RL-Zoo's, and `initial.settings_to_begin`'s."""


@dataclass(frozen=True, kw_only=True)
class AgentRecipe:
    """What to change about an algorithm's hyper-parameters; None leaves what its file says.

    An algorithm that has no such parameter leaves it aside: PPO no replay buffer, SAC no exploration noise.
    """

    gamma: float | None = None
    """Discount per decision (paper: 0.95)."""
    learning_rate: float | None = None
    """Of actor and critic."""
    hidden: tuple[int, ...] | None = None
    """Units of the hidden layers of actor and critic (paper: 5 × 1024)."""
    batch_size: int | None = None
    """Transitions per gradient step (off-policy) or minibatch (PPO)."""
    weight_decay: float | None = None
    """Decoupled (AdamW) weight decay of actor and critic (paper: 0.1)."""
    logit_penalty: float | None = None
    """λ of λ/2·mean‖z‖² on the pre-tanh logits z, added to the actor's loss (TD3, DDPG). Not in the paper."""
    buffer_size: int | None = None
    """Replay buffer in transitions (paper: 10,000)."""
    learning_starts: int | None = None
    """Random decisions before learning begins (off-policy)."""
    gradient_steps: int | None = None
    """Gradient steps per decision (off-policy); with several environments, per decision of all of them."""
    tau: float | None = None
    """Rate of the target networks (paper: 0.001)."""
    action_noise: float | None = None
    """Standard deviation of the exploration noise (TD3, DDPG)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Any other arguments of the algorithm, as in its file: {"n_steps": 400, "ent_coef": 0.01}."""

    def __post_init__(self) -> None:
        if self.gamma is not None and not 0 <= self.gamma <= 1:
            raise ConfigError(f"gamma={self.gamma}: must be in [0, 1]")
        hidden = self.hidden
        if hidden is not None and not (isinstance(hidden, tuple) and all(isinstance(units, int) for units in hidden)):
            raise ConfigError(f"hidden={hidden}: must be a list of layer sizes, e.g. [64, 64]")
        for name in ("learning_rate", "batch_size", "buffer_size", "tau"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value}: must be positive")
        if not isinstance(self.settings, Mapping):
            raise ConfigError(f"settings={self.settings}: must be a mapping of the algorithm's arguments")


def read_settings(algo: str, env_id: str, file: str | Path | None = None) -> Settings:
    """The section of an environment in an algorithm's file, or in `file`; nested settings parsed.

    Raises:
        ConfigError: there is no such file, it is no YAML, or it has no section for the environment.
    """
    if algo not in ALGORITHMS:
        unknown("algo", algo, ALGORITHMS)
    path = FOLDER / f"{algo}.yml" if file is None else Path(file)
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"conf_file={path}: must be a YAML file of hyper-parameters ({error})") from error
    if env_id == PROBLEMS and isinstance(sections, dict) and PROBLEMS not in sections:
        env_id = SURROGATE
    if not isinstance(sections, dict) or not isinstance(sections.get(env_id), dict):
        held = sorted(map(str, sections)) if isinstance(sections, dict) else type(sections).__name__
        raise ConfigError(f"conf_file={path}: must have a section '{env_id}:' of settings; it has {held}")
    settings = dict(sections[env_id])
    return settings | _parsed(settings)


def settings_for(algo: str, env_id: str, recipe: AgentRecipe | None = None, file: str | Path | None = None) -> Settings:
    """Hyper-parameters of an algorithm on an environment, with the recipe's changes.

    Raises:
        ConfigError: see `read_settings`; or a setting that the algorithm does not have, with a suggestion.
    """
    settings = read_settings(algo, env_id, file)
    if recipe is not None:
        settings = _changed(settings, recipe, _accepted(algo))
    allowed = {*_accepted(algo), *OURS}
    for name in settings:
        if name not in allowed:
            unknown(f"{algo}.<setting>", name, allowed)
    return settings


def write_settings(path: str | Path, env_id: str, settings: Settings) -> None:
    """Write a section as RL-Zoo reads it."""
    with atomic_file(path) as file:
        file.write(zoo_text(env_id, settings).encode())


def zoo_text(env_id: str, settings: Settings) -> str:
    """A section as RL-Zoo's YAML."""
    nested = {name: written(settings[name]) for name in NESTED if isinstance(settings.get(name), Mapping)}
    plain = settings | nested
    return yaml.safe_dump({env_id: plain}, sort_keys=False, width=1000)


def _parsed(settings: Mapping[str, Any]) -> Settings:
    return {name: parse(settings[name]) for name in NESTED if isinstance(settings.get(name), str)}


def _accepted(algo: str) -> set[str]:
    """Names of the constructor's arguments, those passed on to the algorithms it derives from included."""
    kinds = [kind for kind in load_class(algo).__mro__ if "__init__" in vars(kind)]
    names: set[str] = set()
    for kind in kinds:
        parameters = inspect.signature(kind.__init__).parameters.values()
        names |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break  # nothing is passed on
    return names - {"self", "env", "seed", "device"}


_DIRECT = ("gamma", "learning_rate", "batch_size", "buffer_size", "learning_starts", "gradient_steps", "tau")


def _changed(settings: Settings, recipe: AgentRecipe, accepted: set[str]) -> Settings:
    changed = settings | {
        name: getattr(recipe, name) for name in _DIRECT if getattr(recipe, name) is not None and name in accepted
    }
    if recipe.action_noise is not None and "noise_type" in changed:
        changed["noise_std"] = recipe.action_noise
    if "policy_kwargs" in accepted:
        changed["policy_kwargs"] = _networks(dict(changed.get("policy_kwargs") or {}), recipe)
    return changed | dict(recipe.settings) | _parsed(recipe.settings)


def _networks(policy: Settings, recipe: AgentRecipe) -> Settings:
    if recipe.hidden is not None:
        policy["net_arch"] = list(recipe.hidden)
    if recipe.weight_decay is not None and "optimizer_class" in policy:
        policy["optimizer_kwargs"] = {**policy.get("optimizer_kwargs", {}), "weight_decay": recipe.weight_decay}
    if recipe.logit_penalty is not None and "logit_penalty" in policy:
        policy["logit_penalty"] = recipe.logit_penalty
    return policy
