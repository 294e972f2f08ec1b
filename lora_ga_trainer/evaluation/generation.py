"""Greedy completions of many prompts.

lm-eval-harness is not used: a model in memory it evaluates in one process only (lm_eval 0.4.13, `HFLM.__init__`).
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..distributed.backends import compute_device
from .answers import answer_all


def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[str, str],
    file: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_strings: tuple[str, ...] = (),
) -> dict[str, str]:
    """The greedy completion of each prompt, by id, without special tokens; see `answer_all`.

    Args:
        stop_strings: a completion ends before the first of these that it contains.
    """

    def answer(batch: list[str]) -> list[str]:
        return generate(model, tokenizer, batch, max_new_tokens, stop_strings)

    return answer_all(prompts, answer, file, batch_size)


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    stop_strings: tuple[str, ...] = (),
) -> list[str]:
    """The greedy completion of each prompt, in one batch padded on the left. The model's mode comes out as it was."""
    was_training = model.training
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    inputs = inputs.to(compute_device(next(model.parameters())))
    # An answer ends as a training example does, with the tokenizer's token, or as the base model's own answers do.
    settings: Any = model.generation_config
    own = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    ends = {tokenizer.eos_token_id, *own} - {None}
    until = {"stop_strings": list(stop_strings), "tokenizer": tokenizer} if stop_strings else {}
    try:
        model.eval()
        with torch.no_grad():
            outputs = model.generate(  # type: ignore[operator]  # to mypy the attribute of any `nn.Module`
                **inputs,
                do_sample=False,
                repetition_penalty=1.0,  # which some models' own settings have, and is not greedy
                eos_token_id=sorted(ends),
                max_new_tokens=max_new_tokens,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                **until,
            )
    finally:
        model.train(was_training)
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [before_stop(text, stop_strings) for text in texts]


def before_stop(text: str, stop_strings: tuple[str, ...]) -> str:
    """
    >>> before_stop("return 1\\n``` done ```", ("```",))
    'return 1\\n'
    """
    return text[: min((text.find(stop) for stop in stop_strings if stop in text), default=len(text))]
