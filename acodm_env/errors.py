"""What can be wrong with a user's input, and how it is said.

Every message reads ``<name>=<value>: must be <allowed>; <likely cause>; <remedy>``. The command line turns
these errors into exit code 2 without a traceback; anything else is a defect of this package.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Never


class AcodmError(Exception):
    """Something the user can mend: a setting, a file, a policy that does not fit."""


class ConfigError(AcodmError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(AcodmError):
    """A corpus, token store or run folder is missing, malformed, cut short or edited."""


class PolicyError(AcodmError):
    """An exported policy was edited, or does not fit the run that it should drive."""


def unknown(kind: str, name: object, choices: Iterable[str]) -> Never:
    """Raise the `ConfigError` for an unknown `name`, with a suggestion where one is near."""
    allowed = sorted(choices)
    near = get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else "see the list"
    raise ConfigError(f"{kind}='{name}': must be one of {', '.join(allowed)}; {hint}")
