"""How the tests of downstream evaluation lend a model to the harness, and run a task."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from acodm_env.experiments.evaluation.harness import run as harness
from acodm_env.experiments.evaluation.loading import LoadedModel
from acodm_env.experiments.evaluation.scores import TaskScores


def tiny_tokenizer(corpus: Path) -> Any:
    """The tokenizer of a prepared corpus as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(corpus / "tokenizer.json"), eos_token="<|endofdocument|>")


def lend(model: torch.nn.Module, tokenizer: Any, context: int) -> LoadedModel:
    """A model as if it came from a folder."""
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        path=Path("model"),
        device=torch.device("cpu"),
        bf16=False,
        context=context,
        num_parameters=sum(part.numel() for part in model.parameters()),
        sha256="",
        tokenizer_sha256="",
    )


def run(loaded: Any, name: str, data: Path | None, **changes: Any) -> tuple[TaskScores, list[str]]:
    notes: list[str] = []
    settings = {"num_fewshot": None, "limit": None, "batch_size": 8, "allow_code_execution": False} | changes
    (scores,) = harness.run_tasks(loaded, [name], data=data, on_note=notes.append, **settings)
    return scores, notes


class AlwaysOne(torch.nn.Module):
    """A model that gives one token all the probability, wherever it is asked."""

    def __init__(self, like: torch.nn.Module, token: int, value: float = 9.0):
        super().__init__()
        self.config: Any = like.config
        self.embedding = like.get_input_embeddings()  # type: ignore[operator]
        self.row = torch.zeros(self.config.vocab_size)
        self.row[token] = value

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def tie_weights(self) -> None:
        """Nothing to tie."""

    def get_input_embeddings(self) -> Any:
        return self.embedding

    def forward(self, ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.row.expand(*ids.shape, -1))
