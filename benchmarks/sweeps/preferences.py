"""One run of DPO on solutions of word problems, right ones and wrong ones."""

import random
import re
from typing import Any

import metamath
from datasets import Dataset
from finetuning.run import parse
from transformers import AutoTokenizer, set_seed
from trl import DPOTrainer

from lora_ga_trainer import LoRAGADPOConfig, LoRAGADPOTrainer
from sweeps.beside_lora import adapter, options

TOKENS, BATCH = 128, 4


def with_one_number_wrong(rows: Dataset, seed: int) -> Dataset:
    """The solution is chosen over the same one with one of its numbers changed by 1 to 9."""
    draw = random.Random(seed)

    def pair(row: dict[str, Any]) -> dict[str, str]:
        number = draw.choice([*re.finditer(r"\d+", row["completion"])])
        wrong = str(abs(int(number[0]) + draw.choice([-1, 1]) * draw.randint(1, 9)))
        rejected = row["completion"][: number.start()] + wrong + row["completion"][number.end() :]
        return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected}

    return Dataset.from_list([pair(row) for row in rows])


def run(settings: dict[str, Any]) -> dict[str, Any]:
    recipe, seed = metamath.RECIPE, settings["seed"]
    argv = f"--train_size {BATCH * settings['steps']} --eval_size 96 --max_length {TOKENS} --seed {seed} --use_cpu true"
    model = recipe.demo_model()
    parsed = parse(recipe, [*argv.split(), "--output_dir", "outputs/dpo"])
    train, held_out = recipe.datasets(parsed, AutoTokenizer.from_pretrained(model))
    args = LoRAGADPOConfig(
        "outputs/dpo",
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=24,
        lr_scheduler_type="cosine",
        ga_num_samples=64,
        **options(settings),
    )
    set_seed(seed)
    trainer = (LoRAGADPOTrainer if settings["method"] == "LoRA-GA" else DPOTrainer)(
        model,
        args=args,
        train_dataset=with_one_number_wrong(train, seed),
        eval_dataset=with_one_number_wrong(held_out, seed),
        peft_config=adapter(settings),
    )
    trainer.train()
    found = trainer.evaluate()
    return {
        "loss": round(found["eval_loss"], 4),
        "accuracy": round(found["eval_rewards/accuracies"], 4),
        "chosen": round(found["eval_rewards/chosen"], 4),
        "rejected": round(found["eval_rewards/rejected"], 4),
    }
