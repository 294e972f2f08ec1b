"""From the singular triplets of a gradient to the LoRA factors A0, B0. Pure functions; imports only torch.

A gradient may have fewer than 2R singular pairs: no row of the sample reached the weight, or fewer than 2R tokens did, or it
has fewer dimensions than that. The factors take what there is; see `lora_ga_factors`.

Shapes: O out features, I in features, R LoRA rank, K number of triplets.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random", "gaussian"]
Scale = Literal["matched", "stable", "unit", "gd", "weight_svd", "gaussian"]


class SingularTriplets(NamedTuple):
    """Leading singular triplets of a gradient G (O×I), all float32, singular values in descending order."""

    u_OK: Tensor
    s_K: Tensor
    v_IK: Tensor
    gradient_norm: float
    """Frobenius norm of the whole G, triplets that were cut off included."""


class FirstStep(NamedTuple):
    """How the first step, along B0 B0ᵀ G + G A0ᵀ A0, lies to the gradient G."""

    along: float
    """⟨G, step⟩."""
    squared_norm: float
    """‖step‖²."""


class Factors(NamedTuple):
    """The initial LoRA factors of one weight, float32, how well they point along its gradient, and that gradient's spectrum.

    Those of E experts have E as a first dimension, and are judged as one: as the factors of a block-diagonal matrix.
    """

    a_RI: Tensor
    b_OR: Tensor
    first_step: FirstStep
    singular_values_K: Tensor
    """Of the pairs that the factors could take: 2R, or as many as there are. Of experts √Σσₖ², so that the sum of squares is
    what the first k pairs of all hold."""
    gradient_norm: float
    scale: float
    """c_A."""

    @property
    def alignment(self) -> float:
        """cos(G, B0 B0ᵀ G + G A0ᵀ A0) in [0, 1]; 0 for a gradient of zero, along which nothing can point."""
        norms = math.sqrt(self.first_step.squared_norm) * self.gradient_norm
        return self.first_step.along / norms if norms else 0.0


class Scales(NamedTuple):
    """What multiplies the unit vectors: A0 = c_A · (rows), B0 = c_B · (columns). Equal in all of the paper's but `gaussian`."""

    c_A: float
    c_B: float


class LearningRates(NamedTuple):
    """The peak rates of the two factors. They differ in LoRA+ (arXiv 2402.12354)."""

    A: float
    B: float


class UnitVectors(NamedTuple):
    """The directions of the factors, before any scale, float32."""

    rows_RI: Tensor
    columns_OR: Tensor


def _first_then_second(triplets: SingularTriplets, rank: int, generator: torch.Generator) -> UnitVectors:
    return _picked(triplets, range(rank), range(rank, 2 * rank), generator)


def _second_then_first(triplets: SingularTriplets, rank: int, generator: torch.Generator) -> UnitVectors:
    return _picked(triplets, range(rank, 2 * rank), range(rank), generator)


def _alternating(triplets: SingularTriplets, rank: int, generator: torch.Generator) -> UnitVectors:
    return _picked(triplets, range(1, 2 * rank, 2), range(0, 2 * rank, 2), generator)


def _random_disjoint(triplets: SingularTriplets, rank: int, generator: torch.Generator) -> UnitVectors:
    order = torch.randperm(2 * rank, generator=generator, device="cpu").tolist()
    return _picked(triplets, order[:rank], order[rank:], generator)


def _gaussian(triplets: SingularTriplets, rank: int, generator: torch.Generator) -> UnitVectors:
    (O, _), (I, _), device = triplets.u_OK.shape, triplets.v_IK.shape, triplets.s_K.device
    rows_RI = torch.randn(rank, I, generator=generator, dtype=torch.float32, device="cpu") / math.sqrt(I)
    columns_OR = torch.randn(O, rank, generator=generator, dtype=torch.float32, device="cpu") / math.sqrt(O)
    return UnitVectors(rows_RI.to(device), columns_OR.to(device))


def _picked(
    triplets: SingularTriplets, picks_A: Sequence[int], picks_B: Sequence[int], generator: torch.Generator
) -> UnitVectors:
    """Of the picks that are no pairs of the gradient A gets random rows, orthonormal to its others, and B zeros."""
    rows_RI = _columns(triplets.v_IK, picks_A).T
    missing_R = torch.tensor(picks_A, device="cpu") >= len(triplets.s_K)
    return UnitVectors(_filled(rows_RI, missing_R, generator), _columns(triplets.u_OK, picks_B))


def _columns(matrix_NK: Tensor, picks: Sequence[int]) -> Tensor:
    """Zeros for a pick that is not among the K."""
    padded = torch.nn.functional.pad(matrix_NK, (0, max(0, max(picks) + 1 - matrix_NK.shape[1])))
    return padded[:, torch.tensor(picks, dtype=torch.long, device=matrix_NK.device)]


def _filled(rows_RI: Tensor, missing_R: Tensor, generator: torch.Generator) -> Tensor:
    """The rows with random ones in place of the `missing_R`, so that all are orthonormal; zeros remain of those beyond I."""
    if not missing_R.any():
        return rows_RI
    (R, I), device = rows_RI.shape, rows_RI.device
    present_RI = rows_RI[(~missing_R).to(device)]
    drawn_IR = torch.randn(I, R, generator=generator, dtype=torch.float32, device="cpu").to(device)
    basis = torch.linalg.qr(torch.cat([present_RI.T, drawn_IR], dim=1)).Q[:, len(present_RI) :].T
    places = missing_R.nonzero()[:, 0][: len(basis)].to(device)
    return rows_RI.index_copy(0, places, basis[: len(places)])


DIRECTIONS: dict[str, Callable[[SingularTriplets, int, torch.Generator], UnitVectors]] = {
    "ArB2r": _first_then_second,
    "A2rBr": _second_then_first,
    "ArBr": _alternating,
    "random": _random_disjoint,
    "gaussian": _gaussian,
}
"""Which of the first 2r singular vectors go to A (right vectors) and to B (left vectors); paper section 3.2, eq. 8.

Any split of the first 2r into two disjoint halves gives the best rank-2r first step; they differ in later ones. `gaussian`
is the paper's ablation without the gradient: random vectors of unit length in the mean, however many pairs there are.
"""
assert tuple(DIRECTIONS) == get_args(Direction)


def scale_factors(
    scale: Scale,
    *,
    out_features: int,
    in_features: int,
    rank: int,
    scaling: float,
    offset: bool,
    gamma: float,
    full_learning_rate: float,
    learning_rates: LearningRates | None,
    weight_singular_values: Callable[[], Tensor],
) -> Scales:
    """The numbers that multiply the directions: A0 = c_A·V[:, a]ᵀ and B0 = c_B·U[:, b], c_B = 0 without the offset.

    - `matched`: c such that the first step of Adam moves W as far as full fine-tuning at the rate η_f would; see
      `matched_scale`.
    - `stable`: c = O^¼ / √γ, which keeps the adapter's output on one scale as O and r grow (paper section 3.3,
      theorem 3.2; γ of its section 4.1).
    - `unit`: c = 1 (the paper's "+GA" ablation).
    - `gd`: c = 1 / s, with s the adapter's scaling.
    - `weight_svd`: c = mean over i < r of √(σᵢ(W) / s).
    - `gaussian`: c_A = √(I/O), c_B = √(O/I), so that with the direction `gaussian` A0 has entries of variance 1/O and B0 of
      1/I (the paper's "Gaussian" ablation).

    Args:
        scaling: PEFT's `scaling` of the layer; with rsLoRA s = α/√r (the paper's η).
        offset: whether B starts at B0, and s·B0 A0 is subtracted; else B starts at zero.
        gamma: γ, used by `stable` only.
        full_learning_rate: η_f, used by `matched` only.
        learning_rates: the peak rates at which A and B train, used by `matched` only.
        weight_singular_values: called by `weight_svd` only; returns the leading singular values of W, descending, or those of
            every expert (E×r).
    """
    formulas: dict[str, Callable[[], float]] = {
        "matched": lambda: matched_scale(
            out_features,
            in_features,
            rank,
            scaling,
            offset,
            full_learning_rate,
            learning_rates,  # type: ignore[arg-type]  # not None there
        ),
        "stable": lambda: out_features**0.25 / math.sqrt(gamma),
        "unit": lambda: 1.0,
        "gd": lambda: 1.0 / scaling,
        "weight_svd": lambda: (weight_singular_values()[..., :rank] / scaling).sqrt().mean().item(),
    }
    if scale == "gaussian":
        scales = Scales(math.sqrt(in_features / out_features), math.sqrt(out_features / in_features))
    else:
        c = formulas[scale]()
        scales = Scales(c, c)
    return scales if offset else scales._replace(c_B=0.0)


def matched_scale(
    out_features: int,
    in_features: int,
    rank: int,
    scaling: float,
    offset: bool,
    full_learning_rate: float,
    learning_rates: LearningRates,
) -> float:
    """The c at which the first step of Adam moves W as far as it would in full fine-tuning at the rate η_f.

    Adam's first step moves every entry by its rate. In full fine-tuning that is ‖ΔW‖ = η_f·√(O·I). In the adapter, whose A0
    has orthonormal rows and B0 orthonormal columns, both times c, dA and dB move W by s·(B0 dA + dB A0), of which the first
    part has the norm s·c·η_A·√(r·I) and the second s·c·η_B·√(r·O). They are nearly orthogonal, so

        c = η_f·√(O·I) / (s·√(r·(η_A²·I + η_B²·O)))

    and without the offset, where B0 = 0, the second part is all there is. With one rate for both, only η_f/η counts, which
    stays the same under a schedule that both would follow. At high rates, where dA and dB soon outgrow any small A0 and B0,
    c is `SMALLEST_MATCHED` instead.
    """
    squared_rates = learning_rates.B**2 * out_features
    if offset:
        squared_rates += learning_rates.A**2 * in_features
    c = full_learning_rate * math.sqrt(out_features * in_features) / (scaling * math.sqrt(rank * squared_rates))
    return max(c, SMALLEST_MATCHED)


SMALLEST_MATCHED = 0.1 / math.sqrt(3)
"""A tenth of the length of a row of A as LoRA starts it, with entries uniform in ±1/√I. From a shorter A0 the gradient's
directions are lost within the first steps: on SmolLM2-135M at the rate 2e-3 word problems end at 0.252 with c = 0.03, at 0.230
with 0.06; with 0.12 chat ends at 1.975 instead of 1.954 (benchmarks/README.md, "One setting for every task and rate")."""


KRYLOV_BLOCKS = 9
"""With 9 blocks of r + 8 the scale `weight_svd` is within 0.1 % on matrices of independent Gaussian entries, whose spectrum is
flat and hardest to find, and within 10⁻⁵ on decaying ones (tests/test_factors.py). c is a mean of square roots, so the values
themselves may be twice as far off. They come out too small, never too large."""


def leading_singular_values(weight_OI: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The first `rank` singular values of W (O×I), float32, descending, by block Krylov iteration (Musco & Musco 2015,
    algorithm 2): those of W on the span of X, WᵀW X, …, (WᵀW)⁸ X. Small matrices get a full SVD instead.

    Args:
        generator: a CPU generator, from which X is drawn.
    """
    weight_OI = weight_OI.detach().float()
    (O, I), width = weight_OI.shape, rank + 8
    if KRYLOV_BLOCKS * width >= min(O, I):
        return torch.linalg.svdvals(weight_OI)[:rank]
    block_IW = torch.randn(I, width, generator=generator, dtype=torch.float32, device="cpu").to(weight_OI.device)
    blocks = [torch.linalg.qr(block_IW).Q]
    for _ in range(KRYLOV_BLOCKS - 1):
        blocks.append(torch.linalg.qr(weight_OI.T @ (weight_OI @ blocks[-1])).Q)
    basis = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    return torch.linalg.svdvals(torch.linalg.qr(weight_OI @ basis).R)[:rank]


def first_step(triplets: SingularTriplets, a_RI: Tensor, b_OR: Tensor) -> FirstStep:
    """Where the first step goes, and so how much of the gradient it can follow; see `Factors.alignment`.

    The first gradient step of a LoRA with factors A0, B0 moves the weight along B0 B0ᵀ G + G A0ᵀ A0 (paper section 3.2,
    eq. 6). With G = U S Vᵀ, P = B0ᵀ U S and Q = A0 V S that is B0 P Vᵀ + U Qᵀ A0, and nothing of size O×I is formed:

        ⟨G, step⟩ = ‖P‖² + ‖Q‖²
        ‖step‖²   = ⟨B0ᵀB0, P Pᵀ⟩ + ⟨A0 A0ᵀ, Q Qᵀ⟩ + 2 tr(A0 V Pᵀ B0ᵀ U Qᵀ)

    The triplets stand for G here, but for its norm. That is exact for factors that are singular vectors among them, since the
    step then has no part in the others; for `gaussian` it leaves out what the random vectors catch of the others.
    """
    bu_RK, av_RK = b_OR.T @ triplets.u_OK, a_RI @ triplets.v_IK
    p_RK, q_RK = bu_RK * triplets.s_K, av_RK * triplets.s_K
    along = p_RK.square().sum() + q_RK.square().sum()
    squared_norm = ((b_OR.T @ b_OR) * (p_RK @ p_RK.T)).sum() + ((a_RI @ a_RI.T) * (q_RK @ q_RK.T)).sum()
    squared_norm = squared_norm + 2 * torch.trace(av_RK @ p_RK.T @ bu_RK @ q_RK.T)
    return FirstStep(along.item(), squared_norm.item())


FLOAT32_ROUNDING = torch.finfo(torch.float32).eps


def significant(triplets: SingularTriplets, rounding: float = FLOAT32_ROUNDING) -> SingularTriplets:
    """The triplets that are more than rounding: σ above √max(O, I) · 2⁻²³ · σ₁, as errors of sums of that many numbers grow.

    None for a gradient of zero. Where each entry of G came rounded, by up to half of `rounding` times itself, that adds a
    random matrix of full rank. With the mean square of such errors, (rounding/5)² of ‖G‖²/(O·I), its largest singular value is
    about rounding/5 · ‖G‖ · (1/√O + 1/√I); five times that is taken for the bound.
    """
    (O, _), (I, _) = triplets.u_OK.shape, triplets.v_IK.shape
    of_sums = math.sqrt(max(O, I)) * FLOAT32_ROUNDING * triplets.s_K.max()
    of_entries = rounding * triplets.gradient_norm * (1 / math.sqrt(O) + 1 / math.sqrt(I))
    K = int((triplets.s_K > of_sums.clamp(min=of_entries)).sum())
    return SingularTriplets(triplets.u_OK[:, :K], triplets.s_K[:K], triplets.v_IK[:, :K], triplets.gradient_norm)


def lora_ga_factors(
    triplets: SingularTriplets,
    rank: int,
    direction: Direction,
    scales: Scales,
    generator: torch.Generator,
    rounding: float = FLOAT32_ROUNDING,
) -> Factors:
    """A0 = c_A·V[:, a]ᵀ (R×I) and B0 = c_B·U[:, b] (O×R); paper section 3.2, eq. 8 and section 3.3.

    No singular value enters, so multiplying the loss by a constant changes nothing. The columns a, b are those of
    `direction`. Where there are fewer than 2R significant pairs, what is lacking is in A0 random rows, c_A times orthonormal
    to its others (zeros beyond I), and in B0 zeros. With no pair at all that is LoRA's own start, at LoRA-GA's scale.

    Args:
        triplets: the first 2R, or as many as there are.
        generator: a CPU generator, drawn from by the directions `random` and `gaussian`, and for rows that are lacking.
        rounding: of the gradient's entries, see `significant`.
    """
    triplets = significant(triplets, rounding)
    rows_RI, columns_OR = DIRECTIONS[direction](triplets, rank, generator)
    a_RI, b_OR = scales.c_A * rows_RI, scales.c_B * columns_OR
    return Factors(a_RI, b_OR, first_step(triplets, a_RI, b_OR), triplets.s_K, triplets.gradient_norm, scales.c_A)


def stacked(factors: Sequence[Factors], rank: int) -> Factors:
    """The factors of E experts as one: A0 E×R×I, B0 E×O×R. Of a single weight too, E = 1."""
    spectra = [torch.nn.functional.pad(each.singular_values_K, (0, 2 * rank))[: 2 * rank] for each in factors]
    singular_values = torch.stack(spectra).norm(dim=0)
    return Factors(
        torch.stack([each.a_RI for each in factors]),
        torch.stack([each.b_OR for each in factors]),
        FirstStep(*map(sum, zip(*(each.first_step for each in factors), strict=True))),
        singular_values[singular_values > 0],
        math.hypot(*(each.gradient_norm for each in factors)),
        factors[0].scale,
    )
