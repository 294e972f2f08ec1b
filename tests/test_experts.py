"""The experts of a mixture, whose weights are one parameter: each gets a pair of its own, from a gradient of its own.

What holds for every architecture (exact start, autograd's gradient, stock PEFT, merging) is in `test_families`.
"""

import copy
import json
import math
import shutil

import dense_reference
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from test_probe import checkpointed, estimated_gradients, largest_relative_error
from tiny import VOCABULARY, lora_config, moved_at_random, random_model, sft_arguments, tiny_batches
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig

from lora_ga_trainer import LoRAGAArguments, LoRAGASFTConfig, LoRAGASFTTrainer, initialize_lora_ga, restart_lora_ga
from lora_ga_trainer.adapter import targets
from lora_ga_trainer.adapter.targets import lora_layers
from lora_ga_trainer.adapter.weight import adapted_weights
from lora_ga_trainer.checkpoint import export
from lora_ga_trainer.gradient.accumulator import ExpertGradients, ExpertSketches, GradientSketch
from lora_ga_trainer.gradient.estimation import accumulator_bytes, make_accumulator
from lora_ga_trainer.initialization import attach_lora_ga

GAMMA = 16
EXACT = LoRAGAArguments(ga_scale="stable", ga_gamma=GAMMA, ga_estimator="exact")
CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 10, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
R = 2


def qwen(experts=4):
    return Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=experts, num_experts_per_tok=2)


CONFIGS = {"qwen3_moe": qwen, "gpt_oss": lambda: GptOssConfig(**SIZES, num_local_experts=4)}  # E×O×I and E×I×O
both_layouts = pytest.mark.parametrize("family", list(CONFIGS))


def pair(config, dtype=torch.float32, **lora):
    base = random_model(config, dtype).eval()
    lora = {"r": R, "target_modules": ["q_proj", "v_proj"], "target_parameters": PARAMETERS} | lora
    return get_peft_model(copy.deepcopy(base), lora_config(**lora)).eval(), base


def logits(model):
    with torch.no_grad():
        return model.eval()(**tiny_batches((4,), seed=9)[0]).logits


def train(model, batches, optimizer=None, steps=3):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        model.train()(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def stacks(model):
    return {name: weight for name, weight in model.lora_ga.weights.items() if weight.experts > 1}


def factors(weight):
    """(A0 E×R×I, B0 E×O×R) as they stand in memory."""
    return weight.A.frozen, weight.B.frozen.unflatten(1, (-1, weight.experts)).permute(2, 0, 1)


# --- the gradient ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@both_layouts
def test_however_the_experts_are_multiplied_the_gradient_is_autograds(family, implementation, checkpointing):
    model, base = pair(CONFIGS[family]())
    model.get_base_model().set_experts_implementation(implementation)
    batches = tiny_batches((3, 5))
    found = estimated_gradients(checkpointed(model, checkpointing), batches, EXACT)
    assert sum(gradient.dim() == 3 for gradient in found.values()) == 4
    # float32 through two layers, summed in another order
    assert largest_relative_error(found, dense_reference.autograd_gradients(base, found, batches)) < 1e-5


def snapshot(model):
    def of(module):
        parameters = [(id(p), p.requires_grad, p.grad) for p in module._parameters.values() if p is not None]
        return (
            type(module),
            list(module._parameters),
            parameters,
            [*module._forward_hooks],
            [*module._forward_pre_hooks],
        )

    return {name: of(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("fails", [False, True])
@both_layouts
def test_the_probe_leaves_the_parameters_as_they_were(family, fails):
    """In their order too: PEFT nests its layers in it."""
    model, _ = pair(CONFIGS[family]())
    attach_lora_ga(model, EXACT)
    before = snapshot(model)

    def compute_loss(model, batch, num_items):
        loss = model(**batch).loss
        if fails:
            raise RuntimeError("out of memory")
        return loss

    if fails:
        experts = model.get_base_model().model.layers[1].mlp.experts.get_base_layer()
        handle = experts.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("in the forward")))
        with pytest.raises(RuntimeError, match="in the forward"):
            estimated_gradients(model, tiny_batches(), EXACT)
        handle.remove()
        with pytest.raises(RuntimeError, match="out of memory"):
            estimated_gradients(model, tiny_batches(), EXACT, compute_loss)
    else:
        estimated_gradients(model, tiny_batches(), EXACT)
    assert snapshot(model) == before


def test_what_stands_in_the_gradient_of_experts_without_tokens_does_not_count():
    """On some devices that is whatever was in memory before."""
    generator = torch.Generator().manual_seed(0)
    dW = torch.randn(10, 40, 30, generator=generator)
    dW[3], dW[9] = math.nan, math.inf
    is_reached = torch.tensor([expert not in (3, 9) for expert in range(10)])
    clean = dW.clone()
    clean[~is_reached] = 0
    exact, sketch = ExpertGradients(10, 40, 30, CPU), ExpertSketches(10, 40, 30, 8, 1, 0, CPU)
    for accumulator in (exact, sketch):
        accumulator.add(dW, is_reached, 0.0)
        accumulator.end_pass()
    assert torch.equal(exact.grad_OI, clean)
    assert all(total.isfinite().all() for total in sketch.sums())
    assert [one.triplets(4).s_K.any().item() for one in sketch.matrices()] == is_reached.tolist()


@pytest.mark.parametrize("passes", [1, 1.5, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sketches_of_experts_are_those_of_single_weights(passes, dtype):
    """Ten, so that a group of experts is not full; each gradient in two parts."""
    E, O, I, K = 10, 60, 50, 12
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(E, 30, I, generator=generator), torch.randn(E, 30, O, generator=generator)
    together = ExpertSketches(E, O, I, K, passes, 5, CPU, dtype)
    alone = [GradientSketch(O, I, K, passes, 5, CPU, dtype) for _ in range(E)]
    dy[2, :11] = 0  # an expert that a look does not reach
    for number in range(math.ceil(passes)):
        for part in (slice(0, 11), slice(11, 30))[: 1 if passes % 1 and number == 0 else 2]:
            together.add(dy[:, part].mT @ x[:, part], torch.ones(E, dtype=torch.bool), 0.0)
            for expert, sketch in enumerate(alone):
                sketch.add(x[expert, part], dy[expert, part])
        for accumulator in (together, *alone):
            accumulator.end_pass()
    for one, other in zip(together.matrices(), alone, strict=True):
        found, expected = one.triplets(6), other.triplets(6)
        # sums of 30 products in float32 in another order; a basis in bfloat16 may round the other way
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found.s_K, expected.s_K, rtol=tolerance, atol=0)
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=tolerance)


@pytest.mark.parametrize("passes", [1, 1.25, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_that_are_told_before_are_those_that_are_held(passes, dtype):
    """On a mixture of the shapes of Qwen3-30B-A3B, with four of its 128 experts; linear layers too."""
    config = Qwen3MoeConfig(
        **SIZES | {"hidden_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 16, "head_dim": 128},
        moe_intermediate_size=768, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.device("meta"):
        base = random_model(config, dtype)
    base.to_empty(device="cpu")
    model = get_peft_model(base, lora_config(r=8, target_modules="all-linear"))
    options = LoRAGAArguments(ga_scale="stable", ga_sketch_passes=passes)
    for name, weight in attach_lora_ga(model, options).weights.items():
        accumulator = make_accumulator(weight, options)
        shared = (
            {id(accumulator.left_OK), id(accumulator.right_IK)} if isinstance(accumulator, GradientSketch) else set()
        )
        most = 0
        for number in range(math.ceil(passes)):
            held = [value for value in vars(accumulator).values() if isinstance(value, torch.Tensor)]
            # the first pass multiplies with what all sketches share, an expanded view of which has its strides
            most = max(most, sum(value.nbytes for value in held if number or id(value) not in shared))
            accumulator.end_pass()
        assert accumulator_bytes(weight, options) == most, name
        if weight.experts > 1 and dtype == torch.bfloat16 and passes == 2:
            assert most < 0.145 * weight.layer.get_param().nbytes, "14 % of the weights, as `EXPERT_OVERSAMPLING` says"


# --- the factors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@both_layouts
def test_every_expert_gets_the_papers_factors(family, direction):
    model, base = pair(CONFIGS[family]())
    batches = tiny_batches((8, 8))
    options = LoRAGAArguments(ga_scale="stable", ga_gamma=GAMMA, ga_estimator="exact", ga_direction=direction)
    report = initialize_lora_ga(model, batches, options, disable_tqdm=True)
    assert torch.equal(logits(model), logits(base))
    gradients = dense_reference.autograd_gradients(base, model.lora_ga.weights, batches)
    for name, weight in stacks(model).items():
        A0, B0 = factors(weight)
        c = dense_reference.scale(
            "stable", out_features=weight.out_features, rank=R, scaling=1.0, gamma=GAMMA, weight_OI=None
        )
        for expert, grad_OI in enumerate(gradients[name]):
            assert dense_reference.pairs(grad_OI) > 2 * R
            # the tolerance of test_initialization for singular vectors, whose gaps amplify rounding
            found = dense_reference.is_the_papers_as_far_as_it_goes(
                grad_OI, R, direction, c, A0[expert], B0[expert], 2e-3
            )
            assert found[0], (name, expert, found[1])
        assert report.alignment[name] == pytest.approx(
            dense_reference.alignment(
                *(torch.block_diag(*matrices) for matrices in (gradients[name], A0, B0))
            ), rel=1e-4,
        )  # fmt: skip
        assert report.gradient_norm[name] == pytest.approx(gradients[name].norm().item(), rel=1e-5)
        spectra = torch.linalg.svdvals(gradients[name].double())[:, : 2 * R]
        assert report.singular_values[name] == pytest.approx(spectra.norm(dim=0).tolist(), rel=1e-5)
        assert report.experts[name] == (4, 0, 0)
    assert report.experts.keys() == stacks(model).keys()


@pytest.mark.parametrize("scale", ["matched", "weight_svd", "gd", "unit"])
@both_layouts
def test_the_scale_is_that_of_single_weights(family, scale):
    model, base = pair(CONFIGS[family]())
    options = LoRAGAArguments(ga_scale=scale, ga_learning_rate=1e-4, ga_estimator="exact")
    initialize_lora_ga(model, tiny_batches((8, 8)), options, disable_tqdm=True)
    for name, weight in stacks(model).items():
        O, I, s = weight.out_features, weight.in_features, weight.scaling
        if scale == "matched":
            c = dense_reference.matched_scale(O, I, R, s, 5e-5, 1e-4, 1e-4)
        elif scale == "weight_svd":  # one c for all: the mean over the experts
            W = base.get_parameter(name.removeprefix("base_model.model."))
            c = sum(
                dense_reference.scale(scale, out_features=O, rank=R, scaling=s, gamma=1, weight_OI=matrix) for matrix in W
            ) / len(W)  # fmt: skip
        else:
            c = dense_reference.scale(scale, out_features=O, rank=R, scaling=s, gamma=1, weight_OI=None)
        A0, B0 = factors(weight)
        torch.testing.assert_close(A0.norm(dim=2), torch.full((4, R), c))
        torch.testing.assert_close(B0.norm(dim=1), torch.full((4, R), c))


@both_layouts
def test_the_first_step_moves_each_expert_along_the_papers_direction(family):
    model, base = pair(CONFIGS[family]())
    batches = tiny_batches((8,))
    initialize_lora_ga(model, batches, EXACT, disable_tqdm=True)
    gradients = dense_reference.autograd_gradients(base, model.lora_ga.weights, batches)
    rate = 1e-3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
    train(model, batches, optimizer, steps=1)
    for name, weight in stacks(model).items():
        moved = weight.as_EOI(weight.layer.get_delta_weight("default"))
        s = weight.scaling
        for grad_OI, A0, B0, change in zip(gradients[name], *factors(weight), moved, strict=True):
            wanted = -rate * s * s * (B0 @ (B0.T @ grad_OI) + (grad_OI @ A0.T) @ A0)
            # float32; dB dA, which is of second order in the rate, is left out
            assert (change - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_with_few_tokens_or_none_start_as_in_lora(dtype):
    """Forty of them, for three tokens with a loss. In 16 bits a gradient of rank 1 comes with noise of full rank."""
    model, base = pair(qwen(experts=40), dtype)
    batch = {key: value[:1, :6] for key, value in tiny_batches((2,))[0].items()}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :3] = -100
    report = initialize_lora_ga(model, [batch], EXACT, disable_tqdm=True)
    assert torch.equal(logits(model), logits(base))
    gradients = dense_reference.autograd_gradients(random_model(qwen(experts=40)), model.lora_ga.weights, [batch])
    for name, weight in stacks(model).items():
        A0, B0 = factors(weight)
        c = A0[0, 0].norm()
        total, idle, thin = report.experts[name]
        without = [expert for expert, grad_OI in enumerate(gradients[name]) if not grad_OI.any()]
        # bf16 routes a token elsewhere now and then
        assert total == 40 and idle == pytest.approx(len(without), abs=0 if dtype == torch.float32 else 2)
        assert idle + thin == 40 and idle > 20 and thin > 2, "no expert gets four tokens of three"
        no_step = [expert for expert in range(40) if not B0[expert].any()]
        assert len(no_step) >= idle
        for rows in A0.float():
            # rows orthonormal but for float32's or, after the write, PEFT's float32 copies' rounding
            torch.testing.assert_close(rows @ rows.T, c**2 * torch.eye(R), rtol=0, atol=1e-5 * c.item() ** 2)
        assert len({tuple(A0[expert].flatten().tolist()) for expert in without}) == len(without), "each its own"
    assert report.metrics()["ga/idle_experts"] == sum(counts.idle for counts in report.experts.values())
    assert f"experts    {report.experts_note()}" in report.summary() and "ga_num_samples" in report.experts_note()

    train(model, tiny_batches((8, 8)), steps=6)  # from there on as in LoRA
    for name, weight in stacks(model).items():
        change = weight.as_EOI(weight.layer.get_delta_weight("default")).float()
        with_tokens = change.flatten(1).any(dim=1)
        assert (with_tokens[[e for e, g in enumerate(gradients[name]) if not g.any()]]).any(), name
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_router_is_a_thin_weight_like_any_other():
    """Four outputs, and r = 4."""
    model, base = pair(qwen(), r=4, target_modules="all-linear", target_parameters=None)
    report = initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)
    routers = [name for name in report.alignment if name.endswith("mlp.gate")]
    assert len(routers) == 2 and not report.experts.keys() & set(routers)
    assert all(len(report.singular_values[name]) <= 4 for name in routers)
    assert set(routers) <= set(report.thin) and report.metrics()["ga/thin_weights"] == len(report.thin)
    assert f"  thin       {len(report.thin)} of " in report.summary()
    assert torch.equal(logits(model), logits(base))


# --- files, resuming, restarts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "no offset"])
@both_layouts
def test_a_checkpoint_is_loaded_bit_for_bit(family, offset, tmp_path):
    options = LoRAGAArguments(ga_scale="stable", ga_estimator="exact", ga_offset=offset)
    model, _ = pair(CONFIGS[family]())
    report = initialize_lora_ga(model, tiny_batches(), options, disable_tqdm=True)
    train(model, tiny_batches())
    model.save_pretrained(tmp_path)
    other, _ = pair(CONFIGS[family]())
    attach_lora_ga(other, options)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert other.lora_ga.state.report == report
    theirs = dict(other.named_parameters())  # PEFT's forward changes the order
    for name, ours in model.named_parameters():
        assert torch.equal(ours, theirs[name]), name
    assert torch.equal(logits(model), logits(other))


@both_layouts
def test_a_restart_keeps_the_function_and_what_it_saves_loads(family, tmp_path):
    model, base = pair(CONFIGS[family]())
    batches = tiny_batches()
    initialize_lora_ga(model, batches, EXACT, disable_tqdm=True)
    optimizer = train(model, batches)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    gradients = dense_reference.autograd_gradients(merged.requires_grad_(True), model.lora_ga.weights, batches)
    before = logits(model)
    restart_lora_ga(model, batches, EXACT, optimizer, disable_tqdm=True)
    # the same products, summed with zeros between them: float32 rounding of logits of order 1
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-6)
    for name, weight in stacks(model).items():
        for grad_OI, A0 in zip(gradients[name], weight.A.frozen, strict=True):
            first = torch.linalg.svd(grad_OI.double()).Vh[0]
            # the gradient at the merged weights, rounded once: its first direction is A0's first row
            assert abs(first @ A0[0].double()) > 0.999 * A0[0].norm()
    train(model, batches, optimizer)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=2e-5)  # as in test_restarts
    again, _ = pair(CONFIGS[family]())
    initialize_lora_ga(again, batches, EXACT, disable_tqdm=True)
    again.load_adapter(tmp_path, "default")
    assert torch.equal(logits(again), logits(model))


def moved_adapter(folder, family, offset=True, **lora):
    """The base in `folder/base` and an adapter of it, with changes as large as its weights, in `folder/adapter`."""
    model, base = pair(CONFIGS[family](), **lora)
    base.save_pretrained(folder / "base")
    config = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact", ga_offset=offset)
    initialize_lora_ga(model, tiny_batches(), config, disable_tqdm=True)
    moved_at_random(model)
    model.save_pretrained(folder / "adapter")


def with_peft(folder, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / adapter)


def deltas(model):
    """ΔW of all that is adapted, of every expert, as stock PEFT computes it."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name: layer.get_delta_weight("default").detach().double() for name, layer in layers.items()}


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "no offset"])
@pytest.mark.parametrize("form", [{"rank": 2}, {"rank": 3, "fold_scale": True}, {"fold_scale": True}], ids=str)
@pytest.mark.parametrize("family", list(CONFIGS))
def test_another_rank_and_another_scaling(family, form, offset, tmp_path):
    """Linear layers, routers and experts of unlike ranks."""
    moved_adapter(tmp_path, family, offset, r=4, rank_pattern={"q_proj": 3, "gate_up_proj": 6})
    lost = export(tmp_path / "adapter", tmp_path / "out", base_model=tmp_path / "base", **form)
    document = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert document["rank_pattern"] == {} and not document["use_rslora"]
    assert "fold_scale" not in form or (document["lora_alpha"], document["alpha_pattern"]) == (document["r"], {})
    stock, small = with_peft(tmp_path, "adapter"), with_peft(tmp_path, "out")
    theirs, ours = deltas(stock), deltas(small)
    assert ours.keys() == theirs.keys() and any(delta.dim() == 3 for delta in theirs.values())
    rank = form.get("rank", 99)
    weights = adapted_weights(lora_layers(stock, "default"), "default").values()
    named = {weight.path: weight.key for weight in weights}
    assert lost.keys() == (set(named.values()) if "rank" in form else set())
    for name, delta in theirs.items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        best = u[..., :rank] * s[..., None, :rank] @ vh[..., :rank, :]
        # of float32 matrices, multiplied in float32 by PEFT, in sums of up to 24 terms
        assert (ours[name] - best).norm() < 24**0.5 * 2**-22 * delta.norm(), name
        if lost:
            assert lost[named[name]].norm == pytest.approx(delta.norm().item(), rel=1e-5)
            assert lost[named[name]].error == pytest.approx(s[..., rank:].norm().item(), abs=1e-5 * delta.norm().item())
    if "rank" in form:
        assert any(layer.error > 0.01 * layer.norm for layer in lost.values()), "nothing was cut"
    else:
        torch.testing.assert_close(logits(small), logits(stock), rtol=0, atol=1e-4 * logits(stock).abs().max().item())


def test_a_smaller_rank_is_merged(tmp_path):
    moved_adapter(tmp_path, "qwen3_moe")
    how = {"base_model": tmp_path / "base", "rank": 2, "fold_scale": True}
    export(tmp_path / "adapter", tmp_path / "small", **how)
    export(tmp_path / "adapter", tmp_path / "merged", merge=True, **how)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    expected, whole = logits(with_peft(tmp_path, "small")), logits(with_peft(tmp_path, "adapter"))
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()  # float32: W + ΔW is rounded once more
    assert (merged - whole).abs().max() > 0.01 * whole.abs().max(), "nothing was cut"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "does not name its base model. Pass `base_model`"),
        ("absent", "base model .*absent has no configuration here nor on the hub .*Pass `base_model`"),
        (
            "shallow",
            r"its matrices of base_model.model.model.layers.1\..* they would be of none. Pass .* was trained on",
        ),
        (
            "crowded",
            r"its matrices of .*experts are of shapes \[16, 32\] and \[24, 16\], on .* \[32, 32\] and \[24, 32\]",
        ),
    ],
)
def test_without_its_base_an_adapter_of_experts_keeps_its_rank(base, message, tmp_path):
    moved_adapter(tmp_path, "qwen3_moe")
    save_other_bases(tmp_path)
    for form in ({"rank": 2}, {"fold_scale": True}):
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "adapter", tmp_path / "out", base_model=base and tmp_path / base, **form)
        assert not (tmp_path / "out").exists()


def save_other_bases(folder):
    for name, experts, layers in (("shallow", 4, 1), ("deep", 4, 3), ("crowded", 8, 2)):
        config = qwen(experts)
        config.num_hidden_layers = layers
        random_model(config).save_pretrained(folder / name)


def test_nothing_is_merged_where_adapter_and_base_do_not_match(tmp_path):
    """PEFT would only warn of what one of them lacks."""
    moved_adapter(tmp_path, "qwen3_moe")
    save_other_bases(tmp_path)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    shutil.copytree(tmp_path / "adapter", tmp_path / "damaged")
    damaged = {
        name: value for name, value in tensors.items() if not name.endswith("layers.0.mlp.experts.lora_B.weight")
    }
    assert len(damaged) == len(tensors) - 1
    save_file(damaged, tmp_path / "damaged/adapter_model.safetensors", metadata={"format": "pt"})
    for base, adapter in (("shallow", "adapter"), ("deep", "adapter"), ("crowded", "adapter"), ("base", "damaged")):
        with pytest.raises(ValueError, match="^The adapter does not fit the base model.*`base_model`"):
            export(tmp_path / adapter, tmp_path / "out", merge=True, base_model=tmp_path / base)
        assert not (tmp_path / "out").exists()
    for form in ({"rank": 2}, {"fold_scale": True}):
        with pytest.raises(ValueError, match="has base_model.*lora_A.weight, but no base_model.*lora_B.weight"):
            export(tmp_path / "damaged", tmp_path / "out", base_model=tmp_path / "base", **form)


def test_merging_leaves_all_else_in_the_files_as_it_is(tmp_path):
    """Other dtypes than config.json says, tensors that transformers does not load, several files."""
    model, base = pair(qwen(), torch.bfloat16, target_modules=["q_proj"])
    initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)
    moved_at_random(model)
    model.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    shards = sorted((tmp_path / "base").glob("*.safetensors"))
    assert len(shards) > 1
    index = tmp_path / "base/model.safetensors.index.json"
    listed = json.loads(index.read_text())
    for shard in shards:
        tensors = load_file(shard)
        for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
            tensors[name] = torch.rand_like(tensors[name], dtype=torch.float32)  # not to be had in bfloat16
        if shard == shards[0]:
            tensors["mtp.layers.0.weight"] = torch.rand(3, 3)
            listed["weight_map"]["mtp.layers.0.weight"] = shard.name
        save_file(tensors, shard, metadata={"format": "pt"})
    index.write_text(json.dumps(listed))
    export(tmp_path / "adapter", tmp_path / "merged", merge=True, base_model=tmp_path / "base")
    changed = set()
    for shard in shards:
        before, after = load_file(shard), load_file(tmp_path / "merged" / shard.name)
        assert before.keys() == after.keys()
        assert all(after[name].dtype == value.dtype for name, value in before.items())
        changed |= {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name.split(".")[3] for name in changed} == {"self_attn", "mlp"}
    assert all("experts" in name or "q_proj" in name for name in changed) and len(changed) == 2 * (1 + 4 * 3)
    expected = logits(PeftModel.from_pretrained(base_of(tmp_path / "base"), tmp_path / "adapter"))
    merged = logits(base_of(tmp_path / "merged"))
    # W + ΔW is rounded to bfloat16, and so is what is multiplied with it
    assert (merged - expected).norm() < 0.05 * expected.norm()


def base_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def test_an_embedding_that_the_head_shares_is_not_merged(tmp_path):
    config = qwen()
    config.tie_word_embeddings = True
    base = random_model(config)
    base.save_pretrained(tmp_path / "base")
    lora = {"target_modules": ["q_proj", "embed_tokens"], "target_parameters": PARAMETERS, "init_lora_weights": False}
    get_peft_model(base, lora_config(r=R, **lora)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="has a LoRA on model.embed_tokens, whose weight the base model shares"):
        export(tmp_path / "adapter", tmp_path / "out", merge=True, base_model=tmp_path / "base")


def test_a_file_of_experts_with_rslora_is_exported_in_the_plain_form(tmp_path):
    """As PEFT saves it."""
    base = random_model(qwen())
    base.save_pretrained(tmp_path / "base")
    lora = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS, "rank_pattern": {"gate_up_proj": 4}}
    get_peft_model(base, lora_config(r=R, init_lora_weights=False, **lora)).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["use_rslora"]
    export(tmp_path / "adapter", tmp_path / "out", base_model=tmp_path / "base")
    assert not json.loads((tmp_path / "out/adapter_config.json").read_text())["use_rslora"]
    torch.testing.assert_close(
        logits(with_peft(tmp_path, "out")), logits(with_peft(tmp_path, "adapter")), rtol=0, atol=1e-5
    )


# --- trainers and launches ---------------------------------------------------------------------------------------------


def mixture_trainer(output_dir, prompt_completion, tokenizer, **options):
    return LoRAGASFTTrainer(
        model=random_model(Qwen3MoeConfig(
            **SIZES, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, output_router_logits=True,
        )),
        args=LoRAGASFTConfig(**sft_arguments(output_dir, **{"ga_num_samples": 8} | options)),
        train_dataset=prompt_completion,
        processing_class=tokenizer,
    )  # fmt: skip


def test_the_class_swap_alone_trains_experts_and_router_and_resumes_exactly(prompt_completion, tokenizer, tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1}
    whole = mixture_trainer(tmp_path / "whole", prompt_completion, tokenizer, **options)
    whole.train()
    kinds = {name.rsplit(".", 1)[-1] for name in whole.lora_ga_report.alignment}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "gate"}
    resumed = mixture_trainer(tmp_path / "whole", prompt_completion, tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    theirs = dict(resumed.model.named_parameters())
    for name, ours in whole.model.named_parameters():
        assert torch.equal(ours, theirs[name]), name
    assert "experts" in (tmp_path / "whole" / "checkpoint-4" / "README.md").read_text(encoding="utf-8")


def test_under_zero3_they_are_refused_by_name(monkeypatch):
    """A stand-in for the partitioned parameter; a real launch is in test_backends."""
    model, base = pair(qwen())
    monkeypatch.setattr(targets, "is_zero3", lambda parameter: parameter.dim() == 3)
    with pytest.raises(ValueError, match=r"`down_proj` of .*mlp.experts is partitioned by DeepSpeed ZeRO-3.*FSDP2"):
        attach_lora_ga(model, EXACT)
    assert not any(isinstance(module, nn.Module) and type(module).__name__ == "DeltaA" for module in model.modules())
    assert torch.equal(logits(model), logits(base))
