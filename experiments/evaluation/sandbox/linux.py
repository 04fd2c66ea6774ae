"""What Linux can take away from a program, asked for through the C library; each piece alone, as far as it is granted.

Namespaces (namespaces(7)), taken by root or by anyone where users may make user namespaces: other users, an own view
of the file system in which only one small folder in memory is writable, own processes, no network, no shared memory.
Landlock (landlock(7), Linux 5.13): no writes but below one folder, no new programs, no TCP, no signals to others.
Root becomes "nobody", who may still read what root could (a private Python installation), and nothing else.

Numbers and structures are those of the kernel's headers (linux/sched.h, linux/mount.h, linux/landlock.h,
linux/prctl.h, linux/capability.h); the system calls used by number have the same one on every architecture.
"""

import ctypes
import os
import signal
import struct
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

NOBODY = 65534
NAMESPACES = {
    "own_users": 0x10000000,
    "own_file_system": 0x00020000,
    "own_processes": 0x20000000,
    "own_network": 0x40000000,
    "own_ipc": 0x08000000,
}
"""Flags of unshare(2). Users come first: who is root among them may take the others."""
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_RDONLY, _MS_PRIVATE = 2, 4, 8, 1, 1 << 18
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 8, 36, 38
_CAPABILITIES_V3, _CAP_DAC_READ_SEARCH = 0x20080522, 1 << 2
_CAPS_TO_DROP = 1 << 0 | 1 << 6 | 1 << 7  # chown, setgid, setuid: containers may keep them from root
_LANDLOCK_EXECUTE, _LANDLOCK_WRITE_FILE = 1 << 0, 1 << 1
_LANDLOCK_CHANGES = _LANDLOCK_WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # remove and make, of every kind
_LANDLOCK_SINCE = ((2, 1 << 13), (3, 1 << 14))  # rename between folders; truncate
_INODES = 1024


class RefusedError(Exception):
    """A layer was begun and cannot be finished: the process is of no use any more."""

    def __init__(self, layer: str, message: str):
        super().__init__(message)
        self.layer = layer


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _system_call(number: int, *args: Any) -> int:
    # long values and pointers alike, or the upper half of a register may be anything
    return _check(_libc().syscall(ctypes.c_long(number), *args))


def take(name: str) -> bool:
    """Leave a namespace for one of one's own.

    Returns:
        Whether the system grants it.

    Raises:
        RefusedError: it grants a user namespace and then no user in it.
    """
    if name == "own_users":
        return _take_users()
    return bool(_libc().unshare(NAMESPACES[name]) == 0)


def _take_users() -> bool:
    """A user namespace with all users of the present one for root, for others with oneself alone."""
    me, uid, gid = os.getpid(), os.getuid(), os.getgid()
    maps = {name: _identity(name) for name in ("uid_map", "gid_map")}
    ready, told = os.pipe()
    helper = os.fork()  # only from outside can more than one user be let in
    if helper == 0:
        os.close(told)
        status = 1
        if os.read(ready, 1):
            with suppress(OSError):
                for name, text in maps.items():
                    Path(f"/proc/{me}/{name}").write_text(text)
                status = 0
        os._exit(status)
    os.close(ready)
    granted = _libc().unshare(NAMESPACES["own_users"]) == 0
    if granted:
        os.write(told, b"x")
    os.close(told)
    alone = os.waitpid(helper, 0)[1] != 0
    if granted and alone:
        try:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
            Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        except OSError as error:
            raise RefusedError("own_users", str(error)) from error
    return bool(granted)


def _identity(name: str) -> str:
    lines = [line.split() for line in Path(f"/proc/self/{name}").read_text().splitlines()]
    return "".join(f"{inside} {inside} {count}\n" for inside, _, count in lines)


def hide_files(folder: str, size_bytes: int, owner: int, *, new_processes: bool) -> None:
    """Make every mount read-only but one: a new, small one in memory at `folder`, which becomes the current folder.

    Raises:
        RefusedError: the kernel is too old (before 5.12), or this is not the root of a file system.
    """
    libc = _libc()
    try:
        _check(libc.unshare(NAMESPACES["own_file_system"]))  # the supervisor's stays writable: it clears up
        _change_mounts(0, _MS_PRIVATE)  # first of all: what is mounted here must not appear elsewhere
        options = f"size={size_bytes},nr_inodes={_INODES},mode=700,uid={owner},gid={owner if owner == NOBODY else -1}"
        options = options.removesuffix(",gid=-1")
        _check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _MS_NOSUID | _MS_NODEV, options.encode()))
        _change_mounts(_MS_RDONLY, 0)
        # only the upper mount again, without its children: it has none
        _change_mounts(0, 0, cleared=_MS_RDONLY, path=folder, flags=0)
        os.chdir(folder)
    except OSError as error:
        raise RefusedError("own_file_system", str(error)) from error
    if new_processes:  # not granted in containers that hide parts of /proc; the old one then shows the others' numbers
        libc.mount(b"proc", b"/proc", b"proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_RDONLY, None)


def _change_mounts(
    attributes: int, propagation: int, *, cleared: int = 0, path: str = "/", flags: int = _AT_RECURSIVE
) -> None:
    attr = struct.pack("=QQQQ", attributes, cleared, propagation, 0)  # struct mount_attr
    _system_call(
        _MOUNT_SETATTR,
        ctypes.c_long(_AT_FDCWD),
        os.fsencode(path),
        ctypes.c_long(flags),
        attr,
        ctypes.c_long(len(attr)),
    )


def can_drop_user(folder: str) -> bool:
    """Whether root can become nobody and still read the Python installation and reach `folder`."""
    capabilities = _capabilities()
    if os.getuid() != 0 or not _mapped(NOBODY) or capabilities & _CAPS_TO_DROP != _CAPS_TO_DROP:
        return False
    if capabilities & _CAP_DAC_READ_SEARCH:
        return True
    return all(above.stat().st_mode & 1 for path in (os.__file__, folder) for above in Path(path).resolve().parents)


def _mapped(uid: int) -> bool:
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    return any(int(first) <= uid < int(first) + int(count) for first, _, count in map(str.split, lines))


def drop_user() -> None:
    """Become nobody. What is left of root's rights is reading, until `drop_rights`.

    Raises:
        RefusedError: the system does not let it.
    """
    _libc().prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError as error:
        raise RefusedError("dropped_user", str(error)) from error


def drop_rights() -> None:
    """Give up every capability but nobody's right to read, and with it the hope for new ones."""
    keep = _capabilities() & _CAP_DAC_READ_SEARCH if os.getuid() == NOBODY else 0
    header, data = struct.pack("=Ii", _CAPABILITIES_V3, 0), struct.pack("=6I", keep, keep, 0, 0, 0, 0)
    _check(_libc().capset(header, data))
    _check(_libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _capabilities() -> int:
    """The first 32 of those that this process may have."""
    header, data = struct.pack("=Ii", _CAPABILITIES_V3, 0), ctypes.create_string_buffer(24)
    _check(_libc().capget(header, data))
    return int(struct.unpack("=6I", data.raw)[1])


def landlock() -> bool:
    """Allow no change of files but below the current folder, no new program, no TCP, no signal to others.

    Needs `drop_rights` before.

    Returns:
        Whether the system has Landlock.
    """
    try:
        version = _system_call(_LANDLOCK_CREATE, None, ctypes.c_long(0), ctypes.c_long(1))
        changes = _LANDLOCK_CHANGES | sum(bit for since, bit in _LANDLOCK_SINCE if version >= since)
        network, scoped = 0b11 * (version >= 4), 0b11 * (version >= 6)  # TCP bind, connect; abstract sockets, signals
        rules = struct.pack("=QQQ", changes | _LANDLOCK_EXECUTE, network, scoped)
        rules = rules[: 8 if version < 4 else 16 if version < 6 else 24]
        ruleset = _system_call(_LANDLOCK_CREATE, rules, ctypes.c_long(len(rules)), ctypes.c_long(0))
        for path, allowed in ((".", changes), (os.devnull, _LANDLOCK_WRITE_FILE)):
            place = os.open(path, os.O_PATH)
            rule = struct.pack("=Qi", allowed, place)  # struct landlock_path_beneath_attr, packed
            _system_call(_LANDLOCK_ADD, ctypes.c_long(ruleset), ctypes.c_long(1), rule, ctypes.c_long(0))
            os.close(place)
        _system_call(_LANDLOCK_RESTRICT, ctypes.c_long(ruleset), ctypes.c_long(0))
        os.close(ruleset)
    except OSError:
        return False
    return True


def die_with_parent() -> None:
    """Be killed when the parent ends. To be called after every change of user, which undoes it."""
    _libc().prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def prefer_as_victim() -> None:
    """Let the system, when it runs out of memory, end this process and its children before any other."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def present_processes(*, own_users: bool) -> int:
    """Processes and threads of this user that a limit on their number would count besides the program's."""
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if own_users and release >= (5, 14):  # since then each user namespace counts for itself
        return 0
    number, uid = 0, os.getuid()
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                number += sum(1 for _ in (entry / "task").iterdir())
    return number


def end_descendants(seconds: float = 10.0) -> None:
    """Kill all descendants of this process, which `adopt_orphans`, and theirs, until none is left."""
    deadline = time.monotonic() + seconds
    stopped: set[int] = set()
    while time.monotonic() < deadline:
        found = _descendants(os.getpid())
        # Stopped first, so that none makes new ones while the others are killed.
        action = signal.SIGKILL if found <= stopped else signal.SIGSTOP
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, action)
        stopped |= found
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not found:
            return


def _descendants(ancestor: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in found | {ancestor}} - found:
        found |= more
    return found
