"""Which of a model's layers the adapter targets, and which of them cannot be started from a gradient."""

from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.lora.layer import MultiheadAttention
from torch import nn

from ..distributed.backends import is_sharded, is_zero3


def lora_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """The PEFT layers of `model` that `adapter_name` targets, of whatever kind, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter_name in module.lora_A or adapter_name in module.lora_embedding_A)
    }


def check_targets(layers: dict[str, LoraLayer], adapter_name: str) -> None:
    """Refuse layers that cannot take the delta form.

    Raises:
        ValueError: the adapter targets nothing, targets a layer that is not linear or a parameter that ZeRO-3 has partitioned,
            is sharded or offloaded, or is not trainable.
    """
    if not layers:
        raise ValueError(
            f"The adapter {adapter_name!r} targets no layer. LoRA-GA needs LoRA layers to initialize: set "
            '`LoraConfig(target_modules=...)`, for example "all-linear".'
        )
    for name, layer in layers.items():
        _check_layer(name, layer, adapter_name)


def _is_linear(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether the adapter stands beside y = W x. For embeddings and convolutions PEFT makes no `nn.Linear` as A; torch's own
    attention module gets one, but runs on the sum of its weight and the adapter's, as one of several products."""
    has_linear_A = adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name], nn.Linear)
    return has_linear_A and not isinstance(layer, MultiheadAttention)


def _check_layer(name: str, layer: LoraLayer, adapter_name: str) -> None:
    if not _is_linear(layer, adapter_name):
        raise ValueError(
            f"LoRA-GA cannot initialize {name} ({type(layer).__name__}): it needs the gradient of a weight that "
            "multiplies an input, so only linear layers can be targets. Remove it from `target_modules` or name it in "
            "`exclude_modules`; `modules_to_save` trains it fully."
        )
    if isinstance(layer, ParamWrapper):
        check_whole_parameter(name, layer)
    if is_sharded(layer.lora_A[adapter_name].weight):
        raise ValueError(
            f"The adapter {adapter_name!r} of {name} is sharded already, so LoRA-GA's own parameters would come too late. Call "
            "`attach_lora_ga(model, config)` before `deepspeed.initialize`, `fully_shard` or `accelerator.prepare`, and "
            "`initialize_lora_ga` after it."
        )
    if layer.lora_A[adapter_name].weight.is_meta:
        raise ValueError(
            f"The adapter {adapter_name!r} of {name} has no memory, because the layer's weight is offloaded to the CPU or to "
            "disk by its `device_map`, and PEFT cannot train an adapter there. Load the model with a `device_map` that keeps "
            "the target layers on devices, quantize it, or offload with DeepSpeed (accelerate_configs/zero3_offload.yaml)."
        )
    if not layer.lora_B[adapter_name].weight.requires_grad:
        raise ValueError(
            f"The adapter {adapter_name!r} of {name} is not trainable. Make it so with `LoraConfig(inference_mode=False)`, or "
            "load it with `PeftModel.from_pretrained(..., is_trainable=True)`."
        )


def check_whole_parameter(name: str, layer: ParamWrapper) -> None:
    """
    Raises:
        ValueError: DeepSpeed ZeRO-3 has partitioned the parameter that PEFT adapts in `layer`. PEFT adds s·BA to it while its
            module runs, when ZeRO-3 has not gathered it yet, or for some families fails before that.
    """
    if is_zero3(layer.get_param()):
        raise ValueError(
            f"`{layer.parameter_name}` of {name} is partitioned by DeepSpeed ZeRO-3, where PEFT's adapters of parameters, such "
            "as those of a mixture's experts, do not work. Use ZeRO-1, ZeRO-2 or FSDP2, or target linear layers only "
            '(`LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])`).'
        )
