"""What `acodm evaluate` is pointed at: runs, whose model lies in ``RUN/model``, and folders of models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Never

from acodm_env.errors import ConfigError
from acodm_env.files import read_json, recover_folder

MOST_NAMED = 3
"""Runs of a folder that a message names."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to evaluate."""

    name: str
    """In tables: a run's mixer, a folder's name, told apart where two have the same."""
    folder: Path
    """As it was given: a run's, or a model's own."""
    model: Path
    """Folder of the weights."""
    config: Mapping[str, Any]
    """Settings of the run; {} if it is none."""


def find_subjects(paths: Sequence[str]) -> list[Subject]:
    """The models of runs and of model folders.

    Raises:
        ConfigError: nothing given, a folder twice, or one without a model, in which case it says why.
    """
    if not paths:
        raise ConfigError("runs=[]: must name a run or a model's folder; acodm evaluate RUN|MODEL-FOLDER [… --compare]")
    folders = [Path(path) for path in paths]
    for folder in folders:
        if [other.resolve() for other in folders].count(folder.resolve()) > 1:
            raise ConfigError(f"runs={folder}: must not be named twice; leave one out")
    found = [_subject(folder) for folder in folders]
    names = _names(found)
    return [replace(subject, name=names[subject.folder]) for subject in found]


def _subject(folder: Path) -> Subject:
    config = _run_config(folder)
    if config is None:
        return Subject(name=folder.resolve().name, folder=folder, model=folder, config={})
    model = recover_folder(folder / "model")
    if not model.is_dir():
        _no_model(folder, config)
    name = str(config.get("name") or config.get("mixer") or folder.resolve().name)
    return Subject(name=name, folder=folder, model=model, config=config)


def _run_config(folder: Path) -> dict[str, Any] | None:
    """Settings of the run in `folder`; None if it holds a model's own files."""
    wanted = f"runs={folder}: must be the folder of a run of acodm transfer or cotrain, or of a model"
    if folder.is_file():
        raise ConfigError(f"{wanted}; it is a file; name the folder that it is in")
    if not folder.is_dir():
        raise ConfigError(f"{wanted}; there is no such folder; see where the run was written (--out)")
    if (folder / "plan.json").exists():
        raise ConfigError(
            f"{wanted}; it is a whole benchmark: name its runs, {folder}/cells/…, which keep their models with "
            f"--keep-models"
        )
    if (folder / "policy.json").exists():
        raise ConfigError(f"{wanted}; it is a policy; train a model under it: acodm transfer --policy {folder}")
    if not (folder / "config.json").exists():
        _no_settings(folder, wanted)
    record = read_json(folder / "config.json")
    if isinstance(record, dict) and isinstance(record.get("config"), dict) and "versions" in record:
        config: dict[str, Any] = record["config"]
        return config
    return None


def _no_settings(folder: Path, wanted: str) -> Never:
    """Say what a folder without config.json is, and what to name instead."""
    if (folder / "corpus.json").exists():
        raise ConfigError(f"{wanted}; it is a corpus: name the models, and give it by --corpus {folder}")
    if (folder / "model" / "config.json").exists():
        raise ConfigError(f"{wanted}; it has no config.json, but its model/ has: give {folder / 'model'}")
    inside = sorted(each.parent.name for each in folder.glob("*/config.json"))
    if inside:
        more = ", …" if len(inside) > MOST_NAMED else ""
        raise ConfigError(
            f"{wanted}; it is a folder of runs or models: name one in it, or several: "
            f"{', '.join(str(folder / name) for name in inside[:MOST_NAMED])}{more}"
        )
    raise ConfigError(f"{wanted}; it has no config.json: it is empty, or the run has not begun")


def _no_model(folder: Path, config: Mapping[str, Any]) -> Never:
    """Say why a run has no model, and what to do."""
    wanted = f"runs={folder}: must hold a trained model, and there is no model/ in it"
    if "objective" in config and "target" not in config:
        raise ConfigError(
            f"{wanted}; a benchmark's runs keep none unless it is begun with --keep-models; begin it so, or train the "
            f"same with `acodm transfer`"
        )
    if not config.keys() & {"target", "mixer"}:
        raise ConfigError(f"{wanted}; it is a run of another command; only transfer and cotrain leave a model")
    if not (folder / "result.json").exists():
        raise ConfigError(
            f"{wanted}: the run has not ended; give its command again, with --out {folder}, and it goes on from its "
            f"last checkpoint to the end"
        )
    if read_json(folder / "result.json").get("diverged"):
        raise ConfigError(
            f"{wanted}: the run diverged; go on from its last checkpoint by the same command with --on-nonfinite skip, "
            f"or train anew with a lower --learning-rate"
        )
    raise ConfigError(
        f"{wanted}: it was removed after the run ended; give the run's command again, with --out {folder}, "
        f"which writes it from the last checkpoint"
    )


def _names(subjects: Sequence[Subject]) -> dict[Path, str]:
    """A name per folder: the plain one where it is alone, with the folder's where that is not."""
    plain = [subject.name for subject in subjects]
    found = {
        subject.folder: subject.name
        if plain.count(subject.name) == 1
        else f"{subject.name} ({subject.folder.resolve().name})"
        for subject in subjects
    }
    given = list(found.values())
    return {folder: name if given.count(name) == 1 else str(folder) for folder, name in found.items()}
