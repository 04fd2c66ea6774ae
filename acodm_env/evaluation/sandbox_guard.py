"""The guard inside of the interpreter: an audit hook that ends a program at its first step out of its folder.

Audit hooks (PEP 578) see what the interpreter is about to do and cannot be taken off. This one allows reading, and
writing below one folder; it ends the process at once when the program opens for writing, removes, renames or makes
anything elsewhere, starts or signals a process, opens a socket or calls foreign code. It works on every system, and
what it does not see (C code that opens files itself), the layers of `sandbox_linux` do.

The hook also keeps the secret that reports a pass. It is in the hook's closure only, and is written when one certain
frame says so, the one that ran the program and that goes on after it: no function that a program could call.
"""

import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Never

ENDED = "acodm.program.ended"
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_AF_UNIX = 1
_NEVER = frozenset(
    {
        "os.exec", "os.fork", "os.forkpty", "os.killpg", "os.posix_spawn", "os.spawn", "os.startfile", "os.system",
        "pty.spawn", "subprocess.Popen",
        "resource.prlimit",
        "gc.get_objects", "gc.get_referrers", "sys.addaudithook", "sys._current_frames",  # they would find the secret
    }
)  # fmt: skip
_NEVER_BELOW = frozenset({"socket", "ctypes", "syslog"})
_UNSEEN = (("_posixsubprocess", "fork_exec"), ("signal", "pidfd_send_signal"), ("os", "mkfifo"), ("os", "mknod"))
_HARMLESS = frozenset({"socket.gethostname", "ctypes.addressof", "ctypes.create_string_buffer"})
_PATHS: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    # event: which arguments are paths, which are folders' descriptors, whether the last part of a path is followed
    "os.remove": ((0,), (1,), False),
    "os.rmdir": ((0,), (1,), False),
    "os.mkdir": ((0,), (2,), False),
    "os.rename": ((0, 1), (2, 3), False),
    "os.symlink": ((1,), (2,), False),
    "os.link": ((0, 1), (2, 3), True),
    "os.truncate": ((0,), (), True),
    "os.chmod": ((0,), (2,), True),
    "os.chown": ((0,), (3,), True),
    "os.utime": ((0,), (3,), True),
    "os.chflags": ((0,), (), True),
    "os.setxattr": ((0,), (), True),
    "os.removexattr": ((0,), (), True),
    "sqlite3.connect": ((0,), (), True),
}


def install(home: FrameType, report: int, folder: str, layers: str, *, guard: bool) -> None:
    """Begin a report, with a new secret and the layers in force, and put the hook in.

    Args:
        home: the frame whose `ENDED` event means that the program has ended well.
        report: descriptor of the pipe to the supervisor.
        folder: where the program may write; absolute and without links.
        layers: told in the report's first line.
        guard: whether the hook forbids anything, besides keeping the secret.
    """
    secret = os.urandom(16).hex().encode()
    os.write(report, secret + b" " + layers.encode() + b"\n")
    write, leave, getpid, getframe, me = os.write, os._exit, os.getpid, sys._getframe, os.getpid()

    def refuse(what: str) -> Never:
        write(report, f"forbidden: {what}"[:300].encode(errors="backslashreplace") + b"\n")
        leave(1)

    check = _checks(folder, refuse) if guard else None
    if guard:
        _replace_unseen(refuse)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == ENDED:
            if getframe(1) is home and getpid() == me:
                write(report, secret + b"\n")
                leave(0)
        elif check is not None:
            check(event, args)

    sys.addaudithook(hook)


def _replace_unseen(refuse: Callable[[str], Never]) -> None:
    """Functions that leave the folder or start and end processes, and raise no event."""
    for module, name in _UNSEEN:
        if hasattr(__import__(module), name):
            setattr(__import__(module), name, lambda *args, _name=name, **options: refuse(_name))


def _checks(folder: str, refuse: Callable[[str], Never]) -> Callable[[str, tuple[Any, ...]], None]:
    getpid, isdir = os.getpid, os.path.isdir

    def check(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            if isinstance(path, int):
                return
            # A folder that os.open gives could be the start of a path that the hook does not see.
            opened = mode is None and flags is not None and isdir(path)
            if (opened or (flags or 0) & _WRITES) and not _below(path, folder) and not _is_null(path):
                refuse(f"open {_text(path)}")
        elif event in _PATHS:
            paths, folders, follow = _PATHS[event]
            relative = any(args[index] not in (-1, None) for index in folders if index < len(args))
            for index in paths:
                if not _allowed(event, args[index], folder, relative=relative, follow=follow):
                    refuse(f"{event} {_text(args[index])}")
        elif event in _NEVER:
            refuse(f"{event} {_text(args[0])}" if event in ("subprocess.Popen", "os.system", "os.exec") else event)
        elif event == "os.kill":
            if args[0] != getpid():
                refuse(f"os.kill {args[0]}")
        elif (
            event.partition(".")[0] in _NEVER_BELOW
            and event not in _HARMLESS
            # a pair of local sockets, as event loops have, leads nowhere
            and not (event == "socket.__new__" and args[1] == _AF_UNIX)
        ):
            refuse(event)

    return check


def _allowed(event: str, path: object, folder: str, *, relative: bool, follow: bool) -> bool:
    if isinstance(path, int):
        return event == "os.truncate"  # it was opened for writing, and checked then
    if event == "sqlite3.connect" and _text(path) in (":memory:", ""):
        return True
    text = _text(path)
    if relative and not text.startswith("/"):
        return ".." not in text.split("/")  # its folder was checked when it was opened
    return _below(text, folder, follow=follow)


def _below(path: object, folder: str, *, follow: bool = True) -> bool:
    text = _text(path)
    if not follow:
        parent, _, last = text.rstrip("/").rpartition("/")
        above = os.path.realpath(parent or ("/" if text.startswith("/") else "."))
        return f"{above}/{last}".startswith(folder + "/")
    resolved = os.path.realpath(text)
    return resolved == folder or resolved.startswith(folder + "/")


def _is_null(path: object) -> bool:
    return os.path.realpath(_text(path)) == os.devnull


def _text(path: object) -> str:
    if isinstance(path, bytes):
        return os.fsdecode(bytes(path))
    return str.__str__(path) if isinstance(path, str) else repr(path)
