"""A tiny model and a few rows for each recipe, so that its tests can run it as a user does."""

import json
from pathlib import Path

import code_feedback
import glue
import metamath
import wizardlm
from tiny import CONFIGS, tiny_t5, word_tokenizer
from transformers import AutoModelForCausalLM

CAUSAL = {recipe.name: recipe for recipe in (metamath.RECIPE, wizardlm.RECIPE, code_feedback.RECIPE)}
RECIPES = CAUSAL | {"glue": glue.RECIPE}
LABEL_WORDS = ("negative", "positive")


def rows_for(recipe: str, count: int = 60) -> list[dict[str, str]]:
    """`count` rows with the recipe's columns, all of which pass its filters."""
    texts = [(f"w{i % 50} w{i // 50} w{i % 7}", f"w{i % 50} w3 w{i % 11} w{i % 3}") for i in range(count)]
    make = {
        "metamath": lambda question, answer: {
            "query": question,
            "response": f"{answer} #### 1\nThe answer is: 1",
            "type": "GSM_AnsAug",
        },
        "wizardlm": lambda question, answer: {"instruction": question, "output": answer},
        "code_feedback": lambda question, answer: {"query": question, "answer": f"w1\n```python\n{answer}\n```\nw2"},
        "glue": lambda question, answer: {"sentence": f"{question} {answer}", "label": int("w1 " in question)},
    }[recipe]
    return [make(*text) for text in texts]


def write(rows: list[dict], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_model(folder: Path, recipe: str = "metamath") -> Path:
    """One layer of the tiny Llama, or the tiny T5, and its tokenizer."""
    if recipe == "glue":
        tiny_t5().save_pretrained(folder)
        word_tokenizer(LABEL_WORDS).save_pretrained(folder)
        return folder
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 1
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def options(recipe: str, folder: Path, **overrides) -> list[str]:
    """The command line of 3 steps on the CPU, on `rows_for` the recipe, in `folder`; without `--config`, so over the demo's."""
    data = folder / "rows.jsonl"
    if not data.exists():
        write(rows_for(recipe), data)
    if not (folder / "model").exists():
        save_model(folder / "model", recipe)
    values = {
        "dataset_path": data,
        "model_name_or_path": folder / "model",
        "output_dir": folder / "out",
        "r": 4,
        "max_steps": 3,
        "eval_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "ga_num_samples": 8,
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    values |= {"evaluation_file": data, "evaluate": "false"} if recipe == "glue" else {"max_length": 60}
    values |= overrides
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]
