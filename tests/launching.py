"""Starts real processes with accelerate's own launcher and collects what `backend_worker` wrote."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from backend_worker import Run
from forked_python import ENVIRONMENT

REPOSITORY = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("backend_worker.py")
SECONDS = 600
"""A launch that hangs is a failure."""


PYTHON = os.environ.get("FORKED_PYTHON", sys.executable)
"""Under pytest one whose imports are done, see `forked_python`."""


def environment() -> dict[str, str]:
    """Of a program, and of the processes that it launches with torchrun."""
    return os.environ | ENVIRONMENT | {"PYTHON_EXEC": PYTHON}


def free_port() -> int:
    """A port that until it is used neither another worker of pytest-xdist nor an outgoing connection takes (from 32768 on)."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 20_000 + 1_000 * (worker % 12) + secrets.randbelow(1_000)  # not `random`, which training seeds
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port


def accelerate_command(config: str, *options: str) -> list[str]:
    """What launches the rest of a command line as the processes of `accelerate_configs/cpu/<config>.yaml`."""
    launcher = [PYTHON, "-m", "accelerate.commands.launch"]
    return [*launcher, "--config_file", f"accelerate_configs/cpu/{config}.yaml", *options]


def command(config: str, out: Path, *options: str) -> list[str]:
    return [*accelerate_command(config, *options), str(WORKER), str(out)]


def ended_well(run: subprocess.CompletedProcess) -> bool:
    """Whether a program over two processes did what it was told, which the tests then look at.

    With gloo the interpreter's own end aborts now and then, after all is done and all processes have left the group together;
    the workers of the tests avoid it (see backend_worker), a program of the package ends as any other.
    """
    return run.returncode == 0 or "terminate called without an active exception" in run.stderr


def torchrun_command() -> list[str]:
    """What launches the rest of a command line as 2 processes."""
    launcher = [PYTHON, "-m", "torch.distributed.run"]
    return [*launcher, "--nproc_per_node", "2", "--master_port", str(free_port())]


def torchrun(worker: str, out: Path) -> list[dict]:
    """What each of 2 processes of the script `worker` wrote to OUT/<rank>.pt."""
    finished = subprocess.run(
        [*torchrun_command(), str(WORKER.with_name(worker)), str(out)],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    if finished.returncode:
        raise RuntimeError(f"{worker} failed:\n{errors_in(finished.stderr)}")
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


def what_two_processes_say(worker: str, out: Path, seconds: float) -> tuple[str, str, int]:
    """(stdout, stderr, exit status) of 2 processes of the script `worker` with the argument `out`.

    Raises:
        subprocess.TimeoutExpired: they did not end in time.
    """
    finished = subprocess.run(
        [*torchrun_command(), str(WORKER.with_name(worker)), str(out)],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    return finished.stdout, finished.stderr, finished.returncode


def errors_in(said: str) -> str:
    """The end of the processes' own tracebacks, without the launcher's."""
    lines = [line for line in said.splitlines() if line.startswith("[rank") or "Error" in line]
    return "\n".join(lines[-60:])


def write_runs(runs: list[Run], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "runs.json").write_text(json.dumps([asdict(run) for run in runs]))


def results(runs: list[Run], out: Path) -> dict[str, dict]:
    return {run.name: torch.load(out / f"{run.name}.pt", weights_only=False) for run in runs}


def launch(config: str, runs: list[Run], out: Path, *options: str) -> dict[str, dict]:
    """The results of `runs`, done by the 2 processes of `accelerate_configs/cpu/<config>.yaml`.

    `options` go to the launcher.

    Raises:
        RuntimeError: with the end of what the processes said, if one failed.
    """
    write_runs(runs, out)
    arguments = command(config, out, "--main_process_port", str(free_port()), *options)
    finished = subprocess.run(
        arguments, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    if finished.returncode:
        raise RuntimeError(f"{config} failed:\n{errors_in(finished.stderr)}")
    return results(runs, out)


def launch_and_die(runs: list[Run], out: Path, config: str | None = None) -> int:
    """Start `runs`, one of which kills its process; the launcher's exit status, negative for a signal.

    In one process of its own if `config` is None.
    """
    write_runs(runs, out)
    arguments = [PYTHON, str(WORKER), str(out)]
    if config:
        arguments = command(config, out, "--main_process_port", str(free_port()))
    return subprocess.run(arguments, cwd=REPOSITORY, env=environment(), capture_output=True, timeout=SECONDS).returncode


def launch_on_two_machines(config: str, runs: list[Run], out: Path) -> dict[str, dict]:
    """The results of `runs`, done under two launchers that meet over the network, one process each."""
    write_runs(runs, out)
    port = str(free_port())
    logs = [out / f"machine_{machine}.log" for machine in range(2)]
    agents = []
    try:
        for machine, log in enumerate(logs):
            arguments = command(config, out, "--machine_rank", str(machine), "--main_process_port", port)
            with log.open("w") as file:
                agents.append(
                    subprocess.Popen(
                        arguments, cwd=REPOSITORY, env=environment(), stdout=file, stderr=file, start_new_session=True
                    )
                )
        for agent in agents:
            agent.wait(timeout=SECONDS)
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    said = [log.read_text() for log in logs]
    if any(agent.returncode for agent in agents):
        raise RuntimeError(f"{config} on two machines failed:\n{errors_in(said[0])}\n{errors_in(said[1])}")
    return results(runs, out)
