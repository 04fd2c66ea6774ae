"""`LMTrainer`: one optimiser step of a causal language model on a batch composed by a mixture.

The same class serves as the environment's proxy (plain torch, many resets in one process) and as the target
(`accelerate.Accelerator`, on any number of processes). A step is a number of micro-batches; what is measured by
domain is summed over them and over the processes, each of which has its own rows of one global batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from acodm_env.corpus.affinity import Affinity
from acodm_env.corpus.loader import Loader
from acodm_env.corpus.sampler import Batch, MixtureSampler
from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError
from acodm_env.objective import check_metric
from acodm_env.pretrain.checkpoint import hand_out, load_model, load_optimizer, to_numpy, to_torch
from acodm_env.pretrain.config import LMConfig, resolve_device
from acodm_env.pretrain.distributed import Ranks
from acodm_env.pretrain.gradients import DomainGradients, GradientProbe, order_rows
from acodm_env.pretrain.head import FusedHead
from acodm_env.pretrain.heldout import HeldOut, parse_objective
from acodm_env.pretrain.models import build_model, flops_per_token, model_config, observed_layers, probed_layers
from acodm_env.pretrain.parallel import Wrapping, compiled, is_divided, target_accelerator, whole, wrap
from acodm_env.pretrain.step_record import Measured, StepRecord, halves, skipped
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import RunInfo

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["LMTrainer", "target_accelerator"]

OBSERVED_DEPTHS = (0.0, 0.5, 1.0)
PROVIDES = frozenset({"losses", "gram", "layers", "validation", "loss_weights"})
EXCHANGED_BYTES = 1 << 20
"""Most bytes of per-domain gradients that processes exchange in a step, unless `sketch_size` says otherwise."""


class LMTrainer:
    """A `Trainer` around a transformers causal language model."""

    def __init__(
        self,
        config: LMConfig,
        store: TokenStore,
        accelerator: "Accelerator | None" = None,
        *,
        objective: Mapping[str, float] | None = None,
        metric: str = "loss",
        heldout_store: TokenStore | None = None,
        reference: Mapping[str, Any] | None = None,
    ):
        """Check that the corpus fits; nothing is built before `reset`.

        Args:
            config: model, data shape, optimisation, device.
            store: the domains to train on.
            accelerator: of a target run; None is plain torch.
            objective: weight of each held-out target; None weighs all domains equally.
            metric: what the objective averages, "loss" or "perplexity".
            heldout_store: where the targets are looked up, if not among the training domains.
            reference: state (`bare_model`'s, as numpy arrays) of a model of the same shape that scores every
                token, so that excess losses can be measured.

        Raises:
            ConfigError: an unknown preset, device or target; an objective without a positive weight; a batch that
                cannot be divided among processes and micro-batches.
            DataError: a domain has fewer tokens than one sequence.
        """
        self.config = config
        self.store = store
        names, weights = parse_objective(objective, heldout_store or store)
        self._reference_state = reference
        self._reference: torch.nn.Module | None = None
        self.provides = PROVIDES | {"excess"} if reference is not None else PROVIDES
        self.accelerator = accelerator
        self.ranks = Ranks.of(accelerator)
        self.local_batch = config.local_batch(self.ranks.world)
        self.measure: frozenset[str] = frozenset({"losses"})
        self.device = accelerator.device if accelerator else resolve_device(config.device)
        model_config(config.model)  # refuse an unknown model before anything is built
        if is_divided(config, accelerator) and config.precondition:
            raise ConfigError("precondition=True: needs whole gradients; FSDP has none; use parallel=ddp")
        bf16_here = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and bf16_here)
        self._cross_entropy = compiled(_cross_entropy, config, self.device)
        store.num_sequences("train", config.sequence_length)
        self._held_out = HeldOut((heldout_store or store).subset(names), config, self.ranks)
        self._loader: Loader | None = None
        self.info = RunInfo(
            domains=store.domains,
            targets=names,
            objective=weights,
            metric=check_metric(metric),
            affinity=Affinity(store, (heldout_store or store).subset(names), config.sequence_length),
            eval_tokens=self._held_out.num_tokens,
            heldout_sequences=self._held_out.available,
            sizes_tokens=store.sizes_tokens("train"),
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            horizon=config.horizon,
            decision_every=config.decision_every,
            initial_loss_nats=math.log(store.vocab_size),
            num_layers=len(OBSERVED_DEPTHS),
            lag=config.prefetch,
            corpus_fingerprint=store.fingerprint,
            gradients=f"depths={config.probe_depths} precondition={config.precondition}",
        )
        self.steps_done = 0

    def reset(self, rng: np.random.Generator) -> None:
        """Fresh model, optimiser and data order, from two seeds drawn from `rng`; the same on all processes."""
        model_seed, data_seed = (int(seed) for seed in rng.integers(2**62, size=2))
        config = self.config
        model = build_model(config.model, self.store.vocab_size, config.sequence_length, model_seed)
        flops = flops_per_token(model, config.sequence_length)
        if self._reference_state is not None:
            self._reference = self._frozen_copy(model_seed)
        self.wrapping: Wrapping = wrap(model, config, self.accelerator, self.device)
        self.model, self.bare_model = self.wrapping.model, self.wrapping.bare
        self._heads = self._fused_heads()
        self.optimizer = self.wrapping.optimizer
        self.close()
        self.sampler = MixtureSampler(self.store, "train", config.batch_size, config.sequence_length, seed=data_seed)
        self._loader = Loader(self.sampler, rank=self.ranks.rank, world=self.ranks.world, prefetch=config.prefetch)
        self._probe: GradientProbe | None = None
        self._observed = observed_layers(self.bare_model, OBSERVED_DEPTHS)
        self._snapshot = [layer.detach().clone() for layer in self._observed]
        self.info = replace(
            self.info,
            seed=data_seed,
            initial_layer_norms=tuple(_rms(self._snapshot).tolist()),
            flops_per_token=flops,
        )
        self.steps_done = 0

    def close(self) -> None:
        """End the background thread, if there is one."""
        if self._loader is not None:
            self._loader.close()

    def _frozen_copy(self, seed: int) -> torch.nn.Module:
        """The reference model, for inference only; a whole one on every process."""
        config = self.config
        model = build_model(config.model, self.store.vocab_size, config.sequence_length, seed)
        model.load_state_dict(to_torch(self._reference_state))
        return model.to(self.device).eval().requires_grad_(False)

    def _fused_heads(self) -> dict[torch.nn.Module, FusedHead]:
        """Of the models that need no logits: called as they are, by one process, in float32 on a CPU."""
        config = self.config
        shared = self.ranks.world > 1 or is_divided(config, self.accelerator)
        if self.device.type != "cpu" or shared or self.bf16 or config.compile:
            return {}
        models = [model for model in (self.bare_model, self._reference) if model is not None]
        return {model: head for model in models if (head := FusedHead.of(model)) is not None}

    def step(self, weights: Array, loss_weights: Array | None = None) -> StepStats:
        """One optimiser step.

        Args:
            weights: mixture (K,).
            loss_weights: factors (K,) on the domains' token losses, or None.

        Raises:
            ConfigError: the weights are no mixture.
        """
        assert self._loader is not None, "call reset() first"
        factors = None if loss_weights is None else np.asarray(loss_weights, dtype=np.float64)
        record = StepRecord(self.info.num_domains)
        with record.timed("data"):
            batch = self._loader.draw(weights)
        groups: NDArray[np.int64] | None = None
        if "gram" in self.measure:
            order, groups = order_rows(batch.domains, batch.nth)
            batch = batch.rows(order)
        self.optimizer.zero_grad(set_to_none=True)
        for index in range(self.config.accumulation):
            part = slice(index, None, self.config.accumulation)  # rows stay sorted by group
            last = index == self.config.accumulation - 1
            self._micro_batch(record, batch.rows(part), None if groups is None else groups[part], factors, last)
        with record.timed("probe"):
            gradients = None if groups is None else self._collect(batch, factors)
        with record.timed("train"):
            grad_norm = self.wrapping.clip(self.config.clip_norm)
            measured = record.reduce(grad_norm, batch.counts, self.ranks)
            applied = math.isfinite(measured.loss) and math.isfinite(measured.grad_norm)
            if applied:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.config.lr_at(self.steps_done)
                self.optimizer.step()
        stats = replace(self._stats(batch, measured, record, applied), gradients=gradients, loss_weights=factors)
        if applied:
            return stats
        return skipped(stats) if self.config.on_nonfinite == "skip" else replace(stats, diverged=True)

    def _micro_batch(
        self,
        record: StepRecord,
        batch: Batch,
        groups: NDArray[np.int64] | None,
        factors: Array | None,
        last: bool,
    ) -> None:
        """Forward and backward pass of a part of this process's rows.

        The gradient is that of the mean token loss of the process's rows; averaged over processes, of the batch.
        """
        with record.timed("train"), self.wrapping.micro_batch(last=last):
            if groups is not None:
                self._attached_probe().begin(groups)
            token_losses = self._token_losses(self.model, batch.tokens)  # (B, T-1)
            row_losses = token_losses.sum(1)  # (B,)
            objective = row_losses.sum() / self._local_tokens
            record.add(batch.domains, objective.detach(), row_losses.detach().double() / token_losses.shape[1])
            if factors is not None:
                by_row = torch.from_numpy(factors[batch.domains]).to(row_losses)  # (B,)
                objective = (by_row * row_losses).sum() / self._local_tokens
            objective.backward()  # type: ignore[no-untyped-call]
        if "excess" in self.measure:
            with record.timed("probe"):
                record.add_excess(self._excess(token_losses.detach(), batch))

    @property
    def _local_tokens(self) -> int:
        """Predicted tokens of one process in a step."""
        return self.local_batch * self.config.accumulation * (self.config.sequence_length - 1)

    def _token_losses(self, model: torch.nn.Module, rows: NDArray[np.int64]) -> torch.Tensor:
        """Losses (B, T-1) in nats, float32, of token ids (B, T), on the device."""
        tokens = torch.from_numpy(rows).to(self.device)  # (B, T)
        if (head := self._heads.get(model)) is not None:
            return head.token_losses(tokens)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # (B, T-1, V)
        of_tokens = self._cross_entropy if torch.is_grad_enabled() else _cross_entropy
        losses: torch.Tensor = of_tokens(logits, tokens)
        return losses

    @torch.no_grad()
    def _excess(self, token_losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(B,) mean over tokens of max(loss − the reference's, 0): clipped per token, as DoReMi wants it."""
        assert self._reference is not None
        return (token_losses - self._token_losses(self._reference, batch.tokens)).clamp(min=0).mean(1)

    def _stats(self, batch: Batch, measured: Measured, record: StepRecord, applied: bool) -> StepStats:
        """Count the step and report it."""
        assert self._loader is not None
        age = self.steps_done - batch.decision if batch.decision >= 0 else self.config.prefetch
        lr = self.config.lr_at(self.steps_done)
        self.steps_done += 1
        norms, changes = self._layers() if applied else (None, None)
        counts = batch.counts.astype(np.float64)
        return StepStats(
            step=self.steps_done,
            tokens=self.steps_done * self.config.batch_size * self.config.sequence_length,
            requested=batch.weights,
            counts=counts,
            realised=counts / counts.sum(),
            loss_tokens=counts * (self.config.sequence_length - 1),
            losses=measured.losses,
            excess_losses=measured.excess,
            epochs=batch.drawn / self.sampler.sizes,
            drawn=batch.drawn.astype(np.float64),
            decision=batch.decision,
            mixture_age=float(age),
            pending=self._loader.pending if self.config.prefetch else None,
            layer_norms=norms,
            layer_changes=changes,
            loss=measured.loss,
            grad_norm=measured.grad_norm,
            lr=lr,
            seconds=record.seconds,
        )

    def _attached_probe(self) -> GradientProbe:
        if self._probe is None:
            layers = probed_layers(self.bare_model, self.config.probe_depths)
            self._probe = GradientProbe(layers, self.info.num_domains, sketch_size=self._sketch_size(len(layers)))
            self._probe.attach()
        return self._probe

    def _sketch_size(self, num_layers: int) -> int | None:
        """As configured; otherwise whole gradients where nothing speaks against it, or as large as may be sent."""
        config = self.config
        alone = self.ranks.world == 1 and not config.compile  # slices of varying length would be compiled ever anew
        if config.sketch_size is not None or config.precondition or alone:
            return config.sketch_size
        numbers = EXCHANGED_BYTES // (2 * self.info.num_domains * num_layers * 4)
        return max(1, min(64, math.isqrt(numbers)))

    def _collect(self, batch: Batch, factors: Array | None) -> DomainGradients:
        """The domains' gradient sums over micro-batches and processes."""
        assert self._probe is not None
        gradients = self._probe.collect(
            halves(batch) * (self.config.sequence_length - 1),
            normaliser=self._local_tokens,
            precondition=self.optimizer if self.config.precondition else None,
        )
        self.ranks.sum_(gradients.sums)
        return gradients if factors is None else gradients.unweighted(factors)

    @torch.no_grad()
    def _layers(self) -> tuple[Array | None, Array | None]:
        """RMS of the observed layers and their relative change since the last decision, at decisions only."""
        if "layers" not in self.measure or self.steps_done % self.config.decision_every:
            return None, None
        norms = _rms(self._observed)
        changes = _rms([now - old for now, old in zip(self._observed, self._snapshot, strict=True)])
        self._snapshot = [layer.detach().clone() for layer in self._observed]
        with np.errstate(invalid="ignore"):  # weights that overflowed
            return norms, changes / np.maximum(norms, 1e-12)

    def evaluate(self, split: str, sequences: int | None = None) -> Array:
        """Mean token losses in nats (M,) on the fixed held-out sequences of `split`.

        With `sequences`, on so many in all (`objective.probe_counts`): NaN for a target of which none is left.
        """
        counts = None if sequences is None else self.info.probe_counts(sequences)
        self.bare_model.eval()
        losses = self._held_out.losses(split, lambda rows: self._token_losses(self.bare_model, rows), counts)
        self.bare_model.train()
        return losses

    def state_dict(self) -> dict[str, Any]:
        """Model, optimiser, loader and the last decision's layers, as numpy arrays and JSON values.

        All processes take part; the arrays are on process 0 alone, whole, so that they fit any number of processes.
        """
        assert self._loader is not None
        keep = self.ranks.rank == 0
        return {
            "step": self.steps_done,
            "seed": self.info.seed,
            "initial_layer_norms": list(self.info.initial_layer_norms),
            "model": self.model_state(),
            "optimizer": to_numpy(self.optimizer.state_dict(), keep=keep),
            "sampler": self._loader.state_dict(),
            "snapshot": to_numpy(dict(enumerate(self._snapshot)), keep=keep),
        }

    def model_state(self) -> dict[str, Any]:
        """The model alone, as in `state_dict`; all processes take part."""
        arrays: dict[str, Any] = to_numpy(self.bare_model.state_dict(), keep=self.ranks.rank == 0)
        return arrays

    def load_state_dict(self, state: Mapping[str, Any], adapt: bool = False) -> None:
        """Go on exactly from `state_dict`'s value; call after a `reset` with any generator.

        Args:
            state: of any number of processes; all of them take part, and process 0's value counts.
            adapt: let the domains differ, see `Loader.load_state_dict`.

        Raises:
            DataError: the state belongs to another corpus or model.
        """
        assert self._loader is not None
        small = ("step", "seed", "initial_layer_norms", "sampler")
        head = self.ranks.broadcast_value({name: state[name] for name in small} if self.ranks.rank == 0 else None)
        self._loader.load_state_dict(head["sampler"], adapt)
        load_model(self.bare_model, state.get("model", {}), self.ranks)
        load_optimizer(self.optimizer, state.get("optimizer", {}), self.ranks)
        arrays = list(state["snapshot"].values()) if self.ranks.rank == 0 else [None] * len(self._observed)
        self._snapshot = [
            hand_out(array, layer, self.ranks) for array, layer in zip(arrays, self._observed, strict=True)
        ]
        self.steps_done = int(head["step"])
        self.info = replace(self.info, seed=int(head["seed"]), initial_layer_norms=tuple(head["initial_layer_norms"]))


def _cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Losses (B, T-1) in nats, float32, of logits (B, T-1, V) of any precision for token ids (B, T)."""
    losses = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1)


@torch.no_grad()
def _rms(tensors: Sequence[torch.Tensor]) -> Array:
    """Root mean square of each tensor, one transfer for all."""
    squares = [whole(tensor.detach().float().square().mean()) for tensor in tensors]
    values: Array = torch.stack(squares).sqrt().double().cpu().numpy()
    return values
