"""`acodm transfer`: pre-train a target model under an exported policy or a baseline. No RL library is imported.

On several processes (``torchrun -m acodm_env transfer …``, or ``accelerate launch -m``) process 0 decides,
writes and speaks; the others do to their part of the model what it says.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.agents.baselines import make_mixer
from acodm_env.corpus import TokenStore
from acodm_env.corpus.problem import Problem
from acodm_env.errors import ConfigError
from acodm_env.experiments.console import note, progress, say
from acodm_env.experiments.run.accounting import learning_cost, measuring_frac, one_cost, run_cost, running_cost
from acodm_env.experiments.run.command import command_line
from acodm_env.experiments.run.folder import RunFolder, open_run
from acodm_env.experiments.run.loop import Saving, run_mixer
from acodm_env.experiments.run.override import WeightOverride
from acodm_env.experiments.run.preemption import Preempted, catch_sigterm, never
from acodm_env.experiments.run.results import mixer_result
from acodm_env.experiments.run.tracking import tracked
from acodm_env.experiments.target.certified import Certified, obtain
from acodm_env.experiments.target.config import TransferConfig
from acodm_env.experiments.target.judging import JUDGED, judge, say_held_out, tell
from acodm_env.experiments.target.run import (
    check_out,
    finished,
    identity_of,
    lacks_model,
    open_store,
    problem_of,
    target_trainer,
)
from acodm_env.files import write_json
from acodm_env.lock import claimed
from acodm_env.policy.load import open_policy
from acodm_env.policy.mixer import PolicyMixer, scaled_interval
from acodm_env.step_stats import StepStats
from acodm_env.trainer import Mixer, Trainer

if TYPE_CHECKING:
    from acodm_env.pretrain.leader import Led

COMPARABLE = (
    *("corpus_fingerprint", "target", "steps", "batch_size", "sequence_length"),
    *("learning_rate", "schedule", "eval_sequences", "seed", "targets", "objective", "metric"),
)
"""Settings that a run and its reference must share."""
CERTIFYING = ("certificate", "certify", "proxy", "proxy_steps", "proxy_seeds")
"""Settings of the certificate, of which its verdict alone makes the run."""


def run(config: TransferConfig) -> None:
    """Train, print the result and where it lies."""
    with catch_sigterm() as asked:
        mixer = choose_mixer(config)  # before the corpus, which may have to be harvested
        reference = finished_run(config.reference) if config.reference else None
        store = open_store(config)
        problem = problem_of(config, store)
        gate = cache(lambda: _gate(config, problem, mixer))
        try:
            certified = obtain(config, problem, mixer.policy, gate, asked) if isinstance(mixer, PolicyMixer) else None
            driver = certified.mixer() if certified else mixer
            result = transfer(config, store, driver, reference, gate=gate, stop=asked, certified=certified)
        except Preempted as end:
            note(f"acodm: {end}")
            return
    if result is not None:
        tell(config.out, result)


def _gate(config: TransferConfig, problem: Problem, mixer: Mixer) -> dict[str, Any] | None:
    """The verdicts on the policy; None for a baseline, for a finished run, and where they are not wanted."""
    over = (Path(config.out) / "result.json").exists()
    if not config.gate or over or not isinstance(mixer, PolicyMixer):
        return None
    from acodm_env.experiments.policy.gate import ask_before

    return ask_before(mixer.policy, problem, config.quiet)


def choose_mixer(config: TransferConfig) -> Mixer:
    """The exported policy or the baseline that the configuration names."""
    if config.policy is not None:
        return PolicyMixer(open_policy(config.policy), say=note)
    assert config.mixer is not None
    options = {"weights": config.weights} if config.mixer == "static" else {}
    mixer = make_mixer(config.mixer, **options)
    if isinstance(mixer, PolicyMixer):
        mixer.say = note
    return mixer


def finished_run(path: str) -> RunFolder:
    """A run that others are measured against.

    Raises:
        ConfigError: there is none in `path`, or it has not finished.
    """
    folder = open_run(path)
    if folder.result is None or not folder.evaluations:
        raise ConfigError(f"reference={path}: must be a finished target run; run its command again to finish it")
    return folder


def transfer(
    config: TransferConfig,
    store: TokenStore,
    mixer: Mixer,
    reference: RunFolder | None = None,
    gate: Callable[[], Mapping[str, Any] | None] = lambda: None,
    stop: Callable[[], bool] = never,
    certified: Certified | None = None,
) -> dict[str, Any] | None:
    """Run (or resume, or just report) one target run and return its `result.json`; None on other processes than 0.

    Args:
        config: the run.
        store: its corpus, of which `config` chooses domains and targets.
        mixer: who drives it.
        reference: the run that its steps are counted against.
        gate: gives the verdicts on the policy, for the record; called if the run is not finished.
        stop: asked before and after every step: whether to save and end now.
        certified: by whose verdict `mixer` drives.

    Raises:
        ConfigError, PolicyError, DataError: something does not fit; `out` is untouched then.
        Preempted: `stop` said so.
    """
    from acodm_env.pretrain.leader import leading

    problem, pace = problem_of(config, store), {"decision_every": _interval(config, mixer)}
    trainer = target_trainer(config, problem, prefetch=_prefetch(config, mixer), **pace)
    with leading(trainer) as led:
        if led is None:
            return None
        if stop():
            raise Preempted("before it began")
        mixer.start(led.info)  # refuses what does not fit before the folder is claimed
        identity = _identity(config, problem, mixer, certified)
        if reference is not None:
            _check_comparable(identity, reference)
        check_out(config, identity, adapt=config.adapt)
        verdicts = gate()
        if stop():
            raise Preempted("before it began")
        with claimed(config.out):
            folder = RunFolder(config.out, identity, adapt=config.adapt, command=command_line("transfer", config))
            before = finished(config, folder)
            if before is None or lacks_model(folder, before):
                _train(config, led, mixer, problem, folder, stop)
            about = {"gate": verdicts, "certificate": certified.record() if certified else None}
            return _result(config, problem, folder, led, mixer, reference, about, before)


def _result(
    config: TransferConfig,
    problem: Problem,
    folder: RunFolder,
    trainer: Trainer,
    mixer: Mixer,
    reference: RunFolder | None,
    about: dict[str, Any],
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write and return `result.json`; what a finished run had measured of itself stays."""
    fields = mixer_result(folder, reference)
    if before is None:
        fields |= judge(config, problem, trainer, fields)
        about |= {"accounting": run_cost(folder, trainer), "cost": _cost(folder, trainer, mixer, problem, about)}
    else:
        fields |= {name: before[name] for name in JUDGED if name in before}
        about = {name: before.get(name) for name in (*about, "accounting", "cost")}
        if reference is None:
            fields["steps_to_reference_ratio"] = before["steps_to_reference_ratio"]
    driven = isinstance(mixer, PolicyMixer)
    about |= {
        "in_force": (mixer.rule if isinstance(mixer, PolicyMixer) else "") or mixer.name,
        "policy": dict(mixer.policy.provenance) if driven else None,  # type: ignore[attr-defined]
        "corpus_fingerprint": folder.config["corpus_fingerprint"],
        "config": folder.config,
    }
    result = {"mixer": mixer.name, **fields, **about}
    write_json(folder.path / "result.json", result)
    return result


def _cost(
    folder: RunFolder, trainer: Trainer, mixer: Mixer, problem: Problem, about: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """What the run cost, by what it was for, as a benchmark's runs have it; a certificate is its preparation."""
    certificate = about["certificate"]
    return {
        **running_cost(folder, trainer.info, excess="excess" in mixer.needs),
        "preparation": one_cost(**certificate["cost"]) if certificate else one_cost(),
        "learning": learning_cost(mixer, problem.store),
    }


def _identity(config: TransferConfig, problem: Problem, mixer: Mixer, certified: Certified | None) -> dict[str, Any]:
    """What makes a run this run: its settings, with the *contents* of policy and weights instead of their paths."""
    identity = {name: value for name, value in identity_of(config, problem).items() if name not in CERTIFYING}
    if isinstance(mixer, PolicyMixer):
        identity["policy"] = mixer.policy.fingerprint
    if config.weights is not None:
        identity["weights"] = mixer.weights().tolist()
    identity["prefetch"] = _prefetch(config, mixer)
    return identity | {"name": mixer.name} | (certified.identity() if certified else {})


def _check_comparable(identity: dict[str, Any], reference: RunFolder) -> None:
    """Steps to a reference compare only under the same corpus, model, tokens, schedule and seed."""
    for name in COMPARABLE:
        if identity.get(name) != reference.config.get(name):
            raise ConfigError(
                f"reference={reference.path}: must have {name}={identity.get(name)!r} as this run has; "
                f"it has {reference.config.get(name)!r}"
            )


def _train(
    config: TransferConfig,
    trainer: "Led",
    mixer: Mixer,
    problem: Problem,
    folder: RunFolder,
    stop: Callable[[], bool],
) -> None:
    device, world = trainer.inner.device, trainer.inner.ranks.world
    where = f"{device}" if world == 1 else f"{world} processes ({device.type})"
    if not config.quiet:
        say(f"{mixer.name} drives {config.target} for {config.steps} steps on {where}: {problem.describe()}")
        if "validation" in mixer.needs:
            say(f"measuring: {measuring_frac(mixer, trainer.info):.1%} of the run")
    say_held_out(config, problem)
    saving = Saving(
        every=config.checkpoint_every,
        keep=config.keep,
        final=True,
        adapt=config.adapt,
        stop=stop,
    )
    diverged = False
    with tracked(folder, config.track), progress(config.steps, mixer.name, quiet=config.quiet) as bar:

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
            override=WeightOverride(folder.path, trainer.info.domains),
        )
    if diverged:
        note("to go on without such steps: the same command with --on-nonfinite skip; or a new run, with a lower rate")
        return
    from acodm_env.experiments.run.model_folder import save_model

    save_model(folder.path / "model", trainer, problem.store)


def _prefetch(config: TransferConfig, mixer: Mixer) -> int:
    if config.prefetch is not None:
        return config.prefetch
    return mixer.policy.lag if isinstance(mixer, PolicyMixer) else 0


def _interval(config: TransferConfig, mixer: Mixer) -> int:
    """Steps between decisions; a policy brings its own."""
    if isinstance(mixer, PolicyMixer) and config.decision_every is None:
        return scaled_interval(mixer.policy, config.steps)
    return config.decision_every or 1


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm transfer, or python -m acodm_env transfer")
