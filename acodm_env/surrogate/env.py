"""`acodm/Surrogate-v0`: the choice of the mixture on a response surface; `MixtureEnv`'s contract, no language model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gymnasium.utils import EzPickle

from acodm_env.config import from_dict
from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.reward import RewardConfig, parse_reward
from acodm_env.surrogate.draws import Family
from acodm_env.surrogate.problem_trainer import ProblemTrainer
from acodm_env.surrogate.problems import ProblemFamily
from acodm_env.surrogate.surface import Surface, add_noise_domain
from acodm_env.surrogate.trainer import Source, SurrogateTrainer
from acodm_env.trainer import RunInfo
from acodm_env.view import GENERAL_FIELDS
from acodm_env.wrapper import Lagged


@dataclass(frozen=True, kw_only=True)
class SurrogateConfig:
    """Settings of `acodm/Surrogate-v0`, scalar and vectorised; all are optional."""

    surface: str = "regmix-1m"
    """A shipped surface, or a JSON file written by `acodm fit-surrogate`."""
    family: Mapping[str, Any] | None = None
    """Settings of `Family`: a new surface, drawn around `surface` or from scratch, in every episode."""
    problems: Mapping[str, Any] | None = None
    """Settings of `ProblemFamily`: a new mixing problem, with an objective of its own, in every episode; {} takes its
    defaults. `surface` and `family` do not count then."""
    copies: int = 1
    """Episodes of the vector environment that share a problem, one after the other: a learner may compare them."""
    episode_steps: int = 40
    """Steps per episode; one is 1/episode_steps of the run."""
    steps_per_action: int = 1
    """Steps per decision."""
    fields: Sequence[str] | None = None
    """Observation fields; None is what the surface defines (see `default_fields`)."""
    reward: str | Mapping[str, Any] = "progress"
    """A term's name, a mapping of terms to weights, or all of `RewardConfig`'s settings."""
    interaction: Mapping[str, Any] | None = None
    """Settings of `InteractionConfig`."""
    action: Mapping[str, Any] | None = None
    """Settings of `ActionMap`; here c = 3 and ε = 0.05 by default, with `problems` c = 5, ε = 0.02 and rate 0: the
    mixture in force is the running average of those decided."""
    bounds: Mapping[str, Any] | None = None
    """Settings of `Bounds` (scalar environment only)."""
    lag: int = 0
    """Steps by which a mixture takes effect late."""
    noise: float = 1.0
    """Factor on the observation noise of training losses; 0 switches it off."""
    noise_domain: bool = False
    """Add a domain of pure noise, which teaches nothing."""
    repetition: bool = True
    """Whether repeated tokens wear out; off: every domain is endless."""
    forgetting: bool = True
    """Whether what was learned is forgotten; off: the order of the data does not matter."""

    def __post_init__(self) -> None:
        if self.problems is not None and self.family is not None:
            raise ConfigError("family, problems: must be one of them, both draw what an episode is played on")
        if self.problems is not None and self.noise_domain:
            raise ConfigError("noise_domain=True: is for one surface; problems draw their own: problems.junk")
        if self.problems is None and self.copies != 1:
            raise ConfigError(f"copies={self.copies}: must be left out without problems; runs share a problem by it")

    def source(self) -> Source:
        """Where the surfaces of the episodes come from.

        Raises:
            ConfigError, DataError: no such surface, or settings of the family that do not fit.
        """
        surface = Surface.load(self.surface)
        surface = surface if self.repetition else surface.without_repetition()
        surface = surface if self.forgetting else replace(surface, forgetting=(0.0,) * len(surface.domains))
        if self.family is not None and self.noise_domain:
            raise ConfigError("noise_domain=True: is for one surface; a family draws its own: family.noise_domains")
        if self.family is not None:
            return from_dict(Family, {"around": surface} | dict(self.family), "family")
        return add_noise_domain(surface) if self.noise_domain else surface

    def trainer(self, batch: tuple[int, ...] = (), dtype: Any = np.float64) -> SurrogateTrainer | ProblemTrainer:
        """The runs behind the environment."""
        steps: dict[str, Any] = {"horizon": self.episode_steps, "decision_every": self.steps_per_action}
        if self.problems is not None:
            family = from_dict(ProblemFamily, self.problems, "problems")
            copies = self.copies if batch else 1
            return ProblemTrainer(family, batch=batch, noise=self.noise, copies=copies, dtype=dtype, **steps)
        return SurrogateTrainer(
            self.source(),
            batch=batch,
            noise=self.noise,
            dtype=dtype,
            **steps,
        )

    def action_map(self) -> ActionMap:
        """From actions to mixtures."""
        usual = {"scale": 3.0, "floor": 0.05} if self.problems is None else {"scale": 5.0, "floor": 0.02, "rate": 0.0}
        return from_dict(ActionMap, usual | dict(self.action or {}), "action")

    def reward_config(self) -> RewardConfig:
        """The reward.

        Raises:
            ConfigError: a term is unknown.
        """
        return parse_reward(self.reward)


def fields_for(config: SurrogateConfig, runs: SurrogateTrainer | ProblemTrainer, info: RunInfo) -> Sequence[str]:
    """The observation fields of a configuration; `info` is that of the runs, with the lag."""
    if config.fields is not None:
        return config.fields
    if not isinstance(runs, ProblemTrainer):
        return default_fields(info, runs.varies)
    return (*GENERAL_FIELDS, *(("pending",) if info.lag else ()), *(("mask",) if runs.padded else ()))


def default_fields(info: RunInfo, varies: bool) -> tuple[str, ...]:
    """The fields that a surface defines: a domain without a held-out loss of its own has no training loss either.

    Args:
        info: of the run.
        varies: whether the surface, and with it the padding, changes between episodes.
    """
    losses = ("loss", "delta_loss") if set(info.domains) <= set(info.targets) else ("target_loss", "delta_target_loss")
    more = (*(("pending",) if info.lag else ()), *(("mask",) if varies else ()))
    return (*losses, "sample_share", "epochs", "progress", *more)


class SurrogateEnv(MixtureEnv, EzPickle):
    """`acodm/Surrogate-v0`: pre-training as a response surface fitted on measured runs plays it, in microseconds.

    See `MixtureEnv` for action, observation and end of an episode, `SurrogateConfig` for the arguments, and
    `acodm_env.surrogate.dynamics` for every assumption. Default reward: `progress`, the drop of the mean held-out loss.

    ## Version History
    * v0: initial version.
    """

    def __init__(self, render_mode: str | None = None, **settings: Any):
        """Build the environment.

        Args:
            render_mode: None, "ansi" or "rgb_array".
            **settings: of `SurrogateConfig`.

        Raises:
            ConfigError: a setting is unknown or out of range.
            DataError: the surface's file is damaged.
        """
        EzPickle.__init__(self, render_mode, **settings)
        config = from_dict(SurrogateConfig, settings, "settings")
        runs, reward = config.trainer(), config.reward_config()
        if runs.varies and reward.progress_over_uniform:
            raise ConfigError(
                "progress_over_uniform=True: the uniform run differs in every episode of a family; "
                "use the vector environment (gym.make_vec), which runs it beside, or leave it out"
            )
        trainer = Lagged(runs, config.lag) if config.lag else runs
        super().__init__(
            trainer,
            fields=fields_for(config, runs, trainer.info),
            reward=reward,
            interaction=from_dict(InteractionConfig, config.interaction or {}, "interaction"),
            action=config.action_map(),
            bounds=from_dict(Bounds, config.bounds or {}, "bounds"),
            render_mode=render_mode,
        )
