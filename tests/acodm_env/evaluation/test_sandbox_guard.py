"""The guard inside of the interpreter, alone."""

import pytest
from sandboxed import SHORT, nothing_left, with_layers  # noqa: F401

from acodm_env.evaluation.sandbox import execute, run_program


@pytest.mark.parametrize(
    "program",
    [
        "open('{out}', 'w').write('x')",
        "open('{out}', 'ab')",
        "open(b'{out}', 'w')",
        "import pathlib; pathlib.Path('{out}').write_text('x')",
        "class S(str):\n    def __str__(self): return 'inside'\nopen(S('{out}'), 'w')",
        "import os; os.open('{out}', os.O_CREAT)",
        "import os; os.mkdir('{out}')",
        "import os; os.chdir('{folder}'); open('out', 'w')",
        "import os; os.symlink('{folder}', 'link'); open('link/out', 'w')",
        "import os; os.symlink('{out}', 'link'); open('link', 'w')",
        "import os; open('a', 'w'); os.rename('a', '{out}')",
        "import os; open('a', 'w'); os.link('a', '{out}')",
        "import os; os.symlink('a', '{out}')",
        "import os; d = os.open('{folder}', os.O_RDONLY); os.open('out', os.O_CREAT | os.O_WRONLY, dir_fd=d)",
        "import sqlite3; sqlite3.connect('{out}')",
        "import os; os.system('touch {out}')",
        "import subprocess; subprocess.run(['touch', '{out}'])",
        "import ctypes; ctypes.CDLL(None).creat(b'{out}', 0o644)",
        "import os; os.remove('{kept}')",
        "import os; os.rename('{kept}', 'a')",
        "import os; os.link('{kept}', 'a'); open('a', 'w')",
        "import os; os.truncate('{kept}', 0)",
        "import os; os.chmod('{kept}', 0)",
        "import os; os.utime('{kept}', (0, 0))",
        "import os; f = open('{kept}'); os.chmod(f.fileno(), 0)",
        "import shutil; shutil.rmtree('{folder}')",
        "open('../out', 'w')",
        "import os; os.mkfifo('{out}')",
    ],
)
def test_writing_outside_is_forbidden(program, tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir()
    kept = folder / "kept"
    kept.write_text("kept")
    before = kept.stat()
    text = program.format(out=folder / "out", folder=folder, kept=kept)
    caught = "try:\n" + "".join(f"    {line}\n" for line in text.splitlines()) + "except Exception: pass"
    outcome = execute(caught, SHORT, layers=())[0]  # the guard alone
    assert not outcome.passed
    assert outcome.reason.startswith("forbidden: ")
    assert [path.name for path in folder.iterdir()] == ["kept"]
    assert kept.read_text() == "kept"
    assert (kept.stat().st_mode, kept.stat().st_mtime) == (before.st_mode, before.st_mtime)
    assert not (tmp_path / "temporary" / "out").exists()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os\nwhile True: os.fork()", "forbidden: os.fork"),
        ("import multiprocessing as m; m.get_context('fork').Process(target=print).start()", "forbidden: os.fork"),
        ("import subprocess; subprocess.run(['ls'])", "forbidden: subprocess.Popen ls"),
        ("import _posixsubprocess; _posixsubprocess.fork_exec()", "forbidden: fork_exec"),
        ("import multiprocessing as m; m.get_context('spawn').Process(target=print).start()", "forbidden: fork_exec"),
        ("import resource; resource.prlimit(1, resource.RLIMIT_CPU)", "forbidden: resource.prlimit"),
        ("import socket; socket.socket()", "forbidden: socket.__new__"),
        ("import socket; socket.getaddrinfo('localhost', 80)", "forbidden: socket.getaddrinfo"),
        ("import socket; socket.socket(socket.AF_UNIX).connect('/run/x')", "forbidden: socket.connect"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1')", "forbidden: socket.getaddrinfo"),
        ("import ctypes; ctypes.CDLL(None)", "forbidden: ctypes.dlopen"),
        ("import ctypes; ctypes.string_at(0)", "forbidden: ctypes."),
        ("import os; os.kill(os.getppid(), 9)", "forbidden: os.kill"),
        ("import os; os.killpg(0, 9)", "forbidden: os.killpg"),
        ("import syslog; syslog.syslog('x')", "forbidden: syslog"),
    ],
)
def test_processes_sockets_and_foreign_code_are_forbidden(program, reason):
    outcome = run_program(program, SHORT)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)


SEARCH = (
    "import os, re, sys, types\n"
    "found, seen = [], set()\n"
    "def search(x, depth=0):\n"
    "    if depth > 12 or id(x) in seen: return\n"
    "    seen.add(id(x)); \n"
    "    if isinstance(x, (bytes, str)):\n"
    "        if len(x) == 32: found.append(x)\n"
    "        return\n"
    "    parts = []\n"
    "    if isinstance(x, dict): parts += list(x.items())\n"
    "    elif isinstance(x, (list, tuple, set, frozenset)): parts += list(x)\n"
    "    elif isinstance(x, types.FrameType): parts += [x.f_locals, x.f_globals, x.f_back]\n"
    "    elif isinstance(x, types.FunctionType):\n"
    "        parts += [c.cell_contents for c in x.__closure__ or ()] + [x.__globals__, x.__defaults__]\n"
    "    elif isinstance(x, types.ModuleType): parts.append(vars(x))\n"
    "    for part in parts: search(part, depth + 1)\n"
    "try: raise ValueError\n"
    "except ValueError as error: search(error.__traceback__.tb_frame)\n"
    "search(dict(sys.modules))\n"
    "for secret in found:\n"
    "    for number in range(3, 20):\n"
    "        try: os.write(number, (secret if isinstance(secret, bytes) else secret.encode()) + b'\\n')\n"
    "        except OSError: pass\n"
    "os._exit(0)\n"
)


@pytest.mark.parametrize(
    "program",
    [
        "import gc; gc.get_objects()",
        "import gc; gc.get_referrers(1)",
        "import sys; sys.addaudithook(print)",
        "import sys; sys._current_frames()",
        SEARCH,
        "import sys, os; sys.audit('acodm.program.ended'); os._exit(0)",
        "import os\nfor n in range(3, 20):\n    try: os.write(n, b'passed\\n')\n    except OSError: pass\nos._exit(0)",
        "import os, sys, time\nsys.audit = print",
        "import __main__; __main__.main(); raise SystemExit",
    ],
)
def test_a_pass_cannot_be_claimed(program):
    assert not run_program(program).passed


def test_a_forked_copy_cannot_pass_for_the_program():
    assert not with_layers("import os\nif os.fork():\n    os.waitpid(-1, 0); os._exit(0)").passed
