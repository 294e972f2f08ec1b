"""A next stage of training on top of any adapter, which is kept exactly; the gradient is that where the stage starts."""

import copy
import math

import dense_reference
import pytest
import torch
from other_trainers import estimated_gradients, make_trainer, rows_of
from peft import PeftModel, get_peft_model
from test_other_trainers import assert_same_gradients, autograds
from tiny import (
    lora_config,
    moved_at_random,
    peft_pair,
    sft_arguments,
    tiny_batches,
    tiny_model,
    word_problems,
    word_tokenizer,
)
from transformers import AutoModelForCausalLM

from lora_ga_trainer import (
    LoRAGAArguments,
    LoRAGADPOConfig,
    LoRAGADPOTrainer,
    LoRAGASFTConfig,
    LoRAGASFTTrainer,
    initialize_lora_ga,
    restart_lora_ga,
)
from lora_ga_trainer.checkpoint.exporting import export
from lora_ga_trainer.checkpoint.state import read_state
from lora_ga_trainer.initialization import attach_lora_ga
from lora_ga_trainer.inspection.run_page import inspect

EXACT = LoRAGAArguments(ga_scale="stable", ga_estimator="exact")
# The adapter's own products are the same numbers, summed beside others: float32, logits of order 1.
SAME = 2e-6


def logits(model):
    with torch.no_grad():
        return model.eval()(**tiny_batches((4,), seed=9)[0]).logits


def train(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for step in range(steps):
        model.train()(**tiny_batches(seed=step)[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


STOCK = {
    "rsLoRA": {},
    "α/r, odd": {"r": 5, "lora_alpha": 12, "use_rslora": False},
    "patterns": {"rank_pattern": {"q_proj": 2, "0.mlp": 7}, "alpha_pattern": {"v_proj": 3}},
    "trained beside": {"modules_to_save": ["norm"], "bias": "lora_only"},
}


@pytest.mark.parametrize("initialization", ["gaussian", "eva"])
def test_an_adapter_that_started_otherwise_is_kept_too_once_it_is_trained(initialization, tmp_path):
    """And untrained it is refused, since LoRA-GA would be a second initialization."""
    stock, _ = peft_pair(init_lora_weights="gaussian")
    stock.peft_config["default"].init_lora_weights = initialization  # EVA's would need data
    with pytest.raises(ValueError, match="asks for another initialization"):
        initialize_lora_ga(copy.deepcopy(stock), tiny_batches(), EXACT, disable_tqdm=True)
    moved_at_random(stock)
    model = copy.deepcopy(stock)
    initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)
    assert (logits(model) - logits(stock)).abs().max() <= SAME
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert again.peft_config["default"].init_lora_weights is True
    assert (logits(again) - logits(stock)).abs().max() <= SAME


@pytest.mark.parametrize("lora", STOCK.values(), ids=STOCK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stock_adapter_is_kept_under_a_new_pair(lora, dtype, tmp_path):
    stock, base = peft_pair(dtype=dtype, **lora)
    moved_at_random(stock)
    model = copy.deepcopy(stock)
    tolerance = SAME if dtype == torch.float32 else 0.02  # one rounding of logits of order 1 to 8 bits is 0.008
    report = initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)
    assert (logits(model) - logits(stock)).abs().max() <= tolerance < 0.1 < (logits(stock) - logits(base)).abs().max()
    for name, weight in model.lora_ga.weights.items():
        layer = stock.get_submodule(name)
        old = layer.r["default"]
        assert weight.rank == (old + 1) // 2 and weight.scaling == layer.scaling["default"]
        assert torch.equal(weight.A.history, layer.lora_A["default"].weight)
        assert torch.equal(weight.B.history, layer.lora_B["default"].weight)
        assert weight.A.frozen.any() and len(report.singular_values[name]) == 2 * weight.rank
    train(model)
    moved = logits(model)
    assert (moved - logits(stock)).abs().max() > 0.05
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert (logits(again) - moved).abs().max() <= tolerance
    for name, weight in model.lora_ga.weights.items():
        layer = again.get_submodule(name)
        assert layer.r["default"] == stock.get_submodule(name).r["default"] + 2 * weight.rank
        assert layer.scaling["default"] == pytest.approx(weight.scaling, rel=1e-15)
    assert (logits(model.merge_and_unload()) - moved).abs().max() <= (SAME if dtype == torch.float32 else 0.1)


def test_the_gradient_is_that_at_the_adapters_function():
    """Of the merged model, by autograd; with the rank asked for."""
    stock, _ = peft_pair()
    moved_at_random(stock)
    merged = copy.deepcopy(stock).merge_and_unload().requires_grad_(True)
    options = LoRAGAArguments(ga_scale="stable", ga_estimator="exact", ga_stage_rank=3)
    initialize_lora_ga(stock, tiny_batches(), options, disable_tqdm=True)
    gradients = dense_reference.autograd_gradients(merged, stock.lora_ga.weights, tiny_batches())
    for name, weight in stock.lora_ga.weights.items():
        a_RI, b_OR = dense_reference.factors(gradients[name], 3, "ArB2r", weight.out_features**0.25 / 4)
        for found, expected in ((weight.A.frozen, a_RI), (weight.B.frozen.T, b_OR.T)):
            signs = torch.sign((found.double() * expected).sum(dim=1, keepdim=True))
            # as in test_restarts: float32 gradients of merged weights, amplified by the gaps between singular values
            torch.testing.assert_close(
                found.double() * signs, expected, rtol=0, atol=2e-3 * expected.abs().max().item()
            )


def test_the_experts_of_a_mixture(tmp_path):
    lora = {"target_modules": "all-linear", "r": 3}
    stock, base = peft_pair("mixture", **lora)
    moved_at_random(stock)
    model = copy.deepcopy(stock)
    initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)
    assert (logits(model) - logits(stock)).abs().max() < SAME
    train(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert (logits(again) - logits(model)).abs().max() < SAME
    same = copy.deepcopy(stock)
    attach_lora_ga(same, EXACT)
    same.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(same), logits(model))


def test_restarts_and_further_stages_on_top(tmp_path):
    """The rank grows by 2·r each time, whatever each stage's r, and every sum is the same function."""
    stock, base = peft_pair(r=4)
    moved_at_random(stock)
    options = LoRAGAArguments(ga_scale="stable", ga_stage_rank=2)
    initialize_lora_ga(stock, tiny_batches(), options, disable_tqdm=True)
    optimizer = train(stock)
    before = logits(stock)
    restart_lora_ga(stock, tiny_batches(), options, optimizer, disable_tqdm=True)
    assert (logits(stock) - before).abs().max() < SAME
    train(stock)
    stock.save_pretrained(tmp_path / "two")
    assert PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "two").peft_config["default"].r == 4 + 2 * 2 * 2
    third = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "two", is_trainable=True)
    assert torch.equal(logits(third), logits(stock))
    initialize_lora_ga(third, tiny_batches(), LoRAGAArguments(ga_scale="stable", ga_stage_rank=1), disable_tqdm=True)
    assert (logits(third) - logits(stock)).abs().max() < SAME
    train(third)
    third.save_pretrained(tmp_path / "three")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "three")
    assert again.peft_config["default"].r == 12 + 2 and (logits(again) - logits(third)).abs().max() < SAME
    # compressed to the rank of the first adapter, it is nearer to what was trained than that is
    export(tmp_path / "three", tmp_path / "small", rank=6)
    small = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small")
    assert (logits(small) - logits(third)).norm() < (before - logits(third)).norm()


def test_what_is_refused(tmp_path):
    stock, _ = peft_pair()
    moved_at_random(stock)
    with pytest.raises(ValueError, match=r"`ga_offset` is False, but the adapter has been trained \(B of "):
        attach_lora_ga(stock, LoRAGAArguments(ga_offset=False))
    with pytest.raises(ValueError, match="`ga_sketch_size` is 7, but must be at least 2·r = 8"):
        attach_lora_ga(stock, LoRAGAArguments(ga_sketch_size=7, ga_stage_rank=4))
    assert not hasattr(stock, "lora_ga") and stock.peft_config["default"].r == 4, "changed in spite of the error"
    with pytest.raises(ValueError, match="`ga_stage_rank` is 0, but must be a whole number of at least 1"):
        LoRAGAArguments(ga_stage_rank=0)
    with pytest.raises(ValueError, match="`ga_stage_rank` is 2, but the adapter 'default' is new"):
        attach_lora_ga(peft_pair()[0], LoRAGAArguments(ga_stage_rank=2))
    initialize_lora_ga(stock, tiny_batches(), EXACT, disable_tqdm=True)
    stock.save_pretrained(tmp_path)
    fresh, _ = peft_pair(r=2)
    attach_lora_ga(fresh, EXACT)
    with pytest.raises(
        ValueError, match="This run started from a fresh adapter, but that of .* continues a trained adapter of rank 4"
    ):
        fresh.load_adapter(tmp_path, "default", is_trainable=True)


# --- trainers ---------------------------------------------------------------------------------------------------------


def sft(out, model, **options):
    options = {"learning_rate": 1e-2} | options
    return LoRAGASFTTrainer(
        model,
        LoRAGASFTConfig(**sft_arguments(out, **options)),
        train_dataset=word_problems(),
        processing_class=word_tokenizer(),
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(folder of a base, folder of an adapter that a first SFT trained)."""
    folder = tmp_path_factory.mktemp("first")
    tiny_model().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")  # whose name the adapter's files get
    trainer = sft(folder / "one", get_peft_model(base, lora_config(r=2)))
    trainer.train()
    trainer.save_model()
    return folder / "base", folder / "one"


def loaded(first):
    base, adapter = first
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)


def test_a_second_sft_resumes_exactly(first, tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 2}
    with caplog.at_level("INFO"):
        whole = sft(tmp_path / "run", loaded(first), **saving)
    assert "the adapter 'default' of rank 4 is kept as it is, and a pair of rank 2 trains beside it" in caplog.text
    assert torch.equal(logits(whole.model), logits(loaded(first)))
    whole.train()
    whole.save_model()
    resumed = sft(tmp_path / "run", loaded(first), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert torch.equal(logits(resumed.model), logits(whole.model))
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(first[0]), tmp_path / "run")
    assert (logits(stock) - logits(whole.model)).abs().max() < SAME and stock.peft_config["default"].r == 8
    state = read_state(tmp_path / "run")
    assert set(state.earlier_ranks.values()) == {4} and state.lora["r"] == 2
    assert "| rank of the file | 8, 4 of them of an earlier stage |" in (tmp_path / "run/README.md").read_text()
    assert "4 of them of an earlier stage" in inspect(tmp_path / "run", tmp_path / "page").read_text()


def test_an_adapter_that_transformers_loaded(first, tmp_path):
    base, adapter = first
    model = AutoModelForCausalLM.from_pretrained(adapter)
    assert model._hf_peft_config_loaded
    trainer = sft(tmp_path / "run", model)
    assert (logits(trainer.model) - logits(loaded(first))).abs().max() < SAME
    trainer.train()
    trainer.save_model()
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run")
    assert (logits(stock) - logits(trainer.model)).abs().max() < SAME


def test_several_adapters_that_transformers_loaded(first, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(first[1])
    model.add_adapter(lora_config(), adapter_name="second")
    with pytest.raises(ValueError, match=r"the adapters \['default', 'second'\] into the model, but a stage starts"):
        sft(tmp_path / "run", model)


def dpo(out, model, ref_model=None, **options):
    arguments = sft_arguments(out, **{"learning_rate": 1e-2, "ga_estimator": "exact", "ga_num_samples": 7} | options)
    return LoRAGADPOTrainer(
        model, ref_model, LoRAGADPOConfig(**arguments), train_dataset=rows_of("dpo"), processing_class=word_tokenizer()
    )


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}], ids=str)
def test_dpos_reference_is_the_start_of_the_stage(first, tmp_path, options):
    """Estimated there, with the policy; and no other function after the policy has left it."""
    trainer = dpo(tmp_path / "run", loaded(first), **options)
    start = loaded(first)
    flags = {name: parameter.requires_grad for name, parameter in trainer.model.named_parameters()}
    merged = copy.deepcopy(start).merge_and_unload()
    reference = autograds("dpo", copy.deepcopy(merged).eval().requires_grad_(True), merged.eval(), trainer)
    # a merged model rounds its weights: float32, 10 times the tolerance of test_other_trainers
    assert_same_gradients(estimated_gradients(trainer), reference, tolerance=2e-4)
    assert {name: parameter.requires_grad for name, parameter in trainer.model.named_parameters()} == flags
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(losses[-1] - losses[0]) > 1e-3, "the policy has not left the reference"
    if not options:
        trainer.model.set_adapter("ref")
        assert (logits(trainer.model) - logits(start)).abs().max() < SAME
        trainer.model.set_adapter("default")
    trainer.save_model()
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(first[0]), tmp_path / "run")
    assert (logits(stock) - logits(trainer.model)).abs().max() < SAME


def test_dpos_reference_may_be_the_bare_base(first, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(first[0])
    trainer = dpo(tmp_path / "run", loaded(first), base)
    assert list(trainer.model.peft_config) == ["default"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert abs(losses[0] - math.log(2)) > 1e-3, "the policy is where the first stage ended, the reference is not"


def test_a_resumed_dpo_is_the_uninterrupted_one(first, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = dpo(tmp_path / "run", loaded(first), **saving)
    whole.train()
    resumed = dpo(tmp_path / "run", loaded(first), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_new_adapter_still_has_no_second_one_as_reference(tmp_path):
    assert list(make_trainer("dpo", tmp_path).model.peft_config) == ["default"]
