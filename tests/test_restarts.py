"""`ga_restart_steps`: the function goes on, the base stays unwritten, the gradient is that of the moment, resuming is exact."""

import copy
import json
from pathlib import Path

import dense_reference
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from tiny import lora_config, peft_pair, tiny_batches, tiny_model
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, get_scheduler

from lora_ga_trainer import LoRAGAArguments, LoRAGASFTTrainer, initialize_lora_ga, restart_lora_ga
from lora_ga_trainer.adapter import weight as weight_module
from lora_ga_trainer.distributed import backends
from lora_ga_trainer.distributed.launches import Launch, check_restart
from lora_ga_trainer.gradient.objective import language_model_loss
from lora_ga_trainer.initialization import attach_lora_ga
from lora_ga_trainer.trainers.restarts import check_schedule, restart_is_due, rewarm, rewarmed

EXACT = LoRAGAArguments(ga_scale="stable", ga_estimator="exact")
INPUTS = tiny_batches(seed=9)[0]["input_ids"]


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS).logits


def trained(family="llama", **lora):
    """(model, its base, batches, optimizer) after a LoRA-GA start and three steps."""
    model, base = peft_pair(family, **lora)
    batches = tiny_batches()
    initialize_lora_ga(model, batches, EXACT, disable_tqdm=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, batches, optimizer)
    return model, base, batches, optimizer


def train(model, batches, optimizer, steps=3):
    for step in range(steps):
        language_model_loss(model, batches[step % len(batches)], 20).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_restart_changes_no_function_and_writes_no_base(family):
    model, base, batches, optimizer = trained(family)
    before, weights = logits(model), copy.deepcopy(model.get_base_model().state_dict())
    for _ in range(2):
        restart_lora_ga(model, batches, EXACT, optimizer, disable_tqdm=True)
        # the same products, summed with zeros between them: float32 rounding of logits of order 1
        torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-6)
    for name, value in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, weights[name])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    # what `attach_delta_form` does not train is not trained after it either
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"trainable"}
    train(model, batches, optimizer)
    assert not torch.equal(logits(model), before)


def test_the_factors_come_from_the_gradient_at_the_current_function():
    model, _, batches, optimizer = trained()
    merged = copy.deepcopy(model).merge_and_unload().eval()
    merged.requires_grad_(True)
    gradients = dense_reference.autograd_gradients(merged, model.lora_ga.weights, batches)

    base_factors = {name: layer.A.frozen.clone() for name, layer in model.lora_ga.weights.items()}
    report = restart_lora_ga(model, batches, EXACT, optimizer, disable_tqdm=True)
    assert model.lora_ga.state.restarts == [report] and model.lora_ga.state.report != report
    for name, layer in model.lora_ga.weights.items():
        c = dense_reference.scale(
            "stable", out_features=layer.out_features, rank=4, scaling=8, gamma=16, weight_OI=None
        )
        a_RI, b_OR = dense_reference.factors(gradients[name], 4, "ArB2r", c)
        for found, expected in ((layer.A.frozen, a_RI), (layer.B.frozen.T, b_OR.T)):
            signs = torch.sign((found.double() * expected).sum(dim=1, keepdim=True))
            # float32 gradients of merged weights: the tolerance of test_initialization for singular vectors, whose gaps
            # amplify rounding; a wrong gradient gives errors of order 1
            torch.testing.assert_close(
                found.double() * signs, expected, rtol=0, atol=2e-3 * expected.abs().max().item()
            )
        assert not torch.allclose(layer.A.frozen, base_factors[name], atol=1e-3)


def test_the_optimizer_forgets_the_adapter_and_nothing_else():
    model, _, batches, optimizer = trained(modules_to_save=["lm_head"])
    head = next(p for name, p in model.named_parameters() if "modules_to_save" in name)
    momentum = optimizer.state[head]["exp_avg"].clone()
    restart_lora_ga(model, batches, EXACT, optimizer, disable_tqdm=True)
    assert list(optimizer.state) == [head] and torch.equal(optimizer.state[head]["exp_avg"], momentum)
    train(model, batches, optimizer, steps=1)
    assert {int(state["step"]) for parameter, state in optimizer.state.items() if parameter is not head} == {1}


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": False, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}}]
)
def test_files_are_ordinary_adapters_of_the_grown_rank(lora, tmp_path):
    model, base, batches, optimizer = trained(**lora)
    restart_lora_ga(model, batches, EXACT, optimizer, disable_tqdm=True)
    train(model, batches, optimizer)
    restart_lora_ga(model, batches, EXACT, optimizer, disable_tqdm=True)
    train(model, batches, optimizer)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4 * 2 * 3
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    # s is α·√6/√(6r) instead of α/√r (or without roots): one rounding of the scaling, logits of order 1
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=2e-6)
    torch.testing.assert_close(logits(stock.merge_and_unload()), logits(model), rtol=0, atol=2e-5)

    again, _ = peft_pair(**lora)
    initialize_lora_ga(again, batches, EXACT, disable_tqdm=True)
    again.load_adapter(tmp_path, "default")
    assert torch.equal(logits(again), logits(model))
    assert again.lora_ga.state.restarts == model.lora_ga.state.restarts


def test_a_restart_that_fails_changes_nothing():
    model, _, batches, optimizer = trained()
    before, state = logits(model), copy.deepcopy(model.state_dict())
    steps = {id(p): int(s["step"]) for p, s in optimizer.state.items()}
    broken = [{**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}]
    with pytest.raises(ValueError, match="All labels of the 1 batches"):
        restart_lora_ga(model, broken, EXACT, optimizer, disable_tqdm=True)
    with pytest.raises(ValueError, match="loss.*nan"):
        restart_lora_ga(
            model, batches, EXACT, optimizer, lambda *args: language_model_loss(*args) * float("nan"), disable_tqdm=True
        )
    assert torch.equal(logits(model), before) and model.lora_ga.state.restarts == []
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert steps == {id(p): int(s["step"]) for p, s in optimizer.state.items()}


def test_no_adapter_and_no_options_to_restart():
    model, _ = peft_pair()
    with pytest.raises(ValueError, match="The model has no LoRA-GA adapter, so there is nothing to restart"):
        restart_lora_ga(model, tiny_batches(), EXACT, None)
    with pytest.raises(ValueError, match="`config` is a NoneType, but must hold the `ga_\\*` options"):
        restart_lora_ga(model, tiny_batches(), None, None)


def test_nothing_to_restart():
    model, _ = peft_pair()
    initialize_lora_ga(model, tiny_batches(), EXACT, disable_tqdm=True)
    model.lora_ga.state.report = None
    with pytest.raises(ValueError, match="not been initialized by LoRA-GA yet, so there is nothing to restart"):
        restart_lora_ga(model, tiny_batches(), EXACT, torch.optim.SGD(model.parameters(), lr=1.0))


@pytest.mark.parametrize("attached", [True, False])
def test_a_restart_needs_the_offset(attached):
    model, _ = peft_pair()
    initialize_lora_ga(
        model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3, ga_offset=attached), disable_tqdm=True
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"`ga_offset` is {not attached}, was {attached} when.*or do not restart"):
        restart_lora_ga(
            model,
            tiny_batches(),
            LoRAGAArguments(ga_learning_rate=1e-3, ga_offset=not attached),
            torch.optim.SGD(model.parameters(), lr=1.0),
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- in the trainer -------------------------------------------------------------------------------------------------

RESTARTS = {"ga_restart_steps": 3, "ga_restart_warmup_steps": 2, "max_steps": 8, "ga_estimator": "exact"}


@pytest.fixture
def run(sft_config, tokenizer, prompt_completion, one_thread):
    def run(resume=None, **overrides):
        trainer = LoRAGASFTTrainer(
            model=tiny_model(),
            args=sft_config(**RESTARTS | overrides),
            train_dataset=prompt_completion,
            processing_class=tokenizer,
            peft_config=lora_config(),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_training_with_restarts_resumes_exactly(run, tmp_path, base_model):
    whole = run(save_strategy="steps", save_steps=1, gradient_accumulation_steps=2)
    assert len(whole.model.lora_ga.state.restarts) == 2 and len(history(whole, "ga/alignment_mean")) == 3
    state = whole.model.state_dict()
    # before the first restart, at the checkpoint from which it starts, after it, and at the second
    for step in (2, 3, 4, 6):
        resumed = run(str(tmp_path / f"run/checkpoint-{step}"), gradient_accumulation_steps=2)
        assert history(resumed, "loss") == history(whole, "loss")
        assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())
        assert torch.equal(logits(resumed.model), logits(whole.model))
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), tmp_path / "run/checkpoint-8")
    torch.testing.assert_close(logits(stock), logits(whole.model), rtol=0, atol=2e-6)  # as above
    assert stock.peft_config["default"].r == 4 * 2 * 3


def test_the_learning_rate_climbs_again_to_its_schedule(run):
    plain = history(run(ga_restart_steps=None), "learning_rate")
    rates = history(run(), "learning_rate")
    ratios = [rate / reference for rate, reference in zip(rates, plain, strict=True)]
    assert ratios == pytest.approx([1, 1, 1, 1 / 3, 2 / 3, 1, 1 / 3, 2 / 3])


def test_restarts_draw_other_examples_and_keep_the_order_of_the_data(run):
    seen, losses = [], {}
    for steps in (None, 4):
        trainer = run(ga_restart_steps=steps, max_steps=5, ga_num_samples=4)
        losses[steps] = history(trainer, "loss")
    assert losses[None][:4] == losses[4][:4]
    # the fifth step sees the same examples from the same function, through a history that is summed apart
    assert losses[4][4] == pytest.approx(losses[None][4], rel=1e-5)
    for seed in (42, 43):
        seen.append([batch["input_ids"].tolist() for batch in trainer.sample_batches(seed)])
    assert seen[0] != seen[1]


@pytest.mark.parametrize("adapter_name", ["default", "mine"])
def test_the_best_checkpoint_may_have_fewer_restarts(
    adapter_name, sft_config, tokenizer, prompt_completion, base_model, tmp_path
):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_model), lora_config(), adapter_name=adapter_name)
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "greater_is_better": True}  # the largest loss: that of the first checkpoint
    trainer = LoRAGASFTTrainer(
        model,
        sft_config(**RESTARTS | options | best),
        train_dataset=prompt_completion,
        eval_dataset=prompt_completion.select(range(4)),
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(history(trainer, "ga/alignment_mean")) == 3
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2") and trainer.model.lora_ga.state.restarts == []
    for layer in trainer.model.lora_ga.weights.values():
        assert layer.A.history is None
    folder = tmp_path / "run/checkpoint-2" / ("" if adapter_name == "default" else adapter_name)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), folder)
    torch.testing.assert_close(logits(stock), logits(trainer.model), rtol=0, atol=2e-6)  # as above
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_the_best_checkpoint_of_an_adapter_beside_another(
    sft_config, tokenizer, prompt_completion, base_model, tmp_path
):
    """ "default", whose file lies where Trainer looks first, is a plain one."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_model), lora_config())
    model.add_adapter("mine", lora_config())
    model.set_adapter("mine")
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    best = {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "eval_loss"}
    trainer = LoRAGASFTTrainer(
        model, sft_config(**options | best), train_dataset=prompt_completion,
        eval_dataset=prompt_completion.select(range(4)), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)  # as above


def test_the_learning_rate_is_back_before_the_next_restart():
    config = LoRAGAArguments(ga_learning_rate=1e-3, ga_restart_steps=4, ga_restart_warmup_steps=10)
    found = [rewarmed(step, lambda step: 1.0, config) for step in range(9)]
    assert found == [1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 0.25]


def test_ddp_leaves_out_what_restarts_have_frozen(one_process_group):
    """It sends all other buffers before every forward; these are an adapter's size, and the same everywhere."""
    model, _, batches, optimizer = trained()
    restart_lora_ga(model, batches, EXACT, optimizer, disable_tqdm=True)
    sent = DistributedDataParallel(model)
    sent._assign_modules_buffers()  # which DDP does before it sends them
    assert {name for name, _ in model.named_buffers() if name.endswith(".history")}
    assert not any(name.endswith(".history") for name in sent.named_module_buffers)


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_second_call_of_train_restarts_as_the_first_did(run):
    trainer = run()
    first = history(trainer, "learning_rate")
    trainer.train()
    assert len(trainer.model.lora_ga.state.restarts) == 4 and history(trainer, "learning_rate") == first


def test_when_a_restart_is_due():
    config = LoRAGAArguments(ga_learning_rate=1e-3, ga_restart_steps=3)
    made, at = 0, []
    for step in range(10):
        if restart_is_due(config, step, made):
            made += 1
            at.append(step)
    assert at == [3, 6, 9]
    assert not restart_is_due(config, 3, 1), "made before the checkpoint"
    assert not any(restart_is_due(LoRAGAArguments(ga_learning_rate=1e-3), step, 0) for step in range(10))


def test_a_schedule_that_looks_at_the_loss_is_refused():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match="ReduceLROnPlateau does not allow. Use an `lr_scheduler_type` that depends"):
        rewarm(
            get_scheduler("reduce_lr_on_plateau", optimizer), LoRAGAArguments(ga_learning_rate=1e-3, ga_restart_steps=3)
        )


def test_a_schedule_that_is_not_the_trainers_is_refused(sft_config, tokenizer, prompt_completion):
    model, _ = peft_pair()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    mine = (optimizer, get_scheduler("constant", optimizer))
    with pytest.raises(ValueError, match="schedule comes from `optimizers`.* or set `ga_restart_warmup_steps=0`"):
        LoRAGASFTTrainer(
            model, sft_config(**RESTARTS), train_dataset=prompt_completion, processing_class=tokenizer, optimizers=mine
        )
    check_schedule(
        LoRAGAArguments(ga_learning_rate=1e-3, ga_restart_steps=3, ga_restart_warmup_steps=0),
        mine[1],
        launch_has_one=True,
    )
    with pytest.raises(ValueError, match="comes from DeepSpeed's configuration"):
        check_schedule(LoRAGAArguments(ga_learning_rate=1e-3, ga_restart_steps=3), None, launch_has_one=True)


def test_what_zero_cannot_reset_is_refused():
    check_restart(Launch("ZeRO-3", 2), [])
    check_restart(Launch("FSDP2", 2), ["lm_head.weight"])
    with pytest.raises(ValueError, match="ZeRO-2 does not keep it separate from that of lm_head.weight"):
        check_restart(Launch("ZeRO-2", 2), ["lm_head.weight"])
    with pytest.raises(ValueError, match="stage 0"):
        check_restart(Launch("ZeRO-0", 2), [])


def test_another_number_of_steps_between_restarts_is_another_run(run, tmp_path):
    run(save_strategy="steps", save_steps=2, max_steps=4)
    with pytest.raises(ValueError, match="`ga_restart_steps` is 4, but the checkpoint .* was made with 3"):
        run(str(Path(tmp_path, "run/checkpoint-2")), ga_restart_steps=4)


def test_restarts_with_offloaded_parameters(one_process_group, monkeypatch):
    """FSDP2's `fsdp_offload_params` keeps parameters on the host; the history is where the forward pass uses it. The device
    without memory stands in for the accelerator; nothing can be written from there, so what is written is not looked at."""
    model = get_peft_model(tiny_model(), lora_config())
    adapter = attach_lora_ga(model, LoRAGAArguments(ga_learning_rate=1e-3))
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    accelerator = torch.device("meta")
    for module in (backends, weight_module):
        monkeypatch.setattr(module, "compute_device", lambda parameter: accelerator)
    monkeypatch.setattr(weight_module, "write_parameter", lambda parameter, value: None)
    weight = next(iter(adapter.weights.values()))
    half, R = weight.A, weight.rank
    assert isinstance(half.trainable, DTensor) and half.trainable.device.type == "cpu"
    for restart in (1, 2, 3):
        weight.freeze_trained()
        assert half.history.device == accelerator
        assert half.history.shape == (2 * R * restart, weight.in_features)
