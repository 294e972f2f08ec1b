"""One run of TRL's quick start: a trainer with all of its default arguments, on a recipe's data."""

import importlib
from typing import Any

from finetuning.run import parse
from peft import LoraConfig
from transformers import AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from lora_ga_trainer import LoRAGASFTTrainer

TRAINERS = {"SFTTrainer": SFTTrainer, "LoRAGASFTTrainer": LoRAGASFTTrainer}


def run(settings: dict[str, Any]) -> dict[str, Any]:
    recipe = importlib.import_module(settings["recipe"]).RECIPE
    argv = f"--train_size {8 * settings['steps']} --eval_size 24 --max_length {settings['max_length']} --use_cpu true"
    options = parse(recipe, [*argv.split(), "--output_dir", "outputs/quickstart"])
    model = options.model.model_name_or_path or recipe.demo_model()
    train, held_out = recipe.datasets(options, AutoTokenizer.from_pretrained(model))
    set_seed(settings["seed"])
    trainer = TRAINERS[settings["trainer"]](
        model,
        SFTConfig(
            "outputs/quickstart",
            max_steps=settings["steps"],
            max_length=settings["max_length"],
            seed=settings["seed"],
            use_cpu=True,
            bf16=True,
            per_device_eval_batch_size=24,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=LoraConfig(),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return {"before": round(before, 4), "after": round(trainer.evaluate()["eval_loss"], 4)}
