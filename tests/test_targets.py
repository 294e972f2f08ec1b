"""What an adapter may target: which layers, used several times, with shared weights, chosen by pattern, beside another adapter.

`test_delta` has ranks too large and trained adapters, `test_initialization` layers without a gradient, `test_checkpoint` the
files of ranks by a layer's name.
"""

import copy

import dense_reference
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_probe import checkpointed, estimated_gradients, largest_relative_error
from tiny import lora_config, peft_pair, tiny_batches, tiny_model
from torch import nn

from lora_ga_trainer import LoRAGAArguments, LoRAGASFTTrainer, initialize_lora_ga
from lora_ga_trainer.initialization import attach_lora_ga

CONFIG = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact")
INPUTS = tiny_batches(seed=9)[0]["input_ids"]
# float32 logits of order 1 through two layers; PEFT's scaling can differ in the last place
LOGITS_TOLERANCE = 1e-5


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS).logits


def train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in tiny_batches():
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def starts_exactly_and_reloads(model, base, folder):
    """Invariants 1 and 6. Without its adapter the model is its base, but deeper where PEFT repeats layers."""
    initialize_lora_ga(model, tiny_batches(), CONFIG, disable_tqdm=True)
    with model.disable_adapter():
        untrained = logits(model)
    assert torch.equal(logits(model), untrained)
    train(model)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert (logits(loaded) - logits(model)).abs().max() < LOGITS_TOLERANCE
    assert (logits(model) - untrained).abs().max() > 0.01, "training changed nothing, so this shows nothing"


def names(model):
    return {name.removeprefix("base_model.model.model.layers.") for name in model.lora_ga.weights}


# --- kinds of layers --------------------------------------------------------------------------------------------------

NOT_LINEAR = {
    "Embedding": nn.Embedding(8, 8),
    "Conv1d": nn.Conv1d(8, 8, 3),
    "Conv2d": nn.Conv2d(8, 8, 3),
    "MultiheadAttention": nn.MultiheadAttention(8, 2),
}


@pytest.mark.parametrize("kind", list(NOT_LINEAR))
def test_layers_that_are_not_linear_are_refused(kind):
    base = tiny_model()
    base.model.layers[1].extra = NOT_LINEAR[kind]
    model = get_peft_model(base, lora_config(r=2, target_modules=["q_proj", "extra"]))
    before = [type(module) for module in model.modules()]
    with pytest.raises(
        ValueError, match=rf"cannot initialize .*layers.1.extra \({kind}\).*only linear.*exclude_modules"
    ):
        attach_lora_ga(model, CONFIG)
    assert [type(module) for module in model.modules()] == before


def test_they_are_refused_when_the_trainer_is_made(sft_config, prompt_completion, tokenizer):
    with pytest.raises(ValueError, match=r"cannot initialize .*embed_tokens \(Embedding\)"):
        LoRAGASFTTrainer(
            model=tiny_model(),
            args=sft_config(),
            train_dataset=prompt_completion,
            processing_class=tokenizer,
            peft_config=lora_config(target_modules=["embed_tokens", "q_proj"]),
        )


# --- choosing layers --------------------------------------------------------------------------------------------------

ALL = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


def of_layers(*numbers):
    return {f"{number}.{name}" for number in numbers for name in ALL}


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"layers_to_transform": [1], "target_modules": [name.split(".")[1] for name in ALL]}, of_layers(1)),
        (
            {"layers_to_transform": 0, "layers_pattern": "layers", "target_modules": ["q_proj", "up_proj"]},
            {"0.self_attn.q_proj", "0.mlp.up_proj"},
        ),
        (
            {"exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
            of_layers(0, 1) - {"0.self_attn.k_proj", "1.self_attn.k_proj", "0.mlp.up_proj"},
        ),
        ({"exclude_modules": r".*layers\.0.*"}, of_layers(1)),
        (
            {"target_modules": ["layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"]},
            {"1.self_attn.q_proj", "0.mlp.down_proj"},
        ),
        # the second layer once more, with adapters of its own on the same weights
        ({"layer_replication": [[0, 2], [1, 2]]}, of_layers(0, 1, 2)),
    ],
    ids=["a layer", "layers_pattern", "excluded", "excluded by regex", "full names", "replicated"],
)
def test_layers_are_chosen_as_in_peft(lora, expected, tmp_path):
    model, base = peft_pair(**lora)
    starts_exactly_and_reloads(model, base, tmp_path)
    assert names(model) == expected


def test_ranks_and_alphas_by_regex_and_by_full_name(tmp_path):
    """Every layer has the rank and scaling that PEFT gave it, and in the file twice the rank and the same scaling."""
    model, base = peft_pair(
        rank_pattern={r".*layers\.0.*": 3, "model.layers.1.self_attn.k_proj": 2},
        alpha_pattern={r"^model\.layers\.1.*": 5},
    )
    starts_exactly_and_reloads(model, base, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(base, tmp_path)
    for name, layer in model.lora_ga.weights.items():
        rank = 3 if "layers.0" in name else 2 if name.endswith("k_proj") else 4
        assert layer.A.frozen.shape[0] == layer.rank == rank
        assert len(tensors[f"{name}.lora_A.weight"]) == 2 * rank
        scaling = (5 if "layers.1" in name else 16) / rank**0.5
        assert layer.scaling == pytest.approx(scaling, rel=1e-15)
        assert loaded.get_submodule(name).scaling["default"] == pytest.approx(scaling, rel=1e-12)


# --- weights in several places ----------------------------------------------------------------------------------------


def one_layer_twice():
    """Weights shared across depth: the model's second layer is its first."""
    base = tiny_model().eval()
    base.model.layers[1] = base.model.layers[0]
    base.config.use_cache = False  # keys and values are kept by layer
    return base


def one_module_under_two_names():
    base = tiny_model().eval()
    base.model.layers[1].mlp.up_proj = base.model.layers[0].mlp.up_proj
    return base


def one_weight_in_two_modules():
    base = tiny_model().eval()
    base.model.layers[1].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight
    return base


SHARED = {
    one_layer_twice: (of_layers(0), "all-linear"),
    one_module_under_two_names: (of_layers(0, 1) - {"1.mlp.up_proj"}, "all-linear"),  # PEFT replaces the first
    one_weight_in_two_modules: (of_layers(0, 1), "all-linear"),
    lambda: tiny_model("llama_tied").eval(): (
        {"0.self_attn.q_proj", "1.self_attn.q_proj", "base_model.model.lm_head"},
        ["q_proj", "lm_head"],
    ),
}
several_places = pytest.mark.parametrize(
    ("make_base", "expected", "target_modules"),
    [(make_base, *rest) for make_base, rest in SHARED.items()],
    ids=["a layer twice", "a module twice", "a weight twice", "tied head"],
)


def without_sharing(base, targets):
    """The same function, in which every target has a weight of its own; a layer that runs twice is still one."""
    base = copy.deepcopy(base)
    for name in targets:
        parent, _, leaf = name.removeprefix("base_model.model.").rpartition(".")
        module = base.get_submodule(parent)
        own = copy.copy(getattr(module, leaf))
        own._parameters = {"weight": nn.Parameter(own.weight.detach().clone()), "bias": None}
        setattr(module, leaf, own)
    return base


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
@several_places
def test_the_gradient_is_that_of_the_layers_own_calls(make_base, expected, target_modules, checkpointing):
    """The sum over the calls of one layer; not over what else is done with its weight, which its adapter has no part in."""
    base = make_base()
    model = get_peft_model(copy.deepcopy(base), lora_config(target_modules=target_modules))
    batches = tiny_batches((3, 5))
    found = estimated_gradients(checkpointed(model, checkpointing), batches)
    assert names(model) == expected
    reference = dense_reference.autograd_gradients(without_sharing(base, found), found, batches)
    assert largest_relative_error(found, reference) < 1e-5  # float32, summed in another order
    whole = dense_reference.autograd_gradients(base, found, batches)
    # what autograd has for a shared weight, it has for all uses of it
    assert (largest_relative_error(found, whole) > 0.1) == (make_base is not one_layer_twice)


@several_places
def test_shared_weights_start_exactly_and_reload(make_base, expected, target_modules, tmp_path):
    base = make_base()
    model = get_peft_model(copy.deepcopy(base), lora_config(target_modules=target_modules))
    starts_exactly_and_reloads(model, base, tmp_path)
    assert names(model) == expected
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(expected) + ("lm_head" in target_modules)  # with the head PEFT saves the base's, too
    resumed = get_peft_model(copy.deepcopy(base), lora_config(target_modules=target_modules))
    attach_lora_ga(resumed, CONFIG)
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(resumed), logits(model))


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_trained_embeddings_that_stay_tied(module, tmp_path):
    model, base = peft_pair("llama_tied", modules_to_save=[module], ensure_weight_tying=True, target_modules=["q_proj"])
    starts_exactly_and_reloads(model, base, tmp_path)
    inner = model.get_base_model()
    assert torch.equal(inner.get_input_embeddings().weight, inner.get_output_embeddings().weight)
    assert not torch.equal(inner.get_input_embeddings().weight, base.get_input_embeddings().weight)


# --- two adapters -----------------------------------------------------------------------------------------------------


def test_beside_a_trained_plain_adapter(tmp_path):
    """The LoRA-GA adapter starts from the base function, not from the other's; each is switched, saved and loaded by itself."""
    model, base = peft_pair(target_modules=["q_proj", "up_proj", "lm_head"])
    for layer in (module for module in model.modules() if "default" in getattr(module, "lora_B", ())):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    train(model)
    plain = logits(model)

    model.add_adapter("ga", lora_config(r=3, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("ga")
    report = initialize_lora_ga(model, tiny_batches(), CONFIG, disable_tqdm=True)
    assert torch.equal(logits(model), logits(base))
    alone = get_peft_model(copy.deepcopy(base), lora_config(r=3, target_modules=["q_proj", "down_proj"]))
    assert report.alignment == initialize_lora_ga(alone, tiny_batches(), CONFIG, disable_tqdm=True).alignment

    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".ga.trainable" in name for name in trainable)
    train(model)
    ours = logits(model)
    assert (ours - logits(base)).abs().max() > 0.01
    model.set_adapter("default")
    assert torch.equal(logits(model), plain)
    assert all(".default." in name for name, p in model.named_parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    model.set_adapter("ga")
    assert torch.equal(logits(model), ours)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded), plain)
    loaded.load_adapter(tmp_path / "ga", "ga")
    loaded.set_adapter("ga")
    assert (logits(loaded) - ours).abs().max() < LOGITS_TOLERANCE
    model.delete_adapter("default")
    assert torch.equal(logits(model), ours)


# --- after an error ---------------------------------------------------------------------------------------------------


def test_after_targets_that_are_not_reached_others_can_be_named():
    base = tiny_model().eval()
    base.spare = nn.ModuleList(nn.Linear(48, 48) for _ in range(10))
    model = get_peft_model(copy.deepcopy(base), lora_config(target_modules=r".*(1\.mlp\.up_proj|spare\.\d)"))
    with pytest.raises(ValueError, match=r"10 of 11 target layers get no gradient .*spare"):
        initialize_lora_ga(model, tiny_batches(), CONFIG, disable_tqdm=True)
    assert torch.equal(logits(model), logits(base))
    again = get_peft_model(model.unload(), lora_config(target_modules=["up_proj"]))
    initialize_lora_ga(again, tiny_batches(), CONFIG, disable_tqdm=True)
    assert torch.equal(logits(again), logits(base))
    train(again)
    assert (logits(again) - logits(base)).abs().max() > 0.01
