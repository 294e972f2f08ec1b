"""The initialization of a mixture's experts against a training step: seconds and memory on one layer in Qwen3-30B-A3B's shapes.

    python benchmarks/experts.py

128 experts of 768×2048, 8 for each token, random weights in bfloat16, r = 8, "all-linear" (PEFT gives the fused `gate_up_proj`
twice the rank), 2 passes over the batch of a training step. A training step is the forward, backward and AdamW step of the
adapter when the optimizer has its state. Peaks are above the resting model with its adapter, and of a step without the
optimizer's moments; every measurement is a process of its own. Told beside them is what the estimation says that it will hold.
"""

import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from functools import partial

import torch
from measuring.hardware import device_name, finish
from measuring.processes import add_variant_arguments, report, run_variant
from measuring.results import Results, markdown_table
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, set_seed

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.gradient.estimation import accumulator_bytes
from lora_ga_trainer.gradient.memory import peak_memory
from lora_ga_trainer.initialization import attach_lora_ga

VARIANTS = ("LoRA, training step", "LoRA-GA, training step", "LoRA-GA, initialization")
OPTIONS = LoRAGAArguments(ga_learning_rate=1e-3)


def one_layer(args: Namespace) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    set_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=args.width, num_hidden_layers=1, num_attention_heads=args.width // 64, num_key_value_heads=4, head_dim=128,
        moe_intermediate_size=args.width * 3 // 8, num_experts=args.experts, num_experts_per_tok=8, vocab_size=1000,
    )  # fmt: skip
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokens = torch.randint(0, config.vocab_size, (args.batch_size, args.max_length)).to(args.device)
    return model, {"input_ids": tokens, "labels": tokens}


def measure_variant(args: Namespace) -> dict[str, float]:
    base, batch = one_layer(args)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model, device = get_peft_model(base, lora), torch.device(args.device)
    short = {name: value[:1, :16] for name, value in batch.items()}
    method, what = args.variant.split(", ")
    if what == "initialization":
        # once before: kernels and thread buffers that any first use loads are no cost of it
        initialize_lora_ga(model, [short], OPTIONS, disable_tqdm=True)
        model = get_peft_model(model.unload(), lora)
        attach_lora_ga(model, OPTIONS)
        started = time.perf_counter()
        with peak_memory(device) as peak:
            found = initialize_lora_ga(model, [batch], OPTIONS, disable_tqdm=True)
            finish(device)
        told = sum(accumulator_bytes(weight, OPTIONS) for weight in model.lora_ga.weights.values())
        return {"seconds": time.perf_counter() - started, "peak": peak.extra_bytes, "told": told} | {
            "idle": found.total_experts().idle,
            "experts": found.total_experts().total,
        }
    if method == "LoRA-GA":
        initialize_lora_ga(model, [short], OPTIONS, disable_tqdm=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for inputs in (short, batch, batch):  # the last is measured
        started = time.perf_counter()
        with peak_memory(device) as peak:
            model.train()(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            finish(device)
    return {"seconds": time.perf_counter() - started, "peak": peak.extra_bytes}


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=2048, help="the hidden size; an expert's is 3/8 of it")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    add_variant_arguments(parser)
    args = parser.parse_args()
    if args.variant:
        return report(args.work, measure_variant(args))

    results, rows = Results("experts"), []
    shape = {name: getattr(args, name) for name in ("width", "experts", "batch_size", "max_length")}
    with tempfile.TemporaryDirectory() as work:
        for variant in VARIANTS:
            runs = [
                results.measure(
                    {"variant": variant, "repeat": repeat, "hardware": device_name()} | shape,
                    partial(run_variant, __file__, variant, sys.argv[1:], work),
                )
                for repeat in range(args.repeats)
            ]
            seconds, peak = (sorted(run[what] for run in runs)[len(runs) // 2] for what in ("seconds", "peak"))
            told = f"{runs[0]['told'] / 2**20:,.0f}" if "told" in runs[0] else "–"
            rows.append([variant, f"{seconds:.1f}", f"{peak / 2**20:,.0f}", told])
    print(f"\n`python benchmarks/experts.py {' '.join(sys.argv[1:])}` ({runs[0]['on']})\n")
    print(markdown_table(["", "seconds", "peak, MiB", "said before, MiB"], rows))
    print(f"\n{runs[0]['idle']} of {runs[0]['experts']} experts' weights got no token of the sample.")


if __name__ == "__main__":
    main()
