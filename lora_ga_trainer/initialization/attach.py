"""Attaching LoRA-GA to a PEFT model: the adapter gets its delta form, and files that any PEFT reads."""

from dataclasses import replace

from peft import PeftModel

from ..adapter.adapter import LoRAGAAdapter
from ..adapter.delta import attach_delta_form
from ..adapter.lora_config import check_lora_config, check_no_adapter, check_own_adapter, check_task
from ..adapter.quantized import check_scale
from ..adapter.state import LoRAGAState
from ..adapter.targets import check_targets, lora_layers
from ..adapter.weight import adapted_weights
from ..arguments import LoRAGAArguments
from ..checkpoint.adapter_files import bind_files, file_has_embeddings
from ..checkpoint.in_memory import guard_helpers
from ..checkpoint.provenance import forget_changed_base
from ..distributed.backends import exclude_from_ddp_broadcast
from ..gradient.estimation import sketch_width


def attach_lora_ga(peft_model: PeftModel, config: LoRAGAArguments) -> LoRAGAAdapter:
    """Make the active adapter of `peft_model` ready for LoRA-GA: delta form, and saving as an ordinary LoRA adapter.

    The model computes the base function until `initialize_lora_ga` has run. Call it before `accelerator.prepare`, so
    that every backend shards and casts the new parameters like any others. Called again before the initialization, it
    only takes over the new `config`.

    Returns:
        the adapter, which is `peft_model.lora_ga` from now on.

    Raises:
        ValueError: the model is no `PeftModel` with one active LoRA adapter, it has an initialized or another LoRA-GA
            adapter or one attached with another `ga_offset`, or the adapter or the sketch size does not fit LoRA-GA or the
            model; see `check_lora_config`, `check_own_adapter`, `check_task` and `check_targets`.
    """
    adapter_name = _active_adapter(peft_model)
    check_lora_config(peft_model.peft_config[adapter_name], adapter_name)
    check_own_adapter(peft_model)
    check_task(peft_model, adapter_name)
    former = _attached(peft_model)
    if former is not None and former.name == adapter_name:
        return _take_over(former, config)
    if former is not None:
        raise ValueError(
            f"The model has a LoRA-GA adapter already, {former.name!r}, so {adapter_name!r} cannot be one as well. Merge the "
            "first (`model = model.merge_and_unload()`), or train the second on a model of its own."
        )
    layers = lora_layers(peft_model, adapter_name)
    check_targets(layers, adapter_name)
    weights = adapted_weights(layers, adapter_name)
    for weight in weights.values():
        sketch_width(weight, config)
    check_scale(weights, config)
    forget_changed_base(peft_model, adapter_name)
    has_embeddings = file_has_embeddings(peft_model, adapter_name)
    state = LoRAGAState.before_init(peft_model.peft_config[adapter_name], adapter_name, config, has_embeddings)
    for weight in weights.values():
        attach_delta_form(weight.layer, adapter_name, config.ga_offset)
    adapter = LoRAGAAdapter(peft_model, weights, state)
    exclude_from_ddp_broadcast(peft_model, [f"{name}.history" for name in adapter.halves])
    bind_files(adapter)
    guard_helpers(adapter)
    return adapter


def _active_adapter(peft_model: PeftModel) -> str:
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
    return adapter_names[0]


def _attached(peft_model: PeftModel) -> LoRAGAAdapter | None:
    """The LoRA-GA adapter that the model has, if it has not been deleted since."""
    former = vars(peft_model).get("lora_ga")
    return None if former is None or former.is_deleted else former


def _take_over(adapter: LoRAGAAdapter, config: LoRAGAArguments) -> LoRAGAAdapter:
    """The same adapter, to be initialized with `config`."""
    if adapter.is_initialized:
        raise ValueError(
            f"The adapter {adapter.name!r} has been initialized already by LoRA-GA; a second initialization would "
            "discard what was trained since. Start from a fresh adapter, or merge this one first "
            "(`model = model.merge_and_unload()`)."
        )
    former = adapter.state
    if former.options["ga_offset"] != config.ga_offset:
        raise ValueError(
            f"`ga_offset` is {config.ga_offset}, but the adapter {adapter.name!r} was attached with "
            f"{former.options['ga_offset']}, which made other parameters. Pass the same, or start from a fresh adapter."
        )
    check_scale(adapter.weights, config)
    state = LoRAGAState.before_init(adapter.lora_config, adapter.name, config, former.has_embeddings)
    adapter.state = replace(state, launch=former.launch)
    return adapter
