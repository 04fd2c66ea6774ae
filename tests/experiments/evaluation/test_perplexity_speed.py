"""Perplexity costs what its forward passes cost: at least 0.9 times the input tokens per second of a bare loop.

Seconds are the processor's, on the one thread that tests have. What else the machine does is not counted, but takes
caches and memory bandwidth away, from the losses more than from the model: run it on a machine that is idle.
"""

import statistics
import time

import numpy as np
import pytest
import torch
from evaluated import Given, loaded

from acodm_env.experiments.evaluation.perplexity import score_perplexity
from acodm_env.pretrain.models import build_model

ROUNDS = 5
CASES = [("small", 2048, 128, 16, 32), ("pythia-70m", 50304, 256, 4, 3)]
"""Preset, vocabulary, context, windows of a batch, batches."""


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "vocab_size", "context", "batch", "batches"), CASES)
@pytest.mark.parametrize("share", [1, 2])
def test_tokens_per_second_of_a_bare_loop(tiny_store, capsys, preset, vocab_size, context, batch, batches, share):
    stride = context // share
    length = context + stride * (batch * batches - (share == 1))  # of whole batches, after a first window
    rng = np.random.default_rng(0)
    stream = rng.integers(1, tiny_store.vocab_size, length)
    stream[::200] = tiny_store.end_of_document
    store = Given(tiny_store, {"web": stream.tolist()})
    model = loaded(build_model(preset, vocab_size, context, 0).eval().requires_grad_(False), store, context)

    begins = stride * np.arange(-(-(length - context) // stride) + 1)
    inputs = np.concatenate([[tiny_store.end_of_document], stream])
    rows = torch.from_numpy(inputs[begins[:, None] + np.arange(context)])  # (windows, T)
    batches_ = list(rows.split(batch)) if share == 1 else [rows[:1], *rows[1:].split(batch)]

    def bare() -> float:
        began = time.process_time()
        with torch.inference_mode():
            for tokens in batches_:
                model.model(input_ids=tokens, use_cache=False).logits  # noqa: B018
        return rows.numel() / (time.process_time() - began)

    def ours() -> float:
        began = time.process_time()
        scores = score_perplexity(model, store, stride=stride, batch_size=batch)
        assert scores.facts["num_tokens"] == length
        return rows.numel() / (time.process_time() - began)

    bare(), ours()
    speeds: dict[str, list[float]] = {"bare": [], "ours": []}
    for number in range(ROUNDS):  # neighbours, in either order
        for loop in (bare, ours) if number % 2 else (ours, bare):
            speeds[loop.__name__].append(loop())
    ratios = [mine / other for mine, other in zip(speeds["ours"], speeds["bare"], strict=True)]
    found, span = statistics.median(ratios), f"{min(ratios):.3f} to {max(ratios):.3f}"
    with capsys.disabled():
        print(f"\n{preset}, stride {stride} of {context}: {found:.3f} of a bare loop ({span})")  # noqa: T201
    assert found >= 0.9
