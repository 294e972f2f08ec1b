"""GLUE (Wang et al. 2019) as prompts and label words for encoder-decoder models, as in the paper's code (section 4.1).

Sample (mrpc):
    prompt: "classify the semantic similarity of the text: He said so.\\nHe denied it.\\nresult:"
    completion: " different"
"""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lora_ga_trainer.cli.sources import hub_items, local_items


@dataclass(frozen=True)
class Task:
    """One of GLUE's tasks."""

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


def prompt_of(task: Task, row: dict[str, Any]) -> str:
    """The space after it belongs to the label word, so that the prompt ends where a token ends. (T5 drops it either way.)

    >>> prompt_of(TASKS["sst2"], {"sentence": "a delight"})
    'classify the sentiment of the text: a delight\\nresult:'
    """
    return task.instruction + "\n".join(row[column] for column in task.columns) + "\nresult:"


def cut(prompt: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """The start of `prompt` that, with the tokenizer's special tokens, is `max_tokens` long: the paper cuts at 128."""
    tokens = tokenizer(prompt, truncation=True, max_length=max_tokens, return_offsets_mapping=True)
    return prompt[: max(end for _, end in tokens["offset_mapping"])]


def label_of(task: Task, label: int | str) -> int:
    """GLUE's number for a label, which may be given as its word.

    Raises:
        ValueError: the task has no such label; GLUE's test sets have −1 everywhere.
    """
    if label in task.label_words:
        return task.label_words.index(label)
    if isinstance(label, int) and 0 <= label < len(task.label_words):
        return label
    raise ValueError(
        f"The label {label!r} is none of {', '.join(f'{n} ({word})' for n, word in enumerate(task.label_words))}. GLUE's test "
        "sets have no labels (-1): use the dev set."
    )


def load_split(name: str, split: str, path: str | None) -> Dataset:
    """The rows of a local file, or of GLUE's `split` on the hub, with the task's columns and `label`.

    Raises:
        ValueError: the file or a column is missing, or the hub cannot be reached.
    """
    columns = (*TASKS[name].columns, "label")
    if path:
        return local_items(path, columns)
    return hub_items("nyu-mll/glue", name, split, columns, "Pass a local file.")
