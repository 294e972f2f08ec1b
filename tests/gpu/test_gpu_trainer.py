"""The trainer on a GPU: precisions, packing, checkpoints that resume to the bit, files for stock PEFT."""

import pytest
import torch
from backend_worker import factor_error
from gpu_results import FACTOR_TOLERANCE, LOSS_TOLERANCE, adapter_of, losses
from peft import PeftModel
from tiny import tiny_batches
from transformers import AutoModelForCausalLM, TrainerCallback

INPUTS = tiny_batches(seed=9)[0]["input_ids"]


class AtStart(TrainerCallback):
    """The logits and the adapter when the first step begins."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            was_training = model.training
            with torch.no_grad():
                self.logits = model.eval()(INPUTS.to(args.device)).logits
            model.train(was_training)
            self.adapter = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if "lora_" in name}


OPTIONS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "packing": {"packing": True, "max_length": 12, "per_device_train_batch_size": 2},
    "padding-free": {"padding_free": True, "max_length": None},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_factors_and_losses_are_those_of_the_cpu(device, make_trainer, name):
    found = {}
    for place in ("cpu", device):
        at_start = AtStart()
        trainer = make_trainer(place, callbacks=[at_start], ga_num_samples=1000, **OPTIONS[name])
        trainer.train()
        assert {p.device.type for p in trainer.model.parameters()} == {torch.device(place).type}
        found[str(place)] = at_start.adapter, losses(trainer)
    (adapter, ours), (reference, theirs) = found[str(device)], found["cpu"]
    assert factor_error(adapter, reference) < FACTOR_TOLERANCE
    assert ours == pytest.approx(theirs, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_under_the_trainers_autocast(device, make_trainer, base_model, precision):
    """fp16 with its gradient scaler, which the estimation leaves alone. (accelerate ignores `fp16` on a CPU.)"""
    at_start = AtStart()
    trainer = make_trainer(device, callbacks=[at_start], max_steps=6, learning_rate=1e-2, **{precision: True})
    trainer.train()
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval().to(device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    autocast = precision == "bf16" or device.type == "cuda"
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=autocast):
        assert torch.equal(at_start.logits.float(), base(INPUTS.to(device)).logits.float())
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.lora_ga_report.alignment_min > 0


@pytest.fixture
def deterministic():
    """Kernels that sum in a fixed order, where they have one."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "options", [{}, {"ga_restart_steps": 2, "ga_restart_warmup_steps": 1}, {"bf16": True}], ids=str
)
def test_resuming_is_the_uninterrupted_run_to_the_bit(device, make_trainer, deterministic, options):
    """With dropout, so that the GPU's random state counts; eager attention, whose kernels have a fixed order."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6} | options
    arguments = {"lora": {"lora_dropout": 0.3}, "attention": "eager"} | options
    whole = make_trainer(device, **arguments)
    whole.train()
    resumed = make_trainer(device, **arguments)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert losses(resumed) == losses(whole)
    ours, theirs = adapter_of(resumed), adapter_of(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("options", [{}, {"ga_restart_steps": 2}, {"ga_offset": False}], ids=str)
def test_the_saved_adapter_under_stock_peft(device, make_trainer, base_model, options, tmp_path):
    trainer = make_trainer(device, **options)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval().to(device)
    inputs = INPUTS.to(device)
    with torch.no_grad():
        untouched, trained = base(inputs).logits, trainer.model.eval()(inputs).logits
        with trainer.model.disable_adapter():
            assert torch.equal(trainer.model(inputs).logits, untouched)
        loaded = PeftModel.from_pretrained(base, tmp_path / "final").eval()(inputs).logits
        merged = trainer.model.merge_and_unload()(inputs).logits
    assert (trained - untouched).abs().max() > 0.01
    # float32, logits of order 1: PEFT multiplies by α·√2/√(2r), the trainer by α/√r; merging adds to the weights
    assert (loaded - trained).abs().max() < 1e-4
    assert (merged - trained).abs().max() < 1e-4
