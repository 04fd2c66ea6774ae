"""An exported policy at the wheel of a run."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acodm_env.mixture import Controller
from acodm_env.observation import FIELDS, Observer
from acodm_env.policy.dense import Policy
from acodm_env.policy.load import open_policy
from acodm_env.step_stats import Array, StepStats, load_window, merge, window_state
from acodm_env.support import nearest_rule, outside, unusual
from acodm_env.trainer import Mixer, RunInfo


def scaled_interval(policy: Policy, horizon: int) -> int:
    """Decision interval for a run of `horizon` steps: the learned one times the ratio of horizons, at least 1."""
    return max(1, round(policy.decision_every * horizon / policy.horizon))


class PolicyMixer(Mixer):
    """An exported policy driving a run: observes exactly as the environment did, computes only what it reads.

    A run outside of the policy's training support is driven by the nearest fixed rule (`acodm_env.support`) instead.
    """

    def __init__(
        self, policy: Policy | str | Path, name: str = "policy", say: Callable[[str], None] | None = None
    ) -> None:
        """Take the policy.

        Args:
            policy: a policy, or the name or folder of one (`open_policy`).
            name: of the mixer.
            say: told, once, why another rule than the policy drives; default: a warning.
        """
        self.policy = policy if isinstance(policy, Policy) else open_policy(policy)
        self.name = name
        self.probe_sequences = self.policy.probe_sequences
        self.needs = frozenset().union(*(FIELDS[field].needs for field, _ in self.policy.fields if field in FIELDS))
        self.rule = ""
        """Name of the fixed rule that drives the run, "" where the policy does; known once it was started."""
        self.say: Callable[[str], Any] = say or partial(warnings.warn, stacklevel=5)
        self._said = {""}

    def start(self, info: RunInfo) -> None:
        """Check that the policy fits and take the first decision.

        Raises:
            PolicyError: domains or fields do not fit.
        """
        self.policy.check_fits(info)
        super().start(info)
        self.observer = Observer(info, [name for name, _ in self.policy.fields], self.policy.interaction)
        self._controller = Controller(self.policy.action)
        self._window: StepStats | None = None
        self.rule = ""
        if reasons := outside(self.policy.support, info):
            self.rule, fixed = nearest_rule(info)
            self._weights = self.policy.bounds.project(fixed)
            self._tell(f"outside of the policy's training support: {'; '.join(reasons)}; {self.rule} drives instead")
            return
        self._tell("; ".join(unusual(self.policy.support, info)))
        self._decide(self.observer.start(info))

    def _tell(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(f"{self.name}: {text}")

    def weights(self) -> Array:
        """The mixture decided last."""
        return self._weights

    def due(self, step: int) -> bool:
        """At every decision; after the last step there is none, and under a fixed rule none at all."""
        return not self.rule and super().due(step) and (step < self.info.horizon or self.probe_sequences is None)

    def update(self, stats: StepStats) -> None:
        """Collect the window; decide when it is full."""
        if self.rule:
            return
        self._window = stats if self._window is None else merge(self._window, stats)
        if stats.step % self.info.decision_every == 0 and not stats.diverged:
            self._decide(self.observer.observe(self._window))
            self._window = None

    def _decide(self, observation: NDArray[np.float32]) -> None:
        mask = self.observer.mask if self.info.padding else None
        action = self.policy.act(observation, mask).astype(np.float64)
        decided = self._controller.take(action, self.observer.choices(), self.info.num_domains)
        self._weights = self.policy.bounds.project(decided, self.observer.epochs)
        self.observer.decided(self._weights)

    def diagnostics(self) -> dict[str, float]:
        """Share of the last observation that was clipped into its bounds; where a fixed rule drives, that one does."""
        return {"fixed_rule": 1.0} if self.rule else {"clipped_frac": self.observer.clipped_frac}

    def state_dict(self) -> dict[str, Any]:
        """Observer, mixture, and the steps since the last decision.

        Raises:
            ValueError: called between two decisions, with gradients that cannot be saved.
        """
        if self.rule:
            return {"weights": self._weights.copy()}
        state = {"observer": self.observer.state_dict(), "weights": self._weights.copy()}
        state |= {"controller": self._controller.state_dict()}
        return state if self._window is None else state | {"window": window_state(self._window)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        if self.rule:
            return
        self.observer.load_state_dict(state["observer"])
        self._weights = np.array(state["weights"], dtype=np.float64)
        if "controller" in state:  # of runs that were saved before there were slow policies
            self._controller.load_state_dict(state["controller"])
        self._window = load_window(state.get("window"))
