"""The initialization's peak against that of a training step, with gradient checkpointing and without, and what the estimation
holds in models of every size.

    python benchmarks/init_memory.py

Measured: a Llama with random weights in bfloat16, 8 layers of width 1024, sequences of 256 tokens, r = 8. A training step is
the forward, backward and AdamW step of a LoRA-GA adapter when the optimizer has its state, which counts. The initialization
takes half of its batch at once, as the trainer does, or one sample. Both peaks are above the resting model with its adapter;
every measurement is a process of its own.

On paper, for a model in 16 bits, in bytes, per target of shape O×I, with K = 2r + 32 and 8 test columns:

    pass 1           4·(K·(O + I) + 8·O)
    later passes     6·K·(O + I) + 16·O      sums in float32, bases in bfloat16; of a model in float32 8·K·(O + I) + 32·O
    AdamW and the gradients, which stand in training only: 12·r·(O + I), for an adapter in float32

Targets so small that 2·K·(O + I) ≥ O·I hold their gradient instead, 4·O·I. `tests/test_accumulator.py` finds the same in
memory.
"""

import sys
import tempfile
from argparse import ArgumentParser, Namespace
from functools import partial

import torch
from costs.models import llama_shape, lora_config, random_llama
from costs.on_paper import MODELS, TEST_COLUMNS, Model, gigabytes
from measuring.hardware import device_name
from measuring.processes import add_variant_arguments, report, run_variant
from measuring.results import Results, markdown_table
from peft import get_peft_model

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.gradient.memory import peak_memory

BATCH_SIZES = (1, 2, 4)
RANKS = (8, 32, 128)
WHAT = ("initialization", "training step")


def held_bytes(model: Model, rank: int) -> list[int]:
    """What the estimation holds in the first pass and in later ones."""
    width, passes = 2 * rank + 32, [0, 0]
    for O, I in model.shapes():
        if 2 * width * (O + I) >= O * I:
            held = [4 * O * I, 4 * O * I]
        else:
            held = [
                4 * (width * (O + I) + TEST_COLUMNS * O),
                6 * width * (O + I) + 2 * TEST_COLUMNS * O,
            ]
        passes = [total + model.layers * of_target for total, of_target in zip(passes, held, strict=True)]
    return passes


def training_bytes(model: Model, rank: int) -> int:
    """The gradients of the adapter and AdamW's two moments."""
    return 12 * rank * model.layers * sum(O + I for O, I in model.shapes())


def measure_variant(args: Namespace) -> dict[str, int]:
    what, size, checkpointing = args.variant.split("/")
    batch_size = int(size)
    estimated = max(1, batch_size // 2)
    device, shape = torch.device(args.device), llama_shape(width=1024, layers=8)
    model, (batch,) = random_llama(shape, batch_size, 256, batch_size, torch.bfloat16, device)
    model = get_peft_model(model, lora_config(8))
    if checkpointing == "on":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    halved = {name: value[:estimated] for name, value in batch.items()}
    # Once before: kernels and thread buffers that any first use loads are no cost of either.
    short = {name: value[:1, :16] for name, value in batch.items()}
    initialize_lora_ga(model, [short], LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)
    if what == "initialization":
        model = get_peft_model(model.unload(), lora_config(8))
        if checkpointing == "on":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with peak_memory(device) as peak:
            initialize_lora_ga(model, [halved], LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)
        return {"peak": peak.extra_bytes}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    moments = sum(2 * p.nbytes for p in model.parameters() if p.requires_grad)
    for inputs in (short, batch):
        with peak_memory(device) as peak:
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    # the second step finds the moments, which the model at rest does not have
    return {"peak": peak.extra_bytes + moments}


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_variant_arguments(parser)
    args = parser.parse_args()
    if args.variant:
        return report(args.work, measure_variant(args))

    results, rows = Results("init_memory"), []
    with tempfile.TemporaryDirectory() as work:
        for checkpointing in ("on", "off"):
            for size in BATCH_SIZES:
                peaks = []
                for what in WHAT:
                    variant = f"{what}/{size}/{checkpointing}"
                    settings = {"variant": variant, "hardware": device_name()}
                    run = results.measure(settings, partial(run_variant, __file__, variant, sys.argv[1:], work))
                    peaks.append(run["peak"] / 2**20)
                rows.append(
                    [checkpointing, str(size), *(f"{peak:,.0f}" for peak in peaks), f"{peaks[0] / peaks[1]:.2f}"]
                )
    print(f"\n`python benchmarks/init_memory.py {' '.join(sys.argv[1:])}` ({run['on']})\n")
    print(
        markdown_table(["checkpointing", "training batch", "initialization, MiB", "training step, MiB", "ratio"], rows)
    )

    print("\nHeld by the estimation on every process, and by AdamW and the gradients in training; GB = 10⁹ bytes:\n")
    cells = [
        [
            model.name,
            str(rank),
            *map(gigabytes, held_bytes(model, rank)),
            gigabytes(training_bytes(model, rank)),
        ]
        for model in MODELS
        for rank in RANKS
    ]
    print(markdown_table(["model", "r", "pass 1, GB", "later passes, GB", "AdamW and gradients, GB"], cells))


if __name__ == "__main__":
    main()
