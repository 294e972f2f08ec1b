"""Exact match on the number after `####`, and what all benchmarks share: resuming, batching, the command line."""

import copy
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from launching import PYTHON, ended_well, environment
from peft import get_peft_model
from tiny import letter_tokenizer, lora_config, tiny_batches, tiny_model
from transformers import AutoModelForCausalLM

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.evaluation import generation
from lora_ga_trainer.evaluation.__main__ import main
from lora_ga_trainer.evaluation.generation import before_stop, complete, generate
from lora_ga_trainer.evaluation.gsm8k import GSM8KArguments, evaluate, final_number, load_items, score
from lora_ga_trainer.evaluation.loading import load
from lora_ga_trainer.evaluation.results import evaluation_settings, finished_lines, open_evaluation, weights_digest

DDP = Path(__file__).parents[1] / "accelerate_configs/cpu/ddp.yaml"


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
    items = load_items(GSM8KArguments(offline=True))
    results = score(items, [item["answer"] for item in items])
    assert (results["right"], results["count"], results["score"]) == (100, 100, 1.0)
    wrong = score(items, [f"#### {final_number(item['answer']) + 1}" for item in items])
    assert wrong["right"] == 0
    # what cannot be parsed is wrong, and is not equal to another that cannot
    assert score(items[:1], ["no number at all"])["right"] == 0


def test_formats_do_not_matter():
    items = [{"question": "q", "answer": "#### 1,000"}] * 3
    assert score(items, [" #### 1000", "#### $1,000.00", "#### 1000.5"])["right"] == 2


@pytest.fixture
def problems(tmp_path):
    items = [{"question": f"w{i} " * (1 + i), "answer": f"w1 #### {i}"} for i in range(7)]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_evaluate_writes_every_prediction(problems, tokenizer, tmp_path):
    model = tiny_model().train()
    args = GSM8KArguments(evaluation_file=str(problems), max_new_tokens=4, evaluation_batch_size=3)
    directory = open_evaluation(tmp_path, "gsm8k", evaluation_settings({}, args))
    results = evaluate(model, tokenizer, directory, args)
    assert json.loads((directory / "results.json").read_text()) == results
    assert [prediction["question"] for prediction in results["predictions"]] == [f"w{i} " * (1 + i) for i in range(7)]
    # greedily, one by one, without a batch: the same tokens
    for prediction in results["predictions"]:
        inputs = tokenizer(f"Q: {prediction['question']}\nA:", return_tensors="pt")
        output = model.eval().generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
        assert prediction["completion"] == tokenizer.decode(output, skip_special_tokens=True)


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
    assert text.split() == words[: end + 1], "stopped there; the word itself is no special one to leave out"
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(words[end])
    (text,) = generate(model, tokenizer, ["w1 w2"], 6)
    assert text.split() == words[: end + 1]


def test_the_mode_of_the_model_and_the_padding_side_come_out_as_they_were(tokenizer):
    model, side = tiny_model().train(), tokenizer.padding_side
    generate(model, tokenizer, ["w1 w2", "w3"], max_new_tokens=2)
    assert model.training and tokenizer.padding_side == side


def test_an_interrupted_evaluation_goes_on(tokenizer, tmp_path, monkeypatch):
    model, file = tiny_model(), tmp_path / "completions.jsonl"
    prompts = {str(i): f"w{i} w{i + 1}" for i in range(6)}
    options = {"max_new_tokens": 3, "batch_size": 2}
    whole = complete(model, tokenizer, prompts, tmp_path / "whole.jsonl", **options)

    asked = []
    real = generation.generate

    def generate_twice(model, tokenizer, batch, *rest):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(batch)
        return real(model, tokenizer, batch, *rest)

    monkeypatch.setattr(generation, "generate", generate_twice)
    with pytest.raises(KeyboardInterrupt):
        complete(model, tokenizer, prompts, file, **options)
    with file.open("a") as half:  # killed in the middle of a line
        half.write('{"id": "5", "prom')

    monkeypatch.setattr(generation, "generate", lambda *a: asked.extend(a[2]) or real(*a))
    changed = prompts | {"0": "w9 w9"}  # an answer to another prompt is no answer to this one
    found = complete(model, tokenizer, changed, file, **options)
    assert sorted(asked) == sorted([*prompts.values(), "w9 w9"]) or len(asked) == 6
    assert {name: found[name] for name in "12345"} == {name: whole[name] for name in "12345"}
    assert len(finished_lines(file)) == len(asked)


def test_a_completion_ends_before_the_first_stop_string():
    assert before_stop("one two three", ("three", "two")) == "one "
    assert before_stop("one two three", ("four",)) == "one two three" == before_stop("one two three", ())


def test_another_model_or_another_question_is_another_folder(problems, tmp_path):
    args = GSM8KArguments(evaluation_file=str(problems))
    first = open_evaluation(tmp_path, "gsm8k", evaluation_settings({"weights": "a"}, args))
    assert first == open_evaluation(tmp_path, "gsm8k", evaluation_settings({"weights": "a"}, args))
    faster = GSM8KArguments(evaluation_file=str(problems), evaluation_batch_size=2)
    assert first == open_evaluation(tmp_path, "gsm8k", evaluation_settings({"weights": "a"}, faster))
    assert first != open_evaluation(tmp_path, "gsm8k", evaluation_settings({"weights": "b"}, args))
    problems.write_text(problems.read_text() + "\n")
    assert first != open_evaluation(tmp_path, "gsm8k", evaluation_settings({"weights": "a"}, args))


def test_the_digest_is_that_of_the_weights(tmp_path):
    tiny_model().save_pretrained(tmp_path / "a")
    tiny_model().save_pretrained(tmp_path / "b")
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "b")
    assert weights_digest(tmp_path / "a") != weights_digest(tmp_path / "b")
    with pytest.raises(ValueError, match="no .safetensors file"):
        weights_digest(tmp_path)


def test_the_digest_knows_the_scaling_and_not_where_the_base_is(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    digests = []
    for alpha, base in ((16, "a"), (16, "b"), (32, "a")):
        config = {"lora_alpha": alpha, "base_model_name_or_path": base}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        digests.append(weights_digest(tmp_path))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"q": "a", "answer": "#### 1"}', "no column 'question', only q, answer"),
        ('{"question": "a", "answer": "1"}', "The answer of problem 1 has no number after '####'"),
    ],
)
def test_files_that_cannot_be_scored(content, message, tmp_path):
    (tmp_path / "items.jsonl").write_text(content + "\n")
    with pytest.raises(ValueError, match=message):
        load_items(GSM8KArguments(evaluation_file=str(tmp_path / "items.jsonl")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offline": True, "evaluation_file": "x.jsonl"}, "Both `offline` and `evaluation_file`"),
        ({"evaluation_file": "x.jsonl"}, "There is no file x.jsonl"),
        ({"evaluation_file": "x.txt"}, "x.txt must end in one of .jsonl"),
    ],
)
def test_contradictory_options(options, message):
    with pytest.raises(ValueError, match=message):
        load_items(GSM8KArguments(**options))


def test_numbers_out_of_range():
    for name in ("evaluation_limit", "evaluation_batch_size", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"`{name}` is 0, but must be at least 1"):
            GSM8KArguments(**{name: 0})


@pytest.mark.parametrize("resized", [False, True])
def test_an_adapter_for_more_tokens_than_the_base_has(resized, tmp_path):
    """Base and tokenizer are those of the adapter, as its model card loads them."""
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer = letter_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    if resized:
        tokenizer.add_tokens(["<new>"])
        base.resize_token_embeddings(70)
    model = get_peft_model(base, lora_config())
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(), disable_tqdm=True)
    model.eval().save_pretrained(tmp_path / "adapter")
    if resized:
        with pytest.raises(ValueError, match="No tokenizer can be loaded from .*adapter"):
            load(str(tmp_path / "base"), "main", str(tmp_path / "adapter"), "float32")
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded, found = load(str(tmp_path / "base"), "main", str(tmp_path / "adapter"), "float32")
    assert ("<new>" in found.get_vocab()) == resized
    ids = tiny_batches()[0]["input_ids"]
    with torch.no_grad():
        assert (loaded(ids).logits - model(ids).logits).abs().max() < 1e-5  # float32, see test_checkpoint


def command_line(*arguments, cwd):
    launcher = [PYTHON, "-m", "accelerate.commands.launch", "--config_file", str(DDP), "-m"]
    return subprocess.run(
        [*launcher, "lora_ga_trainer.evaluation", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=environment(), timeout=300,
    )  # fmt: skip


def test_the_command_line_evaluates_an_adapter_on_two_processes(problems, base_model, tokenizer, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_model), lora_config())
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(), disable_tqdm=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("trainable"):
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(base_model)

    options = ("--base", base_model, "--evaluation_file", problems, "--max_new_tokens", 4)
    run = command_line("gsm8k", *options, "--adapter", tmp_path / "adapter", cwd=tmp_path)
    assert ended_well(run), run.stderr
    (folder,) = (tmp_path / "evaluation").iterdir()
    assert len(finished_lines(folder / "completions.jsonl")) == 7 and run.stdout.count("gsm8k: score") == 1
    assert f"gsm8k: score 0.0 on 7 items. All of them are in {folder.relative_to(tmp_path)}." in run.stdout
    found = json.loads((folder / "results.json").read_text())["predictions"]
    prompts = [f"Q: {prediction['question']}\nA:" for prediction in found]
    assert [prediction["completion"] for prediction in found] == generate(model, tokenizer, prompts, 4)
    base = generate(AutoModelForCausalLM.from_pretrained(base_model), tokenizer, prompts, 4)
    assert [prediction["completion"] for prediction in found] != base, "the adapter was not loaded"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: name the benchmark first, one of gsm8k, humaneval, mt_bench, glue"),
        (["mmlu"], "error: name the benchmark first"),
        (
            ["gsm8k", "--base", "nowhere", "--offline", "true"],
            "`base` is nowhere, but no model can be loaded from there",
        ),
        (["gsm8k", "--base", "BASE", "--no_such", "1"], "no_such"),
        (
            ["gsm8k", "--base", "BASE", "--adapter", "nowhere", "--offline", "true"],
            "`adapter` is nowhere, but no adapter can be loaded",
        ),
        (["gsm8k", "--base", "BASE"], "openai/gsm8k cannot be loaded from the hub"),
        (["glue", "--base", "BASE"], "nyu-mll/glue cannot be loaded from the hub"),
        (["glue", "--base", "BASE", "--task", "wnli"], "`task` is 'wnli', but must be one of 'mnli'"),
        (["humaneval", "--base", "BASE"], "--allow_code_execution"),
    ],
)
def test_wrong_command_lines_end_in_one_line(arguments, message, base_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluation", *[base_model if word == "BASE" else word for word in arguments]])
    with pytest.raises(SystemExit) as ending:
        main()
    assert str(ending.value).startswith("error: ") and message in str(ending.value)
    assert not Path("evaluation").exists()
