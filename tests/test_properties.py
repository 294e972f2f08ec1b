"""The invariants over shapes, ranks, dtypes, batch splits and options that nobody chose by hand.

O out features, I in features, R the rank that trains, K the sketch's width, T tokens.
"""

import copy
import tempfile
from itertools import accumulate

import dense_reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from test_initialization import largest_difference, step_directions
from tiny import lora_config, tiny_batches, tiny_model
from torch import nn

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.adapter.delta import attach_delta_form
from lora_ga_trainer.adapter.targets import lora_layers
from lora_ga_trainer.adapter.weight import AdaptedWeight
from lora_ga_trainer.checkpoint.layouts import LAYOUTS
from lora_ga_trainer.factors import Factors, Scales, SingularTriplets, first_step, lora_ga_factors, scale_factors
from lora_ga_trainer.gradient.accumulator import ExactGradient, GradientSketch

CPU = torch.device("cpu")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**31)
DIRECTIONS, SCALES = ("ArB2r", "A2rBr", "ArBr"), ("stable", "unit", "gd", "weight_svd")


def trying(count: int) -> settings:
    """The same `count` examples in every run."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)).Q


@st.composite
def layers(draw, largest: int = 24) -> tuple[int, int, int]:
    """(O, I, R) with 2R <= min(O, I)."""
    O, I = draw(st.integers(2, largest)), draw(st.integers(2, largest))
    return O, I, draw(st.integers(1, min(O, I) // 2))


def spectrum(O: int, I: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, s, V of a gradient whose singular values fall by a fifth from one to the next: its vectors are well determined."""
    return orthonormal(O, rank, seed), 0.8 ** torch.arange(rank, dtype=torch.float64), orthonormal(I, rank, seed + 1)


def tokens_of(O: int, I: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (T×I) and dy (T×O) with dyᵀ x = G of the given rank, and G (float64)."""
    u, s, v = spectrum(O, I, rank, seed)
    mix = orthonormal(rank + 5, rank, seed + 2)
    return (mix @ v.T).float(), (mix * s @ u.T).float(), u * s @ v.T


def same_up_to_signs(found: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest error of a row of `found` against that of `reference`, in units of its length."""
    signs = torch.sign((found.double() * reference).sum(dim=1, keepdim=True))
    return ((found.double() * signs - reference).norm(dim=1) / reference.norm(dim=1)).max().item()


# --- factors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@given(layer=layers(), seed=SEEDS, scaling=st.floats(0.1, 32), gamma=st.floats(0.5, 2000))
@trying(30)
def test_the_factors_are_the_papers(direction, scale, layer, seed, scaling, gamma):
    O, I, R = layer
    x, dy, grad_OI = tokens_of(O, I, min(O, I), seed)
    weight_OI = torch.randn(O, I, generator=generator(seed))
    exact = ExactGradient(O, I, CPU)
    exact.add(x, dy)
    scales = scale_factors(
        scale, out_features=O, in_features=I, rank=R, scaling=scaling, gamma=gamma,
        offset=True, full_learning_rate=1e-5, learning_rates=None,
        weight_singular_values=lambda: torch.linalg.svdvals(weight_OI),
    )  # fmt: skip
    found = lora_ga_factors(exact.triplets(2 * R), R, direction, scales, generator(0))
    c = dense_reference.scale(scale, out_features=O, rank=R, scaling=scaling, gamma=gamma, weight_OI=weight_OI)
    a_RI, b_OR = dense_reference.factors(grad_OI, R, direction, c)
    # float32's 6e-8 over the smallest gap, 0.2·0.8^23 = 1e-3 of the largest singular value, and a dozen roundings on the way
    assert same_up_to_signs(found.a_RI, a_RI) < 1e-3
    assert same_up_to_signs(found.b_OR.T, b_OR.T) < 1e-3
    assert found.alignment == pytest.approx(dense_reference.alignment(grad_OI, a_RI, b_OR), abs=1e-4)


@given(layer=layers(), seed=SEEDS, exponent=st.floats(-12, 12), direction=st.sampled_from([*DIRECTIONS, "random"]))
@trying(30)
def test_a_constant_on_the_loss_changes_nothing(layer, seed, exponent, direction):
    O, I, R = layer
    x, dy, _ = tokens_of(O, I, min(O, I), seed)

    def factors(constant: float):
        exact = ExactGradient(O, I, CPU)
        exact.add(x, dy * constant)
        return lora_ga_factors(exact.triplets(2 * R), R, direction, Scales(1.0, 1.0), generator(seed))

    found, reference = factors(10**exponent), factors(1.0)
    assert same_up_to_signs(found.a_RI, reference.a_RI.double()) < 1e-3  # as above
    assert same_up_to_signs(found.b_OR.T, reference.b_OR.T.double()) < 1e-3
    assert found.alignment == pytest.approx(reference.alignment, abs=1e-4)


@given(layer=layers(), seed=SEEDS, left_out=st.floats(0, 10), scales=st.tuples(st.floats(1e-3, 1e3), st.floats(0, 1e3)))
@trying(200)
def test_the_alignment_is_between_0_and_1(layer, seed, left_out, scales):
    """Of any two factors, also of B0 = 0, and whatever part of the gradient the triplets leave out."""
    O, I, R = layer
    u, s, v = (part.float() for part in spectrum(O, I, 2 * R, seed))
    triplets = SingularTriplets(u, s, v, (s.square().sum() + left_out).sqrt().item())
    a_RI = scales[0] * torch.randn(R, I, generator=generator(seed + 3))
    b_OR = scales[1] * torch.randn(O, R, generator=generator(seed + 4))
    step = first_step(triplets, a_RI, b_OR)
    found = Factors(a_RI, b_OR, step, s, triplets.gradient_norm, scales[0]).alignment
    assert -1e-6 <= found <= 1 + 1e-5  # float32
    if left_out == 0:
        assert found == pytest.approx(dense_reference.alignment(u * s @ v.T, a_RI, b_OR), abs=1e-4)


# --- accumulators -------------------------------------------------------------------------------------------------------


@st.composite
def sketched(draw) -> tuple[int, int, int, int, int]:
    """(O, I, K, passes, rank of G) such that the sketch has to find all of G."""
    O, I = draw(st.integers(8, 40)), draw(st.integers(8, 40))
    K, passes = draw(st.integers(2, min(O, I) // 2)), draw(st.integers(1, 3))
    return O, I, K, passes, draw(st.integers(1, K // 2 if passes == 1 else K))


def sketch_of(x, dy, K, passes, seed, sizes=None) -> GradientSketch:
    O, I = dy.shape[1], x.shape[1]
    sketch = GradientSketch(O, I, K, passes, seed, CPU)
    sizes = sizes or [len(x)]
    for _ in range(passes):
        for x_part, dy_part in zip(x.split(sizes), dy.split(sizes), strict=True):
            sketch.add(x_part, dy_part)
        sketch.end_pass()
    return sketch


@given(case=sketched(), seed=st.integers(0, 2**20))
@trying(200)
def test_a_gradient_of_the_sketchs_rank_is_found_exactly(case, seed):
    """One pass keeps K/2 directions, more passes keep K."""
    O, I, K, passes, rank = case
    x, dy, grad_OI = tokens_of(O, I, rank, seed)
    found = sketch_of(x, dy, K, passes, seed).triplets(rank)
    error = (found.u_OK * found.s_K @ found.v_IK.T - grad_OI).norm() / grad_OI.norm()
    # float32 through one Gaussian, square in the worst case, of condition about K² now and then: 6e-8·20²·50
    assert error < 1e-3
    assert found.gradient_norm == pytest.approx(grad_OI.norm().item(), rel=1e-3)
    R = rank // 2
    if R:
        factors = lora_ga_factors(found, R, "ArB2r", Scales(1.0, 1.0), generator(0))
        best = dense_reference.alignment(grad_OI, *dense_reference.factors(grad_OI, R, "ArB2r", 1.0))
        assert factors.alignment == pytest.approx(best, abs=1e-3)
        assert dense_reference.alignment(grad_OI, factors.a_RI, factors.b_OR) > best - 1e-3


@st.composite
def splits(draw, total: int) -> list[int]:
    cuts = sorted(draw(st.sets(st.integers(1, total - 1), max_size=total - 1)))
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


@given(data=st.data(), seed=st.integers(0, 2**20), passes=st.integers(0, 3))
@trying(150)
def test_sums_do_not_depend_on_how_tokens_are_batched(data, seed, passes):
    """`passes` 0 stands for the exact gradient."""
    x, dy, _ = tokens_of(20, 14, 12, seed)
    sizes = data.draw(splits(len(x)))
    assert list(accumulate(sizes))[-1] == len(x)

    def low_rank(sizes):
        if passes:
            found = sketch_of(x, dy, 7, passes, seed, sizes).triplets(4)
        else:
            exact = ExactGradient(20, 14, CPU)
            for x_part, dy_part in zip(x.split(sizes), dy.split(sizes), strict=True):
                exact.add(x_part, dy_part)
            found = exact.triplets(4)
        return found.u_OK * found.s_K @ found.v_IK.T

    reference = low_rank([len(x)])
    # sums in another order: 6e-8, over the gaps, and through the sketch's Gaussian as above
    assert (low_rank(sizes) - reference).norm() < 1e-3 * reference.norm()


@given(sizes=splits(8), direction=st.sampled_from(DIRECTIONS), sketch_size=st.sampled_from([None, 10, 14]))
@trying(30)
def test_estimates_do_not_depend_on_how_examples_are_batched(sizes, direction, sketch_size):
    config = LoRAGAArguments(
        ga_learning_rate=1e-3,
        ga_estimator="sketch" if sketch_size else "exact",
        ga_sketch_size=sketch_size,
        ga_direction=direction,
    )

    def factors(sizes):
        model = get_peft_model(tiny_model(), lora_config())
        initialize_lora_ga(model, tiny_batches(sizes), config, disable_tqdm=True)
        return step_directions(model)

    # float32 gradients summed in another order, 1e-7, over gaps of a thousandth; see test_initialization
    assert largest_difference(factors(sizes), factors([4, 4])) < 1e-3


# --- delta form ---------------------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    def __init__(self, O: int, I: int, bias: bool):
        super().__init__()
        self.layer = nn.Linear(I, O, bias=bias)

    def forward(self, x):
        return self.layer(x)


@given(
    layer=layers(), seed=SEEDS, dtype=DTYPES, bias=st.booleans(), offset=st.booleans(), alpha=st.integers(1, 256),
    use_rslora=st.booleans(), tokens=st.integers(0, 9), magnitude=st.floats(-2, 2),
)  # fmt: skip
@trying(200)
def test_at_the_start_nothing_is_added(layer, seed, dtype, bias, offset, alpha, use_rslora, tokens, magnitude):
    """To the bit, whatever the factors; and the weights that trained stay zero, those of the base what they were."""
    O, I, R = layer
    torch.manual_seed(seed % 1000)
    base = OneLayer(O, I, bias).to(dtype)
    config = LoraConfig(r=R, lora_alpha=alpha, use_rslora=use_rslora, target_modules=["layer"])
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    (adapted,) = lora_layers(model, "default").values()
    attach_delta_form(adapted, "default", offset)
    factors = (torch.randn(R, I, generator=generator(seed)), torch.randn(O, R, generator=generator(seed + 1)))
    AdaptedWeight("layer", adapted, "default").write_factors(*(10**magnitude * factor[None] for factor in factors))
    x = torch.randn(tokens, I, generator=generator(seed + 2)).to(dtype)
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
    assert torch.equal(adapted.get_base_layer().weight, base.layer.weight)
    assert adapted.lora_A["default"].frozen.any()


# --- files --------------------------------------------------------------------------------------------------------------


def any_bits(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every pattern of bits: infinities, subnormal numbers, −0 and NaN too."""
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(integers)
    return torch.randint(limits.min, limits.max, shape, generator=generator(seed), dtype=integers).view(dtype)


@given(layer=layers(12), seed=SEEDS, dtype=DTYPES, restarts=st.integers(0, 3), offset=st.booleans())
@trying(200)
def test_what_is_saved_comes_back_to_the_bit(layer, seed, dtype, restarts, offset):
    O, I, R = layer
    layout, prefix = LAYOUTS[offset], "base_model.model.layer."
    in_memory = {f"{prefix}lora_A.trainable": (R, I), f"{prefix}lora_A.frozen": (R, I)}
    if offset:
        in_memory |= {f"{prefix}lora_B.trainable": (O, R), f"{prefix}lora_B.frozen": (O, R)}
        if restarts:
            rows = 2 * R * restarts
            in_memory |= {f"{prefix}lora_A.history": (rows, I), f"{prefix}lora_B.history": (O, rows)}
    else:
        in_memory[f"{prefix}lora_B.weight"] = (O, R)
    in_memory["base_model.model.head.weight"] = (3, 2)  # a module that is saved whole
    in_memory = {name: any_bits(shape, dtype, seed + n) for n, (name, shape) in enumerate(in_memory.items())}
    on_disk, resume_only = layout.join(in_memory), layout.keep(in_memory)
    assert {name.rpartition(".")[2] for name in on_disk} == {"weight"}
    assert on_disk[f"{prefix}lora_A.weight"].shape == (layout.times * R * ((restarts if offset else 0) + 1), I)
    found = {name: value for name, value in layout.split(on_disk, resume_only).items() if value is not None}
    assert found.keys() == in_memory.keys()
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    for name, value in in_memory.items():
        assert torch.equal(found[name].view(integers), value.view(integers)), name


@given(
    seed=st.integers(0, 1000), r=st.integers(1, 12), alpha=st.integers(1, 64), use_rslora=st.booleans(),
    offset=st.booleans(), k_proj=st.integers(1, 12), direction=st.sampled_from(DIRECTIONS), scale=st.sampled_from(SCALES),
)  # fmt: skip
@trying(30)
def test_stock_peft_computes_what_was_trained(seed, r, alpha, use_rslora, offset, k_proj, direction, scale):
    base = tiny_model().eval()
    config = lora_config(r=r, lora_alpha=alpha, use_rslora=use_rslora, rank_pattern={"k_proj": k_proj})
    model = get_peft_model(copy.deepcopy(base), config).eval()
    options = LoRAGAArguments(ga_offset=offset, ga_direction=direction, ga_scale=scale)
    initialize_lora_ga(model, tiny_batches(), options, disable_tqdm=True)
    with torch.no_grad():
        for n, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator(seed + n)))
    inputs = tiny_batches(seed=9)[0]["input_ids"]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        trained, before = model(inputs).logits, base(inputs).logits
        assert (
            loaded(inputs).logits - trained
        ).abs().max() < 1e-4 * trained.abs().max()  # float32, summed in another order
        assert not torch.allclose(trained, before, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(inputs).logits, before)
