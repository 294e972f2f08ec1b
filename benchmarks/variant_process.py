"""Each variant of a benchmark in a process of its own, so that none finds warm or full what another left behind."""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from memory_environment import MALLOC


def add_variant_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--variant", help="used by the benchmark itself, for its worker processes")
    parser.add_argument("--work", help="used by the benchmark itself")


def run_variant(variant: str, arguments: list[str], work: str, environment: dict[str, str] = MALLOC) -> dict[str, Any]:
    """Start the running script again with `arguments` for one `variant`, in the folder `work`; what it reported.

    `environment` is for measuring memory by default, which costs time: blocks are returned and fetched again.
    """
    subprocess.run(
        [sys.executable, sys.argv[0], *arguments, "--variant", variant, "--work", work],
        env=os.environ | environment,
        check=True,
    )
    return json.loads(Path(work, "measured.json").read_text())


def report(work: str, measured: dict[str, Any]) -> None:
    """Hand over to `run_variant`."""
    Path(work, "measured.json").write_text(json.dumps(measured))
