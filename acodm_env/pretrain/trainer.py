"""`LMTrainer`: one optimiser step of a causal language model on a batch composed by a mixture.

The same class serves as the environment's proxy (plain torch, many resets in one process) and as the target
(`accelerate.Accelerator`, which prepares model and optimiser only: its loader would fetch batches ahead of the
mixture, its scheduler would advance once per process).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from acodm_env.corpus.sampler import Batch, MixtureSampler, heldout
from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError, unknown
from acodm_env.pretrain.checkpoint import int_keys, to_numpy, to_torch
from acodm_env.pretrain.config import LMConfig, resolve_device
from acodm_env.pretrain.gradients import DomainGradients, GradientProbe, order_rows
from acodm_env.pretrain.models import build_model, flops_per_token, model_config, observed_layers, probed_layers
from acodm_env.trainer import Array, RunInfo, StepStats

if TYPE_CHECKING:
    from accelerate import Accelerator

OBSERVED_DEPTHS = (0.0, 0.5, 1.0)
PROVIDES = frozenset({"losses", "gram", "layers", "validation", "loss_weights"})


class LMTrainer:
    """A `Trainer` around a transformers causal language model."""

    def __init__(
        self,
        config: LMConfig,
        store: TokenStore,
        accelerator: "Accelerator | None" = None,
        *,
        objective: Mapping[str, float] | None = None,
        heldout_store: TokenStore | None = None,
        reference: Mapping[str, Any] | None = None,
    ):
        """Check that the corpus fits; nothing is built before `reset`.

        Args:
            config: model, data shape, optimisation, device.
            store: the domains to train on.
            accelerator: of a target run; None is plain torch.
            objective: weight of each held-out target; None weighs all domains equally.
            heldout_store: where the targets are looked up, if not among the training domains.
            reference: state (`bare_model`'s, as numpy arrays) of a model of the same shape that scores every
                token, so that excess losses can be measured.

        Raises:
            ConfigError: an unknown preset, device or target; an objective without a positive weight.
            DataError: a domain has fewer tokens than one sequence.
        """
        self.config = config
        self.store = store
        names, weights = _objective(objective, heldout_store or store)
        self._targets = (heldout_store or store).subset(names)
        self._reference_state = reference
        self._reference: torch.nn.Module | None = None
        self.provides = PROVIDES | {"excess"} if reference is not None else PROVIDES
        self.accelerator = accelerator
        self.measure: frozenset[str] = frozenset({"losses"})
        self.device = accelerator.device if accelerator else resolve_device(config.device)
        model_config(config.model)  # refuse an unknown model before anything is built
        bf16_here = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and bf16_here)
        store.num_sequences("train", config.sequence_length)
        held_out = [self._targets.num_sequences(split, config.sequence_length) for split in ("validation", "test")]
        self.info = RunInfo(
            domains=store.domains,
            targets=names,
            objective=weights,
            eval_tokens=sum(min(size, config.eval_sequences) for size in held_out[0]) * config.sequence_length,
            sizes_tokens=store.sizes_tokens("train"),
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            horizon=config.horizon,
            decision_every=config.decision_every,
            initial_loss_nats=math.log(store.vocab_size),
            num_layers=len(OBSERVED_DEPTHS),
            corpus_fingerprint=store.fingerprint,
            gradients=f"depths={config.probe_depths} sketch={config.sketch_size} precondition={config.precondition}",
        )
        self._heldout: dict[str, Batch] = {}
        self.steps_done = 0

    def reset(self, rng: np.random.Generator) -> None:
        """Fresh model, optimiser and data order, from two seeds drawn from `rng`."""
        model_seed, data_seed = (int(seed) for seed in rng.integers(2**62, size=2))
        config = self.config
        model = build_model(config.model, self.store.vocab_size, config.sequence_length, model_seed)
        model.to(self.device).train()
        self.bare_model = model
        if self._reference_state is not None:
            self._reference = self._frozen_copy(model_seed)
        optimizer = torch.optim.AdamW(
            _decay_groups(model, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        if self.accelerator is not None:
            self.accelerator.free_memory()
            model, optimizer = self.accelerator.prepare(model, optimizer)
        self.model, self.optimizer = model, optimizer
        self.sampler = MixtureSampler(self.store, "train", config.batch_size, config.sequence_length, seed=data_seed)
        self._probe: GradientProbe | None = None
        self._observed = observed_layers(self.bare_model, OBSERVED_DEPTHS)
        self._snapshot = [layer.detach().clone() for layer in self._observed]
        self.info = replace(
            self.info,
            seed=data_seed,
            initial_layer_norms=tuple(_rms(layer) for layer in self._snapshot),
            flops_per_token=flops_per_token(self.bare_model, config.sequence_length),
        )
        self.steps_done = 0

    def _frozen_copy(self, seed: int) -> torch.nn.Module:
        """The reference model, for inference only."""
        config = self.config
        model = build_model(config.model, self.store.vocab_size, config.sequence_length, seed)
        model.load_state_dict(to_torch(self._reference_state))
        return model.to(self.device).eval().requires_grad_(False)

    def step(self, weights: Array, loss_weights: Array | None = None) -> StepStats:
        """One optimiser step.

        Args:
            weights: mixture (K,).
            loss_weights: factors (K,) on the domains' token losses, or None.

        Raises:
            ConfigError: the weights are no mixture.
        """
        drawn_before = self.sampler.drawn.copy()
        batch = self.sampler.draw(weights)
        groups: np.ndarray | None = None
        if "gram" in self.measure:
            order, groups = order_rows(batch.domains, drawn_before)
            batch = Batch(tokens=batch.tokens[order], domains=batch.domains[order], counts=batch.counts)
            self._attached_probe().begin(groups)
        token_losses = self._token_losses(self.model, batch)  # (B, T-1)
        row_losses = token_losses.sum(1)  # (B,)
        loss = self._backward(row_losses, batch, loss_weights)
        gradients = self._collect(groups, loss_weights)
        stats = self._finish(weights, batch, row_losses.detach(), loss, gradients)
        return replace(
            stats,
            loss_weights=None if loss_weights is None else np.asarray(loss_weights, dtype=np.float64),
            excess_losses=self._excess(token_losses.detach(), batch) if "excess" in self.measure else None,
        )

    def _token_losses(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Losses (B, T-1) in nats, float32, on the device."""
        tokens = torch.from_numpy(batch.tokens).to(self.device)  # (B, T)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # (B, T-1, V)
        losses = functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )  # (B·(T-1),)
        return losses.view(len(tokens), -1)

    @torch.no_grad()
    def _excess(self, token_losses: torch.Tensor, batch: Batch) -> Array:
        """(K,) mean over tokens of max(loss − the reference's, 0): clipped per token, as DoReMi wants it."""
        assert self._reference is not None
        rows = (token_losses - self._token_losses(self._reference, batch)).clamp(min=0).mean(1)  # (B,)
        return _domain_means(rows.double().cpu().numpy(), batch.domains, self.info.num_domains)

    def _backward(self, row_losses: torch.Tensor, batch: Batch, loss_weights: Array | None) -> torch.Tensor:
        """Backward pass of the mean token loss, weighted by domain if asked; returns the unweighted mean."""
        num_tokens = batch.tokens.shape[0] * (batch.tokens.shape[1] - 1)
        objective = row_losses.sum() / num_tokens
        loss: torch.Tensor = objective.detach()
        if loss_weights is not None:
            factors = torch.from_numpy(np.asarray(loss_weights)[batch.domains]).to(row_losses)  # (B,)
            objective = (factors * row_losses).sum() / num_tokens
        self.optimizer.zero_grad(set_to_none=True)
        if self.accelerator is not None:
            self.accelerator.backward(objective)
        else:
            objective.backward()
        return loss

    def _finish(
        self,
        weights: Array,
        batch: Batch,
        row_losses: torch.Tensor,
        loss: torch.Tensor,
        gradients: DomainGradients | None,
    ) -> StepStats:
        """Clip, update unless the step diverged, and report."""
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm))
        diverged = not (math.isfinite(float(loss)) and math.isfinite(grad_norm))
        lr = self.config.lr_at(self.steps_done)
        if not diverged:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.steps_done += 1
        norms, changes = (None, None) if diverged else self._layers()
        num_domains, num_predicted = len(batch.counts), batch.tokens.shape[1] - 1
        row_means = row_losses.double().cpu().numpy() / num_predicted  # (B,)
        return StepStats(
            step=self.steps_done,
            tokens=self.steps_done * batch.tokens.size,
            requested=np.asarray(weights, dtype=np.float64),
            counts=batch.counts.astype(np.float64),
            realised=batch.counts / batch.counts.sum(),
            loss_tokens=batch.counts.astype(np.float64) * num_predicted,
            losses=_domain_means(row_means, batch.domains, num_domains),
            epochs=self.sampler.epochs,
            drawn=self.sampler.drawn.astype(np.float64),
            gradients=gradients,
            layer_norms=norms,
            layer_changes=changes,
            loss=float(loss),
            grad_norm=grad_norm,
            lr=lr,
            diverged=diverged,
        )

    def _attached_probe(self) -> GradientProbe:
        if self._probe is None:
            self._probe = GradientProbe(
                probed_layers(self.bare_model, self.config.probe_depths),
                self.info.num_domains,
                sketch_size=self.config.sketch_size,
            )
            self._probe.attach()
        return self._probe

    def _collect(self, groups: np.ndarray | None, loss_weights: Array | None) -> DomainGradients | None:
        if groups is None or self._probe is None:
            return None
        optimizer = self.optimizer if self.config.precondition else None
        num_predicted = self.config.sequence_length - 1
        gradients = self._probe.collect(
            groups * num_predicted, normaliser=groups.sum() * num_predicted, precondition=optimizer
        )
        return gradients if loss_weights is None else gradients.unweighted(loss_weights)

    def _layers(self) -> tuple[Array | None, Array | None]:
        """RMS of the observed layers and their relative change since the last decision, at decisions only."""
        if "layers" not in self.measure or self.steps_done % self.config.decision_every:
            return None, None
        norms = np.array([_rms(layer) for layer in self._observed])
        changes = np.array([_rms(now - old) for now, old in zip(self._observed, self._snapshot, strict=True)])
        self._snapshot = [layer.detach().clone() for layer in self._observed]
        return norms, changes / np.maximum(norms, 1e-12)

    @torch.no_grad()
    def evaluate(self, split: str) -> Array:
        """Mean token losses in nats (M,) on the fixed held-out sequences of `split`."""
        if split not in self._heldout:
            length, per_domain = self.config.sequence_length, self.config.eval_sequences
            tokens, domains = heldout(self._targets, split, length, per_domain, seed=0)
            self._heldout[split] = Batch(tokens=tokens, domains=domains, counts=np.bincount(domains))
        batch = self._heldout[split]
        self.model.eval()
        size = max(self.config.batch_size, 32)
        parts = [
            self._token_losses(
                self.model, Batch(batch.tokens[i : i + size], batch.domains[i : i + size], batch.counts)
            ).mean(1)
            for i in range(0, len(batch.tokens), size)
        ]
        self.model.train()
        return _domain_means(torch.cat(parts).double().cpu().numpy(), batch.domains, len(batch.counts))

    def state_dict(self) -> dict[str, Any]:
        """Model, optimiser, sampler and the last decision's layers, as numpy arrays and JSON values."""
        return {
            "step": self.steps_done,
            "seed": self.info.seed,
            "initial_layer_norms": list(self.info.initial_layer_norms),
            "model": to_numpy(self.bare_model.state_dict()),
            "optimizer": to_numpy(self.optimizer.state_dict()),
            "sampler": self.sampler.state_dict(),
            "snapshot": to_numpy(dict(enumerate(self._snapshot))),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly from `state_dict`'s value; call after a `reset` with any generator."""
        self.steps_done = int(state["step"])
        self.bare_model.load_state_dict(to_torch(state["model"]))
        self.optimizer.load_state_dict(int_keys(to_torch(state["optimizer"])))
        self.sampler.load_state_dict(state["sampler"])
        self._snapshot = [torch.from_numpy(array).to(self.device) for array in state["snapshot"].values()]
        self.info = replace(self.info, seed=int(state["seed"]), initial_layer_norms=tuple(state["initial_layer_norms"]))


def _objective(objective: Mapping[str, float] | None, store: TokenStore) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Names and normalised weights of the held-out targets; no weights where all count the same."""
    if not objective:
        return store.domains, ()
    for name, weight in objective.items():
        if name not in store.domains:
            unknown("objective.<target>", name, store.domains)
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"objective.{name}={weight}: must be a finite weight of at least 0")
    total = sum(objective.values())
    if total <= 0:
        raise ConfigError(f"objective={dict(objective)}: must have a positive weight; all are 0")
    return tuple(objective), tuple(weight / total for weight in objective.values())


def _domain_means(rows: Array, domains: NDArray[np.int64], num_domains: int) -> Array:
    """Mean (K,) of `rows` (B,) by domain; NaN where there is none. All rows hold equally many tokens."""
    counts = np.bincount(domains, minlength=num_domains)
    sums = np.bincount(domains, rows, minlength=num_domains)
    means: Array = np.divide(sums, counts, out=np.full(num_domains, np.nan), where=counts > 0)
    return means


def _decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.detach().float().square().mean().sqrt())


def target_accelerator(device: str) -> "Accelerator":
    """The process's Accelerator for a target run on `device`; autocast is ours, so it adds no precision of its own."""
    from accelerate import Accelerator

    if resolve_device(device).index is not None:
        raise ConfigError(f"device={device}: a target run takes the first visible device; set CUDA_VISIBLE_DEVICES")
    return Accelerator(cpu=resolve_device(device).type == "cpu", mixed_precision="no")
