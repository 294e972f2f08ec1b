"""What one layer keeps of its gradient G = Σ dyᵀ x while the examples stream by. Imports only torch.

Shapes: O out features, I in features, T tokens, K sketch width, H held-out columns.

All accumulators have one interface. `passes` is how often the same examples have to stream by, where a fraction is a look
at that share of them before the first pass; in each pass, and in the look, every batch is given to `add`, then `end_pass` is
called once; after the last pass `matrices` gives the accumulators of single gradients, and their `triplets` the result.
Everything is accumulated in float32, whatever the dtype of x and dy; see `product`.

A linear layer has one gradient. The E experts of a mixture share one parameter, whose gradient autograd makes whole, E×O×I:
`ExpertGradients` and `ExpertSketches` are E accumulators side by side, which `add` that.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..factors import SingularTriplets

HELD_OUT_COLUMNS = 8
"""Test columns that never shape the basis, so that what the basis misses can be estimated without bias.

The relative standard error of the missed energy is at most √(2/8) = 50 %, and that energy is a small part of ‖G‖².
"""

SPARE_DIRECTIONS = 32
"""That `leading_triplets` iterates beside those wanted. 16 take as long on the gradients of SmolLM2-135M, in more steps."""
SETTLED = 1e-6
"""`leading_triplets` stops at a step that adds less than this share to Σ s² of the triplets wanted, which but for ‖G‖² is the
squared alignment: on those gradients after 4 to 6 steps, on a Gaussian matrix of their shape after 34."""

_in_use: WeakValueDictionary[tuple, Tensor] = WeakValueDictionary()


def gaussian_matrix(rows: int, columns: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A Gaussian matrix (rows×columns), drawn on the CPU, so that it is the same on every device.

    Whoever asks for the same one gets the same tensor, as long as somebody holds it: all layers with as many features share it.
    Each layer's matrix is as random as before; only a test that compares layers would notice.
    """
    key = (rows, columns, seed, device, dtype)
    matrix = _in_use.get(key)
    if matrix is None:
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
        matrix = _in_use[key] = drawn.to(device, dtype)
    return matrix


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

    rounding = torch.finfo(torch.float32).eps
    """Of each entry of what is added, relative to it."""

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

    def matrices(self) -> "Iterable[ExactGradient]":
        return [self]

    def triplets(self, k: int) -> SingularTriplets:
        """The first k singular triplets of G."""
        u_OM, s_M, v_IM = leading_triplets(self.grad_OI, k)
        # clone: a slice would keep the full factors alive
        return SingularTriplets(
            u_OM[:, :k].clone(), s_M[:k].clone(), v_IM[:, :k].clone(), torch.linalg.norm(self.grad_OI).item()
        )


class GradientSketch:
    """A sketch of G that never forms G: K·(O+I) sums in float32, and from the second pass on as many numbers in `basis_dtype`.

    Every pass multiplies G from both sides at once and sums

        Y = G P  (O×K)        Z = Qᵀ G  (K×I)

    P and Q are Gaussian in the first pass; after it they are orthonormal bases of what the pass before it found, P = orth(Zᵀ)
    and Q = orth(Y): block power iteration on both sides (Halko, Martinsson & Tropp 2011, section 4.5). A look finds bases like
    a pass, only of what a share of the examples gives; nothing else of it is kept. After the last pass

        Ĝ = Q Z + Y Pᵀ − Q (QᵀY) Pᵀ = G − (I − QQᵀ) G (I − PPᵀ)

    so that what is missed is what *both* bases miss, and it is orthogonal to Ĝ. On the gradients of SmolLM2-135M two such
    passes align like three that multiply from one side each, as in Halko et al.'s algorithm 4.4.

    After one pass P and Q know nothing of G, and after a look and a pass not enough. There Ĝ also has a guess at what both
    miss, (Y − Q QᵀY) (QᵀY)⁺ (Z − Z P Pᵀ), as in Nyström's method (Nakatsukasa 2020, arXiv 2009.11392); see `_missed_by_both`.
    For one pass K should be at least twice the number of triplets wanted.

    Args:
        width: K, at most half of min(O, I).
        passes: how often the examples stream by, at least 1; 1.25 for a look at a quarter of them and one pass.
        seed: of the Gaussian matrices, which all sketches with the same seed, width and features share.
        basis_dtype: of P and Q. In bfloat16 the sums are exact for the rounded matrices, whose span each side misses by 2⁻⁹ at
            most, both together by 2⁻¹⁸ of a singular value. But a rounding that falls the other way in another run, where sums
            were added in another order, moves the factors by up to 2e-4 on the models of the tests: below what a gradient in
            16 bits moves by, above one in float32.
    """

    rounding = ExactGradient.rounding

    def __init__(
        self,
        out_features: int,
        in_features: int,
        width: int,
        passes: float,
        seed: int,
        device: torch.device,
        basis_dtype: torch.dtype = torch.float32,
    ):
        self.width, self.passes, self.passes_done = width, passes, 0  # a look counts as one that is done
        self.seed, self.device, self.basis_dtype = seed, device, basis_dtype
        self.left_OK = gaussian_matrix(out_features, width, seed, device, basis_dtype)
        self.right_IK = self._first_P(in_features)
        self._start_sums()

    def _first_P(self, in_features: int) -> Tensor:
        """With the held-out columns behind it."""
        columns = self.width + HELD_OUT_COLUMNS
        return gaussian_matrix(in_features, columns, self.seed + 1, self.device, self.basis_dtype)

    def _start_sums(self) -> None:
        (*stacked, O, K), (I, columns) = self.left_OK.shape, self.right_IK.shape[-2:]
        self.range_OK = torch.zeros(*stacked, O, columns, device=self.device, dtype=torch.float32)
        self.corange_KI = torch.zeros(*stacked, K, I, device=self.device, dtype=torch.float32)

    def add(self, x_TI: Tensor, dy_TO: Tensor) -> None:
        """Y += dyᵀ(xP) and Z += (dyQ)ᵀx."""
        x_TI, dy_TO = operands(x_TI, dy_TO)
        # a basis in 16 bits is widened beside float32 inputs, never rounded: `triplets` counts on the numbers it holds
        P_IK = self.right_IK.to(torch.promote_types(self.right_IK.dtype, x_TI.dtype))
        Q_OK = self.left_OK.to(torch.promote_types(self.left_OK.dtype, dy_TO.dtype))
        add_product(self.range_OK, dy_TO.T, product(x_TI, P_IK))
        add_product(self.corange_KI, product(dy_TO, Q_OK).T, x_TI)

    def sums(self) -> list[Tensor]:
        """The tensors that this pass sums over examples."""
        return [self.range_OK, self.corange_KI]

    def end_pass(self) -> None:
        """Turn what this pass summed into the bases that the next pass multiplies with."""
        self.passes_done += 1
        if self.range_OK.shape[-1] > self.width:
            range_OK, held_out_OH = self.range_OK.split([self.width, HELD_OUT_COLUMNS], dim=-1)
            # the norm needs three digits of it
            self.held_out_OH, self.range_OK = held_out_OH.to(self.basis_dtype, copy=True), range_OK.contiguous()
        if self.passes_done < self.passes:
            was_look = self.passes_done == 1 and self.passes % 1 > 0
            Y_OK, Z_IK = self.range_OK, self.corange_KI.mT
            if was_look:
                Y_OK, Z_IK = _filled_up(Y_OK, self.left_OK), _filled_up(Z_IK, self.right_IK[..., : self.width])
            self.left_OK, self.right_IK = (torch.linalg.qr(found).Q.to(self.basis_dtype) for found in (Y_OK, Z_IK))
            if was_look:  # at some examples, and the norm is that of all
                test_IH = self._test_columns().expand(*self.right_IK.shape[:-1], HELD_OUT_COLUMNS)
                self.right_IK = torch.cat([self.right_IK, test_IH], dim=-1)
            self._start_sums()

    def _test_columns(self) -> Tensor:
        """I×H, drawn again, of the same seed: held since the first pass they would take as much as a basis."""
        return self._first_P(self.right_IK.shape[-2])[:, self.width :]

    def matrices(self) -> "Iterable[GradientSketch]":
        return [self]

    def triplets(self, k: int) -> SingularTriplets:
        """The first k <= K singular triplets of the sketched G."""
        K, test_IH = self.width, self._test_columns().float()
        # P and Q are no bases after one pass and rounded ones after more, and their sums belong to them as they are. QR makes
        # them bases: [Q, Y] = L [[R₁, ·], [0, R₂]] and [P, Zᵀ] = M [S₁, S₂], where R₁ and S₁ are triangular
        left = torch.linalg.qr(torch.cat([self.left_OK.float(), self.range_OK], dim=1))
        right = torch.linalg.qr(torch.cat([self.right_IK[:, :K].float(), self.corange_KI.T], dim=1))
        (r1, _), (_, r2) = (rows.split(K, dim=1) for rows in left.R.split(K))
        s1, s2 = right.R[:K, :K], right.R[:, K:]
        upper = torch.linalg.solve_triangular(r1.T, s2.T, upper=False)
        lower = torch.linalg.solve_triangular(s1, r2, upper=True, left=False)
        # after two passes the bases know G: on SmolLM2-135M a guess would win nothing, and on a flat spectrum lose 3 %
        guess = _missed_by_both(upper[:, :K], upper[:, K:], lower) if self.passes < 2 else torch.zeros_like(lower)
        middle = torch.cat([upper, torch.cat([lower, guess], dim=1)])
        # small: costs the same on any device
        u, s, vt = (part.to(self.device) for part in torch.linalg.svd(middle.cpu()))
        q_OK, p_IK = left.Q[:, :K], right.Q[:, :K]
        # what both bases miss of the test columns, in truth and as guessed; E‖Mω‖² = ‖M‖² for a Gaussian ω
        missed_OH = self.held_out_OH.float() - self.range_OK @ torch.linalg.solve_triangular(
            s1, p_IK.T @ test_IH, upper=True
        )
        missed_OH -= q_OK @ (q_OK.T @ missed_OH)
        guessed_KH = guess @ (right.Q[:, K:].T @ test_IH)
        excess = (missed_OH.square().sum() - guessed_KH.square().sum()) / HELD_OUT_COLUMNS
        squared_norm = upper.square().sum() + lower.square().sum() + (guess.square().sum() + excess).clamp(min=0)
        return SingularTriplets(left.Q @ u[:, :k], s[:k].clone(), right.Q @ vt[:k].T, squared_norm.sqrt().item())


def _filled_up(found_NK: Tensor, gaussian_NK: Tensor) -> Tensor:
    """What a look found and 2⁻⁸ of its size in Gaussian directions; these alone, if it found nothing, as of an idle expert.

    A share of the sample may have fewer than K tokens for a weight. What else is in a basis would be rounding error, which
    differs between launches.
    """
    found_size = torch.linalg.matrix_norm(found_NK, keepdim=True)
    filling_NK = gaussian_NK.float() / torch.linalg.matrix_norm(gaussian_NK.float(), keepdim=True)
    return torch.where(found_size > 0, found_NK + 2**-8 * found_size * filling_NK, filling_NK)


def _missed_by_both(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """C A⁺ B (all K×K) for D in G = [[A, B], [C, D]], which it is if the rank of G is K/2 or less.

    A⁺ is damped, s/(s² + σ²) for 1/s with σ the singular value of A in the middle: divided by the small ones, what is no part
    of the leading directions would outgrow them.
    """
    u_KK, s_K, vt_KK = (part.to(A.device) for part in torch.linalg.svd(A.cpu()))
    damped_K = s_K / (s_K.square() + s_K[len(s_K) // 2].square()).clamp(min=torch.finfo(torch.float32).tiny)
    return (C @ vt_KK.T * damped_K) @ (u_KK.T @ B)


def leading_triplets(grad_OI: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V of G (O×I, float32), of which the first k count, by block power iteration (Halko et al. 2011, algorithm 4.4),
    until it has `SETTLED`. Where G is hardly wider than the block, of a full SVD, which is quicker there.
    """
    (O, I), width = grad_OI.shape, k + SPARE_DIRECTIONS
    if min(O, I) <= 4 * width:
        u_OM, s_M, vt_MI = torch.linalg.svd(grad_OI, full_matrices=False)
        return u_OM, s_M, vt_MI.T
    v_IK, before = gaussian_matrix(I, width, 0, grad_OI.device, torch.float32), 0.0
    while True:
        u_OK = torch.linalg.qr(grad_OI @ v_IK).Q
        v_IK, s_K, w_KK = _svd_of_tall(grad_OI.T @ u_OK)
        found = s_K[:k].square().sum().item()
        if found <= before * (1 + SETTLED):
            return u_OK @ w_KK, s_K, v_IK
        before = found


def _svd_of_tall(m_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M = U diag(s) Wᵀ for N >= K, by QR and the SVD of the K×K triangle, which costs the same on any device."""
    q_NK, r_KK = torch.linalg.qr(m_NK)
    u_KK, s_K, wt_KK = torch.linalg.svd(r_KK.cpu())
    return q_NK @ u_KK.to(m_NK.device), s_K.to(m_NK.device), wt_KK.T.to(m_NK.device)


EXPERTS_AT_ONCE = 8
"""Whose gradients are made float32 together: much less than all, and enough to keep a device busy."""


def _reached_experts(dW_EOI: Tensor, is_reached_E: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The gradients in float32, a few experts at a time, and where they stand among the E.

    Those of experts without tokens are zero: on some devices grouped products leave there what was in memory before.
    """
    for start in range(0, len(dW_EOI), EXPERTS_AT_ONCE):
        some = slice(start, start + EXPERTS_AT_ONCE)
        grad_OI = dW_EOI[some].to(torch.float32, copy=True)
        yield some, grad_OI.masked_fill_(~is_reached_E[some, None, None], 0.0)


class ExpertGradients(ExactGradient):
    """The whole gradients (E×O×I, float32) of E experts."""

    def __init__(self, experts: int, out_features: int, in_features: int, device: torch.device):
        self.passes = 1
        self.grad_OI = torch.zeros(experts, out_features, in_features, dtype=torch.float32, device=device)

    def add(self, dW_EOI: Tensor, is_reached_E: Tensor, rounding: float) -> None:  # type: ignore[override]
        """G += dW, whose entries are off by the relative `rounding`."""
        self.rounding = rounding
        for some, grad_OI in _reached_experts(dW_EOI, is_reached_E):
            self.grad_OI[some] += grad_OI

    def matrices(self) -> Iterator[ExactGradient]:
        for grad_OI in self.grad_OI:
            yield _one_of(self, grad_OI=grad_OI)


class ExpertSketches(GradientSketch):
    """Sketches of the gradients of E experts, which begin with the same Gaussian matrices.

    Args:
        experts: E; the others are those of `GradientSketch`.
    """

    def __init__(self, experts: int, *args: Any):
        super().__init__(*args)
        self.left_OK, self.right_IK = (basis.expand(experts, *basis.shape) for basis in (self.left_OK, self.right_IK))
        self._start_sums()

    def add(self, dW_EOI: Tensor, is_reached_E: Tensor, rounding: float) -> None:  # type: ignore[override]
        """Y += dW P and Z += Qᵀ dW, of entries that are off by the relative `rounding`."""
        self.rounding = rounding
        for some, grad_OI in _reached_experts(dW_EOI, is_reached_E):
            self.range_OK[some].baddbmm_(grad_OI, self.right_IK[some].float())
            self.corange_KI[some].baddbmm_(self.left_OK[some].float().mT, grad_OI)

    def matrices(self) -> Iterator[GradientSketch]:
        names = ("left_OK", "right_IK", "range_OK", "corange_KI", "held_out_OH")
        for expert in range(len(self.left_OK)):
            yield _one_of(self, **{name: getattr(self, name)[expert] for name in names})


def _one_of(several: Any, **tensors: Tensor) -> Any:
    """The accumulator of one of E experts: `several` with that one's tensors."""
    one = copy.copy(several)
    vars(one).update(tensors)
    return one
