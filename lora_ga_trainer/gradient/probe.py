"""The gradient probe: see the gradient of every adapted weight while the model runs, and leave no trace.

For y = W x the gradient of a loss L is ∂L/∂W = Σ dyᵀ x over tokens. The probe hands (x, dy) of each weight to that
weight's accumulator. So the weight never needs `requires_grad`, need not be whole on this process, and may be quantized, if
the quantized layer has a backward for its input (see `quantized_backward`).

Shapes: O out features, I in features, T tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..adapter.adapter import LoRAGAAdapter
from ..adapter.weight import AdaptedWeight
from .quantized_backward import checked_backward
from .restored import backward_to_taps_only, noise_free_training_mode, preserved_rng, uncompiled_modules

Receiver = Callable[[Tensor, Tensor], None]


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward hands (x, dy) to `receive`.

    x is kept with `save_for_backward`, not in a closure, so that gradient checkpointing, reentrant or not, drops and
    recomputes it like every other activation. `anchor` requires a gradient: it makes backward reach the tap although
    every parameter is frozen.
    """

    @staticmethod
    def forward(ctx, output: Tensor, x: Tensor, anchor: Tensor, receive: Receiver) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receive = receive
        # The same memory under a new name. Not `view_as`: autograd forbids changing the view of a custom function in place, as
        # Falcon does with what its layers return. Nobody else holds `output`.
        return output.detach()

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        ctx.receive(x, dy)
        return dy, None, None, None


@contextmanager
def tapped(weights: dict[str, AdaptedWeight], receivers: dict[str, Receiver]) -> Iterator[Tensor]:
    """While inside, every backward gives `receivers[name]` the x (T×I) and dy (T×O) of the weight `name`, in their own dtypes.

    dy is the gradient at the output of the whole PEFT layer, which is that of W plus that of its adapter, so also the
    gradient at the output of W.

    A layer that runs several times in a forward gives each of its calls, and the sum is its gradient. Where W is shared with
    another module, such as the head's with the embedding, what that one does with W does not count: the adapter stands
    beside this layer's W x only, so the share of this layer is what its first step can follow.

    Yields:
        the anchor of all taps: a backward that is to reach nothing else can ask for its gradient.

    Raises:
        ValueError: from the forward, where a layer returns something else than y = W x, such as Llama 4's router.
    """
    anchor = torch.zeros((), requires_grad=True, dtype=torch.float32, device="cpu")

    def tap(name: str, receive: Receiver):
        def receive_2d(x: Tensor, dy: Tensor) -> None:
            with torch.autocast(dy.device.type, enabled=False):
                receive(x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"LoRA-GA cannot initialize {name}: its forward returns a {type(output).__name__} instead of the product "
                    f"of its weight and its input. Leave it out with `exclude_modules=[{name.split('.')[-1]!r}]`."
                )
            return _Tap.apply(output, args[0].detach(), anchor, receive_2d)

        # a compiled function around the layers stops here; those inside them, such as flex attention, stay compiled
        return torch.compiler.disable(hook)

    with ExitStack() as stack:
        for name, receive in receivers.items():
            stack.callback(weights[name].layer.register_forward_hook(tap(name, receive)).remove)
        yield anchor


@contextmanager
def gradient_probe(adapter: LoRAGAAdapter, receivers: dict[str, Receiver]) -> Iterator[Callable[[Tensor], None]]:
    """All of it at once; everything that is touched is restored on the way out, after an error too.

    The model that runs is the adapter's own, not its DDP or DeepSpeed wrapper.

    Args:
        receivers: for each weight to watch, what takes its x (T×I) and dy (T×O), each in its own dtype.

    Yields:
        the `backward(loss)` to use instead of `loss.backward()`.

    Raises:
        ValueError: on leaving, if a quantized layer has no backward.
    """
    with (
        uncompiled_modules(adapter.model),
        preserved_rng(),
        noise_free_training_mode(adapter.model),
        tapped(adapter.weights, receivers) as anchor,
        checked_backward(adapter, anchor),
        backward_to_taps_only(adapter, anchor) as backward,
    ):
        yield backward
