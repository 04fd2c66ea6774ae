"""What the baselines' numeric options may be."""

import math

from acodm_env.errors import ConfigError


def positive(name: str, value: float) -> float:
    """Return an option that must be a positive number.

    Raises:
        ConfigError: it is not.
    """
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value}: must be a positive number")
    return value


def whole(name: str, value: int, smallest: int = 1) -> int:
    """Return an option that must be a whole number of at least `smallest`.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ConfigError(f"{name}={value}: must be a whole number of at least {smallest}")
    return value
