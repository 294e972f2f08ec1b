"""The accumulators, fed with activations and output gradients of a known G = Σ dyᵀ x."""

import statistics
from inspect import signature

import dense_reference
import pytest
import torch
from torch._meta_registrations import meta_mm
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ga_trainer.factors import Scales, lora_ga_factors
from lora_ga_trainer.gradient import accumulator
from lora_ga_trainer.gradient.accumulator import ExactGradient, GradientSketch, in_two_parts, leading_triplets

O, I, RANK = 96, 128, 4
CPU = torch.device("cpu")


def stream(tokens=400, seed=0):
    """x, dy with a fast-falling spectrum and noise, like a real gradient's."""
    generator = torch.Generator().manual_seed(seed)
    strength = 0.8 ** torch.arange(tokens)
    x = torch.randn(tokens, I, generator=generator) * strength[:, None]
    return x, torch.randn(tokens, O, generator=generator)


def run(accumulator, x, dy, split):
    look, passes = accumulator.passes % 1, int(accumulator.passes)
    for share in [look] * bool(look) + [1] * passes:
        tokens = round(share * len(x))
        for x_part, dy_part in zip(x[:tokens].split(split), dy[:tokens].split(split), strict=True):
            accumulator.add(x_part, dy_part)
        accumulator.end_pass()
    return accumulator


def exact_alignment(grad_OI, found):
    """Alignment with the true gradient, not the one the sketch believes in."""
    return dense_reference.alignment(grad_OI, found.a_RI, found.b_OR)


def factors_of(accumulator):
    return lora_ga_factors(accumulator.triplets(2 * RANK), RANK, "ArB2r", Scales(1.0, 1.0), torch.Generator())


def test_exact_is_the_sum_over_tokens():
    x, dy = stream()
    accumulator = run(ExactGradient(O, I, CPU), x, dy, split=37)
    reference = dy.double().T @ x.double()
    # float32 sums of 400 terms: a few units in the last place of the largest entry
    assert (accumulator.grad_OI - reference).abs().max() < 1e-5 * reference.abs().max()
    triplets = accumulator.triplets(6)
    s = dense_reference.singular_vectors(reference)[1]
    assert torch.allclose(triplets.s_K.double(), s[:6], rtol=1e-5)
    assert triplets.gradient_norm == pytest.approx(reference.norm().item(), rel=1e-5)


SPECTRA = {
    "falls fast": 0.9 ** torch.arange(300),
    "falls slowly": (1.0 + torch.arange(300)) ** -0.5,
    "hardly falls": 1 - torch.arange(300) / 600,
    "five directions": torch.cat([torch.ones(5), torch.zeros(295)]),
    "none": torch.zeros(300),
}


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_leading_triplets_hold_what_those_of_a_full_svd_do(spectrum, shape):
    """Σ s² of the first 8 to 2e-5: a step that adds 1e-6 may have several behind it that add nearly as much. Beyond the rank,
    zeros."""
    k, s = 8, SPECTRA[spectrum]
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, 300, generator=generator)).Q for n in shape)
    grad_OI = u * s @ v.T
    u_OK, s_K, v_IK = (part[..., :k].double() for part in leading_triplets(grad_OI, k))
    assert len(leading_triplets(grad_OI, k)[1]) < 300, "no full SVD"
    best = dense_reference.singular_vectors(grad_OI)[1][:k].square().sum().item()
    assert (u_OK.T @ grad_OI.double() @ v_IK).diagonal().square().sum().item() == pytest.approx(best, rel=2e-5)
    assert s_K.square().sum().item() == pytest.approx(best, rel=2e-5)
    for basis in (u_OK, v_IK):  # float32 rounds products of vectors of 400 numbers by about 20 · 6e-8
        assert (basis.T @ basis - torch.eye(k)).abs().max() < 2e-6
    assert (s_K[int((s > 0).sum()) :] < 1e-5).all()


# Bounds for this spectrum and K = 24, with room for the draw: how far each number of passes falls short of exact.
@pytest.mark.parametrize(("passes", "at_least"), [(1, 0.97), (2, 0.995), (3, 0.9995), (4, 0.9999)])
def test_sketch_comes_near_the_exact_alignment(passes, at_least):
    x, dy = stream()
    grad_OI = dy.T @ x
    exact = exact_alignment(grad_OI, factors_of(run(ExactGradient(O, I, CPU), x, dy, 400)))
    for seed in range(5):
        found = factors_of(run(GradientSketch(O, I, 24, passes, seed, CPU), x, dy, split=100))
        assert exact_alignment(grad_OI, found) >= at_least * exact


def mixed(x, dy):
    """The same gradient of tokens that are all alike, each a mixture of those given, as a share of them is like the rest."""
    turn = torch.linalg.qr(torch.randn(len(x), len(x), generator=torch.Generator().manual_seed(2))).Q
    return turn @ x, turn @ dy


def test_a_look_brings_one_pass_near_two():
    """In the mean over the draws: a hundredth here of what one pass falls short, and asserted a tenth."""
    x, dy = mixed(*stream())
    grad_OI = dy.T @ x
    exact = exact_alignment(grad_OI, factors_of(run(ExactGradient(O, I, CPU), x, dy, 400)))

    def short(passes):
        sketches = [run(GradientSketch(O, I, 24, passes, seed, CPU), x, dy, split=100) for seed in range(0, 20, 2)]
        return 1 - statistics.mean(exact_alignment(grad_OI, factors_of(sketch)) for sketch in sketches) / exact

    assert short(2) < short(1.5) < short(1.25) < 0.1 * short(1)


def test_a_look_is_at_a_share_and_the_norm_is_that_of_all():
    """Of a gradient that is mostly in the part that the look leaves out, ‖G‖ to 10 %, as without a look."""
    x, dy = mixed(*stream())
    x[200:] *= 5
    norm = torch.linalg.norm(dy.T @ x).item()
    assert torch.linalg.norm(dy[:200].T @ x[:200]) < 0.5 * norm
    for seed in range(0, 10, 2):
        found = run(GradientSketch(O, I, 24, 1.5, seed, CPU), x, dy, split=100).triplets(2 * RANK)
        assert found.gradient_norm == pytest.approx(norm, rel=0.1)


def test_after_a_look_without_a_gradient_the_pass_is_as_random_as_a_first():
    """Such as that of an expert that the share does not reach: exact for up to K/2 = 12 directions, like one pass."""
    x, dy = (part[:16].clone() for part in stream())
    dy[:8] = 0
    triplets = run(GradientSketch(O, I, 24, 1.5, 0, CPU), x, dy, split=8).triplets(8)
    rebuilt = triplets.u_OK * triplets.s_K @ triplets.v_IK.T
    assert (rebuilt - dy.T @ x).norm() < 1e-4 * (dy.T @ x).norm()  # as in the test of low ranks


@pytest.mark.parametrize("passes", [1, 1.5])
def test_the_guess_at_what_both_bases_miss(passes):
    """Ĝ is the dense formula's, and after two passes without the guess."""
    x, dy = mixed(*stream())
    sketch = run(GradientSketch(O, I, 24, passes, 0, CPU), x, dy, split=100)
    found = sketch.triplets(24)
    grad_OI = (dy.T @ x).double()
    expected = dense_reference.two_sided_estimate(grad_OI, sketch.left_OK, sketch.right_IK[:, :24], guessing=True)
    u, s, v = dense_reference.singular_vectors(expected)
    # float32 through the inverse of a Gaussian's or a basis's triangle, of condition under 10
    assert torch.allclose(found.s_K.double(), s[:24], rtol=1e-4, atol=1e-5 * s[0].item())
    assert (found.u_OK[:, :RANK].T.double() @ u[:, :RANK]).diagonal().abs().min() > 1 - 1e-4
    assert (found.v_IK[:, :RANK].T.double() @ v[:, :RANK]).diagonal().abs().min() > 1 - 1e-4


@pytest.mark.parametrize("passes", [2, 2.5, 3])
def test_two_passes_need_no_guess(passes):
    x, dy = mixed(*stream())
    sketch = run(GradientSketch(O, I, 24, passes, 0, CPU), x, dy, split=100)
    grad_OI = (dy.T @ x).double()
    expected = dense_reference.two_sided_estimate(grad_OI, sketch.left_OK, sketch.right_IK[:, :24], guessing=False)
    s = dense_reference.singular_vectors(expected)[1][:24]
    assert torch.allclose(sketch.triplets(24).s_K.double(), s, rtol=1e-4, atol=1e-5 * s[0].item())


@pytest.mark.parametrize("passes", [1, 1.5, 2, 3])
def test_sketch_knows_its_own_alignment(passes):
    """The logged alignment uses an estimate of ‖G‖ from 8 held-out columns: 10 % here, 15 % from one pass."""
    x, dy = stream()
    found = factors_of(run(GradientSketch(O, I, 24, passes, 0, CPU), x, dy, split=100))
    assert found.alignment == pytest.approx(exact_alignment(dy.T @ x, found), rel=0.15 if passes == 1 else 0.1)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_the_norm_counts_what_the_basis_misses(passes):
    """A flat spectrum, of which 12 directions of 96 hold less than half: ‖G‖ all the same, to 15 %.

    768 entries of held-out columns give the missed energy to √(2/768) = 5 %. One pass only guesses at the energy of its own
    basis, which on a flat spectrum is mostly noise: a factor 2 in the median of the draws, more in an eighth of them.
    """
    generator = torch.Generator().manual_seed(5)
    x, dy = torch.randn(2000, I, generator=generator), torch.randn(2000, O, generator=generator)
    norm, found = torch.linalg.norm(dy.T @ x).item(), []
    for seed in range(0, 18, 2):  # a seed and the next are those of one sketch
        triplets = run(GradientSketch(O, I, 12, passes, seed, CPU), x, dy, split=500).triplets(6 if passes == 1 else 12)
        found.append(triplets.gradient_norm)
        if passes > 1:
            assert triplets.s_K.norm() < 0.7 * norm, "the held-out columns matter here"
    if passes == 1:
        found = [statistics.median(found)]
    assert found == pytest.approx([norm] * len(found), rel=0.15 if passes > 1 else 1.0)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_sketch_is_exact_on_a_gradient_of_low_rank(passes):
    generator = torch.Generator().manual_seed(3)
    x, dy = torch.randn(8, I, generator=generator), torch.randn(8, O, generator=generator)
    triplets = run(GradientSketch(O, I, 24, passes, 0, CPU), x, dy, split=8).triplets(8)
    grad_OI = (dy.T @ x).double()
    rebuilt = triplets.u_OK.double() * triplets.s_K @ triplets.v_IK.double().T
    # 8 of 24 directions hold all of G; the rest of the basis is rounding noise, 1e-7 times the condition of the sketch
    assert (rebuilt - grad_OI).norm() < 1e-4 * grad_OI.norm()


@pytest.mark.parametrize("passes", [1, 1.5, 3])
def test_sketch_does_not_depend_on_batching(passes):
    x, dy = stream()
    one = run(GradientSketch(O, I, 24, passes, 0, CPU), x, dy, split=400).triplets(2 * RANK)
    many = run(GradientSketch(O, I, 24, passes, 0, CPU), x, dy, split=13).triplets(2 * RANK)
    assert torch.allclose(one.s_K, many.s_K, rtol=1e-4)  # float32 sums in another order
    overlap = (one.u_OK.T @ many.u_OK).diagonal().abs()
    assert overlap.min() > 1 - 1e-4  # the same, through the gaps of the spectrum


def bytes_held(*sketches):
    """What they hold together; a tensor that they share counts once."""
    tensors = {id(value): value for sketch in sketches for value in vars(sketch).values() if torch.is_tensor(value)}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_a_look_a_sketch_holds_the_test_columns_beside_the_bases(dtype):
    width, held_out = 24, 8
    sketch = GradientSketch(O, I, width, 1.25, 12345, CPU, dtype)
    sketch.add(torch.randn(5, I), torch.randn(5, O))
    sketch.end_pass()
    bases = dtype.itemsize * (width * (O + I) + held_out * I)
    # what the look found of the test columns is replaced at the end of the pass
    assert bytes_held(sketch) == 4 * (width * (O + I) + held_out * O) + bases + dtype.itemsize * held_out * O


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 5])
def test_sketch_keeps_no_more_than_it_says(layers, dtype):
    """K·(O+I) sums in float32; in the first pass 8 test columns of O more, and the Gaussian matrices once for all layers; later
    the bases and the test columns' results in the bases' dtype."""
    width, held_out, seed = 24, 8, 12345
    sketches = [GradientSketch(O, I, width, 3, seed, CPU, dtype) for _ in range(layers)]
    gaussian = dtype.itemsize * (width * (O + I) + held_out * I)
    assert bytes_held(*sketches) == layers * 4 * (width * (O + I) + held_out * O) + gaussian
    for _ in range(2):
        for sketch in sketches:
            sketch.add(torch.randn(5, I), torch.randn(5, O))
            sketch.end_pass()
        assert bytes_held(*sketches) == layers * (
            (4 + dtype.itemsize) * width * (O + I) + dtype.itemsize * held_out * O
        )
        assert not any(key[2] in (seed, seed + 1) for key in accumulator._in_use), "the Gaussian matrices are gone"


@pytest.mark.parametrize("passes", [2, 3])
def test_bases_in_16_bits_lose_nothing(passes):
    """Both bases together miss 2⁻⁹·2⁻⁹ = 4e-6 of what a basis in float32 holds, and the next pass rounds once more."""
    x, dy = stream()
    grad_OI = dy.T @ x

    def alignment(dtype, seed):
        return exact_alignment(grad_OI, factors_of(run(GradientSketch(O, I, 24, passes, seed, CPU, dtype), x, dy, 400)))

    for seed in range(0, 10, 2):
        assert alignment(torch.bfloat16, seed) == pytest.approx(alignment(torch.float32, seed), abs=1e-5)


def test_seeds_decide_the_test_matrices():
    first, same, other = (GradientSketch(O, I, 24, 1, seed, CPU) for seed in (7, 7, 9))
    assert first.right_IK is same.right_IK and first.left_OK is same.left_OK, "shared"
    assert not torch.equal(first.right_IK, other.right_IK)
    assert not torch.equal(first.right_IK[:O, : first.width], first.left_OK)
    first_of_all = GradientSketch(O, I, 24, 1, 7, CPU).right_IK.clone()
    del first, same
    assert torch.equal(GradientSketch(O, I, 24, 1, 7, CPU).right_IK, first_of_all), "drawn again, the same"


# --- 16 bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)], ids=str
)
def test_sixteen_bits_lose_nothing(dtypes):
    """The sums are those of the same numbers in float32, to the bit where both are multiplied in float32, as on a CPU."""
    x, dy = (part.to(dtype) for part, dtype in zip(stream(), dtypes, strict=True))
    for make in (lambda: ExactGradient(O, I, CPU), lambda: GradientSketch(O, I, 24, 2, 0, CPU)):
        found, reference = run(make(), x, dy, 100), run(make(), x.float(), dy.float(), 100)
        assert all(torch.equal(*sums) for sums in zip(found.sums(), reference.sums(), strict=True))


def test_two_parts_in_bfloat16_make_a_float32():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(400, 24, generator=generator) * 2.0 ** torch.randint(-30, 30, (400, 24), generator=generator)
    first, second = in_two_parts(whole).double().chunk(2, dim=1)
    # each part rounds to nearest at 8 bits: 2^-9 of what is left, twice, and less than one power of two between the two
    assert ((first + second - whole).abs() <= 2.0**-17 * whole.abs()).all()


class LargestFloat32(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.skipif("out_dtype" not in signature(meta_mm).parameters, reason="this torch has it for real tensors only")
@pytest.mark.parametrize(("basis_dtype", "parts"), [(torch.bfloat16, 1), (torch.float32, 2)], ids=str)
def test_on_cuda_bfloat16_is_multiplied_as_it_is(basis_dtype, parts):
    """On torch's tensors without numbers, since this runs without a GPU: shapes, dtypes, and no copy of dy or x in float32."""
    tokens, K = 1000, 24
    sketch, exact = GradientSketch(O, I, K, 2, 0, CPU, basis_dtype), ExactGradient(O, I, CPU)
    with FakeTensorMode():
        x, dy = (torch.empty(tokens, n, dtype=torch.bfloat16, device="cuda") for n in (I, O))
        for accumulator, names in ((sketch, ("left_OK", "right_IK", "range_OK", "corange_KI")), (exact, ("grad_OI",))):
            for name in names:
                of = getattr(accumulator, name)
                setattr(accumulator, name, torch.empty(of.shape, dtype=of.dtype, device="cuda"))
            with LargestFloat32() as largest:
                accumulator.add(x, dy)
            assert all(total.dtype == torch.float32 and total.device.type == "cuda" for total in accumulator.sums())
            # xP with the held-out columns, once for each part of a basis; the gradient
            assert largest.numbers == (tokens * parts * (K + 8) if accumulator is sketch else O * I)
