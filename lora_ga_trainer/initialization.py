"""LoRA-GA's initialization of a PEFT model, whole: probe the gradient, factor it, write A0 and B0.

`initialize_lora_ga` is for people with their own loop; `LoRAGASFTTrainer` calls the same function.

Shapes: O out features, I in features, R LoRA rank.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import replace

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from .arguments import LoRAGAArguments, check_lora_config
from .backends import broadcast, compute_device, full_tensor, is_sharded, raise_on_all, rank, spread
from .checkpoint.adapter_files import file_has_embeddings, make_portable
from .checkpoint.state import LoRAGAState
from .delta import attach_delta_form, check_targets, delta_layers, lora_layers, write_factors
from .estimation import (
    Accumulator,
    ComputeLoss,
    count_label_tokens,
    estimate_gradients,
    language_model_loss,
    layer_seed,
    make_accumulator,
    sketch_width,
)
from .factors import Factors, lora_ga_factors, scale_factors
from .memory import peak_memory
from .probe import preserved_rng
from .report import InitReport

logger = logging.getLogger(__name__)


def attach_lora_ga(peft_model: PeftModel, config: LoRAGAArguments) -> str:
    """Make the active adapter of `peft_model` ready for LoRA-GA: delta form, and saving as an ordinary LoRA adapter.

    The model computes the base function until `initialize_lora_ga` has run. Call it before `accelerator.prepare`, so
    that every backend shards and casts the new parameters like any others. Called again before the initialization, it
    only takes over the new `config`.

    Returns:
        the name of the adapter.

    Raises:
        ValueError: the model is no `PeftModel` with one active LoRA adapter, it has an initialized or another LoRA-GA
            adapter, or the adapter or the sketch size does not fit LoRA-GA; see `check_lora_config` and `check_targets`.
    """
    if not isinstance(peft_model, PeftModel):
        raise ValueError(
            f"LoRA-GA initializes a `PeftModel`, got {type(peft_model).__name__}: wrap the model with "
            "`peft.get_peft_model(model, LoraConfig(...))` first."
        )
    adapter_names = list(peft_model.active_adapters)
    if len(adapter_names) != 1:
        raise ValueError(
            f"LoRA-GA initializes one adapter at a time, but {adapter_names} are active. Choose one with "
            "`model.set_adapter(name)`."
        )
    (adapter_name,) = adapter_names
    lora_config = peft_model.peft_config[adapter_name]
    check_lora_config(lora_config)
    if delta_layers(peft_model, adapter_name):
        if peft_model.lora_ga.report is not None:
            raise ValueError(
                f"The adapter {adapter_name!r} has been initialized already by LoRA-GA; a second initialization would "
                "discard what was trained since. Start from a fresh adapter, or merge this one first "
                "(`model = model.merge_and_unload()`)."
            )
        former = peft_model.lora_ga
        state = LoRAGAState.before_init(lora_config, adapter_name, config, former.has_embeddings)
        peft_model.lora_ga = replace(state, launch=former.launch)
        return adapter_name
    for other in peft_model.peft_config:
        if delta_layers(peft_model, other):
            raise ValueError(
                f"The model has a LoRA-GA adapter already, {other!r}, so {adapter_name!r} cannot be one as well. Merge the "
                "first (`model = model.merge_and_unload()`), or train the second on a model of its own."
            )
    layers = lora_layers(peft_model, adapter_name)
    check_targets(layers, adapter_name)
    for name, layer in layers.items():
        sketch_width(name, layer, adapter_name, config)
    state = LoRAGAState.before_init(lora_config, adapter_name, config, file_has_embeddings(peft_model, adapter_name))
    attach_delta_form(layers, adapter_name)
    make_portable(peft_model, state)
    return adapter_name


def initialize_lora_ga(
    peft_model: PeftModel,
    batches: Iterable[dict[str, Tensor]],
    config: LoRAGAArguments,
    compute_loss: ComputeLoss | None = None,
    *,
    disable_tqdm: bool = False,
) -> InitReport:
    """Initialize the active LoRA adapter of `peft_model` from the gradient of the loss over `batches`.

    Afterwards the model still computes exactly the base function; train it like any `PeftModel`. Its base weights are
    not written, and its training modes, `requires_grad` flags, hooks and the random state are as they were. If anything
    fails, no factor has been written: the model computes the base function, and since all of the adapter is zero then, it
    learns nothing until an initialization has succeeded.

    With several processes (DDP, DeepSpeed ZeRO, FSDP2) every one has to call it, each with batches of its own, as many as it
    has; the gradient is that of all of them. Pass the module itself, not its DDP or DeepSpeed wrapper. If the model is
    sharded, `attach_lora_ga` has to come before the sharding.

    Args:
        peft_model: from `get_peft_model` with an untrained `LoraConfig` adapter.
        batches: what `compute_loss` takes; by default model inputs with `labels`, −100 where a token must not count.
            Read once and kept, since the estimation goes over it `ga_sketch_passes` times; moved to the model's device
            one by one.
        config: the `ga_*` options; a `LoRAGASFTConfig` is one. `ga_num_samples` and `ga_batch_size` are for whoever
            makes the batches.
        compute_loss: called as `compute_loss(model, batch, num_items_in_batch)`, like `Trainer.compute_loss`, with the
            number of label tokens in all batches; returns a scalar. The gradient is that of the sum over batches. By
            default the cross-entropy of a language model, summed over the batch's label tokens, divided by that number.

    Returns:
        the alignment of each layer, and what the initialization took.

    Raises:
        ValueError: no batch, no label token, a loss that is not finite, or a target that gets no finite, non-zero
            gradient; also what `attach_lora_ga` raises.
    """
    if not isinstance(config, LoRAGAArguments):
        raise ValueError(
            f"`config` is a {type(config).__name__}, but must hold the `ga_*` options: pass `LoRAGAArguments(...)` or a "
            "`LoRAGASFTConfig`."
        )
    adapter_name = attach_lora_ga(peft_model, config)
    layers = delta_layers(peft_model, adapter_name)
    if config.ga_estimator == "exact" and rank() == 0 and any(map(is_sharded, peft_model.parameters())):
        gibibytes = sum(4 * layer.out_features * layer.in_features for layer in layers.values()) / 2**30
        logger.warning(
            f"`ga_estimator` is 'exact' on a sharded model: every process holds the whole float32 gradient of all targets, "
            f"{gibibytes:,.2f} GiB, and as much again while it is all-reduced. The default, 'sketch', needs a small part of it."
        )
    with preserved_rng():  # a shuffling DataLoader draws its order
        batches = list(batches)
    num_items = count_label_tokens(peft_model, batches)

    started = time.perf_counter()
    with peak_memory(compute_device(next(peft_model.parameters()))) as peak:
        accumulators = {name: make_accumulator(name, layer, adapter_name, config) for name, layer in layers.items()}
        all_reduced_bytes = estimate_gradients(
            peft_model, layers, accumulators, batches, compute_loss or language_model_loss, num_items, disable_tqdm
        )
        alignment = write_all_factors(layers, accumulators, adapter_name, config)

    report = InitReport(
        alignment=alignment,
        num_items=num_items,
        seconds=time.perf_counter() - started,
        extra_peak_bytes=peak.extra_bytes,
        all_reduced_bytes=all_reduced_bytes,
    )
    peft_model.lora_ga.report = report
    if rank() == 0:
        logger.info(report.summary())
    return report


def write_all_factors(
    layers: dict[str, LoraLayer], accumulators: dict[str, Accumulator], adapter_name: str, config: LoRAGAArguments
) -> dict[str, float]:
    """Factor every gradient once, on one process each, and write the factors on all. Empties `accumulators`.

    Nothing is written before all factors have been found.

    Returns:
        the alignment of each layer.
    """
    owners = spread({name: sum(total.numel() for total in acc.sums()) for name, acc in accumulators.items()})
    found: dict[str, Factors] = {}
    problem = None
    for name, layer in layers.items():
        mine = owners[name] == rank()
        weight_s = weight_singular_values(layer, mine) if config.ga_scale == "weight_svd" else None
        accumulator = accumulators.pop(name)  # so that each gradient is freed in turn
        if mine:
            try:
                found[name] = factor_gradient(name, layer, accumulator, adapter_name, config, weight_s)
            except torch.linalg.LinAlgError as error:
                problem = f"The gradient of {name} cannot be factored ({error}). Estimate on other or more samples."
    raise_on_all(problem)

    alignment = {}
    for name, layer in layers.items():
        R, O, I = layer.r[adapter_name], layer.out_features, layer.in_features
        device = compute_device(layer.lora_A[adapter_name].trainable)
        flat = torch.empty(R * I + O * R + 1, device=device)
        if name in found:
            factors = found.pop(name)
            parts = [factors.a_RI.flatten(), factors.b_OR.flatten(), torch.tensor([factors.alignment], device=device)]
            torch.cat(parts, out=flat)
        broadcast(flat, source=owners[name])
        a, b, layer_alignment = flat.split([R * I, O * R, 1])
        write_factors(layer, adapter_name, a.view(R, I), b.view(O, R))
        alignment[name] = layer_alignment.item()
    return alignment


def weight_singular_values(layer: LoraLayer, mine: bool) -> Tensor | None:
    """The singular values of W, dequantized and gathered, on the process whose layer it is; all take part in gathering.

    The whole weight lives no longer than this call, so that no two ever stand on a process.
    """
    weight = full_tensor(dequantize_module_weight(layer.get_base_layer()))
    return torch.linalg.svdvals(weight.detach().float()) if mine else None


def factor_gradient(
    name: str,
    layer: LoraLayer,
    accumulator: Accumulator,
    adapter_name: str,
    config: LoRAGAArguments,
    weight_s: Tensor | None = None,
) -> Factors:
    """A0 (R×I) and B0 (O×R) of one layer, float32; see `factors` for the formulas.

    `weight_s`, the singular values of W, are for `weight_svd` only.
    """
    R = layer.r[adapter_name]
    scales = scale_factors(
        config.ga_scale,
        out_features=layer.out_features,
        in_features=layer.in_features,
        rank=R,
        scaling=layer.scaling[adapter_name],
        gamma=config.ga_gamma,
        weight_singular_values=lambda: weight_s,
    )
    generator = torch.Generator().manual_seed(layer_seed(f"{name}/direction", config.ga_seed))
    return lora_ga_factors(accumulator.triplets(2 * R), R, config.ga_direction, scales, generator)
