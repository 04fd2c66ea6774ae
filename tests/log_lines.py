"""Lines of a run's log with as much said of them as a test cares for."""

from typing import Any

from acodm_env.run_log import StepLine


def step_line(step: int = 1, **told: Any) -> StepLine:
    """A line of a step over two domains; what is not told is unremarkable."""
    usual = {"tokens": 100 * step, "requested": [0.5, 0.5], "realised": [0.5, 0.5], "losses": [2.0, 2.0]}
    usual |= {"epochs": [0.0, 0.0], "loss": 2.0, "diverged": False, "seconds": 1.0}
    return StepLine(step=step, **{**usual, **told})
