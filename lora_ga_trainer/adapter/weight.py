"""One adapted weight: all that the rest of the package sees of a PEFT layer and of the adapter's pair in it.

Shapes: O out features, I in features, R the rank that trains.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import Parameter

from ..distributed.backends import compute_device, full_tensor, write_parameter
from .delta import DeltaHalf, OffsetHalf


@dataclass(frozen=True, eq=False)
class AdaptedWeight:
    """A weight W (O×I) of the base model, and the pair A (R×I), B (O×R) that the adapter trains beside it."""

    name: str
    """Of PEFT's layer, in `named_modules()`."""
    layer: LoraLayer
    adapter_name: str

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
        """Both halves by module name: what a restart freezes. None without the offset."""
        halves = {"lora_A": self.A, "lora_B": self.B}
        return {
            f"{self.name}.{matrix}.{self.adapter_name}": half
            for matrix, half in halves.items()
            if isinstance(half, OffsetHalf)
        }

    def write_factors(self, a_RI: Tensor, b_OR: Tensor) -> None:
        """Put A0 and B0 into their frozen halves, cast to the adapter's dtype: the only write of the initialization.

        Every process has to call it. Without the offset B0 is zero and has no place of its own.
        """
        for half, factor in ((self.A, a_RI), (self.B, b_OR)):
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
