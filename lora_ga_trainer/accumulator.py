"""What one layer keeps of its gradient G = Σ dyᵀ x while the examples stream by. Imports only torch.

Shapes: O out features, I in features, T tokens, K sketch width, H held-out columns.

Both accumulators have one interface. `passes` is how often the same examples have to stream by; in each pass every
batch is given to `add`, then `end_pass` is called once; after the last pass `triplets` gives the result. Everything is
accumulated in float32, whatever the dtype of x and dy; see `product`.
"""

import torch
from torch import Tensor

from .factors import SingularTriplets

HELD_OUT_COLUMNS = 8
"""Test columns that never shape the basis, so that what the basis misses can be estimated without bias.

The relative standard error of the missed energy is at most √(2/8) = 50 %, and that energy is a small part of ‖G‖².
"""


def operands(x_TI: Tensor, dy_TO: Tensor) -> tuple[Tensor, Tensor]:
    """x and dy as `product` takes them: both bfloat16, where the device multiplies that into float32, or both float32.

    The device is CUDA: torch documents `torch.mm(out_dtype=)`, there since 2.8, for no other, and CPUs have no such kernel. Not
    `torch.addmm(out_dtype=)`, which takes no float32 summand in 2.8. float16 has too few exponents for the parts of xP and dyQ.
    """
    if x_TI.dtype == dy_TO.dtype == torch.bfloat16 and x_TI.is_cuda and torch.version.hip is None:
        return x_TI, dy_TO
    return x_TI.float(), dy_TO.float()


def product(a_MT: Tensor, b_TN: Tensor) -> Tensor:
    """A B in float32, summed in float32, of matrices that have come through `operands`, or been made of them.

    Products of two bfloat16 numbers are exact in float32. A float32 matrix beside a bfloat16 one enters as the sum of two in
    bfloat16, which is off by at most 2⁻¹⁷ of each number, 256 times less than its bfloat16 partner was rounded by.
    """
    if a_MT.dtype == b_TN.dtype:
        return a_MT @ b_TN if a_MT.dtype == torch.float32 else torch.mm(a_MT, b_TN, out_dtype=torch.float32)
    if b_TN.dtype == torch.bfloat16:
        return product(b_TN.T, a_MT.T).T
    first, second = torch.mm(a_MT, in_two_parts(b_TN), out_dtype=torch.float32).chunk(2, dim=1)
    return first + second


def in_two_parts(b_TN: Tensor) -> Tensor:
    """[B₁, B₂] (T×2N, bfloat16) with B = B₁ + B₂ but for 2⁻¹⁷ of each number of B (float32)."""
    first = b_TN.to(torch.bfloat16)
    return torch.cat([first, (b_TN - first).to(torch.bfloat16)], dim=1)


def add_product(sum_MN: Tensor, a_MT: Tensor, b_TN: Tensor) -> None:
    """sum += A B, all as in `product`; in float32 without a matrix in between."""
    if a_MT.dtype == b_TN.dtype == torch.float32:
        sum_MN.addmm_(a_MT, b_TN)
    else:
        sum_MN.add_(product(a_MT, b_TN))


class ExactGradient:
    """The whole gradient G (O×I, float32). The reference, and the smaller of the two for small layers."""

    def __init__(self, out_features: int, in_features: int, device: torch.device):
        self.passes = 1
        self.grad_OI = torch.zeros(out_features, in_features, dtype=torch.float32, device=device)

    def add(self, x_TI: Tensor, dy_TO: Tensor) -> None:
        """G += dyᵀ x."""
        x_TI, dy_TO = operands(x_TI, dy_TO)
        add_product(self.grad_OI, dy_TO.T, x_TI)

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
    """A sketch of G that never forms G: 2·K·(O+I) numbers instead of O·I.

    Every pass multiplies G from both sides at once and sums

        Y = G P  (O×K)        Z = Qᵀ G  (K×I)

    P and Q are Gaussian in the first pass; after it they are orthonormal bases of what the pass before it found, P = orth(Zᵀ)
    and Q = orth(Y): block power iteration on both sides (Halko, Martinsson & Tropp 2011, section 4.5). After the last pass

        Ĝ = Q Z + Y Pᵀ − Q (QᵀY) Pᵀ = G − (I − QQᵀ) G (I − PPᵀ)

    so that what is missed is what *both* bases miss, and it is orthogonal to Ĝ. On the gradients of SmolLM2-135M two such
    passes align like three that multiply from one side each, as in Halko et al.'s algorithm 4.4.

    After one pass only, P and Q know nothing of G, and G ≈ U (QᵀU)⁺ Z with a basis U of Y (Tropp, Yurtsever, Udell & Cevher
    2017, "Practical sketching algorithms", algorithm 4). U holds only the K/2 leading left singular vectors of Y: with all K
    the least-squares problem is square and ill-conditioned (alignment 0.97 of exact on SmolLM2-135M instead of 0.99). For one
    pass K should be at least twice the number of triplets wanted.

    The Gaussian matrices are drawn on the CPU from `seed`, so that every process and every device uses the same ones.

    Args:
        width: K, at most half of min(O, I).
        passes: how often the examples stream by, at least 1.
        seed: of the Gaussian matrices; give each layer its own.
    """

    def __init__(self, out_features: int, in_features: int, width: int, passes: int, seed: int, device: torch.device):
        self.width, self.passes, self.passes_done = width, passes, 0
        self.seed, self.device = seed, device
        self.left_OK = self._gaussian(out_features, width, stream=2)
        # the test columns go along with the first P
        self.right_IK = torch.cat([self._gaussian(in_features, width, stream=0), self._held_out_IH(in_features)], dim=1)
        self._start_sums()

    def _gaussian(self, rows: int, columns: int, stream: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(self.seed + stream)
        drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(self.device)

    def _held_out_IH(self, in_features: int) -> Tensor:
        return self._gaussian(in_features, HELD_OUT_COLUMNS, stream=1)

    def _start_sums(self) -> None:
        (O, K), (I, columns) = self.left_OK.shape, self.right_IK.shape
        self.range_OK = torch.zeros(O, columns, dtype=torch.float32, device=self.device)
        self.corange_KI = torch.zeros(K, I, dtype=torch.float32, device=self.device)

    def add(self, x_TI: Tensor, dy_TO: Tensor) -> None:
        """Y += dyᵀ(xP) and Z += (dyQ)ᵀx."""
        x_TI, dy_TO = operands(x_TI, dy_TO)
        add_product(self.range_OK, dy_TO.T, product(x_TI, self.right_IK))
        add_product(self.corange_KI, product(dy_TO, self.left_OK).T, x_TI)

    def sums(self) -> list[Tensor]:
        """The tensors that this pass sums over examples."""
        return [self.range_OK, self.corange_KI]

    def end_pass(self) -> None:
        """Turn what this pass summed into the bases that the next pass multiplies with."""
        self.passes_done += 1
        if self.passes_done == 1:
            self.held_out_OH = self.range_OK[:, self.width :].clone()
            self.range_OK = self.range_OK[:, : self.width].contiguous()
            self.right_IK = self.right_IK[:, : self.width].contiguous()
        if self.passes_done < self.passes:
            self.left_OK, self.right_IK = torch.linalg.qr(self.range_OK).Q, torch.linalg.qr(self.corange_KI.T).Q
            self._start_sums()

    def triplets(self, k: int) -> SingularTriplets:
        """The first k <= K singular triplets of the sketched G."""
        held_out_IH = self._held_out_IH(self.right_IK.shape[0])
        if self.passes == 1:
            basis_OK = _svd_of_tall(self.range_OK)[0][:, : max(k, self.width // 2)]
            projected_KI = torch.linalg.lstsq(self.left_OK.T @ basis_OK, self.corange_KI).solution
            missed_OH = self.held_out_OH - basis_OK @ (projected_KI @ held_out_IH)
            v_IK, s_K, w_KK = _svd_of_tall(projected_KI.T)
            u_OK = basis_OK @ w_KK
        else:
            missed_OH = self.held_out_OH - self.range_OK @ (self.right_IK.T @ held_out_IH)
            missed_OH -= self.left_OK @ (self.left_OK.T @ missed_OH)
            u_OK, s_K, v_IK = _svd_from_both_sides(self.left_OK, self.range_OK, self.right_IK, self.corange_KI)
        # ‖G‖² = what the projection holds + what it misses; E‖Mω‖² = ‖M‖² for a Gaussian ω.
        squared_norm = s_K.square().sum() + missed_OH.square().sum() / HELD_OUT_COLUMNS
        # clone: a slice would keep all columns alive
        return SingularTriplets(u_OK[:, :k].clone(), s_K[:k].clone(), v_IK[:, :k].clone(), squared_norm.sqrt().item())


def _svd_from_both_sides(q_OK: Tensor, y_OK: Tensor, p_IK: Tensor, z_KI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V of Ĝ = Q Z + Y Pᵀ − Q (QᵀY) Pᵀ, of rank 2K.

    With [Q, Y] = U₀ [R1, R2] and [P, Zᵀ] = V₀ [S1, S2] it is U₀ (R1 S2ᵀ + R2 S1ᵀ − R1 QᵀY S1ᵀ) V₀ᵀ, and only the 2K×2K matrix
    in the middle needs an SVD.
    """
    K = q_OK.shape[1]
    left, right = torch.linalg.qr(torch.cat([q_OK, y_OK], dim=1)), torch.linalg.qr(torch.cat([p_IK, z_KI.T], dim=1))
    (r1, r2), (s1, s2) = left.R.split(K, dim=1), right.R.split(K, dim=1)
    middle = r1 @ s2.T + (r2 - r1 @ (q_OK.T @ y_OK)) @ s1.T
    u, s, vt = (part.to(q_OK.device) for part in torch.linalg.svd(middle.cpu()))  # small: costs the same on any device
    return left.Q @ u, s, right.Q @ vt.T


def _svd_of_tall(m_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M = U diag(s) Wᵀ for N >= K, by QR and the SVD of the K×K triangle, which costs the same on any device."""
    q_NK, r_KK = torch.linalg.qr(m_NK)
    u_KK, s_K, wt_KK = torch.linalg.svd(r_KK.cpu())
    return q_NK @ u_KK.to(m_NK.device), s_K.to(m_NK.device), wt_KK.T.to(m_NK.device)
