"""Settings are frozen dataclasses; a mapping becomes one here, with unknown keys refused by name."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from acodm_env.errors import ConfigError, unknown

Config = TypeVar("Config")


def from_dict(kind: type[Config], settings: Mapping[str, Any], name: str) -> Config:
    """Build the dataclass `kind` from `settings`; lists become tuples, as JSON has no tuples.

    Raises:
        ConfigError: a key is not a field of `kind`, with a suggestion; or the dataclass refuses a value.
    """
    allowed = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for key in settings:
        if key not in allowed:
            unknown(f"{name}.<setting>", key, allowed)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    try:
        return kind(**values)
    except (TypeError, AttributeError) as error:  # a comparison or a loop over a value of the wrong kind
        raise ConfigError(f"{name}={dict(settings)}: a value is of the wrong type ({error})") from error


def split_names(text: str | None) -> list[str]:
    """Names separated by commas, as settings have them; blanks around them and empty ones do not count."""
    return [name for part in (text or "").split(",") if (name := part.strip())]
