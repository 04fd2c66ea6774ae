"""The guard inside of the interpreter, alone."""

import pytest
from sandboxed import SHORT, nothing_left, with_layers  # noqa: F401

from acodm_env.experiments.evaluation.sandbox.execute import execute, run_program


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
        "import posix; posix.mkfifo('{out}')",
        "import posix; posix.mknod('{out}')",
        "import io, pathlib; io.FileIO(pathlib.Path('{out}'), 'w')",
        "class P:\n    paths = ['{out}', 'inside']\n    def __fspath__(self): return self.paths.pop()\n"
        "import io; io.FileIO(P(), 'w')",
        "class B(bytes):\n    def __bytes__(self): return b'inside'\nopen(B(b'{out}'), 'w')",
        "import sqlite3, pathlib; sqlite3.connect(pathlib.Path('{out}'))",
        "import sqlite3; sqlite3.connect('file:{out}?mode=rwc', uri=True)",
        # what the check calls is its own
        "import os; os.path.realpath = lambda path, **options: os.getcwd() + '/x'\nopen('{out}', 'w')",
        "import os, posixpath; posixpath._joinrealpath = lambda *args: (os.getcwd(), True)\nopen('{out}', 'w')",
        "import os; os.lstat = os.readlink = os.getcwd = os.fspath = os.fsdecode = print\nopen(b'{out}', 'w')",
        "import builtins; builtins.issubclass = builtins.isinstance = lambda *args: True\nopen('{out}', 'w')",
        "import os; os.mkfifo.__globals__['_below'] = lambda *args, **options: True\nopen('{out}', 'w')",
        "import sys; sys._getframe(1).f_globals['sandbox_guard']._WRITES = 0\nopen('{out}', 'w')",
        # a link at a path that is too long to be looked at, or locked
        "import os; os.symlink('{out}', 'link')\n"
        "for n in range(25): os.mkdir('a' * 200); os.rename('link', 'a' * 200 + '/link'); os.chdir('a' * 200)\n"
        "open('link', 'w')",
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


# Called from beneath the guard's check, or by it, these would find the secret in the frames above.
FORGE = (
    "import os, sys\n"
    "def forge(*args, **options):\n"
    "    frame = sys._getframe()\n"
    "    while frame:\n"
    "        if secret := frame.f_locals.get('secret'):\n"
    "            for number in range(3, 20):\n"
    "                try: os.write(number, secret + b'\\n')\n"
    "                except OSError: pass\n"
    "            os._exit(0)\n"
    "        frame = frame.f_back\n"
    "    return '/'\n"
)


@pytest.mark.parametrize(
    "program",
    [
        FORGE + "os.path.realpath = forge; open('x', 'w'); assert 0",
        FORGE + "os.lstat = os.fspath = os.getcwd = os.fsdecode = forge\nopen(b'x', 'w'); assert 0",
        FORGE
        + "class I(int): __ne__ = __eq__ = forge\nos.kill(I(os.getpid()), 0); sys.audit('os.kill', I(1)); assert 0",
        FORGE + "class P: __fspath__ = __repr__ = forge\nsys.audit('os.remove', P(), P()); assert 0",
        FORGE + "class E(str): __eq__ = __hash__ = forge\nsys.audit(E('x')); assert 0",
        FORGE + "class E: __eq__ = forge\nsys._getframe(1).f_globals['sandbox_guard'].ENDED = E(); open('x'); assert 0",
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


def test_paths_inside_are_allowed():
    program = (
        "import io, os, pathlib, sqlite3\n"
        "path = pathlib.Path('a')\n"
        "os.mkdir(path); os.rename(path, pathlib.Path('b')); os.rmdir(pathlib.Path('b'))\n"
        "path.write_text('x'); os.symlink(path, pathlib.Path('c')); os.truncate(path, 0); os.chmod(path, 0o600)\n"
        "os.link(path, pathlib.Path('d')); os.utime(path); os.remove(pathlib.Path('d'))\n"
        "with open(path, 'ab') as file: file.write(b'x')\n"
        "assert io.FileIO(path).read() == b'x' == open('c', 'rb').read()\n"  # reading may be anywhere, by any path
        "os.mkdir('e'); os.symlink('../a', 'e/f'); os.symlink(os.path.abspath('e'), 'g')\n"
        "open('g/f', 'w').close(); open('./e//../a', 'w').close(); open(os.path.abspath('g/h'), 'w').close()\n"
        "sqlite3.connect('x.db').close(); open('/dev/../dev/null', 'w').close()\n"
        "os.close(os.open('.', os.O_RDONLY)); os.open(os.getcwd(), os.O_RDONLY)\n"
        "try: open('missing/x', 'w')\nexcept FileNotFoundError: pass\n"
        "try: open('a/x', 'w')\nexcept NotADirectoryError: pass\n"
        "try: open('a\\0', 'w')\nexcept ValueError: pass\n"
    )
    assert execute(program, layers=())[0].reason == "passed"
