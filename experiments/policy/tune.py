"""`acodm tune`: search an algorithm's hyper-parameters on a surrogate, in any number of processes and machines."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.console import listing, progress, say
from acodm_env.experiments.policy.config import surrogate_kwargs
from acodm_env.experiments.policy.train import make_env, make_many

POLL_SECONDS = 0.5
SURROGATE = "acodm/Surrogate-v0"


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Search an algorithm's hyper-parameters on a surrogate; the same command again goes on, elsewhere it helps."""

    algo: str = "td3"
    """Algorithm whose hyper-parameters are searched: any of `acodm train`, also ars and ppo_lstm."""
    surrogate: str = "regmix-1m"
    """A surface's name or file, or the environment's settings as JSON: {"surface": "regmix-1m", "noise": 0}."""
    trials: int = 20
    """Finished trials, over all processes and machines, at which the search ends."""
    decisions: int | None = None
    """Decisions of learning per seed and trial; default: n_timesteps of the hyper-parameters."""
    seeds: int = 3
    """Seeds per trial; its value is their median of the final held-out objective, in nats."""
    study: str = "runs/tune.journal"
    """File of the study; processes and machines that share it share the search."""
    jobs: int = 1
    """Processes on this machine, one trial each at a time."""
    conf_file: str | None = None
    """YAML file of hyper-parameters in RL-Zoo's format to start from; default: the shipped ones."""
    out: str | None = None
    """YAML file for the best settings, for `acodm train --conf-file` and for RL-Zoo; default: printed only."""
    seed: int = 0
    """Seed of the search; trials learn with seed, seed + 1, …"""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("seeds", 1), ("jobs", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.decisions is not None and self.decisions < 1:
            raise ConfigError(f"decisions={self.decisions}: must be at least 1")

    def base(self) -> dict[str, Any]:
        """The settings that the search starts from."""
        from acodm_env.agents.hyperparameters import settings_for

        settings = settings_for(self.algo, SURROGATE, file=self.conf_file)
        settings["env_kwargs"] = surrogate_kwargs(self.surrogate, self.algo, self.conf_file)
        return settings if self.decisions is None else settings | {"n_timesteps": self.decisions}


def run(config: TuneConfig) -> None:
    """Search, then print the best settings as RL-Zoo's YAML."""
    from acodm_env.agents.hyperparameters import write_settings, zoo_text

    best = tune(config)
    settings = best.pop("settings")
    say(listing(best.items()))
    say(zoo_text(SURROGATE, settings))
    if config.out:
        write_settings(config.out, SURROGATE, settings)
        say(f"settings: {config.out}; next: acodm train --algo {config.algo} --surrogate … --conf-file {config.out}")


def tune(config: TuneConfig) -> dict[str, Any]:
    """Search until the study holds enough trials; its best one, with the settings in full."""
    make_env(SURROGATE, config.base()["env_kwargs"])()  # refuse bad settings before anything is written
    study = _open(config)
    before = _finished(study)
    with progress(config.trials, f"{config.algo} tunes", quiet=config.quiet, done=before, unit="trial") as bar:

        def show() -> None:
            bar.update(_finished(study) - bar.n)
            if bar.n:
                bar.set_postfix_str(f"best {study.best_value:.4f} nats", refresh=False)

        missing = max(0, config.trials - before)
        if config.jobs == 1:
            _search(config, missing, 0, show)
        elif missing:
            _search_in_processes(config, missing, show)
    return _result(config, study)


def _open(config: TuneConfig) -> Any:
    """The study of this algorithm in the file, made with the present settings as first trial if there is none.

    Raises:
        ConfigError: Optuna is not installed.
        DataError: the file is no study's, or the study's trials mean something else.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ConfigError("tune: Optuna is not installed; pip install 'acodm[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path, base = Path(config.study), config.base()
    _check_journal(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name=config.algo, load_if_exists=True, direction="minimize")
    meaning = _meaning(config, base)
    recorded = study.user_attrs.get("meaning")
    if recorded is None:
        from acodm_env.agents.tuning import SPACE, present

        study.set_user_attr("meaning", meaning)
        first = {name: value for name, value in present(base).items() if SPACE[name].holds(value)}
        study.enqueue_trial(first, skip_if_exists=True)
    elif recorded != meaning:
        changed = next(name for name in meaning if recorded.get(name) != meaning[name])
        raise DataError(
            f"study={path}: its trials of {config.algo} were made with {changed}={recorded.get(changed)!r}, now it is "
            f"{meaning[changed]!r}; choose another --study, or the same settings to go on"
        )
    return study


def _check_journal(path: Path) -> None:
    """Refuse a file that is something else: Optuna would append to it."""
    if path.is_dir():
        raise DataError(f"study={path}: must be a file; choose another one")
    if not path.exists():
        return
    with path.open("rb") as file:
        first = file.readline()
    try:
        known = not first or "op_code" in json.loads(first)
    except (ValueError, TypeError):
        known = False
    if not known:
        raise DataError(f"study={path}: is no journal of a study; choose another file")


def _meaning(config: TuneConfig, base: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for two trials to be comparable."""
    from acodm_env.agents.hyperparameters import zoo_text

    return {
        "surrogate": base["env_kwargs"],
        "decisions": base["n_timesteps"],
        "seeds": config.seeds,
        "seed": config.seed,
        "settings": zoo_text(SURROGATE, base),
    }


def _finished(study: Any) -> int:
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def _search(config: TuneConfig, number: int, worker: int, show: Callable[[], None] = lambda: None) -> None:
    """Try `number` settings, fewer if others finish enough in the meantime."""
    import numpy as np
    import optuna

    study = _open(config)
    entropy = (config.seed, worker, len(study.get_trials(deepcopy=False)))  # a resumed search draws anew
    study.sampler = optuna.samplers.TPESampler(seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def after(study: Any, _: Any) -> None:
        show()
        if _finished(study) >= config.trials:
            study.stop()

    if number:
        study.optimize(lambda trial: _value(config, trial), n_trials=number, callbacks=[after])


def _value(config: TuneConfig, trial: Any) -> float:
    """Median objective in nats over the seeds; settings under which learning breaks down are given up."""
    import optuna

    from acodm_env.agents.tuning import learned_objective

    settings = _settings(config, trial)
    one = make_env(SURROGATE, settings["env_kwargs"])
    many = make_many(settings["env_kwargs"], int(settings.get("n_envs", 1)))
    started = time.perf_counter()
    try:
        objectives = [
            learned_objective(config.algo, settings, one, many, seed=config.seed + index)
            for index in range(config.seeds)
        ]
    except ConfigError:
        raise
    except ValueError as error:  # torch refuses a distribution whose parameters are no numbers any more
        raise optuna.TrialPruned(str(error)) from error
    trial.set_user_attr("objectives", objectives)
    trial.set_user_attr("seconds", time.perf_counter() - started)
    return statistics.median(objectives)


def _settings(config: TuneConfig, trial: Any) -> dict[str, Any]:
    """A trial's settings in full."""
    from acodm_env.agents.tuning import suggested

    return suggested(config.base(), trial)


def _search_in_processes(config: TuneConfig, number: int, show: Callable[[], None]) -> None:
    """Share `number` trials out to processes, whatever is not needed any more is left.

    Raises:
        DataError: a process died.
    """
    context = get_context("spawn")
    shares = [number // config.jobs + (worker < number % config.jobs) for worker in range(config.jobs)]
    processes = [
        context.Process(target=_work, args=(config, share, worker), daemon=True)
        for worker, share in enumerate(shares)
        if share
    ]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            time.sleep(POLL_SECONDS)
            show()
    finally:
        for process in processes:
            process.kill()
            process.join()
    if any(process.exitcode for process in processes):
        raise DataError(
            f"study={config.study}: a process died (its message is above, if it had one); its other trials are kept; "
            f"the same command again goes on"
        )


def _work(config: TuneConfig, number: int, worker: int) -> None:
    """Body of a process."""
    import os

    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.jobs))
    _search(config, number, worker)


def _result(config: TuneConfig, study: Any) -> dict[str, Any]:
    """The best trial, and for comparison the first, which had the settings that the search started from."""
    import optuna

    if not _finished(study):
        raise DataError(f"study={config.study}: no trial of {config.algo} could be finished; try fewer --decisions")
    best, first = study.best_trial, study.get_trials(deepcopy=False)[0]
    return {
        "study": config.study,
        "finished trials": _finished(study),
        "best trial": best.number,
        "objective": f"{best.value:.4f} nats, median of {config.seeds} seeds",
        "objective of the first trial": "-" if first.value is None else f"{first.value:.4f} nats",
        "settings": _settings(config, optuna.trial.FixedTrial(best.params)),
    }


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm tune, or python -m acodm_env tune")
