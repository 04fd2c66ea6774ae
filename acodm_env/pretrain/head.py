"""Output layer and token losses of a causal language model in one, a few tokens at a time.

Logits, their logarithms and the gradient of either are `V` numbers a token, each written to memory and read again. Here
a chunk of tokens goes from hidden states to losses while it is in a core's cache, and only the probabilities are kept
for the backward pass. `torch.nn.functional.linear_cross_entropy` keeps nothing, so its losses by token cost a second
product with the output layer: on a CPU, and with vocabularies of some thousands, more than it saves.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_CHUNK = 128  # tokens; 1 MiB of logits of the pocket corpus' vocabulary


class FusedHead:
    """A model whose logits are its output layer's product with its last hidden state, and nothing else."""

    def __init__(self, backbone: nn.Module, layer: nn.Linear):
        """Take what `of` has shown to belong together."""
        self.backbone, self.layer = backbone, layer

    @classmethod
    def of(cls, model: nn.Module) -> "FusedHead | None":
        """The head of a transformers model, or None where its losses need its own logits.

        None is: another output layer than a plain float32 `nn.Linear` without bias, or a model that does something to
        its hidden states before that layer or to the logits after it (soft caps, scales), shown by a forward pass.
        """
        causal: Any = model
        layer, backbone = causal.get_output_embeddings(), causal.base_model
        plain = (
            type(layer) is nn.Linear and layer.weight.dtype == torch.float32 and getattr(layer, "bias", None) is None
        )
        if not plain or backbone is model or not _is_all(model, backbone, layer):
            return None
        return cls(backbone, layer)

    def token_losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """Losses (B, T-1) in nats of token ids (B, T)."""
        hidden = self.backbone(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state  # (B, T-1, D)
        return token_losses(hidden.flatten(0, 1), self.layer.weight, tokens[:, 1:].flatten()).view(len(tokens), -1)


def token_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropies (N,) in nats of hidden states (N, D) under an output layer (V, D) for token ids (N,), float32."""
    if torch.is_grad_enabled():
        apply: Any = _TokenLosses.apply
        losses: torch.Tensor = apply(hidden, weight, targets)
        return losses
    chunks = zip(torch.split(hidden, _CHUNK), torch.split(targets, _CHUNK), strict=True)
    return torch.cat([functional.cross_entropy(x @ weight.T, t, reduction="none") for x, t in chunks])


class _TokenLosses(torch.autograd.Function):
    """With p the softmax of a token's logits: loss log Σ exp(logits) − logits[t], its gradient p − onehot(t)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        probabilities = hidden.new_empty(len(hidden), len(weight))  # (N, V)
        losses = hidden.new_empty(len(hidden))  # (N,)
        parts = [torch.split(tensor, _CHUNK) for tensor in (hidden, targets, probabilities, losses)]
        for x, t, p, loss in zip(*parts, strict=True):
            logits = x @ weight.T  # (chunk, V)
            torch.softmax(logits, 1, out=p)
            below_most = logits.amax(1) - logits.gather(1, t[:, None]).squeeze(1)  # (chunk,)
            torch.sub(below_most, p.amax(1).log(), out=loss)  # the largest p is 1/V or more: never log 0
        ctx.save_for_backward(hidden, weight, targets, probabilities)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, probabilities = ctx.saved_tensors
        for_hidden, for_weight, _ = ctx.needs_input_grad
        scaled = grad[:, None] * hidden  # (N, D)
        grad_hidden = torch.empty_like(hidden)  # (N, D)
        transposed = weight.new_zeros(weight.shape[::-1])  # (D, V): a faster product than (V, D)
        parts = [torch.split(tensor, _CHUNK) for tensor in (scaled, probabilities, grad_hidden)]
        for x, p, out in zip(*parts, strict=True):
            if for_hidden:
                torch.mm(p, weight, out=out)
            if for_weight:
                transposed.addmm_(x.T, p)
        grad_hidden.sub_(weight[targets]).mul_(grad[:, None])
        grad_weight = transposed.T.index_add_(0, targets, scaled, alpha=-1)  # (V, D)
        return grad_hidden if for_hidden else None, grad_weight if for_weight else None, None


@torch.no_grad()
def _is_all(model: nn.Module, backbone: nn.Module, layer: nn.Linear) -> bool:
    """Whether the logits are what the layer returned, untouched, for the backbone's last hidden state."""
    passes: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = layer.register_forward_hook(lambda _, inputs, output: passes.append((inputs[0], output)))
    tokens = torch.zeros(1, 2, dtype=torch.long, device=layer.weight.device)  # (1, 2)
    training = model.training
    model.eval()
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
        hidden = getattr(backbone(input_ids=tokens, use_cache=False), "last_hidden_state", None)
    finally:
        hook.remove()
        model.train(training)
    if len(passes) != 1 or hidden is None:
        return False
    given, returned = passes[0]
    return returned is logits and logits._version == 0 and torch.equal(given, hidden)
