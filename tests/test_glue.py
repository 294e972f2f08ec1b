"""GLUE: prompts, label words, and the label word of the highest mean log-probability."""

import json

import pytest
import torch
from data.glue_tasks import TASKS, cut, label_of, load_split, prompt_of
from datasets import Dataset
from evaluation.arguments import EvaluationArguments
from evaluation.glue import accuracy, dev_set
from evaluation.harness import evaluate
from recipe_cases import LABEL_WORDS
from tiny import tiny_model, tiny_t5, word_tokenizer
from tokenizers import normalizers
from transformers import AutoTokenizer


def test_prompts_are_instruction_texts_and_result():
    assert prompt_of(TASKS["mnli"], {"premise": "a", "hypothesis": "b"}).endswith("text: a\nb\nresult:")
    assert prompt_of(TASKS["qnli"], {"question": "a?", "sentence": "b"}).endswith("sentence: a?\nb\nresult:")
    assert {name: task.label_words for name, task in TASKS.items()} == {
        "mnli": ("entailment", "neutral", "contradiction"),
        "sst2": ("negative", "positive"),
        "cola": ("unacceptable", "acceptable"),
        "qnli": ("entailment", "not_entailment"),
        "mrpc": ("different", "equivalent"),
    }


def test_a_prompt_is_cut_where_its_tokens_are(tokenizer):
    assert cut("w1 w2  w3 w4", tokenizer, 3) == "w1 w2  w3"
    assert cut("w1 w2 w3", tokenizer, 3) == "w1 w2 w3"


def test_labels_are_numbers_or_words():
    task = TASKS["mnli"]
    assert [label_of(task, label) for label in (0, 2, "neutral")] == [0, 2, 1]
    for label in (-1, 3, "yes"):
        with pytest.raises(ValueError, match=r"is none of 0 \(entailment\), 1 \(neutral\).*use the dev set"):
            label_of(task, label)


@pytest.fixture
def t5(tmp_path) -> str:
    """A folder with the tiny T5; "positive" is one token of its tokenizer, "negative" has none of its own and is two."""
    tiny_t5().save_pretrained(tmp_path / "t5")
    tokenizer = word_tokenizer(LABEL_WORDS)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("negative", "w5 w6")
    tokenizer.save_pretrained(tmp_path / "t5")
    return str(tmp_path / "t5")


def test_the_likeliest_label_word_is_that_of_the_highest_mean(t5, tmp_path):
    """Each against the model's own loss on it, for one prompt by itself, in the tokens of the training."""
    rows = [{"sentence": f"w{i} w{i + 1}" + " w3" * (i % 3), "label": i % 2} for i in range(9)]
    Dataset.from_list(rows).to_parquet(tmp_path / "dev.parquet")
    model, tokenizer = tiny_t5(), AutoTokenizer.from_pretrained(t5)
    args = EvaluationArguments(evaluation_file=str(tmp_path / "dev.parquet"), evaluation_batch_size=4)
    found = evaluate(model, tokenizer, ["sst2_label_words"], tmp_path / "out", args, {"pretrained": t5})
    (samples,) = (tmp_path / "out").glob("samples_*.jsonl")
    items = [json.loads(line) for line in samples.open()]

    assert items[0]["doc"]["tokens"] == [2, 1]
    right = 0
    for row, item in zip(rows, items, strict=True):
        prompt = tokenizer(prompt_of(TASKS["sst2"], row), return_tensors="pt")
        means = []
        for word, (total, _) in zip(LABEL_WORDS, item["filtered_resps"], strict=True):
            ids = tokenizer(f" {word}", add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                means.append(-model.eval()(**prompt, labels=ids).loss.item())
            assert float(total) / ids.numel() == pytest.approx(means[-1], rel=1e-5)  # float32, padded to another length
        right += means[row["label"]] == max(means)
        assert item["acc"] == (means[row["label"]] == max(means))
    assert (found["sst2_label_words"]["acc,none"], found["sst2_label_words"]["sample_len"]) == (right / 9, 9)


def test_words_of_any_length_alike():
    """By the sum the shorter word would win; by the mean the longer one does."""
    question = {"tokens": [4, 1], "label": 0}
    assert accuracy(question, [(-4.0, False), (-2.0, False)]) == {"acc": 1}
    assert accuracy(question | {"label": 1}, [(-4.0, False), (-2.0, False)]) == {"acc": 0}


def test_what_is_refused(t5, tmp_path):
    (tmp_path / "dev.jsonl").write_text('{"text": "a", "label": 0}\n')
    with pytest.raises(ValueError, match="no column 'sentence', only text, label"):
        load_split("sst2", "validation", str(tmp_path / "dev.jsonl"))
    tiny_model().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="need an encoder-decoder model such as T5, but this is a llama"):
        dev_set("sst2", str(tmp_path / "llama"))
    with pytest.raises(ValueError, match="nyu-mll/glue cannot be loaded from the hub"):
        dev_set("mnli", t5)
    (tmp_path / "test.jsonl").write_text('{"sentence": "a", "label": -1}\n')
    with pytest.raises(ValueError, match="The label -1 is none of"):
        dev_set("sst2", t5, evaluation_file=str(tmp_path / "test.jsonl"))
