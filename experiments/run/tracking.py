"""`--track`: the lines of a run's logs, shown by TensorBoard, Weights & Biases, Trackio or MLflow as well.

The trackers are Accelerate's; only what they are started with is ours. They are told of every line that `RunFolder`
appends, so the run's own files stay the record: a tracker that fails is left, and the run goes on. A kill loses what
services other than TensorBoard have queued: where one was not ended well, who goes on opens another run there, which
shows all that the logs hold.

===================  ==================================================================================================
key                  value, at every optimiser step (`eval/…`: at every evaluation on the test split)
===================  ==================================================================================================
target/loss          training loss of the step, nats
target/lr            learning rate
target/grad_norm     norm of the gradient before clipping
target/tokens        training tokens consumed since the start
mixture/DOMAIN       share of the step's sequences that were drawn from it
requested/DOMAIN     share that was asked for
loss/DOMAIN          training loss of its tokens, nats; not at steps that drew none
agent/NAME           what the deciding mixer or agent showed: reward, saturation, a bandit's exploration
eval/DOMAIN          held-out loss, nats
eval/mean_loss       unweighted mean of those, nats
eval/mean_perplexity unweighted mean of their exponentials
seconds/PART         wall-clock seconds: step (all of it), its parts, decision; evaluation
===================  ==================================================================================================
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from hashlib import sha256
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import numpy as np

from acodm_env.config import split_names
from acodm_env.errors import ConfigError, DataError, unknown
from acodm_env.experiments.console import note
from acodm_env.experiments.run.folder import RunFolder, recorded_config
from acodm_env.experiments.run.results import mean_perplexity
from acodm_env.files import read_json, write_json
from acodm_env.run_log import EvaluationLine, LogLine, StepLine

SERVICES = ("tensorboard", "wandb", "trackio", "mlflow")
"""Names of trackers, each that of its package and of our extra too."""
FILE = "tracking.json"
"""In the run's folder: its id and name, a digest of the settings, and, by service, what that calls it (`services`), how
many runs were opened there (`opened`), and, only where the last was ended well, the last step by log (`ended`)."""
_BY_DOMAIN = {"realised": "mixture", "requested": "requested", "losses": "loss"}
_TARGET = ("loss", "lr", "grad_norm", "tokens", "eval_tokens")
_FOREIGN = re.compile(r"[^\w\-./ :]")  # MLflow refuses a key with any other character


def trackers(text: str) -> tuple[str, ...]:
    """The services that `--track` names.

    Args:
        text: "auto" (TensorBoard where it is installed), "none", or names separated by commas.

    Raises:
        ConfigError: a name is unknown, or its package is not installed.
    """
    if text == "auto":
        return ("tensorboard",) if _installed("tensorboard") else ()
    if text == "none":
        return ()
    names = tuple(dict.fromkeys(split_names(text))) or (text,)
    for name in names:
        if name not in SERVICES:
            unknown("track", name, SERVICES if len(names) > 1 else ("auto", "none", *SERVICES))
        if not _installed(name):
            raise ConfigError(
                f"track={name}: must be installed; its package is not; `pip install 'acodm[{name}]'`, or --track none"
            )
    return names


def _installed(package: str) -> bool:
    """A folder of that name, such as one that wandb writes, is no package."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


@contextmanager
def tracked(folder: RunFolder, track: str) -> Iterator[None]:
    """Have the services told of what is logged into a run's folder in the block, on the process that writes it.

    Args:
        folder: of the run, before its logs are rewound to where it goes on.
        track: see `trackers`.
    """
    tracking = Tracking(folder, trackers(track))
    folder.listener = tracking
    try:
        yield
    finally:
        folder.listener = None
        tracking.finish()


class Tracking:
    """The trackers of one run. Nothing that goes wrong with one is an error: it is noted once, and that one left."""

    def __init__(self, folder: RunFolder, names: Sequence[str]):
        """Look what the services know of the run already.

        Args:
            folder: of the run.
            names: of services.
        """
        self.folder, self.names = folder, names
        self._trackers: dict[str, Any] = {}
        self._environment: list[str] = []
        digest = sha256(json.dumps(folder.config, sort_keys=True).encode()).hexdigest()
        record = _recorded(folder.path / FILE) if names else {}
        if record.get("settings_sha256") != digest:  # none yet; or the run was adapted, and is another to the services
            id = uuid4().hex[:8]
            name = f"{folder.path.resolve().name}-{id}"
            record = {"id": id, "name": name, "settings_sha256": digest, "services": {}, "opened": {}, "ended": {}}
        self._record = record
        self._known = {name: {**record["ended"].get(name, {})} for name in names}
        """Last step, by log, that a service has received for certain, and cannot forget."""
        self._told = {name: {**known} for name, known in self._known.items()}  # the same, and what it may yet lose

    def rewound(self, step: int) -> None:
        """Start the services for a run that goes on from `step`, and tell them what they lack of the lines before."""
        for name in self.names:
            with self._left_if_it_fails(name), redirect_stdout(sys.stderr):  # trackio prints
                goes_on = name in self._record["services" if name == "tensorboard" else "ended"]
                if not goes_on:
                    self._count(name)
                tracker = self._tracker(name, step, goes_on)
                tracker.start()
                self._trackers[name] = tracker
                if not goes_on:
                    tracker.store_init_configuration(_settings(self.folder.config))
                    theirs = tracker.tracker.info.run_id if name == "mlflow" else self._named("name", name)
                    self._record["services"][name] = theirs
                self._record["ended"].pop(name, None)  # until it is again
                write_json(self.folder.path / FILE, self._record)
                if name != "tensorboard":  # whose files have every line as soon as it is told
                    self._tell_what_is_kept(name)

    def appended(self, line: LogLine) -> None:
        """Pass a line on, but not to those that know it from before an interruption."""
        for name in [*self._trackers]:
            with self._left_if_it_fails(name):
                self._tell(name, line)

    def _tell_what_is_kept(self, name: str) -> None:
        """Lines of the logs in the order in which they were written, less what the service knows."""
        if recorded_config(self.folder.path).get("domains") != self.folder.config.get("domains"):
            return  # the run is being adapted, and these lines put away
        kept: list[LogLine] = [*self.folder.steps, *self.folder.evaluations]
        for line in sorted(kept, key=lambda line: line.step):  # of one step, an evaluation is the last
            self._tell(name, line)

    def _tell(self, name: str, line: LogLine) -> None:
        step, tracker = line.step, self._trackers[name]
        if step <= self._known[name].get(line.log, -1):
            return
        domains = self.folder.config["domains"]
        values = step_values(line, domains) if isinstance(line, StepLine) else {}
        values |= evaluation_values(line) if isinstance(line, EvaluationLine) else {}
        # an evaluation made by who goes on may be of a step that wandb, whose rows are steps, has closed
        tracker.log(values, step=max(step, tracker.tracker.step) if name == "wandb" else step)
        self._told[name][line.log] = step

    def _count(self, name: str) -> None:
        """One more run at that service."""
        before = self._record["opened"].get(name, int(name in self._record["services"]))
        self._record["opened"][name] = before + 1
        if before:
            note(f"{name} was not ended well and may lack steps: all are shown again, as {self._named('name', name)}")

    def _named(self, key: str, name: str) -> str:
        """The run's "id" or "name" with a service; from the second that was opened there on, with its number."""
        number = self._record["opened"].get(name, 1)
        return f"{self._record[key]}-{number}" if number > 1 else str(self._record[key])

    def finish(self) -> None:
        """End the services' work."""
        for name in [*self._trackers]:
            with self._left_if_it_fails(name), redirect_stdout(sys.stderr):
                _finish(name, self._trackers.pop(name))
                if name != "tensorboard":
                    self._record["ended"][name] = self._told[name]
                    write_json(self.folder.path / FILE, self._record)
        for variable in self._environment:
            os.environ.pop(variable, None)
        self._environment = []

    @contextmanager
    def _left_if_it_fails(self, name: str) -> Iterator[None]:
        """A full disk, or a service that is down, must not end a run."""
        try:
            yield
        except Exception as error:  # whatever a service raises
            if name in self._trackers:
                with suppress(Exception), redirect_stdout(sys.stderr):  # what is left open disturbs the next run
                    _finish(name, self._trackers.pop(name))
            reason = (str(error).splitlines() or [""])[0]
            note(f"tracking by {name} ends: {type(error).__name__}: {reason}; the run and its own logs go on")

    def _tracker(self, name: str, step: int, goes_on: bool) -> Any:
        """Accelerate's tracker, told where it writes and what it goes on with."""
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # without which the trackers cannot log what they do
        path, kind = self.folder.path.resolve(), LOGGER_TYPE_TO_CLASS[name]
        project = os.environ.get(f"{name.upper()}_PROJECT", "acodm")
        if name == "tensorboard":
            purge = step + 1 if (path / name).exists() else None  # what was shown of later steps is withdrawn
            return kind("", path / name, purge_step=purge, max_queue=1000)  # by default, 10, it takes twice as long
        if name == "trackio":
            return kind(project, name=self._named("name", name), resume="allow")
        if name == "wandb":
            which = {"id": self._named("id", name), "name": self._named("name", name), "resume": "allow"}
            return kind(project, **which, dir=str(path), **self._wandb_mode())
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self._default("MLFLOW_TRACKING_URI", (path / name).as_uri())
            self._default("MLFLOW_ALLOW_FILE_STORE", "true")  # a data base costs ten times as much a step
            self._default("MLFLOW_DISABLE_TELEMETRY", "true")
        run_id = self._record["services"][name] if goes_on else None
        return kind(project, run_name=self._named("name", name), run_id=run_id)

    def _wandb_mode(self) -> dict[str, Any]:
        """Offline where no key is configured, so that nothing is ever asked."""
        import wandb

        settings = wandb.setup().settings
        if settings.mode != "online" or _has_key(settings.base_url):
            return {"settings": wandb.Settings(console="off")}
        self._default("WANDB_ERROR_REPORTING", "false")
        note(f"wandb has no API key: the run is kept in {self.folder.path / 'wandb'}; `wandb sync` uploads it")
        return {"mode": "offline", "settings": wandb.Settings(console="off", silent=True)}

    def _default(self, variable: str, value: str) -> None:
        """Set a variable of the environment until the run ends, unless the user has."""
        if variable not in os.environ:
            os.environ[variable] = value
            self._environment.append(variable)


def _recorded(file: Path) -> dict[str, Any]:
    """What is in `FILE`; nothing, and a note, if it was cut short or edited: the run goes on without."""
    if not file.exists():
        return {}
    with suppress(DataError, OSError, TypeError, AttributeError, KeyError):
        record: dict[str, Any] = {"opened": {}, "ended": {}} | read_json(file)
        texts = (record["id"], record["name"], *record["services"].values())
        numbers = [*record["opened"].values(), *(step for log in record["ended"].values() for step in log.values())]
        whole = all(isinstance(text, str) for text in texts) and all(isinstance(number, int) for number in numbers)
        if whole and record["ended"].keys() <= record["services"].keys():
            return record
    note(f"{file}: is no record of trackers; they are told of the run as of a new one")
    return {}


def _finish(name: str, tracker: Any) -> None:
    if name == "trackio":  # which otherwise does it, and says so, once more when Python ends
        import trackio

        trackio.finish()
    else:
        tracker.finish()


def _has_key(base_url: str) -> bool:
    """Whether wandb would find credentials for its server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        found = netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser())
    except (OSError, NetrcParseError):
        return False
    return found.authenticators(urlsplit(base_url).netloc) is not None


def step_values(line: StepLine, domains: Sequence[str]) -> dict[str, float]:
    """What is shown of a step; what is null there is left out.

    Args:
        line: the step's.
        domains: names (K,) of the training domains.
    """
    values = {f"target/{name}": getattr(line, name) for name in _TARGET}
    for field, group in _BY_DOMAIN.items():
        values |= {f"{group}/{name}": value for name, value in zip(domains, getattr(line, field), strict=True)}
    values["seconds/step"] = line.seconds
    values |= {f"seconds/{part}": value for part, value in line.seconds_by_part.items()}
    numbers = {key: value for key, value in line.diagnostics.items() if isinstance(value, int | float)}
    return _shown(values | {f"agent/{key}": value for key, value in numbers.items()})


def evaluation_values(line: EvaluationLine) -> dict[str, float]:
    """What is shown of an evaluation; the means are left out where a loss (M,) is not finite."""
    values = {f"eval/{name}": loss for name, loss in zip(line.targets, line.losses, strict=True)}
    values["seconds/evaluation"] = line.seconds
    finite = [loss for loss in line.losses if loss is not None]
    if len(finite) == len(line.losses):
        values["eval/mean_loss"] = fmean(finite)
        values["eval/mean_perplexity"] = float(mean_perplexity(np.array(finite)))
    return _shown(values)


def _shown(values: Mapping[str, float | None]) -> dict[str, float]:
    """Numbers by keys that every service takes."""
    return {_FOREIGN.sub("_", key): float(value) for key, value in values.items() if value is not None}


def _settings(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Hyper-parameters as the services take them: what is nested is JSON."""
    plain = bool | int | float | str
    kept = {key: value for key, value in config.items() if value is not None}
    return {key: value if isinstance(value, plain) else json.dumps(value) for key, value in kept.items()}
