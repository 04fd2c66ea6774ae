"""The slow reference for per-domain gradients: as many backward passes as there are groups."""

import numpy as np
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from acodm_env.pretrain.gradients import order_rows
from acodm_env.pretrain.models import build_model

VOCAB, LENGTH = 31, 9


def make_model(kind):
    if kind == "gpt-neox":
        return build_model("tiny", VOCAB, LENGTH, seed=1)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=VOCAB, n_positions=LENGTH, bos_token_id=0)
    config.eos_token_id, config.embd_pdrop, config.resid_pdrop, config.attn_pdrop = 0, 0.0, 0.0, 0.0
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return GPT2LMHeadModel(config)


def draw_batch(num_domains, batch_size=24, seed=0, interleaved=True):
    """Tokens (B, T) and domains (B,); the last of three or more domains is absent."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(VOCAB, size=(batch_size, LENGTH)))
    domains = rng.integers(max(num_domains - (num_domains > 2), 1), size=batch_size)
    return tokens, domains if interleaved else np.sort(domains)


def token_losses(model, tokens):
    """(B, T-1)."""
    logits = model(input_ids=tokens[:, :-1]).logits.float()
    return functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def nth_of(domains, previous):
    """How many sequences of its domain came before each row, counted one by one."""
    seen, nth = np.array(previous, dtype=np.int64), []
    for domain in domains:
        nth.append(seen[domain])
        seen[domain] += 1
    return np.array(nth)


def halves_of(domains, previous):
    """Half of each row."""
    return nth_of(domains, previous) % 2


def separate_passes(model, layers, tokens, domains, halves, num_domains):
    """The slow reference: a backward pass per group; (K, 2, P) sums of token-loss gradients."""
    weights = [module.weight for _, module in layers]
    sums = torch.zeros(num_domains, 2, sum(weight.numel() for weight in weights))
    for domain in range(num_domains):
        for half in range(2):
            rows = torch.from_numpy((domains == domain) & (halves == half))
            if rows.any():
                gradients = torch.autograd.grad(token_losses(model, tokens[rows]).sum(), weights)
                sums[domain, half] = torch.cat([gradient.flatten() for gradient in gradients])
    return sums


def probed_step(model, probe, batches, previous, precondition=None):
    """Forward and backward over micro-batches of (tokens, domains), as a trainer does it; the collected sums."""
    total_tokens = sum(tokens.shape[0] * (tokens.shape[1] - 1) for tokens, _ in batches)
    rows = 0
    for tokens, domains in batches:
        order, groups = order_rows(domains, nth_of(domains, previous))
        probe.begin(groups)
        (token_losses(model, tokens[torch.from_numpy(order)]).sum() / total_tokens).backward()
        sizes = np.bincount(groups, minlength=2 * len(previous)).reshape(-1, 2)
        previous = previous + sizes.sum(1)
        rows = rows + sizes
    return probe.collect(rows * (LENGTH - 1.0), normaliser=total_tokens, precondition=precondition)


def assert_near(actual, expected, relative):
    """Largest difference over the largest entry."""
    assert float((actual - expected).abs().max()) <= relative * float(expected.abs().max())
