"""A loaded model as lm-eval sees it: silent, with its progress told and its cut prompts counted.

Only imported where lm-eval is installed; see `acodm_env.evaluation.harness`.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from acodm_env.errors import ConfigError

if TYPE_CHECKING:
    from acodm_env.evaluation.loading import LoadedModel

OnRows = Callable[[int, int], None]
"""Called with prompts done and prompts in all, after every batch."""
_LOGITS_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # of one batch; its log-probabilities take as much again
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
        batch_size: rows per forward pass; None: as many as keep the logits within a budget, halved on a GPU whose
            memory does not suffice.
        on_rows: told how far it is.
    """

    def __init__(self, loaded: "LoadedModel", *, batch_size: int | None, on_rows: OnRows = lambda done, total: None):
        super().__init__(
            pretrained=loaded.model,  # type: ignore[arg-type, unused-ignore]
            tokenizer=copy.deepcopy(loaded.tokenizer),
            batch_size=batch_size or automatic_rows(loaded),
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
        self._fixed_rows = batch_size is not None
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
        rows = set()
        self._longest_answer = max((len(continuation) for *_, continuation in requests), default=1)
        for names, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"context={self.max_length}: must be at least {len(continuation)} tokens, the longest answer "
                    f"to score; the model's context is short; leave this task out, or use a larger --context"
                )
            if names is not None and len(context) + len(continuation) > self.max_length + 1:
                self.truncated.add(names[0])
            rows.add(hash((*context, *continuation[:-1])))  # the harness asks once for answers that differ in the end
        return self._with_room(
            lambda: super(HarnessModel, self)._loglikelihood_tokens(
                requests, disable_tqdm=True, override_bs=override_bs
            ),
            len(rows),
        )

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """The harness's, silent, with completions of at most half of the context."""
        for request in requests:
            prompt, settings = request.args
            asked = next((int(settings.pop(key)) for key in _LENGTHS if key in settings), self.max_gen_toks)
            for key in _LENGTHS:
                settings.pop(key, None)
            settings["max_gen_toks"] = min(asked, self.longest_allowed)
            self.longest_completion = max(self.longest_completion, settings["max_gen_toks"])
            if len(self.tok_encode(prompt)) > self.max_length - settings["max_gen_toks"]:
                self.truncated.add(prompt)
        return self._with_room(
            lambda: super(HarnessModel, self).generate_until(requests, disable_tqdm=True), len(requests)
        )

    def _with_room(self, work: Callable[[], Any], total: int) -> Any:
        """The work, again with half the rows whenever the GPU's memory does not suffice."""
        while True:
            self._done, self._total = 0, total
            try:
                return work()
            except torch.OutOfMemoryError:
                if self._fixed_rows or self.batch_size_per_gpu == 1:
                    raise
                self.batch_size_per_gpu = self.batch_size_per_gpu // 2
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


def automatic_rows(loaded: "LoadedModel") -> int:
    """Rows whose logits stay within the budget of the model's device, 1 to 64."""
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    budget = _LOGITS_BYTES.get(loaded.device.type, _LOGITS_BYTES["cpu"])
    return max(1, min(_MOST_ROWS, budget // (4 * vocabulary * loaded.context)))


def cut(model: HarnessModel, samples: Sequence[dict[str, Any]]) -> int:
    """Number of items any of whose prompts lost its beginning."""
    return sum(any(argument[0] in model.truncated for argument in sample["arguments"]) for sample in samples)
