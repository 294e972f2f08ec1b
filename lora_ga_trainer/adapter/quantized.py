"""Base layers whose weight is quantized, and how their weight is had in full precision.

The gradient never needs the weight itself, see `gradient.probe`; the scale `weight_svd` does.
"""

import torch
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..arguments import LoRAGAArguments
from ..distributed.backends import is_sharded
from .weight import AdaptedParameter, AdaptedWeight

UNQUANTIZED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEQUANTIZABLE = ("Linear4bit", "Linear8bitLt", "HqqLoraLinear", "TorchaoLoraLinear")
"""PEFT's layers whose base PEFT can dequantize. By name, because each can be imported only where its library is."""


def is_quantized(base: nn.Module) -> bool:
    """Whether the base of a PEFT layer keeps its weight in any other form than a floating-point matrix."""
    if not isinstance(base, (nn.Linear, Conv1D)):
        return True
    # Quantized weights may call themselves floating-point, and be of a class of their own.
    is_plain = type(base.weight) is nn.Parameter or is_sharded(base.weight)
    return base.weight.dtype not in UNQUANTIZED or not is_plain


def quantized_bases(weights: dict[str, AdaptedWeight]) -> dict[str, nn.Module]:
    """The base layers of `weights` that are quantized, by name. The module around a parameter is no layer of one weight."""
    bases = {
        name: weight.layer.get_base_layer()
        for name, weight in weights.items()
        if not isinstance(weight, AdaptedParameter)
    }
    return {name: base for name, base in bases.items() if is_quantized(base)}


def dequantized_weight(weight: AdaptedWeight) -> Tensor:
    """W of the base layer, O×I (I×O in a Conv1D), dequantized if need be; of a parameter E×O×I. The layer is not changed."""
    if isinstance(weight, AdaptedParameter):
        return weight.as_EOI(weight.layer.get_param())
    layer, base = weight.layer, weight.layer.get_base_layer()
    if type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
        # Not `dequantize_module_weight`: on the CPU it puts a new parameter in place, and one of 8 bits loses its scales.
        state = base.state if get_bnb_param_type(base.weight) == "8bit" else None
        return dequantize_bnb_weight(base.weight, state=state)
    return dequantize_module_weight(base)


def check_scale(weights: dict[str, AdaptedWeight], config: LoRAGAArguments) -> None:
    """Refuse `weight_svd` where a weight cannot be had in full precision.

    Raises:
        ValueError: a quantization that PEFT cannot undo.
    """
    if config.scale != "weight_svd":
        return
    for name in quantized_bases(weights):
        kind = type(weights[name].layer).__name__
        if kind not in DEQUANTIZABLE:
            raise ValueError(
                f'`ga_scale="weight_svd"` needs the singular values of the weights, but that of {name} ({kind}) cannot be '
                'dequantized. Use "matched", which does not look at it.'
            )
