"""`initialize_lora_ga`: invariants 1, 2, 3 and 8, and every way it can be misused."""

import copy
import weakref
from typing import get_args

import dense_reference
import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from test_probe import checkpointed
from tiny import CONFIGS, lora_config, peft_pair, tiny_batches, tiny_model
from torch import nn

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.factors import Direction
from lora_ga_trainer.gradient.accumulator import ExactGradient, GradientSketch
from lora_ga_trainer.gradient.estimation import estimate_gradients, make_accumulator, whole_list
from lora_ga_trainer.gradient.objective import Objective, language_model_loss
from lora_ga_trainer.initialization import attach_lora_ga

EXACT = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact")


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def step_directions(model):
    """B0 B0ᵀ and A0ᵀ A0 per layer: what the factors are, whatever the signs of the singular pairs."""
    return {
        name: (
            layer.B.frozen.double() @ layer.B.frozen.double().T,
            layer.A.frozen.double().T @ layer.A.frozen.double(),
        )
        for name, layer in model.lora_ga.weights.items()
    }


def largest_difference(found, reference):
    return max(
        ((a - b).norm() / b.norm()).item()
        for name in reference
        for a, b in zip(found[name], reference[name], strict=True)
    )


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_logits_stay_the_base_models_bit_for_bit(family, dtype, checkpointing):
    """Invariants 1 and 7: on every kind of model, and the base weights are not written."""
    model, base = peft_pair(family, dtype)
    initialize_lora_ga(
        checkpointed(model, checkpointing), tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True
    )
    inputs = tiny_batches(seed=9)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(inputs).logits, base(inputs).logits)
    for name, layer in model.lora_ga.weights.items():
        assert layer.A.frozen.any() and layer.B.frozen.any(), name
        assert torch.isfinite(layer.A.frozen).all()
    reference = dict(base.named_parameters())
    for name, parameter in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, reference[name.replace(".base_layer", "")])


@pytest.mark.parametrize("scale", ["stable", "unit", "gd", "weight_svd"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factors_are_the_papers_on_autograds_gradient(family, direction, scale):
    """Invariant 2, end to end: every direction and scale, on nn.Linear and on Conv1D (I×O weights)."""
    model, base = peft_pair(family)
    batches = tiny_batches((4, 4, 4, 4))
    config = LoRAGAArguments(ga_estimator="exact", ga_direction=direction, ga_scale=scale, ga_gamma=9.0)
    initialize_lora_ga(model, batches, config, disable_tqdm=True)
    layers = model.lora_ga.weights
    for name, grad_OI in dense_reference.autograd_gradients(base, layers, batches).items():
        module = base.get_submodule(name.removeprefix("base_model.model."))
        weight_OI = module.weight if isinstance(module, nn.Linear) else module.weight.T
        c = dense_reference.scale(
            scale, out_features=grad_OI.shape[0], rank=4, scaling=16 / 4**0.5, gamma=9.0, weight_OI=weight_OI.detach()
        )
        a_RI, b_OR = dense_reference.factors(grad_OI, 4, direction, c)
        A, B = layers[name].A.frozen.double(), layers[name].B.frozen.double()
        for found, reference in ((A, a_RI), (B.T, b_OR.T)):
            signs = torch.sign((found * reference).sum(dim=1, keepdim=True))
            # float32 gradients: singular vectors turn by the error (1e-7) over the gap between singular values, which
            # on these gradients is never under a thousandth of the largest
            assert (found * signs - reference).norm() < 1e-3 * reference.norm()


def test_without_the_offset_a0_is_the_same_and_the_alignment_is_its_own():
    """cos(G, G A0ᵀ A0): B = 0 lets A0 alone decide where the first step goes."""
    model, base = peft_pair()
    batches = tiny_batches()
    config = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact", ga_offset=False)
    report = initialize_lora_ga(model, batches, config, disable_tqdm=True)
    with_offset, _ = peft_pair()
    initialize_lora_ga(with_offset, batches, EXACT, disable_tqdm=True)
    layers, others = model.lora_ga.weights, with_offset.lora_ga.weights
    for name, grad_OI in dense_reference.autograd_gradients(base, layers, batches).items():
        a_RI, b_OR = layers[name].A.frozen, layers[name].B.weight
        assert torch.equal(a_RI, others[name].A.frozen) and not b_OR.any()
        # float32, and squared norms summed over singular values instead of entries
        assert report.alignment[name] == pytest.approx(dense_reference.alignment(grad_OI, a_RI, b_OR), rel=1e-4)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize(
    "config", [EXACT, LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_size=10)], ids=["exact", "sketch"]
)
def test_scaling_the_loss_changes_no_factor(factor, config):
    def factors(scale):
        model, _ = peft_pair()
        initialize_lora_ga(
            model, tiny_batches(), config, lambda *call: scale * language_model_loss(*call), disable_tqdm=True
        )
        return step_directions(model)

    # 1e3 is no power of two, so the gradient is rounded differently (6e-8), over the gaps as above
    assert largest_difference(factors(factor), factors(1.0)) < 1e-3


def test_fp16_gradients_do_not_underflow():
    """A token's share of a mean over 10⁸ tokens is nothing that fp16 can hold; the estimate does not mind."""

    def gradients(num_items):
        model, _ = peft_pair(dtype=torch.float16)
        adapter = attach_lora_ga(model, EXACT)
        accumulators = {name: make_accumulator(weight, EXACT) for name, weight in adapter.weights.items()}
        objective = Objective(model, tiny_batches())
        objective.num_items = num_items
        estimate_gradients(adapter, accumulators, objective)
        return {name: accumulator.grad_OI * num_items for name, accumulator in accumulators.items()}

    few, many = gradients(100), gradients(10**8)
    for name in few:
        # both scaled to the same range by a power of two within a factor 2, so fp16 rounds them alike: 5e-4 a step
        assert (few[name] - many[name]).norm() < 0.02 * few[name].norm()


@pytest.mark.parametrize("sizes", [(1,) * 8, (8,), (5, 3)])
@pytest.mark.parametrize(
    "config", [EXACT, LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_size=10)], ids=["exact", "sketch"]
)
def test_factors_do_not_depend_on_batching(config, sizes):
    def factors(sizes):
        model, _ = peft_pair()
        initialize_lora_ga(model, tiny_batches(sizes), config, disable_tqdm=True)
        return step_directions(model)

    assert largest_difference(factors(sizes), factors((4, 4))) < 1e-3  # rounding over the gaps, as above


def test_the_sketch_is_really_used_and_near_exact():
    def report(config):
        model, _ = peft_pair()
        return initialize_lora_ga(model, tiny_batches(), config, disable_tqdm=True)

    exact, sketch = report(EXACT), report(LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_size=12))
    assert exact.alignment.keys() == sketch.alignment.keys()
    assert any(exact.alignment[name] != sketch.alignment[name] for name in exact.alignment)
    # K = 12 of rank-starved tiny gradients, and ‖G‖ estimated from 8 columns
    assert all(sketch.alignment[name] == pytest.approx(exact.alignment[name], rel=0.15) for name in exact.alignment)


def test_random_direction_and_sketch_follow_ga_seed_only():
    def factors(seed, torch_seed):
        model, _ = peft_pair()
        torch.manual_seed(torch_seed)
        config = LoRAGAArguments(ga_learning_rate=1e-3, ga_direction="random", ga_sketch_size=12, ga_seed=seed)
        initialize_lora_ga(model, tiny_batches(), config, disable_tqdm=True)
        return step_directions(model)

    reference = factors(1, torch_seed=0)
    assert largest_difference(factors(1, torch_seed=99), reference) == 0.0
    assert largest_difference(factors(2, torch_seed=0), reference) > 0.1


def test_report_names_the_least_aligned_layer():
    model, base = peft_pair()
    batches = tiny_batches()
    report = initialize_lora_ga(model, batches, EXACT, disable_tqdm=True)
    layers = model.lora_ga.weights
    for name, grad_OI in dense_reference.autograd_gradients(base, layers, batches).items():
        A, B = layers[name].A.frozen, layers[name].B.frozen
        assert report.alignment[name] == pytest.approx(dense_reference.alignment(grad_OI, A, B), rel=1e-4)  # float32
    assert report.alignment[report.alignment_min_layer] == min(report.alignment.values()) == report.alignment_min
    assert report.num_items == sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches)
    assert report.seconds > 0 and report.alignment_min_layer in report.summary()


def test_rank_pattern_and_modules_to_save():
    model, base = peft_pair(rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 32}, modules_to_save=["lm_head"])
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)
    inputs = tiny_batches(seed=9)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(inputs).logits, base(inputs).logits)
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.k_proj.lora_A["default"].frozen.shape == (2, 48)
    assert attention.q_proj.lora_A["default"].frozen.shape == (4, 48)
    assert any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)


def test_an_adapter_of_another_name():
    base = tiny_model()
    model = get_peft_model(base, lora_config(), adapter_name="maths")
    initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)
    assert model.lora_ga.weights


def test_a_shuffling_data_loader_leaves_the_random_state_alone():
    model, _ = peft_pair()
    examples = [{name: value[row] for name, value in batch.items()} for batch in tiny_batches() for row in range(4)]
    loader = torch.utils.data.DataLoader(examples, batch_size=4, shuffle=True)
    before = torch.get_rng_state()
    initialize_lora_ga(model, loader, EXACT, disable_tqdm=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_may_be_a_generator():
    model, _ = peft_pair()
    report = initialize_lora_ga(
        model, iter(tiny_batches()), LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_size=10), disable_tqdm=True
    )
    assert report.alignment_min > 0


# --- misuse: a clear error, and nothing half-written -----------------------------------------------------------------


def refused(message, batches=None, config=EXACT, prepare=lambda model: None, **lora):
    model, _ = peft_pair(**lora)
    prepare(model)
    before = state(model)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        initialize_lora_ga(model, tiny_batches() if batches is None else batches, config, disable_tqdm=True)
    for name, value in model.state_dict().items():
        if name.endswith("frozen"):
            assert not value.any(), "a factor was written"
        elif "lora_" not in name:
            assert torch.equal(value, before[name]) or (value != value).any()
    assert sum(flags) == sum(p.requires_grad for p in model.parameters())


def test_no_batches():
    refused("got no batch", batches=[])


def test_batches_without_labels():
    refused(r"no 'labels', only \['input_ids'\]", batches=[{"input_ids": torch.zeros(1, 4, dtype=torch.long)}])


def test_all_labels_masked():
    batches = tiny_batches()
    for batch in batches:
        batch["labels"][:] = -100
    refused("All labels of the 2 batches .* −100.*completion mask", batches=batches)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (tiny_batches()[0], "`batches` holds a str, but must be an iterable of dictionaries of tensors"),
        ([torch.zeros(2, 3)], "`batches` holds a Tensor, but must be"),
        (
            [{"input_ids": [[1, 2]], "labels": [[1, 2]]}],
            "The `input_ids` of a batch .* are a list, but must be a tensor",
        ),
        (
            [{"input_ids": torch.ones(3), "labels": torch.ones(3)}],
            r"tensor of the shape \(3,\), but must be a tensor of",
        ),
        ([{"input_ids": torch.ones(2, 0), "labels": torch.ones(2, 0)}], r"\(2, 0\), .* leave out empty ones"),
    ],
    ids=["a batch", "tensors", "lists", "one example", "no token"],
)
def test_batches_that_are_none(batches, message):
    refused(message, batches=batches)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_inf_in_the_model(value):
    def poison(model):
        model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.data[0, 0] = value

    refused("loss of batch 0 .* is nan.*NaN", prepare=poison)


def test_next_to_no_target_with_a_gradient_is_refused():
    """Where one in ten is reached the rest is idle; where fewer are, something is wrong."""
    base = tiny_model()
    base.spare = nn.ModuleList(nn.Linear(48, 48) for _ in range(10))

    def targets(idle):
        return lora_config(target_modules=rf".*(layers\.0\.self_attn\.q_proj|spare\.[{idle}])")

    model = get_peft_model(copy.deepcopy(base), targets("0-9"))
    with pytest.raises(
        ValueError, match=r"10 of 11 target layers get no gradient \(it is exactly zero\): .*spare.0.*for 10%"
    ):
        initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)
    assert not any(half.frozen.any() for half in model.lora_ga.halves.values()), "a factor was written"
    report = initialize_lora_ga(get_peft_model(base, targets("1-9")), tiny_batches(), EXACT, disable_tqdm=True)
    assert len(report.idle) == 9 and len(report.alignment) == 1


@pytest.mark.parametrize("passes", [1, 1.25, 2])
def test_an_idle_layer_may_be_the_only_one_with_a_sketch(passes):
    """Later passes and a look have no other to sum."""
    base = tiny_model()
    base.spare = nn.Linear(1024, 1024)
    model = get_peft_model(base, lora_config(target_modules=r".*(layers\.0\.self_attn\.q_proj|spare)"))
    config = LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_passes=passes)
    report = initialize_lora_ga(model, tiny_batches(), config, disable_tqdm=True)
    assert len(report.alignment) == 1 and report.idle == ["base_model.model.spare"]


def test_a_look_may_see_no_gradient_but_none_that_is_infinite():
    """The first batch, which is all of the look, gives its labels no loss, or one that overflows on the way back."""

    def of_second_only(model, batch, num_items):
        return language_model_loss(model, batch, num_items) * (0.0 if torch.equal(batch["input_ids"], first) else 1.0)

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * float("inf")

    batches = tiny_batches((2, 2, 2, 2))
    first = batches[0]["input_ids"]
    config = LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_size=10, ga_sketch_passes=1.25)
    report = initialize_lora_ga(peft_pair()[0], batches, config, of_second_only, disable_tqdm=True)
    assert len(report.alignment) == 14
    with pytest.raises(
        ValueError, match="10 of 10 target layers get a gradient with NaN or Inf"
    ):  # of those with a sketch
        initialize_lora_ga(
            peft_pair()[0], batches, config, lambda *a: Overflow.apply(language_model_loss(*a)), disable_tqdm=True
        )


def test_a_long_list_of_layers_is_whole_in_the_log(caplog):
    names = [f"layers.{n}.q_proj" for n in range(11)]
    assert whole_list(names[:10]) == ", ".join(names[:10]) and not caplog.text
    assert whole_list(names) == f"{', '.join(names[:3])} and 8 more, all of which are in the log"
    assert all(name in caplog.text for name in names)


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "no offset"])
@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_a_target_without_a_gradient_starts_as_in_lora(estimator, offset, tmp_path, caplog):
    """Exact at the start, trained, saved and reloaded like the others; and named."""
    base = tiny_model().eval()
    base.model.layers[1].self_attn.o_proj.weight.data.zero_()  # silences q, k, v of this layer, not itself
    model = get_peft_model(copy.deepcopy(base), lora_config(r=1))
    config = LoRAGAArguments(ga_scale="stable", ga_estimator=estimator, ga_sketch_size=2, ga_offset=offset)
    with caplog.at_level("INFO"):
        report = initialize_lora_ga(model, tiny_batches(), config, disable_tqdm=True)
    silent = [f"base_model.model.model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    assert report.idle == silent and not report.alignment.keys() & set(silent) and len(report.alignment) == 11
    assert report.metrics()["ga/idle_weights"] == 3
    assert f"3 of 14 layers got no gradient from the sample and start as in LoRA: {', '.join(silent)}" in caplog.text
    batch = tiny_batches((4,), seed=9)[0]
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, base(**batch).logits)
    for name in silent:
        weight = model.lora_ga.weights[name]
        c = weight.out_features**0.25 / 4  # γ = 16
        gram = weight.A.frozen @ weight.A.frozen.T
        assert torch.allclose(gram, c**2 * torch.eye(1), atol=1e-6)  # float32
        assert not weight.B.weight.any()
    k, v = (model.lora_ga.weights[silent[place]].A.frozen for place in (1, 2))
    assert k.shape == v.shape and not torch.allclose(k, v), "each has random directions of its own"
    same = get_peft_model(copy.deepcopy(base), lora_config(r=1))
    initialize_lora_ga(same, tiny_batches(), config, disable_tqdm=True)
    assert all(torch.equal(same.lora_ga.weights[n].A.frozen, model.lora_ga.weights[n].A.frozen) for n in silent)
    with torch.no_grad():  # as if it had been trained
        for weight in model.lora_ga.weights.values():
            weight.A.trainable.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    assert "| layers without a gradient | 3 of 14 " in (tmp_path / "README.md").read_text()
    same.load_adapter(tmp_path, "default", is_trainable=True)
    with torch.no_grad():
        assert torch.equal(same.eval()(**batch).logits, model(**batch).logits)
        stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(**batch).logits
    # PEFT's scaling may differ in the last place; float32
    assert (stock - model(**batch).logits).abs().max() < 1e-5


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("offset", [True, False], ids=["offset", "no offset"])
@pytest.mark.parametrize("direction", get_args(Direction))
def test_a_rank_beyond_half_of_a_layer(direction, offset, estimator, tmp_path):
    """r = 30 for k_proj and v_proj of 24×48: exact at the start, saved, taken up and loaded like any other."""
    base = tiny_model().eval()
    lora = {"r": 30, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}
    model = get_peft_model(copy.deepcopy(base), lora_config(**lora))
    config = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator=estimator, ga_direction=direction, ga_offset=offset)
    report = initialize_lora_ga(model, tiny_batches(), config, disable_tqdm=True)
    batch = tiny_batches((4,), seed=9)[0]
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, base(**batch).logits)
    assert not report.idle and len(report.alignment) == 8
    for name, weight in model.lora_ga.weights.items():
        assert weight.A.frozen.any(dim=1).all(), "a row of zeros where there is room for another"
        assert 0 < len(report.singular_values[name]) <= min(60, weight.out_features, weight.in_features)
        # a cosine, float32
        assert 0 < report.alignment[name] < 1 + 1e-5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**batch).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    same = get_peft_model(copy.deepcopy(base), lora_config(**lora))
    attach_lora_ga(same, config)
    same.load_adapter(tmp_path, "default", is_trainable=True)
    with torch.no_grad():
        trained = model(**batch).logits
        assert torch.equal(same.eval()(**batch).logits, trained)
        stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(**batch).logits
    # PEFT's scaling may differ in the last place; float32
    assert (stock - trained).abs().max() < 1e-5 * trained.abs().max()


def test_no_target_reached_at_all():
    base = tiny_model()
    base.spare = nn.Linear(48, 48)
    model = get_peft_model(base, lora_config(target_modules=["spare"]))
    with pytest.raises(ValueError, match="does not depend on any target layer"):
        initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)


def test_sketch_narrower_than_2r():
    refused(
        r"`ga_sketch_size` is 7, but must be at least 2·r = 8 for .*q_proj",
        config=LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_size=7),
    )


def test_a_second_initialization():
    model, _ = peft_pair()
    initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)
    before = state(model)
    with pytest.raises(ValueError, match="initialized already"):
        initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)
    assert unchanged(model, before)


def test_a_second_lora_ga_adapter_on_one_model():
    model, _ = peft_pair()
    initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)
    model.add_adapter("second", lora_config())
    model.set_adapter("second")
    with pytest.raises(ValueError, match="has a LoRA-GA adapter already, 'default'.*merge_and_unload"):
        initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)


def test_after_a_failure_it_can_be_tried_again_with_other_options():
    model, base = peft_pair()
    masked = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in tiny_batches()]
    with pytest.raises(ValueError, match="All labels"):
        initialize_lora_ga(model, masked, LoRAGAArguments(ga_learning_rate=1e-3, ga_gamma=4.0), disable_tqdm=True)
    inputs = tiny_batches()[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(inputs).logits, base(inputs).logits)
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3, ga_gamma=64.0), disable_tqdm=True)
    assert model.lora_ga.state.options["ga_gamma"] == 64.0 and model.lora_ga.state.report is not None


def test_attached_in_the_other_form():
    model, _ = peft_pair()
    attach_lora_ga(model, EXACT)
    with pytest.raises(ValueError, match="`ga_offset` is False, but the adapter 'default' was attached with True"):
        initialize_lora_ga(
            model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3, ga_offset=False), disable_tqdm=True
        )


def test_not_a_peft_model():
    with pytest.raises(ValueError, match="LlamaForCausalLM.*get_peft_model"):
        initialize_lora_ga(tiny_model(), tiny_batches(), EXACT)


def test_not_a_lora_adapter():
    model = get_peft_model(tiny_model(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="IA3Config.*LoraConfig"):
        initialize_lora_ga(model, tiny_batches(), EXACT)


def test_two_active_adapters():
    model, _ = peft_pair()
    model.add_adapter("second", lora_config())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"\['default', 'second'\] are active.*set_adapter"):
        initialize_lora_ga(model, tiny_batches(), EXACT)


def test_config_of_another_kind():
    model, _ = peft_pair()
    with pytest.raises(ValueError, match="LoraConfig, but must hold the `ga_\\*` options"):
        initialize_lora_ga(model, tiny_batches(), lora_config())


def test_a_look_is_at_the_first_batches_and_exact_gradients_are_those_of_one_pass():
    model, _ = peft_pair()
    batches = tiny_batches((2, 2, 2, 2))
    seen = []

    def watched(model, batch, num_items):
        seen.append(next(index for index, known in enumerate(batches) if torch.equal(known["labels"], batch["labels"])))
        return language_model_loss(model, batch, num_items)

    found = {}
    for passes in (1.5, 1):
        config = LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_size=10, ga_sketch_passes=passes)
        adapter = attach_lora_ga(model, config) if not found else model.lora_ga
        found[passes] = {name: make_accumulator(weight, config) for name, weight in adapter.weights.items()}
        estimate_gradients(adapter, found[passes], Objective(model, batches, watched))
    assert seen == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3]
    exact = [name for name, accumulator in found[1].items() if isinstance(accumulator, ExactGradient)]
    assert 0 < len(exact) < len(found[1])
    assert all(torch.equal(found[1.5][name].grad_OI, found[1][name].grad_OI) for name in exact)


@pytest.mark.parametrize(("share", "forwards"), [(0.25, 1), (0.1, 1), (0.5, 2), (0.75, 3), (1.1 % 1, 1), (1.0, 4)])
def test_a_share_of_the_sample_is_in_whole_batches_and_never_none(share, forwards):
    """Of batches that are not alike: the examples are those of the first ones."""
    objective = Objective(peft_pair()[0], tiny_batches((3, 1, 2, 2)))
    assert len(objective.first(share)) == forwards
    assert objective.num_examples(share) == sum((3, 1, 2, 2)[:forwards])


def test_the_sums_of_a_pass_are_gone_before_the_next(monkeypatch):
    """The sketch's memory is that of one pass: nothing keeps the tensors that the pass before has summed."""
    model, _ = peft_pair()
    of_first_pass, alive_in_second = [], []
    add, end_pass = GradientSketch.add, GradientSketch.end_pass

    def watched_add(sketch, x, dy):
        if sketch.passes_done == 1:
            alive_in_second.append(sum(reference() is not None for reference in of_first_pass))
        add(sketch, x, dy)

    def watched_end_pass(sketch):
        if sketch.passes_done == 0:
            of_first_pass.extend(weakref.ref(total) for total in sketch.sums())
        end_pass(sketch)

    monkeypatch.setattr(GradientSketch, "add", watched_add)
    monkeypatch.setattr(GradientSketch, "end_pass", watched_end_pass)
    initialize_lora_ga(
        model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_size=10), disable_tqdm=True
    )
    assert of_first_pass and alive_in_second
    assert not any(alive_in_second)
