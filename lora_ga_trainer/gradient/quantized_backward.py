"""Whether each quantized layer, a target or not, passes the gradient on to its input.

Some kernels are for inference only; then autograd goes on without a word, with gradients that lack all that should have come
through them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..adapter.adapter import LoRAGAAdapter
from ..adapter.quantized import is_quantized, quantized_bases


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
def checked_backward(adapter: LoRAGAAdapter, anchor: Tensor) -> Iterator[None]:
    """Watches every quantized layer of the kinds that are adapted while batches go forward and back inside.

    Raises:
        ValueError: on leaving, if one got a gradient, or should have, but passed none on to its input, which waited for it.
    """
    kinds = {type(base) for base in quantized_bases(adapter.weights).values()}
    watched = {
        name: module for name, module in adapter.model.named_modules() if type(module) in kinds and is_quantized(module)
    }
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
