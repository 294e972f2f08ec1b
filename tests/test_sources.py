"""Where data come from: the file or folder that was named, and no other."""

import json
from pathlib import Path

import pytest
from datasets import load_dataset
from evaluation import gsm8k, mt_bench
from evaluation.arguments import MTBenchArguments
from evaluation.humaneval import read_problems

from lora_ga_trainer.cli.sources import hub_items, load_named, local_items
from lora_ga_trainer.distributed.launches import Launch, check_resume_path

# each name, read as a pattern, would match the second folder as well or instead
PAIRS = [
    ("run[2]", "run2"),
    ("set*", "setA"),
    ("what?", "what1"),
    ("[!a]", "b"),
    (".a[1]", ".a1"),
    ("__s*__", "__sA__"),
]


@pytest.fixture(params=PAIRS, ids=[pair[0] for pair in PAIRS])
def folders(request, tmp_path):
    for name in request.param:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in request.param]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_name_is_no_pattern(folders, suffix):
    source = folders[0].parent / "rows.jsonl"
    for folder in folders:
        source.write_text(json.dumps({"text": folder.name}) + "\n")
        rows = load_dataset("json", data_files=str(source), split="train")
        path = folder / f"train{suffix}"
        {".jsonl": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}[suffix](path)
    for folder in folders:
        assert local_items(folder / f"train{suffix}", ("text",))["text"][:] == [folder.name]


def test_the_files_of_evaluations_and_recipes(folders):
    """Whatever option the path comes from."""

    def write(name, *rows):
        for folder, row in zip(folders, rows, strict=True):
            (folder / name).write_text(json.dumps(row) + "\n")
        return str(folders[0] / name)

    gsm = write("gsm.jsonl", *({"question": name, "answer": "#### 1"} for name in "ab"))
    assert gsm8k.problems(evaluation_file=gsm)["test"]["question"][:] == ["a"]
    problem = {"prompt": "def f():", "entry_point": "f", "test": ""}
    problems = write("humaneval.jsonl", *(problem | {"task_id": name} for name in "ab"))
    assert read_problems(Path(problems))["task_id"][:] == ["a"]
    questions = write("mt.jsonl", *({"question_id": n, "category": "math", "turns": ["q", "r"]} for n in (1, 2)))
    references = write("ref.jsonl", *({"question_id": 1, "choices": [{"turns": [name, "s"]}]} for name in "ab"))
    args = MTBenchArguments(evaluation_file=questions, reference_file=references)
    loaded = mt_bench.load_questions(args)
    assert [question["question_id"] for question in loaded] == [1]
    assert mt_bench.load_references(args, loaded) == {1: ("a", "s")}


def test_a_folder_as_a_data_set_that_would_be_read_as_a_pattern(folders):
    for folder in folders:
        (folder / "train.jsonl").write_text(json.dumps({"text": folder.name}) + "\n")
    for load in (lambda name: load_named(name, "r"), lambda name: hub_items(name, None, "train", (), "r")):
        with pytest.raises(ValueError, match="as a pattern and would read other folders. Rename it"):
            load(str(folders[0]))
    assert load_named(str(folders[1]), "r", split="train")["text"][:] == [folders[1].name]


def test_a_chain_of_archives_is_no_file_name(tmp_path):
    (tmp_path / "a::b.jsonl").write_text('{"text": "w1"}\n')
    with pytest.raises(ValueError, match="has '::' in its name"):
        local_items(tmp_path / "a::b.jsonl", ())


def test_a_damaged_file_in_a_folder_is_told(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "w1"}\n{"text": \n')
    with pytest.raises(ValueError, match="cannot be loaded.*JSON.*Look at it"):
        load_named(str(tmp_path), "Look at it.")


def test_deepspeed_resumes_only_from_a_folder_that_is_no_pattern(tmp_path):
    with pytest.raises(ValueError, match="DeepSpeed treats.*Rename the folder"):
        check_resume_path(Launch("ZeRO-2", 2), tmp_path / "run[2]/checkpoint-4")
    check_resume_path(Launch("ZeRO-2", 2), tmp_path / "run2/checkpoint-4")
    check_resume_path(Launch("DDP", 2), tmp_path / "run[2]/checkpoint-4")
