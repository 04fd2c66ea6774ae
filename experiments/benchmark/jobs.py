"""Running one cell of a benchmark: a target run or a method's preparatory runs, resumed where it was left.

Every target cell of one seed and schedule starts from the same model and sees every domain's sequences in the same
order, whatever the mixer: model and data are drawn from the seed alone.
"""

import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from acodm_env.agents.baselines import make_mixer
from acodm_env.agents.baselines.recorded import MEAN_OF, recorded_mixtures
from acodm_env.corpus import TokenStore, open_corpus
from acodm_env.errors import AcodmError, DataError
from acodm_env.experiments.benchmark.plan import Cell, Entry, Plan, digest_of
from acodm_env.experiments.run.accounting import learning_cost, one_cost, running_cost, total_cost
from acodm_env.experiments.run.folder import RunFolder, recorded_config
from acodm_env.experiments.run.loop import run_mixer
from acodm_env.experiments.run.results import judged, objective_result
from acodm_env.files import read_json, read_state, sha256, write_json, write_state
from acodm_env.policy.dense import Policy
from acodm_env.policy.load import open_policy
from acodm_env.policy.mixer import PolicyMixer, scaled_interval
from acodm_env.step_stats import StepStats
from acodm_env.trainer import Mixer, RunRequest, RunResult, Trainer
from acodm_env.watching import Watched, held_out_curve, watched_steps
from acodm_env.wrapper import Lagged

if TYPE_CHECKING:
    from acodm_env.pretrain.trainer import LMTrainer

LOGGED = ("config.json", "stats.jsonl", "eval.jsonl")
OnStep = Callable[[StepStats], None]


def run_cell(out: Path, index: int, on_step: OnStep = lambda stats: None) -> None:
    """Run the cell `index` of the benchmark in `out`, and before it those that it needs; a finished one is left alone.

    Raises:
        AcodmError: it does not fit, or a cell that it needs failed.
    """
    plan = Plan.load(out)
    cell = plan.cells[index]
    for needed in cell.needs:
        run_cell(out, needed)
    folder = out / cell.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        state = state_of(folder)
        if state == "finished":
            return
        if state in ("corrupted", "missing"):
            shutil.rmtree(folder, ignore_errors=True)
        bench = Bench(out, plan)
        if cell.kind == "preparation":
            bench.run_preparation(cell, on_step)
        else:
            bench.run_target(cell, on_step)
        (folder / "failed.json").unlink(missing_ok=True)


def state_of(folder: Path) -> str:
    """ "missing", "unfinished", "finished", or "corrupted": finished once, but its files are not what they were."""
    if not (folder / "result.json").exists():
        return "unfinished" if (folder / "config.json").exists() else "missing"
    try:
        recorded = read_json(folder / "result.json")["files"]
        whole = all(sha256(folder / name) == checksum for name, checksum in recorded.items())
    except (DataError, KeyError, TypeError, AttributeError, OSError):
        return "corrupted"
    return "finished" if whole else "corrupted"


class Bench:
    """The settings that all cells of a benchmark share, and what is made from them."""

    def __init__(self, out: Path, plan: Plan):
        """Open the corpus.

        Raises:
            DataError: it is not the one that the benchmark began with.
        """
        self.out, self.plan = out, plan
        self.settings = recorded_config(out)
        self.store, self.heldout = stores(self.settings)
        if self.store.fingerprint != self.settings["corpus_fingerprint"]:
            raise DataError(
                f"corpus={self.settings['corpus']}: must have fingerprint {self.settings['corpus_fingerprint'][:12]}… "
                f"as when the benchmark began; it was replaced; choose another --out"
            )

    def run_target(self, cell: Cell, on_step: OnStep) -> None:
        """Train the target under the cell's mixer."""
        entry = self.plan.entry(cell.mixer)
        mixer = self._mixer(cell, entry)
        trainer = lm_trainer(
            self.settings,
            self.store,
            self.heldout,
            schedule=cell.schedule,
            interval=decision_interval(mixer, self.settings),
        )
        cost = {"learning": learning_cost(mixer, self.store), "preparation": self._prepare(cell, mixer, trainer)}
        options = {"policy": mixer.policy.fingerprint} if isinstance(mixer, PolicyMixer) else dict(entry.options)
        identity = {**self.settings, "mixer": cell.mixer, "schedule": cell.schedule, "seed": cell.seed}
        identity |= {"rule": entry.mixer, "options": options}
        folder = RunFolder(self.out / cell.folder, identity, command=cell.command)
        driven, evaluations = _behind_its_lag(trainer, mixer), self.settings["evaluations"]
        run_mixer(folder, driven, mixer, seed=cell.seed, evaluations=evaluations, on_step=on_step)
        cost |= running_cost(folder, trainer.info, excess="excess" in mixer.needs)
        outcome = objective_result(folder)
        final = None if outcome["diverged"] else trainer.evaluate("validation")
        outcome |= judged(trainer.info, outcome["domain_loss_nats"], final)
        if self.settings.get("keep_models") and not outcome["diverged"]:
            from acodm_env.experiments.run.model_folder import save_model

            save_model(folder.path / "model", trainer, self.store)
        result = {"mixer": cell.mixer, "schedule": cell.schedule, "seed": cell.seed} | outcome
        finish(folder, result | {"cost": cost, "data_seed": trainer.info.seed})

    def _mixer(self, cell: Cell, entry: Entry) -> Mixer:
        """The cell's mixer, not yet prepared."""
        if cell.mixer.startswith(MEAN_OF):
            mixer = make_mixer("mean-of", run=str(self.out / self.plan.cells[cell.needs[0]].folder))
        elif entry.is_policy:
            policy = policy_of(entry)
            if entry.mixer == "policy-untrained":
                policy = policy.untrained(np.random.default_rng(cell.seed))
            mixer = PolicyMixer(policy)
        else:
            mixer = entry.make()
        mixer.name = cell.mixer
        return mixer

    def _prepare(self, cell: Cell, mixer: Mixer, trainer: "LMTrainer") -> dict[str, float]:
        """Hand the mixer what was run for it; returns what that cost."""
        if not cell.needs:
            return one_cost()
        before = read_json(self.out / self.plan.cells[cell.needs[0]].folder / "result.json")
        if cell.mixer.startswith(MEAN_OF):  # its weights cost a whole run of what it averages
            return total_cost(before["cost"].values())
        started = time.perf_counter()
        mixer.preparation(trainer.info)
        mixer.prepare({name: _result(record) for name, record in before["results"].items()})
        fitting = one_cost(seconds=time.perf_counter() - started)
        return total_cost([before["cost"], fitting])

    def run_preparation(self, cell: Cell, on_step: OnStep) -> None:
        """Make every run that the cell's methods ask for, one after the other."""
        name = cell.mixer.split(", ")[0]
        trainer = lm_trainer(self.settings, self.store, self.heldout)
        requests = self.plan.entry(name).make().preparation(trainer.info)
        identity = {**self.settings, "requests": digest_of(requests), "seed": cell.seed}
        folder = RunFolder(self.out / cell.folder, identity, command=cell.command)
        results = {request.name: self._request(request, folder.path, cell.seed, on_step) for request in requests}
        cost = total_cost(record.pop("cost") for record in results.values())
        finish(folder, {"mixer": cell.mixer, "seed": cell.seed, "results": results, "cost": cost})

    def _request(self, request: RunRequest, parent: Path, seed: int, on_step: OnStep) -> dict[str, Any]:
        """One preparatory run of the proxy, in a folder of its own."""
        folder = RunFolder(parent / request.name, {**self.settings, **request.record(), "seed": seed})
        if folder.result is not None:
            return folder.result
        reference = None
        if request.reference is not None:
            reference = read_state(parent / request.reference / "model.safetensors")
        mixer = make_mixer(request.mixer, **request.options)
        trainer = lm_trainer(
            self.settings,
            self.store,
            self.heldout,
            model=self.settings["proxy"],
            horizon=request.steps,
            interval=decision_interval(mixer, {**self.settings, "steps": request.steps}),
            reference=reference,
        )
        trainer.reset(np.random.default_rng(seed))
        initial = trainer.evaluate("validation")
        driver = Watched(mixer, watched_steps(request)) if request.evaluate_at else mixer
        run_mixer(folder, _behind_its_lag(trainer, mixer), driver, seed=seed, evaluations=0, on_step=on_step)
        lines = folder.steps
        diverged = lines[-1].diverged
        final = np.full_like(initial, np.nan) if diverged else trainer.evaluate("validation")
        if request.keep_model:
            from acodm_env.pretrain.checkpoint import to_numpy

            write_state(folder.path / "model.safetensors", to_numpy(trainer.bare_model.state_dict()))
        running = running_cost(folder, trainer.info, excess="excess" in mixer.needs, evaluations=2)
        curve = held_out_curve(request, {line.step: line.eval_losses for line in lines}, final)
        result = {
            "mixture": recorded_mixtures(folder.path, self.store.domains).mean(0).tolist(),
            "initial_losses": initial.tolist(),
            "final_losses": [x if math.isfinite(x) else None for x in final.tolist()],
            **{name: values.tolist() for name, values in curve.items()},
            "cost": total_cost([*running.values(), learning_cost(mixer, self.store)]),
        }
        shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
        write_json(folder.path / "result.json", result)
        return result


def stores(settings: Mapping[str, Any]) -> tuple[TokenStore, TokenStore]:
    """The domains to train on, and those among which held-out targets are looked up."""
    whole = open_corpus(settings["corpus"], quiet=True)
    trained = whole.subset(settings["domains"])
    return trained.cut(settings.get("cut", {}), settings["sequence_length"]), whole


def lm_trainer(
    settings: Mapping[str, Any],
    store: TokenStore,
    heldout: TokenStore,
    *,
    model: str | None = None,
    horizon: int | None = None,
    schedule: str = "cosine",
    interval: int | None = None,
    reference: Mapping[str, Any] | None = None,
) -> "LMTrainer":
    """The benchmark's trainer: plain torch, since one process makes many."""
    from acodm_env.pretrain.config import LMConfig
    from acodm_env.pretrain.trainer import LMTrainer

    shared = ("batch_size", "sequence_length", "learning_rate", "eval_sequences", "device", "precision")
    config = LMConfig(
        model=model or settings["model"],
        horizon=horizon or settings["steps"],
        schedule=schedule,
        decision_every=interval or settings["decision_every"],
        **{name: settings[name] for name in shared},
    )
    objective = dict(zip(settings["targets"], settings["objective"], strict=True))
    metric = settings.get("metric", "loss")
    return LMTrainer(config, store, objective=objective, metric=metric, heldout_store=heldout, reference=reference)


def policy_of(entry: Entry) -> Policy:
    """The policy of a row.

    Raises:
        AcodmError: there is none, or another than the row was planned with.
    """
    policy, meant = open_policy(entry.options["policy"]), entry.options.get("fingerprint")
    if meant not in (None, policy.fingerprint):
        raise DataError(
            f"policy={entry.options['policy']}: must have the fingerprint {meant[:12]}… as when {entry.name} was "
            f"planned; it was replaced; put the former one back, or give this one a name of its own"
        )
    return policy


def decision_interval(mixer: Mixer, settings: Mapping[str, Any]) -> int:
    """Steps between decisions; a policy brings its own, scaled to the horizon."""
    if isinstance(mixer, PolicyMixer):
        return scaled_interval(mixer.policy, settings["steps"])
    return int(settings["decision_every"])


def _behind_its_lag(trainer: Trainer, mixer: Mixer) -> Trainer:
    """The trainer with the lag that a policy learned with."""
    lag = mixer.policy.lag if isinstance(mixer, PolicyMixer) else 0
    return Lagged(trainer, lag) if lag else trainer


def _result(record: Mapping[str, Any]) -> RunResult:
    names = ("mixture", "initial_losses", "final_losses", "steps", "losses")
    return RunResult(**{name: np.array(record[name], dtype=np.float64) for name in names if name in record})


def finish(folder: RunFolder, result: dict[str, Any]) -> None:
    """Write `result.json` with the checksums of the logs it came from; a finished cell needs no checkpoint."""
    import torch

    result = result | {"threads": torch.get_num_threads()}
    files = {name: sha256(folder.path / name) for name in LOGGED if (folder.path / name).exists()}
    write_json(folder.path / "result.json", result | {"files": files})
    shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)


def guarded(out: Path, index: int, on_step: OnStep = lambda stats: None, redirect: bool = False) -> str | None:
    """Run a cell; an error becomes `failed.json`, a traceback in its log, and a message.

    Args:
        out: the benchmark's folder.
        index: of the cell.
        on_step: called after every optimiser step.
        redirect: send this process's standard output and error to the log as well.
    """
    log = log_of(out, index)
    log.parent.mkdir(parents=True, exist_ok=True)
    if redirect:
        with log.open("w") as stream:
            for descriptor in (1, 2):
                os.dup2(stream.fileno(), descriptor)
    try:
        run_cell(out, index, on_step)
    except Exception as error:
        with log.open("a") as stream:
            stream.write(traceback.format_exc())
        first = str(error).splitlines()[0] if str(error) else ""
        return fail(out, index, first if isinstance(error, AcodmError) else f"{type(error).__name__}: {first}")
    return None


def log_of(out: Path, index: int) -> Path:
    """Log of a cell."""
    return out / "logs" / f"cell-{index}.log"


def fail(out: Path, index: int, message: str) -> str:
    """Record why a cell failed, and where its log is; returns the message."""
    folder = out / Plan.load(out).cells[index].folder
    write_json(folder / "failed.json", {"error": message, "log": str(log_of(out, index))})
    return message
