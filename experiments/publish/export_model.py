"""`acodm export-model`: a run's model as a Hugging Face folder with a card, checked by loading it, pushed if asked."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acodm_env.agents.baselines.policies import POLICY_ROWS
from acodm_env.agents.baselines.recorded import MEAN_OF
from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.console import note, say
from acodm_env.experiments.publish.hub import check_push, push_folder
from acodm_env.experiments.publish.model_card import Trained, Weights, model_card
from acodm_env.experiments.run.folder import open_run
from acodm_env.experiments.run.model_folder import TOKENIZER, WEIGHTS, write_settings
from acodm_env.files import atomic_file, atomic_folder, read_json, recover_folder
from acodm_env.policy.dense import Policy
from acodm_env.policy.load import load_policy

if TYPE_CHECKING:
    import torch

    from acodm_env.experiments.evaluation.loading import LoadedModel

MODEL_FILES = (
    *("README.md", "config.json", "generation_config.json"),
    *(WEIGHTS, TOKENIZER, "tokenizer_config.json"),
)
EVALUATED = ("evaluation.json", "evaluation")
CHECKED_SHAPE = (4, 64)
"""Sequences and tokens, at most, on which the written model is compared with the run's."""
CHECKED_TEXTS = ("alpha beta 123 run.", "  two  spaces , ok", "é ü 漢 ~", "e\u0301", "don't I'M 12345\n\n x", "\tA_b-C")
"""Texts on which `AutoTokenizer` is compared with tokenizer.json: tokenizers differ at spaces, digits and accents."""
_CELL = {"model", "mixer", "rule", "options", "corpus_fingerprint"}


@dataclass(frozen=True, kw_only=True)
class ExportModelConfig:
    """Write a run's model as a Hugging Face folder with a card, and push it if asked (--push)."""

    run: str = "runs/transfer"
    """Folder of a finished run of `acodm transfer` or `acodm cotrain`, or of a benchmark's cell that kept its model."""
    out: str = "runs/model"
    """Folder to write: weights, configuration, tokenizer, README.md. An earlier export there is replaced, which its
    README.md shows."""
    policy: str | None = None
    """Folder of the policy that drove the run, so that the card tells where it was learned."""
    push: str | None = None
    """OWNER/NAME on the hub to push the folder to, after it was checked. Needs HF_TOKEN; HF_ENDPOINT names another
    hub."""
    private: bool = False
    """Make the repository visible to its owner alone."""
    seed: int = 0
    """Seed of the token ids on which the written model is compared with the run's."""
    quiet: bool = False
    """Print only where the model lies."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must be at least 0")


def run(config: ExportModelConfig) -> None:
    """Write, check, push, and say where it lies."""
    trained = read_trained(config.run)
    policy = driving_policy(trained, config.policy)
    check_push(config.push, private=config.private)
    compared = export_model(trained, config.out, policy=policy, repo=config.push, seed=config.seed)
    if not config.quiet:
        say(f"loaded again: logits equal bit for bit on {compared} token ids")
    say(f"model: {config.out} ({', '.join(MODEL_FILES)})")
    if config.push is not None:
        message = f"{trained.config['name']}, {trained.tokens:,} tokens"
        url = push_folder(config.out, config.push, MODEL_FILES, message=message, private=config.private)
        say(f"pushed: {url}")


def read_trained(path: str | Path) -> Trained:
    """A finished target run with its model.

    Raises:
        ConfigError: there is no run, or none that leaves a model.
        DataError: it has not ended, it diverged, or its model was removed.
    """
    folder = open_run(path)
    wanted = f"run={path}: must be a finished run with a model"
    settings = _settings(folder.config)
    if settings is None:
        raise ConfigError(f"{wanted}; this one leaves none; train it by `acodm transfer` or `acodm cotrain`")
    result, steps = folder.result, folder.steps
    if result is None or not steps:
        raise DataError(f"{wanted}; it has not ended; give its command again, and it goes on to the end")
    if not (recover_folder(folder.path / "model") / WEIGHTS).is_file():
        if result["diverged"]:
            raise DataError(
                f"{wanted}; it diverged; go on from its last checkpoint by the same command with --on-nonfinite skip, "
                f"or train anew with a lower --learning-rate"
            )
        if _is_cell(folder.config) and not folder.config.get("keep_models"):
            raise DataError(f"{wanted}; its benchmark kept none; run it with --keep-models into another --out")
        raise DataError(f"{wanted}; model/{WEIGHTS} was removed; train it again into another folder")
    record = read_json(folder.path / "config.json") | {"config": settings}
    return Trained(path=folder.path, record=record, steps=steps, result=result)


def _is_cell(config: Mapping[str, Any]) -> bool:
    """Whether these are the settings of a benchmark's cell that trains the target."""
    return config.keys() >= _CELL


def _settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Settings of a target run under the names that `acodm transfer` gives them; None if it is another run."""
    if not _is_cell(config):
        is_target = {"target", "corpus_fingerprint", "name"} <= config.keys()
        return dict(config) if is_target else None
    name, options = str(config["mixer"]), dict(config["options"])
    told: dict[str, Any] = {"target": config["model"], "name": name, "mixer": config["rule"]}
    if name.startswith(MEAN_OF):  # its options are those of what it averages
        return {**config, **told, "mean_of": name.removeprefix(MEAN_OF), "options": {}}
    if config["rule"] in POLICY_ROWS:
        told["policy"] = options.pop("policy", None)
    weights = options.get("weights")
    if isinstance(weights, list) and len(weights) == len(config["domains"]):
        told["weights"] = options.pop("weights")
    return {**config, **told, "options": options}


def driving_policy(trained: Trained, path: str | None) -> Policy | None:
    """The policy that drove a run: the one in `path`, or the one that a co-trained run left; None if there is neither.

    Raises:
        ConfigError: another policy drove it.
        DataError, PolicyError: there is no whole policy in `path`.
    """
    own = trained.path / "policy"
    if path is None:
        return load_policy(own) if trained.result.get("learning") and own.exists() else None
    policy = load_policy(path)
    drove = trained.config.get("policy")
    if policy.fingerprint != drove:
        by = f"the policy {drove[:16]}…" if drove else f"{trained.config['name']}, which is none"
        raise ConfigError(
            f"policy={path}: must be the policy that drove the run; that was {by}, this is {policy.fingerprint[:16]}…; "
            f"give its folder or leave --policy out"
        )
    return policy


def export_model(
    trained: Trained, out: str | Path, *, policy: Policy | None = None, repo: str | None = None, seed: int = 0
) -> int:
    """Write the folder, load it as anyone would, and compare it with the run's model.

    Args:
        trained: the run.
        out: the folder; it appears only if the comparison holds.
        policy: the one that drove the run, for the card.
        repo: where on the hub it will lie, for the card.
        seed: of the token ids of the comparison.

    Returns:
        How many token ids were compared.

    Raises:
        DataError: `out` holds other files; the run's model is not whole; or the folder loads as another model.
    """
    import torch

    from acodm_env.experiments.evaluation.loading import load_model

    out, source = Path(out), trained.path / "model"
    _check_out(out, source)
    loaded = load_model(source, device="cpu", precision="fp32")
    end, ids = int(loaded.tokenizer.eos_token_id), _token_ids(loaded, seed)
    weights = Weights(
        architecture=type(loaded.model).__name__,
        num_parameters=loaded.num_parameters,
        context=loaded.context,
        sha256=loaded.sha256,
    )
    expected = _logits(loaded.model, ids)
    del loaded  # a large one twice may be too much
    with atomic_folder(out) as fresh:
        shutil.copyfile(source / WEIGHTS, fresh / WEIGHTS)
        write_settings(fresh, _config(source), source / TOKENIZER, end)
        if not torch.equal(*(logits.view(torch.uint8) for logits in (expected, _logits(_load(fresh), ids)))):
            raise DataError(f"{source}: the exported model would give other logits than the run's; nothing was written")
        weights = replace(weights, auto_tokenizer=_auto_tokenizer_fits(fresh))
        for name in EVALUATED:  # of the export before; `acodm evaluate` sees by the weights whether it still holds
            if (out / name).exists():
                (shutil.copytree if (out / name).is_dir() else shutil.copyfile)(out / name, fresh / name)
        with atomic_file(fresh / "README.md") as file:
            file.write(model_card(trained, weights, repo or out.resolve().name, policy, repo).encode())
    if not weights.auto_tokenizer:
        note(
            f"{out}: transformers' AutoTokenizer gives other token ids than the model was trained on, whatever the "
            f"folder says ({weights.architecture}); load its tokenizer by PreTrainedTokenizerFast.from_pretrained, as "
            f"its card says"
        )
    return ids.numel()


def _check_out(out: Path, source: Path) -> None:
    found = {file.name for file in out.iterdir()} if recover_folder(out).is_dir() else set()
    foreign = sorted(found - {*MODEL_FILES, *EVALUATED})
    if foreign or (out.exists() and not out.is_dir()):
        what = f"already holds {foreign[0]}, which is no part of a model" if foreign else "is a file"
        raise DataError(f"out={out}: {what}; choose another folder")
    if out.resolve() == source.resolve():
        raise DataError(f"out={out}: must not be the run's own model; choose another folder")
    if found and "README.md" not in found:
        raise DataError(
            f"out={out}: must be absent, empty or an earlier export; it holds a model without a README.md, which may "
            f"be a run's only one; choose another folder"
        )


def _auto_tokenizer_fits(folder: Path) -> bool:
    """Whether `AutoTokenizer` encodes as the folder's tokenizer.json does."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    plain = Tokenizer.from_file(str(folder / TOKENIZER))
    plain.no_truncation()
    plain.no_padding()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return False
    return all(tokenizer(text)["input_ids"] == plain.encode(text).ids for text in CHECKED_TEXTS)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


# --- loaded again -----------------------------------------------------------------------------------------


def _token_ids(loaded: "LoadedModel", seed: int) -> "torch.Tensor":
    """Random token ids (B, T)."""
    import torch

    num_sequences, length = CHECKED_SHAPE
    drawn = torch.Generator().manual_seed(seed)
    size = (num_sequences, min(length, loaded.context))
    num_ids = max(loaded.tokenizer.get_vocab().values()) + 1
    return torch.randint(num_ids, size, generator=drawn)


def _load(folder: Path) -> Any:
    """The model in `folder`, as the card says to load it."""
    from transformers import AutoModelForCausalLM

    with _no_bars():
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def _logits(model: Any, ids: "torch.Tensor") -> "torch.Tensor":
    """Logits (B, T, V) of a model on the CPU."""
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids).logits.contiguous()
    return logits


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars: there is nothing to wait for."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


if __name__ == "__main__":
    raise SystemExit("acodm: this runs as a command: acodm export-model, or python -m acodm_env export-model")
