"""Downstream tasks: which there are, what they need, and how they are loaded (local files, or lm-eval's by name)."""

import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.evaluation.harness.local_data import (
    MMLU_FILES,
    HumanEval,
    Mmlu,
    Row,
    read_humaneval,
    read_mmlu,
)
from acodm_env.hub import require_hub

FOLDER = Path(__file__).parent / "tasks"
"""Our task definitions."""
HUB = {"mmlu": "cais/mmlu", "humaneval": "openai/openai_humaneval"}
"""Where the harness takes the two from that can be local as well."""
_FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow", "pandas", "xml", "webdataset")


def require_harness(task: str) -> None:
    """Refuse `task` where lm-eval is not installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"tasks={task}: must be perplexity while lm-eval is not installed; it asks all other tasks' questions; "
            f"pip install 'acodm[eval]'"
        )


def is_local(name: str, data: Path | None) -> bool:
    """Whether `name` is asked from the files in `data`: humaneval, mmlu, its four categories, and mmlu_SUBJECT.

    So are the harness's subjects where the files lack them, or are missing: that is then the error to tell.
    """
    if data is None:
        return False
    if _can_be_local(name) or not name.startswith("mmlu_"):
        return _can_be_local(name)
    return bool(_stamp(data)) and name[5:] in mmlu_of(data).dev


def _can_be_local(name: str) -> bool:
    known = mmlu_categories()
    return name in HUB or name in known or any(name == f"mmlu_{subject}" for part in known.values() for subject in part)


@lru_cache(maxsize=1)
def mmlu_categories() -> dict[str, tuple[str, ...]]:
    """Subjects of each of MMLU's four categories ("mmlu_stem", …), as the harness's files have them."""
    import yaml

    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return {}
    found: dict[str, list[str]] = {}
    for path in sorted((Path(spec.origin).parent / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml")):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        found.setdefault(str(settings["tag"]).removesuffix("_tasks"), []).append(settings["dataset_name"])
    return {category: tuple(subjects) for category, subjects in found.items()}


def local_subjects(name: str, data: Path) -> list[str]:
    """The subjects in `data` of mmlu, one of its categories, or mmlu_SUBJECT.

    Raises:
        DataError: a file is missing or damaged, or holds no question of theirs.
    """
    there = sorted(mmlu_of(data).test)
    wanted = there if name == "mmlu" else mmlu_categories().get(name, (name[5:],))
    found = [subject for subject in there if subject in wanted]
    if not found:
        raise DataError(
            f"tasks={name}: must have questions in the files of data={data}; their {len(there)} subjects are others; "
            f"copy both files again, or leave data out for the hub's"
        )
    return found


def mmlu_of(data: Path) -> Mmlu:
    """MMLU in `data`, read once while its files stay as they are."""
    return _read_mmlu(data, _stamp(data))


@lru_cache(maxsize=1)
def _read_mmlu(data: Path, stamp: tuple[Any, ...]) -> Mmlu:
    return read_mmlu(data)


def _stamp(data: Path) -> tuple[Any, ...]:
    """What changes when one of MMLU's files does."""
    paths = [data / f"{stem}{ending}" for stem in MMLU_FILES for ending in (".jsonl.gz", ".jsonl")]
    return tuple(
        (stat.st_mtime_ns, stat.st_size, stat.st_ino) for path in paths if path.exists() and (stat := path.stat())
    )


# --- the harness's own tasks -------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def manager() -> Any:
    """lm-eval's index of its tasks; building it takes some seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_hub_task(name: str) -> None:
    """Refuse a name that the harness does not know, runs code for, or has no data for here.

    Raises:
        ConfigError: an unknown name, or a task that executes generated code.
        DataError: its data set is neither cached here nor reachable.
    """
    index = manager().task_index
    if name not in index:
        raise _unknown(name, index)
    for leaf, config in leaves(index, name):
        if config.get("unsafe_code") and name != "humaneval":
            raise ConfigError(
                f"tasks={name}: must not execute generated code ({leaf} does, with lm-eval's own means and without our "
                f"sandbox); of such tasks only humaneval is supported; use humaneval, or leave it out"
            )
    for dataset, configurations in _needed(name).items():
        missing = [one for one in configurations if not _is_cached(dataset, one)]
        if missing:
            require_hub("dataset", dataset, _remedy(name, dataset, missing))


def _unknown(name: str, index: dict[str, Any]) -> ConfigError:
    ours = ["perplexity", *HUB]
    near = [*get_close_matches(name, ours, n=1, cutoff=0.6), *get_close_matches(name, sorted(index), n=4, cutoff=0.6)]
    words = ", ".join(f"'{one}'" for one in dict.fromkeys(near))
    return ConfigError(
        f"tasks={name}: must be {', '.join(ours)} or one of lm-eval's {len(index):,} tasks; none has that name; "
        + (f"did you mean {words}?" if near else "`lm-eval ls tasks` lists them")
    )


def leaves(index: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and settings of each task below a task, a tag or a group of the harness."""
    entry = index.get(name)
    if entry is None:
        return
    members = entry.tags if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
    if entry.kind.name not in ("TAG", "GROUP") or not isinstance(members, list | set):
        yield name, entry.cfg or {}
        return
    yield from _members(index, members)


def _members(index: dict[str, Any], members: list[Any] | set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for member in members:
        if isinstance(member, str):
            yield from leaves(index, member)
        elif isinstance(member.get("task"), list):
            yield from _members(index, member["task"])
        else:
            child = member.get("task") or member.get("group")
            found = False
            for leaf, config in leaves(index, child):
                found = True
                yield leaf, config | member
            if not found:
                yield str(child), member


def datasets_of(name: str) -> set[str]:
    """Hub names of the data sets that a task of the harness needs."""
    return set(_needed(name))


def _needed(name: str) -> dict[str, list[str]]:
    """Data sets of the hub that a task of the harness needs, and which configurations; "" is the only one there is."""
    found: dict[str, set[str]] = {}
    for _, config in leaves(manager().task_index, name):
        path = str(config.get("dataset_path") or "")
        if path and path not in _FILE_FORMATS and not Path(path).exists():
            found.setdefault(path, set()).add(str(config.get("dataset_name") or ""))
    return {path: sorted(found[path]) for path in sorted(found)}


def _cache_folder(dataset: str) -> str:
    """As datasets names it: google/IFEval is in google___if_eval."""
    from datasets.naming import camelcase_to_snakecase

    *owner, last = dataset.split("/")
    return "___".join([*owner, camelcase_to_snakecase(last)])


def _is_cached(dataset: str, configuration: str) -> bool:
    """Whether the cache of datasets holds CONFIGURATION/VERSION/HASH of a data set.

    Settings beside the configuration are added to its name, after a hyphen.
    """
    from datasets import config

    return any(
        folder.is_dir()
        and not folder.name.endswith(".incomplete")
        and (not configuration or f"{folder.parts[-3]}-".startswith(f"{configuration}-"))
        for folder in (Path(config.HF_DATASETS_CACHE) / _cache_folder(dataset)).glob("*/*/*")
    )


def _remedy(name: str, dataset: str, configurations: Iterable[str]) -> str:
    """What to download where, and where to put it."""
    from datasets import config

    files = "HumanEval.jsonl.gz" if name == "humaneval" else "mmlu_dev.jsonl.gz and mmlu_test.jsonl.gz"
    local = f"--data DIR with {files}, or " if _can_be_local(name) else ""
    named = [one for one in configurations if one]
    what, which = f"'{dataset}'", ""
    if len(named) == 1:
        what += f", '{named[0]}'"
    elif named:
        rest = f" and {len(named) - 3} more" if len(named) > 3 else ""
        what, which = f"{what}, NAME", f" for each NAME of {', '.join(named[:3])}{rest},"
    return (
        f'the task {name} needs it: {local}load it where there is a network, python -c "from datasets import '
        f'load_dataset; load_dataset({what})"{which} or the same evaluation there, and copy the folder '
        f"{_cache_folder(dataset)} of its datasets cache to {config.HF_DATASETS_CACHE}"
    )


# --- loading -----------------------------------------------------------------------------------------------


def load_tasks(name: str, data: Path | None, scratch: Path) -> dict[str, Any]:
    """The harness's task objects behind a name: {"tasks": …, "groups": …}, as its `evaluate` takes them.

    Args:
        name: a task that was checked.
        data: folder of local files; None: the hub, or its cache.
        scratch: an empty folder that stays until the evaluation is over.

    Raises:
        DataError: a data set that cannot be loaded.
    """
    if data is None or not is_local(name, data):
        return _load_from_hub(name)
    if name == "humaneval":
        return _load(inline_humaneval(read_humaneval(data), scratch))
    return _load(inline_mmlu(mmlu_of(data), local_subjects(name, data), scratch))


def _load(configs: list[dict[str, Any]]) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    loaded: dict[str, Any] = TaskManager(include_defaults=False).load(configs)
    return loaded


def _load_from_hub(name: str) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError

    try:
        if name == "humaneval":  # the harness's own begins by executing code on import
            return _load([_template("humaneval") | {"dataset_path": HUB["humaneval"]}])
        loaded: dict[str, Any] = manager().load([name])
    except (OSError, ValueError, DatasetsError) as error:  # ValueError: the cache lacks the configuration
        first = (str(error).splitlines() or [""])[0][:200]
        raise DataError(
            f"tasks={name}: its data must be whole; {type(error).__name__}: {first}; {_hint(name)}"
        ) from error
    except ImportError as error:
        raise ConfigError(f"tasks={name}: needs a package that is not installed; {error}; install it") from error
    return loaded


def _hint(name: str) -> str:
    return (
        "; ".join(_remedy(name, dataset, names) for dataset, names in _needed(name).items())
        or "look into the task's own page"
    )


def inline_mmlu(mmlu: Mmlu, subjects: Sequence[str], scratch: Path) -> list[dict[str, Any]]:
    """A task's settings per subject, as `tasks/mmlu.yaml` has them, over files of that subject alone."""
    template = _template("mmlu")
    configs = []
    for subject in subjects:
        files = {
            split: _write(scratch / split / f"{subject}.jsonl", rows)
            for split, rows in (("dev", mmlu.dev[subject]), ("test", mmlu.test[subject]))
        }
        configs.append(template | {"task": f"mmlu_{subject}"} | _from(files, scratch))
    return configs


def inline_humaneval(data: HumanEval, scratch: Path) -> list[dict[str, Any]]:
    """HumanEval's settings, as `tasks/humaneval.yaml` has them, over a local file."""
    return [_template("humaneval") | _from({"test": _write(scratch / "humaneval.jsonl", data.problems)}, scratch)]


def _template(name: str) -> dict[str, Any]:
    import yaml

    template: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return template


def _from(files: dict[str, str], scratch: Path) -> dict[str, Any]:
    return {"dataset_kwargs": {"data_files": files, "cache_dir": str(scratch / "cache")}}


def _write(path: Path, rows: Sequence[Row]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
