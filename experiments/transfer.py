"""`acodm transfer`: pre-train a target model under an exported policy or a baseline. No RL library is imported."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.agents.baselines import make_mixer
from acodm_env.corpus import TokenStore, open_corpus
from acodm_env.errors import ConfigError
from acodm_env.experiments.console import listing, progress, say
from acodm_env.experiments.results import mixer_result
from acodm_env.experiments.runs import RunFolder, open_run, run_mixer
from acodm_env.files import write_json
from acodm_env.policy import Policy, PolicyMixer, scaled_interval
from acodm_env.trainer import Lagged, Mixer, StepStats, Trainer

if TYPE_CHECKING:
    from acodm_env.pretrain.config import LMConfig


COMPARABLE = (
    *("corpus_fingerprint", "target", "steps", "batch_size", "sequence_length"),
    *("learning_rate", "schedule", "eval_sequences", "seed"),
)
"""Settings that a run and its reference must share."""


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
    target: str = "small"
    """Model: preset (tiny, small, pythia-14m … pythia-1b), a config.json, or a hub name."""
    steps: int = 300
    """Optimiser steps."""
    batch_size: int = 32
    """Sequences per step."""
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
        for name, least in (("steps", 1), ("evaluations", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.decision_every is not None and self.decision_every < 1:
            raise ConfigError(f"decision_every={self.decision_every}: must be at least 1")


def run(config: TransferConfig) -> None:
    """Train, print the result and where it lies."""
    mixer = choose_mixer(config)  # before the corpus, which may have to be harvested
    reference = finished_run(config.reference) if config.reference else None
    store = open_corpus(config.corpus, config.quiet)
    result = transfer(config, store, mixer, reference, _gate(config, store, mixer))
    untold = ("config", "domain_loss_nats", "gate")
    say(listing((name, value) for name, value in result.items() if name not in untold))
    losses = result["domain_loss_nats"].items()
    say(listing((f"  {name}", "diverged" if loss is None else f"{loss:.4f} nats") for name, loss in losses))
    say(f"run: {config.out} (result.json, stats.jsonl, eval.jsonl)")


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
    gate: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run (or resume, or just report) one target run and return its `result.json`.

    Args:
        config: the run.
        store: its corpus.
        mixer: who drives it.
        reference: the run that its steps are counted against.
        gate: the verdicts on the policy, for the record.

    Raises:
        ConfigError, PolicyError, DataError: something does not fit; `out` is untouched then.
    """
    trainer = target_trainer(config, store, mixer)
    mixer.start(trainer.info)  # refuses what does not fit before the folder is claimed
    identity = _identity(config, store, mixer)
    if reference is not None:
        _check_comparable(identity, reference)
    folder = RunFolder(config.out, identity)
    before = folder.result
    if before is None:
        _train(config, trainer, mixer, folder)
    fields = mixer_result(folder, reference)
    if before is not None:
        gate = before.get("gate")
        if reference is None:
            fields["steps_to_reference_ratio"] = before["steps_to_reference_ratio"]
    about = {"gate": gate, "corpus_fingerprint": store.fingerprint, "config": folder.config}
    result = {"mixer": mixer.name, **fields, **about}
    write_json(folder.path / "result.json", result)
    return result


def _identity(config: TransferConfig, store: TokenStore, mixer: Mixer) -> dict[str, Any]:
    """What makes a run this run: its settings, with the *contents* of policy and weights instead of their paths."""
    aside = ("quiet", "out", "reference", "gate")
    identity = {name: value for name, value in asdict(config).items() if name not in aside}
    if isinstance(mixer, PolicyMixer):
        identity["policy"] = mixer.policy.fingerprint
    if config.weights is not None:
        identity["weights"] = mixer.weights().tolist()
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


def _train(config: TransferConfig, trainer: Trainer, mixer: Mixer, folder: RunFolder) -> None:
    device = trainer.inner.device if isinstance(trainer, Lagged) else trainer.device  # type: ignore[attr-defined]
    if not config.quiet:
        say(f"{mixer.name} drives {config.target} for {config.steps} steps on {device}")
    with progress(config.steps, mixer.name, quiet=config.quiet) as bar:

        def on_step(stats: StepStats) -> None:
            bar.update(stats.step - bar.n)
            bar.set_postfix_str(f"loss {stats.loss:.3f}", refresh=False)

        run_mixer(folder, trainer, mixer, seed=config.seed, evaluations=config.evaluations, on_step=on_step)


def target_trainer(config: TransferConfig, store: TokenStore, mixer: Mixer) -> Trainer:
    """The target on Accelerate; behind the lag that the policy learned with, if any."""
    from acodm_env.pretrain.trainer import LMTrainer, target_accelerator

    trainer = LMTrainer(lm_config(config, mixer), store, target_accelerator(config.device))
    lag = mixer.policy.lag if isinstance(mixer, PolicyMixer) else 0
    return Lagged(trainer, lag) if lag else trainer


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
    )


if __name__ == "__main__":
    from acodm_env.experiments.cli import main

    main(command="transfer")
