"""The Gymnasium face of a trainer: `MixtureEnv` over any `Trainer`.

Nothing here draws from a global random generator: every draw comes from generators spawned from `self.np_random`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from acodm_env.errors import ConfigError
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds, Controller
from acodm_env.objective import value as objective_value
from acodm_env.observation import Observer
from acodm_env.reward import Outcome, RewardConfig, compute_terms, objective_weights
from acodm_env.step_stats import Array, StepStats, load_window, merge, window_state
from acodm_env.trainer import Trainer, require
from acodm_env.wrapper import innermost

Observation = NDArray[np.float32]


class MixtureEnv(gym.Env[Observation, NDArray[np.float32]]):
    """The choice of the data mixture during one training run, as an episode.

    ## Description
    An episode is one training run of `trainer.info.horizon` optimiser steps. At each decision the agent sets the
    mixture; the trainer then takes `trainer.info.decision_every` steps under it.

    ## Action Space
    `Box(-1, 1, (K,))`: one logit per training domain, turned into a mixture by `ActionMap` and projected into
    `Bounds`. With fields of `acodm_env.view` there is one, without effect, for every target that is no domain too.

    ## Observation Space
    `Box` of the concatenated fields, float32, each within its own finite bounds (`observation.FIELDS`).

    | field | size | meaning |
    |---|---|---|
    | loss | K | last training loss, nats; ln V before the first draw |
    | delta_loss | K | its change since the previous decision, nats |
    | sample_share | K | share of all sequences drawn so far |
    | epochs | K | passes e over the domain, as e/(1+e) |
    | gradient_norm | K | ln of the gradient norm over its running mean |
    | interaction | K | smoothed r_i = Σ_{j≠i} H_ij / s |
    | layer_norm | M_layers | RMS of layer weights at fixed relative depths |
    | layer_change | M_layers | their relative change since the previous decision |
    | progress | 1 | step / horizon |
    | pending | lag·K | mixtures decided but not yet in effect (only with `lag`) |
    | target_loss | M | last held-out loss of every target, nats (on request) |
    | delta_target_loss | M | its change since the previous decision, nats (on request) |
    | mask | K | 1 for a domain, 0 for padding (on request) |

    ## Rewards
    Named terms, see `acodm_env.reward`; default `interaction`. `info["domain_rewards"]` (K,) is always there.

    ## Starting State
    A freshly initialised model; no domain was drawn.

    ## Episode End
    `truncated` at the horizon; `terminated`, with a finite penalty, when the language model diverges.

    ## Arguments
    `trainer`, `fields`, `reward`, `interaction`, `action`, `bounds`, `render_mode`: see the constructor.

    ## Version History
    * v0: initial version.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (as Gymnasium declares it)
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 4,
    }

    def __init__(
        self,
        trainer: Trainer,
        *,
        fields: Sequence[str] | None = None,
        reward: RewardConfig | None = None,
        interaction: InteractionConfig | None = None,
        action: ActionMap | None = None,
        bounds: Bounds | None = None,
        render_mode: str | None = None,
    ):
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ConfigError(f"render_mode={render_mode}: must be one of {self.metadata['render_modes']}")
        self.trainer = trainer
        self.probe_sequences: int | None = getattr(innermost(trainer), "probe_sequences", None)
        """Held-out sequences of what is shown at a decision; None: as many as evaluations have."""
        self.reward_config = reward or RewardConfig()
        self.action_map = action or ActionMap()
        self.bounds = bounds or Bounds()
        self.render_mode = render_mode
        self.observer = Observer(trainer.info, fields, interaction)
        self.observation_space = gym.spaces.Box(self.observer.low, self.observer.high, dtype=np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.observer.num_rows,), dtype=np.float32)
        self._controller = Controller(self.action_map)
        objective_weights(self.reward_config.objective, trainer.info)  # refuse early
        self.needs = self.observer.needs | self.reward_config.needs
        """What fields and reward have measured (`trainer.require`)."""
        self.bounds.project(self.action_map.weights(np.zeros(trainer.info.num_domains)))  # refuse early
        require(trainer, self.needs, "env: fields and reward")
        _check_samples(trainer, self.needs)
        self._uniform_curve: dict[int, float] | None = None
        self._history: list[StepStats] = []
        self._window: StepStats | None = None  # steps since the last decision
        self._decided = False  # whether the mixture in force is that of the window to come
        self._episode_rng: dict[str, Any] | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start a new training run. With a seed the episode is the same, bit for bit, every time (CPU)."""
        super().reset(seed=seed)
        self._episode_rng = dict(self.np_random.bit_generator.state)
        if self._wants_curve() and self._uniform_curve is None:
            self._uniform_curve = self._run_uniform()
        self.trainer.reset(self._run_rng())
        self._history, self._window, self._decided = [], None, False
        observation = self.observer.start(self.trainer.info, problem=self._problem())
        self._objective_weights = objective_weights(self.reward_config.objective, self.trainer.info)
        self._uniform_end = self._end_of_uniform()
        self._controller.start()
        self._weights = self._mixture(np.zeros(self.observer.num_rows))
        self._controller.start()
        self._objective = self.trainer.info.initial_loss_nats
        if "validation" in self.reward_config.needs:
            self._objective = self._judge(self.trainer.evaluate("validation"))
        self._last_parts = dict.fromkeys(self.reward_config.terms, 0.0)
        return observation, self._info(np.zeros(len(self._weights)), diverged=False)

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Train `decision_every` optimiser steps under the action's mixture."""
        if self._episode_rng is None:
            raise ConfigError("step() was called before reset(): call reset() first")
        if not self._decided:  # else an interruption left steps of this decision undone
            self._weights = self._mixture(np.asarray(action, dtype=np.float64))
            self.observer.decided(self._weights)
            self._decided = True
        window = self._train_window()
        self._decided = False
        diverged = window.diverged
        ended = diverged or window.step >= self.trainer.info.horizon
        before = self._objective
        if not diverged and (ended or "validation" in self.needs):
            held_out = self.trainer.evaluate("validation")
            window = replace(window, eval_losses=self._measured(held_out))
            self._objective = self._judge(held_out)
        observation = self.observer.observe(window)
        self._history.append(replace(window, gradients=None))
        outcome = Outcome(
            weights=window.requested,  # under a lag not what was decided just now
            observer=self.observer,
            objective_before=before,
            objective=self._objective,
            uniform_drop=self._uniform_drop(window.step),
            ended=ended,
            diverged=diverged,
            uniform_end=self._uniform_end,
        )
        reward, domain_rewards, self._last_parts = compute_terms(self.reward_config, outcome)
        info = self._info(domain_rewards, diverged=diverged)
        return observation, float(reward), bool(diverged), bool(ended and not diverged), info

    def _measured(self, held_out: Array) -> Array:
        """What is shown of held-out losses (M,): where little is measured, a measurement of its own."""
        sequences = self.probe_sequences
        return held_out if sequences is None else self.trainer.evaluate("validation", sequences)

    def _wants_curve(self) -> bool:
        """Whether the reward takes a uniform run, which a surface does not need for its end alone."""
        end = self.reward_config.final_over_uniform and not hasattr(innermost(self.trainer), "static_losses")
        return self.reward_config.progress_over_uniform or end

    def _end_of_uniform(self) -> float:
        """Objective at the end of the uniform run, where the reward asks for it, nats."""
        if not self.reward_config.final_over_uniform:
            return 0.0
        surface = innermost(self.trainer)
        if hasattr(surface, "static_losses"):
            return self._judge(surface.static_losses())
        assert self._uniform_curve is not None
        return self._uniform_curve[max(self._uniform_curve)]

    def _run_rng(self) -> np.random.Generator:
        """The generator of the episode's training run: the first draw after `_episode_rng`."""
        return np.random.default_rng(int(self.np_random.integers(2**63)))

    def _mixture(self, action: Array) -> Array:
        decided = self._controller.take(action, self.observer.choices(), self.trainer.info.num_domains)
        return self.bounds.project(decided, self.observer.epochs)

    def _problem(self) -> dict[str, Array] | None:
        """What a randomised surrogate's runs differ in, for the observer."""
        problem: dict[str, Array] | None = getattr(innermost(self.trainer), "problem", None)
        return problem

    def _train_window(self) -> StepStats:
        """The steps up to the next decision; those that an interruption left undone, if there was one."""
        interval, horizon, ended = self.trainer.info.decision_every, self.trainer.info.horizon, False
        while not ended:
            stats = self.trainer.step(self._weights)
            self._window = stats if self._window is None else merge(self._window, stats)
            ended = stats.diverged or stats.step % interval == 0 or stats.step >= horizon
        window, self._window = self._window, None
        assert window is not None  # decision_every >= 1 is checked by the trainer
        return window

    def _judge(self, losses: Array) -> float:
        """The objective of held-out losses (M,), nats."""
        value = float(objective_value(losses, self._objective_weights, self.trainer.info.metric == "perplexity"))
        return value if np.isfinite(value) else self.trainer.info.initial_loss_nats

    def _run_uniform(self) -> dict[int, float]:
        """Objective after each decision of one uniform run, seeded apart from the episodes."""
        num_domains = self.trainer.info.num_domains
        self.trainer.reset(np.random.default_rng(0))
        self._weights = np.full(num_domains, 1 / num_domains)
        self._objective_weights = objective_weights(self.reward_config.objective, self.trainer.info)
        curve = {0: self._judge(self.trainer.evaluate("validation"))}
        while max(curve) < self.trainer.info.horizon:
            step = self._train_window().step
            curve[step] = self._judge(self.trainer.evaluate("validation"))
        return curve

    def _uniform_drop(self, step: int) -> float:
        if self._uniform_curve is None:
            return 0.0
        earlier = max(known for known in self._uniform_curve if known < step)
        return self._uniform_curve[earlier] - self._uniform_curve[step]

    def _info(self, domain_rewards: Array, *, diverged: bool) -> dict[str, Any]:
        """Flat, the same keys every step, floats or (K,) float64 arrays, never NaN."""
        last = self._history[-1] if self._history else None
        num_domains = self.trainer.info.num_domains
        info: dict[str, Any] = {
            "domain_rewards": domain_rewards.astype(np.float64),
            "weights": self._weights.copy(),
            "realised": last.realised.copy() if last else np.zeros(num_domains),
            "losses": self.observer.losses.copy(),
            "epochs": self.observer.epochs.copy(),
            "step": float(self.observer.step),
            "tokens": float(last.tokens) if last else 0.0,
            "objective": float(self._objective),
            "clipped_frac": float(self.observer.clipped_frac),
            "mixture_age": float(last.mixture_age) if last else 0.0,
            "diverged": float(diverged),
        }
        return info | {f"reward_{name}": float(value) for name, value in self._last_parts.items()}

    def episode_state(self) -> dict[str, Any]:
        """The generator's state from which the current episode was started: enough to start it again."""
        return {"rng": self._episode_rng}

    def load_episode_state(self, state: Mapping[str, Any]) -> None:
        """The next `reset()` starts the same episode as the one `episode_state` was taken in."""
        rng = np.random.Generator(np.random.PCG64())
        rng.bit_generator.state = state["rng"]
        self.np_random = rng

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly in mid-episode: trainer, observer, reward and generators.

        It may be taken after `step` was left by an exception of the trainer, between two of its steps: the same action
        again takes the others. The history of the episode is left out: a picture of a resumed one begins where it was
        resumed.

        Raises:
            ConfigError: no episode was started.
        """
        if self._episode_rng is None:
            raise ConfigError("state_dict() was called before reset(): there is no episode to save; call reset() first")
        last = replace(self._history[-1], seconds={}) if self._history else None  # a state is the same at any speed
        return {
            "trainer": self.trainer.state_dict(),
            "observer": self.observer.state_dict(),
            "controller": self._controller.state_dict(),
            "weights": self._weights.copy(),
            "objective": float(self._objective),
            "parts": {name: float(value) for name, value in self._last_parts.items()},
            "uniform_curve": None if self._uniform_curve is None else list(self._uniform_curve.items()),
            "last": window_state(last),
            "window": window_state(self._window),
            "decided": self._decided,
            "rng": self.np_random.bit_generator.state,
            "episode_rng": self._episode_rng,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value: the next call is `step`, not `reset`."""
        self.load_episode_state({"rng": state["episode_rng"]})
        self.trainer.reset(self._run_rng())  # builds what the state is loaded into
        self.trainer.load_state_dict(state["trainer"])
        self.observer.start(self.trainer.info, problem=self._problem())
        self.observer.load_state_dict(state["observer"])
        if "controller" in state:  # of episodes that were saved before there were slow actions
            self._controller.load_state_dict(state["controller"])
        self._objective_weights = objective_weights(self.reward_config.objective, self.trainer.info)
        self._weights = np.array(state["weights"], dtype=np.float64)
        self._objective = float(state["objective"])
        self._last_parts = dict(state["parts"])
        curve = state["uniform_curve"]
        self._uniform_curve = None if curve is None else {int(step): float(value) for step, value in curve}
        self._uniform_end = self._end_of_uniform()
        last = load_window(state["last"])
        self._history, self._window = [] if last is None else [last], load_window(state["window"])
        self._decided = bool(state.get("decided", self._window is not None))
        self.load_episode_state({"rng": state["rng"]})
        self._episode_rng = dict(state["episode_rng"])

    def render(self) -> Any:
        """The run so far: text bars (`ansi`) or a picture of mixture and losses (`rgb_array`, uint8 (H, W, 3))."""
        if self.render_mode is None:
            gym.logger.warn("render() was called without a render_mode; pass render_mode='ansi' to gym.make")
            return None
        from acodm_env.render import as_picture, as_text

        draw = as_text if self.render_mode == "ansi" else as_picture
        return draw(self.trainer.info, self._weights, self.observer.losses, self._history)


def _check_samples(trainer: Trainer, needs: frozenset[str]) -> None:
    """The unbiased Gram matrix takes two sequences per domain and decision; below that the reward would stay 0."""
    info = trainer.info
    if "gram" in needs and info.batch_size * info.decision_every < 2 * info.num_domains:
        raise ConfigError(
            f"batch_size={info.batch_size}: must be at least {-(-2 * info.num_domains // info.decision_every)} for "
            f"{info.num_domains} domains and {info.decision_every} steps per action, so that every domain has two "
            f"sequences per decision to estimate its gradient from; raise batch_size or steps_per_action"
        )
