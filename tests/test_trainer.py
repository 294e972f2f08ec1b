"""`LoRAGASFTTrainer`: one class swap, and nothing else is different."""

import copy
import logging
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import lora_config, tiny_model
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from lora_ga_trainer import LoRAGASFTTrainer

BOTH_FORMS = pytest.mark.parametrize("offset", [True, False], ids=["offset", "no offset"])
INPUTS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(4))


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS).logits


@pytest.fixture
def make_trainer(sft_config, prompt_completion, tokenizer):
    def make(cls=LoRAGASFTTrainer, model=None, peft_config=None, train_dataset=None, config=None, **kwargs):
        options = {
            name: kwargs.pop(name) for name in list(kwargs) if hasattr(SFTConfig, name) or name.startswith("ga_")
        }
        return cls(
            model=tiny_model() if model is None else model,
            args=config or sft_config(**options),
            train_dataset=prompt_completion if train_dataset is None else train_dataset,
            processing_class=tokenizer,
            peft_config=peft_config or lora_config(),
            **kwargs,
        )

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@BOTH_FORMS
def test_train_save_and_load_with_stock_peft(make_trainer, offset, tmp_path):
    trainer = make_trainer(max_steps=6, ga_offset=offset)
    untouched = tiny_model()
    before = {name: value.clone() for name, value in trainer.model.get_base_model().state_dict().items()}
    assert torch.equal(logits(trainer.model), logits(untouched))
    trainer.train()
    for name, value in trainer.model.get_base_model().state_dict().items():
        assert "lora_" in name or torch.equal(value, before[name]), "the base weights are never written"
    trained = logits(trainer.model)
    assert (trained - logits(untouched)).abs().max() > 0.01

    trainer.save_model()
    loaded = PeftModel.from_pretrained(copy.deepcopy(untouched), trainer.args.output_dir)
    assert (logits(loaded) - trained).abs().max() < 1e-5  # float32, see test_checkpoint
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(untouched))
    assert (logits(trainer.model.merge_and_unload()) - trained).abs().max() < 1e-5


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_checkpointing_changes_neither_factors_nor_losses(make_trainer, checkpointing):
    def run(**options):
        trainer = make_trainer(ga_sketch_size=10, **options)
        trainer.train()
        return losses(trainer), {n: p.detach() for n, p in trainer.model.named_parameters() if "frozen" in n}

    reference_losses, reference = run()
    found_losses, found = run(
        gradient_checkpointing=checkpointing is not None, gradient_checkpointing_kwargs=checkpointing
    )
    assert found_losses == pytest.approx(reference_losses, rel=1e-5)  # float32
    assert all(torch.allclose(found[name], reference[name], atol=1e-4) for name in reference)


class FirstBatch(TrainerCallback):
    """What a run sees when its first step begins."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 0:
            self.random = torch.get_rng_state()
            self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            self.optimized = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
            self.gradients = any(p.grad is not None for p in model.parameters())


def test_everything_else_is_as_in_a_plain_lora_run(make_trainer):
    """Invariant 7: random state, data order, number of trained parameters, first loss, token count."""
    seen, runs = {}, {}
    for cls in (SFTTrainer, LoRAGASFTTrainer):
        seen[cls] = FirstBatch()
        # a learning rate of 0: both stay at the base function, so equal losses mean equal batches in equal order
        runs[cls] = make_trainer(cls, callbacks=[seen[cls]], ga_scale="stable", learning_rate=0.0, max_steps=8)
        runs[cls].train()
    plain, ours = seen[SFTTrainer], seen[LoRAGASFTTrainer]
    assert torch.equal(plain.random, ours.random)
    assert (plain.trainable, plain.optimized) == (ours.trainable, ours.optimized)
    assert not ours.gradients
    assert losses(runs[SFTTrainer]) == losses(runs[LoRAGASFTTrainer])
    for name in ("num_tokens", "mean_token_accuracy", "entropy", "epoch"):
        plain_values, our_values = (
            [entry[name] for entry in run.state.log_history if "loss" in entry] for run in runs.values()
        )
        assert plain_values == our_values, name
    assert runs[SFTTrainer].model.training == runs[LoRAGASFTTrainer].model.training


def test_the_report_is_logged(make_trainer, caplog):
    with caplog.at_level(logging.INFO, logger="lora_ga_trainer"):
        trainer = make_trainer()
        assert trainer.lora_ga_report is None
        trainer.train()
    report = trainer.lora_ga_report
    (entry,) = (entry for entry in trainer.state.log_history if "ga/alignment_mean" in entry)
    assert entry["ga/alignment_mean"] == report.alignment_mean and entry["ga/alignment_min"] == report.alignment_min
    assert entry["ga/init_seconds"] == report.seconds and entry["ga/init_bytes"] == report.extra_peak_bytes
    assert entry is trainer.state.log_history[0] and "loss" in entry, "no entry of its own"
    assert report.alignment_min_layer in caplog.text and "MiB extra at the peak" in caplog.text
    assert len(report.alignment) == 14


def test_what_train_and_evaluate_return_is_what_trl_returns(make_trainer, prompt_completion):
    """By name: a search over hyperparameters adds up what `evaluate` returns, and `log` gets the same dictionary."""
    returned, logged = [], []
    for cls in (SFTTrainer, LoRAGASFTTrainer):
        trainer = make_trainer(cls, eval_dataset=prompt_completion, eval_on_start=True, max_steps=2)
        output = trainer.train()
        returned.append((output.metrics.keys(), trainer.evaluate().keys()))
        logged.append([{name for name in entry if not name.startswith("ga/")} for entry in trainer.state.log_history])
    assert returned[0] == returned[1] and logged[0] == logged[1]
    first = trainer.state.log_history[0]
    assert "eval_loss" in first and trainer.lora_ga_report.metrics().items() <= first.items()


def test_a_log_that_was_cut_off_before_its_first_entry_gets_it_on_resuming(make_trainer):
    options = {"logging_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(**options).train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    assert resumed.lora_ga_report.metrics().items() <= resumed.state.log_history[0].items()


class Beginning(TrainerCallback):
    """What a run is like when it begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.report = model.lora_ga.state.report
        self.factors = [p.clone() for name, p in model.named_parameters() if "frozen" in name]


def test_other_callbacks_see_the_run_as_it_starts(make_trainer):
    early = Beginning()
    trainer = make_trainer(callbacks=[early], ga_scale="stable", learning_rate=0.0, max_steps=1)
    trainer.train()
    assert early.report is trainer.lora_ga_report is not None
    assert early.factors and all(factor.any() for factor in early.factors)


def test_only_prompts_of_the_sample_are_masked_and_seeds_draw_it(make_trainer):
    trainer = make_trainer(ga_num_samples=8, ga_batch_size=3)
    batches = list(trainer.sample_batches(trainer.args.ga_seed))
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 2]
    for batch in batches:
        assert (batch["labels"][:, 0] == -100).all() and batch["labels"].ne(-100).any(dim=1).all()

    def rows(trainer):
        return [row for batch in trainer.sample_batches(trainer.args.ga_seed) for row in batch["input_ids"].tolist()]

    assert rows(trainer) == rows(make_trainer(ga_num_samples=8, ga_batch_size=3))
    assert rows(trainer) != rows(make_trainer(ga_num_samples=8, ga_batch_size=3, ga_seed=7))


@pytest.mark.parametrize(("training", "sizes"), [(4, [2, 2, 2, 2]), (3, [1] * 8), (1, [1] * 8)])
def test_batch_size_defaults_to_half_the_training_batch(make_trainer, training, sizes):
    trainer = make_trainer(per_device_train_batch_size=training)
    assert [len(batch["labels"]) for batch in trainer.sample_batches(42)] == sizes


def test_estimation_loss_is_the_training_loss(make_trainer):
    """Over all sampled examples it adds up to the token-weighted mean that training minimizes."""
    trainer = make_trainer(ga_num_samples=24, ga_batch_size=5)
    batches = list(trainer.sample_batches(trainer.args.ga_seed))
    num_items = sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches)
    with torch.no_grad():
        total = sum(trainer.estimation_loss(trainer.model, batch, num_items).item() for batch in batches)
        logs = []
        for batch in batches:
            out = tiny_model().eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            logs += torch.nn.functional.cross_entropy(
                out[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
            )[batch["labels"][:, 1:].flatten() != -100].tolist()
    assert total == pytest.approx(sum(logs) / len(logs), rel=1e-5)  # float32


def test_more_samples_than_examples_warns_and_uses_all(make_trainer, caplog):
    trainer = make_trainer(ga_num_samples=1000)
    with caplog.at_level(logging.WARNING):
        assert sum(len(batch["labels"]) for batch in trainer.sample_batches(trainer.args.ga_seed)) == 24
    assert "`ga_num_samples` is 1000, but the training set has only 24 examples" in caplog.text


def test_streaming_datasets(make_trainer, prompt_completion):
    trainer = make_trainer(train_dataset=prompt_completion.to_iterable_dataset(), max_steps=2)
    assert sum(len(batch["labels"]) for batch in trainer.sample_batches(trainer.args.ga_seed)) == 8
    trainer.train()
    assert trainer.lora_ga_report is not None and len(losses(trainer)) == 2


def test_no_peft_config_means_the_papers(make_trainer, sft_config, prompt_completion, tokenizer):
    trainer = LoRAGASFTTrainer(tiny_model(), sft_config(), None, prompt_completion, processing_class=tokenizer)
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (8, 16, True)
    assert len(trainer.model.lora_ga.weights) == 14
    assert "lm_head" not in "".join(trainer.model.lora_ga.weights)


def test_plain_sft_config_and_positional_arguments(prompt_completion, tokenizer, tmp_path):
    args = SFTConfig(str(tmp_path), seed=3, bf16=False, use_cpu=True, max_steps=1, report_to="none", save_strategy="no")
    trainer = LoRAGASFTTrainer(tiny_model(), args, None, prompt_completion, None, tokenizer, peft_config=lora_config())
    assert trainer.args.ga_num_samples == 64 and (trainer.args.max_steps, trainer.args.seed) == (1, 3)
    with pytest.raises(TypeError, match="no_such_argument"):
        LoRAGASFTTrainer(tiny_model(), args, train_dataset=prompt_completion, no_such_argument=1)


def test_a_model_path_and_a_peft_model(make_trainer, sft_config, prompt_completion, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    by_path = make_trainer(model=str(tmp_path / "base"))
    wrapped = get_peft_model(tiny_model(), lora_config())
    by_peft = LoRAGASFTTrainer(wrapped, sft_config(), train_dataset=prompt_completion, processing_class=tokenizer)
    for trainer in (by_path, by_peft):
        trainer.train()
    assert losses(by_path) == losses(by_peft)


def test_an_optimizer_made_before_the_trainer_trains_the_adapter(
    make_trainer, sft_config, prompt_completion, tokenizer
):
    wrapped = get_peft_model(tiny_model(), lora_config())
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    trainer = LoRAGASFTTrainer(
        wrapped, sft_config(), train_dataset=prompt_completion, processing_class=tokenizer, optimizers=(optimizer, None)
    )
    trainer.train()
    assert all(layer.B.trainable.any() for layer in trainer.model.lora_ga.weights.values())


def test_training_again_does_not_initialize_again(make_trainer):
    trainer = make_trainer()
    trainer.train()
    report, frozen = (
        trainer.lora_ga_report,
        {n: p.clone() for n, p in trainer.model.named_parameters() if "frozen" in n},
    )
    trainer.train()
    assert trainer.lora_ga_report is report
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)


@BOTH_FORMS
@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.2}, {"modules_to_save": ["norm"]}])
def test_resume_is_the_uninterrupted_run(make_trainer, lora, offset, tmp_path):
    """Invariant 5, by a new trainer on a new model: the same losses and the same weights, to the bit."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "peft_config": lora_config(**lora)}
    options["ga_offset"] = offset
    whole = make_trainer(**options)
    whole.train()

    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert losses(resumed) == losses(whole)
    assert sum("ga/alignment_mean" in entry for entry in resumed.state.log_history) == 1, "estimation was skipped"
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("length", "steps"), [({"max_steps": 2}, 2), ({"max_steps": -1, "num_train_epochs": 1}, 3)])
def test_a_finished_run_that_is_started_again_trains_nothing(make_trainer, length, steps, caplog):
    """As a cluster does with a job; 24 examples in batches of 8 are 3 steps, so that one run ends within an epoch."""
    options = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    whole = make_trainer(**options, **length)
    whole.train()
    expected = whole.model.state_dict()
    for _ in range(2):
        again = make_trainer(**options, **length)
        assert again.train(resume_from_checkpoint=True).global_step == steps
        assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())
        assert losses(again) == losses(whole)
        again.save_model()
    assert f"has finished: {steps} of {steps} steps" in caplog.text
    longer = make_trainer(**options, max_steps=4)
    assert longer.train(resume_from_checkpoint=True).global_step == 4
    shorter = make_trainer(**options, max_steps=1)
    assert shorter.train(resume_from_checkpoint=True).global_step == 4


def test_every_checkpoint_is_an_ordinary_adapter(make_trainer):
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    loaded = PeftModel.from_pretrained(tiny_model(), f"{trainer.args.output_dir}/checkpoint-4")
    assert (logits(loaded) - logits(trainer.model)).abs().max() < 1e-5  # float32, see test_checkpoint


@BOTH_FORMS
def test_load_best_model_at_end(make_trainer, prompt_completion, offset):
    trainer = make_trainer(
        ga_offset=offset,
        max_steps=6, learning_rate=1e-2, eval_dataset=prompt_completion, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, save_total_limit=3,
        metric_for_best_model="loss", greater_is_better=True,  # the highest loss: the first checkpoint, not the last
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = PeftModel.from_pretrained(tiny_model(), f"{trainer.args.output_dir}/checkpoint-2")
    last = PeftModel.from_pretrained(tiny_model(), f"{trainer.args.output_dir}/checkpoint-6")
    assert (logits(trainer.model) - logits(best)).abs().max() < 1e-5  # float32, see test_checkpoint
    assert (logits(last) - logits(best)).abs().max() > 0.01


def test_mixture_of_experts_with_its_auxiliary_loss(make_trainer):
    """TRL adds the router's auxiliary loss, a mean per batch: it too must not depend on how examples are batched."""

    def directions(batch_size):
        trainer = make_trainer(
            model=tiny_model("mixture"), ga_estimator="exact", ga_batch_size=batch_size, ga_num_samples=24,
            peft_config=lora_config(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), max_steps=1,
        )  # fmt: skip
        trainer.train()
        assert trainer.aux_loss_enabled
        return [p @ p.T for n, p in trainer.model.named_parameters() if "lora_B" in n and "frozen" in n]

    # The router's loss compares statistics of each batch, so 6 batches of 4 differ from one of 24 by the spread of these
    # statistics: 0.2 here, with a coefficient of 0.5. If every batch counted whole, the difference would be 1.0.
    for whole, parts in zip(directions(24), directions(4), strict=True):
        assert (whole - parts).norm() < 0.4 * whole.norm()


class DrawingCollator:
    """A collator that uses the global random state, as augmenting ones do."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, examples):
        torch.rand(1)
        return self.collate(examples)


def test_a_collator_that_draws_random_numbers_leaves_the_run_alone(make_trainer):
    states = []
    for cls in (SFTTrainer, LoRAGASFTTrainer):
        seen = FirstBatch()
        trainer = make_trainer(cls, callbacks=[seen], max_steps=1)
        trainer.data_collator = DrawingCollator(trainer.data_collator)
        trainer.train()
        states.append(seen.random)
    assert torch.equal(*states)


@pytest.mark.parametrize("alpha", [5, 5.0])
def test_neftune_adds_no_noise_to_the_estimate(make_trainer, alpha):
    def frozen(**options):
        trainer = make_trainer(max_steps=1, ga_estimator="exact", **options)
        trainer.train()
        return {n: p.detach() for n, p in trainer.model.named_parameters() if "frozen" in n}

    plain, noisy = frozen(), frozen(neftune_noise_alpha=alpha)
    assert all(torch.equal(plain[name], noisy[name]) for name in plain)


def test_a_new_trainer_on_an_initialized_model_is_refused(make_trainer, sft_config, prompt_completion, tokenizer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="initialized already by LoRA-GA.*save it and load it again"):
        LoRAGASFTTrainer(trainer.model, sft_config(), train_dataset=prompt_completion, processing_class=tokenizer)


def test_a_config_with_fields_of_its_own(prompt_completion, tokenizer, tmp_path):
    @dataclass
    class MyConfig(SFTConfig):
        my_flag: int = 1

    args = MyConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"MyConfig with the fields \['my_flag'\].*Derive .* from `LoRAGASFTConfig`"):
        LoRAGASFTTrainer(tiny_model(), args, train_dataset=prompt_completion, processing_class=tokenizer)


# --- misuse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora_config(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lora_config(use_dora=True), "use_dora=True"),
        (LoraConfig(target_modules=["nowhere"]), "nowhere"),
        (LoraConfig(target_modules=[]), "No `target_modules` passed"),
    ],
    ids=["pissa", "dora", "unknown target", "no target"],
)
def test_lora_configs_that_do_not_fit(make_trainer, config, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(peft_config=config)


def test_a_sketch_too_small_is_refused_at_construction(make_trainer):
    with pytest.raises(ValueError, match=r"`ga_sketch_size` is 7, but must be at least 2·r = 8"):
        make_trainer(ga_sketch_size=7)


def test_an_empty_dataset(make_trainer, prompt_completion):
    with pytest.raises(ValueError, match="training set has no example, so"):
        make_trainer(train_dataset=prompt_completion.select([]))


def test_prompts_longer_than_max_length(make_trainer, prompt_completion):
    # TRL before 1.9 cuts them in the collator, so that the estimation is the first to see it
    found = "no example with a completion token left .*`max_length`|All labels .*shorter than `max_length`"
    with pytest.raises(ValueError, match=found):
        make_trainer(train_dataset=prompt_completion, max_length=2).train()


def test_all_masked_examples(make_trainer):
    masked = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 8)
    trainer = make_trainer(train_dataset=masked, dataset_kwargs={"skip_prepare_dataset": True})
    with pytest.raises(ValueError, match="All labels of the 4 batches for LoRA-GA are −100"):
        trainer.train()


def test_nan_weights_stop_before_anything_is_written(make_trainer, tmp_path):
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = float("nan")
    trainer = make_trainer(model=model, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="loss of batch 0 for LoRA-GA is nan"):
        trainer.train()
    assert not any(tmp_path.rglob("*.safetensors"))
    assert not any(p.any() for n, p in trainer.model.named_parameters() if "frozen" in n)
    with pytest.raises(ValueError, match="has not been initialized"):
        trainer.save_model()


def test_resuming_what_is_not_ours(make_trainer, sft_config, prompt_completion, tokenizer):
    plain = make_trainer(SFTTrainer, max_steps=2, save_strategy="steps", save_steps=1)
    plain.train()
    trainer = make_trainer(max_steps=2)
    with pytest.raises(ValueError, match=r"checkpoint-1 has no readable lora_ga_files.json"):
        trainer.train(resume_from_checkpoint=f"{plain.args.output_dir}/checkpoint-1")
    trainer = make_trainer(max_steps=2)
    with pytest.raises(ValueError, match="nowhere"):
        trainer.train(resume_from_checkpoint=f"{plain.args.output_dir}/nowhere")
