"""What an initialization costs and how good it is: ours against PEFT's own LoRA-GA, on the same samples, side by side.

    python benchmarks/init_cost.py --model smollm2
    python benchmarks/init_cost.py --model llama2-7b-shapes --layers 1

Every measurement is a process of its own.

Seconds: from the loaded base model to the initialized adapter, wrapping included, in rounds in which the variants take turns,
so that whatever else changes on the machine changes for all; the ratio to PEFT's is the median over rounds.
Memory: the peak above the resting model, and what of it an ordinary LoRA forward and backward on the same batches does not
take ("added"); in one more process, which gives freed memory back at once, and so is slower.
Alignment: that of the factors with the exact gradient, cos(G, BBᵀG + GAᵀA), as a share of the best that any factors of rank r
reach, √(σ₁² + … + σ₂ᵣ²) / ‖G‖; mean and minimum over the layers.

Finished measurements are in `results/init_cost.jsonl` and not made again. Draws `plots/init_cost_MODEL.png` (needs the extra
`plot`).
"""

import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hardware import device_name
from memory_environment import MALLOC
from models import Batches, add_model_arguments, lora_config, make_model
from peft import LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from results import Results, markdown_table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from variant_process import add_variant_arguments, report, run_variant

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.gradient.estimation import estimate_gradients, make_accumulator
from lora_ga_trainer.gradient.memory import peak_memory
from lora_ga_trainer.gradient.objective import Objective
from lora_ga_trainer.initialization import attach_lora_ga

RANK = 8
HALVED = "ours, 2 passes, half batches"
"""What the trainer does unless told otherwise: `ga_batch_size` is half of the training batch."""
OURS = {
    "ours, 1 pass": LoRAGAArguments(ga_sketch_passes=1),
    "ours, 2 passes": LoRAGAArguments(),
    "ours, 3 passes": LoRAGAArguments(ga_sketch_passes=3),
    HALVED: LoRAGAArguments(),
    "ours, exact": LoRAGAArguments(ga_estimator="exact"),
}
PEFTS = "PEFT preprocess_loraga"
TRAINING, GRADIENT = "a LoRA step", "the exact gradient"
PLOTS = Path(__file__).parent / "plots"


def step(model: PreTrainedModel, batches: Batches) -> None:
    for batch in batches:
        model(**batch).loss.backward()


def warm_up(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Load the kernels and thread buffers that any first forward, backward or factorization would: they are no cost of
    an initialization, but resident memory would count them."""
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    model(inputs_embeds=embeddings, labels=batch["labels"]).loss.backward()
    torch.linalg.svd(torch.linalg.qr(torch.randn(1024, 64, device=embeddings.device)).R)
    model.requires_grad_(True)


def initialized(variant: str, model: PreTrainedModel, batches: Batches) -> tuple[PeftModel, str]:
    """The model with its adapter, and the name of the tensors in it that hold the initial factors."""
    if variant == PEFTS:
        config = lora_config(RANK, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
        preprocess_loraga(model, config, lambda: step(model, batches))
        return get_peft_model(model, config), "weight"
    peft_model = get_peft_model(model, lora_config(RANK))
    initialize_lora_ga(peft_model, batches, OURS[variant], disable_tqdm=True)
    return peft_model, "frozen"


def measure_cost(variant: str, args: Namespace) -> tuple[dict[str, Any], PeftModel, str]:
    """(seconds and peak, and what `initialized` returns)."""
    batch_size = max(1, args.batch_size // 2) if variant == HALVED else args.batch_size
    model, batches = make_model(Namespace(**vars(args) | {"batch_size": batch_size}), args.samples)
    warm_up(model, batches[0])
    device = torch.device(args.device)
    started = time.perf_counter()
    with peak_memory(device) as peak:
        model, part = initialized(variant, model, batches)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return {"seconds": time.perf_counter() - started, "peak": peak.extra_bytes}, model, part


def measure_variant(variant: str, args: Namespace) -> dict[str, Any]:
    """Also the alignment, against what `measure_gradient` left in `args.work`."""
    found, model, part = measure_cost(variant, args)
    shares = []
    best = load_file(f"{args.work}/best.safetensors")
    gradients = load_file(f"{args.work}/gradient.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            A, B = (getattr(half["default"], part).detach().float().cpu() for half in (layer.lora_A, layer.lora_B))
            shares.append(alignment(gradients[name], A, B) / best[name].item())
    return found | {"alignment_mean": statistics.mean(shares), "alignment_min": min(shares)}


def alignment(G: Tensor, A: Tensor, B: Tensor) -> float:
    """cos(G, B Bᵀ G + G Aᵀ A)."""
    first_step = B @ (B.T @ G) + (G @ A.T) @ A
    return ((G * first_step).sum() / (G.norm() * first_step.norm())).item()


def measure_training(args: Namespace) -> dict[str, Any]:
    """What LoRA training takes on the same batches: the reference for "added"."""
    model, batches = make_model(args, args.samples)
    warm_up(model, batches[0])
    model = get_peft_model(model, lora_config(RANK)).train()
    with peak_memory(torch.device(args.device)) as peak:
        step(model, batches)
    return {"peak": peak.extra_bytes}


def measure_gradient(args: Namespace) -> dict[str, Any]:
    """The exact gradient of every layer and its best alignment at this rank, into files of `args.work`."""
    model, batches = make_model(args, args.samples)
    model = get_peft_model(model, lora_config(RANK))
    config = OURS["ours, exact"]
    adapter = attach_lora_ga(model, config)
    accumulators = {name: make_accumulator(weight, config) for name, weight in adapter.weights.items()}
    estimate_gradients(adapter, accumulators, Objective(model, batches))
    # to the CPU, where an SVD of this size takes less time than on a GPU
    gradients = {name: accumulator.grad_OI.cpu() for name, accumulator in accumulators.items()}
    best = {}
    for name, G in gradients.items():
        best[name] = torch.linalg.svdvals(G)[: 2 * RANK].norm() / G.norm()
    save_file(gradients, f"{args.work}/gradient.safetensors")
    save_file(best, f"{args.work}/best.safetensors")
    return {"layers": len(gradients), "bytes": sum(4 * G.numel() for G in gradients.values())}


def measure_all(args: Namespace, results: Results) -> dict[str, dict[str, Any]]:
    """Whatever is missing, then: by variant its rounds, and the references."""
    names = ("model", "samples", "batch_size", "max_length")
    settings = {name: getattr(args, name) for name in names} | {"r": RANK, "hardware": device_name()}
    settings |= {} if args.model == "smollm2" else {"layers": args.layers}
    settings |= {} if args.dtype == "float32" else {"dtype": args.dtype}
    wanted = [{"variant": variant, "round": "memory"} for variant in (TRAINING, *args.variants)]
    wanted += [{"variant": variant, "round": number} for number in range(args.rounds) for variant in args.variants]
    gradient = results.find(settings | {"variant": GRADIENT})
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        measure = partial(run_variant, arguments=sys.argv[1:], work=work)
        if gradient is None or any(results.find(settings | key) is None for key in wanted):
            fresh = measure(GRADIENT)  # its files are needed for every alignment
            gradient = results.measure(settings | {"variant": GRADIENT}, lambda: fresh)
        for key in wanted:
            environment = MALLOC if key["round"] == "memory" else {}
            run = results.measure(settings | key, partial(measure, key["variant"], environment=environment))
            found.setdefault(key["variant"], {})[key["round"]] = run
    return found | {GRADIENT: gradient}


def summary(found: dict[str, dict[str, Any]], variants: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """The numbers of every row: medians over rounds, ratios within a round."""
    full, training = found[GRADIENT]["bytes"], found[TRAINING]["memory"]["peak"]
    rows = {}
    for variant in variants:
        seconds = [found[variant][number]["seconds"] for number in range(rounds)]
        memory = found[variant]["memory"]
        rows[variant] = {
            "seconds": statistics.median(seconds),
            "peak": memory["peak"],
            "added_share": max(0, memory["peak"] - training) / full,
            "alignment_mean": memory["alignment_mean"],
            "alignment_min": memory["alignment_min"],
        }
        if PEFTS in variants:
            theirs = [found[PEFTS][number]["seconds"] for number in range(rounds)]
            rows[variant]["ratio"] = statistics.median(a / b for a, b in zip(seconds, theirs, strict=True))
    return rows


def plot(rows: dict[str, dict[str, float]], path: Path, title: str) -> None:
    """Bars: seconds, added memory, alignment."""
    import matplotlib.pyplot as plt  # here, so that `gpu.py` measures without the extra `plot`

    panels = {
        "seconds": ("seconds (median)", 1, "{:.1f}"),
        "added_share": ("memory added to a LoRA step's,\n% of the float32 gradients", 100, "{:.1f} %"),
        "alignment_mean": ("alignment, share of the best possible\n(mean over layers; | minimum)", 1, "{:.4f}"),
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 0.5 * len(rows) + 2), layout="constrained", sharey=True)
    names = list(rows)[::-1]
    colours = ["#D55E00" if name == PEFTS else "#0072B2" for name in names]  # Okabe & Ito
    for axis, (key, (label, factor, text)) in zip(axes, panels.items(), strict=True):
        values = [factor * rows[name][key] for name in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [text.format(value) for value in values], padding=3)
        axis.set_xlabel(label)
        axis.margins(x=0.25)
    axes[2].plot([rows[name]["alignment_min"] for name in names], names, "|", color="black", markersize=14)
    axes[2].set_xlim(min(row["alignment_min"] for row in rows.values()) - 0.02, 1.03)
    figure.suptitle(title)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser, layers=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=[*OURS, PEFTS], default=[*OURS, PEFTS])
    add_variant_arguments(parser)
    args = parser.parse_args()
    if args.variant:
        workers = {TRAINING: measure_training, GRADIENT: measure_gradient}
        worker = workers.get(args.variant, lambda args: measure_variant(args.variant, args))
        return report(args.work, worker(args))

    found = measure_all(args, Results("init_cost"))
    rows = summary(found, args.variants, args.rounds)
    mib = 2**20
    gradient = found[GRADIENT]
    print(f"\n`python benchmarks/init_cost.py {' '.join(sys.argv[1:])}` ({gradient['on']})\n")
    print(
        f"{gradient['layers']} layers, r = {RANK}, {args.samples} samples in batches of {args.batch_size}, {args.rounds} "
        f"rounds. The full float32 gradients take {gradient['bytes'] / mib:,.0f} MiB; a LoRA forward and backward peaks "
        f"{found[TRAINING]['memory']['peak'] / mib:,.0f} MiB above the model.\n"
    )
    header = [
        "initialization",
        "seconds",
        "/ PEFT's",
        "peak, MiB",
        "/ LoRA step's",
        "added / gradients",
        "alignment",
        "min",
    ]
    cells = [
        [
            variant,
            f"{row['seconds']:.1f}",
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            f"{row['peak'] / mib:,.0f}",
            f"{row['peak'] / found[TRAINING]['memory']['peak']:.2f}",
            f"{row['added_share']:.1%}",
            f"{row['alignment_mean']:.4f}",
            f"{row['alignment_min']:.4f}",
        ]
        for variant, row in rows.items()
    ]
    print(markdown_table(header, cells))
    path = PLOTS / f"init_cost_{args.model}.png"
    plot(rows, path, f"{args.model}: {args.samples} samples, r = {RANK}")
    print(f"\n![what an initialization costs on {args.model}]({path.relative_to(path.parents[1])})")


if __name__ == "__main__":
    main()
