"""The model card: it tells of LoRA-GA wherever one is written, renders, and has valid metadata."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, get_peft_model
from tiny import (
    lora_config,
    seq2seq_problems,
    sft_arguments,
    tiny_batches,
    tiny_model,
    tiny_t5,
    word_problems,
    word_tokenizer,
)
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

from lora_ga_trainer import (
    LoRAGAArguments,
    LoRAGASeq2SeqConfig,
    LoRAGASeq2SeqTrainer,
    LoRAGASFTConfig,
    LoRAGASFTTrainer,
    initialize_lora_ga,
)
from lora_ga_trainer.checkpoint.model_card import BEGIN, HERE

INPUTS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(4))


def sft_trainer(model, out, **options):
    return LoRAGASFTTrainer(
        model, LoRAGASFTConfig(**sft_arguments(out, max_steps=2, save_strategy="steps", save_steps=1, **options)),
        train_dataset=word_problems(), processing_class=word_tokenizer(), peft_config=lora_config(),
    )  # fmt: skip


def seq2seq_trainer(model, out, **options):
    return LoRAGASeq2SeqTrainer(
        model, LoRAGASeq2SeqConfig(**sft_arguments(out, max_steps=2, save_strategy="steps", save_steps=1, **options)),
        data_collator=DataCollatorForSeq2Seq(word_tokenizer()), train_dataset=seq2seq_problems(),
        peft_config=lora_config(task_type="SEQ_2_SEQ_LM"),
    )  # fmt: skip


TRAINERS = {"sft": (sft_trainer, tiny_model), "seq2seq": (seq2seq_trainer, tiny_t5)}


def named(make, name):
    model = make()
    model.config._name_or_path = model.name_or_path = name
    return model


def check_card(path, report, base: str | None) -> ModelCard:
    """Everything that must be in every card. `base` is the hub name of the base model, None if it has none."""
    card = ModelCard.load(path)
    metadata = card.data.to_dict()
    assert metadata["library_name"] == "peft" and {"lora-ga", "lora"} <= set(metadata["tags"])
    assert all(isinstance(tag, str) for tag in metadata["tags"]) and len(set(metadata["tags"])) == len(metadata["tags"])
    assert metadata.get("base_model") == base
    for tag in metadata["tags"]:
        if tag.startswith("base_model:"):
            validate_repo_id(tag.removeprefix("base_model:adapter:"))
    assert None not in metadata.values()
    assert card.text.count(BEGIN) == 1 and card.text.count("## LoRA-GA") == 1
    assert "https://arxiv.org/abs/2407.05000" in card.text and card.text.count("@inproceedings{wang2024loraga,") == 1
    assert f"mean {report.alignment_mean:.3f}, minimum {report.alignment_min:.3f}" in card.text
    assert "| rank that trained | r = 4 |" in card.text and "| rank of the file | 8 |" in card.text
    assert "None" not in card.text and "[](" not in card.text and "trained from scratch" not in card.text
    assert len(re.findall("^```", card.text, re.MULTILINE)) % 2 == 0
    assert not re.search(r"[^\n]\n#+ ", re.sub(r"^```.*?^```", "", card.text, flags=re.DOTALL | re.MULTILINE)), (
        "blank lines"
    )
    return card


@pytest.mark.parametrize("kind", TRAINERS)
def test_every_card_of_a_trainer(kind, tmp_path):
    make, model = TRAINERS[kind]
    trainer = make(named(model, "org/some-base"), tmp_path / "out")
    trainer.train()
    check_card(tmp_path / "out/checkpoint-2/README.md", trainer.lora_ga_report, "org/some-base")
    trainer.save_model()
    check_card(tmp_path / "out/README.md", trainer.lora_ga_report, "org/some-base")
    trainer.create_model_card(model_name="a name", tags="mine")
    card = check_card(tmp_path / "out/README.md", trainer.lora_ga_report, "org/some-base")
    assert "a name" in card.text
    if kind == "sft":  # of transformers' card PEFT keeps no tags, with or without LoRA-GA
        assert "mine" in card.data.tags
        assert {"trl", "sft"} <= set(card.data.tags) and "Cite TRL as" in card.text, "TRL's own card is kept"
    else:
        assert "### Training hyperparameters" in card.text, "transformers' own card is kept"
    trainer.save_model()  # again, over a card that is there
    card = check_card(tmp_path / "out/README.md", trainer.lora_ga_report, "org/some-base")
    assert "a name" in card.text


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("base", ["", "folder"])
def test_a_base_that_is_not_on_the_hub(kind, base, tmp_path):
    """Its path is no hub name: the hub refuses metadata with it."""
    make, model = TRAINERS[kind]
    if base:
        base = str(tmp_path / base)
        model().save_pretrained(base)
    trainer = make(named(model, base), tmp_path / "out")
    trainer.train()
    trainer.create_model_card()
    card = check_card_without_name(tmp_path / "out/README.md", trainer.lora_ga_report)
    assert (f"`{base}`" if base else "a model without a name") in card.text
    trainer.save_model()
    check_card_without_name(tmp_path / "out/README.md", trainer.lora_ga_report)


def check_card_without_name(path, report):
    text = path.read_text()
    path.write_text(text.replace("Model Card for None", "Model Card for it").replace("model_name: null\n", ""))
    return check_card(path, report, None)


def test_the_code_in_the_card_loads_the_adapter(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    trainer = sft_trainer(named(tiny_model, str(tmp_path / "base")), tmp_path / "out")
    trainer.train()
    trainer.save_model()
    (code,) = re.findall(r"^```python\n(.*?)^```", (tmp_path / "out/README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert "resize" not in code
    variables = {}
    exec(code.replace(HERE, str(tmp_path / "out")), variables)
    assert isinstance(variables["model"], PeftModel)
    with torch.no_grad():
        found, expected = (m.eval()(INPUTS).logits for m in (variables["model"], trainer.model))
    assert (found - expected).abs().max() < 1e-5  # float32, see test_checkpoint


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize(
    "lora",
    [{}, {"trainable_token_indices": [64, 65]}, {"modules_to_save": ["embed_tokens"]}],
    ids=lambda lora: "".join(lora),
)
def test_the_code_in_the_card_resizes_the_vocabulary(family, lora, tmp_path):
    """More tokens than the base's own, as of a new chat template."""
    tiny_model(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    base.resize_token_embeddings(70)
    model = get_peft_model(base, lora_config(target_modules=["q_proj"], **lora))
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)
    model.eval().save_pretrained(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    assert "base.resize_token_embeddings(70)\n" in code
    variables = {}
    exec(code.replace(HERE, str(tmp_path / "out")), variables)
    ids = torch.tensor([[5, 64, 65, 69]])
    with torch.no_grad():
        found, expected = (m.eval()(ids).logits for m in (variables["model"], model))
    assert (found - expected).abs().max() < 1e-5  # float32, see test_checkpoint


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_loop_of_ones_own(name, tmp_path):
    model = get_peft_model(named(tiny_model, "org/some-base"), lora_config(), adapter_name=name)
    report = initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)
    model.save_pretrained(tmp_path)
    card = check_card(tmp_path / "README.md", report, "org/some-base")
    assert "More Information Needed" not in card.text
    assert (f'subfolder="{name}"' in card.text) == (name != "default")


def test_without_the_offset_the_file_has_rank_r(tmp_path):
    trainer = sft_trainer(tiny_model(), tmp_path / "out", ga_offset=False)
    trainer.train()
    assert "| rank of the file | 4 |" in (tmp_path / "out/checkpoint-2/README.md").read_text()


def test_a_deleted_adapter_leaves_peft_its_card(tmp_path):
    model = get_peft_model(tiny_model(), lora_config())
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)
    model.add_adapter("other", lora_config())
    model.delete_adapter("default")
    model.set_adapter("other")
    model.save_pretrained(tmp_path)
    assert BEGIN not in (tmp_path / "README.md").read_text()
