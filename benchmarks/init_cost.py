"""What an initialization costs and how good it is: ours against PEFT's own LoRA-GA, on the same samples.

    python benchmarks/init_cost.py --model smollm2
    python benchmarks/init_cost.py --model llama2-7b-shapes --layers 2

Every variant runs in a process of its own, one after the other, and prints one row: seconds, peak memory above the
resting model, what of that an ordinary LoRA forward and backward on the same batches does not take ("added"), and the
alignment cos(G, BBᵀG + GAᵀA) of the factors with the exact gradient G, which is computed once beforehand.
"""

import sys
import tempfile
import time
from argparse import ArgumentParser

import torch
from hardware import hardware_line
from models import add_model_arguments, lora_config, make_model
from peft import LoraGAConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from variant_process import add_variant_arguments, report, run_variant

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.delta import delta_layers
from lora_ga_trainer.estimation import count_label_tokens, estimate_gradients, language_model_loss, make_accumulator
from lora_ga_trainer.initialization import attach_lora_ga
from lora_ga_trainer.memory import peak_memory

RANK = 8
OURS = {
    "ours, sketch, 1 pass": LoRAGAArguments(ga_sketch_passes=1),
    "ours, sketch, 2 passes": LoRAGAArguments(ga_sketch_passes=2),
    "ours, sketch, 3 passes": LoRAGAArguments(ga_sketch_passes=3),
    "ours, exact": LoRAGAArguments(ga_estimator="exact"),
}
PEFTS = "PEFT preprocess_loraga"


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
    model, batches = make_model(args, args.samples)
    measured = {}
    if variant == "LoRA step":  # the reference for "added": what training takes on the same batches
        warm_up(model, batches[0])
        model = get_peft_model(model, lora_config(RANK)).train()
        with peak_memory(device) as peak:
            step(model, batches)
    elif variant == "gradient":
        model = get_peft_model(model, lora_config(RANK))
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
            config = lora_config(RANK, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
            started = time.perf_counter()
            with peak_memory(device) as peak:
                preprocess_loraga(model, config, lambda: step(model, batches))
                model = get_peft_model(model, config)
            factor = "weight"
        else:
            model = get_peft_model(model, lora_config(RANK))
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
    report(args.work, measured)


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
    add_model_arguments(parser, layers=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--variants", nargs="+", choices=[*OURS, PEFTS], default=[*OURS, PEFTS])
    add_variant_arguments(parser)
    args = parser.parse_args()
    if args.variant:
        return worker(args.variant, args)

    mib = 2**20
    with tempfile.TemporaryDirectory() as work:
        training = run_variant("LoRA step", sys.argv[1:], work)["peak"]
        full = run_variant("gradient", sys.argv[1:], work)["gradient_bytes"]
        gradients = load_file(f"{work}/gradient.safetensors")
        rows = []
        for variant in args.variants:
            measured = run_variant(variant, sys.argv[1:], work)
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
