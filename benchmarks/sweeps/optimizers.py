"""Optimizers whose step follows W instead of A and B, as more `--method`s of the recipes.

riemannian, rslora_riemannian    AdamW on gradients in the metric of the product (arXiv 2402.02347, equation 4):
                                 (BᵀB)⁻¹ ∂L/∂A and ∂L/∂B (AAᵀ)⁻¹, with A = A0 + dA and B = B0 + dB where there are such
muon, rslora_muon                momenta with all singular values made equal (torch.optim.Muon), at AdamW's size of step
rite, rslora_rite                LoRA-RITE (arXiv 2410.20625, algorithm 1): moments of ∂L/∂W through an orthonormal basis of the
                                 other factor, carried along as that basis turns: B A alone decides how W moves
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


class Seen:
    """∂L/∂W through the column space of the other factor F (M×R), of which LoRA-RITE keeps moments: R×N.

    With F = Q T (Q orthonormal) the gradient of this factor is Tᵀ (Qᵀ ∂L/∂W), and a step D of it moves W by Q (T D).
    """

    BETAS = 0.9, 0.999

    def __init__(self):
        self.steps, self.escaped = 0, 0.0

    def step(self, F_MR: Tensor, gradient_RN: Tensor) -> Tensor:
        """What the factor moves by at a rate of one."""
        Q_MR, T_RR = torch.linalg.qr(F_MR)
        inverse = torch.linalg.pinv(T_RR, rtol=1e-4)
        seen_RN = inverse.T @ gradient_RN
        square_RR = seen_RN @ seen_RN.T / seen_RN.shape[1]
        if self.steps == 0:
            self.Q, self.second, self.first = Q_MR, torch.zeros_like(square_RR), torch.zeros_like(seen_RN)
        first, second = self.BETAS
        turn_RR = Q_MR.T @ self.Q
        turned = turn_RR @ self.second @ turn_RR.T
        left_behind = (torch.linalg.eigvalsh(self.second) - torch.linalg.eigvalsh(turned)).abs().max()
        self.escaped = second * (self.escaped + float(left_behind))
        self.second = second * turned + (1 - second) * square_RR
        self.steps += 1
        values, vectors = torch.linalg.eigh(
            (self.second + self.escaped * torch.eye(len(turned))) / (1 - second**self.steps)
        )
        root = vectors * values.clamp(min=1e-16).rsqrt() @ vectors.T
        self.first = first * turn_RR @ self.first + (1 - first) * root @ seen_RN
        self.Q = Q_MR
        return inverse @ self.first / (1 - first**self.steps)


class RITE(torch.optim.Optimizer):
    def __init__(self, pairs: list[Pair], lr: float):
        self.pairs, self.seen = pairs, [(Seen(), Seen()) for _ in pairs]
        super().__init__([parameter for pair in pairs for parameter in pair.trained], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        (group,) = self.param_groups
        for pair, (of_A, of_B) in zip(self.pairs, self.seen, strict=True):
            (A, B), (trained_A, trained_B) = pair.factors, pair.trained
            for_B = of_B.step(A.T, trained_B.grad.T).T
            if B.any():
                trained_A -= group["lr"] * of_A.step(B, trained_A.grad)
            trained_B -= group["lr"] * for_B


class Rite:
    """For a `Trainer`."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer = RITE(pairs_of(self.model), self.args.learning_rate)
        return self.optimizer


def method(optimizer: type, trainer: type[SFTTrainer], adapter: Callable, trainers: Trainers) -> Method:
    return Method(trainers._replace(causal=type("Trainer", (optimizer, trainer), {})), adapter)


OPTIMIZERS = {
    "riemannian": method(Riemannian, LoRAGASFTTrainer, lora(use_rslora=True), LORA_GA),
    "muon": method(Muon, LoRAGASFTTrainer, lora(use_rslora=True), LORA_GA),
    "rite": method(Rite, LoRAGASFTTrainer, lora(use_rslora=True), LORA_GA),
    "rslora_rite": method(Rite, SFTTrainer, lora(use_rslora=True), STOCK),
    "rslora_riemannian": method(Riemannian, SFTTrainer, lora(use_rslora=True), STOCK),
    "rslora_muon": method(Muon, SFTTrainer, lora(use_rslora=True), STOCK),
}
