"""Analytic policy gradient: a policy for any mixing problem, learned by differentiating through random surfaces.

The surface (`acodm_env.surrogate.problems`) is known and differentiable, so the gradient of the objective at a run's
end with respect to the actor comes from one backward pass through the whole run: no critic, no exploration, no
estimate. The actor is `acodm_env.policy.equivariant`'s network and sees the fields of `acodm_env.view`; what is
learned is exported as any other policy and drives real runs zero-shot.

The loss is *regret*: what the policy misses of the gain that the best static mixture of the surface has over uniform,
as a share of it, so that problems in which little can be won count as much as those with a lot.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from acodm_env.errors import ConfigError
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.objective import value
from acodm_env.policy.equivariant import SCALINGS, EquivariantPolicy, Scaling, fields_of, scalings_of
from acodm_env.surrogate.problems import INITIAL_NATS, ProblemFamily, Problems, losses
from acodm_env.view import GENERAL_FIELDS, PER_ROW, PER_RUN, View, slope

from .domain_networks import DomainActor, ObservationView, mean_over
from .export import layers_of

LEAST_GAIN = 0.03
"""Nats: smaller gains of the best static mixture count as so much, so that noise is not learned."""
MOST_REGRET = 5.0
REFRESH = 0.05
"""Probability that a batch of surfaces is drawn anew and replaces one of the pool."""
Decide = Callable[[View, int], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ApgConfig:
    """How an actor is learned on random surfaces."""

    iterations: int = 3000
    """Gradient steps; each plays one batch of runs from start to end."""
    rows: int = 1024
    """Domains of all runs of a batch together; the runs have the same number of domains and decisions."""
    learning_rate: float = 2e-3
    """Of Adam, falling to 0 by a cosine."""
    hidden: int = 64
    """Units of every layer."""
    scale: float = 5.0
    """c of the action map: e^2c between two domains."""
    floor: float = 0.02
    """ε of the action map: share of the mixture spread evenly."""
    rate: float = 0.0
    """Rate of movement of the mixture in force, see `ActionMap.rate`; 0 is a running average over the run."""
    fields: tuple[str, ...] = GENERAL_FIELDS
    """What the actor sees."""
    pool: int = 12
    """Batches of surfaces kept per number of domains; a part is drawn anew as it goes."""
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(self.fields))
        for name in ("iterations", "rows", "hidden", "pool"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        unknown = [name for name in self.fields if name not in GENERAL_FIELDS]
        if unknown:
            raise ConfigError(f"fields={','.join(unknown)}: must be among {', '.join(GENERAL_FIELDS)}")


class ViewActor(nn.Module):
    """The equivariant actor on a `View`: mixtures (B, K) as the exported policy decides them."""

    def __init__(self, config: ApgConfig, seed: int):
        super().__init__()
        layout = [(name, 1 if name == "progress" or name in PER_RUN else 2) for name in config.fields]
        self.fields = fields_of(layout, 2)
        self.scalings: dict[str, Scaling] = scalings_of(self.fields)
        self.config = config
        view = ObservationView(layout=tuple(layout), num_domains=2, fields=self.fields, scalings=self.scalings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = DomainActor(view, [config.hidden, config.hidden], nn.ReLU)
        last = self.network.head.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)  # an untrained actor is uniform
        nn.init.zeros_(last.bias)

    def forward(self, view: View, still: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mixture (B, K).

        Args:
            view: what is known.
            still: what of it does not change during a run; filled at its first decision.
        """
        present = view.present > 0
        local, context = self._features(view, still)
        hidden = self.network.encoder(local, context)
        largest = hidden.masked_fill(~present.unsqueeze(-1), -torch.inf).amax(1)
        pooled = torch.cat([mean_over(hidden, present).squeeze(1), largest, context], 1)
        logits = self.network.head(hidden, pooled).squeeze(-1)
        action = torch.tanh(logits - mean_over(logits, present))
        return mixtures(action, view.trainable, self.config.scale, self.config.floor)

    def _features(self, view: View, still: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """`policy.equivariant.features` of the view, (B, K, F) and (B, G): here no field needs a scaling but one."""
        for name in self.config.fields:
            if name in STILL and name not in still:
                still[name] = _formula(name)(view, torch)
        parts = {name: still[name] if name in STILL else _formula(name)(view, torch) for name in self.config.fields}
        local = torch.stack([parts[name] for name in self.config.fields if name in PER_ROW], -1)
        whole = [parts[name] for name in self.config.fields if name not in PER_ROW]
        context = torch.cat(whole, -1) if whole else view.progress[:, :0]
        return local, context

    def policy(self, decisions: int, probe_sequences: int, provenance: Mapping[str, Any]) -> EquivariantPolicy:
        """The exported form: a run of `decisions` decisions, whatever its steps."""
        encoder, head = layers_of(self.network.encoder.layers), layers_of(self.network.head.layers)
        return EquivariantPolicy(
            fields=self.fields,
            scalings=self.scalings,
            encoder=len(encoder),
            layers=encoder + head,
            action=ActionMap(scale=self.config.scale, floor=self.config.floor, rate=self.config.rate),
            bounds=Bounds(),
            interaction=InteractionConfig(),
            decision_every=1,
            horizon=decisions,
            probe_sequences=probe_sequences,
            provenance=dict(provenance),
        )


STILL = frozenset({"objective_weight", "size", "trainable", "affinity", "leverage", "perplexity", "num_rows"})
"""Fields that do not change during a run."""


def _formula(name: str) -> Callable[[View, Any], torch.Tensor]:
    """Feature (B, K) or (B, 1) of a field."""
    if name == "progress":
        scaling = SCALINGS[name]
        return lambda view, xp: scaling.apply(view.progress, 1, xp)
    return (PER_ROW.get(name) or PER_RUN[name])[3]


def mixtures(action: torch.Tensor, trainable: torch.Tensor, scale: float, floor: float) -> torch.Tensor:
    """`ActionMap.weights` in torch."""
    soft = torch.softmax((scale * action).masked_fill(trainable <= 0, -torch.inf), -1)
    return (1 - floor) * soft + floor * trainable / trainable.sum(-1, keepdim=True)


def deciding(actor: ViewActor) -> Decide:
    """The actor as `play` asks it, for one batch of runs."""
    still: dict[str, torch.Tensor] = {}
    return lambda view, _: actor(view, still)


@dataclass(frozen=True)
class Played:
    """Runs under a policy."""

    objective: torch.Tensor
    """(B,) at the end, nats."""
    mixtures: torch.Tensor
    """(D, B, K) in force."""


def play(
    problems: Problems, decide: Decide, decisions: int, rate: float, generator: torch.Generator | None = None
) -> Played:
    """Runs of `decisions` decisions on all surfaces; differentiable.

    Args:
        problems: tensors.
        decide: (view, number of the decision) → mixtures (B, K).
        decisions: D.
        rate: of the mixture in force, see `ActionMap.rate`.
        generator: of the noise on what is shown; None: no noise.
    """
    batch, width = problems.weights.shape
    choices = problems.trainable.sum(-1, keepdim=True)
    even = problems.trainable / choices
    nothing = torch.zeros(batch, width)
    view = View(
        weights=problems.weights,
        perplexity=problems.perplexity,
        losses=torch.full((batch, width), INITIAL_NATS),
        previous=torch.full((batch, width), INITIAL_NATS),
        gaps=nothing,
        slopes=nothing,
        drawn=nothing,
        sizes=problems.sizes / choices,
        mixture=even,
        affinity=problems.affinity,
        leverage=problems.leverage,
        trainable=problems.trainable,
        present=problems.present,
        progress=torch.zeros(batch, 1),
        initial=INITIAL_NATS,
    )

    def noise() -> torch.Tensor:
        return torch.randn(batch, width, generator=generator) if generator is not None else nothing

    offset = problems.noise * noise()
    renewal = 1 - (1 - problems.memory) ** (20 / decisions)
    recent, mixture, course = even, even, []
    held_out, before = view.losses, view.losses
    for number in range(decisions):
        decided = decide(view, number)
        step = 1.0 if number == 0 else max(rate, 1 / (number + 2))
        mixture = decided if step == 1 else (1 - step) * mixture + step * decided
        course.append(mixture)
        recent = recent + renewal * (mixture - recent)
        drawn = view.drawn + mixture / decisions
        done = (number + 1) / decisions
        held_out, trained = losses(problems, drawn * choices, recent, done, torch)
        seen = (trained + before) / 2
        shown = torch.where(problems.measured > 0, held_out, seen)
        shown = torch.where((problems.trainable > 0) | (problems.measured > 0), shown, view.losses)
        shown = shown + (offset + 0.5 * problems.noise * noise()) * (shown != view.losses)
        gaps = (shown - seen) * problems.measured * problems.trainable
        smooth = slope(shown, view.losses, view.slopes, done, number / decisions, torch)
        view = replace(
            view,
            gaps=gaps,
            slopes=smooth,
            previous=view.losses,
            losses=shown,
            drawn=drawn,
            mixture=mixture,
            progress=torch.full((batch, 1), done),
        )
        before = trained
    return Played(value(held_out, problems.weights, problems.perplexity, torch), torch.stack(course))


def static_objective(problems: Problems, mixture: torch.Tensor) -> torch.Tensor:
    """(B,) the objective after a run under one mixture (B, K)."""
    choices = problems.trainable.sum(-1, keepdim=True)
    held_out, _ = losses(problems, mixture * choices, mixture, 1.0, torch)
    objective: torch.Tensor = value(held_out, problems.weights, problems.perplexity, torch)
    return objective


def uniform(problems: Problems) -> torch.Tensor:
    """(B, K) even over what can be trained on."""
    even: torch.Tensor = problems.trainable / problems.trainable.sum(-1, keepdim=True)
    return even


def best_static(problems: Problems, iterations: int = 200, num_starts: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """The best mixture (B, K) that stays the same, by descent, and its objective (B,)."""
    hidden = problems.trainable <= 0
    best = static_objective(problems, uniform(problems))
    mixture = uniform(problems)
    own = problems.weights * problems.trainable
    starts = (torch.zeros_like(own), 4.0 * (own > 0) * (1 - (own > 0).float().mean(-1, keepdim=True)))
    for start in starts[2 - num_starts :]:
        logits = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([logits], lr=0.2)
        for _ in range(iterations):
            objective = static_objective(problems, torch.softmax(logits.masked_fill(hidden, -torch.inf), -1))
            optimiser.zero_grad()
            objective.sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        with torch.no_grad():
            found = torch.softmax(logits.masked_fill(hidden, -torch.inf), -1)
            reached = static_objective(problems, found)
            better = reached < best
            mixture = torch.where(better[:, None], found, mixture)
            best = torch.where(better, reached, best)
    return mixture, best


@dataclass(frozen=True)
class _Pooled:
    problems: Problems
    uniform: torch.Tensor
    best: torch.Tensor


@dataclass
class Learned:
    """What learning gave."""

    actor: ViewActor
    rows: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def learn(
    family: ProblemFamily,
    config: ApgConfig,
    on_step: Callable[[dict[str, float]], None] = lambda row: None,
    actor: ViewActor | None = None,
) -> Learned:
    """Learn an actor on the family's surfaces; the same seed, the same actor.

    Args:
        family: what is drawn.
        config: how.
        on_step: called with every iteration's row.
        actor: to go on with.
    """
    started = time.perf_counter()
    rng = np.random.default_rng(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    actor = actor or ViewActor(config, config.seed)
    optimiser = torch.optim.Adam(actor.parameters(), lr=config.learning_rate)
    pool: dict[int, list[_Pooled]] = {}
    rows = []
    for iteration in range(config.iterations):
        pooled = _from_pool(pool, family, config, rng)
        decisions = int(rng.integers(family.decisions[0], family.decisions[1] + 1))
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * (0.5 * (1 + math.cos(math.pi * iteration / config.iterations)) + 0.005)
        played = play(pooled.problems, deciding(actor), decisions, config.rate, generator)
        regret = (played.objective - pooled.best) / (pooled.uniform - pooled.best).clamp(min=LEAST_GAIN)
        loss = torch.where(regret > MOST_REGRET, MOST_REGRET + 0.1 * (regret - MOST_REGRET), regret).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
        optimiser.step()
        row = {"iteration": iteration + 1, "regret": float(loss.detach()), "grad_norm": float(norm)}
        rows.append(row)
        on_step(row)
    return Learned(actor, rows, time.perf_counter() - started)


def widths(family: ProblemFamily) -> list[int]:
    """Numbers of domains that are learned on: eight or fewer, evenly spaced in their logarithm."""
    low, high = family.num_domains
    return sorted({round(float(x)) for x in np.geomspace(low, high, 8)})


def _from_pool(
    pool: dict[int, list[_Pooled]], family: ProblemFamily, config: ApgConfig, rng: np.random.Generator
) -> _Pooled:
    """A batch of surfaces: mostly one that was played before, sometimes a fresh one."""
    numbers = widths(family)
    num_domains = numbers[int(rng.integers(len(numbers)))]
    kept = pool.setdefault(num_domains, [])
    if len(kept) < config.pool or rng.random() < REFRESH:
        problems = family.draw(rng, max(config.rows // num_domains, 1), num_domains).tensors()
        _, best = best_static(problems, 50, 1)
        fresh = _Pooled(problems, static_objective(problems, uniform(problems)), best)
        if len(kept) >= config.pool:
            kept.pop(int(rng.integers(len(kept))))
        kept.append(fresh)
        return fresh
    return kept[int(rng.integers(len(kept)))]


def regrets(problems: Problems, objective: torch.Tensor, best: torch.Tensor | None = None) -> torch.Tensor:
    """(B,) share of the best static mixture's gain over uniform that is missed; NaN where it gains under LEAST_GAIN."""
    best = best_static(problems)[1] if best is None else best
    gain = static_objective(problems, uniform(problems)) - best
    return torch.where(gain > LEAST_GAIN, (objective - best) / gain, torch.nan)


def describe(config: ApgConfig, family: ProblemFamily) -> dict[str, Any]:
    """Both, as JSON."""
    return {"apg": asdict(config), "family": asdict(family)}
