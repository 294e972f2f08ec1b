"""Every row of docs/troubleshooting.md: the mistake is made, what is said is what the table says, and nothing is harmed."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from mistakes import MISTAKES, World, finish_a_run, said_by_one_process, said_by_two_processes, what_is_said
from tiny import lora_config, sft_arguments, tiny_model, word_problems, word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_ga_trainer import LoRAGASFTConfig, LoRAGASFTTrainer
from lora_ga_trainer.checkpoint.completeness import check_complete, last_complete

PAGE = Path(__file__).resolve().parents[1] / "docs/troubleshooting.md"
ROW = re.compile(r"^\| (?P<id>[A-Z]\d\d) \| (?P<done>.+?) \| (?P<said>.+?) \| (?P<remedy>.+?) \|$", re.MULTILINE)
ROWS = {row["id"]: row for row in ROW.finditer(PAGE.read_text(encoding="utf-8"))}
MADE_BY_MISTAKES = {"saved", "base", "model", "plain"}
"""Folders that a mistake begins with."""
BEYOND_STEP_0 = {"D13", "D14", "C14", "C25"}
"""What is only warned of; and what has taken up a checkpoint's step before it reads the optimizer's state."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    finish_a_run(folder / "finished")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))  # NaN too


def pattern(documented: str) -> re.Pattern:
    """ "…" stands for anything; a bar is written `\\|` in a table."""
    return re.compile(".*".join(map(re.escape, documented.replace("\\|", "|").split("…"))), re.DOTALL)


@pytest.mark.parametrize("name", MISTAKES)
def test_what_the_table_says_is_what_is_said(name, shared, tmp_path, caplog):
    world, before = World(tmp_path, shared), contents(shared / "finished")
    said = what_is_said(MISTAKES[name], world)
    assert pattern(ROWS[name]["said"]).fullmatch(said), f"{name} says: {said}"

    # bad input cost nothing, and harmed nothing
    assert contents(shared / "finished") == before
    assert all(same_bits(parameter, copy) for parameter, copy in world.weights)
    assert all(trainer.state.global_step == 0 for trainer in world.trainers) or name in BEYOND_STEP_0
    left = {path for path in tmp_path.glob("*") if path.name not in MADE_BY_MISTAKES}
    assert not [path for folder in left for pattern in ("*.safetensors", "*.part") for path in folder.rglob(pattern)]
    assert not list(tmp_path.glob(".*"))  # what `export` writes to until it is done


def test_every_row_is_a_mistake_of_the_tests_and_the_other_way_round():
    assert list(ROWS) == list(MISTAKES)
    assert len(ROWS) >= 40
    written = PAGE.read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("| ") and line[2:3].isupper() and line[3:5].isdigit() for line in written) == len(ROWS)


def test_a_table_that_says_something_else_is_noticed():
    assert not pattern("`r` is …, but must be 8.").fullmatch("`r` is 7, but must be 9.")
    assert pattern("a … c").fullmatch("a b\nb c") and not pattern("a … c").fullmatch("a b c d")


def test_after_a_full_disk_the_last_complete_checkpoint_goes_on(shared):
    """The same numbers as if the disk had never been full."""
    said_by_one_process(shared)
    out = shared / "one"
    with pytest.raises(ValueError, match="no readable lora_ga_files.json"):
        check_complete(out / "checkpoint-4")
    check_complete(out / "checkpoint-2")
    assert last_complete(out) == out / "checkpoint-2"

    def losses(folder: Path, resume: bool | None) -> list[float]:
        trainer = LoRAGASFTTrainer(
            tiny_model(), LoRAGASFTConfig(**sft_arguments(folder, save_strategy="steps", save_steps=2)),
            train_dataset=word_problems(), processing_class=word_tokenizer(), peft_config=lora_config(),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    # another process summed in another order: float32
    assert losses(out, resume=True) == pytest.approx(losses(shared / "again", resume=None), rel=1e-5)
    check_complete(out / "checkpoint-4")


def test_a_process_that_dies_in_the_estimation_leaves_nothing(shared):
    said_by_two_processes(shared)  # which waits two minutes at most
    assert not list((shared / "two").rglob("*.safetensors"))


# --- what is no mistake ---------------------------------------------------------------------------------------------------


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Knows every text: a token for each byte of UTF-8."""
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def test_texts_of_every_alphabet_and_some_that_are_empty(tmp_path):
    """Right-to-left, combining, outside the basic plane, invisible, NUL; an empty prompt, an empty completion."""
    texts = ["שלום עולם", "e\u0301 ñ ß", "👩‍👩‍👧 🏳️‍🌈", "\u200b\ufeff\u202e", "a\x00b", "一二三", ""]
    rows = [{"prompt": text, "completion": texts[-1 - index]} for index, text in enumerate(texts)]
    model = tiny_model()
    model.resize_token_embeddings(260)
    trainer = LoRAGASFTTrainer(
        model, LoRAGASFTConfig(**sft_arguments(tmp_path, max_steps=2)), train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(), peft_config=lora_config(),
    )  # fmt: skip
    for row, example in zip(rows, trainer.train_dataset, strict=True):
        assert byte_tokenizer().decode(example["input_ids"]) == row["prompt"] + row["completion"] + "</s>"
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.lora_ga_report.num_items == sum(len(row["completion"].encode()) + 1 for row in rows) - 1
    # the empty prompt's first token is predicted by nothing


def test_a_stream_shorter_than_the_training_begins_anew(tmp_path):
    data = word_problems().select(range(6)).to_iterable_dataset()
    trainer = LoRAGASFTTrainer(
        tiny_model(), LoRAGASFTConfig(**sft_arguments(tmp_path, max_steps=5)), train_dataset=data,
        processing_class=word_tokenizer(), peft_config=lora_config(),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 5 and trainer.state.epoch > 2
