"""What a training step costs with LoRA-GA's adapter, against LoRA of the same rank: seconds and peak memory.

    python benchmarks/step_cost.py --model smollm2
    python benchmarks/step_cost.py --model llama2-7b-shapes

A step is forward, backward, AdamW and zero_grad. Both adapters have the same r, α, scaling and targets (all linear layers
but the head). LoRA-GA's is initialized from the batch, so that neither A0 nor B0 is zero. In bfloat16 the base is bfloat16
and the adapters are float32 under autocast, as TRL trains.

Time: two models in one process take steps in turns, so that whatever else changes on the machine changes for both; the
ratio is the median over rounds. Memory: a process each; the model's parameters and buffers, and what two steps take at
their peak above them (activations, gradients, AdamW's state).

On paper, floating-point operations per token for O×I weights:

    base      4·O·I          forward, and the gradient at the input; none of the weight. The head counts, attention does not
    LoRA      6·R·(O + I)    forward, the gradient at the input, and that of A and B: 2 each
    LoRA-GA  10·R·(O + I)    4 + 4 + 2: the function has rank 2R, the trained matrices have rank R (see `delta_product`)

so the ratio of steps is (4·O·I + 10·R·(O + I)) / (4·O·I + 6·R·(O + I)), which is over 1.03 where R is over about
O·I / (O + I) / 32: 64 for 4096×4096, 9 for 576×576. In memory LoRA-GA has A0 and B0 besides, R·(O + I) numbers a weight, and
from the forward to the backward the joined matrices, where LoRA under autocast has its own in bfloat16: half as large.

A finished run is appended to `results/step_cost.jsonl` and not made again; remove its line to measure anew.
"""

import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from hardware import device_name
from models import TARGETS, add_model_arguments, lora_config, make_model
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from results import Results, markdown_table
from torch import Tensor
from transformers import PreTrainedModel
from variant_process import add_variant_arguments, report, run_variant

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.gradient.memory import peak_memory

TIMES, VARIANTS = "times", ("LoRA", "LoRA-GA")
GOALS = {"time": 1.03, "memory": 1.02}


class Training:
    """One variant, ready to take steps."""

    def __init__(self, variant: str, args: Namespace):
        base, (self.batch,) = make_model(args, args.batch_size)
        (rank,) = args.ranks
        self.model = get_peft_model(base, lora_config(rank, rank_pattern=largest_ranks(base, rank))).train()
        if variant == "LoRA-GA":
            config = LoRAGAArguments(ga_sketch_passes=1)
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
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
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


def compare(rank: int) -> dict[str, Any]:
    arguments = [*sys.argv[1:], "--ranks", str(rank)]
    with tempfile.TemporaryDirectory() as work:
        measured = run_variant(TIMES, arguments, work, environment={})
        return measured | {"bytes": {variant: run_variant(variant, arguments, work)["bytes"] for variant in VARIANTS}}


def table_row(run: dict[str, Any]) -> list[str]:
    lora, ours = (run["seconds"][variant] for variant in VARIANTS)
    ratios = [b / a for a, b in zip(lora, ours, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    lora_bytes, our_bytes = (run["bytes"][variant] for variant in VARIANTS)
    return [
        str(run["settings"]["rank"]),
        f"{statistics.median(lora):.3f}",
        f"{statistics.median(ours):.3f}",
        f"{middle:.3f} ({low:.3f} to {high:.3f})",
        f"{run['on_paper']:.3f}",
        f"{lora_bytes / 2**20:,.0f}",
        f"{our_bytes / 2**20:,.0f}",
        f"{our_bytes / lora_bytes:.3f}",
    ]


def main():
    on_gpu = torch.cuda.is_available()
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser, layers=32 if on_gpu else 1, dtype="bfloat16" if on_gpu else "float32")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--rounds", type=int, default=7)
    add_variant_arguments(parser)
    args = parser.parse_args()
    if args.variant == TIMES:
        return report(args.work, measure_times(args))
    if args.variant:
        return report(args.work, measure_memory(args.variant, args))

    settings = {name: getattr(args, name) for name in ("model", "dtype", "batch_size", "max_length", "rounds")}
    settings |= {"hardware": device_name()} | ({} if args.model == "smollm2" else {"layers": args.layers})
    results = Results("step_cost")
    runs = [results.measure(settings | {"rank": rank}, lambda rank=rank: compare(rank)) for rank in args.ranks]

    print(
        f"\n`python benchmarks/step_cost.py {' '.join(sys.argv[1:])}` ({'; '.join({run['on']: None for run in runs})})\n"
    )
    print(
        f"{runs[0]['tokens']} tokens a step, {args.dtype}, {args.rounds} rounds. Ratios are LoRA-GA / LoRA of the same rank: "
        f"the median over rounds and its quartiles. The goals are {GOALS['time']}× the time and {GOALS['memory']}× the memory. "
        '"On paper" are the floating-point operations of the weights: where they are well over the goal, W0 left alone, no '
        "implementation reaches it. Weights whose smaller side is under 2·r have half of that side as their rank.\n"
    )
    columns = ["r", "LoRA, s", "LoRA-GA, s", "time ratio", "on paper", "LoRA, MiB", "LoRA-GA, MiB", "memory ratio"]
    print(markdown_table(columns, [table_row(run) for run in runs]))


if __name__ == "__main__":
    main()
