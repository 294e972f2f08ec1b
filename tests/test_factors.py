"""Invariant 2: A0 and B0 equal the paper's formulas, for every direction and scale."""

import dense_reference
import pytest
import torch

from lora_ga_trainer.factors import SingularTriplets, lora_ga_factors, scale_factor

RANK, SCALING, GAMMA = 3, 5.5, 16.0
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
    c = scale_factor(
        scale, out_features=shape[0], rank=RANK, scaling=SCALING, gamma=GAMMA,
        weight_singular_values=lambda: torch.linalg.svdvals(weight_OI),
    )  # fmt: skip
    reference_c = dense_reference.scale(
        scale, out_features=shape[0], rank=RANK, scaling=SCALING, gamma=GAMMA, weight_OI=weight_OI
    )
    assert c == pytest.approx(reference_c, rel=1e-6)  # float32 singular values of W

    found = lora_ga_factors(triplets(grad_OI), RANK, direction, c, torch.Generator())
    a_RI, b_OR = dense_reference.factors(grad_OI, RANK, direction, reference_c)
    assert found.a_RI.shape == (RANK, shape[1]) and found.b_OR.shape == (shape[0], RANK)
    assert same_up_to_signs(found.a_RI, a_RI)
    assert same_up_to_signs(found.b_OR.T, b_OR.T)
    # float32 against float64 in a cosine of order 1
    assert found.alignment == pytest.approx(dense_reference.alignment(grad_OI, a_RI, b_OR), rel=1e-5)


def test_random_direction_takes_disjoint_singular_vectors_and_follows_its_seed():
    grad_OI = gradient()
    u, _, v = dense_reference.singular_vectors(grad_OI)

    def picks(seed):
        found = lora_ga_factors(triplets(grad_OI), RANK, "random", 1.0, torch.Generator().manual_seed(seed))
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
        found = lora_ga_factors(triplets(flat), RANK, "ArB2r", 1.0, torch.Generator())
        assert found.alignment == pytest.approx(expected, rel=1e-5)  # float32 singular vectors
