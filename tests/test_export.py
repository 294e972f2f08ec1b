"""`checkpoint.export`: from a checkpoint to a bare adapter or a merged model, without a trainer."""

import ast
import json
import os
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from launching import PYTHON, environment
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import lora_config, moved_at_random, sft_arguments, tiny_batches, tiny_model, word_problems
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ga_trainer import LoRAGAArguments, LoRAGASFTConfig, LoRAGASFTTrainer, initialize_lora_ga
from lora_ga_trainer.checkpoint import export
from lora_ga_trainer.checkpoint.companions import companions
from lora_ga_trainer.checkpoint.mergeable import COMPUTED, REFUSED, WITHOUT_EFFECT, check_mergeable

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
    command = [PYTHON, "-m", "lora_ga_trainer.cli", "export", "--checkpoint_dir", str(checkpoint)]

    def run(*options: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *options], env=environment(), capture_output=True, text=True)

    done = run("--out", str(tmp_path / "merged"), "--merge")
    assert done.returncode == 0 and "holds the merged model" in done.stdout
    assert (
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - logits(with_peft(base, checkpoint))
    ).abs().max() < 1e-5
    again = run("--out", str(tmp_path / "merged"))
    assert again.returncode == 1 and "exists already. Choose another folder" in again.stderr
    unknown = run("--out", str(tmp_path / "x"), "--bogus", "1")
    assert unknown.returncode == 1 and "There is no option '--bogus'" in unknown.stderr
    assert "Traceback" not in again.stderr + unknown.stderr


def adapted(family: str, folder: Path, dtype=torch.float32, offset=True, **lora) -> torch.Tensor:
    """Save a tiny base in two files and a LoRA-GA adapter for it; the logits that they give together."""
    base = tiny_model(family, dtype)
    base.save_pretrained(folder / "base", max_shard_size="100kB")
    model = get_peft_model(base, lora_config(**lora))
    initialize_lora_ga(
        model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3, ga_offset=offset), disable_tqdm=True
    )
    moved_at_random(model)
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

    def snapshot_download(name, *, revision, ignore_patterns):
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
        "lora_ga_trainer.checkpoint.base_files.save_file",
        lambda tensors, path, **kwargs: sizes.append(sum(value.nbytes for value in tensors.values())),
    )
    export(tmp_path / "adapter", tmp_path / "merged", merge=True, base_model=tmp_path / "base")
    assert len(sizes) > 1 and max(sizes) <= 100_000


# --- what goes along --------------------------------------------------------------------------------------------------


def file_names_of_tokenizers() -> set[str]:
    """Those in the `VOCAB_FILES_NAMES` of every tokenizer of transformers."""
    names = set()
    for source in Path(transformers.__file__).parent.glob("models/*/tokenization*.py"):
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "VOCAB_FILES_NAMES":
                found = [value.value for value in node.value.values if isinstance(value, ast.Constant)]
                names |= {name for name in found if "/" not in name}
    assert {"tokenizer.json", "source.spm", "spiece.model", "merges.txt", "bpe.codes", "dict.txt"} <= names
    return names


OF_PROCESSORS = {
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool_use.jinja", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "audio_tokenizer_config.json", "tekken.json",
    "qformer_tokenizer/tokenizer_config.json", "qformer_tokenizer/vocab.txt",  # InstructBLIP's second tokenizer
}  # fmt: skip
STAY_BEHIND = {
    "README.md", ".gitattributes", "all_results.json", "trainer_state.json", "training_args.bin", "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_1.pth", "latest", "zero_to_fp32.py", "stand_in_dev.jsonl",
    "index.html", "alignment.png",
    "lora_ga.json", "lora_ga.tensors", "lora_ga.safetensors", "lora_ga_files.json", "pytorch_model.bin", "consolidated.00.pth",
    "global_step4/mp_rank_00_model_states.pt", "optimizer_0/__0_0.distcp", "runs/events.out.tfevents", "mine/notes.txt",
    "checkpoint-2/tokenizer_config.json", "checkpoint-2/adapter_model.safetensors",
}  # fmt: skip


def test_what_a_tokenizer_or_processor_saved_goes_along(trained, tmp_path):
    base, checkpoint = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in trained)
    wanted = file_names_of_tokenizers() | OF_PROCESSORS
    for name in wanted | STAY_BEHIND:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        if not (checkpoint / name).exists():
            (checkpoint / name).write_text("{}")
    assert wanted <= set(map(str, companions(checkpoint)))
    (base / "LICENSE").write_text("terms")
    (base / "vocab.json").write_text("the base's own")
    (checkpoint / "config.json").write_text("no model's")
    export(checkpoint, tmp_path / "adapter")
    export(checkpoint, tmp_path / "merged", merge=True, base_model=base)
    ours = {"adapter": {"adapter_config.json", "adapter_model.safetensors"}}
    ours["merged"] = {"config.json", "generation_config.json", "model.safetensors", "LICENSE"}
    for folder in ("adapter", "merged"):
        out = tmp_path / folder
        assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == wanted | ours[folder]
        assert (out / "vocab.json").read_text() == "{}", "the checkpoint's goes first"
    assert (tmp_path / "merged/config.json").read_text() == (base / "config.json").read_text()


# --- what cannot be merged ---------------------------------------------------------------------------------------------


def test_every_field_of_pefts_configuration_is_decided_on():
    """A new field of PEFT's `LoraConfig` may change what an adapter computes: decide on it in `mergeable`."""
    decided = [*COMPUTED, *WITHOUT_EFFECT, *REFUSED, "init_lora_weights"]
    assert {option.name for option in fields(LoraConfig)} <= set(decided)
    # VeLoRA changes only how the gradient is found: LoRA-GA refuses to train it, and merging what it trained is right
    assert {name for name in decided if decided.count(name) > 1} == {"velora_config"}


def test_the_default_configuration_merges():
    check_mergeable(json.loads(json.dumps(LoraConfig(r=4, target_modules=["q_proj"]).to_dict(), default=list)))
    check_mergeable({"peft_type": "LORA", "not_yet_known": None, "nor_this": False, "init_lora_weights": "gaussian"})


@pytest.mark.parametrize("name", [*sorted(set(REFUSED) - set(WITHOUT_EFFECT)), "not_yet_known"])
def test_a_field_that_cannot_be_merged(name):
    with pytest.raises(ValueError, match=rf"The adapter's `{name}` is \['x'\].*Export the adapter alone"):
        check_mergeable({"peft_type": "LORA", name: ["x"]})


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_a_start_that_changed_the_base(start):
    with pytest.raises(ValueError, match=f"`init_lora_weights` is '{start}', which changed the base weights"):
        check_mergeable({"peft_type": "LORA", "init_lora_weights": start})


def test_another_kind_of_adapter_is_not_merged():
    with pytest.raises(ValueError, match="type is 'ADALORA', but only LoRA is merged"):
        check_mergeable(AdaLoraConfig(total_step=10).to_dict() | {"peft_type": "ADALORA"})


def test_replicated_layers(tmp_path):
    adapted("llama", tmp_path, layer_replication=[[0, 1], [0, 1]])  # every name is found in the base's files
    arguments = {"merge": True, "base_model": tmp_path / "base"}
    refused("`layer_replication` is .*share their base weights", tmp_path / "adapter", tmp_path / "out", **arguments)


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


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_a_resized_vocabulary(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    model = get_peft_model(base, lora_config(target_modules=["q_proj"]))
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)
    model.save_pretrained(tmp_path / "adapter")
    message = r"a vocabulary of 70 tokens, the base model's files have 64.*resize_token_embeddings\(70\)"
    refused(message, tmp_path / "adapter", tmp_path / "out", merge=True)


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
