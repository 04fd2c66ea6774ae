"""What certificates would have said: of every task and seed, by the validation split of the other seeds alone.

A certificate (`acodm_env.agents.certificate`) tries a policy on a proxy with fresh seeds. Here the proxy is the task's
own model and the fresh seeds are the task's others, so that its verdict can be held against the test split of the seed
that it did not see. A tilt that is halved is not tried: what does not beat uniform is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from acodm_env.agents.certificate import LEAST_GAIN_NATS, gain
from acodm_env.experiments.benchmark.suite.regret import UNIFORM, Outcome

FEWEST_SEEDS = 3
"""One to judge, and two that show the noise."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A verdict on a policy, and what came of it."""

    task: str
    seed: int
    """The seed that it is held against."""
    kept: bool
    gain_nats: float
    """Uniform's test objective less the policy's, with that seed."""

    @property
    def right(self) -> bool:
        """Kept and not behind uniform, or refused and not ahead of it by more than counts."""
        return self.gain_nats >= 0 if self.kept else self.gain_nats <= LEAST_GAIN_NATS

    def __str__(self) -> str:
        return f"{self.task} seed {self.seed} ({'kept' if self.kept else 'refused'}, gain {self.gain_nats:+.3f} nats)"


def verdicts(outcomes: Sequence[Outcome], row: str) -> list[Verdict]:
    """Of every task with at least three seeds of the row and of uniform."""
    found = []
    for one in outcomes:
        ahead = {seed: -nats for seed, nats in one.behind(row).items()}
        if len(ahead) < FEWEST_SEEDS:
            continue
        for seed, nats in ahead.items():
            others = [other for other in ahead if other != seed]
            uniform, own = ([one.validation[name][other] for other in others] for name in (UNIFORM, row))
            found.append(Verdict(task=one.task.name, seed=seed, kept=gain(uniform, own).beats, gain_nats=nats))
    return found


def told(outcomes: Sequence[Outcome], row: str) -> list[str]:
    """A sentence on the verdicts on a policy; none without three seeds anywhere."""
    found = verdicts(outcomes, row)
    if not found:
        return []
    wrong = [str(each) for each in found if not each.right]
    kept = sum(each.kept for each in found)
    rest = f"; wrong: {', '.join(wrong)}" if wrong else ""
    return [
        f"certificates of {row} by the other seeds: {len(found) - len(wrong)}/{len(found)} right, {kept} kept{rest}"
    ]
