"""Mistakes that need processes of their own: two of them, or one that finds no hub (as told by its environment) and no space.

    torchrun --nproc_per_node 2 tests/mistakes_worker.py OUT        the last one kills a process
    python tests/mistakes_worker.py OUT

Prints "ID: message" for each; see `mistakes`.
"""

import os
import resource
import sys
from pathlib import Path

import torch.distributed as dist
from backend_worker import before, die
from peft import get_peft_model
from tiny import lora_config, sft_arguments, tiny_batches, tiny_model, word_problems, word_tokenizer
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

from lora_ga_trainer import LoRAGAArguments, LoRAGASFTConfig, LoRAGASFTTrainer, initialize_lora_ga
from lora_ga_trainer.distributed.backends import rank
from lora_ga_trainer.gradient import accumulator

DISK = 30_000
"""Bytes that a file may have on the full disk: less than an adapter's."""


def trainer(out: Path, model=None, **options) -> LoRAGASFTTrainer:
    return LoRAGASFTTrainer(
        tiny_model() if model is None else model,
        LoRAGASFTConfig(**sft_arguments(out, save_strategy="steps", save_steps=2, **options)),
        train_dataset=word_problems(), processing_class=word_tokenizer(), peft_config=lora_config(),
    )  # fmt: skip


class FullDisk(TrainerCallback):
    """From step 3 on no file gets larger than `DISK`: the system call fails, as on a disk without space."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, resource.RLIM_INFINITY))


def full_disk(out: Path) -> None:
    training = trainer(out)
    training.add_callback(FullDisk())
    try:
        training.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def nan_on_the_last_process(out: Path) -> None:
    training = trainer(out, ddp_backend="gloo")

    def poison(self) -> None:
        """When DDP, which copies the first process's weights to all, has started."""
        if rank() == 1:
            self.model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.data[0, 0] = float("nan")

    undo = before(LoRAGASFTTrainer, "initialize_adapter", poison)
    try:
        training.train()
    finally:
        undo()


def attached_after_sharding(out: Path) -> None:
    model = get_peft_model(tiny_model(), lora_config())
    fully_shard(model)
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)


def a_process_dies(out: Path) -> None:
    training = trainer(out, ddp_backend="gloo")
    calls = []
    if rank() == 1:
        before(accumulator.ExactGradient, "add", lambda *_: calls.append(1) if len(calls) < 20 else die())
    training.train()


ONE_PROCESS = {
    "S05": lambda out: trainer(out, push_to_hub=True, hub_model_id="me/adapter", hub_token="hf_x"),
    "S01": full_disk,
}
TWO_PROCESSES = {"P02": nan_on_the_last_process, "P03": attached_after_sharding, "P01": a_process_dies}


def main(out: Path) -> None:
    for name, mistake in (TWO_PROCESSES if "RANK" in os.environ else ONE_PROCESS).items():
        try:
            mistake(out)
            said = "NOTHING"
        except Exception as error:
            said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        if rank() == 0:
            print(f"{name}: {' '.join(said.split())}", flush=True)
        if name != "P01" and dist.is_initialized():
            dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
