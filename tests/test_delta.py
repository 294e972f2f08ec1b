"""The delta form is the paper's function, exactly zero at the start, and safe under what PEFT does to adapters."""

import dense_reference
import pytest
import torch
from tiny import CONFIGS, lora_config, peft_pair, tiny_batches
from torch import nn

from lora_ga_trainer.delta import DeltaA, DeltaB, SumA, attach_delta_form, check_targets, lora_layers, write_factors

BOTH_FORMS = pytest.mark.parametrize("offset", [True, False], ids=["offset", "no offset"])


def attached(family="llama", dtype=torch.float32, offset=True, **lora):
    model, base = peft_pair(family, dtype, **lora)
    layers = lora_layers(model, "default")
    attach_delta_form(layers, "default", offset)
    return model, base, layers


def randomize(layers, trained=True, seed=0):
    """Some A0, B0 and, where `trained`, some dA, dB."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        # dA, dB: without the offset dB is the weight that PEFT made
        da, db = (next(iter(half["default"].parameters())) for half in (layer.lora_A, layer.lora_B))
        draw = lambda p: torch.randn(p.shape, generator=generator)  # noqa: E731
        write_factors(layer, "default", draw(da), draw(db))
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
    attach_delta_form(lora_layers(model, "default"), "default", offset)
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


def test_rank_too_large_names_the_layer_and_the_remedy():
    model, _ = peft_pair(r=13)  # k_proj and v_proj are 24×48
    with pytest.raises(
        ValueError, match=r"rank 13 is too large for .*k_proj \(24×48\).*r can be 12 at most.*rank_pattern"
    ):
        check_targets(lora_layers(model, "default"), "default")


def test_the_largest_rank_works():
    model, _ = peft_pair(r=12)
    check_targets(lora_layers(model, "default"), "default")
    assert len(lora_layers(model, "default")) == 14


def test_a_trained_adapter_is_refused():
    model, _ = peft_pair()
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    nn.init.ones_(layer.lora_B["default"].weight)
    with pytest.raises(ValueError, match=r"already been trained: B of .*layers.1.mlp.down_proj is not zero.*merge"):
        check_targets(lora_layers(model, "default"), "default")


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
