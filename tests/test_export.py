"""`checkpoint.export`: from a checkpoint to a bare adapter or a merged model, without a trainer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import lora_config, sft_arguments, tiny_batches, tiny_model, word_problems
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ga_trainer import LoRAGAArguments, LoRAGASFTConfig, LoRAGASFTTrainer, initialize_lora_ga
from lora_ga_trainer.checkpoint import export

INPUTS = tiny_batches(seed=9)[0]["input_ids"]


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS).logits.float()


@pytest.fixture(scope="module", params=[True, False], ids=["offset", "no offset"])
def trained(request, tokenizer, tmp_path_factory) -> tuple[Path, Path]:
    """(the base model's folder, a checkpoint of a few steps on it)."""
    base, run = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("run")
    tiny_model().save_pretrained(base)
    args = LoRAGASFTConfig(
        **sft_arguments(
            run,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=2,
            model_init_kwargs={"dtype": "float32"},
            ga_offset=request.param,
        )
    )
    LoRAGASFTTrainer(str(base), args, train_dataset=word_problems(), processing_class=tokenizer).train()
    return base, run / "checkpoint-4"


def with_peft(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def test_the_adapter_alone(trained, tmp_path):
    base, checkpoint = trained
    export(checkpoint, tmp_path / "adapter")
    assert torch.equal(logits(with_peft(base, tmp_path / "adapter")), logits(with_peft(base, checkpoint)))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    assert not any(name.startswith(("lora_ga", "optimizer", "trainer_state", "training_args")) for name in names)


def test_the_merged_model(trained, tmp_path):
    base, checkpoint = trained
    export(checkpoint, tmp_path / "merged", merge=True)
    merged, adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), with_peft(base, checkpoint)
    # float32: W + ΔW is rounded once more than W x + ΔW x
    assert (logits(merged) - logits(adapted)).abs().max() < 1e-5
    assert (logits(merged) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter_*"))


def test_from_the_command_line(trained, tmp_path):
    base, checkpoint = trained
    command = [sys.executable, "-m", "lora_ga_trainer.checkpoint", "--checkpoint_dir", str(checkpoint)]
    done = subprocess.run([*command, "--out", str(tmp_path / "merged"), "--merge"], capture_output=True, text=True)
    assert done.returncode == 0 and "holds the merged model" in done.stdout
    assert (
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - logits(with_peft(base, checkpoint))
    ).abs().max() < 1e-5
    again = subprocess.run([*command, "--out", str(tmp_path / "merged")], capture_output=True, text=True)
    assert again.returncode == 1 and "exists already. Choose another folder" in again.stderr
    unknown = subprocess.run([*command, "--out", str(tmp_path / "x"), "--bogus", "1"], capture_output=True, text=True)
    assert unknown.returncode == 1 and "There is no option '--bogus'" in unknown.stderr
    assert "Traceback" not in again.stderr + unknown.stderr


def adapted(family: str, folder: Path, dtype=torch.float32, offset=True, **lora) -> torch.Tensor:
    """Save a tiny base in two files and a LoRA-GA adapter for it; the logits that they give together."""
    base = tiny_model(family, dtype)
    base.save_pretrained(folder / "base", max_shard_size="100kB")
    model = get_peft_model(base, lora_config(**lora))
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_offset=offset), disable_tqdm=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "adapter")
    return logits(model)


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "no offset"])
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", {"use_rslora": False, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 40}}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama_tied", {}),
        ("gpt2", {}),  # Conv1D: I×O
        ("qwen2", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
        ("qwen2", {"bias": "lora_only"}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),  # the file holds the head's base weight, too
    ],
    ids=["patterns", "modules_to_save", "tied", "conv1d", "lora_bias", "bias", "head"],
)
def test_every_kind_of_adapter_merges(family, lora, offset, tmp_path):
    expected = adapted(family, tmp_path, offset=offset, **lora)
    export(tmp_path / "adapter", tmp_path / "merged", merge=True, base_model=tmp_path / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # float32, adapters as large as the weights: logits of order 10
    assert (logits(merged) - expected).abs().max() < 1e-4 * expected.abs().max()
    shards = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == shards


def test_a_half_precision_base_keeps_its_dtype(tmp_path):
    expected = adapted("llama", tmp_path, torch.bfloat16)
    export(tmp_path / "adapter", tmp_path / "merged", merge=True, base_model=tmp_path / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    # one rounding of each weight to 8 bits, in two layers
    assert (logits(merged) - expected).abs().max() < 0.05 * expected.abs().max()


def test_weights_that_nobody_loads_are_left_out(trained, tmp_path):
    """Some repositories hold the weights a second time, as `consolidated.safetensors`; unmerged they would be another model."""
    base, checkpoint = trained
    shutil.copytree(base, tmp_path / "base")
    shutil.copy(next((tmp_path / "base").glob("*.safetensors")), tmp_path / "base/consolidated.safetensors")
    export(checkpoint, tmp_path / "merged", merge=True, base_model=tmp_path / "base")
    export(checkpoint, tmp_path / "plainly", merge=True, base_model=base)
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("merged", "plainly")]
    assert names[0] == names[1]


def test_the_base_is_that_of_the_adapters_revision(trained, tmp_path, monkeypatch):
    base, checkpoint = trained
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        return str(base)

    monkeypatch.setattr("lora_ga_trainer.checkpoint.exporting.snapshot_download", snapshot_download)
    shutil.copytree(checkpoint, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "somebody/model", "revision": "v2"}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    export(tmp_path / "adapter", tmp_path / "own", merge=True)
    export(tmp_path / "adapter", tmp_path / "other", merge=True, base_model="another/model")
    assert asked == [("somebody/model", "v2"), ("another/model", None)]


def test_one_file_at_a_time_is_read(trained, tmp_path, monkeypatch):
    """The tensors in memory at once are those of one of the base's files."""
    adapted("llama", tmp_path)
    sizes = []
    monkeypatch.setattr(
        "lora_ga_trainer.checkpoint.exporting.save_file",
        lambda tensors, path, **kwargs: sizes.append(sum(value.nbytes for value in tensors.values())),
    )
    export(tmp_path / "adapter", tmp_path / "merged", merge=True, base_model=tmp_path / "base")
    assert len(sizes) > 1 and max(sizes) <= 100_000


# --- misuse ---------------------------------------------------------------------------------------------------------


def refused(message: str, checkpoint: Path, out: Path, **kwargs) -> None:
    """An error, and nothing left behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        export(checkpoint, out, **kwargs)
    assert sorted(out.parent.iterdir()) == before


def test_a_folder_in_the_way(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    refused("exists already", trained[1], tmp_path / "out")
    assert (tmp_path / "out/mine.txt").read_text() == "precious"


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_missing_files(trained, file, tmp_path):
    checkpoint = Path(shutil.copytree(trained[1], tmp_path / "checkpoint"))
    (checkpoint / file).unlink()
    refused(f"has no {file}. Pass a `checkpoint-N`", checkpoint, tmp_path / "out")


def test_a_truncated_adapter(trained, tmp_path):
    checkpoint = Path(shutil.copytree(trained[1], tmp_path / "checkpoint"))
    os.truncate(checkpoint / "adapter_model.safetensors", 1000)
    refused("adapter_model.safetensors is damaged.*Use another", checkpoint, tmp_path / "out")


def test_a_truncated_config(trained, tmp_path):
    checkpoint = Path(shutil.copytree(trained[1], tmp_path / "checkpoint"))
    os.truncate(checkpoint / "adapter_config.json", 100)
    refused("adapter_config.json is damaged.*Use another", checkpoint, tmp_path / "out")
    refused("adapter_config.json is damaged.*Use another", checkpoint, tmp_path / "out", merge=True)


def test_a_trained_half_of_tied_weights(tmp_path):
    """PEFT unties them; in the base's files the head would follow the embedding."""
    adapted("llama_tied", tmp_path, modules_to_save=["embed_tokens"])
    arguments = {"merge": True, "base_model": tmp_path / "base"}
    refused("holds a trained model.embed_tokens.*merge_and_unload", tmp_path / "adapter", tmp_path / "out", **arguments)


def test_a_lora_on_half_of_tied_weights(tmp_path):
    """Nothing that is tied can hold it; what the message says, an untied copy of the base, can."""
    expected = adapted("llama_tied", tmp_path, target_modules=["q_proj", "lm_head"])
    arguments = {"merge": True, "base_model": tmp_path / "base"}
    message = "has a LoRA on lm_head.*would change both.*tie_word_embeddings=False"
    refused(message, tmp_path / "adapter", tmp_path / "out", **arguments)

    untied = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    untied.config.tie_word_embeddings = False
    untied.save_pretrained(tmp_path / "untied")
    export(tmp_path / "adapter", tmp_path / "out", merge=True, base_model=tmp_path / "untied")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # float32, an adapter as large as the weights: logits of order 10
    assert (logits(merged) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_base_model_that_is_not_there(trained, tmp_path):
    refused("nowhere is neither a folder nor", trained[1], tmp_path / "out", merge=True, base_model="nobody/nowhere")


def test_a_base_model_without_safetensors(trained, tmp_path):
    (tmp_path / "base").mkdir()
    refused("has no .safetensors file", trained[1], tmp_path / "out", merge=True, base_model=tmp_path / "base")


def test_a_quantized_base_model(trained, tmp_path):
    base = Path(shutil.copytree(trained[0], tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    refused(
        "is quantized.*unquantized model as `base_model`", trained[1], tmp_path / "out", merge=True, base_model=base
    )


def test_another_base_model(trained, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "base")
    refused("has no counterpart", trained[1], tmp_path / "out", merge=True, base_model=tmp_path / "base")


def test_a_base_of_other_shapes(trained, tmp_path):
    base = Path(shutil.copytree(trained[0], tmp_path / "base"))
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = tiny_model()
    model.config.hidden_size = 64
    other = get_peft_model(type(model)(model.config), config)
    other.save_pretrained(tmp_path / "adapter")
    refused(r"q_proj .*\[48, 64\].*\[48, 48\]", tmp_path / "adapter", tmp_path / "out", merge=True, base_model=base)


def test_the_exported_adapter_has_the_checkpoints_tensors(trained, tmp_path):
    export(trained[1], tmp_path / "adapter")
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "adapter", trained[1]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
