"""A training run drawn as text or as a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import RunInfo

_BAR = 24  # characters


def as_text(info: RunInfo, weights: Array, losses: Array, history: Sequence[StepStats]) -> str:
    """One line per domain: weight as a bar, last loss in nats."""
    step = history[-1].step if history else 0
    width = max(len(name) for name in info.domains)
    lines = [f"step {step}/{info.horizon}  loss {history[-1].loss if history else info.initial_loss_nats:.3f} nats"]
    for name, weight, loss in zip(info.domains, weights, losses, strict=True):
        bar = "█" * round(_BAR * float(weight))
        lines.append(f"{name:<{width}} {weight:6.3f} {bar:<{_BAR}} {loss:7.3f}")
    return "\n".join(lines)


def as_picture(info: RunInfo, weights: Array, losses: Array, history: Sequence[StepStats]) -> NDArray[np.uint8]:
    """Mixture as stacked areas over steps and per-domain losses, uint8 (400, 800, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    mixture_axes, loss_axes = figure.subplots(1, 2)
    steps = [0, *(stats.step for stats in history)]
    first = history[0].requested if history else weights
    plot_mixture(mixture_axes, steps, np.array([first, *(s.requested for s in history)]), info.domains)
    for index, name in enumerate(info.domains):
        curve = [info.initial_loss_nats, *(stats.losses[index] for stats in history)]
        loss_axes.plot(steps, curve, label=name)
    for axes in (mixture_axes, loss_axes):
        axes.set_xlim(0, info.horizon)
        axes.set_xlabel("optimiser step")
    loss_axes.set_ylim(0, info.initial_loss_nats * 1.05)
    loss_axes.set_ylabel("training loss (nats)")
    loss_axes.legend(fontsize="x-small")
    canvas.draw()  # type: ignore[no-untyped-call]
    rgba = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return rgba[..., :3].copy()


def plot_mixture(axes: Any, steps: Sequence[int], mixture: Array, domains: Sequence[str]) -> None:
    """Draw a mixture over time (T, K) as stacked areas on matplotlib `axes`."""
    axes.stackplot(steps, mixture.T, labels=domains)
    axes.set_ylim(0, 1)
    axes.set_ylabel("mixture weight")
