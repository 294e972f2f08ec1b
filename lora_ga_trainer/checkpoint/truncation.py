"""The best approximation of a product B A at a smaller rank, through its small side: the O×I matrix is never formed.

    B = Q_B R_B,   Aᵀ = Q_A R_A,   R_B R_Aᵀ = U S Vᵀ        so that B A = (Q_B U) S (Q_A V)ᵀ is its singular value decomposition
    B' = Q_B U_R √S_R,   A' = √S_R (Q_A V_R)ᵀ               with the R largest singular values

No product of rank R is nearer to B A in Frobenius norm (Eckart and Young, 1936), and ‖BA − B'A'‖² is the sum of the squares
of the other singular values.

Shapes: O out features, I in features, K the rank that there is, R the rank wanted. Matrices may be stacked, as those of
experts are: then all results are, too.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Truncated(NamedTuple):
    b_OR: Tensor
    a_RI: Tensor
    singular_values: Tensor
    """All min(O, I, K) of B A, descending, in float64."""


def truncate(b_OK: Tensor, a_KI: Tensor, rank: int) -> Truncated:
    """B' and A' of exactly `rank`, in the dtypes of B and A; zeros where B A has fewer singular values.

    It is computed in float64, where it takes nothing beside a forward pass, so that the dtypes' own rounding is all that is
    added to what the smaller rank loses.
    """
    q_b, r_b = torch.linalg.qr(b_OK.double())
    q_a, r_a = torch.linalg.qr(a_KI.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    kept = min(rank, s.shape[-1])
    root = s[..., None, :kept].sqrt()
    b_OR, a_RI = b_OK.new_zeros(*b_OK.shape[:-1], rank), a_KI.new_zeros(*a_KI.shape[:-2], rank, a_KI.shape[-1])
    b_OR[..., :kept] = (q_b @ u[..., :kept] * root).to(b_OK.dtype)
    a_RI[..., :kept, :] = (root.mT * (vh[..., :kept, :] @ q_a.mT)).to(a_KI.dtype)
    return Truncated(b_OR, a_RI, s)
