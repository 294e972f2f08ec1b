"""Measurements as they come: one JSON line a run, appended when it is done, so that no run is lost or made twice.

A sweep can be interrupted, finished on another machine, or shared by several processes: what a file in `results/` has is not
run again. Remove its line, or the file, to measure anew.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
PLOTS = Path(__file__).parents[1] / "plots"


class Results:
    """The runs in `results/{name}.jsonl`. A run is told from others by its settings; what it found stands beside them."""

    def __init__(self, name: str, folder: Path = RESULTS):
        self.path = folder / f"{name}.jsonl"

    def runs(self) -> list[dict[str, Any]]:
        """All finished runs. The line of a process that died while writing it is none."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The finished run that had these settings and no others."""
        return next((run for run in self.runs() if run["settings"] == settings), None)

    def measure(self, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The finished run with `settings`, or what `run` finds now, appended."""
        # here, so that a program that only makes tables starts without torch
        from measuring.hardware import hardware_line

        found = self.find(settings)
        if found is None:
            found = {"settings": settings, **run(), "on": hardware_line()}
            self.append(found)
        return found

    def append(self, run: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n")
        line = ("\n" if torn else "") + json.dumps(run) + "\n"
        # one write to the end of the file: lines of several processes do not mix
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Rows of text under a header."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
