"""What the trainers of these tests are compared by."""

import torch

from lora_ga_trainer import LoRAGASFTTrainer
from lora_ga_trainer.checkpoint.adapter_files import adapter_state_dict, histories

GRADIENT_TOLERANCE = 1e-4
"""Relative, of a layer's gradient in float32: other kernels sum in another order, which rounds by 2⁻²⁴ some hundred times.

Products in TF32, which torch leaves off, would be 2⁻¹¹ = 5e-4 away each; a wrong gradient is 1 away.
"""
FACTOR_TOLERANCE = 40 * GRADIENT_TOLERANCE
"""Relative, over all layers: a singular vector turns by the gradient's error times σ₁ over the gap to the next singular value,
of which the root mean square is about 40 for the first four of the tiny Llama's layers. A wrong vector is 1 away."""
LOSS_TOLERANCE = 1e-3
"""Relative, of a few steps from those factors."""


def losses(trainer: LoRAGASFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter_of(trainer: LoRAGASFTTrainer) -> dict[str, torch.Tensor]:
    found = adapter_state_dict(trainer.model) | histories(trainer.model.lora_ga)
    return {name: value.detach().cpu().clone() for name, value in found.items()}
