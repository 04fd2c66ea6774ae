"""RL-Zoo's notation for nested settings, `"dict(net_arch=[64, 64], activation_fn=nn.ReLU)"`, read without `eval`.

RL-Zoo evaluates such a string as Python. Here it is parsed: nested `dict(…)` of literals, and the names of classes in
`torch.nn` and `torch.optim`, are all that it may hold.
"""

import ast
from collections.abc import Mapping
from typing import Any

from acodm_env.errors import ConfigError


class Name(str):
    """A dotted name such as `nn.ReLU`, not yet looked up."""

    __slots__ = ()


def parse(text: str) -> Any:
    """Nested dicts, lists, literals and `Name`s from RL-Zoo's notation.

    Raises:
        ConfigError: anything else, such as a call of another function.
    """
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"settings={text}: must be dict(name=value, …) of literals, nn.<layer> and th.optim.<optimiser>; {error}"
        ) from error


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        if any(keyword.arg is None for keyword in node.keywords):
            raise ValueError("** is not allowed")
        return {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        keys = [ast.literal_eval(key) if key is not None else None for key in node.keys]
        return dict(zip(keys, map(_value, node.values), strict=True))
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(entry) for entry in node.elts]
    if isinstance(node, ast.Attribute):
        return Name(ast.unparse(node))
    return ast.literal_eval(node)


def written(value: Any) -> str:
    """RL-Zoo's notation of a parsed value: the inverse of `parse`."""
    if isinstance(value, Mapping):
        return f"dict({', '.join(f'{key}={written(entry)}' for key, entry in value.items())})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    return str(value) if isinstance(value, Name) else repr(value)


def resolve(value: Any) -> Any:
    """A parsed value with the classes in the place of their names.

    Raises:
        ConfigError: a name that is neither a layer in torch.nn nor an optimiser in torch.optim.
    """
    if isinstance(value, Mapping):
        return {key: resolve(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [resolve(entry) for entry in value]
    return _class(value) if isinstance(value, Name) else value


def _class(name: Name) -> type:
    import torch

    folder, _, last = name.rpartition(".")
    places: dict[str, tuple[Any, type]] = {
        "nn": (torch.nn, torch.nn.Module),
        "th.optim": (torch.optim, torch.optim.Optimizer),
    }
    if folder in places:
        module, kind = places[folder]
        found = getattr(module, last, None)
        if isinstance(found, type) and issubclass(found, kind):
            return found
    raise ConfigError(f"settings.{name}: must be nn.<layer> or th.optim.<optimiser>; torch has no such class there")
