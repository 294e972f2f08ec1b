"""The products of the delta form are those of the joined matrices; their gradients are autograd's, with less work and memory.

Sizes: 2×5 tokens, 12 in features, 10 out features, rank 3, a history of rank 4.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_ga_trainer.adapter.delta import DeltaA, DeltaB, SumA
from lora_ga_trainer.adapter.product import multiply_a, multiply_b

TOKENS, IN, OUT, RANK, HISTORY = 10, 12, 10, 3, 4


def halves(dtype=torch.float64, trained=True, history=True, bias=False):
    """(DeltaA, DeltaB, x, the gradient at their output)."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    A = DeltaA(nn.Parameter(draw(RANK, IN)))
    B = DeltaB(nn.Parameter(draw(OUT, RANK)), nn.Parameter(draw(OUT)) if bias else None)
    for half, shape in ((A, (HISTORY, IN)), (B, (OUT, HISTORY))):
        half.frozen.data.copy_(draw(*half.frozen.shape))
        if trained:
            half.trainable.data.copy_(draw(*half.trainable.shape))
        if history:
            half.history = draw(*shape)
    return A, B, draw(2, 5, IN).requires_grad_(), draw(2, 5, OUT)


def joined(A, B, x):
    """The same with autograd on the joined matrices."""
    return F.linear(F.linear(x, A.weight), B.weight, B.bias)


def run(product, A, B, x, grad):
    """The output, and the gradients at x and all parameters."""
    wanted = [x, A.trainable, B.trainable, *([] if B.bias is None else [B.bias])]
    for leaf in wanted:
        leaf.grad = None
    y = product(A, B, x)
    y.backward(grad.to(y.dtype))
    assert A.frozen.grad is None and B.frozen.grad is None
    return y.detach(), *(leaf.grad for leaf in wanted)


def delta(A, B, x):
    return B(A(x))


def relative(found, reference):
    return ((found.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("history", [False, True])
def test_output_and_gradients_are_those_of_the_joined_matrices(history, bias):
    setup = halves(history=history, bias=bias)
    for found, reference in zip(run(delta, *setup), run(joined, *setup), strict=True):
        assert found.shape == reference.shape
        # the same sums of some 20 products in float64 (2e-16), added in another order
        assert relative(found, reference) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_every_precision(dtype):
    setup = halves(dtype)
    reference = run(
        joined, *(value.double() for value in setup[:2]), setup[2].detach().double().requires_grad_(), setup[3]
    )
    A, B, x, grad = setup[0].to(dtype), setup[1].to(dtype), *setup[2:]
    for found, exact in zip(run(delta, A, B, x, grad), reference, strict=True):
        assert found.dtype == dtype
        # roundings to nearest (eps / 2 each) in a row: A0 + dA, h, g, g1 + g2 or y, and the result
        assert relative(found, exact) < 2.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(dtype, None) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)],
)
def test_untrained_it_is_zero(dtype, autocast):
    """Exactly, whatever A0, B0 and the input are."""
    A, B, x, _ = halves(dtype, trained=False, history=False)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        assert not delta(A, B, 100 * x).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_gradients_keep_the_dtype_of_their_tensors(dtype):
    setup = halves(torch.float32, bias=True)
    with torch.autocast("cpu", dtype):
        outputs = [product(*setup[:3]) for product in (delta, joined)]
    assert all(y.dtype == dtype for y in outputs)

    def under_autocast(product):
        def forward(*args):
            with torch.autocast("cpu", dtype):
                return product(*args)

        return forward

    for found, reference in zip(run(under_autocast(delta), *setup)[1:], run(joined, *setup)[1:], strict=True):
        assert found.dtype == torch.float32
        # as in `test_in_every_precision`, and the roundings of x and the parameters
        assert relative(found, reference) < 4 * torch.finfo(dtype).eps


def test_only_wanted_gradients_are_multiplied_out():
    """Counted in floating-point operations: see the docstring of `delta_product`."""
    A, B, x, grad = halves(history=False)

    def operations(x_needs, parameters_need):
        x.requires_grad_(x_needs)
        for half in (A, B):
            half.trainable.requires_grad_(parameters_need)
        with FlopCounterMode(display=False) as counter:
            delta(A, B, x).backward(grad)
        return counter.get_total_flops()

    unit = TOKENS * RANK
    assert operations(True, True) == unit * 10 * (IN + OUT)
    assert operations(True, False) == unit * 8 * (IN + OUT)  # frozen, as while probing
    assert operations(False, True) == unit * (6 * IN + 10 * OUT)  # the model's first layer


def test_without_the_offset_the_products_are_those_of_lora():
    _, _, x, grad = halves(history=False)
    A, B = SumA(nn.Parameter(torch.zeros(RANK, IN))), nn.Linear(RANK, OUT, bias=False)
    with FlopCounterMode(display=False) as counter:
        B(A(x.float().requires_grad_())).backward(grad.float())
    assert counter.get_total_flops() == TOKENS * RANK * 6 * (IN + OUT)


def test_only_what_the_gradients_need_is_kept():
    """Besides the parameters: x, of h the columns that ∂dB needs, and the joined matrices; without ∂dA, ∂dB only the last."""
    A, B, x, _ = halves()
    kept, K = [], 2 * RANK + HISTORY
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        delta(A, B, x)
    ours = {tensor.data_ptr() for half in (A, B) for tensor in (half.trainable, half.frozen, half.history)}

    def numbers_of_others():
        return [tensor.untyped_storage().nbytes() // 8 for tensor in kept if tensor.data_ptr() not in ours]

    assert numbers_of_others() == [TOKENS * IN, K * IN, TOKENS * RANK, OUT * K]

    for half in (A, B):
        half.trainable.requires_grad_(False)
    kept.clear()
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        delta(A, B, x)
    assert numbers_of_others() == [K * IN, OUT * K]


def test_autocast_keeps_the_input_in_its_own_precision():
    A, B, x, _ = halves(torch.float32)
    kept = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        delta(A, B, x)
    assert {tensor.dtype for tensor in kept if tensor.shape[0] == 2} == {torch.bfloat16}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_changes_no_bit(use_reentrant, autocast):
    setup = halves(torch.float32)

    def plain(A, B, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return delta(A, B, x)

    def checkpointed(A, B, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return checkpoint(lambda x: delta(A, B, x), x, use_reentrant=use_reentrant)

    for found, reference in zip(run(checkpointed, *setup), run(plain, *setup), strict=True):
        assert torch.equal(found, reference)


def test_torch_compile_takes_it_whole():
    """One graph, without breaks: `fullgraph`."""
    setup = halves(torch.float32)
    compiled = torch.compile(delta, backend="aot_eager", fullgraph=True)
    for found, reference in zip(run(compiled, *setup), run(delta, *setup), strict=True):
        assert relative(found, reference) < 1e-6  # float32, in whatever order the compiler adds


def test_second_derivatives():
    A, B, x, _ = halves()

    def product(x, trainable_a, trainable_b):
        h = multiply_a(x, trainable_a, A.frozen, A.history)
        return multiply_b(h, trainable_b, B.frozen, B.history)

    assert torch.autograd.gradgradcheck(product, (x, A.trainable, B.trainable))
