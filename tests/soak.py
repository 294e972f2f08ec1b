"""Rounds of initialize, train, save, resume in one process: nothing may be more after them than before.

    python tests/soak.py --minutes 10

After the warm-up every round is to leave behind as many tensors, hooks, threads and open files as the one before. Memory is
what the process holds (RSS), which the allocator gives back late: there the slope over all rounds counts. Ends with status 1
on growth.
"""

import argparse
import gc
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import datasets
import psutil
import torch
from peft import PeftModel
from tiny import lora_config, sft_arguments, tiny_model, word_problems, word_tokenizer
from torch import nn

from lora_ga_trainer import LoRAGASFTConfig, LoRAGASFTTrainer

WARM_UP = 3
"""Rounds in which caches fill."""
KIBIBYTES_PER_ROUND = 256
"""Growth of memory that is taken for growth. A round allocates some 40 MiB and leaves nothing; one copy of the tiny model's
weights, a mistake that every model would make in its own size, is 300 KiB."""


@dataclass
class Standing:
    """What there is at the end of a round."""

    tensors: int
    """Tensors that Python knows of."""
    modules: int
    hooks: int
    """On modules that are alive."""
    trainers: int
    threads: int
    files: int
    """Open files and sockets."""
    children: int
    kibibytes: int
    """Resident memory."""


COUNTS = [counted.name for counted in fields(Standing) if counted.name != "kibibytes"]


def standing(process: psutil.Process) -> Standing:
    gc.collect()
    objects = gc.get_objects()
    modules = [thing for thing in objects if issubclass(type(thing), nn.Module)]  # `isinstance` would wake lazy objects
    return Standing(
        tensors=sum(issubclass(type(thing), torch.Tensor) for thing in objects),
        modules=len(modules),
        hooks=sum(hooks_of(module) for module in modules),
        trainers=sum(issubclass(type(thing), LoRAGASFTTrainer) for thing in objects),
        threads=threading.active_count(),
        files=process.num_fds(),
        children=len(process.children(recursive=True)),
        kibibytes=process.memory_info().rss // 1024,
    )


def hooks_of(module: nn.Module) -> int:
    return sum(
        len(hooks)
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    )  # fmt: skip


def a_round(number: int, data: datasets.Dataset, tokenizer, folder: Path) -> None:
    """A run of 4 steps and its resumption to 6, in turn in both forms, with both estimators, with and without checkpointing."""
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "no",
        "ga_estimator": ("sketch", "exact")[number % 2],
        "ga_sketch_size": 10,
        "gradient_checkpointing": number % 4 < 2,
        "save_total_limit": 1,
    } | ({"ga_restart_steps": 3} if number % 3 else {"ga_offset": False})

    def trainer(steps: int) -> LoRAGASFTTrainer:
        args = LoRAGASFTConfig(**sft_arguments(folder, **options | {"max_steps": steps}))
        return LoRAGASFTTrainer(
            tiny_model(), args, train_dataset=data, processing_class=tokenizer, peft_config=lora_config()
        )

    first = trainer(steps=4)
    first.train()
    second = trainer(steps=6)
    second.train(resume_from_checkpoint=True)
    second.save_model()
    loaded = PeftModel.from_pretrained(tiny_model(), folder, is_trainable=True)
    loaded(torch.arange(3, 15)[None]).logits.sum().backward()
    shutil.rmtree(folder)


def soak(more: Callable[[int], bool]) -> list[Standing]:
    """What there was after each round, for as long as `more`, told how many there have been, says so."""
    process, data, tokenizer = psutil.Process(), word_problems(), word_tokenizer()
    found: list[Standing] = []
    with tempfile.TemporaryDirectory() as folder:
        while more(len(found)):
            a_round(len(found), data, tokenizer, Path(folder, "run"))
            found.append(standing(process))
    return found


def growth(found: list[Standing], kibibytes_per_round: float = KIBIBYTES_PER_ROUND) -> list[str]:
    """What has grown since the warm-up; [] is what one hopes for.

    Rounds differ, with a period of 12, so that counts may, too; but no later one may exceed the most of an earlier period.
    """
    warm = found[WARM_UP:]
    half = len(warm) // 2
    grown = []
    for name in COUNTS:
        early, late = (max(getattr(one, name) for one in part) for part in (warm[:half], warm[half:]))
        if late > early:
            grown.append(f"{name}: at most {early} in the first half, {late} in the second")
    slope = kibibytes_slope(warm)
    if slope > kibibytes_per_round:
        grown.append(f"memory: {slope:,.0f} KiB more each round")
    return grown


def kibibytes_slope(warm: list[Standing]) -> float:
    """Memory per round, by least squares."""
    rounds = torch.arange(len(warm), dtype=torch.float64)
    rounds -= rounds.mean()
    memory = torch.tensor([one.kibibytes for one in warm], dtype=torch.float64)
    return (rounds @ memory / (rounds @ rounds)).item()


def main() -> None:
    datasets.disable_progress_bars()
    logging.getLogger("lora_ga_trainer").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    end = time.monotonic() + 60 * parser.parse_args().minutes
    silence = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    said, sys.stdout = sys.stdout, silence
    found = soak(lambda rounds: rounds < 2 * WARM_UP or time.monotonic() < end)
    sys.stdout = said

    header = ["round", *asdict(found[0])]
    print("| " + " | ".join(header) + " |\n" + "|---:" * len(header) + "|")
    for number in sorted({*range(0, len(found), max(1, len(found) // 20)), len(found) - 1}):
        print("| " + " | ".join(f"{value:,}" for value in (number, *asdict(found[number]).values())) + " |")
    warm = found[WARM_UP:]
    print(f"\n{len(found)} rounds; memory {kibibytes_slope(warm):+,.1f} KiB a round after the first {WARM_UP}.")
    grown = growth(found)
    sys.exit("Growth: " + "; ".join(grown) if grown else 0)


if __name__ == "__main__":
    main()
