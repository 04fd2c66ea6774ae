"""How losses move under a mixture: the one source of the surrogate's dynamics, batched and differentiable.

Every function takes the array module `xp` (numpy or torch) and arrays with any leading batch dimensions, so the
environments (numpy, float32 or float64) and the oracle (torch, with gradients) run the same lines. Time is counted in
units of the run that the law was fitted on: 1 is its end. What is assumed, and what of it is measured:

1. *Measured*: the final losses of a static mixture w (`laws.PowerLaw`, fitted on finished runs),
   L_i = c_i + e^k_i·(1e-4 + Σ_j e^a_ij w_j)^(−e^b_i): transfer a_ij between domains, diminishing returns b_i.
2. *Assumed*: inside a run the law holds for what was learned so far: w_j is replaced by the memory m_j (K,), which is
   w_j at the end of a static run. Diminishing returns over *time* are therefore those over *shares*. (`fit-surrogate
   --from-run` fits them to the curves of real runs instead, where there are some.)
3. *Assumed*: what domain j teaches is forgotten at the rate φ_j, so m_j = ∫ w_j(s) e^(−φ_j (t−s)) ds, scaled to w_j for
   a static run. With equal φ the order of the data would not matter; with different ones it does.
4. *From the literature*: a token's e-th repetition is worth e^(−e/R), R = 15.4 (Muennighoff et al., arXiv 2305.16264);
   the first pass counts fully.
5. *Assumed*: an untrained model's loss is ln V. A useful share u₀ that gives it fades linearly until the end.
6. *Assumed*: a domain's gradient, as far as mixers need one, lies in the space of the targets' losses: its entries are
   the local slopes −∂L_i/∂m_j times t, so its Gram matrix is positive semidefinite and consistent with them.
"""

from dataclasses import dataclass
from typing import Any

FLOOR = 1e-4
"""Share of "everything else" in the power law's sum (`laws.PowerLaw`)."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Arrays of one law, or of one per environment with leading batch dimensions (…)."""

    helps: Any
    """(…, M, K) e^a_ij: how much a token of domain j helps target i."""
    scales: Any
    """(…, M) k_i."""
    powers: Any
    """(…, M) e^b_i."""
    floors: Any
    """(…, M) c_i, nats."""
    start: Any
    """(…, M) u₀: the useful share that gives the loss of an untrained model."""
    forgetting: Any
    """(…, K) φ_j ≥ 0, per run."""
    sizes: Any
    """(…, K) tokens of the domain over tokens of the run; infinite: never repeated."""
    repetition: Any
    """(…, 1) R, in passes; infinite: a repeated token is worth as much as a fresh one."""
    pace: Any
    """(…, 1) q ≥ 0: memory counts t^q at time t, so a large q delays learning; 0 is no delay."""


def worth(epochs: Any, repetition: Any, xp: Any) -> Any:
    """Fresh passes that `epochs` passes over a domain are worth: min(e, 1) + R·(1 − e^(−max(e−1, 0)/R))."""
    repeated = xp.clip(epochs - 1, 0, None)
    return xp.clip(epochs, None, 1) - repetition * xp.expm1(-repeated / repetition)


def gains(forgetting: Any, duration: Any, xp: Any) -> tuple[Any, Any]:
    """(kept, gain) of a step of `duration`: m ← kept·m + gain·Δ, where Δ is what was learned in it.

    gain = (1 − e^(−φd)) / (d·(1 − e^(−φ))), which is 1 without forgetting, so that a static run ends at m = w.
    """
    rate = xp.clip(forgetting, 1e-9, None)
    return xp.exp(-rate * duration), xp.expm1(-rate * duration) / (duration * xp.expm1(-rate))


def learn(law: Parameters, memory: Any, epochs: Any, weights: Any, duration: Any, xp: Any) -> tuple[Any, Any]:
    """Memory and epochs (…, K) after a step of `duration` (…, 1) under `weights` (…, K)."""
    kept, gain = gains(law.forgetting, duration, xp)
    later = epochs + weights * duration / law.sizes
    fresh = law.sizes * (worth(later, law.repetition, xp) - worth(epochs, law.repetition, xp))
    return kept * memory + gain * fresh, later


def useful(law: Parameters, memory: Any, time: Any, xp: Any) -> Any:
    """(…, M) 1e-4 + what is left of the start + t^q Σ_j e^a_ij m_j, at `time` (…, 1)."""
    if law.helps.ndim == 2:
        total = memory @ law.helps.T
    else:
        total = (law.helps @ memory[..., None])[..., 0]
    return FLOOR + xp.clip(1 - time, 0, None) * law.start + time**law.pace * total


def losses(law: Parameters, memory: Any, time: Any, xp: Any) -> Any:
    """(…, M) held-out losses in nats."""
    return law.floors + xp.exp(law.scales - law.powers * xp.log(useful(law, memory, time, xp)))


def slopes(law: Parameters, memory: Any, time: Any, xp: Any) -> Any:
    """(…, M, K) −∂L_i/∂m_j: how steeply memory of domain j lowers target i."""
    share = useful(law, memory, time, xp)
    steep = law.powers * xp.exp(law.scales - law.powers * xp.log(share)) / share * time**law.pace
    return steep[..., None] * law.helps
