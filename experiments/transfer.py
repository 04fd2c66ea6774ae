"""`acodm transfer`: pre-train a target model under an exported policy or a baseline. No RL library is imported.

On several processes (``torchrun -m acodm_env.experiments.transfer …``, or ``accelerate launch -m``) process 0 decides,
writes and speaks; the others do to their part of the model what it says.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.agents.baselines import make_mixer
from acodm_env.corpus import TokenStore, open_corpus
from acodm_env.errors import ConfigError
from acodm_env.experiments.console import listing, note, progress, say
from acodm_env.experiments.cost import run_cost
from acodm_env.experiments.lock import claimed
from acodm_env.experiments.results import mixer_result
from acodm_env.experiments.run_folder import check_folder, differences, recorded_config
from acodm_env.experiments.runs import RunFolder, Saving, open_run, run_mixer
from acodm_env.experiments.signals import Preempted, heeding_sigterm, never
from acodm_env.files import write_json
from acodm_env.policy import Policy, PolicyMixer, scaled_interval
from acodm_env.trainer import Mixer, StepStats, Trainer

if TYPE_CHECKING:
    from acodm_env.pretrain.config import LMConfig
    from acodm_env.pretrain.trainer import LMTrainer


COMPARABLE = (
    *("corpus_fingerprint", "target", "steps", "batch_size", "sequence_length"),
    *("learning_rate", "schedule", "eval_sequences", "seed"),
)
"""Settings that a run and its reference must share."""
ASIDE = ("quiet", "out", "reference", "gate", "resume", "adapt", "keep", "checkpoint_every", "on_nonfinite")
"""Settings that may differ from one start of a run to the next: they leave its numbers alone."""


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Pre-train a target language model under an exported policy (--policy) or a baseline (--mixer)."""

    policy: str | None = None
    """Folder of an exported policy."""
    mixer: str | None = None
    """Name of a baseline, instead of a policy: uniform, proportional, static, odm-paper, odm-released, exp3,
    exp3-classical."""
    weights: str | None = None
    """Mixture for --mixer static: "name=0.5,other=0.5", or the JSON that `acodm mixture` prints."""
    corpus: str = "pocket"
    """Folder of a token store, or "pocket"."""
    domains: str | None = None
    """The domains of the corpus to train on, separated by commas; default: all."""
    target: str = "small"
    """Model: preset (tiny, small, pythia-14m … pythia-1b), a config.json, or a hub name."""
    steps: int = 300
    """Optimiser steps."""
    batch_size: int = 32
    """Sequences per step, of all processes and micro-batches together."""
    sequence_length: int = 128
    """Tokens per sequence."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    schedule: str = "cosine"
    """Learning-rate schedule after the warm-up: cosine or constant."""
    decision_every: int | None = None
    """Steps between decisions of a policy; default: as learned, scaled by the ratio of horizons."""
    evaluations: int = 60
    """Evaluations on the test split during the run."""
    eval_sequences: int = 8
    """Held-out sequences per domain and split."""
    reference: str | None = None
    """Folder of a finished run, against whose best perplexity the steps are counted."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """auto (bf16 where a CUDA device has it), fp32 or bf16."""
    accumulation: int = 1
    """Micro-batches per step: the same gradient in as many times less memory."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the model."""
    parallel: str = "auto"
    """How several processes share the model: ddp (a copy each), fsdp (a part each), auto (as launched)."""
    prefetch: int | None = None
    """Batches that a background thread builds ahead; mixtures take effect as many steps late. Default: the lag that the
    policy learned with, else 0."""
    on_nonfinite: str = "stop"
    """When a loss or gradient is not finite: stop the run, or skip the step's update and go on."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; default: a tenth of the run."""
    keep: int = 2
    """Checkpoints that stay."""
    resume: bool = True
    """Go on from the newest whole checkpoint in --out; --no-resume refuses a folder that holds a run."""
    adapt: bool = False
    """Go on from the checkpoint although mixer, weights, corpus or other settings are others; what a domain that stays
    has drawn is neither repeated nor skipped."""
    seed: int = 0
    """Seed of model initialisation and data order: the same for every mixer to be compared."""
    out: str = "runs/transfer"
    """Folder of the run; the same command again resumes it."""
    gate: bool = True
    """Judge the policy first, as `acodm gate` does, and refuse one that fails; --no-gate goes on all the same."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        if (self.policy is None) == (self.mixer is None):
            raise ConfigError("policy, mixer: give exactly one of them, --policy DIR or --mixer NAME")
        if self.weights is not None and self.mixer != "static":
            raise ConfigError(f"weights={self.weights}: only --mixer static takes weights")
        least_of = {"steps": 1, "evaluations": 1, "seed": 0, "decision_every": 1, "checkpoint_every": 1, "keep": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value}: must be at least {least}")


def run(config: TransferConfig) -> None:
    """Train, print the result and where it lies."""
    first = int(os.environ.get("RANK", "0")) == 0
    with heeding_sigterm() as asked:
        mixer = choose_mixer(config)  # before the corpus, which may have to be harvested
        reference = finished_run(config.reference) if config.reference else None
        store = open_store(config, quiet=config.quiet or not first)
        try:
            result = transfer(config, store, mixer, reference, gate=lambda: _gate(config, store, mixer), stop=asked)
        except Preempted as end:
            note(f"acodm: {end}")
            return
    if result is not None:
        _tell(config, result)


def open_store(config: TransferConfig, *, quiet: bool) -> TokenStore:
    """The corpus, or the domains of it that are asked for."""
    store = open_corpus(config.corpus, quiet)
    return store if config.domains is None else store.subset([name.strip() for name in config.domains.split(",")])


def _tell(config: TransferConfig, result: Mapping[str, Any]) -> None:
    untold = ("config", "domain_loss_nats", "gate", "cost")
    say(listing((name, value) for name, value in result.items() if name not in untold))
    losses = result["domain_loss_nats"].items()
    say(listing((f"  {name}", "diverged" if loss is None else f"{loss:.4f} nats") for name, loss in losses))
    say(f"run: {config.out} (result.json, stats.jsonl, eval.jsonl, model/)")


def _gate(config: TransferConfig, store: TokenStore, mixer: Mixer) -> dict[str, Any] | None:
    """The verdicts on the policy; None for a baseline, for a finished run, and where they are not wanted."""
    finished = (Path(config.out) / "result.json").exists()
    if not config.gate or finished or not isinstance(mixer, PolicyMixer):
        return None
    from acodm_env.experiments.gate import ask_before

    return ask_before(mixer.policy, store, config.quiet)


def choose_mixer(config: TransferConfig) -> Mixer:
    """The exported policy or the baseline that the configuration names."""
    if config.policy is not None:
        return PolicyMixer(Policy.load(config.policy))
    assert config.mixer is not None
    options = {"weights": config.weights} if config.mixer == "static" else {}
    return make_mixer(config.mixer, **options)


def finished_run(path: str) -> RunFolder:
    """A run that others are measured against.

    Raises:
        ConfigError: there is none in `path`, or it has not finished.
    """
    folder = open_run(path)
    if folder.result is None or not folder.lines("eval.jsonl"):
        raise ConfigError(f"reference={path}: must be a finished target run; run its command again to finish it")
    return folder


def transfer(
    config: TransferConfig,
    store: TokenStore,
    mixer: Mixer,
    reference: RunFolder | None = None,
    gate: Callable[[], Mapping[str, Any] | None] = lambda: None,
    stop: Callable[[], bool] = never,
) -> dict[str, Any] | None:
    """Run (or resume, or just report) one target run and return its `result.json`; None on other processes than 0.

    Args:
        config: the run.
        store: its corpus.
        mixer: who drives it.
        reference: the run that its steps are counted against.
        gate: gives the verdicts on the policy, for the record; called if the run is not finished.
        stop: asked after every step: whether to save and end now.

    Raises:
        ConfigError, PolicyError, DataError: something does not fit; `out` is untouched then.
        Preempted: `stop` said so.
    """
    from acodm_env.pretrain.leader import leading

    trainer = target_trainer(config, store, mixer)
    with leading(trainer) as led:
        if led is None:
            return None
        mixer.start(led.info)  # refuses what does not fit before the folder is claimed
        identity = _identity(config, store, mixer)
        if reference is not None:
            _check_comparable(identity, reference)
        _check_out(config, identity)
        verdicts = gate()
        with claimed(config.out):
            folder = RunFolder(config.out, identity, adapt=config.adapt)
            before = _finished(config, folder)
            if before is None:
                _train(config, led, mixer, store, folder, stop)
            return _result(folder, led, mixer, reference, verdicts, before)


def _check_out(config: TransferConfig, identity: Mapping[str, Any]) -> None:
    """Refuse a folder that is not this run's, before anything is written."""
    if check_folder(config.out, identity, adapt=config.adapt) and not config.resume:
        raise ConfigError(f"out={config.out}: must be new with --no-resume; it holds a run; choose another folder")


def _finished(config: TransferConfig, folder: RunFolder) -> dict[str, Any] | None:
    """The result of a run that has nothing left to do."""
    result = folder.result
    if result is None or differences(recorded_config(folder.path), folder.config):
        return None
    if result["diverged"] and config.on_nonfinite == "skip":
        note("the run had diverged: it goes on from its last checkpoint, without steps that are not finite")
        (folder.path / "result.json").unlink()
        return None
    return result


def _result(
    folder: RunFolder,
    trainer: Trainer,
    mixer: Mixer,
    reference: RunFolder | None,
    gate: Mapping[str, Any] | None,
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write and return `result.json`; what a finished run had measured of itself stays."""
    fields = mixer_result(folder, reference)
    if before is None:
        cost = run_cost(folder, trainer)
    else:
        gate, cost = before.get("gate"), before.get("cost")
        if reference is None:
            fields["steps_to_reference_ratio"] = before["steps_to_reference_ratio"]
    about = {
        "gate": gate,
        "cost": cost,
        "corpus_fingerprint": folder.config["corpus_fingerprint"],
        "config": folder.config,
    }
    result = {"mixer": mixer.name, **fields, **about}
    write_json(folder.path / "result.json", result)
    return result


def _identity(config: TransferConfig, store: TokenStore, mixer: Mixer) -> dict[str, Any]:
    """What makes a run this run: its settings, with the *contents* of policy and weights instead of their paths."""
    identity = {name: value for name, value in asdict(config).items() if name not in ASIDE}
    if isinstance(mixer, PolicyMixer):
        identity["policy"] = mixer.policy.fingerprint
    if config.weights is not None:
        identity["weights"] = mixer.weights().tolist()
    identity["prefetch"] = _prefetch(config, mixer)
    described = {"domains": list(store.domains), "corpus_fingerprint": store.fingerprint, "name": mixer.name}
    return identity | described


def _check_comparable(identity: dict[str, Any], reference: RunFolder) -> None:
    """Steps to a reference compare only under the same corpus, model, tokens, schedule and seed."""
    for name in COMPARABLE:
        if identity[name] != reference.config.get(name):
            raise ConfigError(
                f"reference={reference.path}: must have {name}={identity[name]!r} as this run has; "
                f"it has {reference.config.get(name)!r}"
            )


def _train(
    config: TransferConfig,
    trainer: Trainer,
    mixer: Mixer,
    store: TokenStore,
    folder: RunFolder,
    stop: Callable[[], bool],
) -> None:
    device, world = trainer.inner.device, trainer.inner.ranks.world  # type: ignore[attr-defined]
    where = f"{device}" if world == 1 else f"{world} processes ({device.type})"
    if not config.quiet:
        say(f"{mixer.name} drives {config.target} for {config.steps} steps on {where}")
    saving = Saving(
        every=config.checkpoint_every,
        keep=config.keep,
        final=True,
        adapt=config.adapt,
        stop=stop,
    )
    diverged = False
    with progress(config.steps, mixer.name, quiet=config.quiet) as bar:

        def on_step(stats: StepStats) -> None:
            nonlocal diverged
            diverged = stats.diverged
            bar.update(stats.step - bar.n)
            bar.set_postfix_str(f"loss {stats.loss:.3f}", refresh=False)

        run_mixer(
            folder,
            trainer,
            mixer,
            seed=config.seed,
            evaluations=config.evaluations,
            on_step=on_step,
            saving=saving,
        )
    if diverged:
        note("to go on without such steps: the same command with --on-nonfinite skip; or a new run, with a lower rate")
        return
    from acodm_env.experiments.model_folder import save_model

    save_model(folder.path / "model", trainer, store)


def target_trainer(config: TransferConfig, store: TokenStore, mixer: Mixer) -> "LMTrainer":
    """The target on Accelerate; it builds as many batches ahead as the policy learned with, if nothing else is said."""
    from acodm_env.pretrain.trainer import LMTrainer, target_accelerator

    return LMTrainer(lm_config(config, mixer), store, target_accelerator(config.device))


def _prefetch(config: TransferConfig, mixer: Mixer) -> int:
    if config.prefetch is not None:
        return config.prefetch
    return mixer.policy.lag if isinstance(mixer, PolicyMixer) else 0


def lm_config(config: TransferConfig, mixer: Mixer) -> "LMConfig":
    """The target's settings; a policy brings its own interval between decisions."""
    from acodm_env.pretrain.config import LMConfig

    interval = config.decision_every or 1
    if isinstance(mixer, PolicyMixer) and config.decision_every is None:
        interval = scaled_interval(mixer.policy, config.steps)
    return LMConfig(
        model=config.target,
        horizon=config.steps,
        decision_every=interval,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        learning_rate=config.learning_rate,
        schedule=config.schedule,
        eval_sequences=config.eval_sequences,
        device=config.device,
        precision=config.precision,
        accumulation=config.accumulation,
        prefetch=_prefetch(config, mixer),
        gradient_checkpointing=config.gradient_checkpointing,
        compile=config.compile,
        parallel=config.parallel,
        on_nonfinite=config.on_nonfinite,
    )


if __name__ == "__main__":
    from acodm_env.experiments.cli import main

    main(command="transfer")
