"""`acodm demo`: the main job from text to verdict, on two CPU cores, in one command.

Harvest and tokenise a corpus, learn a policy on a small proxy, export it, let it drive a larger target, run the same
target under the baselines and under the untrained actor, and say plainly who won.
"""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from acodm_env.corpus import open_corpus
from acodm_env.errors import ConfigError, unknown
from acodm_env.experiments import results
from acodm_env.experiments.console import listing, say
from acodm_env.experiments.export import export_from
from acodm_env.experiments.forecast import forecast_seconds
from acodm_env.experiments.recipes import RECIPES
from acodm_env.experiments.run_folder import RunFolder, open_run, recorded_config
from acodm_env.experiments.train import TrainConfig, episode_table, make_learner, train
from acodm_env.experiments.transfer import TransferConfig, choose_mixer, transfer
from acodm_env.files import write_json

REFERENCE = "odm-released"
MIXERS = ("odm-released", "odm-paper", "uniform", "policy", "policy-untrained")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Learn a mixing policy, let it drive a larger model, and compare it with its baselines. At most 10 minutes."""

    corpus: str = "pocket"
    """Folder of a token store, or "pocket": real text harvested from the Python installation."""
    recipe: str = "demo"
    """demo (minutes), or smoke (seconds; checks that everything runs, teaches nothing)."""
    out: str = "runs/demo"
    """Folder of the results; the same command again reprints or resumes."""
    fresh: bool = False
    """Start over: delete what is in --out."""
    seed: int = 0
    """Seed of everything."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            unknown("recipe", self.recipe, RECIPES)
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must be at least 0")


def run(config: DemoConfig) -> None:
    """Run or resume the demo, print the table and where the results lie."""
    out = Path(config.out)
    folder = _open(config, out)
    if folder.result is None:
        _run_stages(config, folder)
    result = folder.result
    assert result is not None
    say(summary(result))
    say(f"results: {out}/result.json  picture: {out}/report.png  policy: {out}/policy")


def _open(config: DemoConfig, out: Path) -> RunFolder:
    settings = {"corpus": config.corpus, "recipe": config.recipe, "seed": config.seed}
    if config.fresh and (out / "config.json").exists() and recorded_config(out).keys() == settings.keys():
        shutil.rmtree(out)
    return RunFolder(out, settings)


def _run_stages(config: DemoConfig, folder: RunFolder) -> None:
    out, started = folder.path, time.perf_counter()
    learning_recipe, target_recipe = RECIPES[config.recipe]
    _step(config, started, "1/4 corpus")
    store = open_corpus(config.corpus, config.quiet)
    corpus = str(store.path)
    train_config = replace(learning_recipe(corpus, str(out / "learning"), config.seed), quiet=config.quiet)
    target = replace(target_recipe(corpus, str(out), config.seed), quiet=config.quiet)
    if not config.quiet:
        minutes = forecast_seconds(train_config, target, len(MIXERS), store) / 60
        say(f"forecast: about {minutes:.1f} minutes on this machine, less if part of it is done already")
    _step(config, started, "2/4 learning a policy on the proxy")
    learned = train(train_config)
    if not config.quiet:
        say(episode_table(learned["rows"]))
    _step(config, started, "3/4 exporting")
    for name, which in (("policy", "best"), ("policy-untrained", "untrained")):
        export_from(make_learner(train_config), train_config, which, out / name)
    _step(config, started, f"4/4 the target under {len(MIXERS)} mixers")
    runs = {name: _run_target(target, name, out) for name in MIXERS}
    results.draw(runs, out / "report.png", f"{target.target} target on {config.corpus}, seed {config.seed}")
    write_json(out / "result.json", _result(runs, learned, train_config, target, store.fingerprint))


def _step(config: DemoConfig, started: float, text: str) -> None:
    if not config.quiet:
        say(f"[{time.perf_counter() - started:4.0f} s] {text}")


def _run_target(target: TransferConfig, name: str, out: Path) -> RunFolder:
    """One target run under the mixer `name`, in its own folder."""
    folder = out / "target" / name
    chosen = {"policy": str(out / name), "mixer": None} if name.startswith("policy") else {"mixer": name}
    config = replace(target, **chosen, out=str(folder))  # type: ignore[arg-type]
    mixer = choose_mixer(config)
    mixer.name = name
    transfer(config, open_corpus(config.corpus), mixer)
    return open_run(folder)


def _result(
    runs: dict[str, RunFolder],
    learned: dict[str, Any],
    train_config: TrainConfig,
    target: TransferConfig,
    fingerprint: str,
) -> dict[str, Any]:
    order = sorted(runs, key=lambda name: name != "policy")
    return {
        "reference": REFERENCE,
        "mixers": {name: results.mixer_result(runs[name], runs[REFERENCE]) for name in order},
        "learning": {key: learned[key] for key in ("tokens", "seconds", "episodes", "transitions")},
        "corpus_fingerprint": fingerprint,
        "config": {"learning": learned["config"], "target": runs[REFERENCE].config},
    }


def summary(result: dict[str, Any]) -> str:
    """The table, what learning cost, and the verdicts."""
    learning = result["learning"]
    target = result["config"]["target"]
    target_tokens = target["steps"] * target["batch_size"] * target["sequence_length"]
    cost = listing(
        [
            ("learning the policy", f"{learning['tokens']:,} tokens, {learning['seconds']:.0f} s, "
             f"{learning['episodes']} episodes, {learning['transitions']} transitions"),
            ("each target run", f"{target_tokens:,} tokens"),
        ]
    )  # fmt: skip
    return "\n".join(
        [
            "",
            results.table(result["mixers"], result["reference"], learning),
            "",
            cost,
            "",
            *results.verdicts(result["mixers"]),
            "",
        ]
    )
