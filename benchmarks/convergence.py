"""Held-out loss against steps and seconds, over methods and learning rates: the sweeps that every claim of speed rests on.

    python benchmarks/convergence.py benchmarks/sweeps/cpu.yaml                  # hours on 2 cores; interrupt it at will
    python benchmarks/convergence.py benchmarks/sweeps/cpu.yaml --share 1/2      # in one of two processes
    python benchmarks/convergence_report.py benchmarks/sweeps/cpu.yaml           # the tables and plots of what is there

With `evaluate` a run answers its recipe's benchmark, or the tasks that it names, afterwards; for GSM-symbolic:

    python benchmarks/symbolic_items.py outputs/symbolic.jsonl

A sweep is a YAML file: what all runs have in common, and grids. A grid is every combination of its lists; a run is a recipe
with options, so any of them can be repeated as `accelerate launch recipes/RECIPE.py --OPTION VALUE …`. After the grids each
method gets its best learning rate again with `best_seeds`. Finished runs are in `results/convergence.jsonl` and not made
again.
"""

import json
import zlib
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import yaml
from measuring.results import Results
from sweeps.analysis import final_loss
from sweeps.grids import arm_of, grid_runs
from sweeps.training import run

RUNS = Results("convergence")


def best_runs(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of the extra seeds: those of each arm's best learning rate, where the arm's grid is finished."""
    arms: dict[tuple, list[dict[str, Any]]] = {}
    for settings in grid_runs(sweep):
        arms.setdefault(arm_of(settings), []).append(settings)
    extra = []
    for wanted in arms.values():
        found = [RUNS.find(settings) for settings in wanted]
        if len(found) > 1 and None not in found:
            best = min(found, key=final_loss)["settings"]
            extra += [best | {"seed": seed} for seed in sweep["best_seeds"]]
    return extra


def share_of(settings: dict[str, Any], shares: int) -> int:
    """Which of the shares 1 to `shares` makes this run, whatever other runs a process knows of."""
    return zlib.crc32(json.dumps(settings, sort_keys=True).encode()) % shares + 1


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="a YAML file; those at hand are in benchmarks/sweeps")
    parser.add_argument(
        "--share", default="1/1", help="i/n: make the i-th of n shares of the runs, so that n processes make all"
    )
    args = parser.parse_args()
    share, shares = map(int, args.share.split("/"))
    sweep = yaml.safe_load(args.sweep.read_text(encoding="utf-8"))
    for stage in (grid_runs, best_runs):
        wanted = stage(sweep)
        for number, settings in enumerate(wanted):
            if share_of(settings, shares) == share and RUNS.find(settings) is None:
                print(f"{number + 1}/{len(wanted)}: {settings}", flush=True)
                found = RUNS.measure(settings, lambda settings=settings: run(settings))
                print(f"-> {final_loss(found):.4f} in {found['wall_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
