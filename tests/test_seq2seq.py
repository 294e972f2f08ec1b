"""`LoRAGASeq2SeqTrainer`: the invariants of `LoRAGASFTTrainer` hold on a T5, whose dropout is on as it comes."""

import copy

import dense_reference
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny import lora_config, seq2seq_problems, sft_arguments, tiny_model, tiny_t5, word_tokenizer
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from lora_ga_trainer import LoRAGASeq2SeqConfig, LoRAGASeq2SeqTrainer

COLLATE = DataCollatorForSeq2Seq(word_tokenizer())
INPUTS = COLLATE(seq2seq_problems().select(range(6)).to_list())


@pytest.fixture(scope="module")
def problems():
    return seq2seq_problems()


@pytest.fixture
def make(tmp_path, problems, one_thread):
    def make(model=None, peft_config=lora_config(task_type="SEQ_2_SEQ_LM"), **options):  # noqa: B008, never changed
        args = LoRAGASeq2SeqConfig(**sft_arguments(tmp_path / "run", **{"ga_estimator": "exact"} | options))
        return LoRAGASeq2SeqTrainer(
            model or tiny_t5(), args, data_collator=COLLATE, train_dataset=problems, peft_config=peft_config
        )

    return make


def logits(model):
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_gradient_is_autograds_without_dropout(make):
    trainer = make(ga_num_samples=8, ga_batch_size=3)
    seen = {}
    for name, layer in trainer.model.lora_ga.weights.items():
        seen[name] = layer.layer.get_base_layer().weight.detach().clone()
    batches = list(trainer.sample_batches(trainer.args.ga_seed))
    assert [len(batch["labels"]) for batch in batches] == [3, 3, 2]
    trainer.initialize_adapter()

    base = tiny_t5().eval()  # no dropout
    names = {name: name.removeprefix("base_model.model.") for name in seen}
    weights = {name: (base.get_submodule(inner).weight, False) for name, inner in names.items()}
    assert all(torch.equal(seen[name], weight) for name, (weight, _) in weights.items())
    tokens = sum(int(batch["labels"].ne(-100).sum()) for batch in batches)
    sums = []
    for batch in batches:
        log_probs = base(**batch).logits.log_softmax(-1)
        chosen = log_probs.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
        sums.append(-(chosen * batch["labels"].ne(-100)).sum() / tokens)
    gradients = dense_reference.weight_gradient(weights, sums)
    for name, layer in trainer.model.lora_ga.weights.items():
        a, b = layer.A.frozen, layer.B.frozen
        expected = dense_reference.alignment(gradients[name], a, b)
        _, s, _ = dense_reference.singular_vectors(gradients[name])
        best = (s[:8].norm() / s.norm()).item()
        # the factors follow the reference's gradient as far as any of this rank can: of another gradient they would not.
        # float32 against float64, in a cosine
        assert expected == pytest.approx(best, abs=1e-5), name
        assert trainer.lora_ga_report.alignment[name] == pytest.approx(best, abs=1e-5), name
    assert trainer.model.get_base_model().encoder.dropout.p == 0.1, "dropout is on again"


def test_at_init_the_logits_are_the_base_models(make):
    trainer = make()
    trainer.initialize_adapter()
    assert torch.equal(logits(trainer.model), logits(tiny_t5()))


def test_estimation_does_not_depend_on_batching(make):
    factors = []
    for size in (1, 8):
        trainer = make(ga_batch_size=size)
        trainer.initialize_adapter()
        factors.append({n: p for n, p in trainer.model.named_parameters() if n.endswith("frozen")})
    for name, value in factors[0].items():
        other = factors[1][name]
        rows, others = (value, other) if ".lora_A." in name else (value.T, other.T)
        signs = torch.sign((rows * others).sum(dim=1, keepdim=True))
        # float32 sums in another order, amplified by the gaps between singular values; factors of order 1
        torch.testing.assert_close(rows, signs * others, rtol=0, atol=2e-4)


def test_train_save_and_load_with_stock_peft(make, tmp_path):
    trainer = make()
    trainer.train()
    trainer.save_model()
    stock = PeftModel.from_pretrained(tiny_t5(), tmp_path / "run")
    # PEFT's scaling has another rounding than the trainer's; float32 logits of order 1
    torch.testing.assert_close(logits(stock), logits(trainer.model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(stock), logits(tiny_t5()), atol=1e-2)
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(tiny_t5()))


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
def test_resuming_is_the_uninterrupted_run(make, tmp_path, options):
    whole = make(save_strategy="steps", save_steps=2, max_steps=4, **options)
    whole.train()
    resumed = make(max_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())


def stock_losses(tmp_path, problems, model, **options):
    """Of transformers' own trainer, with the adapter that the LoRA-GA trainer starts from, as an ordinary one."""
    args = Seq2SeqTrainingArguments(
        **{name: value for name, value in sft_arguments(tmp_path / "stock", **options).items() if name[:3] != "ga_"}
    )
    trainer = Seq2SeqTrainer(model, args, data_collator=COLLATE, train_dataset=problems)
    trainer.train()
    return losses(trainer)


def test_the_losses_are_those_of_transformers_trainer(make, tmp_path, problems):
    """The random state is that of a plain run, so dropout, which is on in training, draws the same."""
    trainer = make(max_steps=1, seed=7)
    trainer.train()
    plain = get_peft_model(tiny_t5(), lora_config(task_type="SEQ_2_SEQ_LM"))
    # zero at the start, both; the first loss is the base model's, with the dropout of this seed
    assert losses(trainer) == pytest.approx(stock_losses(tmp_path, problems, plain, max_steps=1, seed=7), rel=1e-6)


def test_accumulated_batches_are_one_batch(make, tmp_path, problems):
    """transformers' own trainer adds up the losses of T5's micro-batches: see `LoRAGASeq2SeqTrainer.compute_loss`."""
    found = {}
    for size, steps in ((4, 1), (2, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make(tiny_t5(dropout_rate=0.0), **options)
        trainer.train()
        found[steps] = losses(trainer)
    # float32 sums in another order
    assert found[2] == pytest.approx(found[1], rel=1e-4)
    plain = get_peft_model(tiny_t5(dropout_rate=0.0), lora_config(task_type="SEQ_2_SEQ_LM"))
    stock = stock_losses(tmp_path, problems, plain, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert stock[0] > 1.5 * found[2][0], "mended upstream: `compute_loss` may go"


def test_a_peft_model_and_plain_arguments_are_taken(tmp_path, problems):
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    model = get_peft_model(tiny_t5(), lora_config(task_type="SEQ_2_SEQ_LM"))
    trainer = LoRAGASeq2SeqTrainer(model, args, data_collator=COLLATE, train_dataset=problems)
    trainer.train()
    assert trainer.args.ga_num_samples == 64 and trainer.lora_ga_report is not None
    paper = LoRAGASeq2SeqTrainer(tiny_t5(), args, data_collator=COLLATE, train_dataset=problems).model.peft_config
    assert (paper["default"].r, paper["default"].use_rslora, paper["default"].task_type) == (8, True, "SEQ_2_SEQ_LM")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (tiny_model, {}, "`model` is LlamaForCausalLM, but must be an encoder-decoder"),
        (
            lambda: "google-t5/t5-base",
            {},
            "`model` is google-t5/t5-base, but must be an encoder-decoder model in memory",
        ),
        (
            lambda: get_peft_model(tiny_t5(), lora_config(task_type="SEQ_2_SEQ_LM")),
            {},
            "`peft_config` would be a second adapter",
        ),
        (tiny_t5, {"peft_config": lora_config(use_dora=True)}, "cannot be combined with LoRA-GA"),
        (tiny_t5, {"peft_config": lora_config(r=30), "ga_sketch_size": 50}, "must be at least 2·r = 60"),
    ],
)
def test_what_is_refused(make, model, options, message):
    with pytest.raises(ValueError, match=message):
        make(model(), **options)


def test_an_empty_training_set_is_refused(tmp_path, problems):
    with pytest.raises(ValueError, match="training set has no example"):
        LoRAGASeq2SeqTrainer(
            tiny_t5(),
            LoRAGASeq2SeqConfig(**sft_arguments(tmp_path)),
            data_collator=COLLATE,
            train_dataset=problems.select([]),
        )


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("kind", [Rows, list, Stream])
def test_datasets_of_torch_are_taken(kind, problems, tmp_path):
    args = LoRAGASeq2SeqConfig(**sft_arguments(tmp_path, max_steps=1, remove_unused_columns=False))
    trainer = LoRAGASeq2SeqTrainer(tiny_t5(), args, data_collator=COLLATE, train_dataset=kind(problems.to_list()))
    assert sum(len(batch["labels"]) for batch in trainer.sample_batches(0)) == 8
    trainer.train()
    assert trainer.lora_ga_report is not None


def test_batches_without_a_label_count_for_nothing(make, problems):
    """The second example has nothing to predict; alone in a batch its mean is no number."""
    rows = problems.select(range(8)).to_list()
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    found = []
    for size, steps in ((8, 1), (1, 8)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = make(tiny_t5(dropout_rate=0.0), **options, ga_batch_size=size)
        trainer.train_dataset = Dataset.from_list(rows)
        trainer.train()
        found += losses(trainer)
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # float32 sums in another order


def test_label_smoothing_is_estimated_and_trained(make):
    """Its collator has to make the decoder's inputs, as in transformers."""
    model = tiny_t5()
    trainer = make(copy.deepcopy(model), label_smoothing_factor=0.1)
    trainer.data_collator = DataCollatorForSeq2Seq(word_tokenizer(), model=model)
    trainer.train()
    plain = make()
    plain.train()
    assert losses(trainer)[0] != losses(plain)[0] and trainer.lora_ga_report.alignment_mean > 0


# --- Whisper, whose main input is sound ---------------------------------------------------------------------------------


def tiny_whisper():
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=80, decoder_ffn_dim=80, num_mel_bins=8, max_source_positions=20, max_target_positions=32,
        vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


@pytest.fixture
def whisper_trainer(tmp_path):
    generator = torch.Generator().manual_seed(1)
    rows = [
        {
            "input_features": torch.randn(8, 40, generator=generator).tolist(),
            "labels": torch.randint(3, 60, (6,), generator=generator).tolist(),
        }
        for _ in range(12)
    ]

    def make(**adapter):
        args = LoRAGASeq2SeqConfig(**sft_arguments(tmp_path / "run", learning_rate=1e-2))
        return LoRAGASeq2SeqTrainer(tiny_whisper(), args, train_dataset=Dataset.from_list(rows), **adapter)

    return make


@pytest.mark.parametrize("adapter", [{}, {"peft_config": lora_config(task_type=None)}], ids=["default", "no task type"])
def test_whisper(whisper_trainer, adapter, tmp_path):
    trainer = whisper_trainer(**adapter)
    trainer.train()
    trainer.save_model()
    reloaded = PeftModel.from_pretrained(tiny_whisper(), tmp_path / "run").eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        ours, theirs = trainer.model.eval()(**batch).logits, reloaded(**batch).logits
        base = tiny_whisper().eval()(**batch).logits
    assert (ours - theirs).abs().max() < 1e-5 < 1e-3 < (ours - base).abs().max()  # float32


def test_whisper_with_the_task_of_text_is_refused(whisper_trainer):
    message = "`task_type` is 'SEQ_2_SEQ_LM', .* WhisperForConditionalGeneration takes `input_features`. Leave `task_type` out"
    with pytest.raises(ValueError, match=message):
        whisper_trainer(peft_config=lora_config(task_type="SEQ_2_SEQ_LM"))
