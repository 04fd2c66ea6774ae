"""The card of a trained model: what it is, what it was fed, who decided that, how it scores.

Everything comes from the run's folder. Of paths only the last part is told: where files lie is nobody else's business.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from acodm_env.experiments.publish.evaluation_card import evaluation_section
from acodm_env.experiments.publish.policy_card import (
    bare_name,
    corpus_name,
    markdown_table,
    provenance_rows,
    version_text,
)
from acodm_env.experiments.run.folder import RunFolder
from acodm_env.files import read_json
from acodm_env.policy.dense import Policy
from acodm_env.run_log import StepLine, array
from acodm_env.step_stats import Array


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished target run, read once: its logs may be long."""

    path: Path
    record: Mapping[str, Any]
    """`config.json`, with a benchmark's settings under the names of `acodm transfer`."""
    steps: Sequence[StepLine]
    """Lines of `stats.jsonl`."""
    result: Mapping[str, Any]
    """`result.json`."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Settings of the run."""
        config: Mapping[str, Any] = self.record["config"]
        return config

    @property
    def tokens(self) -> int:
        """Tokens that it was trained on."""
        return self.steps[-1].tokens


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the files say of the model."""

    architecture: str
    num_parameters: int
    context: int
    """Tokens."""
    sha256: str
    """Of the file of weights."""
    auto_tokenizer: bool = True
    """Whether `AutoTokenizer` encodes as the model was trained."""


def model_card(run: Trained, weights: Weights, name: str, policy: Policy | None = None, repo: str | None = None) -> str:
    """README.md of an exported model.

    Args:
        run: a finished target run.
        weights: of its model.
        name: title.
        policy: the one that drove the run, if it is there to be asked.
        repo: where on the hub it will lie.
    """
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ac-odm", "data-mixing", "pre-training"],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        _summary(run, weights),
        "## How to load it",
        _usage(repo, weights),
        "## Training",
        markdown_table(("", ""), _training_rows(run, weights)),
        "## The mixture that it was trained on",
        _mixture_section(run),
        "## Who decided the mixture",
        _decider(run, policy),
        "## Evaluation",
        evaluation_section(run.path / "evaluation.json", weights.sha256, run.config.get("corpus_fingerprint")),
        "## Limits",
        _limits(run, weights),
        "## Made with",
        version_text(run.record),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(run: Trained, weights: Weights) -> str:
    config = run.config
    return (
        f"A causal language model ({weights.architecture}, {weights.num_parameters:,} parameters), pre-trained from "
        f"random weights on {run.tokens:,} tokens of the corpus *{corpus_name(config['corpus'])}* "
        f"({len(config['domains'])} domains), whose mixture **{config['name']}** decided while it learned. "
        f"Trained and exported with AC-ODM (`acodm`)."
    )


def _usage(repo: str | None, weights: Weights) -> str:
    where = repo or "FOLDER"
    tokenizer = "AutoTokenizer" if weights.auto_tokenizer else "PreTrainedTokenizerFast"
    warning = (
        "\n\nNot by `AutoTokenizer`: for this architecture it builds another tokenizer than the one that lies here, "
        "which gives other ids than those that the model was trained on."
    )
    return (
        f"```python\nfrom transformers import AutoModelForCausalLM, {tokenizer}\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{where}")\n'
        f'tokenizer = {tokenizer}.from_pretrained("{where}")\n```'
        + ("" if weights.auto_tokenizer else warning)
        + ("" if repo else "\n\n`FOLDER` is the folder that this file lies in.")
    )


_BENCHMARK_COSTS = {
    "training": "training compute",
    "measurement": "compute of what the method had measured",
    "preparation": "compute of the method's runs beforehand",
    "learning": "compute of the policy's learning",
}


def _training_rows(run: Trained, weights: Weights) -> list[tuple[str, str]]:
    config, result = run.config, run.result
    rows = [
        ("corpus", corpus_name(config["corpus"])),
        ("corpus fingerprint", f"`{config['corpus_fingerprint']}`"),
        ("model", bare_name(config["target"])),
        ("tokens", f"{run.tokens:,}"),
        ("optimiser steps", f"{run.steps[-1].step:,} of {config['steps']:,}"),
        ("sequences per step", f"{config['batch_size']:,}"),
        ("tokens per sequence", f"{config['sequence_length']:,}"),
        ("learning rate", f"{config['learning_rate']:g} at its peak, {config['schedule']}"),
        ("seed", str(config["seed"])),
        ("weights' SHA-256", f"`{weights.sha256}`"),
    ]
    cost = result.get("accounting") or {}
    if cost.get("flops"):
        rows.append(("training compute", f"{cost['flops']:.3g} FLOPs ({cost['precision']}, {cost['device']})"))
    for part, label in _BENCHMARK_COSTS.items():
        if flops := (result.get("cost") or {}).get(part, {}).get("flops"):
            rows.append((label, f"{flops:.3g} FLOPs"))
    if skipped := sum(line.skipped for line in run.steps):
        rows.append(("updates skipped", f"{skipped:,}: the loss or the gradient was not finite"))
    if result.get("overridden_steps"):
        rows.append(("steps set by hand", f"{result['overridden_steps']:,}: an operator gave the mixture"))
    changes = run.record.get("adapted", [])
    rows += [(f"changed at step {each['step']}", ", ".join(each["changed"])) for each in changes]
    return rows


# --- what it was fed --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a model was given of one domain."""

    tokens: float
    realised: float
    """Share of all tokens."""
    requested: float
    """Mean of what was decided, weighted by the tokens of the steps."""
    epochs: float | None
    """Passes over the domain; None if it was not in the corpus at the end."""


def mixture_used(run: Trained) -> dict[str, Share]:
    """The mixture by domain over all steps, those before a change of domains too."""
    tokens: dict[str, float] = {}
    asked: dict[str, float] = {}
    for domains, lines in _phases(run):
        sizes = _step_tokens(lines)  # (S,)
        drawn, decided = array([line.realised for line in lines]), array([line.requested for line in lines])
        for collected, shares in ((tokens, drawn), (asked, decided)):
            given = sizes @ shares  # (K,)
            for name, value in zip(domains, given.tolist(), strict=True):
                collected[name] = collected.get(name, 0.0) + value
    total = sum(tokens.values())
    epochs = dict(zip(run.config["domains"], run.steps[-1].epochs, strict=True))
    return {
        name: Share(tokens=tokens[name], realised=tokens[name] / total, requested=asked[name] / total, epochs=passes)
        for name in tokens
        for passes in [epochs.get(name)]
    }


def _phases(run: Trained) -> list[tuple[Sequence[str], Sequence[StepLine]]]:
    """Domains and steps, in order: the logs that changes of domains have put aside, then the run's own."""
    found: list[tuple[Sequence[str], Sequence[StepLine]]] = []
    for archive in sorted(run.path.glob("before-step-*"), key=_archive_order):
        if (archive / "stats.jsonl").exists():
            before = RunFolder(archive, read_json(archive / "config.json")["config"])
            end = _archive_order(archive)[0]  # what was logged after it was done again
            found.append((list(before.config["domains"]), [line for line in before.steps if line.step <= end]))
    found.append((list(run.config["domains"]), run.steps))
    return [(domains, lines) for domains, lines in found if lines]


def _archive_order(archive: Path) -> tuple[int, int]:
    step, _, count = archive.name.removeprefix("before-step-").partition("-")
    return int(step), int(count or 1)


def _step_tokens(lines: Sequence[StepLine]) -> Array:
    """Tokens of every step (S,); the log counts them from the run's beginning."""
    counted = np.array([line.tokens for line in lines], dtype=np.float64)
    before = counted[0] * (lines[0].step - 1) / lines[0].step
    sizes: Array = np.diff(counted, prepend=before)
    return sizes


def _mixture_section(run: Trained) -> str:
    used = mixture_used(run)
    losses = run.result.get("domain_loss_nats", {})
    names = [*used, *(name for name in losses if name not in used)]
    rows = [(name, *_share_cells(used.get(name)), *_loss_cells(losses.get(name))) for name in names]
    header = ("domain", "tokens", "share used", "share decided", "epochs", "held-out loss, nats/token", "perplexity")
    means = [
        f"{label} {run.result[key]:.4f}"
        for key, label in (("mean_loss_nats", "mean loss"), ("mean_perplexity", "mean perplexity"))
        if run.result.get(key) is not None
    ]
    note = (
        "Shares are means over all steps, weighted by their tokens: what was drawn, in whole sequences, and what was "
        f"decided. Losses are on {run.config['eval_sequences']} sequences per domain of the corpus's test split"
    )
    return markdown_table(header, rows) + f"\n\n{note}; {_averaging(run.config)}: {', '.join(means)}."


def _averaging(config: Mapping[str, Any]) -> str:
    objective = config.get("objective") or []
    if len(set(objective)) <= 1:
        return "unweighted over domains"
    weights = (f"{name} {weight:.4g}" for name, weight in zip(config["targets"], objective, strict=True))
    return f"weighted over domains ({', '.join(weights)})"


def _share_cells(share: Share | None) -> tuple[str, str, str, str]:
    if share is None:
        return ("–", "–", "–", "–")
    epochs = "–" if share.epochs is None else f"{share.epochs:.3g}"
    return f"{share.tokens:,.0f}", _percent(share.realised), _percent(share.requested), epochs


def _loss_cells(loss: float | None) -> tuple[str, str]:
    return ("–", "–") if loss is None else (f"{loss:.4f}", f"{np.exp(loss):.4g}")


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


# --- who decided ------------------------------------------------------------------------------------------


def _decider(run: Trained, policy: Policy | None) -> str:
    config, learning = run.config, run.result.get("learning")
    if learning:
        what = f"An agent ({learning['algo']}) that learned in this very run, without a proxy."
        rows = [
            ("decisions", f"{learning['decisions']:,}"),
            ("updates", f"{learning['updates']:,}"),
            ("teacher", f"{learning['teacher']}, for the first {learning['start_decisions']} decisions"),
        ]
    elif config.get("mean_of"):
        return f"One mixture throughout: the mean over time of those that `{config['mean_of']}` decided in another run."
    elif config["mixer"] == "policy-untrained":
        what = "A policy with random weights, which learned nothing: the control of a benchmark."
        rows = []
    elif config.get("policy"):
        what = "A policy that was learned beforehand."
        rows = []
    else:
        return _method(config)
    if fingerprint := config.get("policy") or (policy and policy.fingerprint):
        rows.append(("policy's fingerprint", f"`{fingerprint}`"))
    provenance = run.result.get("policy") if policy is None else policy.provenance
    rows += provenance_rows(provenance) if provenance else []
    return f"{what}\n\n{markdown_table(('', ''), rows)}" if rows else what


def _method(config: Mapping[str, Any]) -> str:
    weights = config.get("weights")
    given = dict(zip(config["domains"], weights, strict=True)) if weights else {}
    parts = ["the weights " + ", ".join(f"{name} {weight:.4g}" for name, weight in given.items())] if given else []
    parts += [f"{key} {_option(value)}" for key, value in (config.get("options") or {}).items()]
    return f"The mixing method `{config['mixer']}`" + (f" with {'; '.join(parts)}." if parts else ".")


def _option(value: Any) -> str:
    return bare_name(value) if isinstance(value, str) else json.dumps(value)


# --- what it is not good for ------------------------------------------------------------------------------


def _limits(run: Trained, weights: Weights) -> str:
    ratio = run.tokens / weights.num_parameters
    return (
        f"A research model, trained from random weights on {run.tokens:,} tokens ({ratio:.2g} per parameter) to "
        f"compare data mixtures. Its context is {weights.context:,} tokens. It follows no instructions, and nothing "
        f"was done to make it safe or truthful. It repeats what its corpus holds, whose licences apply. The "
        f"end-of-document token begins and ends every text."
    )
