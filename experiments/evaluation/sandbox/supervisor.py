"""The supervisor of one program, and the process that runs it: started by `sandbox`, standard library only.

The supervisor reads one request from its standard input, takes the namespaces, forks and waits; its answer goes to
its standard output. Its child is the first process of the program's process namespace, where there is one: when it
ends, the system ends all others. Without one, the supervisor adopts orphans and ends its descendants until none is
left. When all have ended it removes the program's folder: it is there to do so even if the evaluation has been
killed. The program's process gives up its user, its rights and its limits, and then runs the program.
"""

import json
import math
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Never

from acodm_env.experiments.evaluation.sandbox import folder as sandbox_folder
from acodm_env.experiments.evaluation.sandbox import guard as sandbox_guard
from acodm_env.experiments.evaluation.sandbox import linux as sandbox_linux

LINUX = sys.platform == "linux"
_SETUP_SECONDS = 60.0
_REPORT_BYTES = 1 << 16


def main() -> None:
    """Serve one request, then end."""
    request = _read_request()
    incoming, report = os.pipe()
    gate, opened = os.pipe()
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken)
    try:
        request["taken"] = _take(request["layers"])
        child = os.fork()
    except sandbox_linux.RefusedError as error:
        _answer(request, _failure(error.layer, error), 1, timed_out=False)
    except OSError as error:
        _answer(request, _failure("supervisor", error), 1, timed_out=False)
    if child == 0:
        signal.set_wakeup_fd(-1)
        for descriptor in (incoming, opened, wake, woken):
            os.close(descriptor)
        _first(request, report, gate)
    os.close(report)
    os.close(gate)
    told, status, timed_out = _watch(child, incoming, opened, wake, request)
    _answer(request, told, status, timed_out=timed_out)


def _read_request() -> dict[str, Any]:
    text = b""
    while not text.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            sys.exit(1)
        text += part
    request: dict[str, Any] = json.loads(text)
    return request


def _take(layers: list[str]) -> list[str]:
    """The namespaces, one by one: each is worth having without the others."""
    if not LINUX:
        return []
    sandbox_linux.prefer_as_victim()
    sandbox_linux.adopt_orphans()
    return [name for name in sandbox_linux.NAMESPACES if name in layers and sandbox_linux.take(name)]


def _watch(child: int, incoming: int, gate: int, wake: int, request: dict[str, Any]) -> tuple[bytes, int, bool]:
    """Wait until the program has ended, its time is over or the caller is gone; leave no process behind.

    Returns:
        What was reported, the exit status (negative: the signal), and whether the time was over.
    """
    deadline, begun = time.monotonic() + _SETUP_SECONDS, False
    sources, told, status = [incoming, wake, 0], b"", None
    while status is None and (left := deadline - time.monotonic()) > 0:
        ready = select.select(sources, [], [], left)[0]
        if incoming in ready:
            part = os.read(incoming, 4096)
            told = (told + part)[:_REPORT_BYTES]
            if not part:
                sources.remove(incoming)
            if not begun and b"\n" in told:  # the program begins now: setting up is not its time
                with suppress(BrokenPipeError):  # the caller is gone, which the next round sees
                    os.write(1, b"+")  # should the supervisor be killed from now on, then by what the program did
                deadline, begun = time.monotonic() + request["limits"]["seconds"], True
                with suppress(BrokenPipeError):
                    os.write(gate, b"x")
        if wake in ready:
            os.read(wake, 4096)
            status = _ended(child)
        if 0 in ready:
            break
    timed_out = status is None
    if status is None:
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _sweep(child, request["taken"])
    os.set_blocking(incoming, False)
    with suppress(BlockingIOError):
        while part := os.read(incoming, 4096):
            told = (told + part)[:_REPORT_BYTES]
    return told, 128 - status if status > 128 and "own_processes" in request["taken"] else status, timed_out


def _ended(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def _sweep(leader: int, taken: list[str]) -> None:
    """End what the program has started, where the system has not done so."""
    if "own_processes" not in taken:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
        if LINUX:
            sandbox_linux.end_descendants()


def _answer(request: dict[str, Any], told: bytes, status: int, *, timed_out: bool) -> Never:
    sandbox_folder.remove(Path(request["folder"]))
    answer = {"report": told.decode(errors="replace"), "status": status, "timed_out": timed_out}
    with suppress(BrokenPipeError):
        os.write(1, json.dumps(answer).encode())
    os._exit(0)


def _failure(layer: str, error: object) -> bytes:
    return f"!{layer} {error}".replace("\n", " ").encode(errors="replace") + b"\n"


def _first(request: dict[str, Any], report: int, gate: int) -> Never:
    """The supervisor's child: waits for the program's process where it is its namespace's first, or becomes it."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)
        if LINUX:
            sandbox_linux.die_with_parent()
            _prepare_folder(request)
        if "own_processes" in request["taken"] and (program := os.fork()):
            _reap(program)
        _program(request, report, gate)
    except sandbox_linux.RefusedError as error:
        os.write(report, _failure(error.layer, error))
    except Exception as error:  # told, and raised by the caller
        os.write(report, _failure("program", repr(error)))
    os._exit(1)


def _prepare_folder(request: dict[str, Any]) -> None:
    request["drop"] = "dropped_user" in request["layers"] and sandbox_linux.can_drop_user(request["folder"])
    owner = sandbox_linux.NOBODY if request["drop"] else os.getuid()
    if "own_file_system" in request["taken"]:
        size = max(16 * request["limits"]["file_bytes"], 1 << 16)
        new_processes = "own_processes" in request["taken"]
        sandbox_linux.hide_files(request["folder"], size, owner, new_processes=new_processes)
    elif request["drop"]:
        os.chown(request["folder"], owner, owner)


def _reap(program: int) -> Never:
    """Wait for the program's process, and for orphans; to end here is to end all."""
    while True:
        pid, status = os.wait()
        if pid == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(128 - code if code < 0 else min(code, 128))


def _program(request: dict[str, Any], report: int, gate: int) -> Never:
    os.setsid()
    in_force = list(request["taken"])
    if LINUX:
        if request["drop"]:
            sandbox_linux.drop_user()
            in_force.append("dropped_user")
        sandbox_linux.drop_rights()
        sandbox_linux.die_with_parent()
        if "landlock" in request["layers"] and sandbox_linux.landlock():
            in_force.append("landlock")
    in_force += _limit(request["limits"], own_users="own_users" in in_force)
    if missing := set(request["required"]) - set(in_force):
        raise RuntimeError(f"not granted now: {', '.join(sorted(missing))}")
    os.environ.clear()
    # where tempfile looks first, and a thread for each numeric library, whose pools would not fit into the limits
    os.environ.update(TMPDIR=request["folder"], HOME=request["folder"], OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    sys.argv, sys.dont_write_bytecode = [""], True
    for name in [name for name in sys.modules if name.partition(".")[0] == "acodm_env"]:
        del sys.modules[name]
    _run(request["program"], request["folder"], report, gate, " ".join(in_force), guard=request["guard"])


def _limit(limits: dict[str, Any], *, own_users: bool) -> list[str]:
    """Set the resource limits that the system has."""
    processes = limits["processes"] + (sandbox_linux.present_processes(own_users=own_users) if LINUX else 0)
    cpu_seconds = math.ceil(limits["seconds"]) + 1
    wanted = {
        "RLIMIT_CPU": (cpu_seconds, cpu_seconds + 1),
        "RLIMIT_FSIZE": (limits["file_bytes"],) * 2,
        "RLIMIT_NOFILE": (64, 64),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_NPROC": (processes, processes),
        "RLIMIT_AS": (limits["memory_bytes"],) * 2,
    }
    done = set()
    for name, (soft, hard) in wanted.items():
        with suppress(AttributeError, ValueError, OSError):
            number = getattr(resource, name)
            most = resource.getrlimit(number)[1]
            bound = [value if most == resource.RLIM_INFINITY else min(value, most) for value in (soft, hard)]
            resource.setrlimit(number, (bound[0], bound[1]))
            done.add(name)
    # root's processes are not counted
    binding = "RLIMIT_NPROC" in done and os.getuid() != 0
    return ["memory_limit"] * ("RLIMIT_AS" in done) + ["process_limit"] * binding


def _run(program: str, folder: str, report: int, gate: int, layers: str, *, guard: bool) -> Never:
    """The program, in a frame that the guard knows; no name of the program's is ours."""
    write, leave, describe = os.write, os._exit, _describe
    sandbox_guard.install(sys._getframe(), report, folder, layers, guard=guard)
    if not os.read(gate, 1):
        leave(1)
    os.close(gate)
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), {})
    except SystemExit:
        pass
    except MemoryError:
        write(report, b"out of memory\n")
    except BaseException as error:
        write(report, describe(error))
    else:
        sys.audit(sandbox_guard.ENDED)
    leave(1)


def _describe(error: BaseException) -> bytes:
    name = type(error).__name__
    try:
        text = " ".join(f"{name}: {error}".split()).removesuffix(":")
    except BaseException:  # the program's own class, which may do anything
        text = name
    return text[:300].encode(errors="backslashreplace") + b"\n"
