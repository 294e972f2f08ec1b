"""One adapted weight: all that the rest of the package sees of a PEFT layer and of the adapter's pair in it.

Shapes: O out features, I in features, R the rank that trains, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor
from torch.nn import Parameter

from ..compatibility import stores_outputs_first
from ..distributed.backends import compute_device, full_tensor, write_parameter
from .delta import DeltaHalf, OffsetHalf


@dataclass(frozen=True, eq=False)
class AdaptedWeight:
    """The weight W (O×I) of a linear layer, and the pair A (R×I), B (O×R) that the adapter trains beside it."""

    path: str
    """Of PEFT's layer, in `named_modules()`."""
    layer: LoraLayer
    adapter_name: str

    @property
    def name(self) -> str:
        """For people and reports."""
        return self.path

    @property
    def key(self) -> str:
        """What PEFT matches the patterns of a `LoraConfig` with."""
        return self.path

    @property
    def experts(self) -> int:
        """E: how many weights stand in one parameter, each with a pair of its own."""
        return 1

    @property
    def out_features(self) -> int:
        return self.layer.out_features

    @property
    def in_features(self) -> int:
        return self.layer.in_features

    @property
    def rank(self) -> int:
        return self.layer.r[self.adapter_name]

    @property
    def scaling(self) -> float:
        """s: α/r, or α/√r with rsLoRA."""
        return self.layer.scaling[self.adapter_name]

    @property
    def A(self) -> Any:
        """`DeltaA`, or `SumA` without the offset."""
        return self.layer.lora_A[self.adapter_name]

    @property
    def B(self) -> Any:
        """`DeltaB`, or what PEFT made without the offset."""
        return self.layer.lora_B[self.adapter_name]

    @property
    def is_in_delta_form(self) -> bool:
        return self.adapter_name in self.layer.lora_A and isinstance(self.A, DeltaHalf)

    @property
    def device(self) -> torch.device:
        """Where the layer computes. A model may be split over several."""
        return compute_device(self.A.trainable)

    @property
    def trained(self) -> tuple[Parameter, Parameter]:
        """(that of A, that of B): what an optimizer holds."""
        return self.A.trainable, self.B.trainable if isinstance(self.B, DeltaHalf) else self.B.weight

    @property
    def offset_halves(self) -> dict[str, OffsetHalf]:
        """Both halves by module name: what a restart freezes. Empty without the offset."""
        halves = {"lora_A": self.A, "lora_B": self.B}
        return {
            f"{self.path}.{matrix}.{self.adapter_name}": half
            for matrix, half in halves.items()
            if isinstance(half, OffsetHalf)
        }

    def write_factors(self, a_ERI: Tensor, b_EOR: Tensor) -> None:
        """Put every A0 and B0 into their frozen halves, cast to the adapter's dtype: the only write of the initialization.

        Every process has to call it. Without the offset B0 is zero and has no place of its own.
        """
        a = a_ERI if self.experts > 1 else a_ERI[0]
        for half, factor in ((self.A, a), (self.B, b_EOR.permute(1, 2, 0).flatten(1))):
            if isinstance(half, DeltaHalf):
                write_parameter(half.frozen, factor)

    def freeze_trained(self) -> None:
        """Move what was learned into the history; dA and dB are zero again, and the function is the same.

        Every process has to call it. A0 and B0 stay until `write_factors` replaces them: with zero differences they add
        nothing.
        """
        for half in self.offset_halves.values():
            trainable, frozen = full_tensor(half.trainable), full_tensor(half.frozen)
            half.history = half.join(trainable, frozen, half.history).to(self.device)
            write_parameter(half.trainable, torch.zeros_like(trainable))


class AdaptedParameter(AdaptedWeight):
    """A parameter that the adapter reaches without a linear layer (`LoraConfig(target_parameters=...)`): the E weights of a
    mixture's experts, or a single one, such as that of its router.

    PEFT's layer stands around the module that has the parameter. Where that module has two of them, one layer stands around
    the other.
    """

    layer: ParamWrapper

    @property
    def name(self) -> str:
        return self.key.removesuffix(".weight")

    @property
    def key(self) -> str:
        module = self.path
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        return f"{module}.{self.layer.parameter_name}"

    @property
    def experts(self) -> int:
        return self.layer.num_experts

    def as_EOI(self, matrices: Tensor) -> Tensor:
        """The parameter, or its gradient, as E matrices O×I: a view."""
        if matrices.dim() == 2:
            return matrices[None]
        return matrices if stores_outputs_first(self.layer) else matrices.mT


def adapted_weights(layers: dict[str, LoraLayer], adapter_name: str) -> dict[str, AdaptedWeight]:
    """What `adapter_name` adapts in PEFT's `layers`, which are given by path, by name."""
    kinds = {
        path: AdaptedParameter if isinstance(layer, ParamWrapper) else AdaptedWeight for path, layer in layers.items()
    }
    weights = [kinds[path](path, layer, adapter_name) for path, layer in layers.items()]
    return {weight.name: weight for weight in weights}
