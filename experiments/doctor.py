"""`acodm doctor`: what is installed, where it is imported from, which device, corpus and disk there is."""

import importlib
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from acodm_env.errors import AcodmError
from acodm_env.experiments.console import listing, say
from acodm_env.experiments.run.folder import versions
from acodm_env.files import write_json

OWN = ("acodm_env", "acodm_env.agents", "acodm_env.experiments")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Print versions, device, import paths, corpus cache and free disk, and name what is wrong."""

    corpus: str | None = None
    """Folder of a token store to check as well (opens it: sizes, checksums, disjoint splits)."""
    out: str | None = None
    """JSON file to write the findings to as well."""
    seed: int = 0
    """Not used; accepted because every command takes it."""
    quiet: bool = False
    """Print only what is wrong."""


def run(config: DoctorConfig) -> None:
    """Print findings; a problem is a line that begins with PROBLEM."""
    findings = {**versions(), **device(), **imports(), **policies(), **storage()}
    if config.corpus is not None:
        findings |= corpus(config.corpus)
    if not config.quiet:
        say(listing(findings.items()))
    found = problems()
    for problem in found:
        say(f"PROBLEM: {problem}")
    if not found and not config.quiet:
        say("no problems found")
    if config.out is not None:
        write_json(config.out, findings | {"problems": found})
        say(f"findings: {config.out}")


def device() -> dict[str, str]:
    """The device that "auto" takes, its precision, and the peak that MFU is counted against."""
    import torch

    from acodm_env.experiments.run.accounting import peak_flops

    if not torch.cuda.is_available():
        return {"device": f"cpu ({torch.get_num_threads()} threads, float32)"}
    precision = "bf16" if torch.cuda.is_bf16_supported() else "float32"
    name, peak = torch.cuda.get_device_name(0), peak_flops(torch.cuda.get_device_name(0))
    return {
        "device": f"cuda ({torch.cuda.device_count()} × {name}, {precision})",
        "peak": f"{peak / 1e12:g} TFLOP/s in bf16, dense" if peak else "not in the table: runs will have no MFU",
    }


def imports() -> dict[str, str]:
    """Where our packages are imported from, and any other top-level `agents` or `experiments`."""
    paths = {name: _origin(name) for name in OWN}
    for name in ("agents", "experiments"):
        paths[f"top-level {name}"] = _origin(name)
    return paths


def _origin(name: str) -> str:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    return str(spec.origin or list(spec.submodule_search_locations or [])) if spec else "absent"


def policies() -> dict[str, str]:
    """The policies that come with the package, by name."""
    from acodm_env.policy.load import SHIPPED, open_policy

    found = {}
    for name in SHIPPED:
        try:
            found[f"policy {name}"] = open_policy(name).fingerprint[:16]
        except AcodmError as error:
            found[f"policy {name}"] = str(error)
    return found


def problems() -> list[str]:
    """What would make a run fail or import the wrong code, with the cause."""
    found = []
    for name in ("agents", "experiments"):
        foreign, ours = _origin(name), _origin(f"acodm_env.{name}")
        if ours == "absent":
            found.append(f"acodm_env.{name} is not installed: run `pip install -e .` in the checkout")
        elif foreign != "absent" and Path(foreign).resolve() != Path(ours).resolve():
            found.append(
                f"another package called `{name}` ({foreign}) is on the path; ours is acodm_env.{name} ({ours}): "
                f"import it by that name only"
            )
    free = shutil.disk_usage(Path.cwd()).free
    if free < 1e9:
        found.append(f"less than 1 GB free on {Path.cwd()}: runs and token stores will not fit")
    return found


def storage() -> dict[str, str]:
    """Cache of the pocket corpus and free disk."""
    cache = Path(os.environ.get("ACODM_CACHE", "~/.cache/acodm")).expanduser()
    return {
        "ACODM_CACHE": f"{cache} ({'exists' if cache.exists() else 'not yet made'})",
        "disk": f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free on {Path.cwd()}",
        "executable": sys.executable,
    }


def corpus(path: str) -> dict[str, str]:
    """Domains, tokens and fingerprint of a token store; opening it checks it."""
    from acodm_env.corpus import open_corpus

    store = open_corpus(path)
    sizes = {
        name: f"{size:,} tokens" if size else "target, evaluated only"
        for name, size in zip(store.domains, store.sizes_tokens("train"), strict=True)
    }
    return {"corpus": f"{store.path} ({store.fingerprint[:16]})"} | {f"  {name}": size for name, size in sizes.items()}


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm doctor, or python -m acodm_env doctor")
