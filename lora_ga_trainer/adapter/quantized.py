"""Base layers whose weight is quantized: what LoRA-GA needs of them, and how their weight is had in full precision.

The gradient never needs the weight itself, see `probe`. What it needs is that each quantized layer, a target or not, passes
the gradient on to its input: some kernels are for inference only, and then autograd goes on without a word, with gradients
that lack all that should have come through them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..arguments import LoRAGAArguments
from ..distributed.backends import is_sharded

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


# --- the backward ---------------------------------------------------------------------------------------------------


class _Mark(torch.autograd.Function):
    """The identity on a layer's input; its backward tells that a gradient has come through the layer.

    The `anchor` makes it a part of every backward that is to reach the anchor only.
    """

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, came_through: Callable[[], None]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.came_through = came_through
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor | None):
        if dx is not None:  # an operator without a derivative calls this too, with nothing
            ctx.came_through()
        return dx, None, None


@contextmanager
def checked_backward(model: nn.Module, layers: dict[str, LoraLayer], anchor: Tensor) -> Iterator[None]:
    """Watches every quantized layer of the kinds that `layers` have while batches go forward and back inside.

    Raises:
        ValueError: on leaving, if one got a gradient, or should have, but passed none on to its input, which waited for it.
    """
    kinds = {type(layer.get_base_layer()) for layer in layers.values() if is_quantized(layer.get_base_layer())}
    watched = {name: module for name, module in model.named_modules() if type(module) in kinds and is_quantized(module)}
    reached: set[str] = set()
    came_through: set[str] = set()

    def before(name: str, module: nn.Module, args: tuple) -> tuple:
        x, *others = args
        if not (torch.is_grad_enabled() and x.requires_grad):
            return args
        return (_Mark.apply(x, anchor, partial(came_through.add, name)), *others)

    def after(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        if not (torch.is_grad_enabled() and args[0].requires_grad):
            return
        if output.requires_grad:
            output.register_hook(lambda dy: reached.add(name))
        else:
            reached.add(name)

    with ExitStack() as stack:
        for name, module in watched.items():
            stack.callback(module.register_forward_pre_hook(partial(before, name)).remove)
            stack.callback(module.register_forward_hook(partial(after, name)).remove)
        yield
    blocking = [name for name in watched if name in reached - came_through]
    if blocking:
        raise ValueError(
            f"{len(blocking)} quantized layers pass no gradient on to their input, first {blocking[0]} "
            f"({type(watched[blocking[0]]).__name__}): their kernel is for inference only, so all layers before them would get "
            "a wrong gradient, from LoRA-GA and in training. Load the model with a kernel that can train. (On a CPU with "
            "AVX512-BF16, bitsandbytes repacks 4-bit weights for such a kernel when the model is evaluated: load it anew, and "
            "evaluate after training.)"
        )


# --- the weight -----------------------------------------------------------------------------------------------------


def dequantized_weight(layer: LoraLayer) -> Tensor:
    """W of the base layer, O×I (I×O in a Conv1D), dequantized if need be. The layer itself is not changed."""
    base = layer.get_base_layer()
    if type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
        # Not `dequantize_module_weight`: on the CPU it puts a new parameter in place, and one of 8 bits loses its scales.
        state = base.state if get_bnb_param_type(base.weight) == "8bit" else None
        return dequantize_bnb_weight(base.weight, state=state)
    return dequantize_module_weight(base)


def check_scale(layers: dict[str, LoraLayer], config: LoRAGAArguments) -> None:
    """Refuse `weight_svd` for layers whose weight cannot be had in full precision.

    Raises:
        ValueError: a quantization that PEFT cannot undo.
    """
    if config.ga_scale != "weight_svd":
        return
    for name, layer in layers.items():
        if is_quantized(layer.get_base_layer()) and type(layer).__name__ not in DEQUANTIZABLE:
            raise ValueError(
                f'`ga_scale="weight_svd"` needs the singular values of the weights, but that of {name} '
                f'({type(layer).__name__}) cannot be dequantized. Use "stable", the default, which does not look at it.'
            )
