"""Offline checks of an exported policy, before a target run is spent on it.

Every check is a pure function of the policy and answers "passed", "failed" or "not checked". Two kinds of observations
are put to the policy: those that it meets while it drives a surrogate (where none fits, draws from the statistics that
it learned with stand in), and a sweep over the bounds of its fields, corners included. What makes a policy useless or
dangerous fails; what makes it merely no better than something simpler is said and fails nothing.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from acodm_env.agents.gate_rollouts import (
    NOT_FINITE,
    Answers,
    Played,
    imagined_runs,
    mixtures_of,
    plausible_observations,
    play,
    sweep,
)
from acodm_env.errors import AcodmError, ConfigError, PolicyError
from acodm_env.objective import describe
from acodm_env.policy.dense import Policy
from acodm_env.policy.equivariant import PER_DOMAIN, EquivariantPolicy
from acodm_env.step_stats import Array
from acodm_env.support import learned_for, outside
from acodm_env.surrogate.surface import Surface
from acodm_env.trainer import RunInfo

PASSED, FAILED, NOT_CHECKED = "passed", "failed", "not checked"
SUPPORT = 5.0
"""Standard deviations from the mean within which observations were learned on."""
AT_BOUND = 0.95
"""|a| above which an action is at its bounds, ±1."""
NUDGE = 1e-3
"""Size of a small change, as a share of a field's range."""
CONSTANT = 1e-3
"""A policy none of whose weights moves by more than this does not react."""
_MOST_HALVINGS = 30
BEHIND_NATS = 1e-4
"""Losses nearer than this are told apart by nothing but rounding."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What a policy must keep to."""

    worse_than_uniform: float = 0.005
    """Nats by which its mean final loss on the surrogate may exceed that of the uniform mixture."""
    outside: float = 0.2
    """Largest share of its observations on the surrogate that lie outside what it learned on."""
    entropy: float = 0.2
    """Smallest mean entropy of its mixtures over ln K (1 is uniform, 0 a single domain)."""
    boundary: float = 0.95
    """Largest share of its actions at their bounds (|a| > 0.95)."""
    jump: float = 0.05
    """Largest share of the mixture that may move when every entry moves by a thousandth of its field's range."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.worse_than_uniform) and self.worse_than_uniform >= 0):
            raise ConfigError(f"worse_than_uniform={self.worse_than_uniform}: must be a number of nats, 0 or more")
        for name in ("outside", "entropy", "boundary", "jump"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check."""

    name: str
    verdict: str
    """"passed", "failed" or "not checked"."""
    explanation: str
    """What was found, or why it could not be checked, in one line."""
    value: float | None = None
    """The number that the verdict rests on."""
    limit: str = ""
    """What it must be, such as "≤ 0.2"."""
    measured: dict[str, float] = field(default_factory=dict)
    """Further numbers, by name."""


def judge(
    policy: Policy,
    surface: Surface,
    *,
    run: RunInfo | None = None,
    thresholds: Thresholds | None = None,
    seeds: int = 5,
    seed: int = 0,
) -> list[Check]:
    """All checks, in order.

    Args:
        policy: the exported policy.
        surface: the surrogate to drive; checks that need one that fits are "not checked" if this does not.
        run: the target run as far as it is known (see `imagined_run`); None imagines one.
        thresholds: what the policy must keep to.
        seeds: runs on the surrogate for every mixture.
        seed: the first of them, and that of the sweep.
    """
    thresholds = thresholds or Thresholds()
    with np.errstate(all="ignore"):  # a broken policy is what is looked for
        try:
            played: Played | str = play(policy, surface, range(seed, seed + seeds))
        except AcodmError as error:
            played = str(error)
        met = plausible_observations(policy, played, np.random.default_rng(seed))
        fits = check_fits(policy, run)
        runs = imagined_runs(policy) if run is None or fits.verdict == FAILED else [run]
        swept = [sweep(policy, one, np.random.default_rng(seed)) for one in runs]
        if met is not None:
            swept.insert(0, met)
        return [
            fits,
            check_finite(swept),
            check_value(played, thresholds),
            check_support(policy, played, thresholds),
            *check_mixtures(policy, met, thresholds),
            check_continuity(policy, swept, thresholds, np.random.default_rng(seed)),
            check_reaction(swept),
        ]


# --- the checks ---------------------------------------------------------------------------------------------


def check_fits(policy: Policy, run: RunInfo | None) -> Check:
    """Its domains and the sizes of its fields are those of the target's corpus, and its objective the target's.

    A run outside of its declared training support is driven by a fixed rule, which is said and fails nothing.
    """
    if run is None:
        return Check(name="fits", verdict=NOT_CHECKED, explanation="no corpus was given")
    try:
        policy.check_fits(run)
    except PolicyError as error:
        return Check(name="fits", verdict=FAILED, explanation=str(error))
    said = f"it can drive a run with these {run.num_domains} domains"
    if reasons := outside(policy.support, run):
        said = f"outside of its training support: {'; '.join(reasons)}; a fixed rule drives instead"
    objective = other_objective(policy, run)
    return Check(name="fits", verdict=FAILED if objective else PASSED, explanation=objective or said)


def other_objective(policy: Policy, run: RunInfo) -> str:
    """What a policy was learned for, in a sentence, if it is another objective than the run's; else "".

    Policies that see the objective are for any.
    """
    learned = learned_for(policy.provenance, [name for name, _ in policy.fields], run)
    if not learned:
        return ""
    weights = dict(zip(run.targets, run.objective, strict=True)) if run.objective else {}
    return f"it was learned for the {learned}, this run's objective is the {describe(run.metric, weights)}"


def check_finite(swept: list[Answers]) -> Check:
    """Every observation within the bounds gives a mixture: finite, not negative, summing to 1."""
    bad, total = 0, 0
    for answers in swept:
        sums = np.abs(answers.mixtures.sum(-1) - 1) <= 1e-6
        valid = np.isfinite(answers.actions).all(-1) & (answers.mixtures >= 0).all(-1) & sums
        bad, total = bad + int((~valid).sum()), total + len(valid)
    said = f"{bad} of {total} observations within the bounds of its fields give no mixture"
    return _check("finite", bad / total, bad == 0, "= 0", said)


def check_value(played: Played | str, thresholds: Thresholds) -> Check:
    """Its mean final loss on the surrogate is not worse than uniform's.

    Uniform costs nothing, so losing to it fails. That another method or the mean of its own mixtures is ahead is said,
    and fails nothing: such a policy is still worth a run if those are not at hand.
    """
    name = "surrogate value"
    if isinstance(played, str):
        return Check(name=name, verdict=NOT_CHECKED, explanation=played)
    means = {one: float(values.mean()) for one, values in played.losses.items()}
    excess = means["policy"] - means["uniform"]
    behind = [one for one in means if one != "uniform" and means["policy"] - means[one] > BEHIND_NATS]
    said = ", ".join(f"{one} {mean:.4f}" for one, mean in means.items())
    said = f"policy - uniform, nats; mean final losses: {said}" + (f"; behind {', '.join(behind)}" if behind else "")
    limit = thresholds.worse_than_uniform
    return _check(name, excess, bool(excess <= limit), f"≤ {limit:g}", said, means)


def check_support(policy: Policy, played: Played | str, thresholds: Thresholds) -> Check:
    """What it meets on the surrogate looks like what it learned on.

    With statistics of its own, an observation is outside if the root mean square distance of a field from its mean is
    above 5 standard deviations; without, if an entry had to be clipped into the declared bounds of its field.
    """
    name = "support"
    if isinstance(played, str):
        return Check(name=name, verdict=NOT_CHECKED, explanation=played)
    if not isinstance(policy, EquivariantPolicy):
        outside, said = _outside_statistics(policy, played.observations), f"a field beyond {SUPPORT:g} deviations"
    else:
        outside, said = {"any field": played.clipped > 0}, "an entry beyond the bounds of its field"
    share = float(np.any(list(outside.values()), axis=0).mean())
    shares = {one: float(rows.mean()) for one, rows in outside.items() if rows.any()}
    worst = f" (most often {max(shares, key=lambda one: shares[one])})" if shares else ""
    limit = thresholds.outside
    said = f"{share:.0%} of {len(played.observations)} observations have {said}{worst}"
    return _check(name, share, share <= limit, f"≤ {limit:g}", said, shares)


def _outside_statistics(policy: Policy, observations: NDArray[np.float32]) -> dict[str, NDArray[np.bool_]]:
    """(N,) by field: whether it is far from what was learned on."""
    distances = (observations - policy.mean) / policy.scale
    splits = np.cumsum([size for _, size in policy.fields])[:-1]
    parts = zip(policy.fields, np.split(distances, splits, axis=-1), strict=True)
    return {name: np.sqrt(np.square(part).mean(-1)) > SUPPORT for (name, _), part in parts if part.shape[-1]}


def check_mixtures(policy: Policy, met: Answers | None, thresholds: Thresholds) -> tuple[Check, Check]:
    """Its mixtures do not collapse, and its actions are not all at their bounds."""
    reason = "" if met is not None else "neither a surrogate that fits nor statistics of what it learned on"
    if met is not None and not np.isfinite(met.mixtures).all():
        reason = NOT_FINITE
    if met is None or reason:
        entropy, boundary = (
            Check(name=one, verdict=NOT_CHECKED, explanation=reason) for one in ("entropy", "boundary")
        )
        return entropy, boundary
    weights = met.mixtures
    entropies = -(weights * np.log(np.maximum(weights, 1e-300))).sum(-1) / np.log(max(weights.shape[-1], 2))
    mean, rate = float(entropies.mean()), float((np.abs(met.actions) > AT_BOUND).mean())
    largest = float(weights.max())
    said = f"entropy of its mixtures over ln K; its largest weight is {largest:.2f}"
    return (
        _check("entropy", mean, mean >= thresholds.entropy, f"≥ {thresholds.entropy:g}", said, {"largest": largest}),
        _check(
            "boundary",
            rate,
            rate <= thresholds.boundary,
            f"≤ {thresholds.boundary:g}",
            f"{rate:.0%} of its actions are at their bounds, |a| > {AT_BOUND:g}",
        ),
    )


def check_continuity(policy: Policy, swept: list[Answers], thresholds: Thresholds, rng: np.random.Generator) -> Check:
    """A small change of the observation is a small change of the mixture.

    Small is a thousandth of a field's declared range, or, where that is narrower, of ±5 of the units in which a policy
    sees it (standard deviations, or an equivariant policy's fixed scale). Every observation is nudged by so much in all
    entries; and between every two neighbours the interval is halved, always towards the half in which the mixture
    changes more, until it is so short, which finds a jump wherever it hides. What counts is the largest share of the
    mixture that moves, ½ Σ_i |Δα_i|.
    """
    name, largest = "continuous", 0.0
    for answers in swept:
        if not np.isfinite(answers.mixtures).all():
            return Check(name=name, verdict=NOT_CHECKED, explanation=NOT_FINITE)
        ranges = (answers.high - answers.low).astype(np.float64)
        span = np.minimum(ranges, 2 * SUPPORT * _units(policy, answers.actions.shape[-1]))
        nudge = NUDGE * span
        largest = max(largest, _nudged(policy, answers, nudge, rng), _steepest(policy, answers, nudge))
    said = f"at most {largest:.1%} of the mixture moves when every entry moves by {NUDGE:g} of its field's range"
    return _check(name, largest, largest <= thresholds.jump, f"≤ {thresholds.jump:g}", said)


def _nudged(policy: Policy, answers: Answers, nudge: Array, rng: np.random.Generator) -> float:
    """Largest share of the mixture that moves when all entries move by up to `nudge` (D,), within their bounds."""
    nudges = nudge * rng.uniform(-1, 1, size=answers.observations.shape)
    nudged = np.clip(answers.observations + nudges, answers.low, answers.high).astype(np.float32)
    return float(_moved(answers.mixtures, mixtures_of(policy, policy.act(nudged).astype(np.float64))).max())


def _steepest(policy: Policy, answers: Answers, nudge: Array) -> float:
    """Largest share of the mixture that moves between two observations no further apart than `nudge` (D,)."""
    first, start = answers.observations.astype(np.float64), answers.mixtures
    last, end = np.roll(first, 1, axis=0), np.roll(start, 1, axis=0)
    for _ in range(_MOST_HALVINGS):
        if (np.abs(last - first) <= nudge).all():
            break
        middle = (first + last) / 2
        between = mixtures_of(policy, policy.act(middle.astype(np.float32)).astype(np.float64))
        before = (_moved(start, between) >= _moved(between, end))[:, None]
        first, start = np.where(before, first, middle), np.where(before, start, between)
        last, end = np.where(before, middle, last), np.where(before, between, end)
    return float(_moved(start, end).max())


def _moved(mixtures: Array, others: Array) -> Array:
    """(N,) share that moves from one mixture to another."""
    share: Array = 0.5 * np.abs(others - mixtures).sum(-1)
    return share


def _units(policy: Policy, num_domains: int) -> Array:
    """(D,) what the policy divides every entry of an observation by."""
    if not isinstance(policy, EquivariantPolicy):
        return policy.scale
    units = []
    for name, size in policy.fields:
        scaling = policy.scalings[name]
        unit = scaling.scale / (num_domains if scaling.times_domains else 1)
        units += [unit] * (num_domains if size == PER_DOMAIN else size)
    return np.array(units)


def check_reaction(swept: list[Answers]) -> Check:
    """Whether it reacts to what it sees at all. A constant policy is said to be one, and passes."""
    if not all(np.isfinite(answers.mixtures).all() for answers in swept):
        return Check(name="reacts", verdict=NOT_CHECKED, explanation=NOT_FINITE)
    moves = max(float(np.ptp(answers.mixtures, axis=0).max()) for answers in swept)
    said = f"a weight moves by up to {moves:.3f} over all observations"
    if moves < CONSTANT:
        said = "constant: it does not react to what it sees; a static mixture does the same (reported, fails nothing)"
    return _check("reacts", moves, True, "", said)


def _check(
    name: str, value: float, passed: bool, limit: str, explanation: str, measured: dict[str, float] | None = None
) -> Check:
    return Check(
        name=name,
        verdict=PASSED if passed else FAILED,
        explanation=explanation,
        value=value,
        limit=limit,
        measured=measured or {},
    )
