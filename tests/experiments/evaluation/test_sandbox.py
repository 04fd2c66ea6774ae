import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sandboxed import LINUX, SHORT, SMALL, TOKEN, none_left, nothing_left, survivors, with_layers  # noqa: F401

from acodm_env.errors import AcodmError, ConfigError
from acodm_env.experiments.evaluation.sandbox import execute as sandbox
from acodm_env.experiments.evaluation.sandbox.execute import (
    Limits,
    Outcome,
    SandboxError,
    execute,
    protections,
    run_program,
    run_programs,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")


# --- what passes -------------------------------------------------------------------------------------------


def test_right_program_passes():
    program = "def add(a, b):\n    return a + b\n\ndef check(f):\n    assert f(2, 3) == 5\n\ncheck(add)\n"
    assert run_program(program) == Outcome(passed=True, reason="passed")


@pytest.mark.parametrize(
    "program",
    [
        "",
        "import numpy; assert numpy.ones(3).sum() == 3",  # it imports ctypes, and calls nothing by it
        "import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3",
        "import threading\nt = threading.Thread(target=print); t.start(); t.join()",
        "import json, random, re, math, string, hashlib, collections, itertools, heapq, typing, fractions",
        "print('é' * 100); import sys; assert sys.stdin.read() == ''",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1) == A(1)",
        "assert __name__ == 'builtins'",  # as exec(program, {}) has it
        "import doctest; doctest.testmod()",
    ],
)
def test_ordinary_programs_pass(program):
    assert run_program(program).reason == "passed"


def test_files_in_its_own_folder():
    program = (
        "import os, shutil, tempfile, pathlib\n"
        "assert os.listdir('.') == []\n"
        "with open('a', 'w') as file: file.write('x')\n"
        "os.rename('a', 'b'); os.symlink('b', 'c'); os.link('b', 'd'); os.chmod('b', 0o600); os.utime('b')\n"
        "assert open('c').read() == 'x'\n"
        "os.symlink('/etc', 'e'); os.remove('e')\n"
        "os.makedirs('f/g'); pathlib.Path('f/g/h').touch(); shutil.rmtree('f')\n"
        "with tempfile.TemporaryDirectory() as folder: open(os.path.join(folder, 'x'), 'w').close()\n"
        "open(os.devnull, 'w').write('x')\n"
        "os.mkdir('locked'); open('locked/x', 'w').close(); os.chmod('locked', 0)\n"
    )
    assert run_program(program).reason == "passed"
    assert with_layers(program).reason == "passed"
    assert with_layers(program, "landlock").reason == "passed"


def test_environment_is_empty(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = "import os, sys\nassert 'secret' not in str(os.environ) + str(sys.argv)\nassert os.listdir('.') == []\n"
    assert run_program(program).reason == "passed"
    if LINUX:
        assert run_program("assert b'secret' not in open('/proc/self/environ', 'rb').read()").reason == "passed"


def test_sets_have_the_same_order_every_time():
    reasons = {run_program("assert 0, list({str(i) for i in range(20)})").reason for _ in range(3)}
    assert len(reasons) == 1


# --- what fails, and is said -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("assert 1 == 2", "AssertionError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("x = '\ud800'", "UnicodeEncodeError"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("input()", "EOFError: EOF when reading a line"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("class E(BaseException):\n    def __str__(self): raise self\nraise E", "E"),
        ("raise ValueError('long ' * 1000)", "ValueError: long long"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        # exits
        ("raise SystemExit", "exited before the tests were over"),
        ("import sys; sys.exit(0)", "exited before the tests were over"),
        ("import os; os._exit(0)", "exited before the tests were over"),
        ("import os; os._exit(200)", "exited before the tests were over"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("import os, signal; os.abort()", "killed by SIGABRT"),
    ],
)
def test_failures_are_said(program, reason):
    outcome = run_program(program)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)
    assert len(outcome.reason) <= 300


def test_deep_recursion_is_no_pass():
    program = (
        "import sys; sys.setrecursionlimit(10**9)\n"
        "class A:\n    def __getattr__(self, n): return getattr(self, n)\n"
        "A().x"
    )
    assert not run_program(program, SMALL).passed


def test_endless_loops_are_timed_out():
    for program in (
        "while True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import signal\nfor n in range(1, 32):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True: pass",
        "import time; time.sleep(100)",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    ):
        begun = time.monotonic()
        assert run_program(program, Limits(seconds=0.3)) == Outcome(passed=False, reason="timed out after 0.3 s")
        assert time.monotonic() - begun < 15


def test_output_is_discarded():
    program = "import sys\nx = b'x' * 10**7\nfor _ in range(200): sys.stdout.buffer.write(x)\nprint('x' * 10**7)"
    assert run_program(program, Limits(seconds=60)).reason == "passed"  # 2 GB


def test_memory_hogs_run_out():
    for program in ("x = bytearray(1 << 30)", "x = []\nwhile True: x.append(bytearray(1 << 20))"):
        assert run_program(program, SMALL) == Outcome(passed=False, reason="out of memory")


def test_files_are_bounded():
    huge = "file = open('x', 'wb')\nwhile True: file.write(b'x' * (1 << 16))"
    outcome = run_program(huge, SMALL)
    assert outcome.reason.startswith("OSError: [Errno 27]")
    many = "for i in range(100): open(str(i), 'wb').write(b'x' * (1 << 20))"
    if protections()["own_file_system"]:
        assert run_program(many, SMALL).reason.startswith("OSError: [Errno 28]")


# --- the evaluation goes on --------------------------------------------------------------------------------


def test_programs_in_order():
    programs = ["import time; time.sleep(0.5)", "assert 0", "import os; os._exit(0)", "while True: pass", "x = 1"] * 2
    told: list[Outcome] = []
    outcomes = run_programs(programs, SHORT, 3, told.append)
    assert [outcome.passed for outcome in outcomes] == [True, False, False, False, True] * 2
    assert told == outcomes
    assert run_programs([]) == []


def test_an_error_in_the_callers_part_stops_the_rest():
    def fail(outcome: Outcome) -> None:
        raise ZeroDivisionError

    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        run_programs(["x = 1"] + ["while True: pass"] * 50, SHORT, 2, fail)
    assert time.monotonic() - begun < 15


@pytest.mark.skipif(not LINUX, reason="looks into /proc")
@pytest.mark.parametrize("layers", [sandbox.LAYERS, ("dropped_user",), ()])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_program_and_folder_end_with_a_killed_evaluation(layers, number, tmp_path):
    code = (
        "from acodm_env.experiments.evaluation.sandbox import execute as sandbox\n"
        f"sandbox._START = '# {TOKEN}\\n' + sandbox._START\n"
        'program = \'open("x", "w")\\nwhile True: pass\'\n'
        f"sandbox.execute(program, sandbox.Limits(seconds=20), layers={tuple(layers)})\n"
    )
    (tmp_path / "other").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "other")}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=Path.cwd()) as evaluation:
        deadline = time.monotonic() + 60
        steady = 0  # taking a user namespace has a second process, too, for a moment
        while steady < 10 and time.monotonic() < deadline:
            steady = steady + 1 if len(survivors()) >= 2 else 0
            time.sleep(0.04)
        assert len(survivors()) >= 2
        assert len(list((tmp_path / "other").iterdir())) == 1
        evaluation.send_signal(number)
    assert none_left()
    assert list((tmp_path / "other").iterdir()) == []


def test_a_layer_that_is_refused_now_is_an_error(monkeypatch):
    with pytest.raises(SandboxError, match=r"could not be set up: .*not granted now: own_moon") as caught:
        execute("x = 1", required={"own_moon"})
    assert caught.value.layer == "program"
    assert isinstance(caught.value, AcodmError)
    assert str(caught.value).count("; ") == 2  # what, the likely cause, the remedy
    assert "TMPDIR" in str(caught.value)
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    with pytest.raises(SandboxError, match="could not be set up"):
        execute("x = 1")
    monkeypatch.setattr(sandbox.sys, "executable", "/not/there")
    with pytest.raises(SandboxError, match="could not be set up"):
        execute("x = 1")
    monkeypatch.setattr(sandbox.tempfile, "tempdir", "/not/there")
    with pytest.raises(SandboxError, match="could not be set up: temporary folder"):
        execute("x = 1")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("open('/a\\nb', 'w')", "forbidden: open /a"),
        (
            "import os\nfor n in range(3, 20):\n    try: os.write(n, b'\\n one \\n 2')\n    except OSError: pass",
            "one",
        ),
        ("import os\nfor n in range(3, 20):\n    try: os.write(n, b'passed\\nx')\n    except OSError: pass", "exited"),
    ],
)
def test_a_reason_is_one_line(program, reason):
    outcome = execute(program + "\nassert 0", layers=())[0]
    assert not outcome.passed
    assert outcome.reason.startswith(reason)
    assert len(outcome.reason.splitlines()) == 1


def test_a_program_that_kills_its_supervisor_is_wrong():
    """Where no layer hinders it; the evaluation goes on."""
    outcome, _ = execute("import os, time; os.kill(os.getppid(), 9); time.sleep(9)", layers=(), guard=False)
    assert outcome == Outcome(passed=False, reason="ended with its supervisor")


def test_protections_are_told():
    told = protections()
    assert told["guard"]
    assert set(told) == {*sandbox.LAYERS, "memory_limit", "process_limit", "guard"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("seconds", 0.0), ("seconds", float("nan")), ("memory_bytes", 1000), ("file_bytes", -1), ("processes", 0)],
)
def test_bad_limits(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value}: must be"):
        Limits(**{name: value})
    with pytest.raises(ConfigError, match="workers=0"):
        run_programs(["x = 1"], workers=0)


@pytest.mark.slow
def test_seconds_per_program():
    run_program("x = 1")
    begun = time.perf_counter()
    for _ in range(20):
        assert run_program("x = 1").passed
    seconds = (time.perf_counter() - begun) / 20
    print(f"\n{seconds * 1000:.0f} ms for a program, one at a time")  # noqa: T201
    assert seconds < 2
