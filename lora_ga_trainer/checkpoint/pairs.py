"""The pairs of A and B in an adapter's file: one for a linear layer, one for each expert in a parameter of them.

Shapes: E experts, O out features, I in features, K the rank in the file.
"""

import copy
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedConfig

from ..adapter.targets import lora_layers
from ..adapter.weight import adapted_weights
from .merging import model_class
from .scaling import name_in_patterns


class Pairs(NamedTuple):
    """What one lora_A and one lora_B of a file hold."""

    key: str
    """What a `LoraConfig` matches its patterns with."""
    experts: int = 1
    """E. In the file, A is E·K×I, expert after expert, and B is O×K·E, the first columns of all experts before the second."""

    def a_EKI(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(0, (self.experts, -1))

    def b_EOK(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, (-1, self.experts)).permute(2, 0, 1)

    def matrices(self, b_EOK: Tensor, a_EKI: Tensor) -> tuple[Tensor, Tensor]:
        """(lora_B, lora_A) of a file."""
        return b_EOK.permute(1, 2, 0).flatten(1).contiguous(), a_EKI.flatten(0, 1).contiguous()


def pairs_of_modules(modules: list[str]) -> dict[str, Pairs]:
    """For an adapter without `target_parameters`, of whose modules the file says all."""
    return {module: Pairs(name_in_patterns(module)) for module in modules}


def pairs_on(base: PreTrainedConfig, config: LoraConfig, modules: list[str]) -> dict[str, Pairs]:
    """For an adapter with `target_parameters`: the file does not say how many experts there are, nor which parameter has
    which of the matrices around one module. PEFT does, on an empty model of the `base`'s configuration.

    Raises:
        ValueError: the adapter is for another base, or the base is not one of transformers' own models.
    """
    with torch.device("meta"):
        model = get_peft_model(model_class(base)(base), copy.deepcopy(config))
    weights = adapted_weights(lora_layers(model, "default"), "default").values()
    found = {weight.path: Pairs(name_in_patterns(weight.key), weight.experts) for weight in weights}
    if found.keys() != set(modules):
        odd = min(found.keys() ^ set(modules))
        raise ValueError(
            f"The adapter does not fit the base model: only one of them has {odd}. Pass the one that it was trained on as "
            "`base_model`."
        )
    return found
