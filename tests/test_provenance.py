"""An adapter names its base model if, and only if, the weights that it was trained on are those of that name."""

import json
import logging
import shutil

import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import HFValidationError
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
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
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
)

from lora_ga_trainer import (
    LoRAGAArguments,
    LoRAGADPOConfig,
    LoRAGADPOTrainer,
    LoRAGARewardConfig,
    LoRAGARewardTrainer,
    LoRAGASeq2SeqConfig,
    LoRAGASeq2SeqTrainer,
    LoRAGASFTConfig,
    LoRAGASFTTrainer,
    initialize_lora_ga,
)
from lora_ga_trainer.checkpoint import export
from lora_ga_trainer.initialization import attach_lora_ga

FAMILIES = ("llama", "llama_tied", "gpt2", "qwen2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved base of each family, and of T5; the first in two files and in bf16 as well."""
    root = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        tiny_model(family).save_pretrained(root / family)
    tiny_t5().save_pretrained(root / "t5")
    tiny_model().save_pretrained(root / "shards", max_shard_size="100kB")
    tiny_model(dtype=torch.bfloat16).save_pretrained(root / "bf16")
    return root


def load(folder, dtype=torch.float32, auto=AutoModelForCausalLM, **kwargs):
    return auto.from_pretrained(folder, dtype=dtype, **kwargs)


def name_after_attaching(model, **lora) -> str | None:
    peft_model = get_peft_model(model, lora_config(**{"target_modules": ["q_proj"], "task_type": None} | lora))
    attach_lora_ga(peft_model, LoRAGAArguments(ga_learning_rate=1e-3))
    return peft_model.peft_config["default"].base_model_name_or_path


def merged(model, kind="merge_and_unload", **lora):
    """`model` with another adapter, of plain PEFT, in its weights."""
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["v_proj"], **lora))
    if kind == "merge_and_unload":
        return adapted.merge_and_unload()
    adapted.merge_adapter()  # and then the adapter's layers are taken off by hand
    return adapted.unload()


# --- untouched --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untouched_base_keeps_its_name(family, folders):
    targets = {"target_modules": "all-linear"}
    assert name_after_attaching(load(folders / family), **targets) == str(folders / family)


def resized(model):
    model.resize_token_embeddings(70)
    return model


UNTOUCHED = {
    "in two files": lambda root: load(root / "shards"),
    "in half precision": lambda root: load(root / "llama", torch.bfloat16),
    "rounded and widened": lambda root: load(root / "llama", torch.bfloat16).float(),
    "rounded once more": lambda root: load(root / "bf16", torch.float16),
    "widened": lambda root: load(root / "bf16"),
    "with more tokens": lambda root: resized(load(root / "llama")),
    "with a new head": lambda root: load(root / "llama", auto=AutoModelForSequenceClassification, num_labels=1),
    "after an adapter that was unloaded": lambda root: get_peft_model(load(root / "llama"), lora_config()).unload(),
    "after a merge that was undone": lambda root: undone(load(root / "llama")),
}


def undone(model):
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=True, target_modules=["v_proj"]))
    adapted.merge_adapter()  # B is zero: to the bit nothing
    adapted.unmerge_adapter()
    return adapted.unload()


@pytest.mark.parametrize("case", UNTOUCHED)
def test_what_leaves_the_weights_alone(case, folders):
    model = UNTOUCHED[case](folders)
    head = {"modules_to_save": ["score"]} if case == "with a new head" else {}
    assert name_after_attaching(model, **head) == model.name_or_path != ""


def test_an_encoder_decoder(folders):
    model = load(folders / "t5", auto=AutoModelForSeq2SeqLM)
    targets = {"target_modules": ["q"], "task_type": "SEQ_2_SEQ_LM"}
    assert name_after_attaching(model, **targets) == str(folders / "t5")


@pytest.mark.parametrize("broken", ["no file", "no index", "not safetensors", "elsewhere"])
def test_a_base_that_cannot_be_compared_keeps_its_name(broken, folders, tmp_path):
    folder = shutil.copytree(folders / "shards", tmp_path / "base")
    model = merged(load(folder))  # even if it was changed: nobody can tell
    if broken == "elsewhere":
        shutil.rmtree(folder)
    for path in sorted(tmp_path.glob("base/*.safetensors")):
        if broken in ("no file", "no index"):
            path.unlink()
            if broken == "no index":
                break
        else:
            path.write_bytes(b"damaged")
    assert name_after_attaching(model) == str(folder)


# --- changed ----------------------------------------------------------------------------------------------------------


def one_row(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, 0] += 1e-3
    return model


CHANGED = {
    "merge_and_unload": lambda root: merged(load(root / "llama")),
    "merged in half precision": lambda root: merged(load(root / "llama", torch.bfloat16)),
    "merged into two files": lambda root: merged(load(root / "shards")),
    "merge_adapter": lambda root: merged(load(root / "llama"), kind="merge_adapter"),
    "by hand": lambda root: one_row(load(root / "llama")),
    "new weights": lambda root: AutoModelForCausalLM.from_config(load(root / "llama").config),
    "merged, with more tokens": lambda root: resized(merged(load(root / "llama"))),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_base_loses_its_name(case, folders, caplog):
    model = CHANGED[case](folders)
    with caplog.at_level(logging.WARNING, "lora_ga_trainer"):
        assert not name_after_attaching(model)
    assert "its weights have changed since" in caplog.text and "model.save_pretrained(folder)" in caplog.text


def test_what_was_saved_after_a_change_has_its_own_name(folders, tmp_path):
    merged(load(folders / "llama")).save_pretrained(tmp_path / "merged")
    assert name_after_attaching(load(tmp_path / "merged")) == str(tmp_path / "merged")


def test_in_the_cache_of_the_hub(folders, tmp_path, monkeypatch):
    """By the commit that was loaded, and without a word to the hub."""
    asked = []

    def snapshot_download(name, *, revision, local_files_only):
        asked.append((name, revision, local_files_only))
        if name == "not/cached":
            raise HFValidationError("no such name")
        return str(folders / "llama")

    monkeypatch.setattr("lora_ga_trainer.checkpoint.provenance.snapshot_download", snapshot_download)
    for change, expected in ((lambda model: model, "org/base"), (merged, "")):
        model = load(folders / "llama")
        model.name_or_path, model.config._commit_hash = "org/base", "abc"
        assert name_after_attaching(change(model)) == expected
    assert asked == [("org/base", "abc", True)] * 2
    model = merged(load(folders / "llama"))
    model.name_or_path = "not/cached"
    assert name_after_attaching(model) == "not/cached"


# --- every trainer ----------------------------------------------------------------------------------------------------


def sft(model, out):
    return LoRAGASFTTrainer(
        model, LoRAGASFTConfig(**sft_arguments(out, max_steps=1)), train_dataset=word_problems(),
        processing_class=word_tokenizer(), peft_config=lora_config(),
    )  # fmt: skip


def preferences(prompt: bool):
    rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "w1 w2"} for row in word_problems()]
    return Dataset.from_list(rows if prompt else [{k: v for k, v in row.items() if k != "prompt"} for row in rows])


def dpo(model, out):
    return LoRAGADPOTrainer(
        model, args=LoRAGADPOConfig(**sft_arguments(out, max_steps=1)), train_dataset=preferences(prompt=True),
        processing_class=word_tokenizer(), peft_config=lora_config(),
    )  # fmt: skip


def reward(model, out):
    return LoRAGARewardTrainer(
        model, args=LoRAGARewardConfig(**sft_arguments(out, max_steps=1)), train_dataset=preferences(prompt=False),
        processing_class=word_tokenizer(), peft_config=lora_config(task_type="SEQ_CLS"),
    )  # fmt: skip


def seq2seq(model, out):
    return LoRAGASeq2SeqTrainer(
        model, LoRAGASeq2SeqConfig(**sft_arguments(out, max_steps=1)), train_dataset=seq2seq_problems(),
        data_collator=DataCollatorForSeq2Seq(word_tokenizer()), peft_config=lora_config(task_type="SEQ_2_SEQ_LM"),
    )  # fmt: skip


class OwnLoop:
    def __init__(self, model, out):
        self.out, self.model = out, get_peft_model(model, lora_config())

    def train(self):
        initialize_lora_ga(self.model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)

    def save_model(self):
        self.model.save_pretrained(self.out)


TRAINERS = {
    "SFT": (sft, "llama", {}, "v_proj"),
    "DPO": (dpo, "llama", {}, "v_proj"),
    "reward": (reward, "llama", {"auto": AutoModelForSequenceClassification, "num_labels": 1}, "v_proj"),
    "seq2seq": (seq2seq, "t5", {"auto": AutoModelForSeq2SeqLM}, "v"),
    "own loop": (OwnLoop, "llama", {}, "v_proj"),
}


@pytest.mark.parametrize("changed", [False, True], ids=["untouched", "changed"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_every_trainer_writes_the_name_only_of_an_untouched_base(kind, changed, folders, tmp_path):
    make, family, kwargs, target = TRAINERS[kind]
    model = load(folders / family, **kwargs)
    model.config.pad_token_id = 0
    if changed:
        model = get_peft_model(
            model, LoraConfig(r=2, init_lora_weights=False, target_modules=[target])
        ).merge_and_unload()
    trainer = make(model, tmp_path / "out")
    trainer.train()
    trainer.save_model()
    name, card = str(folders / family), (tmp_path / "out/README.md").read_text()
    saved = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == ("" if changed else name)
    assert (f"untouched base model `{name}`" in card) == (not changed)
    assert (f"a copy of `{name}` whose weights had been changed before" in card) == changed
    assert ("base = " in card and f'from_pretrained("{name}")' in card) == (not changed)


def test_a_chain_of_two_runs(folders, tmp_path):
    """SFT, merge, and a second adapter: stock PEFT loads it on the saved merged model only."""
    inputs = tiny_batches()[0]["input_ids"]

    def logits(model):
        with torch.no_grad():
            return model.eval()(inputs).logits

    first = sft(load(folders / "llama"), tmp_path / "first")
    first.train()
    base = first.model.merge_and_unload()
    base.save_pretrained(tmp_path / "base")
    second = sft(base, tmp_path / "second")
    second.train()
    second.save_model()
    with pytest.raises((ValueError, OSError)):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "second")
    with pytest.raises(ValueError, match="does not name its base model"):
        export(tmp_path / "second", tmp_path / "merged", merge=True)
    loaded = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "second")
    assert (logits(loaded) - logits(second.model)).abs().max() < 1e-5  # float32, see test_checkpoint

    third = sft(load(tmp_path / "base"), tmp_path / "third")
    third.train()
    third.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "third", dtype=torch.float32)
    assert (logits(loaded) - logits(third.model)).abs().max() < 1e-5


def test_a_merged_quantized_or_converted_base_loses_its_name_where_no_file_can_be_compared(folders, tmp_path):
    """What `merge_and_unload` of a LoRA-GA model returns never bears the base's name."""
    folder = shutil.copytree(folders / "llama", tmp_path / "base")
    trainer = sft(load(folder), tmp_path / "out")
    trainer.train()
    (tmp_path / "base/model.safetensors").unlink()
    model = trainer.model.merge_and_unload(safe_merge=True)
    assert type(model).__name__ == "LlamaForCausalLM" and not name_after_attaching(model)
    assert model.config._name_or_path == str(folder), "by which TRL finds the tokenizer"
