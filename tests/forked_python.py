"""A `python` whose imports are done: it runs programs in forks of a process that has imported torch, TRL and the package.

The tests start about a hundred processes; importing costs each of them 7 s of processor time, more than most then use.
`install` writes an executable that takes the arguments of `python`: `[-u] SCRIPT …` or `[-u] -m MODULE …`. `launching` starts
accelerate's launcher with it, and torchrun's workers by way of `PYTHON_EXEC`. A fork server runs the program, with the
arguments, environment, folder and streams that the executable was given; signals are passed on, and both end the same way.

What new processes do not share is not shared here: ranks hash strings differently, so there are two servers, and a
program without DeepSpeed must not find it imported, so each has a twin that has. They start with the first program, and end
with the process that called `install`.

    python forked_python.py run FOLDER …        what the executable does
    python forked_python.py serve FOLDER LISTENER LISTENER
"""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SERVERS = ("even", "odd")
"""By the rank."""
TWINS = ("plain", "deepspeed")
READ_AT_IMPORT = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME", "OMP_NUM_THREADS")
"""Variables that must be the same for a program as for the servers."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""One thread each: two processes share two cores, and the order of sums does not depend on the machine."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def install() -> Path:
    """The executable, in a temporary folder of its own; nothing starts yet."""
    folder = Path(tempfile.mkdtemp(prefix="forked_python_"))
    (folder / "environment.json").write_text(json.dumps(os.environ | ENVIRONMENT))
    (folder / "owner").write_text(str(os.getpid()))
    executable = folder / "python"
    # -I -S: the client needs neither the environment's nor the site's modules
    words = (sys.executable, "-I", "-S", __file__, "run", str(folder))
    executable.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    executable.chmod(0o755)
    return executable


def import_deepspeed():
    """DeepSpeed, without its CPU kernel for inference, which no test uses and which takes two minutes to compile."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


# --- the client -------------------------------------------------------------------------------------------------------


def run(folder: Path, argv: list[str]) -> None:
    """Have a server run the program `argv`, and end as it ends."""
    name = SERVERS[int(os.environ.get("RANK", 0)) % 2]
    twin = "deepspeed" if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else "plain"
    request = {"argv": argv, "cwd": os.getcwd(), "environment": dict(os.environ)}
    start_servers_once(folder)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        server.connect(str(folder / f"{name}.{twin}"))
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        for number in FORWARDED:
            signal.signal(number, lambda number, frame: server.send(str(number).encode()))
        status = int(server.recv(100))
    except (OSError, ValueError) as error:  # an empty answer is the server's end, too
        sys.exit(f"The server of {__file__} is gone ({error}). It says:\n{(folder / name).read_text()}")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in FORWARDED:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def start_servers_once(folder: Path) -> None:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if all((folder / name).exists() for name in SERVERS):
            return
        for name in SERVERS:
            listeners = []
            for twin in TWINS:  # now, so that the first programs can wait for an answer while the server imports
                listeners.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                listeners[-1].bind(str(folder / f"{name}.{twin}"))
                listeners[-1].listen(64)
            numbers = [listener.fileno() for listener in listeners]
            with (folder / name).open("w") as said:
                subprocess.Popen(
                    [sys.executable, __file__, "serve", str(folder), *map(str, numbers)],
                    env=json.loads((folder / "environment.json").read_text()),
                    stdin=subprocess.DEVNULL, stdout=said, stderr=said, pass_fds=numbers, start_new_session=True,
                )  # fmt: skip


# --- the server -------------------------------------------------------------------------------------------------------


def import_libraries() -> None:
    """What the programs import, but for the modules of the tests and recipes, which are theirs to find."""
    folders = [str(TESTS), str(TESTS.parent / "recipes")]
    sys.path[:0] = folders
    for name in ("accelerate.commands.launch", "torch.distributed.run", "backend_worker", "finetuning.run"):
        importlib.import_module(name)
    del sys.path[: len(folders)]
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(tuple(folders)) and name != "__main__":
            del sys.modules[name]


def serve(listener: socket.socket, owner: int) -> dict:
    """Fork for every request until the process `owner` ends. Returns in the forks only, with the request."""
    selector = selectors.DefaultSelector()
    running: dict[socket.socket, int] = {}

    def accept() -> dict | None:
        client, _ = listener.accept()
        message, streams, *_ = socket.recv_fds(client, 1 << 20, 3)
        pid = os.fork()
        if pid == 0:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            os.setsid()
            return json.loads(message)
        for stream in streams:
            os.close(stream)
        running[client] = pid
        selector.register(client, selectors.EVENT_READ, lambda: pass_on(client))
        ended = os.pidfd_open(pid)
        selector.register(ended, selectors.EVENT_READ, lambda: answer(ended, client))
        return None

    def pass_on(client: socket.socket) -> None:
        """Pass on a signal. A client that is gone was killed, and so is its program."""
        number = client.recv(100)
        os.kill(running[client], int(number or signal.SIGKILL))
        if not number:
            selector.unregister(client)

    def answer(ended: int, client: socket.socket) -> None:
        _, status = os.waitpid(running.pop(client), 0)
        selector.unregister(ended)
        os.close(ended)
        if client in selector.get_map():
            selector.unregister(client)
            with contextlib.suppress(ConnectionError):  # just killed
                client.send(str(status).encode(), socket.MSG_NOSIGNAL)
        client.close()

    def leave() -> None:
        for pid in running.values():
            os.kill(pid, signal.SIGKILL)
        os._exit(0)

    selector.register(listener, selectors.EVENT_READ, accept)
    selector.register(os.pidfd_open(owner), selectors.EVENT_READ, leave)
    while True:
        key, _ = selector.select()[0]  # one at a time: what it does may end another
        if request := key.data():
            return request


def become(request: dict, libraries: list[str]) -> None:
    """Run what `python` would, given the arguments, folder and environment of `request`; `libraries` are on its path."""
    import datasets
    import numpy

    words, environment = request["argv"], request["environment"]
    for name in READ_AT_IMPORT:
        if environment.get(name) != os.environ.get(name):
            sys.exit(
                f"forked_python: {name} is {environment.get(name)}, but was read at import, as {os.environ.get(name)}"
            )
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["cwd"])
    random.seed()
    numpy.random.seed()
    if words[0] == "-u":
        words.pop(0)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    if "HF_DATASETS_CACHE" in environment:
        datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    python_path = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[:] = [request["cwd"], *python_path, *libraries]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[:] = [str(Path(words[0]).resolve().parent), *python_path, *libraries]
        runpy.run_path(words[0], run_name="__main__")


def main(command: str, folder: Path, argv: list[str]) -> None:
    if command == "run":
        run(folder, argv)
    plain, deepspeed = (socket.socket(fileno=int(number)) for number in argv)
    libraries = [path for path in sys.path[1:] if path not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    import_libraries()
    listener = plain
    if os.fork() == 0:
        import_deepspeed()
        listener = deepspeed
    plain, deepspeed = None, None
    gc.freeze()  # what was imported stays shared with the forks
    become(serve(listener, int((folder / "owner").read_text())), libraries)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
