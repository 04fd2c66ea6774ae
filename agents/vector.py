"""The array surrogate as Stable-Baselines3's `VecEnv`: the same arrays, without an environment object per episode.

Differences to Gymnasium's vector environment are SB3's: the step that ends an episode returns the first observation of
the next one, with the last one in `infos[i]["terminal_observation"]`. The horizon is the end of the run and `progress`
is in the observation, so no episode counts as cut short: there is nothing behind it to bootstrap from.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from acodm_env.surrogate.vector import SurrogateVectorEnv

_INFO = ("domain_rewards", "weights", "objective", "clipped_frac")
"""What of the vector environment's info every episode's own has."""


class ArrayVecEnv(VecEnv):
    """SB3's view of a `SurrogateVectorEnv`."""

    def __init__(self, core: SurrogateVectorEnv):
        self.core = core
        self.render_mode = None
        self._seed: int | None = None
        self._drawn_from: dict[str, Any] = {}
        self._returns = np.zeros(core.num_envs)
        super().__init__(core.num_envs, core.single_observation_space, core.single_action_space)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """The next `reset` starts from this seed; all episodes are drawn from one generator."""
        self._seed = seed
        return [seed] * self.num_envs

    def reset(self) -> np.ndarray[Any, Any]:
        """First observations (N, D); remembers the generator's state that the episodes were drawn from."""
        if self._seed is not None:
            self.core._np_random, self.core._np_random_seed = seeding.np_random(self._seed)
            self._seed = None
        self._drawn_from = dict(self.core.np_random.bit_generator.state)
        observation, _ = self.core.reset()
        self._returns[:] = 0.0
        return observation

    def step_async(self, actions: np.ndarray[Any, Any]) -> None:
        """Remember the actions (N, K)."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """One decision in every episode."""
        observation, reward, _, truncated, info = self.core.step(self._actions)
        self._returns += reward
        rows = zip(*(info[name] for name in _INFO), strict=True)
        infos: list[dict[str, Any]] = [
            dict(zip(_INFO, row, strict=True)) | {"TimeLimit.truncated": False} for row in rows
        ]
        if truncated.all():
            steps = int(info["step"][0])
            for index, entry in enumerate(infos):
                entry["terminal_observation"] = observation[index]
                entry["episode"] = {"r": float(self._returns[index]), "l": steps, "t": 0.0}
            observation = self.reset()
        return observation, np.asarray(reward, dtype=np.float32), truncated, infos

    def close(self) -> None:
        """Nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The vector environment's attribute, once per episode."""
        return [getattr(self.core, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the vector environment, which all episodes share."""
        setattr(self.core, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call `episode_state` or `load_episode_state`, or a method of the vector environment, once for all."""
        owner = self if method_name in ("episode_state", "load_episode_state") else self.core
        result = getattr(owner, method_name)(*args, **kwargs)
        return [result] * len(list(self._get_indices(indices)))

    def episode_state(self) -> dict[str, Any]:
        """The generator's state from which the current episodes were started, as `MixtureEnv` has it."""
        return {"rng": self._drawn_from}

    def load_episode_state(self, state: Mapping[str, Any]) -> None:
        """The next `reset()` starts the same episodes as those `episode_state` was taken in."""
        rng = np.random.Generator(np.random.PCG64())
        rng.bit_generator.state = state["rng"]
        self.core._np_random, self._seed = rng, None

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """Never: there is no environment object to wrap."""
        return [False] * len(list(self._get_indices(indices)))
