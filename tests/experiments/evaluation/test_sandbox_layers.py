"""What the system takes away from a program, layer by layer, the guard being off."""

import os
import socket
import subprocess
import sys

import pytest
from sandboxed import LINUX, SHORT, SMALL, nothing_left, survivors, with_layers  # noqa: F401

from acodm_env.experiments.evaluation.sandbox import execute as sandbox
from acodm_env.experiments.evaluation.sandbox.execute import Outcome, execute, protections

WRITE = (
    "import ctypes, os\nctypes.CDLL(None).creat(b'{out}', 0o644)\nopen('inside', 'w').write('x'); open('{out}', 'w')"
)


@pytest.mark.skipif(not LINUX, reason="Linux's layers")
@pytest.mark.parametrize("layers", [("landlock",), ("own_users", "own_file_system"), ("dropped_user",)])
def test_layers_deny_writing(layers, tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir(mode=0o755)
    outcome = with_layers(WRITE.format(out=folder / "out"), *layers)
    assert outcome.reason.startswith(("PermissionError", "OSError: [Errno 30]"))
    assert str(folder / "out") in outcome.reason
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not LINUX, reason="Linux's layers")
def test_without_any_layer_that_write_succeeds(tmp_path):
    """The other tests would show nothing if the programs failed by themselves."""
    folder = tmp_path / "outside"
    folder.mkdir()
    assert with_layers(WRITE.format(out=folder / "out")).passed
    assert (folder / "out").exists()


@pytest.mark.skipif(not LINUX, reason="Linux's layers")
def test_landlock_denies_renaming_and_new_programs(tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "kept").write_text("kept")
    assert not with_layers(f"import os; open('a', 'w'); os.rename('a', '{folder}/out')", "landlock").passed
    assert not with_layers(f"import os; os.rename('{folder}/kept', 'a')", "landlock").passed
    assert not with_layers(f"import os; os.truncate('{folder}/kept', 0)", "landlock").passed
    assert not with_layers("import subprocess; subprocess.run(['true'], check=True)", "landlock").passed
    assert (folder / "kept").read_text() == "kept"


@pytest.mark.skipif(not LINUX, reason="Linux's layers")
@pytest.mark.parametrize(
    "layers", [("own_users", "own_file_system"), ("own_users", "own_file_system", "own_processes", "dropped_user")]
)
def test_mounts_cannot_be_undone(layers, tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir()
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "libc.unshare(0x10020000)\n"  # a user namespace of its own, in which it has every right
        "for path in (b'/', b'{folder}'): libc.mount(b'none', path, None, 32 | 4096, None)\n"  # remount, bind: writable
        "libc.umount2(b'{folder}', 2)\nlibc.creat(b'{folder}/out', 0o644)\n"
    )
    with_layers(program.format(folder=folder), *layers)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("layers", [("own_users", "own_network"), ("landlock",)])
def test_layers_deny_the_network(layers):
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert with_layers(program, limits=SMALL).passed
        assert with_layers(program, *layers, limits=SMALL).reason.startswith(("OSError", "PermissionError"))


BOMB = (
    "import os\nfor n in range(100):\n    try: pid = os.fork()\n    except OSError: os._exit(n)\n"
    "    if pid == 0:\n        os.setsid()\n        while True: pass\n"
)


@pytest.mark.skipif(not LINUX, reason="looks into /proc")
@pytest.mark.parametrize("layers", [("own_users", "own_processes", "dropped_user"), ("dropped_user",), sandbox.LAYERS])
def test_fork_bomb_is_bounded_and_cleared(layers):
    outcome = with_layers(BOMB + "assert 0, 'a hundred'", *layers)
    assert outcome.reason == "exited before the tests were over"
    assert survivors() == []
    outcome = with_layers("import os\nwhile True:\n    try: os.fork()\n    except BaseException: pass", *layers)
    assert outcome.reason == "timed out after 1 s"
    assert survivors() == []


@pytest.mark.skipif(not LINUX, reason="looks into /proc")
@pytest.mark.parametrize("layers", [(), ("own_users", "own_processes")])
@pytest.mark.parametrize("end", ["", "while True: pass", "os._exit(0)"])
def test_daemons_do_not_outlive_the_program(layers, end):
    daemons = (
        "import os, signal, time\n"
        "for n in range(4):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork(): os._exit(0)\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60); os._exit(0)\n"
        "time.sleep(0.1)\n"
    )
    outcome = with_layers(daemons + end, *layers)
    assert outcome.passed == (end == "")
    assert survivors() == []


@pytest.mark.skipif(not LINUX, reason="looks into /proc")
def test_other_processes_cannot_be_signalled():
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for layers in (("own_users", "own_processes"), ("landlock",), ("dropped_user",)):
            if all(protections()[name] for name in layers):
                assert not with_layers(f"import os; os.kill({victim.pid}, 9)", *layers).passed
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_other_systems_have_the_guard_the_limits_and_the_kill(monkeypatch):
    """As on macOS: nothing of Linux is asked for."""
    start = sandbox._START.replace("main()\n", "sys.modules[main.__module__].LINUX = False\nmain()\n")
    monkeypatch.setattr(sandbox, "_START", start)
    outcome, in_force = execute("open('x', 'w').write('x')")
    assert outcome.passed
    assert in_force == {"memory_limit"} | ({"process_limit"} if os.getuid() else set())
    for program, reason in (
        ("while True: pass", "timed out after 1 s"),
        ("open('/x', 'w')", "forbidden: open /x"),
        ("x = bytearray(1 << 31)", "out of memory"),
        ("import os; os._exit(0)", "exited before the tests were over"),
    ):
        assert execute(program, SHORT)[0] == Outcome(passed=False, reason=reason)
    child = "import os, time\nif os.fork() == 0: time.sleep(60)"
    assert execute(child, SHORT, guard=False)[0].passed
