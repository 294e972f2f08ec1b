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


def pairs_on(
    base: PreTrainedConfig, config: LoraConfig, shapes: dict[str, tuple[torch.Size, torch.Size]]
) -> dict[str, Pairs]:
    """For an adapter with `target_parameters`: the file does not say how many experts there are, nor which parameter has
    which of the matrices around one module. PEFT does, on an empty model of the `base`'s configuration.

    Args:
        shapes: those of (lora_A, lora_B) in the file, by module.

    Raises:
        ValueError: the adapter is for another base, or the base is not one of transformers' own models.
    """
    with torch.device("meta"):
        model = get_peft_model(model_class(base)(base), copy.deepcopy(config))
    layers = {path: layer for path, layer in lora_layers(model, "default").items() if "default" in layer.lora_A}
    weights = {weight.path: weight for weight in adapted_weights(layers, "default").values()}
    of_base = {path: (weight.A.weight.shape, weight.B.weight.shape) for path, weight in weights.items()}
    for odd in sorted(module for module in of_base | shapes if of_base.get(module) != shapes.get(module)):
        raise ValueError(
            f"The adapter does not fit the base model: its matrices of {odd} are of shapes {in_words(shapes.get(odd))}, on the "
            f"base they would be of {in_words(of_base.get(odd))}. Pass the model that it was trained on as `base_model`."
        )
    return {path: Pairs(name_in_patterns(weight.key), weight.experts) for path, weight in weights.items()}


def in_words(shapes: tuple[torch.Size, torch.Size] | None) -> str:
    return "none" if shapes is None else " and ".join(str(list(shape)) for shape in shapes)
