"""Programs that a model wrote, run where they can do no harm, and judged: passed or not.

The semantics are those of HumanEval's own scorer (https://github.com/openai/human-eval) and of Hugging Face's
`code_eval`: a program passes if ``exec(program, {})`` ends within the time limit without an exception. Each program
has an interpreter of its own, with a supervisor (`supervisor`) that takes away all that the system lets it take
(`linux`: namespaces, Landlock, another user) and, on every system, with resource limits and a guard inside of
the interpreter (`guard`). Its folder is empty, its environment too, and both are gone afterwards.

The guard stops what models write by accident, the system's layers what is written on purpose. What a program can
always do is to judge itself falsely: no interpreter hides anything from code that was written to search it.
"""

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from acodm_env.errors import AcodmError, ConfigError
from acodm_env.experiments.evaluation.sandbox import folder as sandbox_folder

LAYERS = (
    "own_users",
    "own_file_system",
    "own_processes",
    "own_network",
    "own_ipc",
    "dropped_user",
    "landlock",
)
"""What is asked of the system, in the order of taking: namespaces, another user, Landlock."""
_LIMITS = ("memory_limit", "process_limit")
_SETUP_SECONDS = 60.0
_KILLED: dict[str, object] = {"report": "unknown\nended with its supervisor\n", "status": 1, "timed_out": False}
_HERE = Path(__file__).parent
# The package itself would be imported with all that it needs, for each program anew: its files are enough.
_START = (
    "import sys, types\n"
    "names = ['acodm_env', 'experiments', 'evaluation', 'sandbox']\n"
    "for depth in range(1, 5):\n"
    "    module = sys.modules['.'.join(names[:depth])] = types.ModuleType('.'.join(names[:depth]))\n"
    "    module.__path__ = sys.argv[1:] if depth == 4 else []\n"
    "from acodm_env.experiments.evaluation.sandbox.supervisor import main\n"
    "main()\n"
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use. Its output is discarded."""

    seconds: float = 3.0
    """Wall-clock time, from the program's first line on (human-eval's default)."""
    memory_bytes: int = 1 << 30
    """Address space of each of its processes."""
    file_bytes: int = 1 << 20
    """Size of a file; where the file system is its own, 16 times as much altogether."""
    processes: int = 16
    """Processes and threads at a time."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and 0 < self.seconds <= 3600):
            raise ConfigError(f"seconds={self.seconds}: must be above 0 and at most 3600; human-eval gives 3")
        for name, least in (("memory_bytes", 1 << 26), ("file_bytes", 0), ("processes", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name}={getattr(self, name)}: must be at least {least}; an interpreter needs as much; raise it"
                )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended."""

    passed: bool
    reason: str
    """"passed", "AssertionError: …", "timed out after 3 s", "out of memory", "forbidden: open /etc/x", …"""


class SandboxError(AcodmError):
    """The sandbox could not be set up as this system allows; the program was not run."""

    def __init__(self, layer: str, message: str):
        super().__init__(
            f"the sandbox could not be set up: {layer}: {_line(message)}; the system refuses what a program's "
            "process needs, as it does when memory, processes or room for temporary files run out; end other jobs, set "
            "TMPDIR to a folder with room, or leave humaneval out"
        )
        self.layer = layer


def run_program(program: str, limits: Limits = Limits()) -> Outcome:
    """Run one program under all that this system can take away from it.

    Raises:
        SandboxError: the system refuses now what it granted before (three times).
    """
    layers = _available()
    for pause in (0.1, 1.0):
        try:
            return execute(program, limits, layers=layers, required=layers)[0]
        except SandboxError:  # as many namespaces, processes or as much memory as there may be: others end soon
            time.sleep(pause)
    return execute(program, limits, layers=layers, required=layers)[0]


def run_programs(
    programs: Sequence[str],
    limits: Limits = Limits(),
    workers: int | None = None,
    on_done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run programs, a few at a time.

    Args:
        programs: their texts.
        limits: what each may use.
        workers: how many at a time; None is one for each processor, at most 8 (too many make each other time out).
        on_done: told each outcome, in the order of the programs, in the caller's thread.

    Returns:
        The outcomes, in the order of the programs.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers={workers}: must be at least 1; so many programs run at a time; leave it out")
    _available()  # tried once, before several would
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(run_program, program, limits) for program in programs]
        try:
            for future in futures:
                outcomes.append(future.result())
                on_done(outcomes[-1])
        finally:  # an error, or Ctrl-C: those that run end within their limits, the others never begin
            pool.shutdown(wait=True, cancel_futures=True)
    return outcomes


def protections() -> dict[str, bool]:
    """What this system takes away from a program: tried once, not guessed."""
    layers = _available()
    return {name: name in layers for name in (*LAYERS, *_LIMITS)} | {"guard": True}


@cache
def _available() -> frozenset[str]:
    wanted = set(LAYERS)
    while True:
        try:
            outcome, layers = execute("pass", layers=wanted)
        except SandboxError as error:
            if error.layer not in wanted:
                raise
            wanted.remove(error.layer)  # begun and then refused half-way: a system that grants only the beginning
        else:
            if not outcome.passed:
                raise SandboxError("trial", outcome.reason)
            return layers


def execute(
    program: str,
    limits: Limits = Limits(),
    *,
    layers: Collection[str] = LAYERS,
    required: Collection[str] = (),
    guard: bool = True,
) -> tuple[Outcome, frozenset[str]]:
    """Run one program under the named layers.

    Args:
        program: its text.
        limits: what it may use.
        layers: which of `LAYERS` to try.
        required: those without which the program is not run.
        guard: whether the interpreter is guarded from within.

    Returns:
        How it ended, and the layers and limits that were in force.

    Raises:
        SandboxError: a required layer was not to be had, or one failed after its beginning.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="acodm-program-")).resolve()
    except OSError as error:
        raise SandboxError("temporary folder", str(error)) from error
    request = {
        "program": program,
        "folder": str(folder),
        "layers": sorted(layers),
        "required": sorted(required),
        "guard": guard,
        "limits": asdict(limits),
    }
    try:
        answer = _supervised(json.dumps(request).encode() + b"\n", folder, limits.seconds + 2 * _SETUP_SECONDS)
    finally:  # the supervisor has done so already, unless the program ended it
        sandbox_folder.remove(folder)
    return _judged(answer, limits)


def _supervised(request: bytes, folder: Path, seconds: float) -> dict[str, object]:
    """Start a supervisor, hand it the request, wait for its answer, see it end."""
    # As -I, which is -E -P -s: nothing of the caller's environment is there to be ignored, and a fixed hash seed makes
    # programs that depend on the order of sets pass or fail every time.
    command = [sys.executable, "-s", "-P", "-c", _START, str(_HERE)]
    environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError("supervisor", str(error)) from error
    assert process.stdin is not None
    assert process.stdout is not None
    answer = b""
    try:
        with suppress(BrokenPipeError):  # it is dead already, and says nothing below
            process.stdin.write(request)
            process.stdin.flush()
        answer = _read_all(process.stdout.fileno(), time.monotonic() + seconds)
    finally:
        _end(process)
    if not answer:
        raise SandboxError("supervisor", f"it ended without an answer (exit status {process.returncode})")
    text = answer.removeprefix(b"+")  # said when the program began
    decoded: dict[str, object] = json.loads(text) if text else _KILLED
    return decoded


def _read_all(descriptor: int, deadline: float) -> bytes:
    parts: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            part = os.read(descriptor, 1 << 16)
            if not part:
                break
            parts.append(part)
    return b"".join(parts)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the supervisor clear up, which it does when its input ends; then end it."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _judged(answer: dict[str, object], limits: Limits) -> tuple[Outcome, frozenset[str]]:
    """What the supervisor saw, in words. Only the secret of the report's first line, said again, is a pass."""
    report, status = str(answer["report"]), answer["status"]
    first, _, rest = report.partition("\n")
    if first.startswith("!") or not first:
        layer, _, message = first[1:].partition(" ")
        raise SandboxError(layer or "supervisor", message or "the program's process ended before it began")
    secret, _, layers = first.partition(" ")
    said = _line(rest)
    timed_out = f"timed out after {limits.seconds:g} s"
    passed = rest == secret + "\n"
    if passed:
        reason = "passed"
    elif answer["timed_out"] or status == -signal.SIGXCPU:
        reason = timed_out
    elif said not in ("", "passed"):
        reason = said
    elif isinstance(status, int) and status < 0:
        names = {number.value: number.name for number in signal.Signals}
        reason = f"killed by {names.get(-status, f'signal {-status}')}"
    else:
        reason = "exited before the tests were over"
    return Outcome(passed=passed, reason=reason), frozenset(layers.split())


def _line(text: str) -> str:
    """The first line that says anything."""
    return "".join(text.strip().splitlines()[:1]).strip()[:300]
