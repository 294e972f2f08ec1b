"""PEFT's helpers on the model that has just been trained: as if it had been saved and reloaded, or an error."""

import copy

import pytest
import torch
from peft import (
    PeftModel,
    convert_to_lora,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from tiny import lora_config, peft_pair, tiny_batches, tiny_model

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga, restart_lora_ga

INPUTS = tiny_batches(seed=9)[0]["input_ids"]
SAME = 1e-5
"""Of what was learned, in norm: float32, the same products in another order, or with an SVD between."""


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS).logits


def trained(offset=True, restarts=0, learning_rate=1e-2, **lora):
    model, _ = peft_pair(**lora)
    config, batches = LoRAGAArguments(ga_learning_rate=1e-3, ga_offset=offset), tiny_batches()
    initialize_lora_ga(model, batches, config, disable_tqdm=True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for restart in range(restarts + 1):
        if restart:
            restart_lora_ga(model, batches, config, optimizer, disable_tqdm=True)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


FORMS = pytest.mark.parametrize(
    "form",
    [{}, {"offset": False}, {"restarts": 1}, {"use_rslora": False}, {"rank_pattern": {"q_proj": 2}}],
    ids=["offset", "no offset", "restarted", "α/r", "ranks"],
)
DELTA_FORMS = pytest.mark.parametrize("offset", [True, False], ids=["offset", "no offset"])


def error(model, reference):
    """Of `model`, as a share of what `reference`, its logits, has learned."""
    return ((logits(model) - reference).norm() / (reference - logits(tiny_model())).norm()).item()


@FORMS
@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_a_weighted_adapter_is_what_was_trained(form, kind, tmp_path):
    model = trained(**form)
    reference, config = logits(model), model.peft_config["default"]
    adapters, weights = ["default", "zero"], [1.0, 1.0]
    if kind == "linear":  # which wants equal ranks
        adapters, weights = ["default"], [1.0]
    model.add_adapter("zero", lora_config(use_rslora=False))  # adds nothing
    model.add_weighted_adapter(adapters, weights, "sum", combination_type=kind)
    model.set_adapter("sum")
    assert error(model, reference) < SAME
    if kind != "linear" or "rank_pattern" not in form:  # there PEFT writes several ranks under one
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        assert error(PeftModel.from_pretrained(tiny_model(), tmp_path / "sum"), reference) < SAME
    model.set_adapter("default")
    assert torch.equal(logits(model), reference) and model.peft_config["default"] is config


@FORMS
def test_a_copy_is_a_model_of_its_own(form, tmp_path):
    """Of `copy.deepcopy`, and of `torch.save` whole; with the same function, its own files and the same halves frozen."""
    model = trained(**form)
    torch.save(model, tmp_path / "model.pt")
    for name, same in {
        "copied": copy.deepcopy(model),
        "loaded": torch.load(tmp_path / "model.pt", weights_only=False),
    }.items():
        assert torch.equal(logits(same), logits(model))
        assert same.lora_ga.model is same and same.lora_ga.state.report == model.lora_ga.state.report
        same.set_adapter("default")
        for weight in same.lora_ga.weights.values():
            dB = weight.trained[1]
            assert dB.requires_grad and not weight.A.frozen.requires_grad
            dB.data.add_(0.1)
        same.save_pretrained(tmp_path / name)
        reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path / name)
        assert error(reloaded, logits(same)) < SAME < error(reloaded, logits(model))


@FORMS
def test_what_reads_the_weights_is_right(form):
    model, base = trained(**form), tiny_model()
    reference, rank = logits(model), 8 * (1 + form.get("restarts", 0))
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    assert error(merged, reference) < SAME
    merged.unmerge_adapter()
    assert error(merged, reference) < SAME
    assert error(copy.deepcopy(model).merge_and_unload(), reference) < SAME
    assert torch.equal(logits(copy.deepcopy(model).unload()), logits(base))
    with rescale_adapter_scale(model, 0.0):
        assert torch.equal(logits(model), logits(base))
    weights = get_base_model_state_dict(model)
    assert weights.keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in weights.items())
    config, converted = convert_to_lora(model, rank)
    stock, _ = peft_pair(r=config.r, lora_alpha=config.lora_alpha, use_rslora=False)
    set_peft_model_state_dict(stock, converted)
    assert error(stock, reference) < SAME


@DELTA_FORMS
def test_the_halves_go_from_model_to_model(offset):
    """What `get_peft_model_state_dict` gives, `set_peft_model_state_dict` takes."""
    first, second = trained(offset), trained(offset, learning_rate=1e-3)
    assert error(second, logits(first)) > 0.1
    set_peft_model_state_dict(second, get_peft_model_state_dict(first))
    assert torch.equal(logits(second), logits(first))


def refused(model, call, message):
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        call()
    assert torch.equal(logits(model), before)


@DELTA_FORMS
def test_what_would_load_nothing_is_refused(offset, tmp_path):
    model, other = trained(offset), trained(offset, learning_rate=1e-3)
    other.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    load = r"would be loaded.*`model.load_adapter\(folder, 'default', is_trainable=True\)`"
    refused(model, lambda: set_peft_model_state_dict(model, tensors), load)
    named = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    refused(model, lambda: model.load_state_dict(named, strict=False), load)
    swap = r"cannot be hot-swapped.*`model.load_adapter\(.*Save the adapter.* and reload it"
    refused(model, lambda: hotswap_adapter(model, str(tmp_path), "default"), swap)
    refused(model, lambda: prepare_model_for_compiled_hotswap(model, target_rank=16), swap)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(model), logits(other)), "the way that the messages name"


def test_an_ordinary_adapter_is_still_swapped(tmp_path):
    """PEFT's functions are the same for models without LoRA-GA."""
    trained().save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(tiny_model(), tmp_path)
    expected = logits(stock)
    for parameter in stock.parameters():
        if parameter.dim() == 2 and parameter.shape[0] == 8:
            parameter.data.zero_()
    assert not torch.equal(logits(stock), expected)
    hotswap_adapter(stock, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(logits(stock), expected)


def test_what_would_copy_half_of_the_adapter_is_refused():
    model = trained()
    copying = "of rank 4, but in memory a LoRA-GA adapter has rank 8, so it cannot be copied.*reload it"
    refused(model, lambda: reduce_intruder_dimension(model, logging_sink=None), copying)
    refused(model, lambda: model.add_adapter("second", model.peft_config["default"]), copying)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    assert list(model.peft_config) == ["default", "second"]


def test_a_copy_of_the_model_guards_itself():
    model = trained()
    other = copy.deepcopy(model)
    assert other.add_adapter.args == other.add_weighted_adapter.args == (other,)


def test_adapters_are_added_up_after_ours_was_deleted():
    model = trained()
    for name in ("a", "b"):
        model.add_adapter(name, lora_config())
    model.set_adapter("a")
    model.delete_adapter("default")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type="cat")
    assert model.peft_config["sum"].r == 2 * model.peft_config["a"].r
