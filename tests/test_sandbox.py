"""`evaluation/sandbox.py`: what a program can do there, what it cannot, and how it ends."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from evaluation import sandbox
from evaluation.sandbox import Outcome, check_sandbox, run_program

LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
RAISE = "\nif result < 0: raise OSError(ctypes.get_errno(), '')"


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """Every program gets its folder in `scratch`: after the test it is empty, and no process works there."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield
    assert list(scratch.iterdir()) == []
    assert processes_in(scratch) == []


def processes_in(folder: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd").startswith(str(folder)):
                found.append((process / "cmdline").read_text())
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
    return found


ENDLESS = """
class Kind(type):
    @property
    def __mro__(self):
        while True: pass
class E(Exception, metaclass=Kind): pass
raise E
"""
"""Its own code is run to find out what kind of exception it raises."""


@pytest.mark.parametrize(
    "program",
    [
        "raise Exception(secret)",
        "raise ExceptionGroup(secret, [ValueError(secret)])",
        "raise type(secret, (ValueError,), {})",
        "class E(Exception):\n    def __repr__(self): return secret\n    __str__ = __repr__\nraise E",
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'failed: ' + secret.encode())\n    except OSError: pass\n"
        "os._exit(0)",
        "compile(secret + '(', secret, 'exec')",
        "import sys\nsys.exit(secret)",
    ],
)
def test_what_a_program_has_read_stays_inside(program, tmp_path):
    """`reason` goes to results.json, which people pass on; an exception's text or name may be a file's content."""
    (tmp_path / "secret").write_text("precious")
    outcome = run_program(f"secret = open({str(tmp_path / 'secret')!r}).read()\n{program}", "")
    assert not outcome.passed and "precious" not in outcome.reason
    kinds = "Exception|ExceptionGroup|ValueError|SyntaxError|SystemExit|an exception without a type"
    assert re.fullmatch(f"failed: ({kinds})|ended before its tests did .exit code 0.", outcome.reason)


def test_right_and_wrong_programs():
    program = "def double(x):\n    return 2 * x\n"
    assert run_program(program, "assert double(2) == 4") == Outcome(True, "passed")
    assert run_program(program, "assert double(2) == 5, 'not five'") == Outcome(False, "failed: AssertionError")
    assert run_program("def double(x:\n", "pass").reason.startswith("failed: SyntaxError")
    assert run_program(program + "'\ud800'", "pass").reason.startswith("failed: UnicodeEncodeError")


def test_reading_and_the_standard_library_work():
    program = """
import collections, dataclasses, datetime, decimal, functools, hashlib, heapq, itertools, json, math, os, random, re
import statistics, string, time, typing, unittest

@dataclasses.dataclass
class Point:
    x: "int"

assert Point(1) == Point(1) and Point.__module__ == "solution"
assert open(os.__file__).readline() and os.listdir("/") and os.path.exists(os.getcwd()) and not os.path.exists("nothing")
time.sleep(0.01)
random.random(), datetime.datetime.now(), os.urandom(4), re.sub("a", "b", "a"), hashlib.sha256(b"").hexdigest()
print("something"); print("ä", file=__import__("sys").stderr)
"""
    assert run_program(program, "") == Outcome(True, "passed")


def test_sets_have_the_same_order_every_time():
    """Otherwise a program that depends on it would pass in one evaluation and fail in the next."""
    program = "raise Exception(list({'a', 'b', 'c', 'd', 'e', 'f', 'g'}))"
    assert len({run_program(program, "").reason for _ in range(3)}) == 1


def test_only_the_standard_library():
    assert run_program("import numpy", "").reason.startswith("failed: ModuleNotFoundError")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os\nos._exit(0)", "ended before its tests did (exit code 0)"),
        ("import sys\nsys.exit(0)", "failed: SystemExit"),
        ("raise SystemExit", "failed: SystemExit"),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
        ("print('passed')\nimport os\nos._exit(0)", "ended before its tests did (exit code 0)"),
        ("import os\nfor fd in range(64):\n    try: os.write(fd, b'passed')\n    except OSError: pass", "ended before"),
        ("import os, signal\nos.abort()", "ended before its tests did (SIG"),
        ("import ctypes\nctypes.string_at(0)", "ended before its tests did (SIGSEGV)"),
        ("import builtins\nbuiltins.exec = builtins.compile = print", "failed: AssertionError"),
        ("import os\nos.write = os._exit = lambda *a: None\ndel __builtins__", "failed: AssertionError"),
        ("import __main__\n__main__.FAILED = __main__.READY = b''\n", "ended before its tests did"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "failed: Exception"),
        (ENDLESS.replace("while True: pass", "1 / 0"), "failed: an exception without a type"),
        ("import atexit, os\natexit.register(os._exit, 0)", "failed: AssertionError"),
        ("'''", "failed: SyntaxError"),  # an open string does not swallow the tests
    ],
)
def test_a_program_cannot_declare_itself_right(program, reason):
    outcome = run_program(program, "assert False")
    assert not outcome.passed
    assert reason in outcome.reason


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "while True: print('x' * 10 ** 6)",
        "import signal\nfor number in range(1, 32):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except OSError: pass\nwhile True: pass",
        ENDLESS,
    ],
)
def test_time_has_a_limit(program):
    assert run_program(program, "", timeout=0.5) == Outcome(False, "timed out after 0.5 s")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise Exception('x' * 10 ** 6)", "failed: Exception"),
        (
            "import os\nfor fd in range(3, 64):\n    try:\n        while True: os.write(fd, b'x' * 999)\n"
            "    except OSError: pass",
            "ended before its tests did",
        ),
    ],
)
def test_output_has_a_limit(program, reason):
    outcome = run_program(program, "", timeout=60)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)
    assert len(outcome.reason) < 600


@pytest.mark.parametrize(
    "program", ["x = bytearray(2 ** 29)", "x = []\nwhile True: x.append(bytearray(2 ** 20))", "x = [0] * 10 ** 11"]
)
def test_memory_has_a_limit(program):
    assert run_program(program, "", timeout=60) == Outcome(False, "failed: MemoryError")
    assert run_program("x = bytearray(2 ** 28)", "", timeout=60).passed, "half of it may be used"
    assert run_program("x = bytearray(2 ** 28)", "", timeout=60, memory_bytes=2**28).reason == "failed: MemoryError"


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import _thread\ntry: _thread.start_new_thread(print, ())\nexcept RuntimeError: raise PermissionError",
        "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
        "import subprocess\nsubprocess.run(['touch', VICTIM])",
        "import os\nos.posix_spawn('/bin/sh', ['sh'], {})",
        "import os\nos.execv('/bin/sh', ['sh', '-c', 'exit 0'])",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.killpg(os.getpgid(os.getppid()), 9)",
        "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "import resource\nresource.prlimit(0, resource.RLIMIT_AS, (-1, -1))",
        "open('here', 'w')",
        "open(VICTIM, 'w')",
        "open(VICTIM, 'a')",
        "open(VICTIM, 'r+')",
        "import os\nos.open(VICTIM, os.O_RDONLY | os.O_TRUNC)",
        "import os\nos.open(NEW, os.O_RDONLY | os.O_CREAT)",
        "import os\nos.open('.', os.O_TMPFILE | os.O_RDWR)",
        "open('/proc/self/mem', 'r+b')",
        "import os\nos.open(f'/proc/{os.getppid()}/mem', os.O_RDWR)",
        "import os\nos.remove(VICTIM)",
        "import os\nos.rename(VICTIM, NEW)",
        "import os\nos.truncate(VICTIM, 0)",
        "import os\nos.chmod(VICTIM, 0)",
        "import os\nos.chown(VICTIM, 1, 1)",
        "import os\nos.utime(VICTIM, (0, 0))",
        "import os\nos.setxattr(VICTIM, 'user.a', b'')",
        "import os\nos.link(VICTIM, NEW)",
        "import os\nos.symlink(VICTIM, NEW)",
        "import os\nos.mkdir(NEW)",
        "import os\nos.mkfifo(NEW)",
        "import os\nos.chdir('/')",
        "import os\nos.chroot('/')",
        "import os\nos.setuid(1)",
        "import os\nos.memfd_create('a')",
        "import shutil, os\nshutil.rmtree(os.path.dirname(VICTIM))",
        "import socket\nsocket.create_connection(('127.0.0.1', PORT))",
        "import urllib.request\nurllib.request.urlopen(f'http://127.0.0.1:{PORT}')",
        LIBC + "result = libc.unlink(VICTIM.encode())" + RAISE,
        LIBC + "result = libc.syscall(425, 8, bytes(120))" + RAISE,  # io_uring_setup
    ],
)  # fmt: skip
def test_nothing_is_harmed(program, tmp_path):
    """Each of these fails with `PermissionError` and leaves everything as it was, for root as well."""
    victim = tmp_path / "home" / "victim"
    victim.parent.mkdir()
    victim.write_text("precious")
    before = victim.stat()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        names = f"VICTIM, NEW, PORT = {str(victim)!r}, {str(victim.parent / 'new')!r}, {server.getsockname()[1]}\n"
        outcome = run_program(names + program, "")
        with pytest.raises(BlockingIOError):  # nobody has connected
            server.accept()
    assert not outcome.passed
    assert re.match(r"failed: (PermissionError|OSError)$", outcome.reason)
    assert victim.read_text() == "precious"
    after = victim.stat()
    assert (after.st_mode, after.st_uid, after.st_nlink, after.st_mtime_ns) == (
        before.st_mode, before.st_uid, before.st_nlink, before.st_mtime_ns,
    )  # fmt: skip
    assert [path.name for path in victim.parent.iterdir()] == ["victim"]


def test_a_program_that_goes_on_after_it_was_refused_is_still_held():
    """Refusals do not wear off, and a program that does no more than try is judged by its tests."""
    program = "import os\nfor _ in range(1000):\n    try: os.fork()\n    except PermissionError: pass\nanswer = 42"
    assert run_program(program, "assert answer == 42") == Outcome(True, "passed")


def test_nothing_outlives_a_killed_evaluation(tmp_path):
    """Also a program that ignores all signals and uses no processor time."""
    program = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)"
    script = f"import sandbox; sandbox.run_program({program!r}, '', timeout=1000)"  # without torch, it begins at once
    folder = tmp_path / "killed"
    folder.mkdir()
    evaluation = subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(sandbox.__file__).parent, env=os.environ | {"TMPDIR": str(folder)}
    )
    try:
        wait_for(lambda: len(processes_in(folder)) == 1)
    finally:
        evaluation.kill()
        evaluation.wait()
    wait_for(lambda: processes_in(folder) == [])


def wait_for(condition, seconds: float = 60.0) -> None:
    """60 s: it takes well below one, but the machine may be busy."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_sandbox_holds_here():
    check_sandbox()


def test_without_a_filter_nothing_runs(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sandbox.platform, "machine", lambda: "riscv64")
        with pytest.raises(ValueError, match="needs Linux on x86_64 or aarch64, but this is linux on riscv64"):
            run_program("", "")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(ValueError, match="but this is darwin on .* Use a Linux machine"):
            run_program("", "")


def test_a_filter_for_another_machine_kills():
    """A process that makes system calls of another architecture does not get past the filter."""
    other = next(machine for machine in sandbox.MACHINES if machine != sandbox.platform.machine())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox.platform, "machine", lambda: other)
        with pytest.raises(ValueError, match="could not be set up .SIGSYS."):
            run_program("", "")


def decide(instructions, machine: str, number: int, arguments=(0,) * 6) -> str:
    """What the kernel does with a system call: the few BPF instructions that the filter uses."""
    data = number.to_bytes(4, "little") + sandbox.MACHINES[machine][1].to_bytes(4, "little") + bytes(8)
    data += b"".join(argument.to_bytes(8, "little") for argument in arguments)
    position, loaded = 0, 0
    while True:
        code, if_true, if_false, operand = instructions[position]
        position += 1
        if code == 0x20:
            loaded = int.from_bytes(data[operand : operand + 4], "little")
        elif code == 0x15:
            position += if_true if loaded == operand else if_false
        elif code == 0x45:
            position += if_true if loaded & operand else if_false
        else:
            assert code == 0x06
            return {0x7FFF0000: "allow", 0x80000000: "kill", 0x00050001: "deny"}[operand]


@pytest.mark.parametrize(
    ("machine", "header"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_the_filter_lets_through_what_is_listed(machine, header):
    """Every number that the kernel's own header has, decided by the filter; on both machines, whichever this is."""
    if not Path(header).exists():
        pytest.skip(f"no {header} here: it comes with linux-libc-dev")
    calls = {
        # the generic table has two names for some numbers
        {"fstatat": "newfstatat"}.get(name, name): int(number)
        for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text())
    }
    column, filter_ = sandbox.MACHINES[machine][0], sandbox._filter(machine)
    allowed = {name for name, number in calls.items() if decide(filter_, machine, number) == "allow"}
    listed = {name for name, numbers in (sandbox.ALLOWED | sandbox.OPENING).items() if numbers[column] is not None}
    assert allowed == listed

    for name in listed & sandbox.OPENING.keys():
        for flags, decision in (
            (os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY, "allow"), (os.O_WRONLY, "deny"), (os.O_RDWR, "deny"),
            (os.O_CREAT, "deny"), (os.O_TRUNC, "deny"), (os.O_APPEND | os.O_WRONLY, "deny"), (3, "deny"),
        ):  # fmt: skip
            arguments = [0] * 6
            arguments[sandbox.OPEN_FLAGS[name]] = flags
            assert decide(filter_, machine, calls[name], arguments) == decision, (name, flags)
    x32 = 0x40000000
    assert decide(filter_, machine, x32 + calls["read"]) == "deny"
    other = next(name for name in sandbox.MACHINES if name != machine)
    assert decide(filter_, other, calls["read"]) == "kill"
