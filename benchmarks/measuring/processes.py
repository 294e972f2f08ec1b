"""Each variant of a benchmark in processes of its own, so that none finds warm or full what another left behind."""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384"}
"""With these a process's resident memory is the memory it has in use; malloc reads them when the process starts. By default
it keeps freed blocks, which a peak of resident memory would count as in use (25 to 40 MiB here)."""


def add_variant_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--variant", help="used by the benchmark itself, for its worker processes")
    parser.add_argument("--work", help="used by the benchmark itself")


def run_variant(
    program: str,
    variant: str,
    arguments: list[str],
    work: str,
    environment: dict[str, str] = MALLOC,
    processes: int = 1,
) -> dict[str, Any]:
    """Start `program` with `arguments` for one `variant`, in the folder `work`; what it reported.

    `environment` is for measuring memory by default, which costs time: blocks are returned and fetched again.

    Raises:
        RuntimeError: with what the processes said, if one failed.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    finished = subprocess.run(
        [
            sys.executable,
            *(torchrun if processes > 1 else []),
            program,
            *arguments,
            "--variant",
            variant,
            "--work",
            work,
        ],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        raise RuntimeError(f"{variant} failed:\n{finished.stderr}")
    return json.loads(Path(work, "measured.json").read_text())


def report(work: str, measured: dict[str, Any]) -> None:
    """Hand over to `run_variant`."""
    Path(work, "measured.json").write_text(json.dumps(measured))
