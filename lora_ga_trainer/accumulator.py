"""What one layer keeps of its gradient G = Σ dyᵀ x while the examples stream by. Imports only torch.

Shapes: O out features, I in features, T tokens, K sketch width, H held-out columns.

Both accumulators have one interface. `passes` is how often the same examples have to stream by; in each pass every
batch is given to `add`, then `end_pass` is called once; after the last pass `triplets` gives the result. Everything is
accumulated in float32, whatever the dtype of x and dy.
"""

import torch
from torch import Tensor

from .factors import SingularTriplets

HELD_OUT_COLUMNS = 8
"""Test columns that never shape the basis, so that what the basis misses can be estimated without bias.

The relative standard error of the missed energy is at most √(2/8) = 50 %, and that energy is a small part of ‖G‖².
"""


class ExactGradient:
    """The whole gradient G (O×I, float32). The reference, and the smaller of the two for small layers."""

    def __init__(self, out_features: int, in_features: int, device: torch.device):
        self.passes = 1
        self.grad_OI = torch.zeros(out_features, in_features, device=device)

    def add(self, x_TI: Tensor, dy_TO: Tensor) -> None:
        """G += dyᵀ x."""
        self.grad_OI.addmm_(dy_TO.T, x_TI)

    def sums(self) -> list[Tensor]:
        """The tensors that this pass sums over examples."""
        return [self.grad_OI]

    def end_pass(self) -> None:
        pass

    def triplets(self, k: int) -> SingularTriplets:
        """The first k singular triplets of G, from a full SVD."""
        u_OM, s_M, vt_MI = torch.linalg.svd(self.grad_OI, full_matrices=False)
        # clone: a slice would keep the full factors alive
        return SingularTriplets(
            u_OM[:, :k].clone(), s_M[:k].clone(), vt_MI[:k].T.clone(), torch.linalg.norm(self.grad_OI).item()
        )


class GradientSketch:
    """A rank-K sketch of G that never forms G: K·(O+I) numbers instead of O·I.

    Pass 1 sums the range sketch Y = GΩ (O×K) for a Gaussian Ω. Every further pass over the same examples projects G on
    an orthonormal basis of what the pass before it found, from alternating sides: Z = QᵀG (K×I) with Q = orth(Y), then
    Y = GP (O×K) with P = orth(Zᵀ), and so on: block power iteration without ever holding G (Halko, Martinsson & Tropp
    2011, algorithm 4.4). The last projection gives the triplets.

    With one pass only, Z = ΨᵀG is summed beside Y and G ≈ Q (ΨᵀQ)⁺ Z (Tropp, Yurtsever, Udell & Cevher 2017, "Practical
    sketching algorithms", algorithm 4), where Q holds only the K/2 leading left singular vectors of Y: with all K the
    least-squares problem is square and ill-conditioned (alignment 0.97 of exact on SmolLM2-135M instead of 0.99). For one
    pass K should be at least twice the number of triplets wanted.

    Ω and Ψ are drawn on the CPU from `seed`, so that every process and every device uses the same ones.

    Args:
        width: K, at most min(O, I).
        passes: how often the examples stream by, at least 1.
        seed: of Ω and Ψ; give each layer its own.
    """

    def __init__(self, out_features: int, in_features: int, width: int, passes: int, seed: int, device: torch.device):
        self.out_features, self.in_features, self.width = out_features, in_features, width
        self.passes, self.passes_done = passes, 0
        self.seed, self.device = seed, device
        # The side(s) on which this pass multiplies G, and the sums that come of it.
        self.right_IK: Tensor | None = torch.cat([self._omega_IK(), self._held_out_IH()], dim=1)
        self.range_OK: Tensor | None = self._zeros(out_features, width + HELD_OUT_COLUMNS)
        self.left_OK: Tensor | None = self._psi_OK() if passes == 1 else None
        self.corange_KI: Tensor | None = self._zeros(width, in_features) if passes == 1 else None

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.device)

    def _gaussian(self, rows: int, columns: int, stream: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + stream)
        return torch.randn(rows, columns, generator=generator).to(self.device)

    def _omega_IK(self) -> Tensor:
        return self._gaussian(self.in_features, self.width, stream=0)

    def _held_out_IH(self) -> Tensor:
        return self._gaussian(self.in_features, HELD_OUT_COLUMNS, stream=1)

    def _psi_OK(self) -> Tensor:
        return self._gaussian(self.out_features, self.width, stream=2)

    def add(self, x_TI: Tensor, dy_TO: Tensor) -> None:
        """Y += dyᵀ(xΩ) and Z += (dyΨ)ᵀx, whichever of the two this pass sums."""
        if self.right_IK is not None:
            self.range_OK.addmm_(dy_TO.T, x_TI @ self.right_IK)
        if self.left_OK is not None:
            self.corange_KI.addmm_((dy_TO @ self.left_OK).T, x_TI)

    def sums(self) -> list[Tensor]:
        """The tensors that this pass sums over examples."""
        return [total for total in (self.range_OK, self.corange_KI) if total is not None]

    def end_pass(self) -> None:
        """Turn what this pass summed into the basis that the next pass projects on."""
        self.passes_done += 1
        if self.passes_done == 1:
            self.held_out_OH = self.range_OK[:, self.width :].clone()
            self.range_OK = self.range_OK[:, : self.width].contiguous()
        if self.passes_done == self.passes:
            return
        if self.right_IK is not None:
            self.left_OK, self.right_IK = torch.linalg.qr(self.range_OK).Q, None
            self.range_OK, self.corange_KI = None, self._zeros(self.width, self.in_features)
        else:
            self.right_IK, self.left_OK = torch.linalg.qr(self.corange_KI.T).Q, None
            self.corange_KI, self.range_OK = None, self._zeros(self.out_features, self.width)

    def triplets(self, k: int) -> SingularTriplets:
        """The first k <= K singular triplets of the sketched G."""
        held_out_IH = self._held_out_IH()
        if self.passes == 1:
            basis_OK = _svd_of_tall(self.range_OK)[0][:, : max(k, self.width // 2)]
            projected_KI = torch.linalg.lstsq(self.left_OK.T @ basis_OK, self.corange_KI).solution
            missed_OH = self.held_out_OH - basis_OK @ (projected_KI @ held_out_IH)
            v_IK, s_K, w_KK = _svd_of_tall(projected_KI.T)
            u_OK = basis_OK @ w_KK
        elif self.right_IK is not None:  # odd number of passes: G ≈ (GP) Pᵀ
            missed_OH = self.held_out_OH - self.range_OK @ (self.right_IK.T @ held_out_IH)
            u_OK, s_K, w_KK = _svd_of_tall(self.range_OK)
            v_IK = self.right_IK @ w_KK
        else:  # even: G ≈ Q (QᵀG)
            missed_OH = self.held_out_OH - self.left_OK @ (self.corange_KI @ held_out_IH)
            v_IK, s_K, w_KK = _svd_of_tall(self.corange_KI.T)
            u_OK = self.left_OK @ w_KK
        # ‖G‖² = what the projection holds + what it misses; E‖Mω‖² = ‖M‖² for a Gaussian ω.
        squared_norm = s_K.square().sum() + missed_OH.square().sum() / HELD_OUT_COLUMNS
        return SingularTriplets(u_OK[:, :k], s_K[:k], v_IK[:, :k], squared_norm.sqrt().item())


def _svd_of_tall(m_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M = U diag(s) Wᵀ for N >= K, by QR and the SVD of the K×K triangle, which costs the same on any device."""
    q_NK, r_KK = torch.linalg.qr(m_NK)
    u_KK, s_K, wt_KK = torch.linalg.svd(r_KK.cpu())
    return q_NK @ u_KK.to(m_NK.device), s_K.to(m_NK.device), wt_KK.T.to(m_NK.device)
