"""The norms of A0, B0, dA and dB of each layer, from a checkpoint's files.

Shapes: O out features, I in features, R the rank that trains.
"""

from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..adapter.state import LoRAGAState
from ..checkpoint.adapter_files import frozen_file
from ..checkpoint.layouts import LAYOUTS

PARTS = {
    "A0": (".lora_A.frozen",),
    "dA": (".lora_A.trainable",),
    "B0": (".lora_B.frozen",),
    "dB": (".lora_B.trainable", ".lora_B.weight"),  # the latter without the offset
}
"""Endings of the names that `layouts` gives to a layer's parts."""

Norms = dict[str, list[float]]
"""For each existing part, one Frobenius norm per layer."""


def factor_norms(adapter: Path, state: LoRAGAState) -> Norms:
    """‖A0‖ (R×I), ‖dA‖, ‖B0‖ (O×R) and ‖dB‖, float32, of every layer of the saved adapter in `adapter`.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        on_disk, resume_only = load_file(adapter / SAFETENSORS_WEIGHTS_NAME), load_file(frozen_file(adapter))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{adapter} has no readable weights ({error}).") from error
    in_memory = LAYOUTS[state.options["ga_offset"]].split(on_disk, resume_only)
    norms = {
        part: [value.float().norm().item() for name, value in in_memory.items() if name.endswith(ends)]
        for part, ends in PARTS.items()
    }
    return {part: values for part, values in norms.items() if values}
