"""The delta form of LoRA-GA: the modules that take the place of `lora_A` and `lora_B` in a PEFT layer.

The paper starts from y = W0 x + s·(B A − B0 A0) x at A = A0, B = B0, by subtracting s·B0 A0 from W0. We never touch W0.
With the differences dA = A − A0 and dB = B − B0, which alone are trained, the same function is

    y = W0 x + s·(dB (A0 + dA) + B0 dA) x = W0 x + s · [dB, B0] · [A0 + dA; dA] · x

one LoRA of rank 2R that is exactly zero while dA and dB are, in every precision. PEFT's layers only ever call
`lora_B(lora_A(x))` and read `.weight`, so forward, merge, unmerge and disabling the adapter come out right. The products
themselves, and their gradients, are in `product`.

A restart freezes the rows and columns so far as `history` H behind a new pair, so that the rank grows by 2R each time. A new
stage of training does the same with the adapter that it starts from, whose rank may be any:

    lora_A = [A0 + dA; dA; H_A]        lora_B = [dB, B0, H_B]

Without the offset B0 is zero, and what is left is a LoRA of rank R, whose `lora_B` can stay what PEFT made:

    y = W0 x + s·dB (A0 + dA) x        lora_A = A0 + dA        lora_B = dB

The experts of a mixture are one parameter of E weights, which PEFT adapts with one A and one B for all of them. The same halves
hold those, see `join_a` and `join_b`; PEFT reads their `weight` alone and adds s·BA to the parameter.

Shapes: O out features, I in features, R the rank that trains, E experts.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from .joined_weight import joined_weight
from .product import join_a, join_b, multiply_a, multiply_b


class DeltaHalf(nn.Module):
    """A matrix in delta form: a trainable difference, zero at the start, and a frozen initial factor.

    `trainable` is the parameter that PEFT made, set to zero, so that an optimizer which already holds it keeps working.
    `frozen` is zero until it is estimated; it has the same dtype and device. Where PEFT has the rows of E experts one after
    the other, the `stack` E, its shape tells them apart: E×R×I.
    """

    def __init__(self, trainable: nn.Parameter, stack: int = 1):
        super().__init__()
        with torch.no_grad():
            trainable.zero_()
        self.trainable = trainable
        frozen = torch.zeros_like(trainable)
        self.frozen = nn.Parameter(frozen.unflatten(0, (stack, -1)) if stack > 1 else frozen, requires_grad=False)


class OffsetHalf(DeltaHalf):
    """What DeltaA and DeltaB share.

    `history` is what earlier stages have learned and restarts frozen, None if there were none. It is a buffer, whole on every
    process, because parameters that are made while training would be unknown to ZeRO-3 and FSDP2; and not persistent, because
    their own checkpoints would be loaded into a model that does not have it yet. The adapter's files hold it.
    """

    history: Tensor | None

    def __init__(self, trainable: nn.Parameter, stack: int = 1):
        super().__init__(trainable, stack)
        self.register_buffer("history", None, persistent=False)

    @staticmethod
    def join(trainable: Tensor, frozen: Tensor, history: Tensor | None, /) -> Tensor:
        """The matrix of rank 2R, or more after restarts, that PEFT, and the saved file, see."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        return joined_weight(self.trainable, lambda: self.join(self.trainable, self.frozen, self.history))


class DeltaA(OffsetHalf):
    """Takes the place of `lora_A`: weight [A0 + dA; dA] (2R×I), with dA = `trainable` and A0 = `frozen` (R×I)."""

    join = staticmethod(join_a)

    @staticmethod
    def split(weight: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor | None]:
        """(dA, history) of a joined weight, bit for bit. A0 is not in it but for one rounding; `checkpoint` keeps it apart, and
        gives it here as `frozen`."""
        *stacked, rank, in_features = frozen.shape
        _, *parts = weight.view(*stacked, -1, in_features).tensor_split([rank, 2 * rank], dim=-2)
        trainable, history = (part.flatten(0, -2) for part in parts)
        return trainable, history if len(history) else None

    def forward(self, x: Tensor) -> Tensor:
        return multiply_a(x, self.trainable, self.frozen, self.history)


class DeltaB(OffsetHalf):
    """Takes the place of `lora_B`: weight [dB, B0] (O×2R), with dB = `trainable` and B0 = `frozen` (O×R).

    `bias` (O) is that of `LoraConfig(lora_bias=True)`, else None; it trains as in any LoRA.
    """

    def __init__(self, trainable: nn.Parameter, bias: nn.Parameter | None):
        super().__init__(trainable)
        self.bias = bias

    join = staticmethod(join_b)

    @staticmethod
    def split(weight: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(dB, B0, history) of a joined weight, bit for bit, of which the first two have R `columns`, or R·E."""
        trainable, frozen, history = weight.tensor_split([columns, 2 * columns], dim=1)
        return trainable, frozen, history if history.shape[1] else None

    def forward(self, x: Tensor) -> Tensor:
        y = multiply_b(x, self.trainable, self.frozen, self.history)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class SumA(DeltaHalf):
    """Takes the place of `lora_A` without the offset: weight A0 + dA (R×I), with dA = `trainable` and A0 = `frozen` (R×I).

    The sum has their dtype; dA alone is trained, so what rounding takes from the sum is not lost to later steps.
    """

    @staticmethod
    def join(trainable: Tensor, frozen: Tensor) -> Tensor:
        return frozen.flatten(0, -2) + trainable

    @property
    def weight(self) -> Tensor:
        return joined_weight(self.trainable, lambda: self.join(self.trainable, self.frozen))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.join(self.trainable, self.frozen))


def attach_delta_form(layer: LoraLayer, adapter_name: str, offset: bool = True, stage_rank: int | None = None) -> None:
    """Bring the adapter `adapter_name` of `layer` into delta form, in place. The function stays the same.

    Do this before `accelerator.prepare`, on layers that `check_targets` has passed. The random values of a fresh A are
    dropped. Without the `offset` B stays as PEFT made it, zero.

    Args:
        stage_rank: the rank of a new pair before a trained adapter, which becomes the history; needs the `offset`. Optimizers
            must be made afterwards.
    """
    lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    stack = layer.num_experts if isinstance(layer, ParamWrapper) else 1
    earlier = None
    if stage_rank is not None:
        earlier = lora_A.weight.detach(), lora_B.weight.detach()
        (A, B), R = earlier, stack * stage_rank
        lora_A.weight, lora_B.weight = nn.Parameter(A.new_empty(R, A.shape[1])), nn.Parameter(B.new_empty(len(B), R))
        layer.r[adapter_name] = stage_rank
    if offset:
        layer.lora_A[adapter_name] = DeltaA(lora_A.weight, stack)
        layer.lora_B[adapter_name] = DeltaB(lora_B.weight, lora_B.bias)
        if earlier is not None:
            layer.lora_A[adapter_name].history, layer.lora_B[adapter_name].history = earlier
    else:
        layer.lora_A[adapter_name] = SumA(lora_A.weight, stack)
    # not `MethodType`, which pickle looks up in the class
    layer.set_adapter = partial(_set_adapter, layer)
    layer.set_requires_grad = partial(_set_requires_grad, layer)
    layer._cast_input_dtype = partial(_cast_input_dtype, layer)


def _cast_input_dtype(layer: LoraLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x for the adapters, whose parameters have `dtype`: as it is where autocast would undo PEFT's cast to a wider dtype.

    That spares two copies of x in the forward and two of its gradient in the backward. In quantized layers PEFT itself leaves x
    alone under autocast. Dropout comes between the two casts, and rounds in the dtype that it gets, so there both stay.
    """
    is_widened = x.dtype.itemsize < dtype.itemsize
    drops = any(not isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    if torch.is_autocast_enabled(x.device.type) and is_widened and not drops:
        return x
    return type(layer)._cast_input_dtype(layer, x, dtype)


# PEFT switches adapters on and off (`set_adapter`, `disable_adapter`, …) through these two methods of each layer, and
# with an adapter every parameter in it. The initial factors have to stay frozen, or the next optimizer would train them.


def _set_adapter(layer: LoraLayer, *args: Any, **kwargs: Any) -> None:
    type(layer).set_adapter(layer, *args, **kwargs)
    _freeze_initial_factors(layer)


def _set_requires_grad(layer: LoraLayer, *args: Any, **kwargs: Any) -> None:
    type(layer).set_requires_grad(layer, *args, **kwargs)
    _freeze_initial_factors(layer)


def _freeze_initial_factors(layer: LoraLayer) -> None:
    for half in (*layer.lora_A.values(), *layer.lora_B.values()):
        if isinstance(half, DeltaHalf):
            half.frozen.requires_grad_(False)
