"""Attaching LoRA-GA to a PEFT model: the adapter gets its delta form, and files that any PEFT reads."""

import logging
from dataclasses import replace
from statistics import mode

from peft import PeftModel

from ..adapter.adapter import LoRAGAAdapter
from ..adapter.delta import attach_delta_form
from ..adapter.lora_config import check_lora_config, check_new_adapter, check_no_adapter, check_own_adapter, check_task
from ..adapter.quantized import check_scale
from ..adapter.state import LoRAGAState
from ..adapter.targets import check_targets, lora_layers
from ..adapter.weight import adapted_weights
from ..arguments import LoRAGAArguments
from ..checkpoint.adapter_files import bind_files, file_has_embeddings
from ..checkpoint.in_memory import guard_helpers
from ..checkpoint.provenance import forget_changed_base
from ..checkpoint.scaling import form_of
from ..distributed.backends import exclude_from_ddp_broadcast, rank
from ..gradient.estimation import check_sketch_size
from .stages import is_trained

logger = logging.getLogger(__name__)


def attach_lora_ga(peft_model: PeftModel, config: LoRAGAArguments) -> LoRAGAAdapter:
    """Make the active adapter of `peft_model` ready for LoRA-GA: delta form, and saving as an ordinary LoRA adapter.

    An adapter that has been trained, by LoRA-GA or anything else, becomes the frozen history of a new stage: what the model
    computes with it is where the new pair starts, and the saved file carries both. The model's function does not change,
    neither now nor in `initialize_lora_ga`.

    Call it before `accelerator.prepare`, so that every backend shards and casts the new parameters like any others, and before
    the optimizer is made, since a new stage has other parameters. Called again before the initialization, it only takes over
    the new `config`.

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
    former = attached(peft_model)
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
    earlier_ranks = {name: weight.rank for name, weight in weights.items()} if is_trained(weights, config) else {}
    if not earlier_ranks:
        check_new_adapter(peft_model.peft_config[adapter_name])
    if config.ga_stage_rank is not None and not earlier_ranks:
        raise ValueError(
            f"`ga_stage_rank` is {config.ga_stage_rank}, but the adapter {adapter_name!r} is new, and its rank is that of its "
            "`LoraConfig(r=...)`. Leave `ga_stage_rank` out: it is for a stage that starts from a trained adapter."
        )
    ranks = {name: config.ga_stage_rank or (r + 1) // 2 for name, r in earlier_ranks.items()}
    for name, weight in weights.items():
        check_sketch_size(name, ranks.get(name, weight.rank), config)
    check_scale(weights, config)
    forget_changed_base(peft_model, adapter_name)
    has_embeddings = file_has_embeddings(peft_model, adapter_name)
    for name, weight in weights.items():
        attach_delta_form(weight.layer, adapter_name, config.ga_offset, ranks.get(name))
    if earlier_ranks:
        peft_model.peft_config[adapter_name] = form_of(peft_model.peft_config[adapter_name], weights, ranks)
        peft_model.peft_config[adapter_name].init_lora_weights = True
    lora_config = peft_model.peft_config[adapter_name]
    state = LoRAGAState.before_init(lora_config, adapter_name, config, has_embeddings, earlier_ranks)
    adapter = LoRAGAAdapter(peft_model, weights, state)
    if earlier_ranks and rank() == 0:
        logger.info(
            f"LoRA-GA starts a new stage: the adapter {adapter_name!r} of rank {mode(earlier_ranks.values())} is kept as it "
            f"is, and a pair of rank {lora_config.r} trains beside it."
        )
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


def attached(peft_model: PeftModel) -> LoRAGAAdapter | None:
    """The LoRA-GA adapter that the model has, if it has not been deleted since."""
    former = vars(peft_model).get("lora_ga")
    return None if former is None or former.is_deleted else former


def _take_over(adapter: LoRAGAAdapter, config: LoRAGAArguments) -> LoRAGAAdapter:
    """The same adapter, to be initialized with `config`."""
    if adapter.is_initialized:
        raise ValueError(
            f"The adapter {adapter.name!r} has been initialized already by LoRA-GA; a second initialization would "
            "discard what was trained since. Start from a fresh adapter; or, for a next stage of training on top of this one, "
            "save it and load it again (`PeftModel.from_pretrained(base_model, folder, is_trainable=True)`)."
        )
    former = adapter.state
    if former.options["ga_offset"] != config.ga_offset:
        raise ValueError(
            f"`ga_offset` is {config.ga_offset}, but the adapter {adapter.name!r} was attached with "
            f"{former.options['ga_offset']}, which made other parameters. Pass the same, or start from a fresh adapter."
        )
    check_scale(adapter.weights, config)
    state = LoRAGAState.before_init(
        adapter.lora_config, adapter.name, config, former.has_embeddings, former.earlier_ranks
    )
    adapter.state = replace(state, launch=former.launch)
    return adapter
