"""From the singular triplets of a gradient to the LoRA factors A0, B0. Pure functions; imports only torch.

Shapes: O out features, I in features, R LoRA rank, K number of triplets (K >= 2R).
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]
Scale = Literal["stable", "unit", "gd", "weight_svd"]


class SingularTriplets(NamedTuple):
    """Leading singular triplets of a gradient G (O×I), all float32, singular values in descending order."""

    u_OK: Tensor
    s_K: Tensor
    v_IK: Tensor
    gradient_norm: float
    """Frobenius norm of the whole G, triplets that were cut off included."""


class Factors(NamedTuple):
    """The initial LoRA factors of one layer, float32, and how well they point along its gradient."""

    a_RI: Tensor
    b_OR: Tensor
    alignment: float


def _first_then_second(rank: int, _: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.arange(rank), torch.arange(rank, 2 * rank)


def _second_then_first(rank: int, _: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.arange(rank, 2 * rank), torch.arange(rank)


def _alternating(rank: int, _: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.arange(1, 2 * rank, 2), torch.arange(0, 2 * rank, 2)


def _random_disjoint(rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    order = torch.randperm(2 * rank, generator=generator)
    return order[:rank], order[rank:]


DIRECTIONS: dict[str, Callable[[int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "ArB2r": _first_then_second,
    "A2rBr": _second_then_first,
    "ArBr": _alternating,
    "random": _random_disjoint,
}
"""Which of the first 2r singular vectors go to A (right vectors) and to B (left vectors); paper section 3.2, eq. 8.

Any split of the first 2r into two disjoint halves gives the best rank-2r first step; they differ in later ones.
"""
assert tuple(DIRECTIONS) == get_args(Direction)


def scale_factor(
    scale: Scale,
    *,
    out_features: int,
    rank: int,
    scaling: float,
    gamma: float,
    weight_singular_values: Callable[[], Tensor],
) -> float:
    """The number c that multiplies the singular vectors: A0 = c·V[:, a]ᵀ and B0 = c·U[:, b].

    - `stable`: c = O^¼ / √γ, which keeps the adapter's output on one scale as O and r grow (paper section 3.3,
      theorem 3.2; γ of its section 4.1).
    - `unit`: c = 1 (the paper's "+GA" ablation).
    - `gd`: c = 1 / s, with s the adapter's scaling.
    - `weight_svd`: c = mean over i < r of √(σᵢ(W) / s).

    Args:
        scaling: PEFT's `scaling` of the layer; with rsLoRA s = α/√r (the paper's η).
        gamma: γ, used by `stable` only.
        weight_singular_values: called by `weight_svd` only; returns the singular values of W, descending.
    """
    formulas: dict[str, Callable[[], float]] = {
        "stable": lambda: out_features**0.25 / math.sqrt(gamma),
        "unit": lambda: 1.0,
        "gd": lambda: 1.0 / scaling,
        "weight_svd": lambda: (weight_singular_values()[:rank] / scaling).sqrt().mean().item(),
    }
    return formulas[scale]()


def alignment(s_K: Tensor, gradient_norm: float, picks_A: Tensor, picks_B: Tensor) -> float:
    """How much of the gradient the first step can follow: cos(G, B0 B0ᵀ G + G A0ᵀ A0), in [0, 1].

    The first gradient step of a LoRA with factors A0, B0 moves the weight along B0 B0ᵀ G + G A0ᵀ A0 (paper section 3.2,
    eq. 6). With G = U S Vᵀ that matrix is c²·Σ mᵢ sᵢ uᵢ vᵢᵀ, where mᵢ counts how many of A0, B0 use triplet i, so

        cos = Σ mᵢ sᵢ² / (√(Σ mᵢ² sᵢ²) · ‖G‖).
    """
    multiplicity_K = torch.zeros_like(s_K)
    multiplicity_K[picks_A.to(s_K.device)] += 1
    multiplicity_K[picks_B.to(s_K.device)] += 1
    step_norm = (multiplicity_K * s_K).norm()
    return ((multiplicity_K * s_K**2).sum() / (step_norm * gradient_norm)).item()


def lora_ga_factors(
    triplets: SingularTriplets, rank: int, direction: Direction, c: float, generator: torch.Generator
) -> Factors:
    """A0 = c·V[:, a]ᵀ (R×I) and B0 = c·U[:, b] (O×R); paper section 3.2, eq. 8 and section 3.3.

    No singular value enters, so multiplying the loss by a constant changes nothing. The columns a, b are those of
    `direction`.

    Args:
        generator: a CPU generator, drawn from by the direction `random` only.
    """
    picks_A, picks_B = DIRECTIONS[direction](rank, generator)
    device = triplets.s_K.device
    return Factors(
        a_RI=c * triplets.v_IK[:, picks_A.to(device)].T,
        b_OR=c * triplets.u_OK[:, picks_B.to(device)],
        alignment=alignment(triplets.s_K, triplets.gradient_norm, picks_A, picks_B),
    )
