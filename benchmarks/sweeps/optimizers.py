"""Optimizers whose step follows W instead of A and B, as more `--method`s of the recipes.

riemannian, rslora_riemannian    AdamW on gradients in the metric of the product (arXiv 2402.02347, equation 4):
                                 (BᵀB)⁻¹ ∂L/∂A and ∂L/∂B (AAᵀ)⁻¹, with A = A0 + dA and B = B0 + dB where there are such
muon, rslora_muon                momenta with all singular values made equal (torch.optim.Muon), at AdamW's size of step
"""

from collections.abc import Callable

import torch
from methods.table import LORA_GA, STOCK, Method, Trainers, lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from trl import SFTTrainer

from lora_ga_trainer import LoRAGASFTTrainer
from lora_ga_trainer.adapter.delta import DeltaHalf

DAMPING = 1e-2
"""Added to BᵀB and AAᵀ, as a share of their mean eigenvalue."""


class Pair:
    """A and B of one layer, as they act, and the parameters that train."""

    def __init__(self, layer: nn.Module):
        self.halves = layer.lora_A["default"], layer.lora_B["default"]

    @property
    def trained(self) -> list[nn.Parameter]:
        return [half.trainable if isinstance(half, DeltaHalf) else half.weight for half in self.halves]

    @property
    def factors(self) -> list[Tensor]:
        """A (R×I) and B (O×R)."""
        return [
            half.frozen + half.trainable if isinstance(half, DeltaHalf) else half.weight.detach()
            for half in self.halves
        ]


def pairs_of(model: nn.Module) -> list[Pair]:
    return [Pair(module) for module in model.modules() if isinstance(module, LoraLayer)]


def damped_inverse(gram_RR: Tensor) -> Tensor:
    eye = torch.eye(len(gram_RR))
    return torch.linalg.inv(gram_RR + (DAMPING * gram_RR.trace() / len(gram_RR)).clamp(min=1e-12) * eye)


class Riemannian:
    """For a `Trainer`: its own optimizer, which gets preconditioned gradients."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        pairs = pairs_of(self.model)

        @torch.no_grad()
        def precondition(*_) -> None:
            for pair in pairs:
                (A, B), (of_A, of_B) = pair.factors, pair.trained
                if B.any():  # in LoRA B starts at zero, where A has no gradient
                    of_A.grad = damped_inverse(B.T @ B) @ of_A.grad
                of_B.grad = of_B.grad @ damped_inverse(A @ A.T)

        optimizer.register_step_pre_hook(precondition)
        return optimizer


class Muon:
    """For a `Trainer`: torch's Muon on all matrices of the adapter."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        matrices = [parameter for pair in pairs_of(self.model) for parameter in pair.trained]
        self.optimizer = torch.optim.Muon(
            matrices, lr=self.args.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        return self.optimizer


def method(optimizer: type, trainer: type[SFTTrainer], adapter: Callable, trainers: Trainers) -> Method:
    return Method(trainers._replace(causal=type("Trainer", (optimizer, trainer), {})), adapter)


OPTIMIZERS = {
    "riemannian": method(Riemannian, LoRAGASFTTrainer, lora(use_rslora=True), LORA_GA),
    "muon": method(Muon, LoRAGASFTTrainer, lora(use_rslora=True), LORA_GA),
    "rslora_riemannian": method(Riemannian, SFTTrainer, lora(use_rslora=True), STOCK),
    "rslora_muon": method(Muon, SFTTrainer, lora(use_rslora=True), STOCK),
}
