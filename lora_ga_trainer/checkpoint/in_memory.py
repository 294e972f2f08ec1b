"""PEFT's helpers for adapters on the model in memory, where each matrix of a LoRA-GA adapter is held as two halves.

Helpers that read a layer's `weight` or `get_delta_weight` work by construction: `merge_and_unload`, `merge_adapter`,
`convert_to_lora`, `rescale_adapter_scale`, … Helpers that take the rank from the `LoraConfig`, which is that of training, or
that write to the weights are corrected here, or refused: PEFT would silently cut the adapter, or write to a discarded tensor.
"""

from functools import partial, wraps
from statistics import mode
from typing import Any

from peft import PeftModel
from peft.utils import hotswap
from torch import Tensor, nn

from ..adapter.adapter import LoRAGAAdapter
from ..adapter.delta import DeltaHalf
from ..distributed.backends import is_sharded
from .adapter_files import config_as_in_file, ranks_in_file

RELOAD = "Save the adapter (`model.save_pretrained(folder)`) and reload it (`PeftModel.from_pretrained(base_model, folder)`)."


def guard_helpers(adapter: LoRAGAAdapter) -> None:
    """Bind the following to the adapter's model; PEFT has no hook for it."""
    peft_model = adapter.model
    peft_model.add_adapter = partial(add_adapter, peft_model)
    # `peft_model` looks up the methods of its `base_model`
    peft_model.base_model.add_weighted_adapter = partial(add_weighted_adapter, peft_model)
    peft_model.register_load_state_dict_pre_hook(check_not_from_file)


def add_weighted_adapter(peft_model: PeftModel, *args: Any, **kwargs: Any) -> None:
    """`LoraModel.add_weighted_adapter`; same arguments.

    Raises:
        ValueError: the model is sharded.
    """
    stock = type(peft_model.base_model).add_weighted_adapter
    if peft_model.lora_ga.is_deleted:
        stock(peft_model.base_model, *args, **kwargs)
        return
    if any(map(is_sharded, peft_model.parameters())):
        raise ValueError(f"`add_weighted_adapter` needs whole matrices, but those of this model are sharded. {RELOAD}")
    # The new adapter's matrices include all scalings, so its own must be 1; with rsLoRA PEFT 0.21 would make it √r (peft#3761).
    with config_as_in_file(peft_model.lora_ga):
        stock(peft_model.base_model, *args, **kwargs)


def add_adapter(peft_model: PeftModel, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
    """`PeftModel.add_adapter`; same arguments.

    Raises:
        ValueError: `peft_config` is the LoRA-GA adapter's own. PEFT and TRL copy an adapter this way
            (`reduce_intruder_dimension`, the reference of `DPOTrainer`), and the copy would hold only half of it.
    """
    adapter = peft_model.lora_ga
    ranks = ranks_in_file(adapter, len(adapter.state.restarts))
    if ranks != {name: weight.rank for name, weight in adapter.weights.items()} and (
        peft_config is peft_model.peft_config.get(adapter.name)
    ):
        raise ValueError(
            f"The adapter {adapter_name!r} would get the configuration of {adapter.name!r}, of rank {peft_config.r}, but "
            f"in memory a LoRA-GA adapter has rank {mode(ranks.values())}, so it cannot be copied. "
            f"{RELOAD} For a new adapter with the same settings, pass its own `LoraConfig` (`copy.deepcopy(...)`)."
        )
    type(peft_model).add_adapter(peft_model, adapter_name, peft_config, *args, **kwargs)


def check_not_from_file(peft_model: PeftModel, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: refuse an adapter file's matrices, which `set_peft_model_state_dict` passes under names that do
    not exist in memory.

    Raises:
        ValueError: `state_dict` has one.
    """
    adapter_name = peft_model.lora_ga.name
    for layer in (weight.path for weight in peft_model.lora_ga.weights.values()):
        # checking A suffices: it is always in delta form, and a file has both
        for name in ("lora_A.weight", f"lora_A.{adapter_name}.weight"):
            if f"{prefix}{layer}.{name}" in state_dict:
                raise ValueError(
                    f"{layer}.{name} comes from an adapter's file, but in memory the LoRA-GA adapter {adapter_name!r} holds "
                    "that matrix as two halves, so nothing would be loaded. Load the folder with "
                    f"`model.load_adapter(folder, {adapter_name!r}, is_trainable=True)`."
                )


# PEFT's functions `hotswap_adapter` and `prepare_model_for_compiled_hotswap` call no method of the model that could be
# replaced; they would end in a KeyError and an AttributeError, or say no more than that a file is not of rsLoRA.

NO_HOT_SWAP = (
    "A LoRA-GA adapter in memory cannot be hot-swapped, since its matrices are held as two halves each. Use "
    f"`model.load_adapter(folder, adapter_name, is_trainable=True)` to load a checkpoint of the same run. {RELOAD}"
)


def _refuse_delta_form(name: str) -> None:
    stock = getattr(hotswap, name)

    @wraps(stock)
    def checked(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, DeltaHalf) for module in model.modules()):
            raise ValueError(NO_HOT_SWAP)
        return stock(model, *args, **kwargs)

    setattr(hotswap, name, checked)


def _explain_difference(name: str) -> None:
    stock = getattr(hotswap, name)

    @wraps(stock)
    def checked(*configs: Any) -> None:
        try:
            stock(*configs)
        except ValueError as error:
            raise ValueError(f"{error}. {NO_HOT_SWAP}") from error

    setattr(hotswap, name, checked)


# the first functions that they call with the model, or with its configuration; they themselves may have been imported already
for _name in ("hotswap_adapter_from_state_dict", "_convert_scalings_to_tensor"):
    _refuse_delta_form(_name)
_explain_difference("check_hotswap_configs_compatible")
