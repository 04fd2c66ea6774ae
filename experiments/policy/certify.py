"""The runs behind a certificate (`agents.certificate`): uniform, fixed rules and the policy on a proxy, fresh seeds.

Every run is a folder like any other, `DIR/runs/ROW/seedN/`; the same command goes on where it was interrupted.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from acodm_env.agents.baselines import make_mixer
from acodm_env.agents.certificate import FILE, HALVE, KEEP, UNIFORM, Certificate, Gain, gain, halved
from acodm_env.corpus import TokenStore
from acodm_env.corpus.problem import Problem
from acodm_env.errors import DataError
from acodm_env.experiments.console import note, progress, say
from acodm_env.experiments.run.accounting import run_cost
from acodm_env.experiments.run.folder import RunFolder, git_commit, versions
from acodm_env.experiments.run.loop import Saving, run_mixer
from acodm_env.experiments.run.preemption import never
from acodm_env.experiments.run.results import judged, mixer_result
from acodm_env.files import write_json
from acodm_env.lock import claimed
from acodm_env.policy.dense import Policy
from acodm_env.policy.mixer import PolicyMixer, scaled_interval
from acodm_env.step_stats import StepStats
from acodm_env.trainer import Mixer, Trainer
from acodm_env.wrapper import Lagged

SHARES = (0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The proxy on which a policy is tried."""

    proxy: str = "tiny"
    """Model: preset, config.json or hub name."""
    steps: int = 400
    """Optimiser steps of every run."""
    batch_size: int = 16
    sequence_length: int = 128
    learning_rate: float = 3e-3
    eval_sequences: int = 64
    """Held-out sequences per target and split."""
    device: str = "auto"
    precision: str = "auto"
    target_tokens: int | None = None
    """Tokens of the target's run: every domain is cut so that the proxy passes over it as often. None cuts none."""

    @property
    def tokens(self) -> int:
        """Of one run."""
        return self.steps * self.batch_size * self.sequence_length


def certify(
    policy: Policy,
    problem: Problem,
    conditions: Conditions,
    seeds: Sequence[int],
    out: str | Path,
    *,
    quiet: bool = False,
    stop: Callable[[], bool] = never,
) -> Certificate:
    """Make the runs that are missing, write `certificate.json` into `out` and return it; one that is there stays.

    Args:
        policy: to be judged.
        problem: data and objective.
        conditions: of the proxy.
        seeds: two or more, none of them the target's.
        out: folder of the certificate.
        quiet: no progress bars.
        stop: asked before and after every step: whether to save and end now.

    Raises:
        ConfigError, DataError, PolicyError: something does not fit; or uniform diverged.
        Preempted: `stop` said so.
    """
    trial = _Trial(policy, problem, conditions, Path(out), quiet, stop)
    trial.refuse_misfits()
    with claimed(out):
        RunFolder(out, trial.identity | {"seeds": [*seeds]})
        if (Path(out) / FILE).exists():
            return Certificate.load(out)
        certificate = trial.judge(list(seeds))
        certificate.save(out)
    return certificate


class _Trial:
    """The runs of one certificate."""

    def __init__(
        self,
        policy: Policy,
        problem: Problem,
        conditions: Conditions,
        out: Path,
        quiet: bool,
        stop: Callable[[], bool],
    ):
        self.policy, self.problem, self.conditions = policy, problem, conditions
        self.out, self.quiet, self.stop = out, quiet, stop
        self.shown = replace(problem, store=_as_often(problem, conditions))
        self.results: dict[str, dict[int, Mapping[str, Any]]] = {}
        self.identity: dict[str, Any] = {
            "certified": policy.fingerprint,
            **asdict(conditions),
            "domains": list(problem.store.domains),
            "corpus_fingerprint": problem.store.fingerprint,
            **problem.full_identity(),
        }

    def refuse_misfits(self) -> None:
        """Start the policy on the proxy's run, before anything is written."""
        self.problem.require_choice()
        PolicyMixer(self.policy, say=lambda text: None).start(self._trainer(self.policy).info)

    def judge(self, seeds: list[int]) -> Certificate:
        """All runs, and the verdict."""
        for seed in seeds:
            self.run("uniform", make_mixer("uniform"), seed)
        rules = self._rules()
        for name, mixer in rules.items():
            self.run(name, mixer, seeds[0])
        best = min(rules, key=lambda name: _or_inf(self.results[name][seeds[0]]["validation_objective_nats"]))
        for seed in seeds[1:]:
            self.run(best, self._rules()[best], seed)
        gains = {best: self._gain(best, seeds), "policy": self._try("policy", self.policy, seeds)}
        verdict = KEEP if gains["policy"].beats else UNIFORM
        if verdict != KEEP:
            gains["policy-halved"] = self._try("policy-halved", halved(self.policy), seeds)
            verdict = HALVE if gains["policy-halved"].beats else UNIFORM
        return self._certificate(verdict, seeds, gains, best)

    def _try(self, row: str, policy: Policy, seeds: Sequence[int]) -> Gain:
        for seed in seeds:
            self.run(row, PolicyMixer(policy, row, say=note), seed)
        return self._gain(row, seeds)

    def _gain(self, row: str, seeds: Sequence[int]) -> Gain:
        uniform, own = ([self._objective(name, seed) for seed in seeds] for name in ("uniform", row))
        known = [value for value in uniform if value is not None]
        if len(known) < len(seeds):
            raise DataError(f"{self.out}: uniform must not diverge on the proxy; take a lower learning rate")
        return gain(known, own)

    def _objective(self, row: str, seed: int) -> float | None:
        value: float | None = self.results[row][seed]["validation_objective_nats"]
        return value

    def _rules(self) -> dict[str, Mixer]:
        """The fixed rules to compare with: shares of the targets, or by size where all domains count alike."""
        own = {name for name, weight in self.problem.targets.items() if weight > 0} & {*self.problem.store.domains}
        if not own or own == {*self.problem.store.domains}:
            return {"proportional": make_mixer("proportional")}
        return {f"target-share-{share:g}": make_mixer("target-share", share=share) for share in SHARES}

    def run(self, row: str, mixer: Mixer, seed: int) -> None:
        """One run, unless it is finished."""
        mixer.name = row
        policy = mixer.policy if isinstance(mixer, PolicyMixer) else None
        folder = RunFolder(self.out / "runs" / row / f"seed{seed}", self._identity_of(row, policy, seed))
        result = folder.result or self._train(folder, mixer, self._trainer(policy), seed)
        self.results.setdefault(row, {})[seed] = result
        if not self.quiet:
            said = _or_inf(result["validation_objective_nats"])
            say(f"{row}, seed {seed}: validation {said:.4f} nats" + _in_force(result))

    def _identity_of(self, row: str, policy: Policy | None, seed: int) -> dict[str, Any]:
        named = {"mixer": row, "name": row, "seed": seed, "schedule": "cosine", "target": self.conditions.proxy}
        return self.identity | named | {"policy": None if policy is None else policy.fingerprint}

    def _trainer(self, policy: Policy | None) -> Trainer:
        from acodm_env.pretrain.config import LMConfig
        from acodm_env.pretrain.trainer import LMTrainer

        known = self.conditions
        interval = 1 if policy is None else scaled_interval(policy, known.steps)
        shared = ("batch_size", "sequence_length", "learning_rate", "eval_sequences", "device", "precision")
        settings = {name: getattr(known, name) for name in shared}
        config = LMConfig(model=known.proxy, horizon=known.steps, decision_every=interval, **settings)
        trainer = LMTrainer(config, self.shown.store, **self.shown.lm_settings)
        return Lagged(trainer, policy.lag) if policy is not None and policy.lag else trainer

    def _train(self, folder: RunFolder, mixer: Mixer, trainer: Trainer, seed: int) -> dict[str, Any]:
        with progress(self.conditions.steps, f"{mixer.name}, seed {seed}", quiet=self.quiet) as bar:

            def on_step(stats: StepStats) -> None:
                bar.update(stats.step - bar.n)

            run_mixer(
                folder,
                trainer,
                mixer,
                seed=seed,
                evaluations=1,
                on_step=on_step,
                saving=Saving(stop=self.stop),
            )
        fields = mixer_result(folder, None)
        validation = None if fields["diverged"] else trainer.evaluate("validation")
        result = {
            "mixer": mixer.name,
            **fields,
            **judged(trainer.info, fields["domain_loss_nats"], validation),
            "in_force": getattr(mixer, "rule", "") or mixer.name,
            "accounting": run_cost(folder, trainer),
            "config": folder.config,
        }
        write_json(folder.path / "result.json", result)
        shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
        return result

    def _certificate(self, verdict: str, seeds: list[int], gains: Mapping[str, Gain], best: str) -> Certificate:
        about = ("corpus_fingerprint", "heldout_fingerprint", "domains", "targets", "objective", "metric")
        splits = {"validation": "validation_objective_nats", "test": "objective_nats"}
        return Certificate(
            verdict=verdict,
            policy=self.policy.fingerprint,
            **{name: self.identity[name] for name in about},
            conditions=asdict(self.conditions),
            seeds=seeds,
            evidence={
                row: {str(seed): {split: result[key] for split, key in splits.items()} for seed, result in by.items()}
                for row, by in self.results.items()
            },
            gains={row: asdict(value) for row, value in gains.items()},
            best_rule=best,
            cost=_total([result["accounting"] for by in self.results.values() for result in by.values()]),
            record={"versions": versions(), "git_commit": git_commit()},
        )


def _as_often(problem: Problem, conditions: Conditions) -> TokenStore:
    """The training text, cut so that the proxy's run passes over each domain as often as the target's will."""
    ratio = conditions.tokens / (conditions.target_tokens or conditions.tokens)
    if ratio >= 1:
        return problem.store
    sizes = problem.store.num_sequences("train", conditions.sequence_length)
    left = {name: max(1, int(size * ratio)) for name, size in zip(problem.store.domains, sizes, strict=True)}
    return problem.store.cut(left, conditions.sequence_length)


def _in_force(result: Mapping[str, Any]) -> str:
    """Which rule drove a policy's run, if it was another one."""
    return "" if result["in_force"] == result["mixer"] else f" ({result['in_force']} drove it)"


def _or_inf(value: float | None) -> float:
    return float("inf") if value is None else value


def _total(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Tokens, model FLOPs and seconds of runs, by their `accounting`: training, measuring, evaluating."""
    seconds = [value or 0.0 for part in parts for value in part["seconds"].values()]
    return {
        "tokens": float(sum(part["tokens"] for part in parts)),
        "flops": float(sum(part["flops"] + part["measurement_flops"] for part in parts)),
        "seconds": float(sum(seconds)),
    }
