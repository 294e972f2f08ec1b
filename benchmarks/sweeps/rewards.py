"""One run of GRPO on sums."""

import random
import re
from typing import Any

import metamath
from datasets import Dataset
from transformers import set_seed
from trl import GRPOTrainer

from lora_ga_trainer import LoRAGAGRPOConfig, LoRAGAGRPOTrainer
from sweeps.beside_lora import adapter, options

PROMPTS = 400


def sums(seed: int) -> Dataset:
    draw = random.Random(seed)
    pairs = [(draw.randint(1, 20), draw.randint(1, 20)) for _ in range(PROMPTS)]
    return Dataset.from_list([{"prompt": f"1 + 2 = 3\n5 + 3 = 8\n{a} + {b} =", "sum": a + b} for a, b in pairs])


def is_right(completions: list[str], sum: list[int], **_: Any) -> list[float]:
    numbers = [re.match(r"\s*(\d+)", completion) for completion in completions]
    return [float(found is not None and int(found[1]) == right) for found, right in zip(numbers, sum, strict=True)]


def run(settings: dict[str, Any]) -> dict[str, Any]:
    is_ga = settings["method"] == "LoRA-GA"
    args = LoRAGAGRPOConfig(
        "outputs/grpo",
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=3,
        logging_steps=1,
        ga_num_samples=128,
        **options(settings),
    )
    set_seed(settings["seed"])
    trainer = (LoRAGAGRPOTrainer if is_ga else GRPOTrainer)(
        metamath.RECIPE.demo_model(),
        is_right,
        args,
        train_dataset=sums(settings["seed"]),
        peft_config=adapter(settings),
    )
    trainer.train()
    log = trainer.state.log_history
    init = {
        name: value for entry in log for name, value in entry.items() if name.startswith("ga/") and name != "ga/seconds"
    }
    return {"rewards": [round(entry["reward"], 4) for entry in log if "reward" in entry], "init": init}
