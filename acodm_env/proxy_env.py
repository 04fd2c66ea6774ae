"""`acodm/ProxyPretrain-v0`: the environment around a small language model that is pre-trained from scratch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gymnasium.utils import EzPickle

from acodm_env.config import from_dict
from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.reward import RewardConfig, parse_reward
from acodm_env.trainer import Trainer
from acodm_env.wrapper import Lagged


class ProxyPretrainEnv(MixtureEnv, EzPickle):
    """`acodm/ProxyPretrain-v0`: a small language model pre-trained from scratch on a token store.

    Everything is optional: `gym.make("acodm/ProxyPretrain-v0")` trains the `tiny` preset on the `pocket` corpus,
    which it harvests from the Python installation on first use. See `MixtureEnv` for spaces and rewards.
    """

    def __init__(
        self,
        corpus: str = "pocket",
        proxy: str = "tiny",
        episode_steps: int = 200,
        steps_per_action: int = 5,
        fields: Sequence[str] | None = None,
        reward: str | Mapping[str, Any] = "interaction",
        interaction: Mapping[str, Any] | None = None,
        action: Mapping[str, Any] | None = None,
        bounds: Mapping[str, Any] | None = None,
        lag: int = 0,
        device: str = "auto",
        lm: Mapping[str, Any] | None = None,
        render_mode: str | None = None,
        objective: str = "loss",
        targets: str | Mapping[str, float] | None = None,
        domains: str | Sequence[str] | None = None,
        cut: str | Mapping[str, int] | None = None,
    ):
        """Build the environment.

        Args:
            corpus: "pocket", or the folder of a token store written by `acodm prepare`.
            proxy: model preset, `config.json` or hub name of the proxy language model.
            episode_steps: optimiser steps per episode.
            steps_per_action: optimiser steps per decision.
            fields: names of observation fields; None is the default set.
            reward: a term's name, a mapping of terms to weights, or all of `RewardConfig`'s settings.
            interaction: settings of `InteractionConfig`.
            action: settings of `ActionMap`.
            bounds: settings of `Bounds`.
            lag: optimiser steps by which a mixture takes effect late.
            device: "auto", "cpu", "cuda" or "cuda:N".
            lm: further settings of `LMConfig`, such as `batch_size`, `sequence_length`, `learning_rate`.
            render_mode: None, "ansi" or "rgb_array".
            objective: what is averaged over the targets, "loss" or "perplexity" (its logarithm).
            targets: weights of the held-out targets, {"prose": 2}; None: the domains trained on, all alike. A target
                may be any domain of the corpus, trained on or not.
            domains: names of the domains to train on; None: all.
            cut: sequences to which the training text of a domain is cut, {"prose": 160}.

        Raises:
            ConfigError: a setting is unknown or out of range, or there are fewer than two domains to choose from.
            DataError: the corpus is missing or does not fit.
        """
        EzPickle.__init__(
            self, corpus, proxy, episode_steps, steps_per_action, fields, reward, interaction, action, bounds, lag,
            device, lm, render_mode, objective, targets, domains, cut,
        )  # fmt: skip
        from acodm_env.corpus import open_corpus
        from acodm_env.corpus.problem import choose_problem
        from acodm_env.pretrain.config import LMConfig
        from acodm_env.pretrain.trainer import LMTrainer

        settings = {
            "model": proxy,
            "horizon": episode_steps,
            "decision_every": steps_per_action,
            "device": device,
        }
        config = from_dict(LMConfig, settings | dict(lm or {}), "lm")
        terms = parse_reward(reward)
        problem = choose_problem(
            open_corpus(corpus),
            sequence_length=config.sequence_length,
            domains=domains,
            targets=_the_targets(terms, targets),
            objective=objective,
            cut=cut,
        )
        problem.require_choice()
        trainer: Trainer = LMTrainer(config, problem.store, **problem.lm_settings)
        super().__init__(
            Lagged(trainer, lag) if lag else trainer,
            fields=fields,
            reward=replace(terms, objective=None),  # the run's own, which tables report too
            interaction=from_dict(InteractionConfig, interaction or {}, "interaction"),
            action=from_dict(ActionMap, action or {}, "action"),
            bounds=from_dict(Bounds, bounds or {}, "bounds"),
            render_mode=render_mode,
        )


def _the_targets(reward: RewardConfig, targets: str | Mapping[str, float] | None) -> str | Mapping[str, float] | None:
    """The targets of rewards and tables alike, whichever of the two settings names them."""
    if reward.objective is not None and targets is not None:
        raise ConfigError(f"reward.objective={dict(reward.objective)}: must be left out beside targets={targets}")
    return targets if reward.objective is None else reward.objective
