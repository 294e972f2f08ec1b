"""The gradient probe: see the gradient of every adapted weight while the model runs, and leave no trace.

For y = W x the gradient of a loss L is ∂L/∂W = Σ dyᵀ x over tokens. The probe hands (x, dy) of each layer to that
layer's accumulator. So the weight never needs `requires_grad`, need not be whole on this process, and may be quantized, if
the quantized layer has a backward for its input (see `quantized`).

Shapes: O out features, I in features, T tokens.
"""

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..adapter.quantized import checked_backward
from ..distributed.backends import may_freeze_while_probing

NOISE_ATTRIBUTES = ("drop", "jitter", "neftune", "mask_time_prob", "mask_feature_prob")
"""Numeric attributes of transformers' modules and configurations with these in their names add noise while training:
`attention_dropout`, `layerdrop`, `resid_pdrop`, `router_jitter_noise`, `neftune_noise_alpha`, …
The last two are SpecAugment's."""


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
        # The same memory under a new name. Not `view_as`: autograd forbids changing the view of a custom function in place, as
        # Falcon does with what its layers return. Nobody else holds `output`.
        return output.detach()

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        ctx.receive(x, dy)
        return dy, None, None, None


@contextmanager
def tapped(layers: dict[str, LoraLayer], receivers: dict[str, Callable[[Tensor, Tensor], None]]) -> Iterator[Tensor]:
    """While inside, every backward gives `receivers[name]` the x (T×I) and dy (T×O) of layer `name`, in their own dtypes.

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

    def tap(name: str, receive: Callable[[Tensor, Tensor], None]):
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
            stack.callback(layers[name].register_forward_hook(tap(name, receive)).remove)
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
def held_adapters(model: nn.Module, layers: dict[str, LoraLayer], off: bool) -> Iterator[None]:
    """While inside, a forward may switch the adapters off and on, and no parameter comes to require a gradient by it.

    DPO's reference is the model under `disable_adapter()`. Left alone, PEFT's layers and `modules_to_save` would come out of it
    switched on and requiring gradients.

    Args:
        off: the layers compute W x only, and stay so: adapters that add zero cost two products and two copies.
    """
    switch_of_layers = _stay_off if off else _switch_without_gradients
    switches = {
        module: _switch_without_gradients for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)
    }
    switches |= dict.fromkeys(layers.values(), switch_of_layers)
    if off:
        for layer in layers.values():
            layer.enable_adapters(False)
    for module, switch in switches.items():
        module.enable_adapters = MethodType(switch, module)
    try:
        with warnings.catch_warnings():
            # PEFT finds it odd that the layers are off while `modules_to_save` are on
            warnings.filterwarnings(
                "ignore", message="The model contains some adapter layers that are enabled and others"
            )
            yield
    finally:
        for module in switches:
            del module.enable_adapters
        if off:
            for layer in layers.values():
                layer.enable_adapters(True)


def _stay_off(module: nn.Module, enabled: bool) -> None:
    pass


def _switch_without_gradients(module: LoraLayer | AuxiliaryTrainingWrapper, enabled: bool) -> None:
    type(module).enable_adapters(module, enabled)
    module.requires_grad_(False)


def _makes_noise(owner: nn.Module | PreTrainedConfig, attribute: str) -> bool:
    is_rate_of_dropout_module = attribute == "p" and isinstance(owner, nn.modules.dropout._DropoutNd)
    return is_rate_of_dropout_module or any(part in attribute for part in NOISE_ATTRIBUTES)


@contextmanager
def noise_free_training_mode(model: nn.Module) -> Iterator[None]:
    """While inside, the model is in training mode (gradient checkpointing works in no other) but drops nothing out.

    Batch normalization stays as in evaluation: it would write its running statistics, and mix the examples of a batch.
    """
    modes = {module: module.training for module in model.modules()}
    # a few, such as Falcon, ask their configuration for the rate in every forward
    configs = {id(v): v for module in modes for v in vars(module).values() if isinstance(v, PreTrainedConfig)}
    owners: list[nn.Module | PreTrainedConfig] = [*modes, *configs.values()]
    noise = [
        (owner, name, value)
        for owner in owners
        for name, value in vars(owner).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and _makes_noise(owner, name)
    ]
    try:
        model.train()
        for module in modes:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for owner, name, value in noise:
            setattr(owner, name, type(value)(0))  # configurations check the type
        yield
    finally:
        for owner, name, value in noise:
            setattr(owner, name, value)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def uncompiled_modules(model: nn.Module) -> Iterator[None]:
    """While inside, the modules that were compiled, in place or in a wrapper, run as they were written.

    Compiling them anew for the taps would cost more than it saves, and count towards the limit of recompilations. Not
    `torch.compiler.set_stance("force_eager")`, which would stop the functions that a model compiles for itself too: without
    compilation flex attention makes the whole matrix of scores.
    """
    from torch._dynamo import OptimizedModule  # not above: it takes seconds

    in_place = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    wrappers = {module: module.forward for module in model.modules() if isinstance(module, OptimizedModule)}
    try:
        for module in in_place:
            module._compiled_call_impl = None
        for module in wrappers:
            module.forward = module._orig_mod.__call__
        yield
    finally:
        for module, call in in_place.items():
            module._compiled_call_impl = call
        for module, forward in wrappers.items():
            module.forward = forward


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn inside, the random states of Python, NumPy and torch (CPU and all accelerators) come out unchanged."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type  # any: then there is no device of it
    try:
        with torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=kind):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def silent_parameters(
    model: nn.Module, layers: dict[str, LoraLayer], adapter_is_zero: bool, anchor: Tensor
) -> Iterator[Callable[[Tensor], None]]:
    """Yields the `backward(loss)` that reaches all taps, writes no parameter's gradient and wakes no hook of a parameter."""
    if may_freeze_while_probing(model):
        # in this order: on leaving, PEFT switches the layers' parameters on
        with frozen_parameters(model), held_adapters(model, layers, off=adapter_is_zero):
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
        receivers: for each layer to watch, what takes its x (T×I) and dy (T×O), each in its own dtype.
        adapter_is_zero: the adapter adds nothing yet, and need not be computed.

    Yields:
        the `backward(loss)` to use instead of `loss.backward()`.

    Raises:
        ValueError: on leaving, if a quantized layer has no backward.
    """
    with (
        uncompiled_modules(model),
        preserved_rng(),
        noise_free_training_mode(model),
        tapped(layers, receivers) as anchor,
        checked_backward(model, layers, anchor),
        silent_parameters(model, layers, adapter_is_zero, anchor) as backward,
    ):
        yield backward
