"""One run of a sweep: a recipe with options."""

import gc
import importlib
import math
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from finetuning.recipe import Options, Recipe
from finetuning.run import check_evaluation, parse
from measuring.hardware import finish
from methods.table import METHODS
from transformers import AutoTokenizer, TrainerCallback, set_seed

from sweeps.optimizers import OPTIMIZERS
from sweeps.peft_lora_ga import PEFTS
from sweeps.plain_scaling import PLAIN_SCALING
from sweeps.ranks import RANKED


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


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Train once; the held-out loss on the way, and what the initialization took."""
    recipe = importlib.import_module(settings["recipe"]).RECIPE
    options = [(name, value) for name, value in settings.items() if name not in ("recipe", "threads")]
    argv = [text for name, value in options for text in (f"--{name}", str(value))]
    torch.set_num_threads(settings["threads"])
    with patch.dict(METHODS, PEFTS | OPTIMIZERS | RANKED | PLAIN_SCALING):
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
