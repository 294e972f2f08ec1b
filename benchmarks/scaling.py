"""How the initialization's seconds and memory grow with samples, width, depth, rank and processes.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --device cuda

`initialize_lora_ga` with the default options, on Llamas with random weights and random tokens in float32. One quantity
varies, the others stay at a base point. Every point is measured in processes of its own, each of one CPU thread, so that
2 processes have twice the cores of 1. Every finished run is appended to `results/scaling.jsonl` and not made again, so the
command can be interrupted.

Prints the exponents p of y ~ x^p, fitted from the middle value of each axis up, and draws `plots/scaling.png` (needs the
extra `plot`). About 8 minutes on 2 cores.
"""

import os
import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from hardware import device_name, hardware_line
from results import Results, markdown_table
from scaling_point import Point, measure

Measured = dict[str, dict[int, list[dict[str, Any]]]]
"""By axis and value, the runs of all repeats."""


@dataclass(frozen=True)
class Plan:
    """A base point, and the values that its quantities take one at a time."""

    base: Point
    values: dict[str, list[int]]

    def points(self, axis: str) -> dict[int, Point]:
        return {value: replace(self.base, **{axis: value}) for value in self.values[axis]}


def process_counts(device: str) -> list[int]:
    """1, 2, 4, or as far as the cores or GPUs go."""
    available = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    return sorted({min(count, available) for count in (1, 2, 4)})


def plan(device: str) -> Plan:
    """What is measured on `device`. At width 128 square layers are estimated exactly: their sketch would be the larger."""
    if device == "cuda":
        base = Point(samples=64, width=2048, layers=4, rank=8, batch_size=4, length=512, device=device)
        values = {
            "samples": [16, 32, 64, 128, 256],
            "width": [512, 1024, 2048, 4096, 8192],
            "layers": [2, 4, 8, 16, 32],
            "rank": [8, 16, 32, 64, 128],
        }
    else:
        base = Point(samples=16, width=512, layers=2, rank=8, batch_size=4, length=64, device=device)
        values = {
            "samples": [4, 8, 16, 32, 64],
            "width": [128, 256, 512, 1024, 2048],
            "layers": [1, 2, 4, 8, 16],
            "rank": [2, 4, 8, 16, 32],
        }
    return Plan(base, values | {"processes": process_counts(device)})


QUANTITIES = {
    "seconds": "seconds",
    "extra_peak_bytes": "extra peak memory",
    "sketch_bytes": "sketch bytes",
    "gradient_bytes": "gradient bytes",
}
EXPECTED = {
    "samples": "seconds 1: every pass goes over all; memory 0: one batch at a time, and sums that do not grow",
    "width": "seconds to 2: the weights' products; memory and sketch 1: activations and 2·K·(O + I); the gradient, O·I, 2",
    "layers": "all 1: every layer alike",
    "rank": "all under 1: weights and activations stay; sketch K = 2·r + 32, so to 1 only for r ≫ 16; gradient 0",
    "processes": "seconds to −1: samples and factorizations are shared; memory 0: a batch and all sums on each, 64 MiB to send",
}


def power_law(xs: Iterable[float], ys: Iterable[float]) -> tuple[float, float] | None:
    """(p, c) of y = c·x^p, by least squares on the logarithms; None if there are no two points, or a y that has none."""
    xs, ys = list(xs), list(ys)
    if len(xs) < 2 or not all(ys):
        return None
    p, log_c = np.polyfit(np.log(xs), np.log(ys), 1)
    return float(p), float(np.exp(log_c))


@dataclass(frozen=True)
class Curve:
    """One quantity along one axis."""

    xs: list[int]
    repeats: list[list[float | None]]
    """For each x the repeats' values; None where the platform cannot measure it."""

    @property
    def medians(self) -> list[float | None]:
        return [None if None in ys else statistics.median(ys) for ys in self.repeats]

    @property
    def fitted_xs(self) -> list[int]:
        """From the middle value up, where what does not grow weighs least; of two values both."""
        return self.xs[(len(self.xs) - 1) // 2 :]

    @property
    def fit(self) -> tuple[float, float] | None:
        """(p, c) of the medians at `fitted_xs`."""
        return power_law(self.fitted_xs, self.medians[-len(self.fitted_xs) :])


def measure_all(plan: Plan, repeats: int, results: Results) -> Measured:
    """All runs of `plan`; those that `results` does not have are made."""
    found: Measured = {axis: {value: [] for value in values} for axis, values in plan.values.items()}
    for repeat in range(repeats):  # outermost: what disturbs the machine for a while disturbs no point every time
        for axis in plan.values:
            for value, point in plan.points(axis).items():
                settings = asdict(point) | {"repeat": repeat, "hardware": device_name()}
                run = results.measure(settings, partial(measure, point))
                print(f"{axis} {value}, repeat {repeat}: {run['seconds']:.2f} s", file=sys.stderr)
                found[axis][value].append(run)
    return found


def curve(runs: dict[int, list[dict[str, Any]]], quantity: str) -> Curve:
    return Curve(list(runs), [[run[quantity] for run in repeats] for repeats in runs.values()])


def exponents_table(found: Measured) -> str:
    rows = []
    for axis, runs in found.items():
        fits = [curve(runs, quantity).fit for quantity in QUANTITIES]
        exponents = ["–" if fit is None else f"{fit[0]:z.2f}" for fit in fits]
        rows.append([axis, f"{min(runs)} to {max(runs)}", *exponents, EXPECTED[axis]])
    return markdown_table(["axis", "range", *QUANTITIES.values(), "expected"], rows)


def processes_table(runs: dict[int, list[dict[str, Any]]]) -> str:
    seconds = curve(runs, "seconds").medians
    rows = []
    for (count, repeats), taken in zip(runs.items(), seconds, strict=True):
        speed_up = seconds[0] / taken
        sent = " + ".join(f"{of_pass / 2**20:.2f}" for of_pass in repeats[0]["all_reduced_bytes"])
        rows.append([str(count), f"{taken:.2f}", f"{speed_up:.2f}", f"{speed_up / count:.0%}", sent])
    return markdown_table(
        ["processes", "seconds", "speed-up", "of the ideal", "MiB all-reduced by each, by pass"], rows
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    chosen = plan(args.device)
    found = measure_all(chosen, args.repeats, Results("scaling"))
    command = " ".join(["python benchmarks/scaling.py", *sys.argv[1:]])
    print(f"\n`{command}` ({hardware_line()})\n")
    print(f"Exponents of the medians of {args.repeats} runs. The base point: {chosen.base}.\n")
    print(exponents_table(found))
    print(f"\n{processes_table(found['processes'])}\n")
    from scaling_plot import draw  # here, so that `gpu.py` measures without the extra `plot`

    by_quantity = {axis: {quantity: curve(runs, quantity) for quantity in QUANTITIES} for axis, runs in found.items()}
    print(draw(by_quantity, f"{device_name()}. Base point: {chosen.base}."))


if __name__ == "__main__":
    main()
