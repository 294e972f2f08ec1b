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

import gc
import importlib
import itertools
import json
import math
import sys
import tempfile
import time
import zlib
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
import yaml
from convergence_analysis import final_loss
from results import Results
from transformers import AutoTokenizer, TrainerCallback, set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from finetuning.recipe import Options, Recipe
from finetuning.run import check_evaluation, parse
from peft_lora_ga import with_pefts_lora_ga

RUNS = Results("convergence")


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given: a GPU works on while Python reads the clock."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


class Stopwatch(TrainerCallback):
    """Seconds spent in training steps so far; evaluation and initialization do not count."""

    def __init__(self):
        self.seconds, self.at = 0.0, {0: 0.0}

    def on_step_begin(self, args, state, control, **kwargs):
        finish(args.device)
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        finish(args.device)
        self.seconds += time.perf_counter() - self.started
        self.at[state.global_step] = self.seconds


def combinations(common: dict[str, Any], grid: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of every run of a grid: each of its lists contributes one value.

    >>> combinations({"r": 8}, {"method": ["lora", "full"], "seed": 1})
    [{'r': 8, 'method': 'lora', 'seed': 1}, {'r': 8, 'method': 'full', 'seed': 1}]
    """
    lists = [value if isinstance(value, list) else [value] for value in grid.values()]
    return [common | dict(zip(grid, values, strict=True)) for values in itertools.product(*lists)]


def grid_runs(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of all runs of a sweep's grids, in order."""
    return [settings for grid in sweep["grids"] for settings in combinations(sweep["common"], grid)]


def arm_of(settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What a run is an example of, whatever its learning rate and seed."""
    return tuple((name, value) for name, value in sorted(settings.items()) if name not in ("learning_rate", "seed"))


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


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Train once; the held-out loss on the way, and what the initialization took."""
    recipe = importlib.import_module(settings["recipe"]).RECIPE
    options = [(name, value) for name, value in settings.items() if name not in ("recipe", "threads")]
    argv = [text for name, value in options for text in (f"--{name}", str(value))]
    torch.set_num_threads(settings["threads"])
    with with_pefts_lora_ga():
        return train_and_evaluate(recipe, parse(recipe, argv))


def train_and_evaluate(recipe: Recipe, options: Options) -> dict[str, Any]:
    """The run of a recipe with its options."""
    training = options.training
    training.eval_on_start, training.eval_strategy = True, "steps"
    training.output_dir = "outputs/convergence"
    path = options.model.model_name_or_path = options.model.model_name_or_path or recipe.demo_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    train, held_out = recipe.datasets(options, tokenizer)
    check_evaluation(recipe, options)  # before minutes of training
    set_seed(training.seed)
    trainer = recipe.trainer(options, tokenizer, train, held_out)
    stopwatch = Stopwatch()
    trainer.callback_handler.callbacks.insert(0, stopwatch)  # before the one that restarts, whose time counts
    started = time.perf_counter()
    trainer.train()
    log = trainer.state.log_history
    found = {
        "held_out": [
            {"step": e["step"], "seconds": round(stopwatch.at[e["step"]], 2), "loss": finite(e["eval_loss"])}
            for e in log
            if "eval_loss" in e
        ],
        "train_losses": [finite(entry["loss"]) for entry in log if "loss" in entry],
        "init": next(
            ({k: v for k, v in entry.items() if k.startswith("ga/")} for entry in log if "ga/init_seconds" in entry), {}
        ),
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    names, source = recipe.asked(options)
    if names:
        from evaluation import harness  # an extra

        with tempfile.TemporaryDirectory() as folder:
            scored = harness.evaluate(trainer.model, tokenizer, names, Path(folder), options.evaluation, source)
        (metrics,) = scored.values()
        found["score"] = next(value for name, value in metrics.items() if "," in name)  # "metric,filter"
        found["items"] = metrics["sample_len"]
    del trainer
    gc.collect()
    return found


def finite(value: float) -> float | None:
    """None, which JSON has, for what is no number."""
    return round(value, 5) if math.isfinite(value) else None


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
