"""The command that a configuration is, to be given again."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any


def command_line(command: str, config: Any, defaults: Mapping[str, Any] | None = None) -> str:
    """`acodm COMMAND` with every setting that is not the default, as a shell takes it.

    Args:
        command: of the command line.
        config: its dataclass.
        defaults: of settings for which the class has others, or none.
    """
    words = ["acodm", command]
    for setting in fields(config):
        value, default = getattr(config, setting.name), setting.default
        if setting.default_factory is not MISSING:
            default = setting.default_factory()
        if value != (defaults or {}).get(setting.name, default):
            words += _words(setting.name.replace("_", "-"), value)
    return shlex.join(words)


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
