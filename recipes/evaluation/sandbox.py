"""Run an unreviewed program, such as one that a model wrote, where it can do no harm.

Each program gets its own Python process, which runs this file as a script and gives up all rights that it does not need
before it runs the program's first line. A seccomp filter enforces this, even for root: the system calls in `ALLOWED` pass,
files can be opened for reading, and everything else fails with `PermissionError`. So the program has no other processes or
threads, no network and no signals to others, and can create, change or remove nothing on disk. It can read any file that the
user can (as root also devices, and reading a few of those has effects), but has nowhere to send the contents. Time, memory
and output are limited.

It cannot stop lies: the tests run in the program's interpreter, as in HumanEval's own harness, so a program can fake its own
result. It can return an object that is equal to everything, replace a builtin that the tests use, or search frames and memory
for the nonce that proves success. So the score of a model that was trained to cheat means nothing until somebody has read its
programs. They still do no harm.
"""

import builtins
import json
import os
import platform
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""By `uname`: the column in the tables below, and the machine's AUDIT_ARCH, which accompanies every system call."""

# An allow list, since later kernels may add calls: io_uring, say, opens files that a deny list would miss.
# Numbers: (x86_64, aarch64); None: aarch64 never had this call.
ALLOWED = {
    # read and stat files, list folders; writing needs a file opened for it, and only the verdict's is
    "read": (0, 63), "readv": (19, 65), "pread64": (17, 67), "lseek": (8, 62), "close": (3, 57), "write": (1, 64),
    "stat": (4, None), "lstat": (6, None), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78),
    "getdents64": (217, 61), "getcwd": (79, 17),
    # its own memory, up to RLIMIT_AS
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "brk": (12, 214),
    # time, sleep, random bytes, its identity and machine
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "getrandom": (318, 278), "getpid": (39, 172), "gettid": (186, 178),
    "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "uname": (63, 160), "sysinfo": (99, 179), "getrusage": (98, 165), "times": (100, 153), "sched_getaffinity": (204, 123),
    # locks, its own signal handlers, exit
    "futex": (202, 98), "sched_yield": (24, 124), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "restart_syscall": (219, 128), "exit": (60, 93),
    "exit_group": (231, 94),
}  # fmt: skip
OPENING = {"open": (2, None), "openat": (257, 56)}
OPEN_FLAGS = {"open": 1, "openat": 2}
"""Index of the flags argument. (`openat2` keeps its flags in memory, which a filter cannot read.)"""

VERDICT_BYTES = 4096
READY = b"ready\n"
FAILED = b"failed: "
BUILT_IN = {
    id(kind): kind.__name__
    for kind in vars(builtins).values()
    if isinstance(kind, type) and issubclass(kind, BaseException)
}
UNKNOWN = "an exception without a type"


@dataclass(frozen=True)
class Outcome:
    """The result of a program: `reason` is "passed", or why not."""

    passed: bool
    reason: str


def run_program(program: str, tests: str, timeout: float = 10.0, memory_bytes: int = 512 * 2**20) -> Outcome:
    """Run `program`, and then `tests` in its namespace; it passes if both finish without an exception.

    Only the standard library can be imported. Safe to call from several threads.

    Args:
        timeout: in seconds, including the start of the interpreter (a few hundredths).

    Raises:
        ValueError: this machine offers no protection; nothing was run.
    """
    machine = _machine()
    nonce = secrets.token_hex(16)
    job = {
        "program": program,
        "tests": tests,
        "nonce": nonce,
        "parent": os.getpid(),
        "machine": machine,
        "memory_bytes": memory_bytes,
        "cpu_seconds": int(timeout) + 2,  # the wall-clock limit hits first, unless this process is killed
    }
    # -s -S: no site-packages, so that a score does not depend on installed packages, and for a quick start.
    # PYTHONHASHSEED: sets have the same order every time.
    interpreter = [sys.executable, "-s", "-S", "-B", str(Path(__file__).resolve())]
    timed_out, ending = False, "exit code 0"
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        verdict_file = Path(folder, "verdict")
        # A file, not a pipe, since the kernel limits its size; opened for appending, so that its contents stay.
        with verdict_file.open("ab") as verdict:
            try:
                subprocess.run(
                    interpreter,
                    input=json.dumps(job).encode(),
                    stdout=subprocess.DEVNULL,
                    stderr=verdict,
                    cwd=folder,
                    env={"PYTHONHASHSEED": "0"},
                    start_new_session=True,
                    timeout=timeout,
                    check=True,
                )
            except subprocess.TimeoutExpired:  # killed and waited for; it could not have children
                timed_out = True
            except subprocess.CalledProcessError as error:
                code = error.returncode
                ending = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        written = verdict_file.read_bytes()
    if timed_out:
        return Outcome(False, f"timed out after {timeout:g} s")
    if not written.startswith(READY):
        raise ValueError(
            f"The sandbox for generated programs could not be set up ({ending}): {written.decode(errors='replace').strip()} "
            "Without it, no program is run. Use a Linux machine or container that allows seccomp filters."
        )
    message = written.removeprefix(READY)
    if message == nonce.encode():
        return Outcome(True, "passed")
    if message.startswith(FAILED):  # the program may have written this itself, so only a type is reported
        kind = message.removeprefix(FAILED).decode(errors="replace")
        return Outcome(False, f"failed: {kind if kind in BUILT_IN.values() else UNKNOWN}")
    return Outcome(False, f"ended before its tests did ({ending})")


def check_sandbox() -> None:
    """Check that programs can be run here, and that forbidden actions fail.

    Raises:
        ValueError: they cannot, or one succeeds.
    """
    outcome = run_program(PROBE, "", timeout=60)  # a busy machine should not count as a failure
    if not outcome.passed:
        raise ValueError(
            f"The sandbox for generated programs does not hold on this machine ({outcome.reason}), so none is run. Use "
            "another Linux machine or container."
        )


PROBE = """
import os, socket
for attempt in (lambda: open("probe", "w"), lambda: os.unlink("verdict"), os.fork, socket.socket, lambda: os.kill(1, 0)):
    try:
        attempt()
    except PermissionError:
        continue
    raise RuntimeError("something that is forbidden went through")
"""


def _machine() -> str:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES:
        raise ValueError(
            f"Generated programs are run in a sandbox that needs Linux on {' or '.join(MACHINES)}, but this is "
            f"{sys.platform} on {machine}. Use a Linux machine or container."
        )
    return machine


# --- in the new process, which has only the standard library ----------------------------------------------------


def _launch() -> NoReturn:
    sys.path.pop(0)  # the folder of this file; not the option `-P`, which Python 3.10 lacks
    job = json.load(sys.stdin)
    verdict = os.dup(2)
    os.dup2(1, 2)
    try:
        _give_up_rights(job.pop("parent"), job.pop("machine"), job.pop("memory_bytes"), job.pop("cpu_seconds"))
    except Exception as error:
        os.write(verdict, repr(error).encode())
        os._exit(1)
    os.write(verdict, READY)
    _run(verdict, **job)


def _run(verdict: int, program: str, tests: str, nonce: str) -> NoReturn:
    # The program may replace anything that is looked up by name, so everything needed afterwards is bound beforehand.
    execute, write, leave, kind = exec, os.write, os._exit, _kind
    message = nonce.encode()
    try:
        compiled_tests = compile(tests, "tests", "exec")
        solution = types.ModuleType("solution")
        sys.modules["solution"] = solution  # dataclasses and others look up a class's module
        execute(compile(program, "solution", "exec"), solution.__dict__)
        execute(compiled_tests, solution.__dict__)
    except BaseException as error:  # SystemExit included
        message = kind(error)
    write(verdict, message)
    leave(0)


def _kind(error: BaseException) -> bytes:
    """Only the built-in type of the exception: its text, or a class name of its own, might leak a file it has read."""
    try:
        return FAILED + next(BUILT_IN[id(kind)] for kind in type(error).__mro__ if id(kind) in BUILT_IN).encode()
    except BaseException:  # no memory left
        return FAILED + UNKNOWN.encode()


def _give_up_rights(parent: int, machine: str, memory_bytes: int, cpu_seconds: int) -> None:
    # Imported here: Windows has no `resource`, but this module should be importable there.
    import ctypes
    import resource

    PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
    SECCOMP_MODE_FILTER = 2
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]

    def prctl(option: int, first: int, second: int = 0) -> None:
        if libc.prctl(option, first, second, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl {option} was refused: {os.strerror(ctypes.get_errno())}")

    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no program outlives a killed evaluation
    if os.getppid() != parent:  # killed already
        os._exit(1)
    prctl(PR_SET_DUMPABLE, 0)  # programs that run in parallel cannot read each other's memory
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, VERDICT_BYTES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))

    instructions = _filter(machine)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in instructions))
    program = ctypes.create_string_buffer(struct.pack("HP", len(instructions), ctypes.addressof(code)))
    prctl(PR_SET_NO_NEW_PRIVS, 1)  # the kernel accepts a filter only from a process that cannot gain rights
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def _filter(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter as BPF instructions: (code, instructions to skip if true, to skip if false, operand).

    It runs for every system call, on `struct seccomp_data`: number at byte 0, AUDIT_ARCH at 4, 64-bit arguments from 16 on.
    """
    LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
    ALLOW, KILL, DENY = 0x7FFF0000, 0x80000000, 0x00050000 | 1  # with EPERM, which Python raises as PermissionError
    column, audit_arch = MACHINES[machine]
    to_change = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    # The numbers mean something else if the process switches to another architecture (32-bit calls on x86_64).
    instructions = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit_arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            instructions += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    for name, numbers in OPENING.items():
        if (number := numbers[column]) is not None:
            instructions += [
                (EQUAL, 0, 4, number),
                (LOAD, 0, 0, 16 + 8 * OPEN_FLAGS[name]),  # the lower half: both machines are little-endian
                (ANY_BIT, 1, 0, to_change),
                (RETURN, 0, 0, ALLOW),
                (RETURN, 0, 0, DENY),
            ]
    return [*instructions, (RETURN, 0, 0, DENY)]


if __name__ == "__main__":
    _launch()
