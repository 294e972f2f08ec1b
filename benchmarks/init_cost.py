"""What an initialization costs and how good it is: ours against PEFT's own LoRA-GA, on the same samples.

    python benchmarks/init_cost.py --model smollm2
    python benchmarks/init_cost.py --model llama2-7b-shapes --layers 2

Every variant runs in a process of its own, one after the other, and prints one row: seconds, peak memory above the
resting model, what of that an ordinary LoRA forward and backward on the same batches does not take ("added"), and the
alignment cos(G, BBᵀG + GAᵀA) of the factors with the exact gradient G, which is computed once beforehand.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

import torch
from hardware import hardware_line
from memory_environment import MALLOC
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, set_seed

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.delta import delta_layers
from lora_ga_trainer.estimation import count_label_tokens, estimate_gradients, language_model_loss, make_accumulator
from lora_ga_trainer.initialization import attach_lora_ga
from lora_ga_trainer.memory import peak_memory

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from demo_model import demo_model_path
from gsm_symbolic import gsm_symbolic
from metamath import to_prompt_completion

RANK = 8
# All linear layers but the head, by name: PEFT's pre-pass finds no layer for "all-linear".
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OURS = {
    "ours, sketch, 1 pass": LoRAGAArguments(ga_sketch_passes=1),
    "ours, sketch, 2 passes": LoRAGAArguments(ga_sketch_passes=2),
    "ours, sketch, 3 passes": LoRAGAArguments(ga_sketch_passes=3),
    "ours, exact": LoRAGAArguments(ga_estimator="exact"),
}
PEFTS = "PEFT preprocess_loraga"


def smollm2(args):
    """The real model and real problems, prompts masked out."""
    path = demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = gsm_symbolic(args.samples, seed=5).map(to_prompt_completion).to_list()
    batches = []
    for start in range(0, args.samples, args.batch_size):
        chunk = rows[start : start + args.batch_size]
        texts = [row["prompt"] + row["completion"] for row in chunk]
        batch = dict(
            tokenizer(
                texts,
                return_tensors="pt",
                padding=True,
                padding_side="right",
                truncation=True,
                max_length=args.max_length,
            )
        )
        batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
        for labels, row in zip(batch["labels"], chunk, strict=True):
            labels[: len(tokenizer(row["prompt"])["input_ids"])] = -100
        batches.append(batch)
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").to(args.device), batches


def llama2_7b_shapes(args):
    """Random weights in Llama-2-7B's layer shapes, random tokens; `--layers 32` is the whole model."""
    set_seed(0)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_hidden_layers=args.layers,
        vocab_size=32000,
    )
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(0, 32000, (args.samples, args.max_length))
    return model, [{"input_ids": ids, "labels": ids} for ids in tokens.split(args.batch_size)]


MODELS = {"smollm2": smollm2, "llama2-7b-shapes": llama2_7b_shapes}


def lora_config(**options):
    return LoraConfig(r=RANK, lora_alpha=16, use_rslora=True, target_modules=TARGETS, task_type="CAUSAL_LM", **options)


def on_device(batches, device):
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def step(model, batches):
    for batch in batches:
        model(**batch).loss.backward()


def warm_up(model, batch):
    """Load the kernels and thread buffers that any first forward, backward or factorization would: they are no cost of
    an initialization, but resident memory would count them."""
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    model(inputs_embeds=embeddings, labels=batch["labels"]).loss.backward()
    torch.linalg.svd(torch.linalg.qr(torch.randn(1024, 64, device=embeddings.device)).R)
    model.requires_grad_(True)


def worker(variant, args):
    """One variant, measured; what it found goes to files in `args.work`."""
    device = torch.device(args.device)
    model, batches = MODELS[args.model](args)
    batches = on_device(batches, device)
    measured = {}
    if variant == "LoRA step":  # the reference for "added": what training takes on the same batches
        warm_up(model, batches[0])
        model = get_peft_model(model, lora_config()).train()
        with peak_memory(device) as peak:
            step(model, batches)
    elif variant == "gradient":
        model = get_peft_model(model, lora_config())
        config = OURS["ours, exact"]
        layers = delta_layers(model, attach_lora_ga(model, config))
        accumulators = {name: make_accumulator(name, layer, "default", config) for name, layer in layers.items()}
        num_items = count_label_tokens(model, batches)
        with peak_memory(device) as peak:
            estimate_gradients(model, layers, accumulators, batches, language_model_loss, num_items, disable_tqdm=False)
        save_file({name: acc.grad_OI.cpu() for name, acc in accumulators.items()}, f"{args.work}/gradient.safetensors")
        measured["gradient_bytes"] = sum(4 * acc.grad_OI.numel() for acc in accumulators.values())
    else:
        warm_up(model, batches[0])
        if variant == PEFTS:
            config = lora_config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
            started = time.perf_counter()
            with peak_memory(device) as peak:
                preprocess_loraga(model, config, lambda: step(model, batches))
                model = get_peft_model(model, config)
            factor = "weight"
        else:
            model = get_peft_model(model, lora_config())
            started = time.perf_counter()
            with peak_memory(device) as peak:
                initialize_lora_ga(model, batches, OURS[variant])
            factor = "frozen"
        measured["seconds"] = time.perf_counter() - started
        factors = {}
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                for half in ("lora_A", "lora_B"):
                    factors[f"{name}.{half}"] = getattr(getattr(layer, half)["default"], factor).detach().float().cpu()
        save_file({name: value.contiguous() for name, value in factors.items()}, f"{args.work}/factors.safetensors")
    measured["peak"] = peak.extra_bytes
    Path(args.work, "measured.json").write_text(json.dumps(measured))


def run(variant, arguments, work):
    subprocess.run(
        [sys.executable, __file__, *arguments, "--variant", variant, "--work", work],
        env=os.environ | MALLOC,
        check=True,
    )
    return json.loads(Path(work, "measured.json").read_text())


def alignments(gradients, factors):
    """cos(G, B Bᵀ G + G Aᵀ A) per layer."""
    found = []
    for name, G in gradients.items():
        A, B = factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]
        first_step = B @ (B.T @ G) + (G @ A.T) @ A
        found.append(((G * first_step).sum() / (G.norm() * first_step.norm())).item())
    return torch.tensor(found)


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--layers", type=int, default=2, help="of llama2-7b-shapes")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variants", nargs="+", choices=[*OURS, PEFTS], default=[*OURS, PEFTS])
    parser.add_argument("--variant", help="used by the benchmark itself, for its worker processes")
    parser.add_argument("--work", help="used by the benchmark itself")
    args = parser.parse_args()
    if args.variant:
        return worker(args.variant, args)

    mib = 2**20
    with tempfile.TemporaryDirectory() as work:
        training = run("LoRA step", sys.argv[1:], work)["peak"]
        full = run("gradient", sys.argv[1:], work)["gradient_bytes"]
        gradients = load_file(f"{work}/gradient.safetensors")
        rows = []
        for variant in args.variants:
            measured = run(variant, sys.argv[1:], work)
            cos = alignments(gradients, load_file(f"{work}/factors.safetensors"))
            added = max(0, measured["peak"] - training)
            rows.append(
                f"| {variant} | {measured['seconds']:.1f} | {measured['peak'] / mib:,.0f} | {added / mib:,.0f} | "
                f"{added / full:.1%} | {cos.mean():.4f} | {cos.min():.4f} |"
            )
    print(f"\n`python benchmarks/init_cost.py {' '.join(sys.argv[1:])}` ({hardware_line()})\n")
    print(
        f"{len(gradients)} layers, r = {RANK}, {args.samples} samples in batches of {args.batch_size}. The full float32 "
        f"gradients take {full / mib:,.0f} MiB; a LoRA forward and backward peaks {training / mib:,.0f} MiB above the model.\n"
    )
    print("| initialization | seconds | peak, MiB | added, MiB | added / gradients | alignment mean | min |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
