"""What the estimation changes about a model while it runs, and restores: gradients, switches, modes, random states."""

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..adapter.adapter import LoRAGAAdapter
from ..distributed.backends import may_freeze_while_probing

NOISE_ATTRIBUTES = ("drop", "jitter", "neftune", "mask_time_prob", "mask_feature_prob")
"""Numeric attributes of transformers' modules and configurations with these in their names add noise while training:
`attention_dropout`, `layerdrop`, `resid_pdrop`, `router_jitter_noise`, `neftune_noise_alpha`, …
The last two are SpecAugment's."""


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
def adapters_kept_frozen(adapter: LoRAGAAdapter) -> Iterator[None]:
    """While inside, a forward may switch the adapters off and on, or choose another, and no parameter comes to require a
    gradient by it.

    DPO's reference is the model under `disable_adapter()`, or with its adapter "ref". Left alone, PEFT's layers and
    `modules_to_save` would come out of it switched on and requiring gradients.

    Before a first initialization the layers compute W x only, and stay so: adapters that add zero cost two products and copies.
    """
    off, layers = adapter.adds_nothing, [weight.layer for weight in adapter.weights.values()]
    switches = {
        module: _switch_without_gradients
        for module in adapter.model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    }
    switches |= dict.fromkeys(layers, _stay_off if off else _switch_without_gradients)
    if off:
        for layer in layers:
            layer.enable_adapters(False)
    choices = {module: vars(module).get("set_adapter") for module in switches}  # layers in delta form have their own
    for module, switch in switches.items():
        module.enable_adapters = MethodType(switch, module)
        module.set_adapter = partial(_choose_without_gradients, module, module.set_adapter)
    try:
        with warnings.catch_warnings():
            # PEFT finds it odd that the layers are off while `modules_to_save` are on
            warnings.filterwarnings(
                "ignore", message="The model contains some adapter layers that are enabled and others"
            )
            yield
    finally:
        for module, choice in choices.items():
            del module.enable_adapters, module.set_adapter
            if choice is not None:
                module.set_adapter = choice
        if off:
            for layer in layers:
                layer.enable_adapters(True)


def _stay_off(module: nn.Module, enabled: bool) -> None:
    pass


def _switch_without_gradients(module: LoraLayer | AuxiliaryTrainingWrapper, enabled: bool) -> None:
    type(module).enable_adapters(module, enabled)
    module.requires_grad_(False)


def _choose_without_gradients(
    module: LoraLayer | AuxiliaryTrainingWrapper, set_adapter: Callable, *args: Any, **kwargs: Any
) -> None:
    set_adapter(*args, **kwargs)
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
def backward_to_taps_only(adapter: LoRAGAAdapter, anchor: Tensor) -> Iterator[Callable[[Tensor], None]]:
    """Yields the `backward(loss)` that reaches all taps, writes no parameter's gradient and wakes no hook of a parameter."""
    if may_freeze_while_probing(adapter.model):
        # in this order: on leaving, PEFT switches the layers' parameters on
        with frozen_parameters(adapter.model), adapters_kept_frozen(adapter):
            yield Tensor.backward
    else:
        yield partial(Tensor.backward, inputs=[anchor])
