"""The hub when there may be none: a clear refusal within seconds instead of minutes of retries."""

import os
import urllib.error
import urllib.request

from acodm_env.errors import DataError

PROBE_SECONDS = 5


def looks_local(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a name was meant as a path: it begins like one or ends like one of our files."""
    return name.startswith(("/", "./", "../", "~", "\\")) or name.endswith(endings) or name.count("/") > 1


def offline() -> bool:
    """Whether the environment forbids the network (HF_HUB_OFFLINE)."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def require_hub(setting: str, name: str, remedy: str, *, may_be_path: bool = True) -> None:
    """Refuse a hub name when the hub cannot be reached, after one probe that honours proxies.

    Args:
        setting: the setting that holds the name, for the message.
        name: the hub name.
        remedy: what to do without network.
        may_be_path: whether a path would have done as well.

    Raises:
        DataError: HF_HUB_OFFLINE is set, or no answer within `PROBE_SECONDS`.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    cause = "HF_HUB_OFFLINE is set"
    if not offline():
        try:
            with urllib.request.urlopen(endpoint, timeout=PROBE_SECONDS):
                return
        except urllib.error.HTTPError:
            return  # it answered
        except (OSError, ValueError) as error:
            cause = f"{endpoint} cannot be reached ({getattr(error, 'reason', error)})"
    if not may_be_path:
        raise DataError(f"{setting}={name}: must be done while there is a network; {cause}; {remedy}")
    raise DataError(
        f"{setting}={name}: must be an existing path, or a hub name while there is a network; there is no such "
        f"path here and {cause}; {remedy}"
    )
