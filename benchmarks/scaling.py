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

import json
import os
import sys
import tempfile
from argparse import ArgumentParser
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from costs import growth
from costs.growth import Plan, Point, curve
from measuring.hardware import device_name, hardware_line
from measuring.processes import MALLOC, add_variant_arguments, report, run_variant
from measuring.results import Results, markdown_table

from lora_ga_trainer.distributed.backends import rank, world_size

Measured = dict[str, dict[int, list[dict[str, Any]]]]
"""By axis and value, the runs of all repeats."""


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


def worker(point: Point, work: str) -> None:
    """Measure `point` in this process, or in this and its siblings under torchrun; the first reports what they found."""
    device = torch.device(point.device, int(os.environ.get("LOCAL_RANK", 0)) if point.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if point.processes > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend)
        assert dist.get_backend() == backend
    assert world_size() == point.processes

    found = growth.measure(point, device)
    if rank() == 0:
        report(work, found)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        os._exit(0)  # with gloo the interpreter's own end aborts now and then, when all is done


def measure(point: Point) -> dict[str, Any]:
    """What the processes of one `point` found."""
    variant, environment = json.dumps(asdict(point)), MALLOC | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as work:
        return run_variant(__file__, variant, [], work, environment, point.processes)


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
    add_variant_arguments(parser)
    args = parser.parse_args()
    if args.variant:
        return worker(Point(**json.loads(args.variant)), args.work)

    chosen = plan(args.device)
    found = measure_all(chosen, args.repeats, Results("scaling"))
    command = " ".join(["python benchmarks/scaling.py", *sys.argv[1:]])
    print(f"\n`{command}` ({hardware_line()})\n")
    print(f"Exponents of the medians of {args.repeats} runs. The base point: {chosen.base}.\n")
    print(exponents_table(found))
    print(f"\n{processes_table(found['processes'])}\n")
    from costs.growth_plot import draw  # here, so that the workers start without matplotlib

    by_quantity = {axis: {quantity: curve(runs, quantity) for quantity in QUANTITIES} for axis, runs in found.items()}
    print(draw(by_quantity, f"{device_name()}. Base point: {chosen.base}."))


if __name__ == "__main__":
    main()
