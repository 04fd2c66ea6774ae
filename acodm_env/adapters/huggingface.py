"""`MixtureTrainer`: `transformers.Trainer` on batches composed by a mixer.

The Trainer's own way to its batches, `accelerator.prepare(DataLoader)`, holds one batch back, so that a mixture would
take effect a step late. `get_train_dataloader` therefore returns a plain iterable, which nobody wraps. Everything else
is the Trainer's: loss, scaling under accumulation, optimiser, checkpoints. Only public hooks are used.

Resume: the Trainer replaces its callbacks by new ones, made from what they exported, after it has built the loader. So
no reference to a callback is kept: at the beginning of training the callback in charge is handed the loader, and gives
it the state. (A reference kept from before would leave the data at its beginning, without any error.)
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from acodm_env.adapters.loop import MixedData
from acodm_env.adapters.pytorch import model_inputs
from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Mixer


class MixtureBatches:
    """The Trainer's micro-batches: every optimiser step's are parts of one batch, drawn when the first is asked for."""

    def __init__(self, data: MixedData, num_micro_batches: int):
        """Take the batches and into how many parts each is cut."""
        self.data, self.num_micro_batches = data, num_micro_batches
        self.row_losses: list[torch.Tensor] = []  # of the batch drawn last, in order

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Micro-batches without end, from where the data stands."""
        while True:
            batch = self.data.draw()
            self.row_losses.clear()
            for rows in np.array_split(np.arange(len(batch.tokens)), self.num_micro_batches):
                yield model_inputs(batch.rows(rows))

    def report(self) -> StepStats:
        """What the optimiser step showed; the mixer has learned from it."""
        return self.data.report(torch.cat(self.row_losses))


class MixtureCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Reports every step to the mixer, and carries position and mixer through the Trainer's checkpoints."""

    def __init__(self) -> None:
        """Nothing to set: `MixtureTrainer` adds it by itself."""
        self.saved: dict[str, Any] | None = None  # filled in by the Trainer when it resumes
        self._batches: MixtureBatches | None = None

    def state(self) -> dict[str, Any]:
        """What is written to trainer_state.json."""
        data = None if self._batches is None else _to_json(self._batches.data.state_dict())
        return {"args": {}, "attributes": {"saved": data}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the loader; where the run is resumed, put it where the checkpoint was.

        Raises:
            ConfigError: the checkpoint holds no such state.
            DataError: it is of another corpus or mixer.
        """
        batches = kwargs["train_dataloader"]
        if state.global_step and self.saved is None:
            raise ConfigError(
                f"resume_from_checkpoint: must be of a run with a mixture; the one of step {state.global_step} has no "
                f"MixtureCallback in its trainer_state.json; start anew, or resume with the Trainer that wrote it"
            )
        if self.saved is not None:
            batches.data.load_state_dict(_from_json(self.saved))
        self.saved, self._batches = None, batches

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the mixer learn; the Trainer asks for the next batch after this, so the mixture takes effect at once."""
        assert self._batches is not None
        self._batches.report()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the loader."""
        if self._batches is not None:
            self._batches.data.loader.close()
            self._batches = None


class MixtureTrainer(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` on batches composed by a mixer; your own one: `class Mine(MixtureTrainer, MyTrainer)`."""

    def __init__(
        self,
        *args: Any,
        store: TokenStore,
        mixer: Mixer,
        sequence_length: int,
        decision_every: int = 1,
        prefetch: int = 0,
        **kwargs: Any,
    ):
        """Make the Trainer; its batch is per_device_train_batch_size × gradient_accumulation_steps × processes.

        Args:
            args: the Trainer's own.
            store: the domains to train on, in the place of a train_dataset.
            mixer: what proposes the mixtures.
            sequence_length: tokens per sequence.
            decision_every: optimiser steps between two decisions of a policy.
            prefetch: batches built ahead; a mixture takes effect so many steps late.
            kwargs: the Trainer's own; `args.max_steps` is the horizon, `args.data_seed` (or `seed`) the data's seed.

        Raises:
            ConfigError: no max_steps, several GPUs in one process, a train_dataset; or the mixer needs what cannot be
                measured here.
        """
        super().__init__(*args, **kwargs)
        self._check()
        # Without these a checkpoint would be resumed at the beginning of the data, or fail for want of a DataLoader.
        self.args.ignore_data_skip = True
        self.args.restore_callback_states_from_checkpoint = True
        self._mixing: dict[str, Any] = {
            "store": store,
            "mixer": mixer,
            "sequence_length": sequence_length,
            "decision_every": decision_every,
            "prefetch": prefetch,
        }
        self._batches = self._new_batches()
        self.add_callback(MixtureCallback())

    def _check(self) -> None:
        if self.args.max_steps < 1:
            raise ConfigError(f"max_steps={self.args.max_steps}: must be positive; a mixture has no epoch to end with")
        if self.args.n_gpu > 1:
            raise ConfigError(f"n_gpu={self.args.n_gpu}: must be 1 a process; start it by `torchrun`")
        if self.train_dataset is not None:
            raise ConfigError("train_dataset: must be left out; the store and the mixer take its place")

    def _new_batches(self) -> MixtureBatches:
        args = self.args
        world, accumulation = args.world_size, args.gradient_accumulation_steps
        data = MixedData(
            batch_size=args.per_device_train_batch_size * accumulation * world,
            horizon=args.max_steps,
            seed=args.seed if args.data_seed is None else args.data_seed,
            rank=args.process_index,
            world=world,
            add_up=self._add_up,
            **self._mixing,
        )
        return MixtureBatches(data, accumulation)

    def _add_up(self, values: Array) -> Array:
        """Sum over the processes (n,)."""
        if self.args.world_size == 1:
            return values
        tensor = torch.from_numpy(np.asarray(values, dtype=np.float64)).to(self.accelerator.device)
        total: Array = self.accelerator.reduce(tensor, "sum").cpu().numpy()
        return total

    @property
    def mixed_data(self) -> MixedData:
        """Mixer and position of the run."""
        return self._batches.data

    def get_train_dataloader(self) -> Any:
        """A fresh iterable of micro-batches; no DataLoader, so that Accelerate leaves it alone."""
        self._batches.data.loader.close()
        self._batches = self._new_batches()
        return self._batches

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The Trainer's loss; the rows' mean losses are noted beside it, which changes nothing.

        Raises:
            ConfigError: the model gives no logits.
        """
        tokens = inputs["input_ids"]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
            if logits is None:
                raise ConfigError(
                    "model: must return logits, from which the losses by domain are taken; a fused loss (such as "
                    "use_liger_kernel) keeps none"
                )
            self._batches.row_losses.append(row_losses(logits, tokens))
        return (loss, outputs) if return_outputs else loss


@torch.no_grad()
def row_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean losses of the rows (B,) in nats, from logits (B, T, V) and tokens (B, T)."""
    rows = zip(logits, tokens, strict=True)  # one at a time: all logits in float32 may be gigabytes
    return torch.stack([functional.cross_entropy(row[:-1].float(), own[1:]) for row, own in rows])


def _to_json(value: Any) -> Any:
    """Arrays as lists; Python's shortest decimal representation of a float is exact."""
    if isinstance(value, np.ndarray):
        return {"__array__": value.tolist(), "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, Mapping):
        return {str(key): _to_json(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(child) for child in value]
    return value.item() if isinstance(value, np.generic) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if "__array__" in value:
            return np.array(value["__array__"], dtype=value["dtype"]).reshape(value["shape"])
        return {key: _from_json(child) for key, child in value.items()}
    return [_from_json(child) for child in value] if isinstance(value, list) else cast(Any, value)
