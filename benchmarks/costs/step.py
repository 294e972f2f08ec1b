"""One training step of LoRA and of LoRA-GA: its seconds, its memory and its operations.

On paper, floating-point operations per token for O×I weights:

    base      4·O·I          forward, and the gradient at the input; none of the weight. The head counts, attention does not
    LoRA      6·R·(O + I)    forward, the gradient at the input, and that of A and B: 2 each
    LoRA-GA  10·R·(O + I)    4 + 4 + 2: the function has rank 2R, the trained matrices have rank R (see `adapter/product.py`)

so the ratio of steps is (4·O·I + 10·R·(O + I)) / (4·O·I + 6·R·(O + I)), which is over 1.03 where R is over about
O·I / (O + I) / 32: 64 for 4096×4096, 9 for 576×576. In memory LoRA-GA has A0 and B0 besides, R·(O + I) numbers a weight, and
from the forward to the backward the joined matrices, where LoRA under autocast has its own in bfloat16: half as large.
"""

import time
from argparse import Namespace
from typing import Any

import torch
from measuring.hardware import finish
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from costs.models import TARGETS, lora_config, make_model
from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.gradient.memory import peak_memory

VARIANTS = ("LoRA", "LoRA-GA")


class Training:
    """One variant, ready to take steps."""

    def __init__(self, variant: str, args: Namespace):
        base, (self.batch,) = make_model(args, args.batch_size)
        (rank,) = args.ranks
        self.model = get_peft_model(base, lora_config(rank, rank_pattern=largest_ranks(base, rank))).train()
        if variant == "LoRA-GA":
            config = LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_passes=1)
            initialize_lora_ga(self.model, [self.batch], config, disable_tqdm=True)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.device = torch.device(args.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    def loss(self) -> Tensor:
        with self.autocast:
            return self.model(**self.batch, use_cache=False).loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds_of_step(self) -> float:
        started = time.perf_counter()
        self.step()
        finish(self.device)
        return time.perf_counter() - started


def largest_ranks(model: PreTrainedModel, rank: int) -> dict[str, int]:
    """A rank for the targets that are too small for `rank`: LoRA-GA can have half of the smaller side of a weight."""
    targets = {name.split(".")[-1]: module for name, module in model.named_modules() if name.endswith(tuple(TARGETS))}
    limits = {name: min(module.weight.shape) // 2 for name, module in targets.items()}
    return {name: limit for name, limit in limits.items() if limit < rank}


def ratio_on_paper(model: PeftModel) -> float:
    """Floating-point operations of a LoRA-GA step over those of a LoRA step, see above."""
    head = model.get_output_embeddings().weight
    base, adapter = 4 * head.numel(), 0
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            base += 4 * layer.out_features * layer.in_features
            adapter += layer.r["default"] * (layer.out_features + layer.in_features)
    return (base + 10 * adapter) / (base + 6 * adapter)


def measure_times(args: Namespace) -> dict[str, Any]:
    trainings = {variant: Training(variant, args) for variant in VARIANTS}
    for training in trainings.values():
        training.step()  # makes AdamW's state, loads kernels
    seconds = {variant: [] for variant in VARIANTS}
    for turn in range(args.rounds):
        for variant in VARIANTS if turn % 2 else reversed(VARIANTS):
            seconds[variant].append(trainings[variant].seconds_of_step())
    model, batch = trainings["LoRA"].model, trainings["LoRA"].batch
    return {"seconds": seconds, "tokens": batch["input_ids"].numel(), "on_paper": ratio_on_paper(model)}


def measure_memory(variant: str, args: Namespace) -> dict[str, Any]:
    training = Training(variant, args)
    training.loss().backward()  # loads kernels and thread buffers, which resident memory would count
    training.optimizer.zero_grad()
    with peak_memory(training.device) as peak:
        training.step()
        training.step()
    tensors = [*training.model.parameters(), *training.model.buffers()]
    return {"bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors) + peak.extra_bytes}
