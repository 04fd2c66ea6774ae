"""The array environment as the learner needs it: an interrupted wave of episodes can be started again, exactly."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium.utils import seeding

from .vector import ArrayVecEnv


class ResumableVecEnv(ArrayVecEnv):
    """An `ArrayVecEnv` with the two methods by which checkpoints start an episode of a `MixtureEnv` again."""

    def reset(self) -> np.ndarray[Any, Any]:
        """First observations (N, D); remembers the generator's state that they were drawn from."""
        if self._seed is not None:
            self.core._np_random, self.core._np_random_seed = seeding.np_random(self._seed)
            self._seed = None
        self._drawn_from = dict(self.core.np_random.bit_generator.state)
        return super().reset()

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call this object's `episode_state` or `load_episode_state`, or a method of the vector environment."""
        if method_name in ("episode_state", "load_episode_state"):
            return [getattr(self, method_name)(*args, **kwargs)] * self.num_envs
        return super().env_method(method_name, *args, indices=indices, **kwargs)

    def episode_state(self) -> dict[str, Any]:
        """The generator's state from which the current episodes were started."""
        return {"rng": self._drawn_from}

    def load_episode_state(self, state: Mapping[str, Any]) -> None:
        """The next `reset()` starts the same episodes as those `episode_state` was taken in."""
        rng = np.random.Generator(np.random.PCG64())
        rng.bit_generator.state = state["rng"]
        self.core._np_random, self._seed = rng, None
