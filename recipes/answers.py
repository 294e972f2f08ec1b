"""Exact match on the number after `####`, as GSM8K writes its final answers."""

import re
from decimal import Decimal

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

FINAL_NUMBER = re.compile(r"####\s*(-?)\s*\$?\s*(-?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> Decimal | None:
    """The first number after `####`, with sign, thousands separators and decimals; None if there is none.

    >>> final_number("2 + 2 = 4\\n#### 4"), final_number("#### $1,000.50"), final_number("#### -3.5"), final_number("4")
    (Decimal('4'), Decimal('1000.50'), Decimal('-3.5'), None)
    """
    found = FINAL_NUMBER.search(text)
    if found is None:
        return None
    minus, inner_minus, digits = found.groups()
    return Decimal((minus or inner_minus) + digits.replace(",", ""))


def count_right(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    references: list[str],
    max_new_tokens: int,
    batch_size: int = 8,
) -> int:
    """How many greedy completions end in the number of their reference. Prompts are padded on the left."""
    was_training, padding_side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    right = 0
    try:
        for start in tqdm(range(0, len(prompts), batch_size), desc="Answering held-out problems", unit="batch"):
            inputs = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True).to(model.device)
            with torch.no_grad():
                outputs = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            completions = tokenizer.batch_decode(outputs[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            for completion, reference in zip(completions, references[start : start + batch_size], strict=True):
                right += final_number(completion) is not None and final_number(completion) == final_number(reference)
    finally:
        tokenizer.padding_side = padding_side
        model.train(was_training)
    return right
