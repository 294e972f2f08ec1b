"""Invariants 5 and 6: what is saved is an ordinary adapter for the untouched base, and can be taken up again exactly."""

import copy
import json
import math
from itertools import product

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import lora_config, peft_pair, tiny_batches, tiny_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.checkpoint.adapter_files import FORMER_FROZEN_FILE, FROZEN_FILE
from lora_ga_trainer.checkpoint.scaling import plain_alpha, plain_form, scaling_of
from lora_ga_trainer.checkpoint.state import read_state
from lora_ga_trainer.initialization import attach_lora_ga

CONFIG = LoRAGAArguments(ga_scale="stable", ga_sketch_size=10)
NO_OFFSET = LoRAGAArguments(ga_scale="stable", ga_sketch_size=10, ga_offset=False)
BOTH_FORMS = pytest.mark.parametrize("config", [CONFIG, NO_OFFSET], ids=["offset", "no offset"])
INPUTS = tiny_batches(seed=9)[0]["input_ids"]
# float32 logits of order 1 through two layers, where W + s·BA is rounded once more than W x + s·BA x, or a product is summed
# in another order
LOGITS_TOLERANCE = 1e-5


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS).logits.float()


def trained(family="llama", dtype=torch.float32, steps=3, config=CONFIG, **lora):
    """(model after a few AdamW steps from a LoRA-GA start, its untouched base)."""
    model, base = peft_pair(family, dtype, **lora)
    batches = tiny_batches()
    initialize_lora_ga(model, batches, config, disable_tqdm=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(**batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (logits(model) - logits(base)).abs().max() > 0.05, "training changed nothing, so the tests show nothing"
    return model, base


@BOTH_FORMS
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": False},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 40, "k_proj": 8}},
        {"use_rslora": False, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 40, "k_proj": 8}},
        {"target_modules": r".*\.mlp\.(up|down)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
        {"lora_dropout": 0.2},
    ],
    ids=["rslora", "lora", "patterns-rslora", "patterns-lora", "regex", "modules_to_save", "dropout"],
)
def test_stock_peft_loads_it_on_the_untouched_base(lora, config, tmp_path):
    model, base = trained(config=config, **lora)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded), logits(model))  # every rank is a power of two here, so every s is met to the bit
    assert (logits(loaded.merge_and_unload()) - logits(model)).abs().max() < LOGITS_TOLERANCE


@BOTH_FORMS
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "qwen2"])
def test_every_kind_of_model(family, config, tmp_path):
    model, base = trained(family, config=config)
    model.save_pretrained(tmp_path)
    assert (logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)) - logits(model)).abs().max() < 1e-5


@BOTH_FORMS
def test_lora_bias(config, tmp_path):
    model, base = trained("qwen2", config=config, target_modules=["q_proj", "k_proj"], lora_bias=True)
    model.save_pretrained(tmp_path)
    assert any(key.endswith("lora_B.bias") for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert (logits(loaded) - logits(model)).abs().max() < LOGITS_TOLERANCE


@BOTH_FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype, config, tmp_path):
    """PEFT keeps the adapter in float32, so loading gives the very same numbers."""
    model, base = trained(dtype=dtype, config=config)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), logits(model))


def test_the_file_holds_the_two_matrices_and_nothing_else(tmp_path):
    model, _ = trained()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layers = model.lora_ga.weights
    assert set(tensors) == {f"{name}.{half}.weight" for name in layers for half in ("lora_A", "lora_B")}
    for name, layer in layers.items():
        A, B = layer.A, layer.B
        assert torch.equal(tensors[f"{name}.lora_A.weight"], torch.cat([A.frozen + A.trainable, A.trainable]))
        assert torch.equal(tensors[f"{name}.lora_B.weight"], torch.cat([B.trainable, B.frozen], dim=1))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (8, 64, False)  # 16/√4 = 64/8


def test_adapters_whose_names_contain_its_own_stay_out_of_its_file(tmp_path):
    model, _ = trained()
    for other in ("default_2", "my_default"):
        model.add_adapter(other, lora_config())
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"{name}.{half}.weight" for name in model.lora_ga.weights for half in ("lora_A", "lora_B")
    }


def test_without_the_offset_the_file_is_the_adapter_itself(tmp_path):
    """Rank r, scaling and products as in the model: stock PEFT computes the same numbers, not within a tolerance."""
    model, base = trained(config=NO_OFFSET, rank_pattern={"k_proj": 2}, alpha_pattern={"v_proj": 40})
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layers = model.lora_ga.weights
    assert set(tensors) == {f"{name}.{half}.weight" for name in layers for half in ("lora_A", "lora_B")}
    for name, layer in layers.items():
        A, B = layer.A, layer.B
        assert torch.equal(tensors[f"{name}.lora_A.weight"], A.frozen + A.trainable)
        assert torch.equal(tensors[f"{name}.lora_B.weight"], B.weight)
        assert len(A.frozen) == (2 if name.endswith("k_proj") else 4) and A.frozen.any() and A.trainable.any()
    saved, text = LoraConfig.from_pretrained(tmp_path), (tmp_path / "adapter_config.json").read_text()
    assert (saved.r, saved.rank_pattern, saved.use_rslora) == (4, {"k_proj": 2}, False)
    assert saved.alpha_pattern == {"k_proj": 16 / math.sqrt(2) * 2, "v_proj": 80}
    assert '"lora_alpha": 32,' in text, "whole, where it can be"
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), logits(model))


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model, _ = trained()
    config, before = copy.deepcopy(model.peft_config["default"]), logits(model)
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].r == config.r == 4
    assert model.peft_config["default"].lora_alpha == config.lora_alpha
    assert torch.equal(logits(model), before)


@BOTH_FORMS
def test_in_memory_merge_and_disable(config):
    model, base = trained(config=config)
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), adapted)
    merged = copy.deepcopy(model).merge_and_unload()
    assert (logits(merged) - adapted).abs().max() < LOGITS_TOLERANCE
    assert torch.equal(logits(copy.deepcopy(model).unload()), logits(base))


def test_a_copied_model_saves_itself(tmp_path):
    """`save_pretrained` is bound to the instance; a deep copy must not save the original."""
    model, base = trained()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.lora_ga.weights.values():
            layer.B.trainable.mul_(3)
    other.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert (logits(loaded) - logits(other)).abs().max() < LOGITS_TOLERANCE
    assert (logits(loaded) - logits(model)).abs().max() > 0.01


@BOTH_FORMS
def test_an_adapter_of_another_name_beside_a_plain_one(config, tmp_path):
    model, base = trained(config=config)
    model.add_adapter("plain", lora_config())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "plain/adapter_config.json").read_text())["r"] == 4
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert (logits(loaded) - logits(model)).abs().max() < LOGITS_TOLERANCE
    loaded.load_adapter(tmp_path / "plain", "plain")
    model.save_pretrained(tmp_path / "other", selected_adapters=["plain"])
    assert not (tmp_path / "other/lora_ga.json").exists()


def test_an_adapter_that_peft_finds_no_more_is_not_saved_as_an_empty_one(tmp_path):
    """As under FSDP2 with its own activation checkpointing: the wrapper is in the names of modules, not of parameters."""
    model, _ = trained()
    model.save_pretrained(tmp_path / "before")
    layers = model.get_base_model().model.layers
    layers[0], layers[1] = map(checkpoint_wrapper, layers)
    try:
        model.save_pretrained(tmp_path / "out")
    except ValueError as error:
        assert "PEFT finds no matrix of the adapter 'default' under the names" in str(error)
        assert not (tmp_path / "out").exists()
    else:  # PEFT before 0.21 looks for parameters' names only
        whole, saved = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "out"))
        assert saved.keys() == whole.keys() and all(torch.equal(saved[name], whole[name]) for name in whole)


def test_whether_embeddings_are_saved_is_decided_once(tmp_path):
    """PEFT compares the vocabulary with that of the base on the hub, or in its folder, at every save, if it is there."""
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    model = get_peft_model(base, lora_config())
    initialize_lora_ga(model, tiny_batches(), CONFIG, disable_tqdm=True)
    model.save_pretrained(tmp_path / "first")
    (tmp_path / "base").rename(tmp_path / "away")
    model.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and any("embed_tokens" in name for name in first)


def test_saving_before_the_initialization_is_refused(tmp_path):
    model, _ = peft_pair()
    attach_lora_ga(model, CONFIG)
    with pytest.raises(ValueError, match=r"has not been initialized.*trainer.train\(\)"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_conversion_is_refused(tmp_path):
    model, _ = trained()
    with pytest.raises(ValueError, match="nothing to convert. Leave it out"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion="start")
    assert not (tmp_path / "out").exists()


def test_pickle_format_is_as_good(tmp_path):
    model, base = trained()
    model.save_pretrained(tmp_path, safe_serialization=False)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert (logits(loaded) - logits(model)).abs().max() < LOGITS_TOLERANCE


def test_bf16_file_keeps_the_function_better_than_the_usual_conversion(tmp_path):
    """Why the file holds [A0 + dA; dA], [dB, B0] and not [A; A0], [B, −B0]: dA and dB keep their own precision."""
    model, base = trained()
    model.save_pretrained(tmp_path)
    errors = {}
    for form in ("ours", "usual"):
        rounded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        for name, layer in model.lora_ga.weights.items():
            target = rounded.get_submodule(name)
            A, B = layer.A, layer.B
            a, b = A.frozen + A.trainable, B.frozen + B.trainable
            pair = (A.weight, B.weight) if form == "ours" else (torch.cat([a, A.frozen]), torch.cat([b, -B.frozen], 1))
            with torch.no_grad():
                for half, value in zip((target.lora_A, target.lora_B), pair, strict=True):
                    half["default"].weight.copy_(value.bfloat16().float())
        errors[form] = (logits(rounded) - logits(model)).square().mean().sqrt().item()
    assert errors["ours"] < errors["usual"] / 3  # the real model in test_real_model shows a factor of ten and more


# --- the scaling, for readers of α/r ----------------------------------------------------------------------------------

MODULES = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "k_proj", "v_proj")]


@pytest.mark.parametrize("times", [1, 2, 6])
@pytest.mark.parametrize("use_rslora", [True, False])
@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [
        ({}, {}),
        ({"k_proj": 2}, {"v_proj": 40}),
        ({"k_proj": 2}, {"layers.0.self_attn.k_proj": 7, "k_proj": 9}),  # one module in two patterns
        ({r"layers\.1\..*": 32}, {"^model.layers.0.self_attn.v_proj": 8, r".*(k|q)_proj": 5}),
    ],
)
def test_the_plain_form_keeps_every_scaling(ranks, alphas, use_rslora, times):
    config = LoraConfig(r=8, lora_alpha=10, use_rslora=use_rslora, rank_pattern=ranks, alpha_pattern=alphas)
    before = copy.deepcopy(config)
    plain = plain_form(config, [f"base_model.model.{module}" for module in MODULES], times)
    assert plain.use_rslora is False and plain.r == times * 8 and config == before
    # a module of a name that is in no pattern, to see that the patterns match no more than they should
    for module in [*MODULES, "visual.model.layers.0.self_attn.o_proj"]:
        s = scaling_of(config, module)
        # α/r in doubles: to the last bit, or within it, where no α meets it (see `plain_alpha`)
        assert abs(scaling_of(plain, module) - s) <= (0 if times < 6 else math.ulp(s)), module


def test_alpha_is_whole_where_it_can_be_and_meets_the_scaling_to_the_bit():
    assert plain_alpha(16 / math.sqrt(4), 8) == 64 and isinstance(plain_alpha(4.0, 8), int)
    unmet = 0
    for rank, alpha, times in product(range(1, 129), (1, 8, 10, 16, 32, 256), (1, 2, 4)):
        for s in (alpha / rank, alpha / math.sqrt(rank)):
            file_rank = times * rank
            near = [s * file_rank + n * math.ulp(s * file_rank) for n in range(-4, 5)]
            met = any(candidate / file_rank == s for candidate in near)
            found = plain_alpha(s, file_rank)
            assert found / file_rank == s if met else abs(found / file_rank - s) <= math.ulp(s), (s, file_rank)
            assert met or rank.bit_count() > 1, "a power of two divides without rounding"
            unmet += not met
    assert unmet > 0, "the tolerance is needed"


def test_servers_that_load_every_safetensors_find_the_adapter_alone(tmp_path):
    model, _ = trained()
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert not [path for pattern in ("*.bin", "*.pt") for path in tmp_path.rglob(pattern)]


def as_before(directory):
    """Make the adapter in `directory` one that 0.1.0 saved: rsLoRA in its file, and another name for the initial factors."""
    (directory / FROZEN_FILE).rename(directory / FORMER_FROZEN_FILE)
    config = json.loads((directory / "adapter_config.json").read_text())
    config |= {"use_rslora": True, "lora_alpha": 16 * math.sqrt(config["r"] // 4)}
    (directory / "adapter_config.json").write_text(json.dumps(config))


@BOTH_FORMS
def test_a_checkpoint_of_0_1_0_loads_and_is_taken_up_again(config, tmp_path):
    model, base = trained(config=config)
    model.save_pretrained(tmp_path)
    as_before(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert (logits(loaded) - logits(model)).abs().max() < LOGITS_TOLERANCE
    other = fresh(config)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(other), logits(model))
    assert (other.lora_ga.lora_config.lora_alpha, other.lora_ga.lora_config.use_rslora) == (16, True), (
        "as was asked for"
    )
    other.save_pretrained(tmp_path)  # in its place
    assert not (tmp_path / FORMER_FROZEN_FILE).exists() and (tmp_path / FROZEN_FILE).exists()
    again = fresh(config)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(again), logits(model))


# --- taking a checkpoint up again -----------------------------------------------------------------------------------


@BOTH_FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_halves_come_back_bit_for_bit(dtype, config, tmp_path):
    """A0 and dA apart, which their sum in the file does not tell."""
    model, _ = trained(config=config)
    model.to(dtype).save_pretrained(tmp_path)
    other, _ = peft_pair()
    attach_lora_ga(other.to(dtype), config)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert other.lora_ga.state == model.lora_ga.state
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def fresh(config=CONFIG, **lora):
    model, _ = peft_pair(**lora)
    attach_lora_ga(model, config)
    return model


def refused(model, directory, message):
    """Loading raises, and not one weight has changed."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_adapter(directory, "default", is_trainable=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("lora", "ga", "message"),
    [
        ({"r": 5}, {}, "`r` is 5, but .* was made with 4"),
        ({"lora_alpha": 8}, {}, "`lora_alpha` is 8, but .* was made with 16"),
        ({"rank_pattern": {"k_proj": 2}}, {}, "`rank_pattern` is"),
        ({"modules_to_save": ["lm_head"]}, {}, r"`modules_to_save` is \['lm_head'\], but .* was made with None"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, {}, "`lora_bias` is True"),
        ({"bias": "lora_only"}, {}, "`bias` is 'lora_only', but .* was made with 'none'"),
        ({}, {"ga_gamma": 64.0}, "`ga_gamma` is 64.0, but .* was made with 16.0"),
        ({}, {"ga_direction": "ArBr"}, "`ga_direction` is 'ArBr'"),
        ({}, {"ga_offset": False}, "`ga_offset` is False, but .* was made with True"),
    ],
)
def test_other_settings_are_refused(lora, ga, message, tmp_path):
    trained()[0].save_pretrained(tmp_path)
    refused(fresh(LoRAGAArguments(**{"ga_scale": "stable", "ga_sketch_size": 10} | ga), **lora), tmp_path, message)


def test_a_checkpoint_from_before_an_option_existed_was_made_with_its_default(tmp_path):
    model, _ = trained()
    model.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "lora_ga.json").read_text())
    assert document["options"].pop("ga_offset") is True
    (tmp_path / "lora_ga.json").write_text(json.dumps(document))
    refused(fresh(NO_OFFSET), tmp_path, "`ga_offset` is False, but .* was made with True")
    other = fresh()
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(other), logits(model))


def test_a_checkpoint_without_the_offset_is_no_start_for_a_run_with_it(tmp_path):
    trained(config=NO_OFFSET)[0].save_pretrained(tmp_path)
    refused(fresh(), tmp_path, "`ga_offset` is True, but .* was made with False")


def test_a_checkpoint_with_other_trained_modules_is_refused(tmp_path):
    """They would overwrite the base model's."""
    trained(modules_to_save=["lm_head"])[0].save_pretrained(tmp_path)
    refused(fresh(), tmp_path, r"`modules_to_save` is None, but .* was made with \['lm_head'\]")
    document = json.loads((tmp_path / "lora_ga.json").read_text())
    document["lora"]["modules_to_save"] = None
    (tmp_path / "lora_ga.json").write_text(json.dumps(document))
    refused(fresh(), tmp_path, r"adapter_model.safetensors does not fit .* for .*lm_head.weight it holds .*needs None")


def test_the_batch_size_of_the_estimation_may_differ(tmp_path):
    trained()[0].save_pretrained(tmp_path)
    model = fresh(LoRAGAArguments(ga_scale="stable", ga_sketch_size=10, ga_batch_size=3))
    model.load_adapter(tmp_path, "default")
    assert model.lora_ga.state.report is not None


def test_the_batch_size_decides_what_a_look_sees(tmp_path):
    options = {"ga_scale": "stable", "ga_sketch_size": 10, "ga_sketch_passes": 1.25}
    model, _ = peft_pair()
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(**options, ga_batch_size=2), disable_tqdm=True)
    model.save_pretrained(tmp_path)
    refused(fresh(LoRAGAArguments(**options, ga_batch_size=3)), tmp_path, "`ga_batch_size` is 3, but .* made with 2")


def test_a_deleted_adapter_is_not_saved(tmp_path):
    model, _ = trained()
    model.add_adapter("plain", lora_config())
    model.set_adapter("plain")
    model.delete_adapter("default")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "plain/adapter_model.safetensors").exists() and not (tmp_path / "lora_ga.json").exists()


@pytest.mark.parametrize("modules", [["q_proj"], ["q_proj", "lm_head"]])
def test_other_layers_are_refused(modules, tmp_path):
    trained()[0].save_pretrained(tmp_path)
    refused(fresh(target_modules=modules), tmp_path, "lora_ga.tensors does not fit this model: for .* it holds")


@BOTH_FORMS
@pytest.mark.parametrize("file", ["lora_ga.json", "lora_ga.tensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_missing_and_damaged_files_are_refused(file, damage, config, tmp_path):
    trained(config=config)[0].save_pretrained(tmp_path)
    path = tmp_path / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    refused(fresh(config), tmp_path, f"{file}.*Resume from")


def test_a_foreign_json_is_refused(tmp_path):
    trained()[0].save_pretrained(tmp_path)
    (tmp_path / "lora_ga.json").write_text('{"versions": {}, "report": null}')
    with pytest.raises(ValueError, match="is damaged"):
        read_state(tmp_path)


@BOTH_FORMS
@pytest.mark.parametrize("file", ["lora_ga.tensors", "adapter_model.safetensors"])
def test_other_shapes_are_refused(file, config, tmp_path):
    trained(config=config)[0].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / file)
    save_file({name: value[:, :2].contiguous() for name, value in tensors.items()}, tmp_path / file)
    refused(fresh(config), tmp_path, rf"{file} does not fit this model: for .* it holds \[.*, 2\], the model needs")
