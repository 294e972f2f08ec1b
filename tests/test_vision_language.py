"""Vision-language models that TRL's SFTTrainer trains, on rows with one picture, several, none, and all of them mixed."""

import copy
import re
from functools import cache
from tempfile import TemporaryDirectory

import dense_reference
import pytest
import torch
from launching import torchrun
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_probe import estimated_gradients, largest_relative_error
from tiny import lora_config, sft_arguments
from tiny_vision import FAMILIES, rows, vision_model
from transformers.utils import is_torchvision_available
from trl import SFTConfig, SFTTrainer

from lora_ga_trainer import LoRAGAArguments, LoRAGASFTConfig, LoRAGASFTTrainer, initialize_lora_ga
from lora_ga_trainer.checkpoint import export
from lora_ga_trainer.cli.__main__ import main
from lora_ga_trainer.initialization import attach_lora_ga

EXACT = LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact")
every_family = pytest.mark.parametrize("family", list(FAMILIES))
MIXED = (1, 2, 0)
TARGETS = {
    "all": "all-linear",
    "names": ["q_proj", "v_proj"],
    "language": r".*(language|text)_model.*\.(q_proj|down_proj)",
}


def targets_of(family, targets):
    """PEFT takes no wrapper of a linear layer, as Gemma 4's vision tower has, but the layer in it."""
    return ["q_proj.linear", "v_proj.linear"] if (family, targets) == ("gemma4", "names") else TARGETS[targets]


def data(family, pictures=MIXED):
    """PaliGemma's processor takes no text without a picture: TRL cannot give it a completion of its own."""
    return rows((1,), whole=True) if family == "paligemma" else rows(pictures)


def trainer_of(family, output_dir, train_dataset, cls=LoRAGASFTTrainer, targets="all-linear", **options):
    model, processor = vision_model(family)
    config = LoRAGASFTConfig if cls is LoRAGASFTTrainer else SFTConfig
    arguments = sft_arguments(output_dir, **{"max_length": None, "max_steps": 2} | options)
    if cls is SFTTrainer:
        arguments = {name: value for name, value in arguments.items() if not name.startswith("ga_")}
    return cls(
        model=model,
        args=config(**arguments),
        train_dataset=train_dataset,
        processing_class=processor,
        peft_config=lora_config(r=2, target_modules=targets),
    )


@cache
def batches_of(family, sizes=(3, 5), pictures=MIXED):
    """As TRL's own collator makes them. Not to be changed: they are the same for all."""
    with TemporaryDirectory() as unused:
        trainer = trainer_of(family, unused, data(family, pictures), SFTTrainer)
    found, examples = [], list(trainer.train_dataset)
    for size in sizes:
        chosen, examples = examples[:size], examples[size:]
        found.append(dict(trainer.data_collator(chosen)))
    return found


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("targets", list(TARGETS))
@every_family
def test_the_gradient_is_autograds_and_the_start_is_exact(family, targets):
    batches = batches_of(family)
    base, _ = vision_model(family)
    model = get_peft_model(
        copy.deepcopy(base), lora_config(r=2, target_modules=targets_of(family, targets), task_type=None)
    )
    found = estimated_gradients(model, batches, EXACT)
    reached = {name: gradient for name, gradient in found.items() if gradient.any()}
    # float32 through both models, summed in another order
    assert largest_relative_error(reached, dense_reference.autograd_gradients(base, reached, batches)) < 1e-5
    report = initialize_lora_ga(model, batches, EXACT, disable_tqdm=True)
    assert torch.equal(logits(model, batches[0]), logits(base, batches[0]))
    assert report.alignment.keys() == reached.keys()
    # what LLaVA leaves out of its vision tower, `test_training_options`; the others use all of theirs
    assert set(report.idle) == found.keys() - reached.keys()
    assert not report.idle or (family.startswith("llava") and all("vision" in name for name in report.idle))
    parts = {bool(re.search("vis", name)) for name in report.alignment}
    assert parts == ({False} if targets == "language" else {True, False} if targets == "all" else parts)


@every_family
def test_it_trains_and_resumes_and_stock_peft_loads_and_merges_what_was_saved(family, tmp_path):
    trainer = trainer_of(family, tmp_path, data(family), learning_rate=1e-2)
    batch = dict(trainer.data_collator(list(trainer.train_dataset)[:3]))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    base, _ = vision_model(family)
    base.save_pretrained(tmp_path / "base")
    resumed = get_peft_model(copy.deepcopy(base), lora_config(r=2, target_modules="all-linear"))
    attach_lora_ga(resumed, trainer.args)
    resumed.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    of_resumed = dict(resumed.named_parameters())
    assert all(torch.equal(value, of_resumed[name]) for name, value in trainer.model.named_parameters())

    trained, untrained = logits(trainer.model, batch), logits(base, batch)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    tolerance = 1e-5 * untrained.abs().max()  # float32 through a few layers, and merging rounds once more
    assert (logits(loaded, batch) - trained).abs().max() < tolerance
    export(tmp_path / "adapter", tmp_path / "merged", merge=True, base_model=tmp_path / "base")
    merged = type(vision_model(family)[0]).from_pretrained(tmp_path / "merged")
    assert (logits(merged, batch) - trained).abs().max() < tolerance
    assert (trained - untrained).abs().max() > 1000 * tolerance, "training changed nothing, so this shows nothing"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "paligemma"])
def test_rows_of_text_train_the_language_model(family, tmp_path):
    trainer = trainer_of(family, tmp_path, rows((0,)))
    trainer.train()
    report = trainer.lora_ga_report
    assert report.alignment and all(re.search("(language|text)_model", name) for name in report.alignment)
    assert report.idle and not any(re.search("(language|text)_model", name) for name in report.idle)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_examples_are_counted_and_not_their_pictures(family, tmp_path):
    """In Qwen's batches the rows of pixels are those of all pictures, one after another. Only 1 of the sizes divides seven."""
    found = []
    for size in (1, 3):
        trainer = trainer_of(
            family, tmp_path / str(size), data(family), ga_num_samples=7, ga_batch_size=size, ga_estimator="exact"
        )
        trainer.train()
        found.append(trainer.lora_ga_report)
    first, other = found
    assert other.num_items == first.num_items
    # sums of the same examples in another order, and pictures padded to others
    assert other.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-4)


def qwen_with_its_own_processor():
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    model, without_videos = vision_model("qwen2_5_vl")
    images, tokenizer = without_videos.image_processor, without_videos.tokenizer
    videos = Qwen2VLVideoProcessor(patch_size=images.patch_size, merge_size=2)
    return model, Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=without_videos.chat_template)


@pytest.mark.parametrize(
    ("make", "tower"),
    [
        (lambda: vision_model("llava"), "vision_tower"),
        pytest.param(
            qwen_with_its_own_processor,
            "visual",
            marks=pytest.mark.skipif(
                not is_torchvision_available(), reason="its processor needs torchvision, which is not installed"
            ),
        ),
    ],
    ids=["llava", "qwen2_5_vl"],
)
def test_the_command_line_needs_only_the_model_and_rows_with_pictures(make, tower, tmp_path):
    """And options that make it short, on a CPU."""
    model, processor = make()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    data("llava").to_parquet(tmp_path / "rows.parquet")
    words = ["--model_name_or_path", str(tmp_path / "base"), "--dataset_path", str(tmp_path / "rows.parquet")]
    short = [
        "--max_steps",
        "2",
        "--use_cpu",
        "true",
        "--bf16",
        "false",
        "--max_length",
        "null",
        "--ga_num_samples",
        "8",
    ]
    main(["sft", *words, "--output_dir", str(tmp_path / "out"), *short])
    loaded = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert any(tower in name for name, _ in loaded.named_modules() if "lora_A" in name)
    assert (tmp_path / "out" / "processor_config.json").is_file()


def test_what_an_export_loses_is_not_measured_with_pictures(tmp_path):
    """And nothing is written before that is known."""
    base, _ = vision_model("llava")
    base.save_pretrained(tmp_path / "base")
    config = lora_config(r=2, target_modules=["q_proj"], task_type=None, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    rows((0,)).remove_columns("images").to_parquet(tmp_path / "rows.parquet")
    words = ["--checkpoint_dir", tmp_path / "adapter", "--base_model", tmp_path / "base", "--out", tmp_path / "out"]
    words += ["--rank", "1", "--dataset_path", tmp_path / "rows.parquet"]
    with pytest.raises(SystemExit, match="is of the type 'llava', but only decoder-only language models are measured"):
        main(["export", *map(str, words)])
    assert not (tmp_path / "out").exists()


def test_names_of_older_versions_are_merged_where_the_files_have_them(tmp_path):
    """transformers renames a model's parts as it loads them; an adapter may be older than that."""
    base, _ = vision_model("llava")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        base, lora_config(r=2, target_modules=TARGETS["language"], task_type=None, init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    batch = batches_of("llava", (2,))[0]
    expected = logits(model, batch)
    file = tmp_path / "adapter/adapter_model.safetensors"
    older = {
        name.replace("model.model.language_model.", "model.language_model.model."): value
        for name, value in load_file(file).items()
    }
    assert older.keys().isdisjoint(load_file(file))
    save_file(older, file, metadata={"format": "pt"})
    export(tmp_path / "adapter", tmp_path / "merged", merge=True, base_model=tmp_path / "base")
    merged = type(vision_model("llava")[0]).from_pretrained(tmp_path / "merged")
    assert (logits(merged, batch) - expected).abs().max() < 1e-5 * expected.abs().max()  # float32, W + ΔW rounded once


def test_with_pali_gemma_trl_itself_takes_no_completion(tmp_path):
    """To go, with `data`'s exception, when it does."""
    trainer = trainer_of("paligemma", tmp_path, rows((1,)), SFTTrainer)
    with pytest.raises(ValueError, match="`images` are expected"):
        trainer.train()


def test_pictures_on_two_processes(tmp_path):
    """What is found is what one process finds, though only one of two may have pictures in a batch; and both train."""
    import pictures_worker  # which imports this module

    first, second = torchrun("pictures_worker.py", tmp_path)
    for family in pictures_worker.FAMILIES:
        report = pictures_worker.found_by(family, tmp_path / "alone" / family)
        for found in (first[family], second[family]):
            assert found.num_items == report.num_items and found.idle == report.idle
            # float32, in another order, and padded to others
            assert found.gradient_norm == pytest.approx(report.gradient_norm, rel=1e-4)
            assert found.alignment == pytest.approx(report.alignment, rel=1e-3)
