"""GLUE (Wang et al. 2019) by label words, for encoder-decoder models (paper section 4.1), with data/glue_tasks.py."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

sys.path.append(str(Path(__file__).parents[1]))  # the harness loads this file by its path

from data.glue_tasks import TASKS, cut, label_of, load_split, prompt_of


def dev_set(
    task: str,
    pretrained: str,
    revision: str = "main",
    evaluation_file: str | None = None,
    max_prompt_tokens: int = 128,
    **_,
) -> dict[str, Dataset]:
    """Rows of `prompt`, `label_words`, their numbers of `tokens`, and `label`: the index of the right one.

    The harness (0.4.13) divides by characters or bytes, not by tokens, and cuts prompts on the left; so the tokenizer does
    both here.

    Args:
        task: one of `TASKS`.
        pretrained, revision: the base model that is evaluated, as in the harness's `--model_args`.

    Raises:
        ValueError: the model is not an encoder-decoder, `load_split` refuses the file, or the task has no such label.
    """
    config = AutoConfig.from_pretrained(pretrained, revision=revision)
    if not config.is_encoder_decoder:
        raise ValueError(f"The GLUE tasks need an encoder-decoder model such as T5, but this is a {config.model_type}.")
    tokenizer = AutoTokenizer.from_pretrained(pretrained, revision=revision)
    definition, items = TASKS[task], load_split(task, TASKS[task].dev_split, evaluation_file)
    tokens = [len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) for word in definition.label_words]

    def question(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt": cut(prompt_of(definition, row), tokenizer, max_prompt_tokens),
            "label_words": list(definition.label_words),
            "tokens": tokens,
            "label": label_of(definition, row["label"]),
        }

    return {"test": Dataset.from_list([question(row) for row in items])}


def accuracy(question: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Whether the likeliest label word is the right one.

    Args:
        results: for each label word, the sum of its tokens' log-probabilities, and whether it is the greedy answer.
    """
    means = np.array([log_probability for log_probability, _ in results]) / question["tokens"]
    return {"acc": float(means.argmax() == question["label"])}
