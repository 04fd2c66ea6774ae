"""Results of evaluations without a model: items with known numbers, and stand-ins for what measures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acodm_env.corpus.tokenizer import end_of_document, load_tokenizer
from acodm_env.errors import ConfigError
from acodm_env.experiments.evaluation.chance import accuracy
from acodm_env.experiments.evaluation.scores import Metric, TaskScores
from acodm_env.files import sha256

METRICS = (("loss", "nats/token"), ("perplexity", "perplexity"), ("bits_per_byte", "bits/byte"))


def text_scores(losses: Mapping[str, Sequence[float]], tokens: int = 10, num_bytes: int = 40) -> TaskScores:
    """Perplexity of documents of one size.

    Args:
        losses: nats per token of each document, by domain.
        tokens, num_bytes: of every document.
    """
    items, table = [], []
    for domain, values in losses.items():
        for index, loss in enumerate(values):
            numbers = {"nats": loss * tokens, "tokens": tokens, "bytes": num_bytes}
            items.append({"id": f"{domain}/{index}", "group": domain, **numbers})
        mean = float(np.mean(values))
        table.append((mean, math.exp(mean), mean * tokens / num_bytes / math.log(2)))
    whole = np.mean(table, 0)
    metrics = [
        Metric(
            task="perplexity",
            name=name,
            group=group,
            value=float(value),
            stderr=0.01,
            low=float(value) - 0.02,
            high=float(value) + 0.02,
            num_items=len(items) if not group else len(losses[group]),
            unit=unit,
            higher_is_better=False,
        )
        for group, row in (("", whole), *zip(losses, table, strict=True))
        for (name, unit), value in zip(METRICS, row, strict=True)
    ]
    return TaskScores(task="perplexity", metrics=metrics, items=items, facts={"num_documents": len(items)})


def choice_scores(marks: Sequence[float], task: str = "mmlu", name: str = "acc", **facts: Any) -> TaskScores:
    """A task of right and wrong answers; chance is 0.25, of pass@1 0."""
    chance = 0.0 if name == "pass@1" else 0.25
    items = [{"id": f"anatomy/{i}", "group": "anatomy", name: float(mark)} for i, mark in enumerate(marks)]
    metric = accuracy([float(mark) for mark in marks], task=task, name=name, chance=chance)
    return TaskScores(
        task=task, metrics=[metric], items=items, facts={"num_fewshot": 0, "num_items": len(items), **facts}
    )


@dataclass
class FakeNetwork:
    """What is looked up in a model without running it; its own configuration, too."""

    max_position_embeddings: int = 32
    vocab_size: int = 300
    hidden_size: int = 8

    @property
    def config(self) -> "FakeNetwork":
        return self

    def get_text_config(self) -> "FakeNetwork":
        return self

    def forward(self, input_ids: Any) -> Any:
        raise AssertionError("a forward pass")


@dataclass
class FakeTokenizer:
    eos_token_id: int


@dataclass
class FakeModel:
    """What the stand-in of `load_model` gives."""

    path: Path
    sha256: str
    context: int
    bf16: bool = False
    tokenizer_sha256: str = "t" * 64
    num_parameters: int = 7
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model: FakeNetwork = field(default_factory=FakeNetwork)
    tokenizer: FakeTokenizer = field(default_factory=lambda: FakeTokenizer(0))


@dataclass
class Measuring:
    """Stand-ins for loading, perplexity and harness, which count their calls."""

    calls: list[str] = field(default_factory=list)
    accuracy_of: dict[str, float] = field(default_factory=dict)
    """Share of right answers, by name of the model's folder."""
    fail_on: str = ""
    """Task at which the evaluation is interrupted."""
    reencoded: bool = False
    """What the perplexity says of the texts."""

    def load_model(self, path: Path, *, device: str, precision: str, context: int | None) -> FakeModel:
        self.calls.append(f"load {path.parent.name}")
        if context is not None and context > 32:
            raise ConfigError(f"context={context}: must be at most 32")
        tokenizer = FakeTokenizer(end_of_document(load_tokenizer(str(path))))
        return FakeModel(
            path=Path(path),
            sha256=sha256(path / "model.safetensors"),
            context=context or 32,
            bf16=precision == "bf16",
            tokenizer=tokenizer,
        )

    def score_perplexity(self, loaded: FakeModel, store: Any, *, on_tokens: Any, **settings: Any) -> TaskScores:
        self.calls.append(f"perplexity {loaded.path.parent.name}")
        on_tokens(10)
        count = settings["limit"] or 25
        loss = 3.0 + 0.1 * len(loaded.path.parent.name)
        scores = text_scores({domain: [loss + 0.01 * i for i in range(count)] for domain in store.domains})
        return replace(scores, facts=scores.facts | {"reencoded": self.reencoded})

    def check_tasks(self, names: Sequence[str], data: Path | None, *, allow_code_execution: bool, **_: Any) -> None:
        self.calls.append(f"check {','.join(names)}")
        if "mmul" in names:
            raise ConfigError("tasks=mmul: must be a task; did you mean 'mmlu'?")

    def run_tasks(self, loaded: FakeModel, names: Sequence[str], **settings: Any) -> Iterator[TaskScores]:
        for name in names:
            if name == self.fail_on:
                raise KeyboardInterrupt
            self.calls.append(f"{name} {loaded.path.parent.name}")
            share = self.accuracy_of.get(loaded.path.parent.name, 0.25)
            marks = (np.arange(settings["limit"] or 400) % 20 < 20 * share).astype(float)
            yield choice_scores(marks.tolist(), name)

    def harness_version(self) -> str:
        return "0.4.13"

    def data_checksums(self, name: str, data: Path) -> dict[str, str]:
        return {"mmlu_test.jsonl.gz": sha256(data / "mmlu_test.jsonl.gz")}
