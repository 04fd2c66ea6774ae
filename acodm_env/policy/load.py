"""Exported policies read from their folders, and those of this package by name."""

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from acodm_env.errors import ConfigError, PolicyError
from acodm_env.files import read_json, sha256
from acodm_env.policy.dense import FORMAT_VERSION, Policy, digest_of
from acodm_env.policy.equivariant import EquivariantPolicy

SHIPPED = ("generalist",)
"""Policies of this package, by name."""
POLICIES = resources.files("acodm_env") / "policies"
"""Where their folders are."""


def load_policy(path: str | Path) -> Policy:
    """Read a policy folder.

    Raises:
        DataError: there is no policy, or its JSON is malformed.
        PolicyError: format version, checksum, field names or layer shapes do not fit; says which.
    """
    path = Path(path)
    contract = read_json(path / "policy.json")
    if not isinstance(contract, dict):
        raise PolicyError(f"{path}/policy.json: is no policy's contract; export it again")
    if contract.get("format_version") != FORMAT_VERSION:
        raise PolicyError(
            f"{path}: format_version={contract.get('format_version')}: must be {FORMAT_VERSION}; "
            f"it was written by another version of this package; export it again"
        )
    claimed = contract.pop("contract_sha256", None)
    if claimed != digest_of(contract):
        raise PolicyError(f"{path}/policy.json: checksum does not match: the file was edited; export it again")
    weights = path / "policy.safetensors"
    if not weights.is_file() or sha256(weights) != contract["weights_sha256"]:
        raise PolicyError(f"{weights}: missing, or its checksum does not match: cut short or edited; export again")
    policy = _kind(contract, path).from_contract(contract, weights)
    policy.check_shapes(path)
    return policy


def _kind(contract: Mapping[str, Any], path: Path) -> type[Policy]:
    """The class that reads this architecture; policies written before there were two are dense."""
    architecture = contract.get("architecture", Policy.architecture)
    for kind in (Policy, EquivariantPolicy):
        if architecture == kind.architecture:
            return kind
    raise PolicyError(
        f"{path}: architecture='{architecture}': must be dense or equivariant; it was written by a newer version of "
        f"this package; update it"
    )


def open_policy(policy: str | Path) -> Policy:
    """A shipped policy by its name, or an exported one by its folder ("./generalist" is a folder, not the name).

    Raises:
        ConfigError: neither such a name nor such a folder, or the package came without its policies.
        DataError, PolicyError: its files are damaged, see `load_policy`.
    """
    name = str(policy)
    shipped = POLICIES / name if name in SHIPPED else None
    if shipped is not None and not (shipped / "policy.json").is_file():
        raise ConfigError(f"policy={name}: must come with the package, and its files are not there; install it again")
    if shipped is not None:
        return load_policy(str(shipped))
    if not (Path(policy) / "policy.json").is_file():
        near = get_close_matches(name, SHIPPED, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`acodm export` writes one"
        raise ConfigError(
            f"policy={policy}: must be {' or '.join(SHIPPED)}, or the folder of an exported policy; it holds no "
            f"policy.json; {hint}"
        )
    return load_policy(policy)
