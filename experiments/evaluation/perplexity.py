"""Perplexity by domain: every token of a split scored exactly once, with a stated stride.

A domain's documents are one stream, as in training, with an end-of-document token before the first. Windows of
`context` input tokens begin every `stride` targets; a window scores the targets that none before it scored::

    targets   0 1 2 3 4 5 6 7 8 9         context 6, stride 2
    window 0  s s s s s s                 the first one scores all of its targets,
    window 1      . . . . s s             the others their last `stride`, each of which is predicted from
    window 2          . . . . s s         context - stride + 1 to context tokens

With stride = context (the cheapest) half of the tokens are predicted from less than half a context, which makes every
model look worse; the default is half a context. Numbers compare only at the same context and stride.
"""

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.evaluation.bootstrap import NUM_RESAMPLES, Estimate, Resampled, Statistic
from acodm_env.experiments.evaluation.documents import Documents, Reader, check_documents, tokenizer_fingerprint
from acodm_env.experiments.evaluation.loading import LoadedModel
from acodm_env.experiments.evaluation.scores import Metric, TaskScores

TASK = "perplexity"
_LARGEST = 700.0  # nats; exp of more is no number
_BUDGET_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}  # of the largest activation of a batch
_MOST_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 17}  # more in a batch are no faster (measured on CPU)
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}  # logits turned into losses at a time: on a CPU, what its cache holds


def loss(sums: NDArray[Any]) -> NDArray[Any]:
    """Mean over domains of nats per token (n,), from sums (K, n, 3) of nats, tokens and bytes."""
    return np.asarray((sums[..., 0] / sums[..., 1]).mean(0))


def perplexity(sums: NDArray[Any]) -> NDArray[Any]:
    """Mean over domains of exp(nats per token) (n,), from sums (K, n, 3) of nats, tokens and bytes."""
    return np.asarray(np.exp(sums[..., 0] / sums[..., 1]).mean(0))


def bits_per_byte(sums: NDArray[Any]) -> NDArray[Any]:
    """Mean over domains of bits per byte of text (n,), from sums (K, n, 3) of nats, tokens and bytes."""
    return np.asarray((sums[..., 0] / (math.log(2) * sums[..., 2])).mean(0))


METRICS: dict[str, tuple[Statistic, str]] = {
    "loss": (loss, "nats/token"),
    "perplexity": (perplexity, "perplexity"),
    "bits_per_byte": (bits_per_byte, "bits/byte"),
}
"""Statistic and unit by name; paired comparisons use the same statistics."""


def score_perplexity(
    loaded: LoadedModel,
    store: TokenStore,
    *,
    split: str = "test",
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
) -> TaskScores:
    """Loss, perplexity and bits per byte of every domain, and their unweighted means.

    Args:
        loaded: the model.
        store: the corpus; texts are encoded again where its tokenizer is not the model's.
        split: "train", "validation" or "test".
        context: input tokens of a window; None is the model's context.
        stride: targets between two windows' beginnings, 1 to `context`; None is half of the context.
        batch_size: windows of a forward pass; None is what fits, and halves when a CUDA device runs out of memory.
            The numbers do not depend on it (1e-5).
        limit: only the first so many documents of every domain.
        on_tokens: told how many tokens were scored, after each forward pass.

    Raises:
        ConfigError: a setting out of range, or a batch that does not fit.
        DataError: a domain without documents, or losses that are not finite.
    """
    windows = _windows(loaded, context, stride, batch_size)
    reader = Reader.of(store, loaded.path / "tokenizer.json", int(loaded.tokenizer.eos_token_id))
    check_documents(store, split, limit)
    began, tables, items = time.perf_counter(), [], []
    for domain in store.domains:
        documents = reader.read(domain, split, limit)
        table = _table(documents, windows.token_nats(documents, reader.end, on_tokens))
        tables.append(table)
        items += _items(domain, table)
    seconds = time.perf_counter() - began
    facts = {
        "split": split,
        "context": windows.context,
        "stride": windows.stride,
        "limit": limit,
        "num_tokens": int(sum(table[:, 1].sum() for table in tables)),
        "num_documents": len(items),
        "corpus_fingerprint": store.fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint(loaded.path / "tokenizer.json"),
        "reencoded": reader.tokenizer_file is not None,
        "num_resamples": NUM_RESAMPLES,
        "seconds": seconds,
        "tokens_per_second": windows.num_inputs / seconds,
    }
    return TaskScores(task=TASK, metrics=_metrics(store.domains, tables), items=items, facts=facts)


def check_perplexity(
    loaded: LoadedModel,
    store: TokenStore,
    *,
    split: str = "test",
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
) -> None:
    """Refuse what `score_perplexity` would refuse, without reading a document or running the model.

    Raises:
        ConfigError: a setting out of range.
        DataError: a domain without documents.
    """
    _windows(loaded, context, stride, batch_size)
    check_documents(store, split, limit)


def _table(documents: Documents, nats: NDArray[np.float32]) -> NDArray[np.float64]:
    """Nats, tokens and bytes of every document (D, 3)."""
    starts = np.concatenate([[0], documents.ends[:-1]])
    sums = np.add.reduceat(nats, starts, dtype=np.float64)
    if not np.isfinite(sums).all():
        raise DataError(
            f"domain={documents.domain}: its losses must be finite numbers; the model gives others: its weights are "
            f"broken or its run diverged; evaluate another checkpoint, or with precision=fp32"
        )
    return np.stack([sums, documents.ends - starts, documents.num_bytes], axis=1).astype(np.float64)


def _items(domain: str, table: NDArray[np.float64]) -> list[dict[str, Any]]:
    return [
        {"id": f"{domain}/{index}", "group": domain, "nats": float(nats), "tokens": int(tokens), "bytes": int(size)}
        for index, (nats, tokens, size) in enumerate(table)
    ]


def _metrics(domains: Sequence[str], tables: Sequence[NDArray[np.float64]]) -> list[Metric]:
    """The unweighted means over domains first, then every domain."""
    resampled = Resampled(tables)
    metrics = [
        _metric(name, unit, "", resampled.estimate(statistic), sum(map(len, tables)))
        for name, (statistic, unit) in METRICS.items()
    ]
    for index, domain in enumerate(domains):
        estimates = {name: resampled.estimate(statistic, only=index) for name, (statistic, _) in METRICS.items()}
        estimates["perplexity"] = _exponential(estimates["loss"], estimates["perplexity"])
        metrics += [
            _metric(name, METRICS[name][1], domain, found, len(tables[index])) for name, found in estimates.items()
        ]
    return metrics


def _exponential(of: Estimate, value: Estimate) -> Estimate:
    """A domain's perplexity with the interval that its loss has: one says what the other says."""
    if of.low is None or of.high is None or value.value is None:
        return value
    high = math.exp(min(of.high, _LARGEST))
    return Estimate(value=value.value, stderr=value.stderr, low=math.exp(of.low), high=high, method=of.method)


def _metric(name: str, unit: str, group: str, found: Estimate, num_items: int) -> Metric:
    return Metric(
        task=TASK,
        name=name,
        group=group,
        value=found.value,
        stderr=found.stderr,
        low=None if found.low is None else max(found.low, 0.0),  # few documents: the t interval knows no bound
        high=found.high,
        num_items=num_items,
        unit=unit,
        higher_is_better=False,
    )


def _windows(loaded: LoadedModel, context: int | None, stride: int | None, batch_size: int | None) -> "_Windows":
    context = loaded.context if context is None else context
    if not 1 <= context <= loaded.context:
        raise ConfigError(
            f"context={context}: must be between 1 and {loaded.context} tokens, the most that the model in "
            f"{loaded.path} takes; leave context out, or shorten it"
        )
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ConfigError(
            f"stride={stride}: must be between 1 and context={context} tokens; a longer one would leave tokens "
            f"unscored; leave it out for half of the context"
        )
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: must be at least 1 window; leave it out for what fits")
    return _Windows(loaded, context, stride, batch_size)


@dataclass
class _Windows:
    """Runs a stream through the model, a batch of windows at a time."""

    loaded: LoadedModel
    context: int
    stride: int
    batch_size: int | None
    num_inputs: int = 0
    """Input tokens that forward passes had so far, padding left out."""

    def __post_init__(self) -> None:
        self._keeps = "logits_to_keep" in inspect.signature(self.loaded.model.forward).parameters
        self._most = {keep: self.batch_size or self._fitting(keep) for keep in (self.context, self.stride)}

    def token_nats(self, documents: Documents, end: int, on_tokens: Callable[[int], None]) -> NDArray[np.float32]:
        """Negative log-likelihood of every token (N,), in nats."""
        tokens, done = documents.tokens, 0
        nats = np.full(len(tokens), np.nan, dtype=np.float32)
        while done < len(tokens):
            # What is scored is contiguous: all of the first window, then the last `stride` of each of the others.
            keep = self.context if done == 0 else self.stride
            scored = self._batch(tokens, done, keep, end)[: len(tokens) - done]
            nats[done : done + len(scored)] = scored
            done += len(scored)
            on_tokens(len(scored))
        return nats

    def _batch(self, tokens: NDArray[Any], done: int, keep: int, end: int) -> NDArray[np.float32]:
        """Nats of the tokens from `done` on, as many as a batch gives; what lies beyond the last is padding."""
        while True:
            num_windows = min(self._most[keep], -(-(len(tokens) - done) // self.stride))
            if keep > self.stride:
                num_windows = 1  # of its kind there is only the first
            begins = done + keep - self.context + self.stride * np.arange(num_windows)
            positions = begins[:, None] + np.arange(-1, self.context)  # (B, T+1), -1 is before the first token
            rows = tokens[positions.clip(0, len(tokens) - 1)].astype(np.int64)
            rows[positions < 0] = end
            try:
                nats = self._forward(torch.from_numpy(rows).to(self.loaded.device), keep).flatten().cpu().numpy()
            except torch.OutOfMemoryError as error:
                self._shrink(keep, num_windows, error)
            else:
                self.num_inputs += int(np.minimum(self.context, len(tokens) - begins).sum())
                return np.asarray(nats)

    @torch.inference_mode()
    def _forward(self, rows: torch.Tensor, keep: int) -> torch.Tensor:
        """Nats (B, keep) of the last `keep` tokens of rows (B, T+1), each predicted from those before it."""
        options = {"logits_to_keep": keep} if self._keeps else {}
        with torch.autocast(self.loaded.device.type, torch.bfloat16, enabled=self.loaded.bf16):
            # Padding comes last, where a causal model does not see it: no mask, and with it the fastest attention.
            logits = self.loaded.model(input_ids=rows[:, :-1], use_cache=False, **options).logits[:, -keep:]
        logits, targets = logits.flatten(0, 1), rows[:, -keep:].flatten()  # (B·keep, V), (B·keep,)
        size = max(1, _of(_CHUNK, self.loaded.device) // logits.shape[1])
        return torch.cat(
            [
                functional.cross_entropy(logits[i : i + size].float(), targets[i : i + size], reduction="none")
                for i in range(0, len(targets), size)
            ]
        )

    def _fitting(self, keep: int) -> int:
        """Windows whose logits and widest activations stay within a budget, at least one."""
        config = self.loaded.model.config.get_text_config()  # type: ignore[operator, union-attr]
        kept = keep if self._keeps else self.context
        widest = max(kept * config.vocab_size, self.context * 4 * getattr(config, "hidden_size", 0))  # numbers
        device = self.loaded.device
        fitting = min(_of(_BUDGET_BYTES, device) // (4 * widest), _of(_MOST_TOKENS, device) // self.context)
        return max(1, int(fitting))

    def _shrink(self, keep: int, num_windows: int, error: Exception) -> None:
        """Half as many windows from now on.

        Raises:
            ConfigError: the size was asked for, or is one already.
        """
        if self.batch_size is not None or num_windows == 1:
            name, value = ("context", self.context) if self.batch_size is None else ("batch_size", self.batch_size)
            raise ConfigError(
                f"{name}={value}: must fit into the memory of {self.loaded.device}; it ran out; "
                f"take less, or another device"
            ) from error
        self._most[keep] = num_windows // 2


def _of(table: dict[str, int], device: torch.device) -> int:
    """What holds for a kind of device: every one but the CPU has the memory of a GPU."""
    return table["cpu" if device.type == "cpu" else "cuda"]
