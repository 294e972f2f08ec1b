"""The gradient probe: see the gradient of every adapted weight while the model runs, and leave no trace.

For y = W x the gradient of a loss L is ∂L/∂W = Σ dyᵀ x over tokens. The probe hands (x, dy) of each weight to that
weight's accumulator. So the weight never needs `requires_grad`, need not be whole on this process, and may be quantized, if
the quantized layer has a backward for its input (see `quantized_backward`).

A parameter outside of linear layers, such as that of a mixture's experts, is multiplied in ways of its module's own. There the
probe takes the gradient that autograd makes of it, one parameter at a time.

Shapes: O out features, I in features, T tokens, E experts.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from ..adapter.adapter import LoRAGAAdapter
from ..adapter.targets import check_whole_parameter
from ..adapter.weight import AdaptedParameter, AdaptedWeight
from .quantized_backward import checked_backward
from .restored import backward_to_taps_only, noise_free_training_mode, preserved_rng, uncompiled_modules

Receiver = Callable[..., None]
"""`add` of an accumulator: of (x, dy), or of the gradient of a parameter."""


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


class _ParameterTap(torch.autograd.Function):
    """The identity on a parameter W; its backward hands dW to `receive`, and to nobody else if W is frozen."""

    @staticmethod
    def forward(ctx, W: Tensor, anchor: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.receive = receive
        return W.detach()  # as above

    @staticmethod
    def backward(ctx, dW: Tensor):
        ctx.receive(dW)
        return dW if ctx.needs_input_grad[0] else None, None, None


@contextmanager
def tapped(weights: dict[str, AdaptedWeight], receivers: dict[str, Receiver]) -> Iterator[Tensor]:
    """While inside, every backward gives `receivers[name]` the x (T×I) and dy (T×O) of the weight `name`, in their own dtypes;
    of an `AdaptedParameter` dW (E×O×I), which experts had tokens (E), and how far the entries of dW are rounded.

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

    def of_layer(name: str, receive: Receiver) -> list[RemovableHandle]:
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
        return [weights[name].layer.register_forward_hook(torch.compiler.disable(hook))]

    def of_parameter(weight: AdaptedParameter, receive: Receiver) -> list[RemovableHandle]:
        check_whole_parameter(weight.name, weight.layer)
        # Not a parametrization: torch would put the parameter last in its module, and PEFT nests its layers in that order.
        module, parameter_name = weight.layer.get_base_layer(), weight.layer.parameter_name
        replaced: list[tuple[nn.Module, str, nn.Parameter]] = []

        def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            owner, key = module, parameter_name
            if is_parametrized(module, parameter_name):  # by PEFT, with an adapter that is on
                owner, key = module.parametrizations[parameter_name], "original"
            W = owner._parameters[key]
            rounding = torch.finfo(computing_dtype(W)).eps
            is_reached_E = reached_experts(weight.experts, (*args, *kwargs.values()), W.device)

            def receive_stack(dW: Tensor) -> None:
                with torch.autocast(dW.device.type, enabled=False):
                    receive(weight.as_EOI(dW), is_reached_E, rounding)

            replaced.append((owner, key, W))
            owner._parameters[key] = _ParameterTap.apply(W, anchor, receive_stack)

        def after(*_: Any) -> None:
            owner, key, W = replaced.pop()
            owner._parameters[key] = W

        return [
            module.register_forward_pre_hook(torch.compiler.disable(before), with_kwargs=True),
            # First of all such hooks, since that of FSDP2 puts the sharded parameter back; after errors too, with one of which
            # checkpointing ends the recomputation.
            module.register_forward_hook(torch.compiler.disable(after), prepend=True, always_call=True),
        ]

    with ExitStack() as stack:
        for name, receive in receivers.items():
            weight = weights[name]
            handles = of_parameter(weight, receive) if isinstance(weight, AdaptedParameter) else of_layer(name, receive)
            for handle in handles:
                stack.callback(handle.remove)
        yield anchor


def computing_dtype(W: Tensor) -> torch.dtype:
    """The dtype of the products with W, and so of the gradient before it gets that of W."""
    device = W.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else W.dtype


def reached_experts(experts: int, inputs: Iterable[Any], device: torch.device) -> Tensor:
    """Which of the E experts get tokens (E, bool): those that the `inputs` of their module name, where integers are among them.

    Every mixture in transformers passes the chosen experts of each token so, but for Llama 4, which gives all of them tokens.
    """
    chosen = [x for x in inputs if isinstance(x, Tensor) and not x.dtype.is_floating_point and x.dtype != torch.bool]
    if not chosen:
        return torch.ones(experts, dtype=torch.bool, device=device)
    return torch.isin(torch.arange(experts, device=device), chosen[0].to(device))


@contextmanager
def gradient_probe(adapter: LoRAGAAdapter, receivers: dict[str, Receiver]) -> Iterator[Callable[[Tensor], None]]:
    """Run the probe on the adapter's model; everything that is touched is restored on the way out, after an error too.

    The model that runs is the adapter's own, not its DDP or DeepSpeed wrapper.

    Args:
        receivers: for each weight to watch, `add` of its accumulator, which takes what `tapped` gives.

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
