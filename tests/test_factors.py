"""Invariant 2: A0 and B0 equal the paper's formulas, for every direction and scale."""

import dense_reference
import pytest
import torch

from lora_ga_trainer.factors import (
    LearningRates,
    Scales,
    SingularTriplets,
    leading_singular_values,
    lora_ga_factors,
    scale_factors,
)

RANK, SCALING, GAMMA = 3, 5.5, 16.0
OPTIONS = {"offset": True, "gamma": GAMMA, "full_learning_rate": 5e-5, "learning_rates": None}
# float32 singular vectors against float64: the gaps of a 40×28 Gaussian's spectrum amplify 6e-8 by about a hundred.
VECTOR_TOLERANCE = 2e-5


def gradient(out_features=40, in_features=28):
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))


def triplets(grad_OI, k=2 * RANK):
    u, s, vt = torch.linalg.svd(grad_OI, full_matrices=False)
    return SingularTriplets(u[:, :k], s[:k], vt[:k].T, grad_OI.norm().item())


def same_up_to_signs(rows, reference):
    """Rows of float32 `rows` against float64 `reference`, each row up to its sign."""
    signs = torch.sign((rows.double() * reference).sum(dim=1, keepdim=True))
    return torch.allclose(rows.double() * signs, reference, atol=VECTOR_TOLERANCE * reference.abs().max().item())


@pytest.mark.parametrize("scale", ["stable", "unit", "gd", "weight_svd"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("shape", [(40, 28), (28, 40)])
def test_factors_are_the_papers(direction, scale, shape):
    grad_OI, weight_OI = gradient(*shape), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scales = scale_factors(
        scale, out_features=shape[0], in_features=shape[1], rank=RANK, scaling=SCALING, **OPTIONS,
        weight_singular_values=lambda: torch.linalg.svdvals(weight_OI),
    )  # fmt: skip
    reference_c = dense_reference.scale(
        scale, out_features=shape[0], rank=RANK, scaling=SCALING, gamma=GAMMA, weight_OI=weight_OI
    )
    assert scales == pytest.approx((reference_c, reference_c), rel=1e-6)  # float32 singular values of W

    found = lora_ga_factors(triplets(grad_OI), RANK, direction, scales, torch.Generator())
    a_RI, b_OR = dense_reference.factors(grad_OI, RANK, direction, reference_c)
    assert found.a_RI.shape == (RANK, shape[1]) and found.b_OR.shape == (shape[0], RANK)
    assert same_up_to_signs(found.a_RI, a_RI)
    assert same_up_to_signs(found.b_OR.T, b_OR.T)
    # float32 against float64 in a cosine of order 1
    assert found.alignment == pytest.approx(dense_reference.alignment(grad_OI, a_RI, b_OR), rel=1e-5)


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("rates", [(2e-4, 2e-4), (1e-4, 1.6e-3), (0.0, 2e-4)])
def test_the_matched_scale(rates, offset):
    """With rates as LoRA+ has them, and with A frozen, too."""
    scales = scale_factors(
        "matched", out_features=40, in_features=28, rank=RANK, scaling=SCALING, weight_singular_values=list,
        **OPTIONS | {"offset": offset, "learning_rates": LearningRates(*rates), "full_learning_rate": 2e-4},
    )  # fmt: skip
    c = dense_reference.matched_scale(40, 28, RANK, SCALING, 2e-4, *rates, offset)
    assert scales == pytest.approx((c, c if offset else 0.0))


@pytest.mark.parametrize("shape", [(600, 640), (640, 300), (40, 700)])
@pytest.mark.parametrize(("decay", "tolerance"), [(0.0, 1e-3), (0.5, 1e-5)])
def test_the_scale_of_the_weight_from_few_singular_values(decay, tolerance, shape):
    """Against the full SVD. Without decay the spectrum is a Gaussian matrix's, the flattest that a weight starts from: 0.1 %. A
    width of 40 gets the full SVD."""
    u, s, vt = torch.linalg.svd(gradient(*shape), full_matrices=False)
    s = s * torch.arange(1.0, len(s) + 1) ** -decay
    found = leading_singular_values(u * s @ vt, 8, torch.Generator().manual_seed(1))
    assert found.shape == (8,) and torch.equal(found, found.sort(descending=True).values)
    # the scale itself: a mean of square roots
    assert found.sqrt().mean().item() == pytest.approx(s[:8].sqrt().mean().item(), rel=tolerance)
    assert (found <= s[:8] * (1 + 1e-5)).all(), "too small, never too large, but for float32"


def test_random_direction_takes_disjoint_singular_vectors_and_follows_its_seed():
    grad_OI = gradient()
    u, _, v = dense_reference.singular_vectors(grad_OI)

    def picks(seed):
        found = lora_ga_factors(
            triplets(grad_OI), RANK, "random", Scales(1.0, 1.0), torch.Generator().manual_seed(seed)
        )
        # each row of A0 and column of B0 is one singular vector: the column where its overlap is 1
        a = (found.a_RI.double() @ v).abs().argmax(dim=1).tolist()
        b = (u.T @ found.b_OR.double()).abs().argmax(dim=0).tolist()
        assert found.alignment == pytest.approx(dense_reference.alignment(grad_OI, found.a_RI, found.b_OR), rel=1e-5)
        return a, b

    a, b = picks(seed=0)
    assert sorted(a + b) == list(range(2 * RANK))
    assert picks(seed=0) == (a, b)
    assert any(picks(seed) != (a, b) for seed in range(1, 4))


def test_alignment_counts_what_the_first_step_misses():
    """A rank-2r gradient is followed exactly by any split into halves; a flat spectrum of 4r triplets to √(1/2)."""
    u, _, v = dense_reference.singular_vectors(gradient())
    for count, expected in ((2 * RANK, 1.0), (4 * RANK, 0.5**0.5)):
        flat = (u[:, :count] @ v[:, :count].T).float()
        found = lora_ga_factors(triplets(flat), RANK, "ArB2r", Scales(1.0, 1.0), torch.Generator())
        assert found.alignment == pytest.approx(expected, rel=1e-5)  # float32 singular vectors


@pytest.mark.parametrize("scale", ["gaussian", "stable"])
def test_gaussian_ablation_has_the_papers_variances(scale):
    O, I, R = 400, 300, 50
    grad_OI = gradient(O, I)
    scales = scale_factors(
        scale, out_features=O, in_features=I, rank=R, scaling=SCALING, weight_singular_values=list, **OPTIONS
    )
    found = lora_ga_factors(triplets(grad_OI, k=I), R, "gaussian", scales, torch.Generator().manual_seed(3))
    c = dense_reference.scale("stable", out_features=O, rank=R, scaling=SCALING, gamma=GAMMA, weight_OI=None)
    variances = {"gaussian": (1 / O, 1 / I), "stable": (c**2 / I, c**2 / O)}[scale]
    # 15,000 and 20,000 draws: the variance's relative standard error is 1.2 % at most
    assert found.a_RI.var().item() == pytest.approx(variances[0], rel=0.05)
    assert found.b_OR.var().item() == pytest.approx(variances[1], rel=0.05)
    # all of the triplets are there, so nothing is left out; float32 against float64
    assert found.alignment == pytest.approx(dense_reference.alignment(grad_OI, found.a_RI, found.b_OR), rel=1e-4)
    again = lora_ga_factors(triplets(grad_OI, k=I), R, "gaussian", scales, torch.Generator().manual_seed(3))
    assert torch.equal(again.a_RI, found.a_RI) and torch.equal(again.b_OR, found.b_OR)


THIN = {  # O, I, rank of G
    "one output": (1, 20, 1),
    "one input": (20, 1, 1),
    "under r inputs": (40, 2, 2),
    "under 2r inputs": (40, 5, 5),
    "under 2r outputs": (5, 40, 5),
    "few tokens": (40, 28, 2),
    "no token": (40, 28, 0),
    "no token, under r inputs": (40, 2, 0),
}


def thin_gradient(name):
    O, I, found = THIN[name]
    generator = torch.Generator().manual_seed(4)
    return torch.randn(O, found, generator=generator) @ torch.randn(found, I, generator=generator)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("name", list(THIN))
def test_a_gradient_of_few_singular_pairs_gives_what_it_has(name, direction):
    """What is lacking is orthonormal rows in A0 and zeros in B0."""
    grad_OI, scales = thin_gradient(name), Scales(0.5, 0.5)
    found = lora_ga_factors(triplets(grad_OI), RANK, direction, scales, torch.Generator().manual_seed(5))
    assert found.a_RI.shape == (RANK, grad_OI.shape[1]) and found.b_OR.shape == (grad_OI.shape[0], RANK)
    good, problems = dense_reference.is_the_papers_as_far_as_it_goes(
        grad_OI, RANK, direction, 0.5, found.a_RI, found.b_OR, VECTOR_TOLERANCE
    )
    assert good, problems
    assert len(found.singular_values_K) == THIN[name][2]
    if THIN[name][2]:
        reference = dense_reference.alignment(grad_OI, found.a_RI, found.b_OR)
        assert found.alignment == pytest.approx(reference, rel=1e-5)  # float32 against float64 in a cosine of order 1
    else:
        assert found.alignment == 0
    again = lora_ga_factors(triplets(grad_OI), RANK, direction, scales, torch.Generator().manual_seed(5))
    assert torch.equal(found.a_RI, again.a_RI), "the rows that are filled in follow the generator's seed"


@pytest.mark.parametrize("name", list(THIN))
def test_the_random_directions_of_few_singular_pairs(name):
    """`random` deals out the pairs that there are, `gaussian` asks for none."""
    grad_OI, (_, I, pairs) = thin_gradient(name), THIN[name]
    found = lora_ga_factors(triplets(grad_OI), RANK, "random", Scales(1.0, 1.0), torch.Generator().manual_seed(5))
    u, _, v = dense_reference.singular_vectors(grad_OI)
    in_a = ((found.a_RI.double() @ v[:, :pairs]).abs() > 1 - VECTOR_TOLERANCE).sum()
    in_b = ((u[:, :pairs].T @ found.b_OR.double()).abs() > 1 - VECTOR_TOLERANCE).sum()
    assert found.b_OR.any(dim=0).sum() == in_b
    assert pairs == in_a + in_b or I <= RANK, "an A0 of all I dimensions may have them in any case"
    found = lora_ga_factors(triplets(grad_OI), RANK, "gaussian", Scales(1.0, 1.0), torch.Generator().manual_seed(5))
    assert found.a_RI.any(dim=1).all() and found.b_OR.any(dim=0).all()
