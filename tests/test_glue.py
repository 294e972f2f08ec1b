"""GLUE: prompts, label words, and the label word of the highest mean log-probability."""

import json

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_t5

from lora_ga_trainer.evaluation.glue import (
    TASKS,
    GLUEArguments,
    evaluate,
    label_word_of,
    load_split,
    log_probabilities,
    prompt_of,
)


def test_prompts_are_instruction_texts_and_result():
    assert prompt_of(TASKS["mnli"], {"premise": "a", "hypothesis": "b"}).endswith("text: a\nb\nresult: ")
    assert prompt_of(TASKS["qnli"], {"question": "a?", "sentence": "b"}).endswith("sentence: a?\nb\nresult: ")
    assert {name: task.label_words for name, task in TASKS.items()} == {
        "mnli": ("entailment", "neutral", "contradiction"),
        "sst2": ("negative", "positive"),
        "cola": ("unacceptable", "acceptable"),
        "qnli": ("entailment", "not_entailment"),
        "mrpc": ("different", "equivalent"),
    }


def test_labels_are_numbers_or_words():
    task = TASKS["mnli"]
    assert [label_word_of(task, label) for label in (0, 2, "neutral")] == ["entailment", "contradiction", "neutral"]
    for label in (-1, 3, "yes"):
        with pytest.raises(ValueError, match=r"is none of 0 \(entailment\), 1 \(neutral\).*use the dev set"):
            label_word_of(task, label)


class LabelWords:
    """`word_tokenizer`, for which the label words are words of its own: one of one token, one of three."""

    WORDS = {"negative": "w5", "positive": "w6 w7 w8"}

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, **options):
        return self.tokenizer(self.WORDS.get(text, text) if isinstance(text, str) else text, **options)


def test_probabilities_are_means_over_the_words_tokens(tokenizer):
    model, words = tiny_t5().train(), ("negative", "positive")
    prompts = ["w1 w2 w3", "w4", "w9 w1"]
    found = log_probabilities(model, LabelWords(tokenizer), prompts, words, 128)
    assert model.training
    for prompt, values in zip(prompts, found, strict=True):
        for word, value in zip(words, values, strict=True):
            ids = tokenizer(LabelWords.WORDS[word], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                # one prompt by itself; the model's own loss is minus the mean log-probability of the labels
                loss = model.eval()(**tokenizer(prompt, return_tensors="pt"), labels=ids).loss
            assert value == pytest.approx(-loss.item(), rel=1e-5)  # float32, padded to another length
            model.train()


def test_evaluate(tokenizer, tmp_path):
    rows = [{"sentence": f"w{i} w{i + 1}", "label": i % 2} for i in range(9)]
    Dataset.from_list(rows).to_parquet(tmp_path / "dev.parquet")
    model, words = tiny_t5(), LabelWords(tokenizer)
    args = GLUEArguments(task="sst2", evaluation_file=str(tmp_path / "dev.parquet"), evaluation_batch_size=4)
    results = evaluate(model, words, tmp_path, args)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    prompts = [prompt_of(TASKS["sst2"], row) for row in rows]
    expected = log_probabilities(model, words, prompts, ("negative", "positive"), 128)
    predicted = ["positive" if positive > negative else "negative" for negative, positive in expected]
    assert [prediction["predicted"] for prediction in results["predictions"]] == predicted
    right = sum(word == TASKS["sst2"].label_words[row["label"]] for word, row in zip(predicted, rows, strict=True))
    assert (results["right"], results["count"], results["score"]) == (right, 9, right / 9)
    for prediction in results["predictions"]:
        assert sum(prediction["probabilities"].values()) == pytest.approx(1)


def test_what_is_refused(tokenizer, tmp_path):
    (tmp_path / "dev.jsonl").write_text('{"text": "a", "label": 0}\n')
    with pytest.raises(ValueError, match="no column 'sentence', only text, label"):
        load_split("sst2", "validation", str(tmp_path / "dev.jsonl"))
    with pytest.raises(ValueError, match="asks encoder-decoder models such as T5, but this is a llama"):
        evaluate(tiny_model(), tokenizer, tmp_path, GLUEArguments())
    (tmp_path / "test.jsonl").write_text('{"sentence": "a", "label": -1}\n')
    args = GLUEArguments(evaluation_file=str(tmp_path / "test.jsonl"))
    with pytest.raises(ValueError, match="The label -1 is none of"):
        evaluate(tiny_t5(), tokenizer, tmp_path, args)
