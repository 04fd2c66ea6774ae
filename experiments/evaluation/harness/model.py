"""A loaded model as lm-eval sees it: silent, with its progress told and its cut prompts counted.

Only imported where lm-eval is installed; see `acodm_env.experiments.evaluation.harness.run`.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from acodm_env.errors import ConfigError

if TYPE_CHECKING:
    from acodm_env.experiments.evaluation.loading import LoadedModel

OnRows = Callable[[int, int], None]
"""Called with prompts done and prompts in all, after every batch."""
_BUDGET_BYTES = {
    "cpu": 256 << 20,
    "cuda": 2 << 30,
}  # of a batch's largest tensors; log-probabilities take as much again
_MOST_ROWS = 64
_LENGTHS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # the harness's names for one thing


class HarnessModel(HFLM):  # type: ignore[misc, unused-ignore]
    """HFLM over a `LoadedModel`.

    Prompts longer than the context lose their beginning, as in the harness, and are counted. Completions are at most
    half of the context long: the harness would refuse those that leave no room for a prompt.

    Args:
        loaded: the model; its tokenizer is copied, since the harness gives it a padding token.
        batch_size: rows per forward pass; None: as many as keep logits and activations within a budget, by the lengths
            that are asked for; halved on a GPU whose memory does not suffice.
        on_rows: told how far it is.
    """

    def __init__(self, loaded: "LoadedModel", *, batch_size: int | None, on_rows: OnRows = lambda done, total: None):
        super().__init__(
            pretrained=loaded.model,  # type: ignore[arg-type, unused-ignore]
            tokenizer=copy.deepcopy(loaded.tokenizer),
            batch_size=batch_size or 1,  # until the lengths are known
            max_length=loaded.context,
            mixed_precision_dtype=torch.bfloat16 if loaded.bf16 else None,
            softmax_dtype=torch.float32,
        )
        self.truncated: set[str] = set()
        """Prompts that exceed the context."""
        self.longest_completion = 0
        """Tokens that completions were allowed; 0 before the first."""
        self.batch_size_per_gpu: int
        self._accepts = inspect.signature(loaded.model.forward).parameters
        self._longest_answer, self._bf16 = 1, loaded.bf16
        self._fixed_rows, self._most_rows, self._loaded = batch_size is not None, _MOST_ROWS, loaded
        self._on_rows, self._done, self._total = on_rows, 0, 0

    @property
    def longest_allowed(self) -> int:
        """Tokens that a completion may have at most."""
        return max(1, int(self.max_length) // 2)

    @property
    def max_gen_toks(self) -> int:
        """What tasks get that name no length."""
        return min(int(super().max_gen_toks), self.longest_allowed)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """The harness's, without its progress bars."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """The harness's, without its progress bars."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        """The harness's, silent, after counting what does not fit."""
        rows: dict[int, int] = {}  # lengths by content
        self._longest_answer = max((len(continuation) for *_, continuation in requests), default=1)
        for names, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"context={self.max_length}: must be at least {len(continuation)} tokens, the longest answer "
                    f"to score; the model's context is short; leave this task out, or use a larger --context"
                )
            if names is not None and len(context) + len(continuation) > self.max_length + 1:
                self.truncated.add(names[0])
            row = (*context, *continuation[:-1])  # the harness asks once for answers that differ in the end
            rows[hash(row)] = min(len(row), self.max_length)
        self._fit(list(rows.values()), answer=self._longest_answer)
        return self._with_room(
            lambda: super(HarnessModel, self)._loglikelihood_tokens(
                requests, disable_tqdm=True, override_bs=override_bs
            ),
            len(rows),
        )

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """The harness's, silent, with completions of at most half of the context.

        Raises:
            ConfigError: a context that cannot hold a prompt and a completion.
        """
        if self.max_length < 2:
            raise ConfigError(
                f"context={self.max_length}: must be at least 2 tokens for a task that writes; a prompt and a "
                f"completion take one each; use a larger --context, or leave this task out"
            )
        lengths = []
        for request in requests:
            prompt, settings = request.args
            asked = next((int(settings.pop(key)) for key in _LENGTHS if key in settings), self.max_gen_toks)
            for key in _LENGTHS:
                settings.pop(key, None)
            settings["max_gen_toks"] = min(asked, self.longest_allowed)
            self.longest_completion = max(self.longest_completion, settings["max_gen_toks"])
            length, room = len(self.tok_encode(prompt)), self.max_length - settings["max_gen_toks"]
            if length > room:
                self.truncated.add(prompt)
            lengths.append(min(length, room))
        self._fit(lengths, completion=self.longest_completion)
        return self._with_room(
            lambda: super(HarnessModel, self).generate_until(requests, disable_tqdm=True), len(requests)
        )

    def _fit(self, lengths: Sequence[int], *, answer: int = 1, completion: int = 0) -> None:
        """As many rows as fit, unless the user has said how many."""
        if not self._fixed_rows:
            keeps = "logits_to_keep" in self._accepts
            fitting = fitting_rows(self._loaded, lengths, answer=answer, completion=completion, keeps=keeps)
            self.batch_size_per_gpu = min(self._most_rows, fitting)

    def _with_room(self, work: Callable[[], Any], total: int) -> Any:
        """The work, again with half the rows whenever the GPU's memory does not suffice."""
        while True:
            self._done, self._total = 0, total
            try:
                return work()
            except torch.OutOfMemoryError:
                if self._fixed_rows or self.batch_size_per_gpu == 1:
                    raise
                self._most_rows = self.batch_size_per_gpu = self.batch_size_per_gpu // 2
            torch.cuda.empty_cache()

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits of the last positions, (B, kept, vocabulary): as many as hold every answer to score.

        The harness counts from the end, and would compute them for whole prompts: most of a small model's work.
        """
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            logits: torch.Tensor = self.model(inps, **self._savings(inps)).logits
        self._tell(len(inps))
        return logits

    def _savings(self, inps: torch.Tensor) -> dict[str, Any]:
        settings: dict[str, Any] = {"use_cache": False} if "use_cache" in self._accepts else {}
        if "logits_to_keep" in self._accepts:
            width = inps.shape[1]  # rows are padded on the right, with zeros
            places = torch.arange(1, width + 1, device=inps.device)
            shortest = int(((inps != 0) * places).amax(dim=1).min())  # at most the shortest row's length
            settings["logits_to_keep"] = min(width, width - shortest + self._longest_answer)
        return settings

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens: torch.Tensor = super()._model_generate(context, *args, **kwargs)  # (B, T)
        self._tell(len(context))
        return tokens

    def _tell(self, rows: int) -> None:
        self._done += rows
        self._on_rows(min(self._done, self._total), self._total)


def fitting_rows(
    loaded: "LoadedModel", lengths: Sequence[int], *, answer: int, completion: int = 0, keeps: bool = True
) -> int:
    """Rows (1 to 64, a power of two) whose largest tensors stay within the budget of the model's device.

    Batches are of rows sorted by length. Logits are made for the last positions: the longest answer, and what the
    shortest row of a batch is padded by.

    Args:
        loaded: the model.
        lengths: tokens of each row.
        answer: tokens of the longest answer to score.
        completion: tokens that are written after each row, with a cache of all of its keys and values; 0: none are.
        keeps: whether the model makes only the logits that are asked for; otherwise they are of whole rows.
    """
    budget = _BUDGET_BYTES.get(loaded.device.type, _BUDGET_BYTES["cpu"]) // 4  # float32 numbers
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    hidden, cached = _numbers_per_token(loaded)
    ordered = np.sort(np.asarray(lengths or [1], dtype=np.int64))[::-1]
    rows = _MOST_ROWS
    while rows > 1:
        widths = ordered[::rows]
        shortest = ordered[np.minimum(np.arange(rows - 1, len(ordered) + rows - 1, rows), len(ordered) - 1)]
        kept = widths
        if keeps:  # generation asks for the last position alone: its prompts are padded on the left
            kept = np.ones_like(widths) if completion else np.minimum(widths, widths - shortest + answer)
        largest = np.maximum(kept * vocabulary, widths * hidden)
        if completion:
            largest = np.maximum(largest, (widths + completion) * cached)
        if min(rows, len(ordered)) * int(largest.max()) <= budget:
            break
        rows //= 2
    return rows


def _numbers_per_token(loaded: "LoadedModel") -> tuple[int, int]:
    """Numbers of a token's widest activation (a feed-forward layer's), and of its keys and values in all layers."""
    config: Any = loaded.model.config.get_text_config()  # type: ignore[operator, union-attr]
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    widest = max(4 * hidden, int(getattr(config, "intermediate_size", 0) or 0))
    heads = int(getattr(config, "num_attention_heads", 0) or 1)
    kept = int(getattr(config, "num_key_value_heads", 0) or heads)
    size = int(getattr(config, "head_dim", 0) or hidden // heads)
    return widest, 2 * int(getattr(config, "num_hidden_layers", 0) or 0) * kept * size


def cut(model: HarnessModel, samples: Sequence[dict[str, Any]]) -> int:
    """Number of items any of whose prompts lost its beginning."""
    return sum(any(argument[0] in model.truncated for argument in sample["arguments"]) for sample in samples)
