"""One initialization, ours or PEFT's: its seconds, its peak of memory and its alignment, and what they are compared with."""

import statistics
import time
from argparse import Namespace
from typing import Any

import torch
from measuring.hardware import finish
from peft import LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from costs.models import Batches, lora_config, make_model
from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.gradient.estimation import estimate_gradients, make_accumulator
from lora_ga_trainer.gradient.memory import peak_memory
from lora_ga_trainer.gradient.objective import Objective
from lora_ga_trainer.initialization import attach_lora_ga

RANK = 8
HALVED = "ours, 2 passes, half batches"
"""What the trainer does unless told otherwise: `ga_batch_size` is half of the training batch."""
OURS = {
    "ours, 1 pass": LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_passes=1),
    "ours, 1.25 passes": LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_passes=1.25),
    "ours, 1.25 passes, K = 96": LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_passes=1.25, ga_sketch_size=96),
    "ours, 1.5 passes, K = 96": LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_passes=1.5, ga_sketch_size=96),
    "ours, 2 passes": LoRAGAArguments(ga_learning_rate=1e-3),
    "ours, 3 passes": LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_passes=3),
    HALVED: LoRAGAArguments(ga_learning_rate=1e-3),
    "ours, exact": LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact"),
}
PEFTS = "PEFT preprocess_loraga"


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
    """(seconds, those of its processor cores, and peak; and what `initialized` returns)."""
    batch_size = max(1, args.batch_size // 2) if variant == HALVED else args.batch_size
    model, batches = make_model(Namespace(**vars(args) | {"batch_size": batch_size}), args.samples)
    warm_up(model, batches[0])
    device = torch.device(args.device)
    started, cpu_started = time.perf_counter(), time.process_time()
    with peak_memory(device) as peak:
        model, part = initialized(variant, model, batches)
        finish(device)
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
    return seconds | {"peak": peak.extra_bytes}, model, part


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
