"""What the report shows over the course of the runs: means with bands over seeds, and mixtures of one seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from acodm_env.experiments.comparison.load import Comparison, Run
from acodm_env.experiments.comparison.statistics import CONFIDENCE
from acodm_env.experiments.report.figure_style import MEAN_OF
from acodm_env.experiments.report.figures import Curve
from acodm_env.run_log import array
from acodm_env.step_stats import Array

MANY_EPOCHS = 4.0
"""Up to four passes repeated data are nearly as good as new data (Muennighoff et al., arXiv 2305.16264)."""


def baseline_of(comparison: Comparison) -> str:
    """The mixer that differences are taken to: uniform where it is there."""
    return "uniform" if "uniform" in comparison.mixers else comparison.reference


def usable(runs: Sequence[Run]) -> dict[int, Run]:
    """Runs to draw, by seed: the finished ones, or, if none is, those that were evaluated at all."""
    finished = {run.seed: run for run in runs if run.status == "finished" and len(run.steps)}
    return finished or {run.seed: run for run in runs if run.status == "unfinished" and len(run.steps)}


def curve(comparison: Comparison, mixer: str, schedule: str, metric: str) -> Curve | None:
    """A mixer's mean held-out loss or perplexity over its seeds; None if there is nothing to draw.

    Args:
        comparison: the runs.
        mixer: its name.
        schedule: of the learning rate.
        metric: "loss" (nats) or "perplexity".
    """
    runs = usable(comparison.select(mixer, schedule))
    return _curve(comparison, mixer, {seed: _series(comparison, run, metric) for seed, run in runs.items()})


def difference_curve(comparison: Comparison, mixer: str, schedule: str, metric: str) -> Curve | None:
    """A mixer minus the baseline, paired by seed: loss in nats, perplexity as a fraction of the baseline's."""
    ours = usable(comparison.select(mixer, schedule))
    theirs = usable(comparison.select(baseline_of(comparison), schedule))
    series = {}
    for seed in ours.keys() & theirs.keys():
        one, other = (_series(comparison, runs[seed], metric) for runs in (ours, theirs))
        steps = sorted(one.keys() & other.keys())
        series[seed] = {
            step: one[step] - other[step] if metric == "loss" else one[step] / other[step] - 1 for step in steps
        }
    return _curve(comparison, mixer, series)


def _series(comparison: Comparison, run: Run, metric: str) -> dict[float, float]:
    values = run.mean_loss(comparison.objective) if metric == "loss" else run.perplexity(comparison.objective)
    return dict(zip(run.steps.tolist(), values.tolist(), strict=True))


def _curve(comparison: Comparison, mixer: str, series: Mapping[int, Mapping[float, float]]) -> Curve | None:
    """Mean and Student t band over seeds, at the steps that all of them share."""
    if not series:
        return None
    steps = sorted(set.intersection(*(set(values) for values in series.values())))
    if not steps:
        return None
    values = np.array([[seed[step] for step in steps] for _, seed in sorted(series.items())])  # (seeds, E)
    mean, half = values.mean(0), np.full(len(steps), np.nan)
    if len(values) > 1:
        from scipy.stats import t

        half = t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(0, ddof=1) / np.sqrt(len(values))
    tokens = np.array(steps) * max(comparison.tokens_per_step, 1)
    return Curve(name=mixer, tokens=tokens, mean=mean, low=mean - half, high=mean + half, num_seeds=len(values))


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How one run mixed its domains."""

    mixer: str
    seed: int
    tokens: Array
    """(steps,) training tokens after each step."""
    requested: Array
    """(steps, K)"""
    realised: Array
    """(steps, K)"""
    epochs: Array
    """(K,) passes over each domain at the end."""

    @property
    def changes(self) -> bool:
        """Whether the mixture changed during the run."""
        return bool(np.ptp(self.requested, axis=0).max() > 1e-6)


@dataclass
class Mixtures:
    """Mixtures of every mixer under one schedule, one seed each."""

    found: dict[str, Mixture] = field(default_factory=dict)

    @classmethod
    def read(cls, comparison: Comparison, schedule: str, seed: int | None) -> "Mixtures":
        """Read one run's log per mixer: of `seed`, or of the first seed that has one."""
        found = {}
        for mixer in comparison.mixers:
            runs = sorted(comparison.select(mixer, schedule), key=lambda run: (run.status != "finished", run.seed))
            for run in runs if seed is None else [run for run in runs if run.seed == seed]:
                mixture = read_mixture(run, len(comparison.domains))
                if mixture is not None:
                    found[mixer] = mixture
                    break
        return cls(found)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds shown."""
        return tuple(sorted({mixture.seed for mixture in self.found.values()}))


def read_mixture(run: Run, num_domains: int) -> Mixture | None:
    """A run's mixtures; None if its log has no whole line, or is another benchmark's."""
    own = list(takewhile(lambda line: len(line.requested) == num_domains, run.steps_taken()))
    if not own:
        return None
    return Mixture(
        mixer=run.mixer,
        seed=run.seed,
        tokens=np.array([line.tokens for line in own], dtype=np.float64),
        requested=array([line.requested for line in own]),
        realised=array([line.realised for line in own]),
        epochs=array(own[-1].epochs),
    )


def dynamic_pairs(mixers: Sequence[str]) -> list[tuple[str, str]]:
    """Mixers with the row that replays their time average."""
    return [(name, MEAN_OF + name) for name in mixers if MEAN_OF + name in mixers]
