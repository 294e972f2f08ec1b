"""What a training step costs with LoRA-GA's adapter, against LoRA of the same rank: seconds and peak memory.

    python benchmarks/step_cost.py --model smollm2
    python benchmarks/step_cost.py --model llama2-7b-shapes

A step is forward, backward, AdamW and zero_grad. Both adapters have the same r, α, scaling and targets (all linear layers
but the head). LoRA-GA's is initialized from the batch, so that neither A0 nor B0 is zero. In bfloat16 the base is bfloat16
and the adapters are float32 under autocast, as TRL trains.

Time: two models in one process take steps in turns, so that whatever else changes on the machine changes for both; the
ratio is the median over rounds. Memory: a process each; the model's parameters and buffers, and what two steps take at
their peak above them (activations, gradients, AdamW's state).

The operations on paper are counted in `costs/step.py`.

A finished run is appended to `results/step_cost.jsonl` and not made again; remove its line to measure anew.
"""

import statistics
import sys
import tempfile
from argparse import ArgumentParser
from functools import partial
from typing import Any

import torch
from costs.models import add_model_arguments
from costs.step import VARIANTS, measure_memory, measure_times
from measuring.hardware import device_name
from measuring.processes import add_variant_arguments, report, run_variant
from measuring.results import Results, markdown_table

TIMES = "times"
GOALS = {"time": 1.03, "memory": 1.02}


def compare(rank: int) -> dict[str, Any]:
    arguments = [*sys.argv[1:], "--ranks", str(rank)]
    with tempfile.TemporaryDirectory() as work:
        measure = partial(run_variant, __file__, arguments=arguments, work=work)
        measured = measure(TIMES, environment={})
        return measured | {"bytes": {variant: measure(variant)["bytes"] for variant in VARIANTS}}


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
