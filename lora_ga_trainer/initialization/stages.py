"""The next stage of training, which starts from a trained adapter: SFT and then DPO, a second SFT, RL.

What the adapter has learned is kept, frozen, behind a new pair of any rank, as after a restart: see `adapter.delta`. The pair
keeps the adapter's scaling s, so that its matrices go into the new file as they are.
"""

from typing import TypeGuard

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..adapter.weight import AdaptedWeight
from ..arguments import LoRAGAArguments
from ..checkpoint.scaling import PREFIX


def is_trained(weights: dict[str, AdaptedWeight], config: LoRAGAArguments) -> bool:
    """Whether the adapter adds something to the base model.

    Raises:
        ValueError: it does, but `ga_offset` is False.
    """
    trained = next((name for name, weight in weights.items() if weight.B.weight.any()), None)
    if trained is not None and not config.ga_offset:
        raise ValueError(
            f"`ga_offset` is False, but the adapter has been trained (B of {trained} is not zero): a new stage keeps what was "
            "trained beside a pair A0, B0 with its offset. Leave out `ga_offset`, or merge the adapter first "
            "(`model = model.merge_and_unload()`)."
        )
    return trained is not None


def carries_adapter(model: object) -> TypeGuard[PreTrainedModel]:
    """Whether transformers has put adapters into the model itself (`from_pretrained(adapter_folder)`, `load_adapter`)."""
    return isinstance(model, PreTrainedModel) and model._hf_peft_config_loaded


def as_peft_model(model: PreTrainedModel) -> PeftModel:
    """A model that `carries_adapter`, with that adapter as PEFT puts it there. Its base is the same object.

    Raises:
        ValueError: it has several adapters.
    """
    configs = model.peft_config
    if len(configs) != 1:
        raise ValueError(
            f"transformers has put the adapters {sorted(configs)} into the model, but a stage starts from one. Load it alone "
            "(`PeftModel.from_pretrained(base_model, adapter_folder, is_trainable=True)`)."
        )
    ((name, config),) = configs.items()
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)  # the base keeps those
    for path, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(path, module.original_module)
        elif isinstance(module, BaseTunerLayer) and not path.endswith(".base_layer"):
            model.set_submodule(path, innermost(module))
    del model.peft_config
    model._hf_peft_config_loaded = False
    config.inference_mode = False
    peft_model = get_peft_model(model, config, adapter_name=name)
    set_peft_model_state_dict(peft_model, {PREFIX + key: value for key, value in tensors.items()}, adapter_name=name)
    return peft_model


def innermost(layer: BaseTunerLayer) -> nn.Module:
    """The module that PEFT's layers stand around, one around the other for several parameters of a module."""
    inside = layer.get_base_layer()
    return innermost(inside) if isinstance(inside, BaseTunerLayer) else inside
