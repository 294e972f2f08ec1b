"""`LoRAGAMixin` over `Trainer`, `LoRAGARewardTrainer`, `LoRAGADPOTrainer`: `LoRAGASFTTrainer`'s invariants hold there too."""

import inspect
import warnings
from typing import ClassVar

import dense_reference
import pytest
import torch
from datasets import Dataset
from launching import torchrun
from other_trainers import (
    CLASSES,
    KINDS,
    PAIRS,
    STOCK,
    ClassifierTrainer,
    adapter_of,
    base_of,
    estimated_gradients,
    example_losses,
    make_trainer,
    rows_of,
)
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tiny import (
    CONFIGS,
    lora_config,
    peft_pair,
    seq2seq_problems,
    sft_arguments,
    tiny_batches,
    tiny_model,
    tiny_t5,
    word_problems,
    word_tokenizer,
)
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForMultipleChoice,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    WhisperConfig,
    WhisperForAudioClassification,
)
from trl import DPOTrainer, RewardTrainer, SFTTrainer

from lora_ga_trainer import (
    LoRAGAArguments,
    LoRAGADPOConfig,
    LoRAGADPOTrainer,
    LoRAGAMixin,
    LoRAGARewardTrainer,
    LoRAGASeq2SeqConfig,
    LoRAGASeq2SeqTrainer,
    LoRAGASFTConfig,
    LoRAGASFTTrainer,
    LoRAGATrainingArguments,
    initialize_lora_ga,
)
from lora_ga_trainer.adapter import targets
from lora_ga_trainer.adapter.targets import lora_layers
from lora_ga_trainer.gradient.objective import items_in
from lora_ga_trainer.initialization import attach_lora_ga

INPUTS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(4))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(tmp_path):
    def make(kind, **options):
        return make_trainer(kind, tmp_path / "run", **options)

    return make


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS).logits


def entries(trainer):
    """What was logged at each step, but for times."""
    return [
        {name: value for name, value in entry.items() if name != "grad_norm" and not name.startswith("ga/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def autograds(kind, policy, reference, trainer):
    """The gradient of the mean over the sampled examples, by autograd on the weights of `policy`."""
    losses = [
        loss
        for batch in trainer.sample_batches(trainer.args.ga_seed)
        for loss in example_losses(kind, policy, reference, batch)
    ]
    assert len(losses) == trainer.args.ga_num_samples
    names = trainer.model.lora_ga.weights
    weights = {name: (policy.get_submodule(name.removeprefix("base_model.model.")).weight, False) for name in names}
    return dense_reference.weight_gradient(weights, [loss / len(losses) for loss in losses])


def assert_same_gradients(found, reference, tolerance=2e-5):
    """Float32 through two layers, with and without padding: relative to each layer's norm."""
    assert found.keys() == reference.keys() and found
    for name, gradient in reference.items():
        assert (found[name] - gradient).norm() < tolerance * gradient.norm(), name


def everything_a_probe_may_touch(model):
    return (
        {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: layer.disable_adapters for name, layer in lora_layers(model, "default").items()},
        torch.get_rng_state().tolist(),
    )


VARIANTS = {
    **{kind: (kind, {}) for kind in KINDS},
    "reward, checkpointing": ("reward", {"gradient_checkpointing": True}),
    "dpo, checkpointing": ("dpo", {"gradient_checkpointing": True}),
    "dpo, reentrant": (
        "dpo",
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "dpo, precomputed": ("dpo", {"precompute_ref_log_probs": True}),
    "dpo, accumulation": ("dpo", {"gradient_accumulation_steps": 4}),
    "dpo, modules": ("dpo", {"lora": adapter_of("dpo", modules_to_save=["norm"])}),
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("kind", "options"), VARIANTS.values(), ids=VARIANTS)
def test_the_gradient_is_autograds(make, kind, options, size):
    """Of the mean loss over 7 examples, however they are batched; and the probe leaves no trace."""
    trainer = make(kind, ga_num_samples=7, ga_batch_size=size, **options)
    before = everything_a_probe_may_touch(trainer.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The model contains some adapter layers that are enabled")
        found = estimated_gradients(trainer)
    assert everything_a_probe_may_touch(trainer.model) == before
    assert_same_gradients(found, autograds(kind, base_of(kind).eval(), base_of(kind).eval(), trainer))


@pytest.mark.parametrize("variant", [*KINDS, "dpo, modules"])
def test_a_restart_takes_the_gradient_where_training_has_come(make, variant, tmp_path):
    """DPO's reference stays the base model, while its policy has left it."""
    kind, options = VARIANTS[variant]
    trainer = make(kind, learning_rate=1e-2, ga_num_samples=7, ga_batch_size=3, **options)
    trainer.train()
    trainer.save_model()
    policy = PeftModel.from_pretrained(base_of(kind), tmp_path / "run").merge_and_unload().eval().requires_grad_(True)
    before = everything_a_probe_may_touch(trainer.model)
    found = estimated_gradients(trainer)
    assert everything_a_probe_may_touch(trainer.model) == before
    # the policy has one rounding more, that of merging
    assert_same_gradients(found, autograds(kind, policy, base_of(kind).eval(), trainer), 1e-4)
    at_start = autograds(kind, base_of(kind).eval(), base_of(kind).eval(), trainer)
    assert all((found[name] - at_start[name]).norm() > 0.01 * at_start[name].norm() for name in found)


def test_two_processes_with_batches_of_different_sizes(make, tmp_path):
    (tmp_path / "out").mkdir()
    first, second = torchrun("other_trainers.py", tmp_path / "out")
    for kind in PAIRS:
        alone = estimated_gradients(make(kind, ga_num_samples=5))
        assert_same_gradients(first[kind], alone)
        assert all(torch.equal(value, second[kind][name]) for name, value in first[kind].items())


class FirstStep(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.seen = everything_a_probe_may_touch(model)[-1]
            self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            self.gradients = any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_everything_else_is_as_in_a_plain_run(make, kind):
    """Random state, data order, number of trained parameters, all metrics. A learning rate of 0 keeps both at the base."""
    runs, first = [], []
    for stock in (True, False):
        runs.append(
            make(kind, stock=stock, learning_rate=0.0, max_steps=7, **({} if stock else {"ga_scale": "stable"}))
        )
        first.append(FirstStep())
        runs[-1].add_callback(first[-1])
        runs[-1].train()
    assert first[0].seen == first[1].seen and first[0].trainable == first[1].trainable
    assert not first[1].gradients
    assert entries(runs[0]) == entries(runs[1]) and len(entries(runs[0])) == 7
    assert [set(entry) for entry in runs[0].state.log_history] == [
        {name for name in entry if not name.startswith("ga/")} for entry in runs[1].state.log_history
    ], "no entry more, and no other names but ours"
    first, *others = runs[1].state.log_history
    assert runs[1].lora_ga_report.metrics().items() <= first.items()
    assert all("ga/seconds" in entry and "ga/alignment_mean" not in entry for entry in others)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_restart_leaves_the_metrics_to_their_steps(make, kind):
    """Those of the steps before it, which wait for the next log, stay as they are; what it found is in that entry, too."""
    logged = []
    for restarts in (None, 2):
        trainer = make(
            kind, ga_scale="stable", learning_rate=0.0, logging_steps=4, max_steps=8, ga_restart_steps=restarts
        )
        trainer.train()
        logged.append(entries(trainer))
    assert logged[0] == logged[1] and len(trainer.state.log_history) == 3  # two of the training, one of its end
    found = trainer.model.lora_ga.state.restarts  # before the steps 3, 5 and 7: of two between logs the later
    for entry, report in zip(trainer.state.log_history, (found[0], found[2]), strict=False):
        assert report.metrics().items() <= entry.items()


@pytest.mark.parametrize("kind", KINDS)
def test_train_save_and_load_with_stock_peft(make, kind, tmp_path):
    base = base_of(kind)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    trainer = make(kind, base=base, max_steps=6, learning_rate=1e-2)
    assert torch.equal(logits(trainer.model), logits(base_of(kind)))
    trainer.train()
    trained = logits(trainer.model)
    assert (trained - logits(base_of(kind))).abs().max() > 0.01
    trainer.save_model()
    loaded = PeftModel.from_pretrained(base_of(kind), tmp_path / "run")
    assert (logits(loaded) - trained).abs().max() < 1e-4  # float32, PEFT's scaling rounds otherwise; logits of order 1
    if kind != "dpo":
        head = "base_model.model.score.modules_to_save.default.weight"
        assert torch.equal(loaded.state_dict()[head], trainer.model.state_dict()[head])
        assert not torch.equal(loaded.state_dict()[head], before["score.weight"]), "the head is trained"
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(base_of(kind)))
    after = {
        name.replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in trainer.model.get_base_model().named_parameters()
        if "lora_" not in name and "modules_to_save" not in name
    }
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_the_uninterrupted_run(make, kind, tmp_path):
    """With the very same `LoraConfig`, to which PEFT adds a classifier's head once for each model."""
    lora = adapter_of(kind)
    whole = make(kind, lora=lora, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make(kind, lora=lora)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    losses = [[entry["loss"] for entry in entries(run)] for run in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())


# --- DPO's reference ------------------------------------------------------------------------------------------------


def reference_log_probabilities(trainer, batch):
    trainer.model.eval()
    return torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch))


@pytest.fixture
def true_reference(make):
    """(a batch, the log-probabilities of its texts under the untouched base model, by TRL's code with a `ref_model`)."""
    args = STOCK["dpo"][1](**{"output_dir": "unused", "bf16": False, "use_cpu": True, "report_to": "none"})
    stock = DPOTrainer(
        tiny_model(), tiny_model(), args, train_dataset=rows_of("dpo"), processing_class=word_tokenizer()
    )
    batch = stock.data_collator([stock.train_dataset[i] for i in range(8)])
    return batch, reference_log_probabilities(stock, batch)


@pytest.mark.parametrize("options", [{}, {"ga_offset": False}, {"ga_restart_steps": 2}])
def test_the_reference_of_dpo_is_the_base_model_to_the_bit(make, true_reference, options):
    batch, expected = true_reference
    trainer = make("dpo", learning_rate=1e-2, **options)
    trainer.train()
    first = entries(trainer)[0]["loss"]
    assert first == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-7)  # float32: the policy starts there
    assert abs(entries(trainer)[-1]["loss"] - first) > 1e-3, "and has left"
    assert torch.equal(reference_log_probabilities(trainer, batch), expected)


def test_the_reference_of_an_edited_base_is_another_model(make, true_reference):
    """The contrast: where the initialization is subtracted from W0, switching the adapter off does not give the base model.

    PEFT's PiSSA before its first step, and the paper's own W0 − s·B0 A0 with our factors.
    """
    batch, expected = true_reference
    pissa = make("dpo", stock=True, lora=adapter_of("dpo", init_lora_weights="pissa"))
    trainer = make("dpo")
    trainer.initialize_adapter()
    for weight in trainer.model.lora_ga.weights.values():
        a0, b0 = weight.A.frozen, weight.B.frozen
        with torch.no_grad():
            weight.layer.get_base_layer().weight.sub_(weight.scaling * b0 @ a0)
    for edited in (pissa, trainer):
        # log-probabilities of some 5 tokens, about −20; rounding is under 1e-4
        assert (reference_log_probabilities(edited, batch) - expected).abs().max() > 0.1


def test_precomputed_references_are_those_of_the_base_model(make, true_reference):
    _, expected = true_reference
    trainer = make("dpo", precompute_ref_log_probs=True)
    rows = trainer.train_dataset[:8]
    found = torch.tensor(rows["ref_chosen_logps"] + rows["ref_rejected_logps"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # other batches, other padding
    trainer.train()
    assert entries(trainer)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_a_peft_model_needs_no_second_adapter_for_its_reference(make, true_reference, tmp_path):
    batch, expected = true_reference
    by_config = make("dpo", save_strategy="steps", save_steps=4)
    wrapped = LoRAGADPOTrainer(
        get_peft_model(tiny_model(), adapter_of("dpo")),
        args=by_config.args,
        train_dataset=rows_of("dpo"),
        processing_class=word_tokenizer(),
    )
    assert list(wrapped.model.peft_config) == ["default"]
    for trainer in (by_config, wrapped):
        trainer.train()
    assert entries(by_config) == entries(wrapped)
    assert torch.equal(reference_log_probabilities(wrapped, batch), expected)
    assert not (tmp_path / "run/checkpoint-4/ref").exists()


# --- what a user may write ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
def test_no_peft_config_means_the_papers(kind, tmp_path):
    trainer_class, _ = CLASSES[kind]
    args = STOCK[kind][1](str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    trainer = trainer_class(base_of(kind), args=args, train_dataset=rows_of(kind), processing_class=word_tokenizer())
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (8, 16, True)
    assert trainer.args.ga_num_samples == 64 and len(trainer.model.lora_ga.weights) == 14
    heads = [name for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert heads == ([] if kind == "dpo" else ["base_model.model.score.modules_to_save.default.weight"])


class OwnLoss(ClassifierTrainer):
    """A mean over the batch, whatever `num_items_in_batch` says, of labels under another name."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        classes = inputs.pop("kind")
        return torch.nn.functional.cross_entropy(model(**inputs).logits, classes)


def divided_by_items(outputs, labels, num_items_in_batch):
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("way", ["compute_loss", "compute_loss_func"])
def test_losses_of_ones_own(make, way, tmp_path):
    expected = estimated_gradients(make("classifier", ga_num_samples=7, ga_batch_size=3))
    if way == "compute_loss":
        own = make("classifier", ga_num_samples=7, ga_batch_size=3, remove_unused_columns=False)
        own.__class__ = OwnLoss
        own.train_dataset = own.train_dataset.rename_column("labels", "kind")
    else:
        own = make("classifier", ga_num_samples=7, ga_batch_size=3)
        own.compute_loss_func = divided_by_items
    assert_same_gradients(estimated_gradients(own), expected)


class MeanLoss(ClassifierTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        classes = inputs.pop("labels")
        return torch.nn.functional.cross_entropy(model(**inputs).logits, classes)


def test_a_batch_without_a_label_counts_for_nothing(make):
    """Its mean is no number."""
    found = []
    for size in (1, 7):
        trainer = make("classifier", ga_num_samples=7, ga_batch_size=size)
        trainer.__class__ = MeanLoss
        sampled = torch.randperm(24, generator=torch.Generator().manual_seed(trainer.args.ga_seed))[0].item()
        labels = [-100 if i == sampled else label for i, label in enumerate(trainer.train_dataset["labels"])]
        trainer.train_dataset = trainer.train_dataset.remove_columns("labels").add_column("labels", labels)
        found.append(estimated_gradients(trainer))
    assert_same_gradients(*found)


def token_classifier():
    config = CONFIGS["llama"]()
    config.num_labels = 3
    return LlamaForTokenClassification(config)


def chooser():
    return BertForMultipleChoice(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8))


ROWS = torch.ones(3, 5, dtype=torch.long)
MASKED = torch.where(torch.arange(5) < 2, -100, ROWS)


@pytest.mark.parametrize(
    ("model", "batch", "items"),
    [
        (tiny_model, {"labels": ROWS}, 12),
        (tiny_model, {"labels": MASKED}, 9),
        (lambda: tiny_model("gpt2"), {"labels": ROWS}, 12),
        (tiny_t5, {"labels": MASKED}, 9),
        (tiny_t5, {"labels": ROWS}, 15),
        (token_classifier, {"labels": ROWS}, 15),
        (lambda: base_of("classifier"), {"labels": torch.tensor([0, -100, 2])}, 2),
        (lambda: base_of("classifier"), {"labels": torch.tensor([0.0, 1.0, 2.0])}, 3),
        (chooser, {"labels": torch.tensor([0, 1, 2])}, 3),
        (lambda: base_of("reward"), {"input_ids": ROWS}, 3),
    ],
)
def test_what_a_loss_is_a_mean_over(model, batch, items):
    assert items_in(get_peft_model(model(), lora_config(target_modules="all-linear", task_type=None)), batch) == items


@pytest.mark.parametrize(
    ("args", "model", "rows", "message"),
    [
        (TrainingArguments, "peft", 24, r"`args` is a TrainingArguments, .* Pass `LoRAGATrainingArguments\(...\)`"),
        (LoRAGATrainingArguments, "base", 24, "LoRA-GA initializes a `PeftModel`, got LlamaForSequenceClassification"),
        (LoRAGATrainingArguments, "peft", 0, "training set has no example, so"),
    ],
)
def test_what_the_mixin_refuses(args, model, rows, message, tmp_path):
    base = base_of("classifier")
    if model != "base":
        base = get_peft_model(base, adapter_of("classifier"))
    with pytest.raises(ValueError, match=message):
        ClassifierTrainer(
            base, args(str(tmp_path), use_cpu=True), train_dataset=rows_of("classifier").select(range(rows))
        )


def test_a_model_that_is_made_later_is_refused(tmp_path):
    class MakesItsModel(LoRAGAMixin, Trainer):
        pass

    def model_init():
        return get_peft_model(base_of("classifier"), adapter_of("classifier"))

    with pytest.raises(ValueError, match="`model_init` would make a new model when training begins"):
        MakesItsModel(
            args=LoRAGATrainingArguments(str(tmp_path), use_cpu=True),
            train_dataset=rows_of("classifier"),
            model_init=model_init,
        )


def test_a_module_that_is_no_model_of_transformers(tmp_path):
    """Labels of any shape, no tags, no embedding."""

    class Regression(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 12), torch.nn.Linear(12, 5)

        def forward(self, x, labels):
            predicted = self.second(self.first(x).tanh())
            return {"loss": (predicted - labels).square().mean(), "logits": predicted}

    class RegressionTrainer(LoRAGAMixin, Trainer):
        pass

    torch.manual_seed(0)
    model = get_peft_model(Regression(), LoraConfig(r=2, target_modules=["first", "second"]))
    rows = [{"x": x, "labels": x[:5].sin()} for x in torch.randn(16, 6)]
    args = LoRAGATrainingArguments(str(tmp_path), use_cpu=True, max_steps=4, learning_rate=1e-2, report_to="none")
    trainer = RegressionTrainer(model, args, train_dataset=rows)
    trainer.train()
    assert len(trainer.lora_ga_report.alignment) == 2
    trainer.save_model()
    torch.manual_seed(0)
    stock = PeftModel.from_pretrained(Regression(), tmp_path)
    x = torch.randn(3, 6)
    # float32, the same products up to the scaling's last place
    torch.testing.assert_close(stock(x, x[:, :5])["logits"], model(x, x[:, :5])["logits"], rtol=0, atol=1e-6)


def test_half_of_what_one_device_takes(make, monkeypatch):
    """Under `nn.DataParallel` a batch is for all devices, and the estimation runs on one."""
    monkeypatch.setattr(LoRAGATrainingArguments, "n_gpu", 4)
    trainer = make("classifier", per_device_train_batch_size=4, ga_batch_size=None)
    assert trainer._train_batch_size == 16
    assert {len(batch["labels"]) for batch in trainer.sample_batches(0)} == {2}


# --- the head of a classifier ---------------------------------------------------------------------------------------


def test_a_reward_model_without_a_task_type_trains_and_saves_its_head(make, tmp_path):
    lora = adapter_of("reward", task_type=None)
    trainer = make("reward", lora=lora, learning_rate=1e-2)
    assert lora.task_type is None, "the user's own is left alone"
    trainer.train()
    trainer.save_model()
    other_head = base_of("reward")
    torch.nn.init.normal_(other_head.score.weight)  # a new one, as each time that the base model is loaded
    reloaded = PeftModel.from_pretrained(other_head, tmp_path / "run")
    assert (logits(reloaded) - logits(trainer.model)).abs().max() < 1e-4  # float32, see above


def bart_classifier():
    return BartForSequenceClassification(
        BartConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=64,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "lora", "head"),
    [
        (lambda: base_of("classifier"), {"task_type": None}, "score"),
        (lambda: base_of("classifier"), {"task_type": "FEATURE_EXTRACTION"}, "score"),
        # the adapter on it is saved, the head below is not
        (lambda: base_of("classifier"), {"task_type": None, "target_modules": ["score", "q_proj"], "r": 1}, "score"),
        (token_classifier, {"task_type": None}, "score"),
        (chooser, {"task_type": None, "r": 2}, "classifier"),
        (bart_classifier, {"task_type": "SEQ_CLS", "r": 2}, "classification_head"),  # a name that PEFT does not know
    ],
)
def test_a_head_that_would_be_lost_is_named(model, lora, head):
    wrapped = get_peft_model(model(), lora_config(**lora))
    with pytest.raises(
        ValueError, match=rf"^{head} of .* would be neither trained nor saved.*modules_to_save=\['{head}'\]"
    ):
        attach_lora_ga(wrapped, LoRAGAArguments(ga_learning_rate=1e-3))


def audio_classifier():
    return WhisperForAudioClassification(
        WhisperConfig(
            d_model=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=80, decoder_ffn_dim=80, num_mel_bins=8, max_source_positions=20, vocab_size=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, num_labels=3,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        # its encoder has another name than the base model's, and is no head
        (audio_classifier, {"task_type": None, "modules_to_save": ["projector", "classifier"]}),
        (lambda: base_of("classifier"), {"task_type": "SEQ_CLS"}),
        (lambda: base_of("classifier"), {"task_type": None, "modules_to_save": ["score"]}),
        (bart_classifier, {"task_type": "SEQ_CLS", "r": 2, "modules_to_save": ["classification_head"]}),
    ],
)
def test_a_head_that_is_saved(model, lora):
    attach_lora_ga(
        get_peft_model(model(), lora_config(target_modules=["q_proj"], **lora)), LoRAGAArguments(ga_learning_rate=1e-3)
    )


def test_a_head_that_comes_with_the_base_model_may_stay_frozen(tmp_path):
    base_of("classifier").save_pretrained(tmp_path)
    loaded = LlamaForSequenceClassification.from_pretrained(tmp_path)
    attach_lora_ga(
        get_peft_model(loaded, lora_config(task_type=None, target_modules=["q_proj"])),
        LoRAGAArguments(ga_learning_rate=1e-3),
    )


# --- a model that carries an adapter --------------------------------------------------------------------------------


def loaded_with_an_adapter(folder):
    model, _ = peft_pair()
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)
    model.save_pretrained(folder)
    loaded = tiny_model()
    loaded.load_adapter(str(folder))
    return loaded


def with_an_adapter_of_transformers(folder):
    model = tiny_model()
    model.add_adapter(lora_config(), adapter_name="mine")
    return model


def with_an_injected_adapter(folder):
    return inject_adapter_in_model(lora_config(), tiny_model(), adapter_name="mine")


ADAPTED = [loaded_with_an_adapter, with_an_adapter_of_transformers, with_an_injected_adapter]


@pytest.mark.parametrize("adapted", ADAPTED)
def test_a_model_that_carries_an_adapter_is_refused(adapted, tmp_path):
    message = r"put the adapters \['(default|mine|default', 'mine)'\] into it.*is_trainable=True"
    model = adapted(tmp_path)
    arguments = sft_arguments(tmp_path / "run")
    for trainer, config, rows in (
        (LoRAGASFTTrainer, LoRAGASFTConfig, word_problems()),
        (LoRAGADPOTrainer, LoRAGADPOConfig, rows_of("dpo")),
        (ClassifierTrainer, LoRAGATrainingArguments, rows_of("classifier")),
    ):
        new = {} if trainer is ClassifierTrainer else {"peft_config": lora_config()}
        with pytest.raises(ValueError, match=message):
            trainer(model, args=config(**arguments), train_dataset=rows, processing_class=word_tokenizer(), **new)
    with pytest.raises(ValueError, match=message):
        attach_lora_ga(model, LoRAGAArguments(ga_learning_rate=1e-3))
    if adapted is not with_an_injected_adapter:  # which nothing is left of once it is wrapped
        with pytest.raises(ValueError, match=message):
            attach_lora_ga(get_peft_model(model, lora_config()), LoRAGAArguments(ga_learning_rate=1e-3))


def test_an_encoder_decoder_that_carries_an_adapter_is_refused(tmp_path):
    model = tiny_t5()
    model.add_adapter(lora_config(task_type="SEQ_2_SEQ_LM"), adapter_name="mine")
    with pytest.raises(ValueError, match=r"put the adapters \['mine'\]"):
        LoRAGASeq2SeqTrainer(
            model,
            LoRAGASeq2SeqConfig(str(tmp_path), use_cpu=True),
            train_dataset=seq2seq_problems(),
            peft_config=lora_config(task_type="SEQ_2_SEQ_LM"),
        )


def test_a_model_whose_adapter_was_deleted_is_a_base_model():
    model = tiny_model()
    model.add_adapter(lora_config(), adapter_name="mine")
    model.delete_adapter("mine")
    attach_lora_ga(get_peft_model(model, lora_config()), LoRAGAArguments(ga_learning_rate=1e-3))


# --- data, and the order of errors ----------------------------------------------------------------------------------


def test_a_training_loader_of_ones_own_needs_a_dataset_to_sample_from(tmp_path):
    class OwnLoader(ClassifierTrainer):
        def get_train_dataloader(self):
            raise AssertionError("refused before")

    model = get_peft_model(base_of("classifier"), adapter_of("classifier"))
    with pytest.raises(ValueError, match="`train_dataset` is None, but LoRA-GA draws its sample from it"):
        OwnLoader(model, LoRAGATrainingArguments(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("kind", ["sft", *PAIRS])
def test_trl_prepares_its_data_once_nothing_is_to_be_refused(kind, tmp_path, monkeypatch):
    trainer_class, config = {"sft": (LoRAGASFTTrainer, LoRAGASFTConfig)}.get(kind) or CLASSES[kind]
    stock = trainer_class._prepare_dataset

    class Own(trainer_class):
        """Whose preparation goes on from TRL's."""

        prepared: ClassVar[list[str]] = []

        def _prepare_dataset(self, dataset, *how):
            self.prepared.append(how[-1])
            dataset = stock(self, dataset, *how)
            column = "input_ids" if kind == "sft" else "chosen_ids" if kind == "dpo" else "chosen_input_ids"
            return dataset.filter(lambda row: any(column in name or name in column for name in row))

    rows = word_problems() if kind == "sft" else rows_of(kind)
    base = (lambda: base_of(kind)) if kind in PAIRS else tiny_model
    arguments = sft_arguments(tmp_path / "run")

    def make(lora=None, eval_dataset=None, **options):
        return Own(
            base(), args=config(**arguments | options), train_dataset=rows, eval_dataset=eval_dataset,
            processing_class=word_tokenizer(), peft_config=lora,
        )  # fmt: skip

    for refused in (
        {"lora": adapter_of(kind, r=25), "ga_sketch_size": 40},
        {"lora": adapter_of(kind, target_modules=["embed_tokens"])},
        {"ga_sketch_size": 3},
        {"output_dir": "/proc/self"},
    ):
        with pytest.raises(ValueError):
            make(**refused)
    assert not Own.prepared
    held_out = {"a": rows.select(range(4)), "b": rows.select(range(6))}
    trainer = make(eval_dataset=held_out)
    assert Own.prepared == ["train", "a", "b"] and set(held_out["a"].column_names) == set(rows.column_names)
    assert {name: len(dataset) for name, dataset in trainer.eval_dataset.items()} == {"a": 4, "b": 6}
    trainer.train()
    assert trainer.evaluate().keys() >= {"eval_a_loss", "eval_b_loss"}


def test_advice_fits_what_was_passed(tmp_path, monkeypatch):
    def trainer(model, **adapter):
        args = LoRAGASFTConfig(**sft_arguments(tmp_path / "run"))
        LoRAGASFTTrainer(model, args, train_dataset=word_problems(), processing_class=word_tokenizer(), **adapter)

    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="`peft_config` is a IA3Config.*or leave it out"):
        trainer(tiny_model(), peft_config=ia3)
    with pytest.raises(ValueError, match="'default' was made of a IA3Config.*make it with `get_peft_model") as refused:
        trainer(get_peft_model(tiny_model(), ia3))
    assert "leave it out" not in str(refused.value)
    # PEFT makes `target_parameters` of "all-linear", which nobody has written here
    monkeypatch.setattr(targets, "is_zero3", lambda parameter: parameter.dim() == 3)
    with pytest.raises(ValueError, match=r"target linear layers only.*No `peft_config` was passed"):
        trainer(tiny_model("mixture"))
    with pytest.raises(ValueError, match="target linear layers only") as refused:
        trainer(tiny_model("mixture"), peft_config=lora_config())
    assert "was passed" not in str(refused.value)


def test_the_wrong_order_of_bases_is_refused():
    with pytest.raises(ValueError, match=r"Write `class Reversed\(LoRAGAMixin, ...\)`"):

        class Reversed(Trainer, LoRAGAMixin): ...


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_config": lora_config(use_dora=True)}, "DoRA trains a magnitude .* use TRL's own trainer"),
        ({"train_dataset": Dataset.from_list([])}, "training set has no example, so"),
    ],
)
def test_what_reward_and_dpo_refuse(kind, options, message, tmp_path):
    trainer_class, config_class = CLASSES[kind]
    args = config_class(str(tmp_path), bf16=False, use_cpu=True)
    arguments = {"args": args, "train_dataset": rows_of(kind), "processing_class": word_tokenizer()} | options
    with pytest.raises(ValueError, match=message):
        trainer_class(base_of(kind), **arguments)


@pytest.mark.parametrize(
    ("ours", "theirs", "more"),
    [
        (LoRAGASFTTrainer, SFTTrainer, []),
        (LoRAGADPOTrainer, DPOTrainer, []),
        (LoRAGARewardTrainer, RewardTrainer, []),
        (LoRAGASeq2SeqTrainer, Seq2SeqTrainer, ["peft_config"]),
    ],
)
def test_a_trainer_shows_the_arguments_of_the_one_it_replaces(ours, theirs, more):
    """By name, in its order and with its defaults, as an editor and `inspect.signature` show them."""
    found, expected = (dict(inspect.signature(trainer).parameters) for trainer in (ours, theirs))
    if ours is not LoRAGASeq2SeqTrainer and "quantization_config" not in expected:  # TRL 1.0
        del found["quantization_config"]
    assert list(found) == [*expected, *more]
    for name, parameter in expected.items():
        assert found[name].kind == parameter.kind
        # the model of a seq2seq trainer cannot be left out, since `model_init` is refused
        assert found[name].default == parameter.default or (ours is LoRAGASeq2SeqTrainer and name == "model")
