"""GLUE (Wang et al. 2019) as prompt tuning with label words, for encoder-decoder models (paper section 4.1).

Sample (mrpc):
    prompt: "classify the semantic similarity of the text: He said so.\\nHe denied it.\\nresult: "
    label word: "different"
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..distributed.backends import compute_device
from .answers import answer_all
from .arguments import EvaluationArguments
from .results import write_results
from .sources import hub_items, local_items


@dataclass(frozen=True)
class Task:
    """One of GLUE's tasks, with the prompts of the paper's code."""

    instruction: str
    columns: tuple[str, ...]
    """The texts, joined by line breaks."""
    label_words: tuple[str, ...]
    """By GLUE's own label."""
    dev_split: str = "validation"


TASKS = {
    "mnli": Task(
        "classify the semantic similarity of the text: ",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        dev_split="validation_matched",
    ),
    "sst2": Task("classify the sentiment of the text: ", ("sentence",), ("negative", "positive")),
    "cola": Task("classify the grammaticality of the text: ", ("sentence",), ("unacceptable", "acceptable")),
    "qnli": Task(
        "classify the semantic similarity of the question and the sentence: ",
        ("question", "sentence"),
        ("entailment", "not_entailment"),
    ),
    "mrpc": Task(
        "classify the semantic similarity of the text: ", ("sentence1", "sentence2"), ("different", "equivalent")
    ),
}


@dataclass
class GLUEArguments(EvaluationArguments):
    """Options of GLUE. A file needs the task's own columns and `label`, a number as in GLUE or a label word.

    Raises:
        ValueError: there is no such task, or a number is out of its range.
    """

    task: str = field(default="sst2", metadata={"help": f"One of {', '.join(TASKS)}."})
    max_prompt_tokens: int = field(default=128, metadata={"help": "Longer prompts are cut; 128 is the paper's."})

    def __post_init__(self):
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"`task` is {self.task!r}, but must be one of {', '.join(map(repr, TASKS))}.")


def prompt_of(task: Task, row: dict[str, Any]) -> str:
    """
    >>> prompt_of(TASKS["sst2"], {"sentence": "a delight"})
    'classify the sentiment of the text: a delight\\nresult: '
    """
    return task.instruction + "\n".join(row[column] for column in task.columns) + "\nresult: "


def label_word_of(task: Task, label: int | str) -> str:
    """The label word of GLUE's number, or of the word itself.

    Raises:
        ValueError: the task has no such label; GLUE's test sets have −1 everywhere.
    """
    if isinstance(label, int) and 0 <= label < len(task.label_words):
        return task.label_words[label]
    if label in task.label_words:
        return label
    raise ValueError(
        f"The label {label!r} is none of {', '.join(f'{n} ({word})' for n, word in enumerate(task.label_words))}. GLUE's test "
        "sets have no labels (-1): use the dev set."
    )


def load_split(name: str, split: str, path: str | None) -> Dataset:
    """The rows of a local file, or of GLUE's `split` on the hub, with the task's columns and `label`.

    Raises:
        ValueError: no such file, a hub that cannot be reached, or a column is missing.
    """
    columns = (*TASKS[name].columns, "label")
    if path:
        return local_items(path, columns)
    return hub_items("nyu-mll/glue", name, split, columns, "Pass a local file.")


def log_probabilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    words: tuple[str, ...],
    max_prompt_tokens: int,
) -> list[list[float]]:
    """For each prompt and each word, the mean log-probability of the word's tokens: of words of any length alike."""
    device = compute_device(next(model.parameters()))
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, truncation=True, max_length=max_prompt_tokens).to(
        device
    )
    was_training, columns = model.training, []
    try:
        model.eval()
        with torch.no_grad():
            for word in words:
                ids_L = tokenizer(word, add_special_tokens=False, return_tensors="pt")["input_ids"][0].to(device)
                labels_BL = ids_L.expand(len(prompts), -1).contiguous()
                logits_BLV = model(**inputs, labels=labels_BL).logits.float()
                chosen_BL1 = logits_BLV.log_softmax(-1).gather(-1, labels_BL[..., None])
                columns.append(chosen_BL1.mean(dim=(1, 2)))
    finally:
        model.train(was_training)
    return torch.stack(columns, dim=1).tolist()


def score(task: Task, items: list[dict[str, Any]], log_probs: list[list[float]]) -> dict[str, Any]:
    """Accuracy of the likeliest label word."""
    predictions: list[dict[str, Any]] = []
    for item, values in zip(items, log_probs, strict=True):
        probabilities = torch.tensor(values, dtype=torch.float32, device="cpu").softmax(-1).tolist()
        predicted = task.label_words[max(range(len(values)), key=values.__getitem__)]
        expected = label_word_of(task, item["label"])
        predictions.append(
            {
                "prompt": prompt_of(task, item),
                "probabilities": dict(zip(task.label_words, probabilities, strict=True)),
                "predicted": predicted,
                "expected": expected,
                "right": predicted == expected,
            }
        )
    right = sum(prediction["right"] for prediction in predictions)
    return {
        "benchmark": "glue",
        "score": right / len(predictions),
        "right": right,
        "count": len(predictions),
        "predictions": predictions,
    }


def load_items(args: GLUEArguments) -> list[dict[str, Any]]:
    """The dev set, or what is in `evaluation_file`.

    Raises:
        ValueError: a file that `load_split` refuses, or a label that the task does not have.
    """
    rows = load_split(args.task, TASKS[args.task].dev_split, args.evaluation_file)
    items = rows.select(range(min(args.evaluation_limit or len(rows), len(rows)))).to_list()
    for item in items:
        label_word_of(TASKS[args.task], item["label"])
    return items


def check(args: GLUEArguments) -> None:
    """All that can be wrong before the first answer.

    Raises:
        ValueError: see `load_items`.
    """
    load_items(args)


def evaluate(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path, args: GLUEArguments
) -> dict[str, Any]:
    """Predict every item of the dev set by the probabilities of the label words. Every process calls it.

    Raises:
        ValueError: what `check` raises, or the model is no encoder-decoder.
    """
    if not model.config.is_encoder_decoder:
        raise ValueError(f"GLUE asks encoder-decoder models such as T5, but this is a {model.config.model_type}.")
    task, items = TASKS[args.task], load_items(args)

    def answer(batch: list[str]) -> list[list[float]]:
        return log_probabilities(model, tokenizer, batch, task.label_words, args.max_prompt_tokens)

    prompts = {str(index): prompt_of(task, item) for index, item in enumerate(items)}
    found = answer_all(prompts, answer, directory / "log_probabilities.jsonl", args.evaluation_batch_size)
    results = score(task, items, list(found.values())) | {"task": args.task}
    write_results(directory, results)
    return results
