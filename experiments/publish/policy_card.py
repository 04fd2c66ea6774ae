"""The card of an exported policy: what it sees, what it may do, where it was learned. No verdict on how good it is."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from acodm_env.files import atomic_file
from acodm_env.hub import looks_local
from acodm_env.objective import describe
from acodm_env.policy.dense import Policy
from acodm_env.support import recorded_objective

CARD = "README.md"
PATHS = ("corpus", "proxy", "target", "conf_file", "surrogate", "surface")
"""Settings that may be paths."""


def write_policy_card(folder: str | Path, policy: Policy, repo: str | None = None) -> None:
    """Write README.md beside `policy.json`.

    Args:
        folder: of the policy.
        policy: the one in it.
        repo: where on the hub it will lie.
    """
    with atomic_file(Path(folder) / CARD) as file:
        file.write(policy_card(policy, repo).encode())


def policy_card(policy: Policy, repo: str | None = None) -> str:
    """README.md of a policy: Markdown, front matter first."""
    front = {"library_name": "acodm", "tags": ["ac-odm", "data-mixing", "reinforcement-learning"]}
    domains = ", ".join(f"`{name}`" for name in policy.domains) or "any: it treats all domains alike"
    about = [
        ("architecture", policy.architecture),
        ("domains", domains),
        ("layers", " → ".join(_layer(*layer) for layer in policy.layers)),
        ("decides every", f"{policy.decision_every} optimiser steps of {policy.horizon}"),
        ("lag", f"{policy.lag} optimiser steps until a mixture takes effect"),
        ("gradients", policy.gradients or "not read"),
        *([] if policy.probe_sequences is None else [("measures", f"{policy.probe_sequences} sequences a decision")]),
        *((f"training support: {name}", str(value)) for name, value in policy.support.items()),
        ("fingerprint", f"`{policy.fingerprint}`"),
    ]
    fields = [(f"`{name}`", "one per domain" if size < 1 else str(size)) for name, size in policy.fields]
    action = policy.action
    limits = policy.bounds
    deciding = [
        ("scale c", f"{action.scale:g}"),
        ("floor ε", f"{action.floor:g}"),
        ("moves", "at once" if action.rate == 1 else f"towards each decision by max({action.rate:g}, 1/(n+2)), n ≥ 1"),
        *([] if action.tilt == 1 else [("tilt", f"the mixture to the power {action.tilt:g}, over its sum")]),
        ("prior", "uniform" if action.prior is None else _numbers(action.prior)),
        ("least weights", "none" if limits.minimum is None else _numbers(limits.minimum)),
        ("largest weights", "none" if limits.maximum is None else _numbers(limits.maximum)),
        ("most epochs of a domain", "no limit" if limits.max_epochs is None else f"{limits.max_epochs:g}"),
    ]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {repo or 'A data-mixing policy'}",
        "A policy of AC-ODM that sets the mixture of training domains while a language model is pre-trained. It is "
        "numbers and JSON (`policy.safetensors`, `policy.json`): nothing in it is executed when it is loaded.",
        "## How to use it",
        _usage(repo),
        "## What it is",
        markdown_table(("", ""), about),
        "## What it sees",
        markdown_table(("field", "entries"), fields),
        "## What it does",
        "An action a in [−1, 1] per domain becomes the mixture (1 − ε)·softmax(log prior + c·a) + ε/K.",
        markdown_table(("", ""), deciding),
        "## Where it was learned",
        markdown_table(("", ""), provenance_rows(policy.provenance)),
        version_text(policy.provenance),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _usage(repo: str | None) -> str:
    fetch = f"    hf download {repo} --local-dir DIR\n" if repo else ""
    return (
        f"`DIR` is the folder with these files.\n\n{fetch}    acodm gate --policy DIR\n"
        "    acodm transfer --policy DIR --corpus CORPUS --target pythia-160m --steps 20000 --out runs/policy"
    )


def _layer(weight: Any, bias: Any, activation: str) -> str:
    if weight.ndim == 1:
        return f"layer norm {len(bias)}"
    return f"{weight.shape[1]}×{weight.shape[0]}" + ("" if activation == "identity" else f" {activation}")


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def provenance_rows(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a policy's provenance tells of its learning, as far as it does, as (what, value).

    Args:
        provenance: of an exported policy; which keys it has depends on what made it.
    """
    config = provenance.get("config") or {}
    seconds = provenance.get("learning_seconds")
    tokens = None if config.get("surrogate") else provenance.get("learning_tokens")  # a surrogate's are imagined
    told: dict[str, Any] = {
        "algorithm": provenance.get("algo") or config.get("algo"),
        "checkpoint": provenance.get("checkpoint"),
        "learned on": _where(config) if config else None,
        "corpus": None if config.get("surrogate") or not config.get("corpus") else corpus_name(config["corpus"]),
        "corpus fingerprint": None if config.get("surrogate") else provenance.get("corpus_fingerprint"),
        "objective": _objective(config, policy_sees=provenance.get("support") is not None),
        "reward": config.get("reward"),
        "episodes": config.get("episodes"),
        "transitions": provenance.get("learning_transitions") or provenance.get("timesteps"),
        "tokens of learning": tokens,
        "seconds of learning": None if seconds is None else round(seconds, 1),
        "seed": config.get("seed", provenance.get("seed")),
    }
    return [
        (name, f"{value:,}" if isinstance(value, int | float) and name != "seed" else str(value))
        for name, value in told.items()
        if value not in (None, "")
    ] or [("provenance", "not recorded")]


def _objective(config: Mapping[str, Any], policy_sees: bool) -> str | None:
    """What was learned for, in words; None where that is the usual objective, or a surrogate's own."""
    if policy_sees:
        return "any: it sees weights and metric"
    metric, weights = recorded_objective(config)
    usual = metric == "loss" and not weights
    return None if usual or config.get("surrogate") else describe(metric, weights)


def _where(config: Mapping[str, Any]) -> str:
    if config.get("surrogate"):
        return f"the surrogate {bare_name(config['surrogate'])}"
    if config.get("target"):
        return f"the target {bare_name(config['target'])}, in its own run"
    return f"the proxy {bare_name(config.get('proxy'))}"


def version_text(record: Mapping[str, Any]) -> str:
    """Package versions and commit of a run's or a policy's record; "" where there are none."""
    found = [f"{name} {number}" for name, number in (record.get("versions") or {}).items()]
    commit = record.get("git_commit")
    return ", ".join(found + ([f"commit `{commit}`"] if commit else []))


def bare_name(setting: Any) -> str:
    """What a setting names, without the path to it; a hub's OWNER/NAME stays whole."""
    text = str(setting)
    if text.startswith("{"):  # a surrogate's settings as JSON
        return json.dumps(without_paths(json.loads(text)))
    is_path = looks_local(text, (".json", ".yml", ".yaml", ".jsonl", ".csv")) or Path(text).exists()
    return Path(text).name if is_path else text


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with names instead of paths, for what others will read."""
    told = dict(config)
    for name, value in config.items():
        is_path = isinstance(value, str) and value.startswith(("/", "~"))
        if value is not None and (name in PATHS or is_path):
            told[name] = corpus_name(told[name]) if name == "corpus" else bare_name(told[name])
    return told


def corpus_name(setting: Any) -> str:
    """The last part of a corpus's path, which is all that names it."""
    return Path(str(setting)).name


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
