"""LoRA-GA's initialization of a PEFT model, whole: probe the gradient, factor it, write A0 and B0.

`initialize_lora_ga` is for people with their own loop; `LoRAGASFTTrainer` calls the same function. `restart_lora_ga` does it
again in the middle of training.

Shapes: O out features, I in features, R LoRA rank.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import replace

from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm

from ..adapter.delta import attach_delta_form, check_targets, delta_layers, lora_layers, offset_halves
from ..adapter.lora_config import check_lora_config, check_no_adapter, check_own_adapter, check_task
from ..adapter.quantized import check_scale
from ..arguments import LoRAGAArguments
from ..checkpoint.adapter_files import file_has_embeddings, make_portable
from ..checkpoint.in_memory import guard_helpers
from ..checkpoint.provenance import forget_changed_base
from ..checkpoint.state import LoRAGAState
from ..distributed.backends import batch_device, forget_optimizer_state, is_sharded, keep_from_ddp, rank
from ..gradient.estimation import (
    ComputeLoss,
    check_batches,
    count_items,
    estimate_gradients,
    language_model_loss,
    make_accumulator,
    sketch_width,
)
from ..gradient.memory import peak_memory
from ..gradient.probe import preserved_rng
from ..report import InitReport
from .factorization import write_all_factors

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
            adapter or one attached with another `ga_offset`, or the adapter or the sketch size does not fit LoRA-GA or the
            model; see `check_lora_config`, `check_own_adapter`, `check_task` and `check_targets`.
    """
    if not isinstance(peft_model, PeftModel):
        check_no_adapter(peft_model)
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
    check_lora_config(lora_config, adapter_name)
    check_own_adapter(peft_model)
    check_task(peft_model, adapter_name)
    if delta_layers(peft_model, adapter_name):
        if peft_model.lora_ga.report is not None:
            raise ValueError(
                f"The adapter {adapter_name!r} has been initialized already by LoRA-GA; a second initialization would "
                "discard what was trained since. Start from a fresh adapter, or merge this one first "
                "(`model = model.merge_and_unload()`)."
            )
        former = peft_model.lora_ga
        if former.options["ga_offset"] != config.ga_offset:
            raise ValueError(
                f"`ga_offset` is {config.ga_offset}, but the adapter {adapter_name!r} was attached with "
                f"{former.options['ga_offset']}, which made other parameters. Pass the same, or start from a fresh adapter."
            )
        check_scale(delta_layers(peft_model, adapter_name), config)
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
    check_scale(layers, config)
    forget_changed_base(peft_model, adapter_name)
    state = LoRAGAState.before_init(lora_config, adapter_name, config, file_has_embeddings(peft_model, adapter_name))
    attach_delta_form(layers, adapter_name, config.ga_offset)
    keep_from_ddp(peft_model, [f"{name}.history" for name in offset_halves(peft_model, adapter_name)])
    make_portable(peft_model, state)
    guard_helpers(peft_model)
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
            number of labels but for −100 in all batches, or of their rows if they have no `labels`; returns a scalar. The
            gradient is that of the sum over batches. By default the cross-entropy of a language model, summed over the
            batch's label tokens, divided by that number.

    Returns:
        the alignment of each layer, and what the initialization took.

    Raises:
        ValueError: no batch, no label, a loss that is not finite, or a target that gets no finite, non-zero
            gradient; also what `attach_lora_ga` raises.
    """
    if not isinstance(config, LoRAGAArguments):
        raise ValueError(
            f"`config` is a {type(config).__name__}, but must hold the `ga_*` options: pass `LoRAGAArguments(...)` or a "
            "`LoRAGASFTConfig`."
        )
    attach_lora_ga(peft_model, config)
    report = _factors_from_gradient(peft_model, batches, config, compute_loss, disable_tqdm, restart=False)
    peft_model.lora_ga.report = report
    return report


def restart_lora_ga(
    peft_model: PeftModel,
    batches: Iterable[dict[str, Tensor]],
    config: LoRAGAArguments,
    optimizer: Optimizer,
    compute_loss: ComputeLoss | None = None,
    *,
    disable_tqdm: bool = False,
) -> InitReport:
    """Start again from a fresh gradient: LoRA-GA inside ReLoRA. To be called between two optimizer steps.

    What was trained so far is frozen into the adapter, so the function is the same and the base stays unwritten; dA and dB are
    zero again beside new factors from the gradient at the current function, and `optimizer` forgets what it knew of them. The
    saved adapter's rank grows by 2·r; merging removes that. If anything fails before the factors are found, nothing has been
    changed. The learning rate is the caller's: let it climb again, since the optimizer starts without momentum.

    From then on only `save_pretrained` and `load_adapter` carry the whole adapter: what was frozen is not in `state_dict()`.

    All other arguments are as for `initialize_lora_ga`.

    Args:
        optimizer: that of the training, as `accelerator.prepare` or `deepspeed.initialize` returned it.

    Returns:
        the alignment of each layer, and what the estimation took.

    Raises:
        ValueError: the adapter has not been initialized yet, `ga_offset` is or was False, or what `initialize_lora_ga` raises.
    """
    state = peft_model.lora_ga
    if not (config.ga_offset and state.options["ga_offset"]):
        raise ValueError(
            f"`ga_offset` is {config.ga_offset}, was {state.options['ga_offset']} when {state.adapter_name!r} was attached, "
            "but a restart keeps what was trained beside a pair A0, B0 with its offset. Set it to True, or do not restart."
        )
    if state.report is None:
        raise ValueError(
            f"The adapter {state.adapter_name!r} has not been initialized by LoRA-GA yet, so there is nothing to restart. Call "
            "`initialize_lora_ga(...)` first."
        )
    report = _factors_from_gradient(peft_model, batches, config, compute_loss, disable_tqdm, restart=True)
    halves = offset_halves(peft_model, state.adapter_name)
    forget_optimizer_state(optimizer, [half.trainable for half in halves.values()])
    state.restarts.append(report)
    return report


def _factors_from_gradient(
    peft_model: PeftModel,
    batches: Iterable[dict[str, Tensor]],
    config: LoRAGAArguments,
    compute_loss: ComputeLoss | None,
    disable_tqdm: bool,
    restart: bool,
) -> InitReport:
    """Estimate, factor, write; at a `restart` what was trained goes to the history first."""
    adapter_name = peft_model.lora_ga.adapter_name
    layers = delta_layers(peft_model, adapter_name)
    if config.ga_estimator == "exact" and not restart and rank() == 0 and any(map(is_sharded, peft_model.parameters())):
        gibibytes = sum(4 * layer.out_features * layer.in_features for layer in layers.values()) / 2**30
        logger.warning(
            f"`ga_estimator` is 'exact' on a sharded model: every process holds the whole float32 gradient of all targets, "
            f"{gibibytes:,.2f} GiB. The default, 'sketch', needs a small part of it."
        )
    with preserved_rng():  # a shuffling DataLoader draws its order
        batches = list(batches)
    check_batches(peft_model, batches, need_labels=compute_loss is None)
    num_items = count_items(peft_model, batches)

    started = time.perf_counter()
    with peak_memory(batch_device(peft_model)) as peak:
        accumulators = {name: make_accumulator(name, layer, adapter_name, config) for name, layer in layers.items()}
        all_reduced_bytes = estimate_gradients(
            peft_model,
            layers,
            accumulators,
            batches,
            compute_loss or language_model_loss,
            num_items,
            disable_tqdm,
            adapter_is_zero=not restart,
        )
        found = write_all_factors(layers, accumulators, adapter_name, config, restart)

    report = InitReport(
        alignment={name: layer.alignment for name, layer in found.items()},
        num_items=num_items,
        seconds=time.perf_counter() - started,
        extra_peak_bytes=peak.extra_bytes,
        all_reduced_bytes=all_reduced_bytes,
        singular_values={name: layer.singular_values for name, layer in found.items()},
        gradient_norm={name: layer.gradient_norm for name, layer in found.items()},
    )
    if rank() == 0:
        logger.info(report.summary())
        if not (disable_tqdm or logger.isEnabledFor(logging.INFO)):  # who watches the progress bar wants its end
            tqdm.write(report.summary())
    return report
