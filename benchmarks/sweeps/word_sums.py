"""Word problems made on the spot, and a model that has learned some of them: what the sweep of `gpu.py` trains on.

    add        "Anna has 12 apples and gets 30 more. How many apples does Anna have?"    the model has learned these
    subtract   "Anna has 42 apples and gives away 12. How many are left?"                and is fine-tuned on these

So the sweep needs no package with data, and no weights: where SmolLM2 is not at hand, a model of its shapes learns to add in
some hundred steps, and then stands for one that was trained on something near to the task.
"""

import json
import random
import string
from dataclasses import dataclass
from pathlib import Path

import torch
from costs.models import SHAPES
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

NAMES = ["Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo"]
THINGS = ["apples", "books", "cards", "coins", "eggs", "stamps", "stones", "tickets"]


def addition(rng: random.Random) -> dict[str, str]:
    name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(10, 99), rng.randint(10, 99)
    return {
        "query": f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?",
        "response": f"{name} has {a} + {b} = {a + b} {thing}.\n#### {a + b}",
    }


def subtraction(rng: random.Random) -> dict[str, str]:
    name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(50, 199), rng.randint(10, 49)
    return {
        "query": f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?",
        "response": f"Of the {a} {thing} there are {a} - {b} = {a - b} left.\n#### {a - b}",
    }


def write_subtractions(path: Path, count: int) -> None:
    """`count` rows with the columns of `recipes/metamath.py`, JSON lines."""
    rng = random.Random(1)
    path.write_text("".join(json.dumps(subtraction(rng)) + "\n" for _ in range(count)), encoding="utf-8")


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *string.printable])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@dataclass(frozen=True)
class Learning:
    """How the base model learns to add."""

    shapes: str
    """A key of `costs.models.SHAPES`; the vocabulary is that of the characters."""
    steps: int
    batch_size: int
    learning_rate: float = 1e-3


def save_model_that_adds(folder: Path, learning: Learning, device: str) -> float:
    """Train a model from random weights on additions and save it with its tokenizer; its last loss per character.

    All weights, AdamW, autocast to bfloat16, the learning rate linear up over a tenth of the steps and down again.
    """
    set_seed(0)
    tokenizer = character_tokenizer()
    config = LlamaConfig(
        **SHAPES[learning.shapes] | {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    )
    config.pad_token_id = tokenizer.pad_token_id
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning.learning_rate, weight_decay=0.01)
    warmup = max(1, learning.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (learning.steps - step) / (learning.steps - warmup + 1))
    )
    rng, loss = random.Random(0), torch.tensor(0.0)
    for _ in range(learning.steps):
        rows = [addition(rng) for _ in range(learning.batch_size)]
        texts = [f"Q: {row['query']}\nA: {row['response']}</s>" for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(device)
        labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss.item()
