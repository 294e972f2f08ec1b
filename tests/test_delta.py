"""The delta form is the paper's function, exactly zero at the start, and safe under what PEFT does to adapters."""

from collections import Counter

import dense_reference
import pytest
import torch
from tiny import CONFIGS, lora_config, peft_pair, tiny_batches
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ga_trainer.adapter.delta import (
    DeltaA,
    DeltaB,
    SumA,
    attach_delta_form,
)
from lora_ga_trainer.adapter.targets import lora_layers
from lora_ga_trainer.adapter.weight import AdaptedWeight

BOTH_FORMS = pytest.mark.parametrize("offset", [True, False], ids=["offset", "no offset"])


def attached(family="llama", dtype=torch.float32, offset=True, **lora):
    model, base = peft_pair(family, dtype, **lora)
    layers = lora_layers(model, "default")
    for layer in layers.values():
        attach_delta_form(layer, "default", offset)
    return model, base, layers


def randomize(layers, trained=True, seed=0):
    """Some A0, B0 and, where `trained`, some dA, dB."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        # dA, dB: without the offset dB is the weight that PEFT made
        da, db = (next(iter(half["default"].parameters())) for half in (layer.lora_A, layer.lora_B))
        draw = lambda p: torch.randn(p.shape, generator=generator)  # noqa: E731
        AdaptedWeight("", layer, "default").write_factors(draw(da)[None], draw(db)[None])
        if trained:
            with torch.no_grad():
                da.copy_(0.1 * draw(da))
                db.copy_(0.1 * draw(db))


@BOTH_FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_untrained_it_is_the_base_function_bit_for_bit(family, dtype, offset):
    """Invariant 1: not within a tolerance."""
    model, base, layers = attached(family, dtype, offset, lora_dropout=0.3)
    randomize(layers, trained=False)
    inputs = tiny_batches()[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(inputs).logits, base(inputs).logits)
        if family.startswith("llama"):  # the others have dropout of their own
            # lora_dropout drops something of nothing: the adapter adds zero whatever its input
            assert torch.equal(model.train()(inputs).logits, base.train()(inputs).logits)


def test_it_is_the_papers_function():
    model, base, layers = attached()
    randomize(layers)
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    reference = dense_reference.forward(
        base.model.layers[0].self_attn.k_proj.weight.double(), x.double(), layer.scaling["default"],
        (A.frozen + A.trainable).double(), (B.frozen + B.trainable).double(), A.frozen.double(), B.frozen.double(),
    )  # fmt: skip
    assert (layer(x) - reference).abs().max() < 1e-5 * reference.abs().max()  # float32


def test_gradients_are_those_of_the_papers_factors():
    """∂L/∂dA = ∂L/∂A and ∂L/∂dB = ∂L/∂B in y = W0 x + s(BA − B0A0)x; the frozen halves get none."""
    model, _, layers = attached()
    randomize(layers)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    A, B, W = layer.lora_A["default"], layer.lora_B["default"], layer.base_layer.weight
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    layer(x).square().sum().backward()

    a0, b0 = A.frozen.double().detach(), B.frozen.double().detach()
    a = (a0 + A.trainable.double().detach()).requires_grad_()
    b = (b0 + B.trainable.double().detach()).requires_grad_()
    y = dense_reference.forward(W.double().detach(), x.double(), layer.scaling["default"], a, b, a0, b0)
    y.square().sum().backward()
    for found, reference in ((A.trainable.grad, a.grad), (B.trainable.grad, b.grad)):
        assert (found - reference).norm() < 1e-5 * reference.norm()  # float32
    assert A.frozen.grad is None and B.frozen.grad is None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_offset_it_is_a_plain_lora(dtype, autocast):
    """y = W0 x + s·B A x with A = A0 + dA, B = dB, and ∂L/∂dA = ∂L/∂A, ∂L/∂dB = ∂L/∂B: the same products, so to the bit."""
    model, _, layers = attached(offset=False)
    randomize(layers)
    layer = model.to(dtype).base_model.model.model.layers[1].mlp.up_proj
    A, B, s = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
    plain_A, plain_B = nn.Linear(48, 4, bias=False, dtype=dtype), nn.Linear(4, 80, bias=False, dtype=dtype)
    with torch.no_grad():
        plain_A.weight.copy_(A.frozen + A.trainable)
        plain_B.weight.copy_(B.weight)

    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = layer(x), layer.base_layer(x) + plain_B(plain_A(x)) * s
    assert torch.equal(ours, theirs)
    found = torch.autograd.grad(ours.square().sum(), (x, A.trainable, B.weight))
    reference = torch.autograd.grad(theirs.square().sum(), (x, plain_A.weight, plain_B.weight))
    assert all(torch.equal(f, r) for f, r in zip(found, reference, strict=True))
    assert not A.frozen.requires_grad
    assert torch.equal(layer.get_delta_weight("default"), s * (plain_B.weight @ plain_A.weight))


@BOTH_FORMS
def test_only_the_differences_train_and_optimizers_keep_their_parameters(offset):
    model, _ = peft_pair()
    before = {name: id(p) for name, p in model.named_parameters() if p.requires_grad}
    for layer in lora_layers(model, "default").values():
        attach_delta_form(layer, "default", offset)
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.replace(".trainable", ".weight") for name in after} == set(before)
    assert {id(p) for p in after.values()} == set(before.values())
    assert not any(p.any() for p in after.values())


@BOTH_FORMS
def test_switching_adapters_never_unfreezes_the_initial_factors(offset):
    model, _, layers = attached(offset=offset)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        pass
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    model.set_adapter("default")
    model.set_requires_grad("default")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert all(not layer.lora_A["default"].frozen.requires_grad for layer in layers.values())


@BOTH_FORMS
def test_lora_bias_still_trains(offset):
    model, _, layers = attached("qwen2", offset=offset, target_modules=["q_proj"], lora_bias=True)
    biases = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert len(biases) == len(layers)


# --- what it costs --------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what torch runs inside, but for views, which do nothing to the numbers."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def training_model(kind, dtype, **lora):
    """A model to train as TRL does: the adapter in float32 whatever the base is in."""
    model, _ = peft_pair(dtype=dtype, **lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    layers = lora_layers(model, "default")
    if kind != "LoRA":
        for layer in layers.values():
            attach_delta_form(layer, "default", offset=kind == "offset")
        randomize(layers)
    return model.train(), layers


def under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        return model(**tiny_batches()[0]).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["offset", "no offset"])
def test_a_step_runs_few_more_operations_than_loras(kind, dtype):
    """Small models wait for the start of each. At most 1.12 times LoRA's over 14 target layers: 5 more in each (A0 + dA, two
    joins, g1 + g2, the part of h that is kept), less the copies of x that autocast makes needless; without the offset one."""
    found = {}
    for name in ("LoRA", kind):
        model, layers = training_model(name, dtype)
        under_autocast(model).backward()  # the second backward adds to gradients, as all later ones
        with Operations() as operations:
            under_autocast(model).backward()
        found[name] = operations.counts.total()
    assert len(layers) == 14
    assert found[kind] <= 1.12 * found["LoRA"]


@BOTH_FORMS
def test_a_forward_joins_each_half_once(offset):
    """PEFT asks for the dtype of `lora_A.weight` in every forward, for each token in generation; that joins nothing."""
    model, layers = training_model("offset" if offset else "no offset", torch.float32)
    inputs = tiny_batches()[0]["input_ids"][:, :1]

    def counts():
        with torch.no_grad(), Operations() as operations:
            model.eval()(inputs)
        return operations.counts

    found = counts()
    with model.disable_adapter():
        found -= counts()
    cat, add, mm = torch.ops.aten.cat.default, torch.ops.aten.add.Tensor, torch.ops.aten.mm.default
    assert found[cat] == (2 * len(layers) if offset else 0)
    assert found[add] == 2 * len(layers)  # A0 + dA, and PEFT's sum with W0 x
    assert found[mm] == 2 * len(layers)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cast_that_is_left_out_changes_no_bit(dtype, dropout):
    """Under autocast x is not made float32 before it is made bf16 again, unless dropout comes between."""
    found = []
    for peft_casts in (False, True):
        model, layers = training_model("offset", dtype, lora_dropout=dropout)
        if peft_casts:
            for layer in layers.values():
                del layer._cast_input_dtype
        torch.manual_seed(0)
        loss = under_autocast(model)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) == 1 + 2 * len(layers)
    assert all(torch.equal(ours, pefts) for ours, pefts in zip(*found, strict=True))


@BOTH_FORMS
def test_the_weight_that_peft_reads_is_a_tensor(offset):
    """Of its own class only as long as nothing but its dtype is asked for; then the joined matrix, with derivatives."""
    _, _, layers = attached(offset=offset)
    randomize(layers)
    half = layers["base_model.model.model.layers.0.self_attn.k_proj"].lora_A["default"]
    weight, joined = half.weight, half.join(*half.parameters(), *((None,) if offset else ()))
    assert weight.dtype == joined.dtype and isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.device, weight.requires_grad) == (joined.shape, joined.device, True)
    for use in (
        torch.clone,
        torch.detach,
        torch.t,
        lambda w: w @ w.T,
        lambda w: torch.stack([w, w]),
        lambda w: w.float(),
    ):
        assert type(use(weight)) is torch.Tensor and torch.equal(use(weight), use(joined))
    (grad,) = torch.autograd.grad(weight.square().sum(), half.trainable)
    (reference,) = torch.autograd.grad(joined.square().sum(), half.trainable)
    assert torch.equal(grad, reference)
    before = weight.clone()
    with torch.no_grad():
        half.trainable.add_(1)
    assert torch.equal(half.weight, half.join(*half.parameters(), *((None,) if offset else ())))
    assert not torch.equal(half.weight, before)


@BOTH_FORMS
def test_torch_compile_takes_a_layer_whole(offset):
    """One graph, without breaks, with PEFT's own lines around the halves."""
    _, _, layers = attached(offset=offset)
    randomize(layers)
    layer = layers["base_model.model.model.layers.0.mlp.up_proj"]
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    # float32, in whatever order the compiler adds
    assert torch.allclose(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


@BOTH_FORMS
def test_types_survive_a_second_adapter(offset):
    """A second, ordinary LoRA on the same model stays ordinary, and switching between them works."""
    model, _, layers = attached(offset=offset)
    randomize(layers)
    model.add_adapter("other", lora_config())
    layer = next(iter(layers.values()))
    assert (type(layer.lora_A["default"]), type(layer.lora_B["default"])) == (
        (DeltaA, DeltaB) if offset else (SumA, nn.Linear)
    )
    assert isinstance(layer.lora_A["other"], nn.Linear)
    inputs = tiny_batches()[0]["input_ids"]
    with torch.no_grad():
        ours = model(inputs).logits
        model.set_adapter("other")
        with model.disable_adapter():
            base = model(inputs).logits
        assert torch.equal(model(inputs).logits, base) and not torch.equal(ours, base)
        model.set_adapter("default")
        assert torch.equal(model(inputs).logits, ours)
