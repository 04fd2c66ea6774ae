"""`acodm cotrain`: an agent learns the mixture of the very run that it drives, without a proxy beforehand."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from acodm_env.config import from_dict, split_names
from acodm_env.corpus import TokenStore
from acodm_env.corpus.problem import Problem
from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError
from acodm_env.experiments.console import note
from acodm_env.experiments.policy.config import read_reward
from acodm_env.experiments.publish.policy_card import without_paths, write_policy_card
from acodm_env.experiments.run.accounting import one_cost, run_cost, running_cost
from acodm_env.experiments.run.checkpoints import Checkpoints
from acodm_env.experiments.run.command import command_line
from acodm_env.experiments.run.folder import RunFolder, git_commit, versions
from acodm_env.experiments.run.model_folder import save_model
from acodm_env.experiments.run.override import WeightOverride
from acodm_env.experiments.run.preemption import Preempted, catch_sigterm, never
from acodm_env.experiments.run.results import mixer_result
from acodm_env.experiments.run.tracking import tracked
from acodm_env.experiments.target.config import TargetConfig
from acodm_env.experiments.target.cotrain_loop import Recorded, run_cotrainer
from acodm_env.experiments.target.judging import judge, say_held_out, tell
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
from acodm_env.mixture import ActionMap
from acodm_env.reward import parse_reward
from acodm_env.trainer import Trainer

if TYPE_CHECKING:
    from acodm_env.agents.cotraining import Cotrainer
    from acodm_env.pretrain.leader import Led

PAPER_START = 833
"""Decisions that the paper's warm-up has, 2 % of 41,667."""


@dataclass(frozen=True, kw_only=True)
class CotrainConfig(TargetConfig):
    """Learn an agent and pre-train its target in one run; the same command again goes on, bit for bit on a CPU."""

    algo: str = "td3"
    """Off-policy algorithm: td3, ddpg, sac, acodm-td3, acodm-ddpg, equivariant-td3; with the extra contrib also tqc and
    crossq."""
    decision_every: int = 1
    """Steps between decisions."""
    reward: str = "interaction"
    """Reward terms: a name, or JSON such as {"interaction": 1.0, "progress": 10.0} (interaction, alignment, progress);
    progress evaluates the target at every decision."""
    fields: str | None = None
    """Observation fields, separated by commas; default: all, pending only with --prefetch."""
    action_scale: float = 2.0
    """c: how far an action can tilt the mixture (e^2c between two domains)."""
    action_floor: float = 0.1
    """ε: share of the mixture spread evenly."""
    agent: dict[str, Any] = field(default_factory=dict)
    """Changes of the agent's hyper-parameters (`AgentRecipe`), as JSON: {"gamma": 0.95, "hidden": [64, 64]}."""
    conf_file: str | None = None
    """YAML file of hyper-parameters in RL-Zoo's format; default: the shipped ones."""
    teacher: str = "uniform"
    """Mixer that plays the first decisions, on which actor and critic are pre-trained."""
    start_decisions: int | None = None
    """Decisions of the teacher. Default: a tenth of them, at most 833 as in the paper."""
    start_noise: float = 0.1
    """Standard deviation of the noise on the teacher's actions."""
    pretrain_steps: int = 200
    """Gradient steps of actor and critic on the teacher's decisions."""
    prefetch: int = 0
    """Batches that a background thread builds ahead; mixtures take effect as many steps late, and the agent sees
    those that are pending."""
    seed: int = 0
    """Seed of everything; model initialisation and data order are those of `acodm transfer` with the same one."""
    out: str = "runs/cotrain"
    """Folder of the run; the same command again resumes it."""

    def __post_init__(self) -> None:
        from acodm_env.agents.cotraining import require_cotrainable, require_online

        require_cotrainable(self.algo)  # before the corpus, which may have to be harvested
        reward = parse_reward(read_reward(self.reward))
        require_online(reward)
        if reward.objective is not None:
            raise ConfigError(f"reward.objective={dict(reward.objective)}: must be left out; give --targets instead")
        super().__post_init__()
        if self.start_decisions is None:
            object.__setattr__(self, "start_decisions", min(self.decisions // 10, PAPER_START))

    @property
    def decisions(self) -> int:
        """Decisions of the whole run."""
        return -(-self.steps // self.decision_every)

    @property
    def name(self) -> str:
        """What the run is called beside those of mixers."""
        return f"cotrain-{self.algo}"


def run(config: CotrainConfig) -> None:
    """Learn, train, print the result and where it lies."""
    with catch_sigterm() as asked:
        store = open_store(config)
        try:
            result = cotrain(config, store, stop=asked)
        except Preempted as end:
            note(f"acodm: {end}")
            return
    if result is not None:
        tell(config.out, result)


def cotrain(config: CotrainConfig, store: TokenStore, *, stop: Callable[[], bool] = never) -> dict[str, Any] | None:
    """Learn and train (or resume, or just report) and return `result.json`; None on other processes than 0.

    Args:
        config: the run.
        store: its corpus, of which `config` chooses domains and targets.
        stop: asked before every step: whether to save and end now.

    Raises:
        ConfigError, PolicyError, DataError: something does not fit; `out` is untouched then.
        Preempted: `stop` said so.
    """
    from acodm_env.pretrain.leader import leading

    problem, pace = problem_of(config, store), {"decision_every": config.decision_every}
    problem.require_choice()
    trainer = target_trainer(config, problem, prefetch=config.prefetch, **pace)
    with leading(trainer) as led:
        if led is None:
            return None
        if stop():
            raise Preempted("before it began")
        target = Recorded(led, config.seed, WeightOverride(config.out, led.info.domains), stop)
        learner = _learner(config, target)
        learner.policy({})  # an actor that cannot be exported is refused now
        identity = json.loads(json.dumps(_identity(config, problem)))
        check_out(config, identity)
        with claimed(config.out):
            folder = RunFolder(config.out, identity, command=command_line("cotrain", config))
            before = finished(config, folder)
            if before is not None and not lacks_model(folder, before):
                return before
            return _train(config, learner, target, problem, folder)


def _train(
    config: CotrainConfig, learner: "Cotrainer", target: Recorded, problem: Problem, folder: RunFolder
) -> dict[str, Any]:
    """Take the decisions that are left, write policy, model and `result.json`, and return it."""
    say_held_out(config, problem)
    with tracked(folder, config.track):
        run_cotrainer(
            folder,
            learner,
            target,
            Checkpoints(folder.path / "checkpoints", config.keep),
            evaluations=config.evaluations,
            save_every=config.checkpoint_every,
            quiet=config.quiet,
        )
    if not learner.diverged:
        save_model(folder.path / "model", cast("Led", target.inner), problem.store)
    fields, measuring = mixer_result(folder, None), _measuring(learner, target)
    learning = _learning(config, learner, folder)
    result = {
        "mixer": config.name,
        **fields,
        **judge(config, problem, target, fields),
        "learning": learning | {"export_error": _export(learner, folder)},
        "accounting": run_cost(folder, target) | measuring,
        "cost": {
            **running_cost(folder, target.info),
            "measurement": one_cost(measuring["measurement_tokens"], measuring["measurement_flops"]),
            "preparation": one_cost(),
            "learning": one_cost(seconds=learning["seconds"]),
        },
        "corpus_fingerprint": problem.store.fingerprint,
        "config": folder.config,
    }
    write_json(folder.path / "result.json", result)
    return result


def _learning(config: CotrainConfig, learner: "Cotrainer", folder: RunFolder) -> dict[str, Any]:
    """What was learned, and what it took."""
    return {
        "algo": config.algo,
        "teacher": config.teacher,
        "start_decisions": config.start_decisions,
        "decisions": learner.decisions,
        "updates": learner.updates,
        "total_reward": learner.total_reward,
        "seconds": sum(line.seconds_by_part["decision"] for line in folder.steps),
    }


def _export(learner: "Cotrainer", folder: RunFolder) -> float:
    """Write the learned policy into `policy/`; returns the largest difference of an action from the agent's."""
    from acodm_env.agents.export import export

    info = learner.env.trainer.info
    provenance = {
        "checkpoint": "cotrained",
        "config": without_paths(folder.config),  # others will read it
        "corpus_fingerprint": info.corpus_fingerprint,
        "learning_transitions": learner.decisions,
        "learning_tokens": info.batch_size * info.sequence_length * learner.env.trainer.steps_done,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    policy = learner.policy(provenance)
    error = export(policy, folder.path / "policy", learner.agent, learner.venv)
    write_policy_card(folder.path / "policy", policy)
    return error


def _learner(config: CotrainConfig, target: Trainer) -> "Cotrainer":
    from acodm_env.agents.cotraining import Cotrainer, Cotraining
    from acodm_env.agents.hyperparameters import AgentRecipe

    assert config.start_decisions is not None
    env = MixtureEnv(
        target,
        fields=split_names(config.fields) if config.fields else None,
        reward=parse_reward(read_reward(config.reward)),
        action=ActionMap(scale=config.action_scale, floor=config.action_floor),
    )
    cotraining = Cotraining(
        algo=config.algo,
        start_decisions=config.start_decisions,
        teacher=config.teacher,
        noise=config.start_noise,
        pretrain_steps=config.pretrain_steps,
        seed=config.seed,
    )
    return Cotrainer(env, cotraining, from_dict(AgentRecipe, config.agent, "agent"), conf_file=config.conf_file)


def _measuring(learner: "Cotrainer", target: Trainer) -> dict[str, Any]:
    """What the environment had measured for reward and fields: the held-out losses at every decision, if at all."""
    info = target.info
    wanted = "validation" in learner.env.needs
    tokens = learner.decisions * info.eval_tokens if wanted else 0
    trained = max(target.steps_done * info.batch_size * info.sequence_length, 1)
    return {
        "measurement_tokens": tokens,
        "measurement_flops": tokens * info.flops_per_token / 3,
        "measurement_frac": tokens / 3 / trained,
    }


def _identity(config: CotrainConfig, problem: Problem) -> dict[str, Any]:
    """What makes a run this run."""
    return identity_of(config, problem) | {"name": config.name, "mixer": config.name}


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm cotrain, or python -m acodm_env cotrain")
