"""The guard inside of the interpreter: an audit hook that ends a program at its first step out of its folder.

Audit hooks (PEP 578) see what the interpreter is about to do and cannot be taken off. This one allows reading, and
writing below one folder; it ends the process at once when the program opens for writing, removes, renames or makes
anything elsewhere, starts or signals a process, opens a socket or calls foreign code. It works on every system, and
what it does not see (C code that opens files itself), the layers of `linux` do.

A hook of its own keeps the secret that reports a pass. It is in that hook's closure only, and is written when one
certain frame says so, the one that ran the program and that goes on after it: no function that a program could call.
Nothing of a program's runs below that hook, and the guard's check calls nothing that a program can replace.
"""

import builtins
import errno
import os
import sys
from collections.abc import Callable, Mapping
from os import getcwd, getpid, readlink, stat
from types import FrameType, FunctionType, MappingProxyType
from typing import Any, Never

ENDED = "acodm.program.ended"
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_AF_UNIX = 1
_NULL = os.devnull
_MOST_LINKS = 40
_NO_LINK = (errno.EINVAL, errno.ENOENT, errno.ENOTDIR)
_NEVER = frozenset(
    {
        "os.exec", "os.fork", "os.forkpty", "os.killpg", "os.posix_spawn", "os.spawn", "os.startfile", "os.system",
        "pty.spawn", "subprocess.Popen",
        "resource.prlimit",
        "gc.get_objects", "gc.get_referrers", "sys.addaudithook", "sys._current_frames",  # they would find the secret
    }
)  # fmt: skip
_NEVER_BELOW = frozenset({"socket", "ctypes", "syslog"})
_UNSEEN = {
    "fork_exec": ("_posixsubprocess",),
    "pidfd_send_signal": ("signal", "_signal"),
    "mkfifo": ("os", "posix"),
    "mknod": ("os", "posix"),
}
_HARMLESS = frozenset({"socket.gethostname", "ctypes.addressof", "ctypes.create_string_buffer"})
# event: which arguments are paths, which are folders' descriptors, whether the last part of a path is followed
_PATHS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = MappingProxyType(
    {
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
)


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
    ended, write, leave, own_pid, getframe, me = ENDED, os.write, os._exit, os.getpid, sys._getframe, os.getpid()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == ended and getframe(1) is home and own_pid() == me:
            write(report, secret + b"\n")
            leave(0)

    sys.addaudithook(hook)
    if guard:  # a hook beside that one, not called by it: whoever looks up the frames from here finds no secret
        refuse = _refusal(report)
        _replace_unseen(refuse)
        sys.addaudithook(_private()["_checks"](folder, refuse))


def _refusal(report: int) -> Callable[[str], Never]:
    write, leave = os.write, os._exit

    def refuse(what: str) -> Never:
        write(report, f"forbidden: {what}"[:300].encode(errors="backslashreplace") + b"\n")
        leave(1)

    return refuse


def _replace_unseen(refuse: Callable[[str], Never]) -> None:
    """Functions that leave the folder or start and end processes, and raise no event."""
    for name, modules in _UNSEEN.items():
        for module in modules:
            if hasattr(__import__(module), name):
                setattr(__import__(module), name, lambda *args, _name=name, **options: refuse(_name))


def _private() -> dict[str, Any]:
    """This module's functions once more, among names and builtins of their own: no program can replace those."""
    names: dict[str, Any] = {**globals(), "__builtins__": dict(vars(builtins))}
    for name, value in globals().items():
        if isinstance(value, FunctionType):
            names[name] = FunctionType(value.__code__, names, name, value.__defaults__)
            names[name].__kwdefaults__ = value.__kwdefaults__
    return names


# From here on: what the check consists of. It calls C functions bound above and no method of a program's object.


def _checks(folder: str, refuse: Callable[[str], Never]) -> Callable[[str, tuple[Any, ...]], None]:
    def check(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if not _may_open(*args, folder=folder):
                refuse(f"open {_said(args[0])}")
        elif event in _PATHS:
            paths, folders, follow = _PATHS[event]
            relative = any(type(args[index]) is int and args[index] != -1 for index in folders if index < len(args))
            for index in paths:
                if not _allowed(event, args[index], folder, relative=relative, follow=follow):
                    refuse(f"{event} {_said(args[index])}")
        elif event in _NEVER:
            refuse(f"{event} {_said(args[0])}" if event in ("subprocess.Popen", "os.system", "os.exec") else event)
        elif event == "os.kill":
            if type(args[0]) is not int or args[0] != getpid():
                refuse(f"os.kill {_said(args[0])}")
        elif (
            event.partition(".")[0] in _NEVER_BELOW
            and event not in _HARMLESS
            # a pair of local sockets, as event loops have, leads nowhere
            and not (event == "socket.__new__" and type(args[1]) is int and args[1] == _AF_UNIX)
        ):
            refuse(event)

    return check


def _may_open(path: object, mode: object, flags: object, *, folder: str) -> bool:
    if issubclass(type(path), int):
        return True  # a descriptor: it was opened before, and checked then
    text = _text(path)
    writes = type(flags) is int and flags & _WRITES
    writes = writes or (type(mode) is str and any(letter in mode for letter in "wax+"))
    # A folder that os.open gives could be the start of a path that the hook does not see.
    if not writes and not (mode is None and flags is not None and (text is None or _is_folder(text))):
        return True
    return text is not None and (_below(text, folder) or _resolved(text) == _NULL)


def _allowed(event: str, path: object, folder: str, *, relative: bool, follow: bool) -> bool:
    if issubclass(type(path), int):
        return event == "os.truncate"  # it was opened for writing, and checked then
    text = _text(path)
    if text is None:
        return False
    if event == "sqlite3.connect" and (text in (":memory:", "") or text.startswith("file:")):
        return not text.startswith("file:")  # which may be an address, with a path of its own rules
    if relative and not text.startswith("/"):
        return ".." not in text.split("/")  # its folder was checked when it was opened
    return _below(text, folder, follow=follow)


def _below(text: str, folder: str, *, follow: bool = True) -> bool:
    if not follow:
        parent, _, last = text.rstrip("/").rpartition("/")
        above = _resolved(parent or ("/" if text.startswith("/") else "."))
        return f"{above}/{last}".startswith(folder + "/")
    resolved = _resolved(text)
    return resolved == folder or resolved.startswith(folder + "/")


def _resolved(text: str) -> str:
    """The path without links, as `os.path.realpath` has it; "/" where a part cannot be looked at."""
    rest, links = text.split("/")[::-1], 0
    path = "" if text.startswith("/") else getcwd()  # noqa: PTH109 - pathlib can be replaced
    while rest:
        part = rest.pop()
        if part == "..":
            path = path.rpartition("/")[0]
        elif part not in ("", "."):
            try:
                link = readlink(f"{path}/{part}")  # noqa: PTH115
            except OSError as error:
                # one too long or locked for this check may be open to a relative path: not known is not allowed
                if error.errno not in _NO_LINK:
                    return "/"
                path = f"{path}/{part}"
            else:
                links += 1
                if links > _MOST_LINKS:
                    return "/"
                rest += link.split("/")[::-1]
                path = "" if link.startswith("/") else path
    return path or "/"


def _is_folder(text: str) -> bool:
    try:
        return stat(text).st_mode & 0o170000 == 0o040000  # noqa: PTH116
    except OSError:
        return False


def _text(path: object) -> str | None:
    """A path as text. Other objects with a path (`os.PathLike`) may have another one the next time."""
    if issubclass(type(path), str):
        return str.__str__(path)
    if issubclass(type(path), bytes):
        return bytes.decode(path, "utf-8", "surrogateescape")  # type: ignore[arg-type]
    return None


def _said(path: object) -> str:
    if issubclass(type(path), int):
        return int.__repr__(path)
    text = _text(path)
    return "(no plain path)" if text is None else text
