"""The gradient probe: see the gradient of every adapted weight while the model runs, and leave no trace.

For y = W x the gradient of a loss L is ∂L/∂W = Σ dyᵀ x over tokens. The probe hands (x, dy) of each layer to that
layer's accumulator. So the weight never needs `requires_grad`, need not be whole on this process, and may be quantized, if
the quantized layer has a backward for its input (see `quantized`).

Shapes: O out features, I in features, T tokens.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .backends import may_freeze_while_probing
from .quantized import checked_backward

NOISE_ATTRIBUTES = ("drop", "jitter", "neftune")
"""Numeric attributes of transformers' modules with these in their names add noise while training: `attention_dropout`,
`layerdrop`, `resid_pdrop`, `router_jitter_noise`, `neftune_noise_alpha`, …"""


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward hands (x, dy) to `receive`.

    x is kept with `save_for_backward`, not in a closure, so that gradient checkpointing, reentrant or not, drops and
    recomputes it like every other activation. `anchor` requires a gradient: it makes backward reach the tap although
    every parameter is frozen.
    """

    @staticmethod
    def forward(ctx, output: Tensor, x: Tensor, anchor: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receive = receive
        return output.view_as(output)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        ctx.receive(x, dy)
        return dy, None, None, None


@contextmanager
def tapped(layers: dict[str, LoraLayer], receivers: dict[str, Callable[[Tensor, Tensor], None]]) -> Iterator[Tensor]:
    """While inside, every backward gives `receivers[name]` the x (T×I) and dy (T×O) of layer `name`, in float32.

    dy is the gradient at the output of the whole PEFT layer, which is that of W plus that of its adapter, so also the
    gradient at the output of W.

    Yields:
        the anchor of all taps: a backward that is to reach nothing else can ask for its gradient.
    """
    anchor = torch.zeros((), requires_grad=True)

    def tap(receive: Callable[[Tensor, Tensor], None]):
        def receive_2d(x: Tensor, dy: Tensor) -> None:
            with torch.autocast(dy.device.type, enabled=False):
                receive(x.reshape(-1, x.shape[-1]).float(), dy.reshape(-1, dy.shape[-1]).float())

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return _Tap.apply(output, args[0].detach(), anchor, receive_2d)

        return hook

    with ExitStack() as stack:
        for name, receive in receivers.items():
            stack.callback(layers[name].register_forward_hook(tap(receive)).remove)
        yield anchor


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """While inside, no parameter requires a gradient, so backward writes none."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def bypassed(layers: dict[str, LoraLayer]) -> Iterator[None]:
    """While inside, the layers compute W x only: their adapters add zero, at the cost of two products and two copies."""
    try:
        for layer in layers.values():
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)


def _makes_noise(module: nn.Module, attribute: str) -> bool:
    is_rate_of_dropout_module = attribute == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
    return is_rate_of_dropout_module or any(part in attribute for part in NOISE_ATTRIBUTES)


@contextmanager
def noise_free_training_mode(model: nn.Module) -> Iterator[None]:
    """While inside, the model is in training mode (gradient checkpointing works in no other) but drops nothing out."""
    modes = {module: module.training for module in model.modules()}
    noise = [
        (module, name, value)
        for module in modes
        for name, value in vars(module).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and _makes_noise(module, name)
    ]
    try:
        model.train()
        for module, name, _ in noise:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in noise:
            setattr(module, name, value)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn inside, the random states of Python, NumPy and torch (CPU and accelerator) come out unchanged."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def silent_parameters(
    model: nn.Module, zero_layers: dict[str, LoraLayer], anchor: Tensor
) -> Iterator[Callable[[Tensor], None]]:
    """Yields the `backward(loss)` that reaches all taps, writes no parameter's gradient and wakes no hook of a parameter."""
    if may_freeze_while_probing(model):
        with frozen_parameters(model), bypassed(zero_layers):  # in this order: bypassing switches parameters on again
            yield Tensor.backward
    else:
        yield partial(Tensor.backward, inputs=[anchor])


@contextmanager
def gradient_probe(
    model: nn.Module,
    layers: dict[str, LoraLayer],
    receivers: dict[str, Callable[[Tensor, Tensor], None]],
    adapter_is_zero: bool,
) -> Iterator[Callable[[Tensor], None]]:
    """All of the above at once; everything they touch is restored on the way out, after an error too.

    Args:
        model: the module that runs (not its DDP or DeepSpeed wrapper).
        layers: the adapted layers by name.
        receivers: for each layer to watch, what takes its x (T×I) and dy (T×O), float32.
        adapter_is_zero: the adapter adds nothing yet, and need not be computed.

    Yields:
        the `backward(loss)` to use instead of `loss.backward()`.

    Raises:
        ValueError: on leaving, if a quantized layer has no backward.
    """
    with (
        preserved_rng(),
        noise_free_training_mode(model),
        tapped(layers, receivers) as anchor,
        checked_backward(model, layers, anchor),
        silent_parameters(model, layers if adapter_is_zero else {}, anchor) as backward,
    ):
        yield backward
