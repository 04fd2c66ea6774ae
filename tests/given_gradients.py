"""Gradient sums made up, and mixers that see them."""

import numpy as np

from acodm_env.agents.baselines import make_mixer
from acodm_env.step_stats import StepStats
from toy import ToyTrainer

NAN = float("nan")


class Given:
    """Gradient sums with a Gram matrix made up; the Gram matrix of a window is that of its last step."""

    def __init__(self, gram, noise=0.0):
        self.matrix = np.array(gram, dtype=float)
        self.noise = np.where(np.isnan(np.diag(self.matrix)), NAN, np.array(noise, dtype=float))
        self.formed = 0

    def __add__(self, other):
        return other

    def gram(self):
        self.formed += 1
        return self.matrix.copy(), self.noise.copy()


def info(num_domains=3, decision_every=1):
    return ToyTrainer((1 / num_domains,) * num_domains, decision_every=decision_every).info


def started(name, num_domains=3, decision_every=1, **options):
    mixer = make_mixer(name, **options)
    mixer.start(info(num_domains, decision_every))
    return mixer


def seen(mixer, gradients, step=1, counts=None, **changes):
    """Let `mixer` see one step; returns the mixture that it decided (of a proxy: its domain weights)."""
    counts = np.full(mixer.info.num_domains, 10.0) if counts is None else np.array(counts, dtype=float)
    values = {
        "step": step,
        "tokens": 1,
        "requested": mixer.weights(),
        "realised": counts / counts.sum(),
        "counts": counts,
        "loss_tokens": counts,
        "losses": np.where(counts > 0, 1.0, NAN),
        "epochs": counts,
        "drawn": counts,
        "gradients": gradients,
        "lr": 0.01,
    }
    mixer.update(StepStats(**values | changes))
    return decided(mixer)


def decided(mixer):
    return mixer.domain_weights() if hasattr(mixer, "domain_weights") else mixer.weights()


def softmax(exponents):
    soft = np.exp(np.array(exponents) - np.max(exponents))
    return soft / soft.sum()


def gram(pulls_01, pulls_02, pulls_12, diagonal=(4.0, 4.0, 4.0)):
    a, b, c = pulls_01, pulls_02, pulls_12
    return [[diagonal[0], a, b], [a, diagonal[1], c], [b, c, diagonal[2]]]
