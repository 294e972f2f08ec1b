"""The demo's held-out loss from a LoRA-GA start and from plain LoRA, which also gets three higher learning rates.

    python benchmarks/demo_learning_rates.py

Same model, data, order, steps and rank (r 8, α 16) for all; each adapter with its own scaling, LoRA-GA with rsLoRA as in
the paper and LoRA with α/r as PEFT has it. Every finished run is appended to `results/demo_learning_rates.jsonl` and not
run again, so the command can be interrupted; remove the file to measure anew.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from hardware import hardware_line
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTTrainer

from lora_ga_trainer import LoRAGASFTTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from demo_model import demo_model_path
from finetune import parse
from metamath import RECIPE

RESULTS = Path(__file__).parent / "results/demo_learning_rates.jsonl"
DEMO_RATE = 2e-4
RUNS = [("LoRA-GA", DEMO_RATE), ("LoRA", DEMO_RATE), ("LoRA", 1e-3), ("LoRA", 3e-3), ("LoRA", 1e-2)]


def held_out_losses(method: str, learning_rate: float) -> dict[str, float]:
    """One run of the demo; the held-out loss before and after."""
    options = parse(RECIPE, ["--learning_rate", str(learning_rate)])
    training_args = options.training
    if training_args.device.type == "cpu":
        torch.set_num_threads(os.cpu_count())
    path = demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    train, held_out = RECIPE.datasets(options, tokenizer)
    trainer_class = LoRAGASFTTrainer if method == "LoRA-GA" else SFTTrainer
    trainer = trainer_class(
        path,
        training_args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=8, lora_alpha=16, use_rslora=method == "LoRA-GA", target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    before = trainer.evaluate()["eval_loss"]
    started = time.perf_counter()
    trainer.train()
    return {
        "steps": trainer.state.global_step,
        "train_seconds": time.perf_counter() - started,
        "before": before,
        "after": trainer.evaluate()["eval_loss"],
    }


def finished() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def main():
    for method, rate in RUNS:
        if any((run["method"], run["learning_rate"]) == (method, rate) for run in finished()):
            continue
        run = {"method": method, "learning_rate": rate, **held_out_losses(method, rate), "on": hardware_line()}
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(run) + "\n")

    print("\n`python benchmarks/demo_learning_rates.py`\n")
    print("| initialization | learning rate | steps | held-out loss before | after | training seconds | measured on |")
    print("|---|---|---|---|---|---|---|")
    for run in finished():
        print(
            f"| {run['method']} | {run['learning_rate']:g} | {run['steps']} | {run['before']:.4f} | {run['after']:.4f} | "
            f"{run['train_seconds']:.0f} | {run['on']} |"
        )


if __name__ == "__main__":
    main()
