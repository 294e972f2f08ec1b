"""Tiny trainers of every other kind, their losses written anew, and what two processes of them estimate.

torchrun --nproc_per_node 2 tests/other_trainers.py OUT       OUT/<rank>.pt: the gradients of each kind in `PAIRS`
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import CONFIGS, VOCABULARY, lora_config, sft_arguments, tiny_model, word_tokenizer
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, LlamaForSequenceClassification, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from lora_ga_trainer import (
    LoRAGADPOConfig,
    LoRAGADPOTrainer,
    LoRAGAMixin,
    LoRAGARewardConfig,
    LoRAGARewardTrainer,
    LoRAGATrainingArguments,
)
from lora_ga_trainer.gradient.estimation import estimate_gradients, make_accumulator
from lora_ga_trainer.gradient.objective import Objective

PAIRS = ("reward", "dpo")
KINDS = ("classifier", *PAIRS)
BETA = 0.1


class ClassifierTrainer(LoRAGAMixin, Trainer):
    """What a user writes."""


CLASSES = {
    "classifier": (ClassifierTrainer, LoRAGATrainingArguments),
    "reward": (LoRAGARewardTrainer, LoRAGARewardConfig),
    "dpo": (LoRAGADPOTrainer, LoRAGADPOConfig),
}
STOCK = {
    "classifier": (Trainer, TrainingArguments),
    "reward": (RewardTrainer, RewardConfig),
    "dpo": (DPOTrainer, DPOConfig),
}


def classifier(num_labels: int) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = CONFIGS["llama"]()
    config.num_labels, config.pad_token_id = num_labels, 0
    return LlamaForSequenceClassification(config)


def base_of(kind: str) -> nn.Module:
    return {"classifier": lambda: classifier(3), "reward": lambda: classifier(1), "dpo": tiny_model}[kind]()


def adapter_of(kind: str, **options) -> LoraConfig:
    return lora_config(**{"task_type": "CAUSAL_LM" if kind in ("sft", "dpo") else "SEQ_CLS"} | options)


def rows_of(kind: str) -> Dataset:
    """24 examples of different lengths."""
    generator = torch.Generator().manual_seed(5)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(0, VOCABULARY - 4, (count,), generator=generator).tolist())

    if kind == "classifier":
        texts = [words(4 + i % 5) for i in range(24)]
        return Dataset.from_list(
            [{"input_ids": word_tokenizer()(text)["input_ids"], "labels": i % 3} for i, text in enumerate(texts)]
        )
    return Dataset.from_list(
        [
            {"prompt": words(3 + i % 3) + " ", "chosen": words(2 + i % 5), "rejected": words(3 + i % 4)}
            for i in range(24)
        ]
    )


def make_trainer(kind: str, output_dir: Path, *, stock: bool = False, base=None, lora=None, **options) -> Trainer:
    """A trainer of `kind`, or the one that it derives from; `options` are of its arguments."""
    trainer_class, config_class = (STOCK if stock else CLASSES)[kind]
    options = {"ga_estimator": "exact"} | options
    arguments = sft_arguments(output_dir, **options)
    if stock:
        arguments = {name: value for name, value in arguments.items() if not name.startswith("ga_")}
    args, model, adapter = config_class(**arguments), base or base_of(kind), lora or adapter_of(kind)
    if kind == "classifier":
        torch.manual_seed(0)
        collate = DataCollatorWithPadding(word_tokenizer())
        return trainer_class(get_peft_model(model, adapter), args, data_collator=collate, train_dataset=rows_of(kind))
    return trainer_class(
        model, args=args, train_dataset=rows_of(kind), processing_class=word_tokenizer(), peft_config=adapter
    )


# --- the losses, example by example, without padding ----------------------------------------------------------------


def log_probability(model: nn.Module, ids: Tensor, is_completion: Tensor) -> Tensor:
    log_probs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    return (log_probs.gather(1, ids[1:, None])[:, 0] * is_completion[1:]).sum()


def example_losses(kind: str, policy: nn.Module, reference: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    texts = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    if kind == "classifier":
        return [
            F.cross_entropy(policy(input_ids=ids[None]).logits, label[None])
            for ids, label in zip(texts, batch["labels"], strict=True)
        ]
    if kind == "reward":
        scores = [policy(input_ids=ids[None]).logits[0, 0] for ids in texts]
    else:
        completions = [
            of_row[mask.bool()] for of_row, mask in zip(batch["completion_mask"], batch["attention_mask"], strict=True)
        ]
        scores = []
        for ids, is_completion in zip(texts, completions, strict=True):
            with torch.no_grad():
                at_reference = log_probability(reference, ids, is_completion)
            scores.append(BETA * (log_probability(policy, ids, is_completion) - at_reference))
    pairs = len(scores) // 2
    return [-F.logsigmoid(scores[i] - scores[pairs + i]) for i in range(pairs)]


# --- what the package estimates -------------------------------------------------------------------------------------


def estimated_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """The exact gradient of every target layer, as the trainer's initialization, or its restart, finds it."""
    adapter = trainer.model.lora_ga
    accumulators = {name: make_accumulator(weight, trainer.args) for name, weight in adapter.weights.items()}
    with trainer.estimating(trainer.args.ga_seed) as (batches, _):
        estimate_gradients(adapter, accumulators, Objective(trainer.model, list(batches), trainer.estimation_loss))
    return {name: accumulator.grad_OI for name, accumulator in accumulators.items()}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    found = {}
    for kind in PAIRS:
        # 3 and 2 examples: the last batches of the processes differ in size
        trainer = make_trainer(kind, out / kind, ga_num_samples=5, ga_batch_size=2)
        found[kind] = estimated_gradients(trainer)
    torch.save(found, out / f"{trainer.args.process_index}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # see backend_worker
