"""From runs to numbers and a picture: the stable fields of `result.json`, and `report.png`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.experiments.run.folder import RunFolder
from acodm_env.files import atomic_file
from acodm_env.objective import describe, value
from acodm_env.render import plot_mixture
from acodm_env.run_log import array
from acodm_env.step_stats import Array
from acodm_env.trainer import RunInfo


def curve(run: RunFolder) -> tuple[Array, Array]:
    """Steps (E,) and per-target test losses (E, M) of a run's evaluations."""
    lines = run.evaluations
    return np.array([line.step for line in lines], dtype=np.float64), array([line.losses for line in lines])


def mean_perplexity(losses: Array) -> Array:
    """Unweighted mean over the last axis of exp(loss)."""
    perplexity: Array = np.exp(losses).mean(-1)
    return perplexity


def first_crossing(steps: Array, perplexity: Array, level: float) -> float | None:
    """Step at which `perplexity` first reaches `level`, log-linear between evaluations; None if it never does."""
    reached = np.flatnonzero(perplexity <= level)
    if not len(reached):
        return None
    at = int(reached[0])
    if at == 0:
        return float(steps[0])
    above, below = np.log(perplexity[at - 1]), np.log(perplexity[at])
    share = (above - np.log(level)) / (above - below)
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))


def objective_curve(run: RunFolder, losses: Array) -> Array:
    """(E,) objective in nats of test losses (E, M), with the run's weights and metric; by default their mean."""
    weights = run.config.get("objective") or [1 / losses.shape[1]] * losses.shape[1]
    objective: Array = value(losses, np.array(weights), run.config.get("metric", "loss") == "perplexity")
    return objective


def _weighted(run: RunFolder, losses: Array) -> tuple[float, float]:
    """Mean loss and mean perplexity of losses (M,), by the run's weights."""
    weights = np.array(run.config.get("objective") or [1 / len(losses)] * len(losses))
    return float(value(losses, weights, False)), float(np.exp(value(losses, weights, True)))


def mixer_result(run: RunFolder, reference: RunFolder | None) -> dict[str, Any]:
    """The stable per-mixer fields of `result.json`, means by the weights of the run's objective.

    `steps_to_reference_ratio` counts the steps to the best objective of the reference; null without a reference or a
    crossing.
    """
    steps, losses = curve(run)
    lines = run.steps
    targets = run.evaluations[-1].targets
    if lines[-1].diverged:  # an earlier, finite evaluation is not what this run leads to
        losses[-1] = np.nan
    ratio = None
    if reference is not None:
        ref_steps, ref_losses = curve(reference)
        ref_objective = objective_curve(reference, ref_losses)
        best = int(np.nanargmin(ref_objective))
        level = float(np.exp(ref_objective[best]))
        crossing = first_crossing(steps, np.exp(objective_curve(run, losses)), level)
        ratio = None if crossing is None or best == 0 else crossing / float(ref_steps[best])
    mean_loss, perplexity = _weighted(run, losses[-1])
    return {
        "mean_loss_nats": _finite(mean_loss),
        "mean_perplexity": _finite(perplexity),
        "domain_loss_nats": {name: _finite(loss) for name, loss in zip(targets, losses[-1], strict=True)},
        "steps_to_reference_ratio": ratio,
        "seconds_per_step": float(np.median([line.seconds for line in lines])),
        "diverged": lines[-1].diverged,
        "final_exploration": lines[-1].diagnostics.get("exploration"),
        "overridden_steps": sum("overridden" in line.diagnostics for line in lines),
    }


def objective_result(run: RunFolder) -> dict[str, Any]:
    """What a finished run of a benchmark leaves in `result.json`: final test losses under its objective.

    The mean loss is Σ_j o_j·L_j, the mean perplexity Σ_j o_j·exp(L_j), over the held-out targets with weights o (M,);
    the worst domain is the largest loss of a target with a positive weight. All null if the run diverged.
    """
    _, losses = curve(run)
    lines = run.steps
    diverged = lines[-1].diverged
    final = np.full(losses.shape[1], np.nan) if diverged else losses[-1]
    weights = np.array(run.config["objective"])
    return {
        "targets": run.config["targets"],
        "objective": run.config["objective"],
        "domains": run.config["domains"],
        "diverged": diverged,
        "mean_loss_nats": _finite(final @ weights),
        "mean_perplexity": _finite(np.exp(final) @ weights),
        "worst_domain_loss_nats": _finite(final[weights > 0].max()),
        "domain_loss_nats": {name: _finite(loss) for name, loss in zip(run.config["targets"], final, strict=True)},
        "final_exploration": lines[-1].diagnostics.get("exploration"),
        "seconds_per_step": float(np.median([line.seconds for line in lines])),
    }


def judged(info: RunInfo, test: Mapping[str, float | None], validation: Array | None) -> dict[str, Any]:
    """The objective at the end on both splits, and the validation losses (M,) of a run; null if it diverged."""
    losses = np.array([np.nan if test[name] is None else test[name] for name in info.targets], dtype=np.float64)
    held = np.full(len(info.targets), np.nan) if validation is None else validation
    return {
        "metric": info.metric,
        "objective_nats": _finite(info.judge(losses)),
        "validation_objective_nats": _finite(info.judge(held)),
        "validation_loss_nats": {name: _finite(loss) for name, loss in zip(info.targets, held, strict=True)},
    }


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


LEARNED = ("generalist",)
"""Rows that are drawn heavier."""


def draw(runs: Mapping[str, RunFolder], path: Path, title: str) -> None:
    """Write the picture: the test objective against steps on top, each mixer's mixture over time below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * max(len(runs), 3), 7.5), dpi=110, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.25, 1], squeeze=False)[:, 0]
    whole, end = top.subplots(1, 2, width_ratios=[2, 1])
    _draw_objective(whole, runs, 0.0)
    _draw_objective(end, runs, 0.7)
    whole.set_title(title, loc="left", fontsize="medium")
    end.set_title("the last 30 %", loc="left", fontsize="medium")
    whole.legend(fontsize="small")
    axes = np.atleast_1d(bottom.subplots(1, len(runs), sharey=True))
    for ax, (name, run) in zip(axes, runs.items(), strict=True):
        _draw_mixture(ax, run)
        ax.set_title(name, fontsize="medium")
    axes[0].set_ylabel("mixture weight")
    handles, labels = axes[0].get_legend_handles_labels()
    bottom.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small", frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


def _draw_objective(ax: Any, runs: Mapping[str, RunFolder], begin: float) -> None:
    """The objective from `begin` (share of the run) on; beside uniform nothing is shown that is far above it."""
    highest = -np.inf
    for name, run in runs.items():
        steps, losses = curve(run)
        shown = steps >= max(begin * steps[-1], 1)
        nats = objective_curve(run, losses)[shown]
        ax.plot(steps[shown], nats, label=name, lw=1.8 if name in LEARNED else 1.1)
        highest = float(nats.max()) if name == "uniform" else highest
    if np.isfinite(highest):
        ax.set_ylim(top=highest + 0.1 * (highest - ax.get_ylim()[0]))
    ax.set_xlabel("optimiser step")
    ax.set_ylabel("test objective, nats")
    ax.grid(alpha=0.3)


def _draw_mixture(ax: Any, run: RunFolder) -> None:
    lines = run.steps
    mixture = array([line.requested for line in lines])  # realised to within one sequence per domain
    plot_mixture(ax, [line.step for line in lines], mixture, run.config["domains"])
    ax.set_ylabel("")
    ax.set_xlabel("optimiser step")
    ax.margins(x=0)


def time_averaged(run: RunFolder) -> dict[str, dict[str, float]]:
    """A run's mixtures by name: the mean over steps of what was requested, and the last one."""
    requested = array([line.requested for line in run.steps])
    domains = run.config["domains"]
    return {
        "time_averaged": dict(zip(domains, requested.mean(0).tolist(), strict=True)),
        "final": dict(zip(domains, requested[-1].tolist(), strict=True)),
    }


def objective_name(settings: Mapping[str, Any]) -> str:
    """The objective in words, such as "log mean perplexity of prose ×2, licences"; "" where none was chosen."""
    if "metric" not in settings:
        return ""
    names = settings["targets"]
    weights = dict(zip(names, settings.get("objective") or [1 / len(names)] * len(names), strict=True))
    alike = len(weights) > 1 and max(weights.values()) - min(weights.values()) < 1e-9
    return describe(settings["metric"], {} if alike else weights)
