"""What `acodm contest` is told."""

from dataclasses import dataclass, field
from typing import Any

from acodm_env.config import split_names
from acodm_env.errors import ConfigError

LEARNERS = (
    "apg", "equivariant-ppo", "equivariant-td3", "equivariant-ppo@apg", "equivariant-td3@apg",
    "acodm-td3", "td3", "ppo", "sac", "ddpg",
)  # fmt: skip
"""Who enters: @apg begins with apg's actor of the same seed; those of the second line know neither order nor number."""


@dataclass(frozen=True, kw_only=True)
class ContestConfig:
    """Compare learners on random mixing problems at equal time; the same command again goes on."""

    learners: str = ",".join(LEARNERS)
    """Separated by commas; NAME@apg begins with apg's actor."""
    minutes: float = 5.0
    """CPU minutes of learning for each learner and seed, on one core; @apg has them on top of apg's."""
    seeds: int = 5
    """Seeds of learning and of the unseen problems."""
    problems: dict[str, Any] = field(default_factory=dict)
    """Settings of `ProblemFamily`, as JSON."""
    decisions: int = 20
    """Decisions of a run."""
    unseen: int = 256
    """Unseen problems per seed."""
    ablate: bool = False
    """Instead: learn apg with each field of the observation left out, beside all of them, and print their shares."""
    out: str = "runs/contest"
    """Folder of the comparison."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("decisions", 2), ("unseen", 8)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not self.minutes > 0:
            raise ConfigError(f"minutes={self.minutes}: must be positive")
        self._check_learners()

    def _check_learners(self) -> None:
        from acodm_env.agents.algorithms import require_fit

        for name in self.names:
            algo, at, start = name.partition("@")
            require_fit(algo)
            if at and (start != "apg" or not algo.startswith("equivariant-")):
                raise ConfigError(f"learners: {name}: must be an equivariant learner, such as equivariant-ppo@apg")
            if at and "apg" not in self.names:
                raise ConfigError(f"learners: {name}: must come with apg, whose actor it begins with; add apg")

    @property
    def names(self) -> list[str]:
        """Of the learners."""
        return split_names(self.learners)
