"""Whether runs of one seed start from the same model and see the same data, so that only their mixers differ."""

from collections.abc import Sequence

import numpy as np

from acodm_env.experiments.comparison.run import Run


def unfair(runs: Sequence[Run]) -> list[str]:
    """Seeds whose runs did not start from the same model, or do not see the same data in the same order."""
    found = []
    for schedule, seed in dict.fromkeys((run.schedule, run.seed) for run in runs):
        group = [run for run in runs if (run.schedule, run.seed) == (schedule, seed)]
        group = [run for run in group if run.ended and run.result and "data_seed" in run.result]
        first = [run.losses[0] for run in group if len(run.losses)]
        same_model = all(np.allclose(losses, first[0], rtol=1e-5, equal_nan=True) for losses in first)
        if not same_model or len({run.result["data_seed"] for run in group if run.result}) > 1:
            found.append(f"{schedule} schedule, seed {seed}: the runs do not start alike, and so do not compare")
    return found
